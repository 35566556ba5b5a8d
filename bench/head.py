"""Memory and time of the head against tokens, at a vocabulary where logits are what fills the memory.

    python -m bench head --tokens 256,512,1024,2048 --vocab 131072

Every mode takes the same rows from hidden states to a DPO loss over pairs and back, in a process of its own; modes are
interleaved in every round, and none takes statistics beside. Losses and gradient norms are compared first. Memory is
the peak of resident memory during forward and backward beyond what was resident before (weights and hidden states), so
gradients are in it; on CUDA the same of the device's allocator. ``growth`` is memory added by the last doubling of
tokens over logits added by it: 0 where memory does not grow with tokens x vocabulary, 1 where logits are kept once.

    eager      log_softmax and gather, autograd             eager-score   the same without gradients
    trl        TRL's chunked head, completion rows          frozen        ours, the head's weight frozen: 2 products
    trained    ours: 3 products, weight and hidden states   general       ours, differentiable log-probs: 4 products
    score      ours without gradients: 1 product
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_kernels import build_loss, linear_logprobs, linear_preference_loss
from cpt_kernels.ops.gather import segment_sum
from cpt_kernels.ops.linear_preference import Pairs

from .timing import (
    MIB,
    Channel,
    Contestant,
    add_output_options,
    finish,
    interleave,
    peak_mib,
    reset_peak,
    resident_mib,
    summarise,
    table,
)

_COMPLETION = 64  # tokens; a pair is two completions
_LOSS = build_loss("sigmoid", beta=0.1)


# --- The modes: (hidden, weight, targets, pairs) -> loss ---


def _eager_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax((hidden @ weight.t()).float(), dim=-1).gather(1, targets[:, None])[:, 0]


def _loss_of(logps: Tensor, pairs: Pairs) -> Tensor:
    return _LOSS(pairs.numbers(segment_sum(logps, pairs.cu_completions))).sum()


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor, pairs: Pairs) -> Tensor:
    return _loss_of(_eager_logps(hidden, weight, targets), pairs)


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor, pairs: Pairs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    logps, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))
    return _loss_of(logps, pairs)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, pairs: Pairs, general: bool = False) -> Tensor:
    return linear_preference_loss(hidden, weight, targets, pairs, _LOSS, general=general).loss


def _general(hidden: Tensor, weight: Tensor, targets: Tensor, pairs: Pairs) -> Tensor:
    return _ours(hidden, weight, targets, pairs, general=True)


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, pairs: Pairs) -> Tensor:
    return _loss_of(linear_logprobs(hidden, weight, targets).logps, pairs)


# name -> (function, gradient of hidden, gradient of weight)
MODES: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "trained": (_ours, True, True),
    "general": (_general, True, True),
    "trl": (_trl, True, True),
    "eager": (_eager, True, True),
    "frozen": (_ours, True, False),
    "eager-frozen": (_eager, True, False),
    "score": (_score, False, False),
    "eager-score": (_eager, False, False),
}
_PEER = {"trained": "eager", "general": "eager", "trl": "eager", "frozen": "eager-frozen", "score": "eager-score"}


def inputs(tokens: int, spec: dict[str, Any]) -> tuple[Tensor, Tensor, Pairs]:
    """(hidden, targets, pairs) for so many tokens, the same in every process."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, spec["hidden"], generator=generator)
    targets = torch.randint(spec["vocab"], (tokens,), generator=generator)
    lengths = [_COMPLETION] * (tokens // _COMPLETION)
    completions = torch.arange(len(lengths))
    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    pairs = Pairs(
        (torch.arange(len(lengths) + 1) * _COMPLETION).to(device),
        lengths,
        completions[0::2].to(device),
        completions[1::2].to(device),
        completions[0::2].to(device),
        [(2, 1)] * (len(lengths) // 2),
        torch.full((len(lengths),), -_COMPLETION * math.log(spec["vocab"]), device=device),
    )
    return hidden.to(device, dtype), targets.to(device), pairs


# --- Worker ---


def work(spec: dict[str, Any]) -> None:
    """Answers ``run TOKENS`` with the time and memory of one forward and backward."""
    channel = Channel()
    function, hidden_gradient, weight_gradient = MODES[spec["mode"]]
    cuda = spec["device"] == "cuda"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(spec["vocab"], spec["hidden"], generator=generator) * spec["hidden"] ** -0.5
    weight = weight.to(spec["device"], getattr(torch, spec["dtype"])).requires_grad_(weight_gradient)
    channel.reply(ready=True)
    while message := channel.receive():
        hidden, targets, pairs = inputs(int(message.removeprefix("run ")), spec)
        hidden.requires_grad_(hidden_gradient)
        weight.grad = None
        before = _resident(cuda)
        started = time.perf_counter()
        with torch.set_grad_enabled(hidden_gradient):
            loss = function(hidden, weight, targets, pairs)
        if hidden_gradient:
            loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / MIB if cuda else peak_mib()
        norms = {
            name: t.grad.double().norm().item() for name, t in (("dX", hidden), ("dW", weight)) if t.grad is not None
        }
        channel.reply(seconds=seconds, mib=peak - before, results={"loss": loss.item(), **norms})


def _resident(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    resident = resident_mib()
    if not reset_peak():
        raise RuntimeError("this kernel does not reset VmHWM (/proc/self/clear_refs): peaks cannot be told apart")
    return resident


# --- Parent ---


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench head", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", default="256,512,1024,2048", help=f"comma-separated multiples of {2 * _COMPLETION}")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated, see above")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on cuda bfloat16")
    parser.add_argument("--quick", action="store_true", help="a small vocabulary, one round: does it run?")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.vocab, options.hidden, options.rounds, options.tokens = 4096, 32, 1, "512,1024,2048"
    options.tokens = sorted(int(number) for number in options.tokens.split(","))
    options.modes = options.modes.split(",")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if bad := [n for n in options.tokens if n <= 0 or n % (2 * _COMPLETION)]:
        parser.error(f"--tokens {bad}: must be multiples of {2 * _COMPLETION}")
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"unknown modes {sorted(unknown)}: choose of {', '.join(MODES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    measured = run(options)
    itemsize = getattr(torch, options.dtype).itemsize
    logits = {tokens: tokens * options.vocab * itemsize / MIB for tokens in options.tokens}
    growth = {}
    if len(options.tokens) > 1:
        last, largest = options.tokens[-2:]
        added = logits[largest] - logits[last]
        for mode in options.modes:
            growth[mode] = (measured[mode][largest]["mib"] - measured[mode][last]["mib"]) / added
    print(report(options, measured, logits, growth))
    top = options.tokens[-1]
    summary = {"growth": {mode: round(value, 3) for mode, value in growth.items()}}
    for mode, peer in _PEER.items():
        if mode in options.modes and peer in options.modes:
            ours, theirs = measured[mode][top], measured[peer][top]
            summary[f"memory_ratio_{mode}_{peer}"] = round(ours["mib"] / theirs["mib"], 4)
            summary[f"speed_ratio_{mode}_{peer}"] = round(theirs["seconds"]["median"] / ours["seconds"]["median"], 3)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "record")}
    finish("head", {"options": settings, "measured": measured, "logits_mib": logits}, summary, options)


