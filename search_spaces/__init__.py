"""The built-in search spaces, one file per family."""
