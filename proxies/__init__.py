"""The built-in zero-cost proxies, one file per proxy."""
