"""Shared by the tests: small models, rows, and runs in other processes. ``ROOT`` is the root of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
