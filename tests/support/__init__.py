"""Tools that tests of whole processes share. Each module says what it owns."""
