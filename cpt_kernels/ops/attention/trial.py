"""A trial of a variable-length kernel on the device where it would run: forward and backward on a few segments.

A build of a kernel may align its causal mask at the start of queries and keys, count windows differently, or lack a
backward on this GPU. Where queries are fewer than keys, as behind a shared prompt, its results would be wrong without
an error. So they are compared with those of eager PyTorch in fp64.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

from ..backends import on_device_of
from .segments import SEGMENTWISE, segment_attention
from .varlen import Call, Kernel, Need, varlen_attention

_LENGTHS = [(3, 3), (1, 70), (40, 150), (129, 200)]  # (queries, keys), around the sizes of kernel tiles
_HEADS = 4
_NAMES = (
    "the output",
    "the gradient of query",
    "the gradient of key",
    "the gradient of value",
    "the gradient of sinks",
)


def trial_failure(kernel: Kernel, need: Need) -> str | None:
    """Returns how the results of a call like ``need`` differ from the reference's; None if they do not.

    It also returns None for a device that this machine does not have, on which nothing can run.
    """
    if need.device == "cuda" and not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if need.device == "cuda" else torch.device(need.device)
    # The caller's modes (no_grad, autocast, hooks of checkpointing) belong to its thread, so the trial has its own.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try, kernel, need, device).result()


def _try(kernel: Kernel, need: Need, device: torch.device) -> str | None:
    call, inputs = _call(need, device), _inputs(need, device)
    with on_device_of(inputs[0]):
        eager = _results(None, call, inputs, need.dtype)
        exact = _results(None, call, inputs, torch.float64)
        try:
            found = _results(kernel, call, inputs, need.dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a build raises that does not support this GPU or this call
            return f"a trial fails ({type(error).__name__}: {error})".splitlines()[0]
    eps = max(torch.finfo(need.dtype).eps, 1e-10)
    for name, x, y, reference in zip(_NAMES, found, eager, exact):
        difference, allowed = ((z.double() - reference).abs().max().item() for z in (x, y))
        if not difference <= 4 * allowed + 16 * eps * reference.abs().max().item():
            return f"{name} differs by {difference:.2g} in a trial with fewer queries than keys"
    return None


def _call(need: Need, device: torch.device) -> Call:
    queries, keys = zip(*_LENGTHS)
    offsets = [torch.tensor([0, *accumulate(side)], dtype=torch.int32, device=device) for side in (queries, keys)]
    return Call(
        offsets[0],
        offsets[1],
        max(queries),
        max(keys),
        scale=need.head_size**-0.5,
        window=33 if need.window else None,
        softcap=5.0 if need.softcap else None,
        deterministic=need.deterministic,
    )


def _inputs(need: Need, device: torch.device) -> list[Tensor]:
    """Returns the gradient that arrives at the output, query, key, value, and sinks if they are needed."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (sum(side) for side in zip(*_LENGTHS))
    heads, size = _HEADS // 2 if need.gqa else _HEADS, need.head_size
    shapes = [(queries, _HEADS, size)] * 2 + [(keys, heads, size)] * 2 + [(_HEADS,)] * need.sinks
    return [torch.randn(*shape, generator=generator).to(device, need.dtype) for shape in shapes]


def _results(kernel: Kernel | None, call: Call, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns output and gradients of a kernel, or of eager PyTorch, in ``dtype``."""
    upstream, *leaves = (x.to(dtype, copy=True) for x in inputs)
    q, k, v, *sinks = (leaf.requires_grad_() for leaf in leaves)
    sink = sinks[0] if sinks else None
    if kernel is None:
        out = segment_attention(SEGMENTWISE["eager"], q, k, v, _LENGTHS, call, sink)
    else:
        out = varlen_attention(kernel, q, k, v, call, sink)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
