"""Benchmarks: what this package gains, on this machine, over what one would use instead. ``python -m bench SUBJECT``."""
