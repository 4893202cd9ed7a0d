"""Incidents on the real system: one test each, with real processes, real kills and real disks."""
