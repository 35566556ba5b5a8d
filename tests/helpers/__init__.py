"""What the tests share: small models, rows, runs in processes of their own. ``ROOT`` is the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
