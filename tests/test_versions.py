"""The versions that are tested are those that pyproject.toml allows."""

from __future__ import annotations

import re

from packaging.requirements import Requirement

from tests.helpers import ROOT

# ruff and mypy run under the newest versions only; the others need a GPU or a folder of their own.
NOT_IN_OLDEST = {"ruff", "mypy", "flash-attn", "deepspeed", "s3fs", "gcsfs", "adlfs"}


def specifiers(lines) -> dict[str, str]:
    """Package -> the one version that its requirement names."""
    requirements = [Requirement(line) for line in lines]
    return {requirement.name: str(requirement.specifier).lstrip(">=") for requirement in requirements}


def test_the_oldest_constraints_are_the_lower_bounds():
    project = (ROOT / "pyproject.toml").read_text().split("[project]")[1].split("[project.scripts]")[0]
    bounds = specifiers(re.findall(r'"([\w-]+(?:\[\w+\])?(?:>=|==)[^"]+)"', project))
    text = (ROOT / "constraints-oldest.txt").read_text()
    oldest = specifiers(line for line in text.splitlines() if line and not line.startswith("#"))
    assert bounds.keys() - NOT_IN_OLDEST == oldest.keys() - {"setuptools", "wheel"}
    for package in bounds.keys() - NOT_IN_OLDEST:
        pinned = oldest[package]
        assert pinned == bounds[package] or re.fullmatch(rf"{re.escape(bounds[package])}(\.0)+", pinned), package
