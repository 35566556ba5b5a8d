"""The version of the package, which equals the one in pyproject.toml."""

__version__ = "0.1.0"
