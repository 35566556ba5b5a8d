"""Parts of ``gpu_check`` on shared-prompt attention: correctness of every kernel, and speed compared with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cpt_kernels.ops.attention import AttentionLayout, shared_prompt_attention
from cpt_kernels.ops.attention.select import capabilities, kernels
from cpt_kernels.ops.attention.trial import trial_failure
from cpt_kernels.ops.attention.varlen import Kernel, Need

from ..attentions import Case, Groups, attended, flex, inputs_of, layout_of
from .meter import Context, Row, describe, measure

# The first case is the main difference from an ordinary causal call: queries and keys of different lengths, aligned at
# their ends.
CASES = {
    "q != k": Case(),
    "q != k, fp16": Case(dtype=torch.float16),
    "grouped heads, head 128": Case(kv_heads=2, size=128),
    "window of 100": Case(window=100),
    "window of 128, one kv head, sinks": Case(kv_heads=1, window=128, sinks=True),
    "soft-cap, window, head 256": Case(kv_heads=4, size=256, window=90, softcap=5.0),
}
GROUPS: Groups = [(128, [64, 1, 127]), (300, [65, 513]), (37, [1, 1]), (1, [129])]
TINY: Groups = [(5, [3, 1]), (1, [4])]

# (prompt, completions): one case with much to gain from a shared prompt, and one with less.
SHAPES: dict[str, tuple[int, list[int]]] = {"P=C=2048": (2048, [2048, 2048]), "P=4096, C=512": (4096, [512, 512])}


def run(case: Case, layout: AttentionLayout, leaves: list[Tensor], upstream: Tensor, backend: str, **options):
    """Returns [output, gradients of the leaves]."""
    q, k, v, *sinks = leaves = [x.detach().requires_grad_() for x in leaves]
    options |= {"sinks": sinks[0] if sinks else None, "backend": backend, **case.options()}
    out = shared_prompt_attention(q, k, v, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


# --- Correctness ---


def comparisons(context: Context) -> Iterator[Row]:
    """Checks output and gradients of every kernel by the tests' tolerance rule. Two runs must give the same bits."""
    names = ["sdpa"] if context.device == "cpu" else []
    for name, kernel in kernels().items():
        if isinstance(kernel, str):
            yield {"what": name, "result": kernel}
        elif context.device == "cuda":
            names.append(name)
            if not kernel.is_trusted:
                yield from context.attempt(f"{name}: trial", partial(_try, kernel))
    for name in names:
        for what, case in CASES.items():
            yield from context.attempt(f"{name}: {what}", partial(_compare, context, name, case))


def _try(kernel: Kernel) -> Row:
    """Runs the trial that decides whether the kernel may be chosen."""
    need = Need("cuda", torch.cuda.get_device_capability(), torch.bfloat16, 128)
    failure = trial_failure(kernel, dataclasses.replace(need, deterministic=kernel.abilities.deterministic))
    return {"result": f"refused: {failure}" if failure else "ok"}


def _compare(context: Context, name: str, case: Case) -> Row:
    """Compares one kernel with eager in the same dtype and in fp64."""
    if context.tiny:
        case = dataclasses.replace(case, size=16, window=case.window and 2)
    layout = layout_of(TINY if context.tiny else GROUPS, True, context.device)
    leaves, upstream = inputs_of(case, int(layout.cu_seqlens_q[-1]), context.device)
    if lacking := _lacks(name, leaves, case):
        return {"result": f"lacks {', '.join(lacking)}"}
    found, again = (run(case, layout, leaves, upstream, name) for _ in range(2))
    eager = run(case, layout, leaves, upstream, "eager")
    exact = run(case, layout, [x.double() for x in leaves], upstream.double(), "eager")
    parts = ("out", "dq", "dk", "dv", "dsinks")
    shares = {part: share_of_bound(*triple) for part, triple in zip(parts, zip(found, eager, exact))}
    worst = max(shares, key=shares.get)
    row = {"result": f"ok, {shares[worst]:.0%} of the bound ({worst})", "shares": shares}
    if not shares[worst] <= 1:
        row["failed"] = f"{worst}: error is {shares[worst]:.2f} x the bound; all: {shares}"
    elif not all(map(torch.equal, found, again)):
        row["failed"] = "two runs on the same inputs differ"
    return row


