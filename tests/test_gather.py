"""Sums over rows that occur several times, and over segments: exact, in fp32 or better, in a fixed order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpt_kernels.data.packing import scatter_levels
from cpt_kernels.ops.gather import gather_rows, segment_sum


def _levels(index: torch.Tensor, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.from_numpy(to), torch.from_numpy(source)) for to, source in scatter_levels(index.numpy(), rows)]


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_gather_rows_against_index_add(shape, seed):
    random = np.random.default_rng(seed)
    rows, count = int(random.integers(1, 30)), int(random.integers(0, 60))
    index = torch.from_numpy(random.integers(0, rows, count))
    x = torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True)
    out = gather_rows(x, index, _levels(index, rows))
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
    gather_rows(x, index, _levels(index, 2)).backward(upstream)
    assert x.grad.dtype == dtype and x.grad[:, 0].tolist() == [torch.tensor(256 + 75.0).to(dtype).item(), 0]


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
