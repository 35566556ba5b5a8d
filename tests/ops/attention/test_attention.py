"""Shared-prompt attention against dense attention under a mask that is built token by token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_kernels.data.packing import GroupLengths, pack, scatter_rounds
from cpt_kernels.ops.attention import AttentionLayout, shared_prompt_attention
from tests.numerics import assert_close

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16

# (prompt, completions): K from 1 to 4, one-token prompts and completions.
GROUPS = [(1, [1, 5]), (7, [3, 1, 6, 2]), (4, [4]), (9, [2, 4, 1]), (1, [1]), (3, [6, 2])]


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 4
    size: int = 8
    value_size: int = 8
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def options(self) -> dict:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


CASES = {
    "plain": Case(),
    "grouped": Case(kv_heads=2),
    "one-kv-head-odd-sizes": Case(heads=3, kv_heads=1, size=5, value_size=7),
    "scale": Case(scale=0.7),
    "window": Case(window=3),
    "window-beyond-everything": Case(window=100, kv_heads=2),
    "softcap": Case(softcap=1.5),
    "sinks": Case(sinks=True),
    "gemma2": Case(kv_heads=2, window=5, softcap=2.0, scale=0.3),
    "gpt-oss": Case(kv_heads=2, window=4, sinks=True, size=6, value_size=6),
}


def make_layout(share: bool, groups=GROUPS) -> AttentionLayout:
    layout = pack([GroupLengths(prompt, completions, share) for prompt, completions in groups])
    rounds = scatter_rounds(layout.kv_index, len(layout.position_ids))
    q, k = (torch.from_numpy(cumulative) for cumulative in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    return AttentionLayout(
        q,
        k,
        torch.from_numpy(layout.kv_index),
        [(torch.from_numpy(rows), torch.from_numpy(sources)) for rows, sources in rounds],
        list(zip(q.diff().tolist(), k.diff().tolist())),
        share,
    )


def dense_mask(share: bool, window: int | None) -> Tensor:
    """Returns (T, T), True where the row's token sees the column's: of its prompt or completion, and not later."""
    tokens = []  # (run of the prompt, completion or None for the prompt, position)
    for g, (prompt, completions) in enumerate(GROUPS):
        for i, length in enumerate(completions):
            run = (g, 0 if share else i)
            if i == 0 or not share:
                tokens += [(run, None, position) for position in range(prompt)]
            tokens += [(run, i, prompt + position) for position in range(length)]

    def sees(query: tuple, key: tuple) -> bool:
        return (
            query[0] == key[0]
            and key[1] in (None, query[1])
            and 0 <= query[2] - key[2] < (len(tokens) if window is None else window)
        )

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def make_inputs(case: Case, tokens: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (tokens, case.heads, case.size),
        "key": (tokens, case.kv_heads, case.size),
        "value": (tokens, case.kv_heads, case.value_size),
        "sinks": (case.heads,),
        "upstream": (tokens, case.heads, case.value_size),
    }
    return {n: torch.randn(*shape, generator=generator).mul(1.5).to(dtype) for n, shape in shapes.items()}


def dense_attention(query, key, value, mask, case: Case, sinks=None, definition: bool = True) -> Tensor:
    """Computes attention in the inputs' dtype with a softmax in fp32, as transformers' eager attention does.

    ``definition=False`` is the eager PyTorch that errors are compared with: SDPA, transformers' default, if it can.
    """
    key, value = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (key, value))
    if not definition and case.softcap is None and sinks is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=case.scale)[0].transpose(0, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (case.size**-0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, FP32)).to(value.dtype)[..., : len(mask)]
    return torch.einsum("hqk,khd->qhd", weights, value)


def run(attention, inputs: dict[str, Tensor], case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    names = ["query", "key", "value", *(["sinks"] if case.sinks else [])]
    leaves = {name: inputs[name].detach().to(dtype).requires_grad_() for name in names}
    out = attention(**leaves)
    out.backward(inputs["upstream"].to(dtype))
    return {"out": out.detach()} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype, share):
    case = CASES[name]
    layout, mask = make_layout(share), dense_mask(share, case.window)
    assert mask.shape[0] == layout.cu_seqlens_q[-1] and mask.diagonal().all()
    pools: dict[str, list] = {}
    for seed in range(1 if dtype == FP64 else 12):
        inputs = make_inputs(case, len(mask), dtype, seed)
        found = run(lambda **x: shared_prompt_attention(**x, layout=layout, **case.options()), inputs, case, dtype)
        eager = run(lambda **x: dense_attention(**x, mask=mask, case=case, definition=False), inputs, case, dtype)
        exact = run(lambda **x: dense_attention(**x, mask=mask, case=case), inputs, case, FP64)
        for key in found:
            pools.setdefault(key, []).append([t.flatten() for t in (found[key], eager[key], exact[key])])
    eps = 1e-14 if dtype == FP64 else torch.finfo(dtype).eps  # fp64: sums in another order
    for key, triples in pools.items():
        assert_close(*(torch.cat(parts) for parts in zip(*triples)), f"{name} {key}", eps)


@pytest.mark.parametrize("name", ["plain", "window", "grouped"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_both_ways_segment_by_segment_agree(name, share):
    case, layout = CASES[name], make_layout(share)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    sdpa, eager = (
        run(
            lambda backend=backend, **x: shared_prompt_attention(**x, layout=layout, backend=backend, **case.options()),
            inputs, case, FP64,
        )
        for backend in ("sdpa", "eager")
    )  # fmt: skip
    for key in sdpa:
        torch.testing.assert_close(sdpa[key], eager[key])


def test_a_window_of_one_is_the_value_itself():
    layout, case = make_layout(True), CASES["plain"]
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    found = run(lambda **x: shared_prompt_attention(**x, layout=layout, window=1), inputs, case, FP64)
    torch.testing.assert_close(found["out"], inputs["value"])
    torch.testing.assert_close(found["grad value"], inputs["upstream"])
    assert max(found["grad query"].abs().max(), found["grad key"].abs().max()) < 1e-13


def test_completions_do_not_see_each_other():
    """The gradient of one completion's output reaches the tokens of the completion and its prompt, and no others."""
    layout = make_layout(True)
    inputs = make_inputs(CASES["plain"], int(layout.cu_seqlens_q[-1]), FP64, 0)
    key = inputs["key"].requires_grad_()
    out = shared_prompt_attention(inputs["query"], key, inputs["value"], layout)
    out[18:24].sum().backward()  # group 1 has 7 tokens; of group 2 the prompt 7, completion 1 three, completion 2 one
    reached = key.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist()
    assert reached == [*range(7, 14), *range(18, 24)]