def _lacks(name: str, leaves: list[Tensor], case: Case) -> list[str]:
    """Returns the features that the case needs and the kernel lacks."""
    q, k, v, *sinks = leaves
    need = Need.of(q, k, v, case.window, case.softcap, sinks[0] if sinks else None, 0.0)
    return capabilities()[name].lacks(need)


def share_of_bound(found: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Returns the error as a share of the bound of ``tests/numerics.py``; more than 1 is a failure.

    The bound is 2 x eager's maximum + eps max|exact| for the maximum error, and eager's mean + eps mean|exact| for the
    mean error.
    """
    if not torch.isfinite(found).all():
        return float("inf")
    eps = torch.finfo(eager.dtype).eps
    error, allowed = (found.double() - exact).abs(), (eager.double() - exact).abs()
    largest = error.max() / (2 * allowed.max() + eps * exact.abs().max())
    mean = error.mean() / (allowed.mean() + eps * exact.abs().mean())
    return float(torch.maximum(largest, mean))


# --- Speed ---


def benchmarks(context: Context) -> Iterator[Row]:
    """Times forward and backward of the attention of one layer, for one prompt with two completions.

    The layer has 32 heads and 8 KV heads of size 128. The bound
    of the gain is the ratio of attended (query, key) pairs without and with sharing.
    """
    found = kernels().items() if context.device == "cuda" else ()
    names = [*(name for name, one in found if not isinstance(one, str) and one.abilities.deterministic), "sdpa"]
    for shape, (prompt, completions) in SHAPES.items():
        if context.tiny:
            prompt, completions = prompt // 128, [c // 128 for c in completions]
        for name in names:
            work = partial(_time_sharing, context, name, prompt, completions)
            yield from context.attempt(f"{name}: {shape}", work, seconds=4.0)
        if context.device == "cuda":
            work = partial(_time_flex, context, prompt, completions)
            yield from context.attempt(f"FlexAttention, shared: {shape}", work, seconds=25.0, peer=True)


def _case(context: Context) -> Case:
    return Case(4, 2, 16, dtype=torch.float32) if context.tiny else Case(32, 8, 128)


def _time_sharing(context: Context, name: str, prompt: int, completions: list[int]) -> Row:
    """Times one kernel with shared prompts, with separate sequences, and with atomic adds in the backward."""
    case, times = _case(context), {}
    for key, share, deterministic in (
        ("shared", True, True),
        ("separate", False, True),
        ("shared_atomics", True, False),
    ):
        layout = layout_of([(prompt, completions)], share, context.device)
        leaves, upstream = inputs_of(case, int(layout.cu_seqlens_q[-1]), context.device)
        work = partial(run, case, layout, leaves, upstream, name, deterministic=deterministic)
        times[key] = measure(work, context, 0.7)
    bound = attended([(prompt, completions)], False) / attended([(prompt, completions)], True)
    gain = times["separate"]["ms"] / times["shared"]["ms"]
    notes = f"{gain:.2f}x over separate sequences", f"{gain / bound:.0%} of the bound {bound:.2f}x"
    atomics = f"{times['shared_atomics']['ms']:.2f} ms not deterministic"
    numbers = {"bound": bound, "gain": gain, "share_of_bound": gain / bound, **times}
    rate = 14 * case.heads * case.size * attended([(prompt, completions)], True) / times["shared"]["ms"] / 1e9
    return {"result": describe(times["shared"], *notes, atomics), "tflop_s": rate, **numbers}


def _time_flex(context: Context, prompt: int, completions: list[int]) -> Row:
    """Times PyTorch's FlexAttention on the same packed row, with a mask for the shared prompt."""
    leaves, upstream = inputs_of(_case(context), prompt + sum(completions), context.device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    attention = flex([(prompt, completions)], context.device)
    found = measure(lambda: torch.autograd.grad(attention(*leaves), leaves, upstream), context, 0.7)
    return {"result": describe(found), **found}
