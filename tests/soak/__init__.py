"""The soak: hours of mixed I/O on a real cluster while something breaks every few seconds, from one seed."""
