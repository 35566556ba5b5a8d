"""Part of ``gpu_check`` that times the kernels between the head's matrix products, with every backend."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cpt_kernels.ops import backends
from cpt_kernels.ops.head.tiles import row_stride
from cpt_kernels.ops.pair_loss import pair_loss
from cpt_kernels.ops.vocab_score import vocab_score

from .meter import Context, Row, copy_rate, describe, kernel_microseconds, measure

# What vocab_score does: in training (logging asks for statistics), without statistics, and for the reference.
WORK = {
    "score and statistics": {"score": True, "statistics": True},
    "score": {"score": True},
    "log-probs": {},
}


def backends_of(context: Context) -> list[str]:
    """Returns the backends that run here; only eager on a CPU."""
    if context.device == "cpu":
        return ["eager"]
    return [*(["cuda"] if backends.has_extension() else []), "triton", "eager"]


def rows(context: Context) -> Iterator[Row]:
    """Times ``vocab_score`` as a share of the copy bandwidth, and ``pair_loss`` in microseconds.

    The tile has 4096 rows of 128256 bf16 logits, 1 GB, as far apart as the rows of the head's tiles.
    """
    yield from copy_rate(context)
    count, vocab = (16, 501) if context.tiny else (4096, 128256)
    dtype = torch.float32 if context.tiny else torch.bfloat16
    generator = torch.Generator(context.device).manual_seed(0)
    buffer = torch.empty(count, row_stride(vocab, torch.device(context.device)), dtype=dtype, device=context.device)
    logits = buffer.normal_(generator=generator)[:, :vocab]
    targets = torch.randint(vocab, (count,), device=context.device, generator=generator)
    for what, options in WORK.items():
        for backend in backends_of(context):
            work = partial(_score, context, logits, targets, options, backend)
            yield from context.attempt(f"vocab_score {backend}, {what}", work)
    for backend in backends_of(context):
        yield from context.attempt(f"pair_loss {backend}, 64 pairs of 512", partial(_pairs, context, backend))


def _score(context: Context, logits: Tensor, targets: Tensor, options: dict[str, bool], backend: str) -> Row:
    """Times one backend on a tile in place. Its values do not affect the time as long as they stay finite."""
    found = measure(lambda: vocab_score(logits, targets, backend=backend, **options), context, 1.0)
    passes = 2 if "score" in options else 1  # one read, and one write of the score
    found["gb_s"] = passes * logits.numel() * logits.element_size() / found["ms"] / 1e6
    if "copy_gb_s" not in context.rates:
        return {"result": describe(found), **found}
    share = found["gb_s"] / context.rates["copy_gb_s"]
    return {"result": describe(found, f"{share:.0%} of the copy bandwidth"), "copy_share": share, **found}


def _pairs(context: Context, backend: str) -> Row:
    """Times one backend of ``pair_loss``: a call, and on a GPU the kernel alone, from a CUDA graph."""
    tokens = torch.randn(64 * 2 * 512, device=context.device)
    offsets = torch.arange(0, len(tokens) + 1, 512, device=context.device)
    index = torch.arange(128, device=context.device)
    reference = torch.zeros(128, device=context.device)

    def run():
        return pair_loss(tokens, offsets, index[::2], index[1::2], None, reference, loss="sigmoid", backend=backend)

    found = measure(run, context, 0.5)
    if context.device == "cuda" and backend != "eager":
        found["kernel_us"] = kernel_microseconds(run)
        host = f"{found['host_ms'] * 1e3:.0f} us of the host a call"
        return {"result": f"{found['kernel_us']:.1f} us on the device, {host}", **found}
    return {"result": f"{found['ms'] * 1e3:.0f} us a call", **found}
