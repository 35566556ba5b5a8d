"""The table of the options of ``cpt-train``, cached on disk.

The options are dataclass fields, among them those of transformers' ``TrainingArguments``, whose import takes seconds.
``cpt-train --help`` and a mistyped option need the names, types, defaults and help alone, so these are kept in the
user's cache folder and read again without torch. The table is written anew after any change of Python, of a package
that it depends on, or of a source file of this package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..files import cache_folder, write_text
from .option_types import Option, OptionTable

_PACKAGES = ("cpt-kernels", "transformers", "accelerate", "torch")  # torch decides the default of `optim`
_SOURCE = Path(__file__).parents[1]


@functools.cache
def option_table() -> OptionTable:
    """Returns the table, from the cache if that is up to date."""
    path, key = _cache_file(), _key()
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached.pop("key") == key:
            options = {name: Option(**option) for name, option in cached.pop("options").items()}
            return OptionTable(options, **cached)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # missing or damaged
    from .options import build_table

    table = build_table()
    with contextlib.suppress(OSError):  # a home that cannot be written to only costs the time
        write_text(path, json.dumps({"key": key, **asdict(table)}))
    return table


def _cache_file() -> Path:
    """Returns the file of this installation."""
    installation = hashlib.sha256(f"{sys.prefix} {_SOURCE}".encode()).hexdigest()[:16]
    return cache_folder() / f"options-{installation}.json"


def _key() -> str:
    """Identifies what the table depends on: Python, packages by version, our own files by size and time."""
    parts = [sys.version, *(f"{name} {package_version(name)}" for name in _PACKAGES)]
    for folder, _, names in os.walk(_SOURCE):
        for path in (os.path.join(folder, name) for name in names if name.endswith(".py")):
            stat = os.stat(path)
            parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def package_version(name: str) -> str:
    """Returns the version of an installed package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
