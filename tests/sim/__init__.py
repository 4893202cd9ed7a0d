"""The deterministic simulator: whole clusters of the deciding code on virtual time. Start: README in
docs/testing.md."""
