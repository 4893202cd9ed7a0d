"""Fuzzing: what runs the Rust targets, and the targets in Python."""
