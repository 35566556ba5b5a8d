"""Inputs and contestants of the attention benchmarks: ours, and the alternatives for prompts shared by completions.

Every contestant is a function of query, key and value of the same packed row, each (T, heads, head dimension), that
returns the output of all T rows. ``separate`` runs each completion after its own copy of the prompt, with the best
kernel for that layout. Only the first copy of a prompt gets an upstream gradient, and the caller sums the gradients of
the copies (see :func:`spread`).
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
from cpt_kernels.planning.work import attended_pairs

Groups = Sequence[tuple[int, Sequence[int]]]  # (prompt, completions) in tokens
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads, options and dtype of an attention call."""

    heads: int = 8
    kv_heads: int = 8
    size: int = 64  # head dimension
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16

    def options(self) -> dict[str, int | float | None]:
        """Returns the keyword arguments of ``shared_prompt_attention``."""
        return {"window": self.window, "softcap": self.softcap}


def layout_of(groups: Groups, share: bool, device: str) -> AttentionLayout:
    """Returns the attention layout of the packed row, on a device."""
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
    """Returns random ([query, key, value, sinks], upstream gradient) in the case's dtype; no sinks if it has none."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(case.dtype)

    kv = (tokens, case.kv_heads, case.size)
    leaves = [new(tokens, case.heads, case.size), new(*kv), new(*kv), *([new(case.heads)] if case.sinks else [])]
    return leaves, new(tokens, case.heads, case.size)


def attended(groups: Groups, share: bool) -> int:
    """Returns the number of (query, key) pairs that attention has to compute."""
    return sum(attended_pairs(GroupLengths(prompt, completions, share)) for prompt, completions in groups)


def tokens_of(groups: Groups) -> int:
    """Returns the number of tokens in the packed row."""
    return sum(GroupLengths(prompt, completions).tokens() for prompt, completions in groups)


def copies_of(groups: Groups) -> Tensor:
    """Maps each row of the concatenated separate sequences to its row in the packed row with shared prompts."""
    rows, start = [], 0
    for prompt, completions in groups:
        first = start + prompt
        for completion in completions:
            rows += [*range(start, start + prompt), *range(first, first + completion)]
            first += completion
        start = first
    return torch.tensor(rows)


def spread(rows: Tensor, index: Tensor) -> Tensor:
    """Copies an upstream gradient to the separate sequences. Only a prompt's first copy gets it; others get zero."""
    first = torch.ones(len(index), dtype=torch.bool)
    seen = torch.zeros(len(rows), dtype=torch.bool)
    for i, row in enumerate(index.tolist()):
        first[i], seen[row] = not seen[row], True
    return rows[index.to(rows.device)] * first.to(rows.device, rows.dtype)[:, None, None]


def dense_mask(groups: Groups, device: str) -> Tensor:
    """Returns a (T, T) mask that is True where a query (dimension 0) sees a key (dimension 1)."""
    group, part = _parts(groups, device)
    causal = torch.ones(len(part), len(part), dtype=torch.bool, device=device).tril()
    return causal & (group[:, None] == group) & ((part == 0) | (part[:, None] == part))


def _parts(groups: Groups, device: str) -> tuple[Tensor, Tensor]:
    """Returns the group of every row (T,), and its piece of the group (T,): 0 for the prompt, then the completions."""
    lengths = [
        (g, c, n) for g, (prompt, completions) in enumerate(groups) for c, n in enumerate([prompt, *completions])
    ]
    repeats = torch.tensor([n for *_, n in lengths], device=device)
    group, part = (torch.tensor([one[i] for one in lengths], device=device) for i in (0, 1))
    return group.repeat_interleave(repeats), part.repeat_interleave(repeats)


# --- Contestants: each builds a function of query, key and value for given groups and device ---


def ours(groups: Groups, device: str, backend: str = "auto", share: bool = True) -> Attention:
    """Our shared-prompt attention with one backend."""
    layout = layout_of(groups, share, device)
    return lambda q, k, v: shared_prompt_attention(q, k, v, layout, backend=backend)


def separate(groups: Groups, device: str) -> Attention:
    """Separate sequences, with rows ordered as in :func:`copies_of`. SDPA on a CPU, a flash kernel on CUDA."""
    return ours(groups, device, "sdpa" if device == "cpu" else "auto", share=False)


def flex(groups: Groups, device: str) -> Attention:
    """PyTorch's FlexAttention, compiled, with a block mask for the shared prompt."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group, part = _parts(groups, device)

    def mask(batch, head, q, k):
        return (q >= k) & (group[q] == group[k]) & ((part[k] == 0) | (part[q] == part[k]))

    block_mask = create_block_mask(mask, None, None, len(part), len(part), device=device)
    torch.compiler.reset()  # after a few shapes Dynamo falls back to eager, which materializes all scores
    compiled = torch.compile(flex_attention, dynamic=False)
    return _heads_first(lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True))


def dense(groups: Groups, device: str) -> Attention:
    """One call of PyTorch's SDPA with an explicit (T, T) mask."""
    mask = dense_mask(groups, device)
    return _heads_first(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))


def _heads_first(attention: Attention) -> Attention:
    """Wraps a function of contiguous (1, heads, T, head dimension) inputs.

    The copies cost nothing measurable: with views, flex and dense took the same time within 6 % on a CPU.
    """

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(*(x.transpose(0, 1)[None].contiguous() for x in (q, k, v)))
        return out[0].transpose(0, 1)

    return run
