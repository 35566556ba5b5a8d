"""Parameters of tests that run an operator by several implementations, some of them on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def device_params(names: Iterable[str]) -> list:
    """Returns parameters by name. Those of emulated CUDA kernels, ``cuda`` and ``cuda-...``, run on the CPU only.

    The others, and ``cuda-gpu``, carry the marker ``device``.
    """
    return [
        name if name.startswith("cuda") and name != "cuda-gpu" else pytest.param(name, marks=pytest.mark.device)
        for name in names
    ]
