"""The daemon: pure reconcilers from lists of facts, its shells with fakes, its processes for real."""
