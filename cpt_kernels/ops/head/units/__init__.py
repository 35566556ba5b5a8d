"""Units of the gradient sums in fp16, which keep ``g X`` within the range of the dtype.

The forward adds up ``dW = G^T (g X)`` before it knows the loss scale, and g may be far below what fp16 holds: 1e-7 for
a DPO pair whose log-ratios differ by 30 nats at beta 0.5. So g is divided by a unit, a power of two, which makes the
largest element of ``g X`` about 2^11, and the backward multiplies the finished sums by the unit. If the weights of a
tile are too large for the unit, the unit grows and the sums so far are rescaled. That costs a pass over the sums, but
is rare. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import backends, vocab_score
from ...backends import Backend

# A function of this table multiplies a dense fp32 tensor by a () tensor on its device, in place.
BACKENDS: dict[str, Backend] = {
    "eager": Backend(f"{__name__}:rescale_eager"),
    "triton": Backend("cpt_kernels.ops.head.units.triton:rescale_triton", check=backends.check_triton),
}

_TARGET = 11  # log2 of the largest element of g X in a new unit
_HEADROOM = 16  # a tile may exceed the target by this factor: 2^15 is within fp16, whose largest number is 65504
_SMALLEST = 2.0**-126


def new_unit(x: Tensor) -> Tensor | None:
    """Returns the unit () fp32 of sums that are zero; None if products in the dtype of ``x`` need none."""
    return x.new_full((), _SMALLEST, dtype=torch.float32) if x.dtype == torch.float16 else None


def unit_for(
    x: Tensor,  # (R, H)
    g: Tensor,  # (R,)
) -> Tensor:
    """Returns the unit () in which the largest element of ``g x`` and of ``g`` is at most 2^11."""
    low, high = torch.aminmax(x)
    largest = torch.stack([g.abs().amax().float(), torch.maximum(-low, high).float().clamp(min=1)])
    exponent = torch.frexp(largest).exponent.sum() - _TARGET
    # The smallest unit stands for sums that are zero, so a weight that is not 0 has a larger one.
    return torch.ldexp(torch.ones_like(largest[0]), exponent.clamp(-125, 126)).where(largest[0] != 0, _SMALLEST)


def in_unit(
    unit: Tensor,  # () of the sums, overwritten
    sums: tuple[Tensor | None, ...],  # rescaled in place if the unit grows
    x: Tensor,  # (R, H)
    g: Tensor,  # (R,)
    backend: str,
) -> Tensor:
    """Returns ``g`` in the unit of the sums, which grows if ``g x`` would leave the range of fp16."""
    needed = unit_for(x, g)
    # Sums in the smallest unit are zero and need no pass. The first weight that is not 0, however small, ends it.
    grown = torch.where((needed > _HEADROOM * unit) | (unit == _SMALLEST), needed, unit)
    factor = torch.where(unit == _SMALLEST, 1.0, unit / grown)
    for tensor in sums:
        if tensor is not None:
            name = backends.resolve(backend, tensor, BACKENDS, vocab_score.BACKENDS)
            rescale: Callable[[Tensor, Tensor], None] = BACKENDS[name].load()
            rescale(tensor, factor)
    unit.copy_(grown)
    return g / unit


def rescale_eager(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies in place; on a CPU only if the factor is not 1, which on a GPU would have to be waited for."""
    if tensor.device.type != "cpu" or factor != 1:
        tensor.mul_(factor)
