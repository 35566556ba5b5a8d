"""The head with each kernel backend, by the tolerance rule: on a GPU, else interpreted (Triton), emulated (CUDA)."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch

from cpt_kernels.losses import build_loss
from cpt_kernels.ops.backends import has_extension
from cpt_kernels.ops.linear_preference import HeadOptions, Pairs, linear_preference_loss
from tests.helpers.emulation import emulated
from tests.numerics import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS, HIDDEN, VOCAB = [3, 5, 1, 7, 2, 2, 9, 4, 6, 1, 8, 3, 5, 5, 10, 1], 16, 37
REFERENCE = [-3.5 * length for length in LENGTHS]


def run(dtype: torch.dtype, backend: str, loss: str, trained: bool, **options) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(DEVICE, dtype).requires_grad_(trained)
    targets = torch.randint(VOCAB, (rows,), generator=generator).to(DEVICE)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def index(start: int) -> torch.Tensor:
        return torch.arange(start, len(LENGTHS), 2, device=DEVICE)

    offsets = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    pairs = Pairs(
        offsets,
        LENGTHS,
        chosen=index(0),
        rejected=index(1),
        sft_targets=index(0),
        pair_blocks=[(2, 1)] * (len(LENGTHS) // 2),
        ref_logps=torch.tensor(REFERENCE, device=DEVICE, dtype=statistics),
        tokens_per_pair=2.0,
    )
    tiles = HeadOptions(backend=backend, memory_mb=VOCAB * dtype.itemsize * 20 / 2**20)
    out = linear_preference_loss(hidden, weight, targets, pairs, build_loss(loss, **options), options=tiles)
    (out.loss / 8).backward()
    found = {"loss": out.loss.detach(), "losses": out.losses, "logps": out.completion_logps.detach()}
    return found | {"dX": hidden.grad} | ({"dW": weight.grad} if trained else {})


@pytest.mark.device
@pytest.mark.parametrize("backend", ["triton"] if GPU and not has_extension() else ["triton", "cuda"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("sigmoid", {"beta": 0.3, "label_smoothing": 0.1}),
        ("slic", {"slic_lambda": 0.5}),
        ("sft", {}),
        ("ipo", {}),
        ("hinge", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_head_on_kernels(backend, loss, options, dtype, trained, monkeypatch):
    exact = run(torch.float64, "eager", loss, trained, **options)
    eager = run(dtype, "eager", loss, trained, **options)
    with emulated(monkeypatch) if backend == "cuda" and not GPU else contextlib.nullcontext():
        found = run(dtype, backend, loss, trained, **options)
    for name, reference in exact.items():
        assert_close(found[name], eager[name], reference, f"{loss} {name}", eps=torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_products_at_sizes_of_tensor_cores(trained, monkeypatch):
    """The sizes above are odd; these let cuBLAS take the products that it takes in training, summed in fp32."""
    monkeypatch.setattr(sys.modules[__name__], "HIDDEN", 512)
    monkeypatch.setattr(sys.modules[__name__], "VOCAB", 4096)
    exact, eager, found = (
        run(dtype, backend, "sigmoid", trained)
        for dtype, backend in ((torch.float64, "eager"), (torch.bfloat16, "eager"), (torch.bfloat16, "auto"))
    )
    for name, reference in exact.items():
        assert_close(found[name], eager[name], reference, name, eps=torch.finfo(torch.bfloat16).eps)
