"""The ``dolmen`` command as a person meets it: real processes, real exit codes."""
