"""Tests: one folder a piece; what crosses pieces is in tests/system and tests/faults."""
