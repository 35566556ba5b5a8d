"""Rescaling in Triton: the kernel reads the factor on the device, and returns at once if it is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import backends

_BLOCK = 4096
_PROGRAMS = 1024  # where the factor is 1 the time is that of their launch


def rescale_triton(
    tensor: Tensor,  # fp32, dense
    factor: Tensor,  # () fp32
) -> None:
    """Multiplies in place, as ``rescale_eager`` does, without a pass over the tensor if the factor is 1."""
    size = tensor.numel()
    with backends.on_device_of(tensor):
        _rescale_kernel[(min(_PROGRAMS, triton.cdiv(size, _BLOCK)),)](tensor, factor, size, BLOCK=_BLOCK)


@triton.jit
def _rescale_kernel(
    values,  # (size,)
    factor,  # ()
    size,
    BLOCK: tl.constexpr,
):
    scale = tl.load(factor)
    if scale != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            index = start + tl.arange(0, BLOCK)
            inside = index < size
            tl.store(values + index, tl.load(values + index, mask=inside) * scale, mask=inside)
