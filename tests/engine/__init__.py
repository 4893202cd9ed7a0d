"""The engine's deciding parts as lists of events and in simulation; the process with real replica servers."""
