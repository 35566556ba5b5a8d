"""The one tolerance rule, for every output and every gradient.

A result is held to an fp64 reference, and to what eager PyTorch reaches in the same dtype on the same inputs:

    finite;   max |x - ref|  <= 2 max |eager - ref|  + eps max |ref|
              mean |x - ref| <=   mean |eager - ref| + eps mean |ref|

with eps the machine epsilon of the dtype. The mean matters: a bound on the maximum alone hides errors that are local.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(result: Tensor, eager: Tensor, reference: Tensor, what: str, eps: float | None = None) -> None:
    """Hold ``result`` to the rule. ``eager`` has the dtype whose epsilon counts; ``reference`` is fp64."""
    assert reference.dtype == torch.float64, "the reference must be fp64"
    assert result.shape == eager.shape == reference.shape, f"{what}: {result.shape}, {eager.shape}, {reference.shape}"
    assert torch.isfinite(result).all(), f"{what}: not finite"
    eps = torch.finfo(eager.dtype).eps if eps is None else eps
    if reference.numel() == 0:
        return
    error, eager_error = ((x.double() - reference).abs() for x in (result, eager))
    for name, reduce, factor in (("max", torch.max, 2.0), ("mean", torch.mean, 1.0)):
        found, bound = reduce(error), factor * reduce(eager_error) + eps * reduce(reference.abs())
        assert found <= bound, f"{what}: {name} error {found:.3e} > {bound:.3e} (eager {reduce(eager_error):.3e})"