def run(options: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """mode -> tokens -> seconds (median, quartiles) and MiB (largest of the rounds)."""
    spec = {name: getattr(options, name) for name in ("vocab", "hidden", "device", "dtype")}
    workers: list[Contestant] = []
    measured: dict[str, dict[int, dict[str, Any]]] = {mode: {} for mode in options.modes}
    try:
        workers += [Contestant(mode, "bench.head", {**spec, "mode": mode}) for mode in options.modes]
        interleave(workers, 1, f"run {options.tokens[0]}")  # warm-up
        for tokens in options.tokens:
            answers = interleave(workers, options.rounds, f"run {tokens}")
            check({mode: answers[mode][0]["results"] for mode in options.modes}, 0.05 if "b" in options.dtype else 1e-4)
            for mode in options.modes:
                measured[mode][tokens] = {
                    "seconds": summarise([answer["seconds"] for answer in answers[mode]]),
                    "mib": max(answer["mib"] for answer in answers[mode]),
                }
    finally:
        for worker in workers:
            worker.close()
    return measured


def check(results: dict[str, dict[str, float]], tolerance: float) -> None:
    """All modes must agree on the loss and on the norms of the gradients that they have."""
    for name in ("loss", "dX", "dW"):
        values = {mode: found[name] for mode, found in results.items() if name in found}
        if values and max(values.values()) - min(values.values()) > tolerance * abs(next(iter(values.values()))):
            raise RuntimeError(f"the modes disagree on {name}: {values}")


def report(options: argparse.Namespace, measured, logits, growth) -> str:
    header = ["mode", *(f"{tokens} tok MiB" for tokens in options.tokens), "growth"]
    header += [f"{tokens} tok s" for tokens in options.tokens]
    rows = [["one matrix of logits", *(f"{logits[tokens]:.0f}" for tokens in options.tokens), "1"]]
    for mode in options.modes:
        found = measured[mode]
        row = [mode, *(f"{found[tokens]['mib']:.0f}" for tokens in options.tokens)]
        row += [f"{growth[mode]:.3f}" if growth else "-"]
        rows.append(row + [f"{found[tokens]['seconds']['median']:.3f}" for tokens in options.tokens])
    rows[0] += ["-"] * len(options.tokens)
    gradient = options.vocab * options.hidden * getattr(torch, options.dtype).itemsize / MIB
    return "\n".join(
        [
            f"head of {options.vocab} x {options.hidden}, {options.dtype} on {options.device}, forward and backward;"
            f" completions of {_COMPLETION} tokens, {options.rounds} rounds",
            f"peak memory beyond the inputs, largest of the rounds (the weight's gradient alone: {gradient:.0f} MiB);"
            " time: median of the rounds",
            "",
            table(header, rows),
            "",
        ]
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    else:
        main()
