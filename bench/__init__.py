"""Benchmarks against the best peer of each part: `python -m bench.run [ONLY=name] [QUICK=1]`."""
