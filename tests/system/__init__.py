"""The whole system: real processes, real clients, real kills."""
