"""The replica server: metadata and disk step by step, calls with a fake data plane, the process for real."""
