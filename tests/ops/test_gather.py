"""Gathers of repeated rows and segment sums: gradients are exact, summed in fp32 or better, in a fixed order."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.packing import scatter_rounds
from cpt_kernels.ops.attention import AttentionLayout, shared_prompt_attention
from cpt_kernels.ops.gather import gather_rows, segment_sum


def _rounds(index: torch.Tensor, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.from_numpy(to), torch.from_numpy(source)) for to, source in scatter_rounds(index.numpy(), rows)]


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_gather_rows_against_index_add(shape, seed):
    random = np.random.default_rng(seed)
    rows, count = int(random.integers(1, 30)), int(random.integers(0, 60))
    index = torch.from_numpy(random.integers(0, rows, count))
    x = torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True)
    out = gather_rows(x, index, _rounds(index, rows))
    upstream = torch.randn(count, *shape, dtype=torch.float64)
    out.backward(upstream)
    assert torch.equal(out, x[index])
    torch.testing.assert_close(x.grad, torch.zeros_like(x).index_add(0, index, upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_repeated_rows_are_summed_in_fp32(dtype):
    index = torch.zeros(301, dtype=torch.int64)
    x = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    upstream = torch.full((301, 1), 0.25, dtype=dtype)
    upstream[0] = 256
    gather_rows(x, index, _rounds(index, 2)).backward(upstream)
    assert x.grad.dtype == dtype and x.grad[:, 0].tolist() == [torch.tensor(256 + 75.0).to(dtype).item(), 0]


class Called(TorchDispatchMode):
    """Collects the names of operators that run inside, with ``accumulate`` appended where that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        accumulates = "index_put" in function._opname and True in (*args[3:], (kwargs or {}).get("accumulate"))
        self.names.add(function._opname + " accumulate" * accumulates)
        return function(*args, **(kwargs or {}))


ATOMIC_ON_CUDA = re.compile("index_add|scatter_add|scatter_reduce|accumulate|index_select_backward|embedding")


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_nothing_in_the_backward_of_a_shared_prompt_is_atomic_on_cuda(backend):
    """Several completions send gradients to the prompt's keys and values and to its last row, in a fixed order."""
    row = {
        "prompt_ids": [5, 6, 7],
        "completion_ids": [[8, 9], [4], [3]],
        "chosen": [0],
        "rejected": [1],
        "targets": [0],
    }
    batch = PackedCollator()([row])
    query, key, value = (torch.randn(7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = shared_prompt_attention(query, key, value, AttentionLayout.of(batch), backend=backend)
    rows = gather_rows(out, batch["predictor_index"], batch["predictor_rounds"])
    loss = segment_sum(rows.square().sum((1, 2)), batch["cu_completions"]).sum()
    with Called() as called:
        loss.backward()
    assert "index_put_" in called.names and not [name for name in called.names if ATOMIC_ON_CUDA.search(name)]
    with Called() as naive:
        key[AttentionLayout.of(batch).kv_index].sum().backward()
    assert [name for name in naive.names if ATOMIC_ON_CUDA.search(name)]


def test_repeated_rows_are_summed_in_the_order_of_their_completions():
    """Bit for bit the sum from the first occurrence to the last, for values whose sum depends on the order."""
    index = torch.tensor([1, 0, 1, 1, 0, 1])
    x = torch.zeros(2, requires_grad=True)
    upstream = torch.tensor([1e8, 3.0, 1.0, -1e8, 4.0, 1.0])
    for _ in range(2):
        (grad,) = torch.autograd.grad(gather_rows(x, index, _rounds(index, 2)), x, upstream)
        assert grad.tolist() == [7.0, 1.0]  # (1e8 + 1) is 1e8 in fp32


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4], [2, 0, 5], [0], []], ids=str)
def test_segment_sum(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(sum(lengths), dtype=torch.float64, requires_grad=True)
    out = segment_sum(values, offsets)
    expected = [part.sum() for part in values.split(lengths)] if lengths else []
    torch.testing.assert_close(out, torch.stack(expected) if expected else values.new_zeros(0))
    if lengths:
        torch.autograd.gradcheck(lambda x: segment_sum(x, offsets), values)


def test_segment_sum_accumulates_in_fp64():
    values = torch.full((30_001,), 1e-4)
    values[0] = 1e4
    out = segment_sum(values, torch.tensor([0, 30_001]))
    assert out.dtype == torch.float32 and abs(out.item() - values.double().sum().item()) <= 1e4 * 2**-24
