"""Benchmarks that need a GPU; they are run by hand and are not in `make bench`."""