def test_gradients_of_shared_prompts_are_summed_in_fp32():
    """A prompt's keys get one gradient per completion; a running sum of 64 in bf16 would lose the small ones."""
    groups = [(2, [1] * 64)]
    layout = make_layout(True, groups)
    key = torch.zeros(66, 1, 8, dtype=BF16)
    value = torch.zeros(66, 1, 8, dtype=BF16, requires_grad=True)
    out = shared_prompt_attention(torch.zeros(66, 1, 8, dtype=BF16), key, value, layout)
    upstream = torch.zeros_like(out)
    upstream[2] = 3 * 128.0
    upstream[3:] = 3 * 0.5
    out.backward(upstream)
    exact = 128 + 63 * 0.5  # each of three keys has a third of the weight
    assert (value.grad[0].float() - exact).abs().max() <= 0.01 * exact


def test_the_same_call_gives_the_same_bits():
    case, layout = CASES["gpt-oss"], make_layout(True)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), BF16, 0)
    first, second = (
        run(lambda **x: shared_prompt_attention(**x, layout=layout, **case.options()), inputs, case, BF16)
        for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["sdpa", "eager"])
def test_dropout_drops(softcap):
    layout = make_layout(True)
    inputs = make_inputs(CASES["plain"], int(layout.cu_seqlens_q[-1]), FP32, 0)
    arguments = (inputs["query"], inputs["key"], torch.ones_like(inputs["value"]), layout)
    torch.manual_seed(0)
    plain = shared_prompt_attention(*arguments, softcap=softcap)
    dropped = shared_prompt_attention(*arguments, softcap=softcap, dropout=0.5)
    torch.testing.assert_close(plain, torch.ones_like(plain))
    assert dropped.std() > 0.1 and abs(dropped.mean() - 1) < 0.2
