"""The head against its peers: time, memory and share of the roofline, over tokens and vocabularies.

    python -m bench head --shape qwen-0.5b
    python -m bench head --tokens 16,64,256,1024,2048 --vocab 1024,8192,32768,131072 --hidden 64 --peers eager

Every contestant takes the same rows from hidden states to a loss and back, in a process of its own; rounds are
interleaved, after a warm-up that compiles. Losses and the norms of gradients are held to a reference before anything
is timed. A round is as many runs as fit 50 ms. On CUDA the L2 cache is cold.

Ours (--modes)                                    gradients of         products at least
    trained    finished in the forward            hidden and weight    3
    general    differentiable log-probs           hidden and weight    3 (it takes 4 beyond one tile)
    frozen     the head's weight is frozen        hidden               2
    score      log-probs alone                    nothing              1

Peers (--peers), where they can in the same three ways, as NAME, NAME-frozen and NAME-score:
    eager      log_softmax and gather of all logits      compiled    the same by torch.compile
    trl        TRL's chunked log-probs                   torch-ce    PyTorch's linear_cross_entropy, in chunks
    liger-dpo  Liger's fused linear DPO                  liger-ce    its fused linear cross-entropy (CUDA)
    cce        Apple's cut-cross-entropy (CUDA)          quack       QuACK's chunked linear cross-entropy (CUDA)

Peers that know no pairs compute cross-entropy, which has the same products. Memory is the peak during forward and
backward beyond what was there before (weights and hidden states), so gradients are in it: resident memory, on CUDA the
allocator's. ``growth`` is memory added by the last two sizes over logits added: 0 where memory does not grow with
tokens x vocabulary, 1 where logits are kept once.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .gpu_meter import cold_seconds
from .heads import PRODUCTS, TRAINED, Problem, contestants, disagreement, norms
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
from .work import SHAPES

_MODES = "trained,general,frozen,score"
_PEERS = "eager,compiled,trl,torch-ce,liger-dpo,liger-ce,cce,quack"
_QUICK_PEERS = "eager,torch-ce"
_ROUND = 0.05  # seconds
_PRODUCTS = "products"  # whose worker has the reference and the rate of the products

Measured = dict[str, dict[str, Any]]  # of a size: contestant -> seconds, mib, ...


# --- Worker ---


def work(spec: dict[str, Any]) -> None:
    """Answers ``size TOKENS VOCAB COMPLETION`` with results and memory, ``run`` with the seconds of a round."""
    channel = Channel()
    channel.reply(ready=True)
    while message := channel.receive():
        if message.startswith("size"):
            tokens, vocab, completion = map(int, message.split()[1:])
            runner = None  # what it holds is free before the next is built
            gc.collect()
            dtype = getattr(torch, spec["dtype"])
            problem = Problem.make(tokens, spec["hidden"], vocab, completion, spec["device"], dtype)
            runner = (Products if spec["name"] == _PRODUCTS else Runner)(problem, spec)
            channel.reply(**runner.first())
        else:
            channel.reply(seconds=runner.round())
        if spec["device"] == "cuda":  # all contestants share it
            torch.cuda.empty_cache()


class Runner:
    """One contestant on one problem."""

    def __init__(self, problem: Problem, spec: dict[str, Any]):
        contestant = contestants()[spec["name"]]
        self.loss, self.cuda = contestant.build(problem), spec["device"] == "cuda"
        self.differentiated = contestant.products > 1
        self.hidden = problem.hidden.requires_grad_(self.differentiated)
        self.weight = problem.weight.requires_grad_(contestant.gradients == TRAINED)

    def run(self) -> torch.Tensor:
        with torch.set_grad_enabled(self.differentiated):
            loss = self.loss(self.hidden, self.weight)
        if self.differentiated:
            loss.backward()
        return loss

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def first(self) -> dict[str, Any]:
        """Warm up; then results and the memory of one run."""
        self.run()
        self.clear()
        before = self._reset_memory()
        started = time.perf_counter()
        loss = self.run().item()
        self.repeats = max(1, min(100, int(_ROUND / (time.perf_counter() - started))))
        peak = torch.cuda.max_memory_allocated() / MIB if self.cuda else peak_mib()
        results = {"loss": loss, **norms(self.hidden.grad, self.weight.grad)}
        self.clear()
        return {"mib": peak - before, "results": results}

    def round(self) -> list[float]:
        seconds = []
        for _ in range(self.repeats):
            seconds.append(cold_seconds(self.run) if self.cuda else _seconds(self.run))
            self.clear()
        return seconds

    def _reset_memory(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        resident = resident_mib()
        if not reset_peak():
            raise RuntimeError("this kernel does not reset VmHWM (/proc/self/clear_refs): peaks cannot be told apart")
        return resident


class Products:
    """The reference, and the three products alone, into memory that is there."""

    def __init__(self, problem: Problem, spec: dict[str, Any]):
        self.problem, self.cuda = problem, spec["device"] == "cuda"
        self.gradients = spec["gradients"]

    def first(self) -> dict[str, Any]:
        results = self.problem.expected(self.gradients)
        x, w = self.problem.hidden, self.problem.weight
        logits = x @ w.t()
        outs = logits, torch.empty_like(x), torch.empty_like(w)
        operands = (x, w.t()), (logits, w), (logits.t(), x)
        self.products = [lambda a=a, out=out: torch.mm(*a, out=out) for a, out in zip(operands, outs)]
        seconds = sum(_seconds(product) for _ in range(2) for product in self.products) / 2
        self.repeats = max(1, min(100, int(_ROUND / seconds)))
        return {"results": results}

    def round(self) -> list[list[float]]:
        timed = cold_seconds if self.cuda else _seconds
        return [[timed(product) for product in self.products] for _ in range(self.repeats)]


def _seconds(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- Parent ---


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench head", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shapes = [name for name in SHAPES if name != "small"]
    parser.add_argument("--shape", choices=shapes, help="hidden size and vocabulary of a published model")
    parser.add_argument("--hidden", type=int, help="default the shape's, else 256")
    parser.add_argument("--vocab", help="comma-separated, default the shape's, else 32768,131072")
    parser.add_argument("--tokens", help="comma-separated even numbers, default 64,256,1024,2048, on cuda 4096,16384")
    parser.add_argument("--completion", type=int, help="tokens of one, default 64, on cuda 512; less where it must be")
    parser.add_argument("--modes", default=_MODES, help="comma-separated, see above")
    parser.add_argument("--peers", help="comma-separated, see above; default all that run here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on cuda bfloat16")
    parser.add_argument("--quick", action="store_true", help=f"small sizes, peers {_QUICK_PEERS}: does it run?")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    cuda, shape = options.device == "cuda", SHAPES.get(options.shape)
    if options.quick:
        options.vocab, options.hidden, options.rounds, options.tokens = "4096", 32, 2, "512,1024,2048"
        options.peers = options.peers or _QUICK_PEERS
    options.hidden = options.hidden or (shape.hidden if shape else 256)
    options.vocab = _numbers(options.vocab or (str(shape.vocab) if shape else "32768,131072"))
    options.tokens = _numbers(options.tokens or ("4096,16384" if cuda else "64,256,1024,2048"))
    options.completion = options.completion or (512 if cuda else 64)
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    if bad := [n for n in options.tokens if n <= 0 or n % 2]:
        parser.error(f"--tokens {bad}: must be even")
    options.modes, options.peers = (options.modes.split(","), [p for p in (options.peers or _PEERS).split(",") if p])
    for given, known, what in ((options.modes, _MODES, "modes"), (options.peers, _PEERS, "peers")):
        if unknown := set(given) - set(known.split(",")):
            parser.error(f"unknown {what} {sorted(unknown)}: choose of {known}")
    return options


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


def chosen(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Contestants that run, and those that cannot with the reason."""
    every = contestants()
    ways = {every[mode].gradients for mode in options.modes}
    names = [
        name
        for name, one in every.items()
        if name in options.modes
        or (one.peer and name.removesuffix("-frozen").removesuffix("-score") in options.peers and one.gradients in ways)
    ]
    absent = {name: reason for name in names if (reason := every[name].absent(options.device))}
    return [name for name in names if name not in absent], absent


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names, absent = chosen(options)
    measured: dict[str, dict[str, Measured]] = {}
    for vocab in options.vocab:
        measured[str(vocab)] = run(names, vocab, options)
    itemsize = getattr(torch, options.dtype).itemsize
    logits = {str(v): {str(n): n * v * itemsize / MIB for n in options.tokens} for v in options.vocab}
    growth = {vocab: grown(sizes, logits[vocab]) for vocab, sizes in measured.items()} if options.tokens[1:] else {}
    print(report(options, names, absent, measured, logits, growth))
    summary = {"speed_ratio": ratios(names, measured, "speed"), "memory_ratio": ratios(names, measured, "memory")}
    summary |= {"growth": growth, "absent": absent}
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "record")}
    finish("head", {"options": settings, "measured": measured, "logits_mib": logits}, summary, options)


