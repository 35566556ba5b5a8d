"""Benchmarks: what this package gains over what one would use instead, on this machine. ``python -m bench SUBJECT``."""
