"""The benchmarks' own arithmetic, records and pages, and the programs they drive."""
