"""One disk's replicas: metadata, sessions, the server process. Sibling of engine."""
