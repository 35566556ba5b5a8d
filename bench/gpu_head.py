"""The head on a GPU: our modes and kernels against eager, compiled, Liger, TRL, cut-cross-entropy and QuACK.

N = 16384 completion rows in 32 completions, H = 4096, V = 128256, bf16, forward and backward: gradients of the hidden
rows and, where the head is trained, of the weight. Each contestant's loss is held to a reference, so that none is fast
and wrong. Peers without DPO run cross-entropy, which has the same products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cpt_kernels.losses import build_loss
from cpt_kernels.ops import backends
from cpt_kernels.ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss
from cpt_kernels.ops.pair_loss import pair_loss
from cpt_kernels.ops.vocab_score import vocab_score

from .gpu_meter import Context, Row, describe, free_memory, kernel_microseconds, machine_rates, measure

BETA = 0.1
_AGREES = 0.03  # relative difference of a bf16 loss, sums of 512 rounded log-probs, from the reference


@dataclasses.dataclass
class Problem:
    """Inputs of all contestants. Completions 2i and 2i+1 are pair i; reference log-probs are zero."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    completion: int  # tokens of each
    pairs: Pairs
    dpo: float = 0.0  # mean loss over pairs
    nll: float = 0.0  # mean over tokens

    @classmethod
    def make(cls, context: Context) -> Problem:
        rows, size, vocab, completion = (64, 32, 501, 8) if context.tiny else (16384, 4096, 128256, 512)
        dtype = torch.float32 if context.tiny else torch.bfloat16
        generator = torch.Generator(context.device).manual_seed(0)
        new: dict[str, Any] = {"device": context.device, "generator": generator}
        hidden = torch.randn(rows, size, dtype=dtype, **new)
        weight = torch.randn(vocab, size, dtype=dtype, **new).div_(math.sqrt(size))
        targets = torch.randint(vocab, (rows,), **new)
        completions = rows // completion
        index = torch.arange(completions, device=context.device)
        pairs = Pairs(
            torch.arange(0, rows + 1, completion, device=context.device),
            [completion] * completions,
            index[::2],
            index[1::2],
            index[::2],
            [(2, 1)] * (completions // 2),
            torch.zeros(completions, device=context.device),
        )
        problem = cls(hidden, weight, targets, completion, pairs)
        with torch.no_grad():
            parts = zip(hidden.split(1024), targets.split(1024))
            logps = torch.cat([token_logps(part @ weight.t(), target) for part, target in parts])
            problem.dpo, problem.nll = problem.dpo_loss(logps).item(), -logps.mean().item()
        return problem

    def dpo_loss(self, logps: Tensor) -> Tensor:
        """Mean DPO loss over the pairs, as one would write it."""
        sums = logps.view(-1, self.completion).sum(1)
        return -torch.nn.functional.logsigmoid(BETA * (sums[::2] - sums[1::2])).mean()


Head = Callable[[Tensor, Tensor], Tensor]  # loss of hidden rows and weight


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    build: Callable[[], Head]
    trained: bool | None = True  # gradients of the weight too, of the hidden rows alone (False), or none (None)
    kind: str = "dpo"  # which loss of the problem it computes
    peer: bool = True
    seconds: float = 8.0  # what it takes at least; compilation of a whole loss takes half a minute


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def rows(context: Context) -> Iterator[Row]:
    yield from machine_rates(context)
    problem = Problem.make(context)
    yield from _kernel_rows(context, problem)
    for contestant in _contestants(context, problem):
        work = partial(_time, context, problem, contestant)
        yield from context.attempt(f"head: {contestant.name}", work, contestant.seconds, contestant.peer)
        free_memory()


def _time(context: Context, problem: Problem, contestant: Contestant) -> Row:
    loss, trained = contestant.build(), contestant.trained
    hidden = problem.hidden.detach().requires_grad_(trained is not None)
    weight = problem.weight.detach().requires_grad_(bool(trained))
    leaves = [hidden, weight] if trained else [hidden]

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(trained is not None):
            value = loss(hidden, weight)
            return value.detach(), () if trained is None else torch.autograd.grad(value, leaves)

    value, grads = run()
    value, expected = float(value), getattr(problem, contestant.kind)
    norms = {f"{name}_norm": float(grad.norm(dtype=torch.float32)) for name, grad in zip(("dx", "dw"), grads)}
    del grads
    found = measure(run, context, 2.5)
    products = 1 if trained is None else 3 if trained else 2
    note = ""
    if "matmul_tflop_s" in context.rates:
        flops = 2 * problem.hidden.numel() * problem.weight.shape[0] * products
        floor = flops / context.rates["matmul_tflop_s"] / 1e9
        found["floor_ms"] = floor
        note = f"{found['ms'] / floor:.2f}x the floor of {products} GEMM{'s' * (products > 1)}"
    found |= {"loss": value, "expected_loss": expected, **norms}
    if not abs(value - expected) <= _AGREES * max(abs(expected), 1e-3):
        found["failed"] = f"loss {value:.6g}, expected {expected:.6g}"
    if not all(math.isfinite(norm) and norm > 0 for norm in norms.values()):
        found["failed"] = f"gradients are not finite or vanish: {norms}"
    return {"result": describe(found, note), **found}


def _kernel_rows(context: Context, problem: Problem) -> Iterator[Row]:
    """``vocab_score`` as a share of the copy bandwidth, ``pair_loss`` in microseconds, for every backend."""
    tile_rows = 16 if context.tiny else 4096
    logits = problem.hidden[:tile_rows] @ problem.weight.t()
    targets = problem.targets[:tile_rows]

    def score(backend: str) -> Row:
        # In place over and over: what the values are does not matter to the time, but that they stay finite does.
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
    if context.device == "cpu":
        return ["eager"]
    return [*(["cuda"] if backends.has_extension() else []), "triton", "eager"]


def _contestants(context: Context, problem: Problem) -> Iterator[Contestant]:
    loss, p, count = build_loss("sigmoid", beta=BETA), problem, len(problem.pairs.chosen)

    def scoring(options: HeadOptions) -> Head:
        return lambda x, w: -linear_logprobs(x, w, p.targets, None, options).logps.mean()

    def preference(options: HeadOptions, general: bool = False) -> Head:
        return lambda x, w: linear_preference_loss(x, w, p.targets, p.pairs, loss, None, options, general).loss / count

    for backend in _backends(context):
        options = HeadOptions(backend=backend)
        yield Contestant(f"ours scoring, {backend}", partial(scoring, options), None, "nll", peer=False)
        yield Contestant(f"ours frozen, {backend}", partial(preference, options), False, peer=False)
        yield Contestant(f"ours trainable, {backend}", partial(preference, options), peer=False)
        yield Contestant(f"ours general, {backend}", partial(preference, options, True), peer=False)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return p.dpo_loss(token_logps(x @ w.t(), p.targets))

    yield Contestant("eager", lambda: eager)
    yield Contestant("eager, frozen", lambda: eager, False)
    yield Contestant("TRL chunked log-probs", partial(_trl, p))
    yield Contestant("TRL chunked log-probs, frozen", partial(_trl, p), False)
    if context.device == "cuda":
        yield Contestant("Liger fused linear CE", partial(_liger_ce, p), kind="nll")
        yield Contestant("cut-cross-entropy", partial(_cut_cross_entropy, p), kind="nll")
        yield Contestant("QuACK", partial(_quack, p), kind="nll")
        yield Contestant("Liger fused linear DPO", partial(_liger_dpo, p), seconds=40.0)
        yield Contestant("torch.compile of eager", lambda: torch.compile(eager), seconds=40.0)


# --- Peers, called as their current releases want it ---


def _trl(p: Problem) -> Head:
    chunked = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    tile = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda x, w: p.dpo_loss(chunked(x, w, None, p.targets, 1.0, tile, None, 1.0, ())[0])


def _liger_dpo(p: Problem) -> Head:
    dpo = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    halves = torch.cat([p.pairs.chosen, p.pairs.rejected])  # chosen first, then rejected
    targets = p.targets.view(-1, p.completion)[halves]
    return lambda x, w: dpo(w, x.view(-1, p.completion, x.shape[-1])[halves], targets)[0]


def _liger_ce(p: Problem) -> Head:
    cross_entropy = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda x, w: cross_entropy(w, x, p.targets)


def _cut_cross_entropy(p: Problem) -> Head:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, w: function(x, w, p.targets)


def _quack(p: Problem) -> Head:
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda x, w: function(x, w, p.targets)
