"""Part of ``gpu_check`` that times the head: our modes at two sizes of a tile, and all peers of :mod:`bench.heads`.

N = 16384 completion rows in 32 completions, H = 4096, V = 128256, bf16, forward and backward. Each contestant's loss
and gradient norms are compared with a reference, so that a fast but wrong one fails. Our trained modes compute the
statistics that training logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..heads import TRAINED, Contestant, Problem, contestants, disagreement, norms
from .kernels import backends_of
from .meter import Context, Row, describe, free_memory, measure, product_rate

_SECONDS, _COMPILATION = 6.0, 40.0  # least time for a contestant, and for one that compiles
TILES = {"1 GB": 1024.0, "8 GB": 8192.0}  # budgets of a tile in MiB: four tiles, and one that holds all rows


def rows(context: Context) -> Iterator[Row]:
    """Measures the rate of the head's product, then every contestant."""
    tokens, size, vocab, completion = (64, 32, 501, 8) if context.tiny else (16384, 4096, 128256, 512)
    yield from product_rate(context, tokens, size, vocab)
    free_memory()
    dtype = torch.float32 if context.tiny else torch.bfloat16
    problem = Problem.make(tokens, size, vocab, completion, context.device, dtype)
    expected = problem.expected()
    free_memory()
    for name, contestant in _contestants(context).items():
        if reason := contestant.absent(context.device):
            yield {"what": f"head: {name}", "result": reason}
            continue
        work = partial(_time, context, problem, contestant, expected[contestant.kind])
        seconds = _COMPILATION if contestant.compiles else _SECONDS
        yield from context.attempt(f"head: {name}", work, seconds, contestant.peer)
        free_memory()


def _contestants(context: Context) -> dict[str, Contestant]:
    """Returns ours, then the peers: those that compile after the others, and variants last.

    The backend that ``auto`` takes runs in every mode and at both sizes of a tile, the others only in mode ``trained``.
    A tiny run leaves out those that compile.
    """
    found = {}
    first, *others = [backend for backend in backends_of(context) if context.device == "cpu" or backend != "eager"]
    for label, memory in TILES.items():
        ours = contestants(first, statistics=True, memory_mb=memory)
        found |= {f"{name}, {first}, {label}": one for name, one in ours.items() if not one.peer}
    for backend in others:
        found[f"trained, {backend}, 1 GB"] = contestants(backend, statistics=True, memory_mb=TILES["1 GB"])["trained"]
    peers = {name: one for name, one in contestants().items() if one.peer and not (context.tiny and one.compiles)}
    return found | dict(sorted(peers.items(), key=lambda item: (item[1].gradients != TRAINED, item[1].compiles)))


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
    found = measure(run, context, 1.0)
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