def run(names: Sequence[str], vocab: int, options: argparse.Namespace) -> dict[str, Measured]:
    """tokens -> contestant -> what was measured."""
    common = {"hidden": options.hidden, "device": options.device, "dtype": options.dtype}
    common["gradients"] = any(contestants()[name].products > 1 for name in names)
    found: dict[str, Measured] = {}
    workers: list[Contestant] = []
    try:
        workers += [Contestant(name, "bench.head", {**common, "name": name}) for name in [_PRODUCTS, *names]]
        for tokens in options.tokens:
            message = f"size {tokens} {vocab} {completion_of(tokens, options.completion)}"
            first = {worker.name: worker.ask(message) for worker in workers}
            check(names, first, options.dtype)
            rounds = interleave(workers, options.rounds, "run")
            runs = {name: [s for answer in answers for s in answer["seconds"]] for name, answers in rounds.items()}
            products = [statistics.median(column) for column in zip(*runs[_PRODUCTS])]
            found[str(tokens)] = {
                name: {
                    "mib": first[name]["mib"],
                    **describe(name, runs[name], products, tokens * vocab * options.hidden),
                }
                for name in names
            }
    finally:
        for worker in workers:
            worker.close()
    return found


def completion_of(tokens: int, longest: int) -> int:
    """The most tokens of a completion, within ``longest``, of which an even number make up all."""
    return next(n for n in range(min(longest, tokens // 2), 0, -1) if tokens % (2 * n) == 0)


def check(names: Sequence[str], first: dict[str, dict[str, Any]], dtype: str) -> None:
    for name in names:
        expected = first[_PRODUCTS]["results"][contestants()[name].kind]
        if wrong := disagreement(first[name]["results"], expected, dtype != "float32"):
            raise RuntimeError(f"'{name}' computes something else: {wrong}")


def describe(name: str, seconds: list[float], products: list[float], multiplications: int) -> dict[str, Any]:
    least = PRODUCTS[contestants()[name].gradients]
    floor = sum(products[:least])
    summary = summarise(seconds)
    return {
        "seconds": summary,
        "runs": len(seconds),
        "products": least,
        "floor_s": floor,
        "gflop_s": 2 * least * multiplications / floor / 1e9,
        "of_floor": floor / summary["median"],
    }


def peers_of(name: str, names: Sequence[str]) -> list[str]:
    """Peers that differentiate the same."""
    every = contestants()
    return [other for other in names if every[other].peer and every[other].gradients == every[name].gradients]


def ratios(names: Sequence[str], measured: dict[str, dict[str, Measured]], what: str) -> dict[str, Any]:
    """Vocabulary -> tokens -> our mode -> peer -> its time over ours, or our memory over its."""

    def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
        if what == "speed":
            return round(theirs["seconds"]["median"] / ours["seconds"]["median"], 3)
        return round(ours["mib"] / theirs["mib"], 4)

    ours = [name for name in names if not contestants()[name].peer]
    return {
        vocab: {
            tokens: {n: {peer: ratio(found[n], found[peer]) for peer in peers_of(n, names)} for n in ours}
            for tokens, found in sizes.items()
        }
        for vocab, sizes in measured.items()
    }


def grown(sizes: dict[str, Measured], logits: dict[str, float]) -> dict[str, float]:
    last, largest = list(sizes)[-2:]
    added = logits[largest] - logits[last]
    return {name: round((sizes[largest][name]["mib"] - sizes[last][name]["mib"]) / added, 3) for name in sizes[last]}


def report(options, names, absent, measured, logits, growth) -> str:
    every = contestants()
    lines = [
        f"head {options.hidden} x V, {options.dtype} on {options.device}; {options.rounds} rounds, interleaved",
        "x best peer: time of the fastest peer that differentiates the same / this one's",
        "of floor: products x 2 N H V / rate / median; rate: of these very products alone, in this run, into memory that"
        " is there",
        "MiB: peak beyond the inputs",
    ]
    header = ["contestant", "products", "ms", "quartiles", "x best peer", "MiB", "of floor"]
    for vocab, sizes in measured.items():
        for tokens, found in sizes.items():
            rows = [_row(name, names, found) for name in names]
            rate = found[names[0]]["gflop_s"]
            completion = completion_of(int(tokens), options.completion)
            lines += [
                "",
                f"V = {vocab}, N = {tokens} in completions of {completion}; products at {rate:,.0f} GFLOP/s;"
                f" one matrix of logits: {logits[vocab][tokens]:.0f} MiB",
                table(header, rows),
            ]
        if growth:
            words = ", ".join(f"{name} {value:.2f}" for name, value in growth[vocab].items())
            lines += ["", f"growth of memory, in matrices of logits, V = {vocab}: {words}"]
    lines += ["", *(f"{name}: {every[name].settings}; loss {every[name].kind}" for name in names)]
    lines += [f"{name}: not here, {reason}" for name, reason in absent.items()]
    return "\n".join([*lines, ""])


def _row(name: str, names: Sequence[str], found: Measured) -> list[str]:
    one = found[name]
    seconds = one["seconds"]
    best = min((found[peer]["seconds"]["median"] for peer in peers_of(name, names)), default=None)
    return [
        name,
        str(one["products"]),
        f"{1e3 * seconds['median']:.2f}",
        f"{1e3 * seconds['low']:.2f}-{1e3 * seconds['high']:.2f}",
        "-" if best is None else f"{best / seconds['median']:.2f}",
        f"{one['mib']:.0f}",
        f"{one['of_floor']:.0%}",
    ]


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    else:
        main()
