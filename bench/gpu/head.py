"""Part of ``gpu_check`` that times the head: our modes with every backend, and all peers of :mod:`bench.heads`.

N = 16384 completion rows in 32 completions, H = 4096, V = 128256, bf16, forward and backward. Each contestant's loss
and gradient norms are compared with a reference, so that a fast but wrong one fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cpt_kernels.ops import backends
from cpt_kernels.ops.pair_loss import pair_loss
from cpt_kernels.ops.vocab_score import vocab_score

from ..heads import TRAINED, Contestant, Problem, contestants, disagreement, norms
from .meter import Context, Row, describe, free_memory, kernel_microseconds, machine_rates, measure

_SECONDS, _COMPILATION = 8.0, 40.0  # least time for a contestant, and for one that compiles


def rows(context: Context) -> Iterator[Row]:
    """Measures the machine's rates, the kernels of the head, then every contestant."""
    yield from machine_rates(context)
    tokens, size, vocab, completion = (64, 32, 501, 8) if context.tiny else (16384, 4096, 128256, 512)
    dtype = torch.float32 if context.tiny else torch.bfloat16
    problem = Problem.make(tokens, size, vocab, completion, context.device, dtype)
    expected = problem.expected()
    free_memory()
    yield from _kernel_rows(context, problem)
    for name, contestant in _contestants(context).items():
        if reason := contestant.absent(context.device):
            yield {"what": f"head: {name}", "result": reason}
            continue
        work = partial(_time, context, problem, contestant, expected[contestant.kind])
        seconds = _COMPILATION if contestant.compiles else _SECONDS
        yield from context.attempt(f"head: {name}", work, seconds, contestant.peer)
        free_memory()


def _contestants(context: Context) -> dict[str, Contestant]:
    """Returns ours with every backend, then the peers, with those that compile last. A tiny run leaves those out."""
    found = {}
    for backend in _backends(context):
        ours = {name: one for name, one in contestants(backend).items() if not one.peer}
        found |= {f"{name}, {backend}": one for name, one in ours.items()}
    peers = {name: one for name, one in contestants().items() if one.peer and not (context.tiny and one.compiles)}
    return found | dict(sorted(peers.items(), key=lambda item: item[1].compiles))


def _time(context: Context, problem: Problem, contestant: Contestant, expected: dict[str, float]) -> Row:
    """Times one contestant and compares its results with the expected ones."""
    loss, products = contestant.build(problem), contestant.products
    hidden = problem.hidden.detach().requires_grad_(products > 1)
    weight = problem.weight.detach().requires_grad_(contestant.gradients == TRAINED)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(bool(leaves)):
            value = loss(hidden, weight)
            return value.detach(), torch.autograd.grad(value, leaves) if leaves else ()

    value, grads = run()
    results = {"loss": float(value), **norms(*(grads or (None,)))}
    del grads
    found = measure(run, context, 2.5)
    note = ""
    if "matmul_tflop_s" in context.rates:
        flops = 2 * problem.hidden.numel() * problem.weight.shape[0] * products
        floor = flops / context.rates["matmul_tflop_s"] / 1e9
        found["floor_ms"] = floor
        note = f"{found['ms'] / floor:.2f}x the floor of {products} GEMM{'s' * (products > 1)}"
    found |= {"results": results, "expected": expected}
    if wrong := disagreement(results, expected, problem.hidden.dtype != torch.float32):
        found["failed"] = wrong
    return {"result": describe(found, note), **found}


def _kernel_rows(context: Context, problem: Problem) -> Iterator[Row]:
    """Times every backend of ``vocab_score`` (as a share of the copy bandwidth) and ``pair_loss`` (in microseconds)."""
    tile_rows = 16 if context.tiny else 4096
    logits = problem.hidden[:tile_rows] @ problem.weight.t()
    targets = problem.targets[:tile_rows]

    def score(backend: str) -> Row:
        # Runs repeatedly in place. The values do not affect the time as long as they stay finite.
        found = measure(lambda: vocab_score(logits, targets, score=True, backend=backend), context, 1.0)
        found["gb_s"] = 2 * logits.numel() * logits.element_size() / found["ms"] / 1e6  # one read, one write
        if "copy_gb_s" not in context.rates:
            return {"result": describe(found), **found}
        share = found["gb_s"] / context.rates["copy_gb_s"]
        return {"result": describe(found, f"{share:.0%} of the copy bandwidth"), "copy_share": share, **found}

    tokens = torch.randn(64 * 2 * 512, device=context.device)
    offsets = torch.arange(0, len(tokens) + 1, 512, device=context.device)
    index = torch.arange(128, device=context.device)
    reference = torch.zeros(128, device=context.device)

    def pairs(backend: str) -> Row:
        def run():
            return pair_loss(tokens, offsets, index[::2], index[1::2], None, reference, loss="sigmoid", backend=backend)

        found = measure(run, context, 0.5)
        if context.device == "cuda" and backend != "eager":
            found["kernel_us"] = kernel_microseconds(run)
            return {"result": f"{found['kernel_us']:.1f} us on the device, {found['ms'] * 1e3:.0f} us a call", **found}
        return {"result": f"{found['ms'] * 1e3:.0f} us a call", **found}

    for backend in _backends(context):
        yield from context.attempt(f"vocab_score {backend}", lambda backend=backend: score(backend))
    for backend in _backends(context):
        yield from context.attempt(f"pair_loss {backend}, 64 pairs of 512", lambda backend=backend: pairs(backend))
    free_memory()


def _backends(context: Context) -> list[str]:
    """Returns the backends that run here; only eager on a CPU."""
    if context.device == "cpu":
        return ["eager"]
    return [*(["cuda"] if backends.has_extension() else []), "triton", "eager"]
