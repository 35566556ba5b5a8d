"""Benchmarks that compare this package with its alternatives on this machine: ``python -m bench SUBJECT``."""
