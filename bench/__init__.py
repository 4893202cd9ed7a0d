"""Workloads, runner, records, and the comparison with other systems."""
