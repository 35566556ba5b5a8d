"""Which backend ``auto`` is, that it says so once, and what a backend asked for by name needs."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch

from cpt_kernels.losses import build_loss
from cpt_kernels.ops import backends
from cpt_kernels.ops.backends import BUILD_HINT, automatic, resolve
from cpt_kernels.ops.linear_preference import HeadOptions, linear_logprobs
from cpt_kernels.ops.pair_loss import kernel_options, pair_loss
from cpt_kernels.ops.vocab_score import vocab_score

FP32 = (torch.float32,)


@pytest.fixture(autouse=True)
def _fresh():
    for cached in (automatic, backends.extension_misses, backends._announce):
        cached.cache_clear()
    yield
    for cached in (automatic, backends.extension_misses):
        cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Let there be a GPU, as far as choosing a backend sees one; gives a tensor on it."""

    def make(capability=(9, 0), extension=True, hip=None, releases=(13, 13)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backends, "has_extension", lambda: extension)
        monkeypatch.setattr(backends, "load_extension", lambda: SimpleNamespace(cuda_releases=lambda: releases))
        monkeypatch.setattr(torch.version, "hip", hip)
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)

    return make


@pytest.mark.parametrize(
    ("options", "expected", "said"),
    [
        ({}, "cuda", "kernels on cuda: the CUDA extension"),
        ({"capability": (8, 0)}, "cuda", "kernels on cuda: the CUDA extension"),
        ({"extension": False}, "triton", f"kernels on cuda: Triton; the CUDA extension is not built ({BUILD_HINT})"),
        (
            {"capability": (7, 5)},
            "triton",
            "kernels on cuda: Triton; the CUDA extension needs compute capability 8.0, and cuda:0 has 7.5",
        ),
        ({"releases": (12, 13)}, "cuda", "kernels on cuda: the CUDA extension"),
        (
            {"releases": (13, 12)},
            "triton",
            "kernels on cuda: Triton; the CUDA extension needs a driver for CUDA 13, and this one is for CUDA 12: build"
            " it with that CUDA's nvcc",
        ),
        ({"hip": "6.4"}, "triton", "kernels on cuda: Triton"),
    ],
)
def test_auto_on_a_gpu(gpu, caplog, options, expected, said):
    tensor = gpu(**options)
    assert [resolve("auto", tensor, FP32) for _ in range(3)] == [expected] * 3
    assert caplog.messages == [said]


def test_auto_says_once_what_it_took(caplog):
    tile, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    offsets, first = torch.tensor([0, 3]), torch.tensor([0])
    for _ in range(2):
        vocab_score(tile, targets)
        pair_loss(tile[:, 0], offsets, first, loss="sft")
        linear_logprobs(tile, torch.randn(5, 8, requires_grad=True), targets)
    assert caplog.messages == ["kernels on cpu: eager PyTorch"]


def test_nothing_is_said_where_nothing_was_chosen(caplog, monkeypatch):
    tile, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    vocab_score(tile, targets, backend="eager")
    vocab_score(tile.double(), targets)
    linear_logprobs(tile, torch.randn(5, 8), targets, options=HeadOptions(backend="eager"))
    monkeypatch.setenv("RANK", "1")
    vocab_score(tile, targets)
    assert caplog.messages == []


def test_a_gpu_that_the_extension_is_not_for(gpu):
    with pytest.raises(
        RuntimeError, match=r"needs compute capability 8.0, and cuda:0 has 7.5; or take backend='triton'"
    ):
        resolve("cuda", gpu(capability=(7, 5)), FP32)
    assert resolve("eager", gpu(capability=(7, 5)), FP32) == "eager"
    backends.extension_misses.cache_clear()
    assert resolve("cuda", gpu(capability=(8, 6)), FP32) == "cuda"


@pytest.mark.skipif(not backends.has_extension(), reason="the CUDA extension is not built")
def test_the_extension_knows_its_cuda_and_the_drivers():
    runtime, driver = backends.load_extension().cuda_releases()
    assert runtime >= 12 and (driver > 0) == torch.cuda.is_available()


def test_unknown_backends_and_dtypes():
    tensor = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="choose one of auto, eager, triton, cuda"):
        resolve("rocm", tensor, FP32)
    with pytest.raises(ValueError, match=r"takes torch.float32, not torch.float64"):
        resolve("triton", tensor, FP32)
    assert resolve("auto", tensor, FP32) == "eager"


@pytest.mark.parametrize("name", ["vocab_score", "pair_loss"])
def test_triton_launches_on_the_gpu_of_its_tensors(name, monkeypatch):
    """Not on the current one, where their addresses mean nothing: a head may lie on another than the first."""
    module, inside = importlib.import_module(f"cpt_kernels.ops.{name}.triton"), []

    @contextlib.contextmanager
    def on_device_of(tensor):
        inside.append(tensor)
        yield
        inside.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: inside.append("launched")

    monkeypatch.setattr(backends, "on_device_of", on_device_of)
    monkeypatch.setattr(module, f"_{name}_kernel", Kernel())
    if name == "vocab_score":
        tensor, launches = torch.zeros(2, 5), 1
        module.vocab_score_triton(tensor, torch.tensor([0, 1]), None, 1.0, None, 5, False, False)
    else:
        tensor, launches = torch.zeros(100), 2
        options = kernel_options(build_loss("sft"))
        index = torch.arange(100)
        module.pair_loss_triton(tensor, torch.arange(101), index, None, None, None, "sft", 1.0, **options)
    assert inside[0] is tensor and inside[1:] == ["launched"] * launches + ["left"]
