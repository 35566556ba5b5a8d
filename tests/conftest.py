"""Environment variables that must be set before torch and Triton are imported, and the skip of tests for a GPU."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for deterministic algorithms
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the trainer refuses several GPUs in one process

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before ``-m`` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests with the marker ``gpu`` where there is no CUDA device.

    Tests with the marker ``device`` run on a CUDA device where there is one, and there get the marker ``gpu`` too, so
    that ``-m gpu`` selects all tests that need the device.
    """
    available = torch.cuda.is_available()
    for item in items:
        if available and item.get_closest_marker("device"):
            item.add_marker("gpu")
        elif not available and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leaves what the imports made out of every garbage collection, which is most of all objects."""
    gc.collect()
    gc.freeze()
