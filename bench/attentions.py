"""Attention over prompts that completions share: inputs, ours, and what one would run without it.

Every contestant takes queries, keys and values of the same packed row, (T, heads, size), to the output of all its rows,
and the gradient of that output back. ``separate`` runs every completion behind its own copy of the prompt, with the
best kernel there is for that. A prompt's upstream gradient arrives at its first copy; summing the gradients of the
copies is left to whoever compares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_kernels.data.packing import GroupLengths, pack, scatter_rounds
from cpt_kernels.ops.attention import AttentionLayout, shared_prompt_attention

from .work import attended_pairs

Groups = Sequence[tuple[int, Sequence[int]]]  # (prompt, completions) in tokens
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads and scores."""

    heads: int = 8
    kv_heads: int = 8
    size: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16

    def options(self) -> dict[str, int | float | None]:
        return {"window": self.window, "softcap": self.softcap}


def layout_of(groups: Groups, share: bool, device: str) -> AttentionLayout:
    layout = pack([GroupLengths(prompt, completions, share) for prompt, completions in groups])

    def tensor(array) -> Tensor:
        return torch.from_numpy(array).to(device)

    lengths = zip(np.diff(layout.cu_seqlens_q).tolist(), np.diff(layout.cu_seqlens_k).tolist())
    rounds = scatter_rounds(layout.kv_index, len(layout.position_ids))
    return AttentionLayout(
        tensor(layout.cu_seqlens_q),
        tensor(layout.cu_seqlens_k),
        tensor(layout.kv_index),
        [(tensor(to), tensor(source)) for to, source in rounds],
        list(lengths),
        share,
    )


def inputs_of(case: Case, tokens: int, device: str) -> tuple[list[Tensor], Tensor]:
    """([query, key, value, sinks], upstream gradient), rounded to the case's dtype."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(case.dtype)

    kv = (tokens, case.kv_heads, case.size)
    leaves = [new(tokens, case.heads, case.size), new(*kv), new(*kv), *([new(case.heads)] if case.sinks else [])]
    return leaves, new(tokens, case.heads, case.size)


def attended(groups: Groups, share: bool) -> int:
    """(query, key) pairs that have to be looked at."""
    return sum(attended_pairs(GroupLengths(prompt, completions, share)) for prompt, completions in groups)


def tokens_of(groups: Groups) -> int:
    """Rows of the packed row."""
    return sum(GroupLengths(prompt, completions).tokens() for prompt, completions in groups)


def copies_of(groups: Groups) -> Tensor:
    """Of every row of the separate sequences, one after another, its row where prompts are shared."""
    rows, start = [], 0
    for prompt, completions in groups:
        first = start + prompt
        for completion in completions:
            rows += [*range(start, start + prompt), *range(first, first + completion)]
            first += completion
        start = first
    return torch.tensor(rows)


def spread(rows: Tensor, index: Tensor) -> Tensor:
    """Upstream gradient of the separate sequences: that of a prompt arrives at its first copy alone."""
    first = torch.ones(len(index), dtype=torch.bool)
    seen = torch.zeros(len(rows), dtype=torch.bool)
    for i, row in enumerate(index.tolist()):
        first[i], seen[row] = not seen[row], True
    return rows[index.to(rows.device)] * first.to(rows.device, rows.dtype)[:, None, None]


def dense_mask(groups: Groups, device: str) -> Tensor:
    """(T, T), True where a row sees another."""
    group, part = _parts(groups, device)
    causal = torch.ones(len(part), len(part), dtype=torch.bool, device=device).tril()
    return causal & (group[:, None] == group) & ((part == 0) | (part[:, None] == part))


def _parts(groups: Groups, device: str) -> tuple[Tensor, Tensor]:
    """(T,) of every row its group, and its part of it: 0 the prompt, then the completions."""
    lengths = [
        (g, c, n) for g, (prompt, completions) in enumerate(groups) for c, n in enumerate([prompt, *completions])
    ]
    repeats = torch.tensor([n for *_, n in lengths], device=device)
    group, part = (torch.tensor([one[i] for one in lengths], device=device) for i in (0, 1))
    return group.repeat_interleave(repeats), part.repeat_interleave(repeats)


# --- Contestants: groups and device to a function of query, key and value ---


def ours(groups: Groups, device: str, backend: str = "auto", share: bool = True) -> Attention:
    layout = layout_of(groups, share, device)
    return lambda q, k, v: shared_prompt_attention(q, k, v, layout, backend=backend)


def separate(groups: Groups, device: str) -> Attention:
    """Rows as ``copies_of`` has them. SDPA sequence by sequence on a CPU, the first variable-length kernel on CUDA."""
    return ours(groups, device, "sdpa" if device == "cpu" else "auto", share=False)


def flex(groups: Groups, device: str) -> Attention:
    """PyTorch's FlexAttention, compiled, with a block mask for the shared prompt."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group, part = _parts(groups, device)

    def mask(batch, head, q, k):
        return (q >= k) & (group[q] == group[k]) & ((part[k] == 0) | (part[q] == part[k]))

    block_mask = create_block_mask(mask, None, None, len(part), len(part), device=device)
    torch.compiler.reset()  # beyond a few shapes it would stay with eager, which writes all scores out
    compiled = torch.compile(flex_attention, dynamic=False)
    return _heads_first(lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True))


def dense(groups: Groups, device: str) -> Attention:
    """One call of PyTorch's attention with the mask written out."""
    mask = dense_mask(groups, device)
    return _heads_first(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))


def _heads_first(attention: Attention) -> Attention:
    """With copies in (1, heads, rows, size); on a CPU views took as long, within 6 % either way, for flex and dense."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(*(x.transpose(0, 1)[None].contiguous() for x in (q, k, v)))
        return out[0].transpose(0, 1)

    return run
