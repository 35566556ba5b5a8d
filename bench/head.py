"""How fast is the head, and how much memory does it take, compared with its peers?

    python -m bench head --shape qwen-0.5b
    python -m bench head --tokens 16,64,256,1024,2048 --vocab 1024,8192,32768,131072 --hidden 64 --peers eager

Every contestant computes a loss from the same hidden rows, and its gradients, in its own process. Rounds are
interleaved after a warm-up that compiles. Losses and gradient norms are compared with a reference before anything is
timed. A round repeats the run for about 50 ms. On CUDA the L2 cache is cold.

Our modes (--modes)                               gradients of         fewest matrix products
    trained    computes gradients in the forward  hidden and weight    3
    general    differentiable log-probs           hidden and weight    3 (takes 4 if there are several tiles)
    frozen     the head's weight is frozen        hidden               2
    score      log-probs only                     nothing              1

Peers (--peers). Those that support them also run as NAME-frozen and NAME-score:
    eager      log_softmax and gather of all logits      compiled    eager through torch.compile
    trl        TRL's chunked log-probs                   torch-ce    PyTorch's linear_cross_entropy, in chunks
    liger-dpo  Liger's fused linear DPO                  liger-ce    Liger's fused linear cross-entropy (CUDA)
    cce        Apple's cut-cross-entropy (CUDA)          quack       QuACK's chunked linear cross-entropy (CUDA)

Peers without a pair loss compute cross-entropy, which needs the same matrix products. The report has time, peak memory
and the share of the roofline. Memory is the peak during forward and backward minus that of the inputs (weights and
hidden states), so it includes gradients: resident memory, or on CUDA the allocator's. ``growth`` is the memory added
between the last two sizes, divided by the logits added: 0 if memory does not grow with tokens x vocabulary, 1 if all
logits are kept once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .heads import TRAINED, Problem, contestants, disagreement, norms
from .rounds import REFERENCE, Found, Products, Timed, compete, serve
from .shapes import SHAPES
from .timing import MIB, add_output_options, finish, milliseconds, summarize, table

_MODES = "trained,general,frozen,score"
_PEERS = "eager,compiled,trl,torch-ce,liger-dpo,liger-ce,cce,quack"
_QUICK_PEERS = "eager,torch-ce"

Measured = dict[str, dict[str, Any]]  # contestant -> seconds, mib, ..., of one size


# --- Worker ---


def work(spec: dict[str, Any]) -> None:
    """Runs the worker of one contestant. A size is ``TOKENS VOCAB COMPLETION``."""

    def build(*size: str) -> Timed | Products:
        tokens, vocab, completion = map(int, size)
        dtype = getattr(torch, spec["dtype"])
        problem = Problem.make(tokens, spec["hidden"], vocab, completion, spec["device"], dtype)
        if spec["name"] != REFERENCE:
            return HeadRun(problem, spec)
        # The reference times the three products of a trained head: logits, hidden gradient and weight gradient.
        x, w = problem.hidden, problem.weight
        logits = x @ w.t()
        return Products(spec["device"], problem.expected(spec["gradients"]), (x, w.t()), (logits, w), (logits.t(), x))

    serve(spec["device"], build)


class HeadRun(Timed):
    """Forward and backward of one contestant on one problem."""

    def __init__(self, problem: Problem, spec: dict[str, Any]):
        super().__init__(spec["device"])
        contestant = contestants()[spec["name"]]
        self.head, self.differentiated = contestant.build(problem), contestant.products > 1
        self.hidden = problem.hidden.requires_grad_(self.differentiated)
        self.weight = problem.weight.requires_grad_(contestant.gradients == TRAINED)

    def run(self) -> None:
        with torch.set_grad_enabled(self.differentiated):
            loss = self.head(self.hidden, self.weight)
        if self.differentiated:
            loss.backward()
        self.loss = loss.detach()

    def results(self) -> dict[str, float]:
        return {"loss": self.loss.item(), **norms(self.hidden.grad, self.weight.grad)}

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


# --- Parent ---


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench head", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shapes = [name for name in SHAPES if name != "small"]
    parser.add_argument("--shape", choices=shapes, help="hidden size and vocabulary of a published model")
    parser.add_argument("--hidden", type=int, help="hidden size; default: the shape's, else 256")
    parser.add_argument("--vocab", help="vocabulary sizes, comma-separated; default: the shape's, else 32768,131072")
    parser.add_argument("--tokens", help="even numbers, comma-separated; default 64,256,1024, on cuda 4096,16384")
    parser.add_argument("--completion", type=int, help="most tokens of a completion; default 64, on cuda 512")
    parser.add_argument("--modes", default=_MODES, help="comma-separated list, see above")
    parser.add_argument("--peers", help="comma-separated list, see above; default: all that run here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on cuda bfloat16")
    parser.add_argument("--quick", action="store_true", help=f"smoke test: small sizes, peers {_QUICK_PEERS}")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    cuda, shape = options.device == "cuda", SHAPES.get(options.shape)
    if options.quick:
        options.vocab, options.hidden, options.rounds, options.tokens = "4096", 32, 2, "512,1024"
        options.peers = options.peers or _QUICK_PEERS
    options.hidden = options.hidden or (shape.hidden if shape else 256)
    options.vocab = _numbers(options.vocab or (str(shape.vocab) if shape else "32768,131072"))
    options.tokens = _numbers(options.tokens or ("4096,16384" if cuda else "64,256,1024"))
    options.completion = options.completion or (512 if cuda else 64)
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    if bad := [n for n in options.tokens if n <= 0 or n % 2]:
        parser.error(f"--tokens {bad}: must be even")
    options.modes, options.peers = (options.modes.split(","), [p for p in (options.peers or _PEERS).split(",") if p])
    for given, known, what in ((options.modes, _MODES, "modes"), (options.peers, _PEERS, "peers")):
        if unknown := set(given) - set(known.split(",")):
            parser.error(f"unknown {what} {sorted(unknown)}: choose from {known}")
    return options


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


def available(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Returns the names of the contestants to run, and for those that cannot run the reason."""
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
    names, absent = available(options)
    measured: dict[str, dict[str, Measured]] = {}
    for vocab in options.vocab:
        measured[str(vocab)] = run(names, vocab, options)
    itemsize = getattr(torch, options.dtype).itemsize
    logits = {str(v): {str(n): n * v * itemsize / MIB for n in options.tokens} for v in options.vocab}
    growth = (
        {vocab: memory_growth(sizes, logits[vocab]) for vocab, sizes in measured.items()} if options.tokens[1:] else {}
    )
    print(report(options, names, absent, measured, logits, growth))
    summary = {"speed_ratio": ratios(names, measured, "speed"), "memory_ratio": ratios(names, measured, "memory")}
    summary |= {"growth": growth, "absent": absent}
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "record")}
    finish("head", {"options": settings, "measured": measured, "logits_mib": logits}, summary, options)


def run(names: Sequence[str], vocab: int, options: argparse.Namespace) -> dict[str, Measured]:
    """Times all contestants at one vocabulary size. Returns tokens -> contestant -> measurements."""
    every = contestants()
    common = {"hidden": options.hidden, "device": options.device, "dtype": options.dtype}
    common["gradients"] = any(every[name].products > 1 for name in names)
    specs = {name: {**common, "name": name} for name in [REFERENCE, *names]}
    sizes = {tokens: f"{tokens} {vocab} {completion_of(tokens, options.completion)}" for tokens in options.tokens}

    def check(found: Found) -> None:
        for name in names:
            expected = found[REFERENCE]["results"][every[name].kind]
            if wrong := disagreement(found[name]["results"], expected, options.dtype != "float32"):
                raise RuntimeError(f"'{name}' computes wrong results: {wrong}")

    measured = compete("bench.head", specs, list(sizes.values()), options.rounds, check)
    return {
        str(tokens): describe(names, measured[size], 2 * tokens * vocab * options.hidden)
        for tokens, size in sizes.items()
    }


def describe(names: Sequence[str], found: Found, flops: int) -> Measured:
    """Returns time, memory and roofline share of each contestant at one size.

    The floor is the sum of the median times of the matrix products that the contestant needs.
    """
    products = [statistics.median(column) for column in zip(*found[REFERENCE]["runs"])]
    described = {}
    for name in names:
        least = contestants()[name].products
        floor, seconds = sum(products[:least]), summarize(found[name]["runs"])
        described[name] = {
            "seconds": seconds,
            "runs": len(found[name]["runs"]),
            "mib": found[name]["mib"],
            "products": least,
            "floor_s": floor,
            "gflop_s": flops * least / floor / 1e9,
            "of_floor": floor / seconds["median"],
        }
    return described


def completion_of(tokens: int, longest: int) -> int:
    """Returns the largest completion length up to ``longest`` that divides ``tokens`` into an even number of parts."""
    return next(n for n in range(min(longest, tokens // 2), 0, -1) if tokens % (2 * n) == 0)


def peers_of(name: str, names: Sequence[str]) -> list[str]:
    """Returns the peers that compute the same gradients as ``name``."""
    every = contestants()
    return [other for other in names if every[other].peer and every[other].gradients == every[name].gradients]


def ratios(names: Sequence[str], measured: dict[str, dict[str, Measured]], what: str) -> dict[str, Any]:
    """Returns vocabulary -> tokens -> our mode -> peer -> ratio.

    With ``what`` = "speed" the ratio is peer's time / ours, with "memory" our memory / peer's.
    """

    def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float | None:
        if what == "speed":
            return round(theirs["seconds"]["median"] / ours["seconds"]["median"], 3)
        # At toy sizes the measured memory can be 0.
        return round(ours["mib"] / theirs["mib"], 4) if theirs["mib"] else None

    ours = [name for name in names if not contestants()[name].peer]
    return {
        vocab: {
            tokens: {n: {peer: ratio(found[n], found[peer]) for peer in peers_of(n, names)} for n in ours}
            for tokens, found in sizes.items()
        }
        for vocab, sizes in measured.items()
    }


def memory_growth(sizes: dict[str, Measured], logits: dict[str, float]) -> dict[str, float]:
    """Returns the growth of each contestant's memory, as the module's docstring defines it."""
    last, largest = list(sizes)[-2:]
    added = logits[largest] - logits[last]
    return {name: round((sizes[largest][name]["mib"] - sizes[last][name]["mib"]) / added, 3) for name in sizes[last]}


def report(options, names, absent, measured, logits, growth) -> str:
    every = contestants()
    lines = [
        f"head {options.hidden} x V, {options.dtype} on {options.device}; {options.rounds} rounds, interleaved",
        "x best peer: time of the fastest peer that computes the same gradients / this contestant's time",
        "of floor: products x 2 N H V / rate / median; rate: of the matrix products alone, measured in this run, into"
        " allocated memory",
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
                f"V = {vocab}, N = {tokens} in completions of {completion}; matrix products run at {rate:,.0f} GFLOP/s;"
                f" one matrix of logits: {logits[vocab][tokens]:.0f} MiB",
                table(header, rows),
            ]
        if growth:
            words = ", ".join(f"{name} {value:.2f}" for name, value in growth[vocab].items())
            lines += ["", f"growth of memory / growth of the logits, V = {vocab}: {words}"]
    lines += ["", *(f"{name}: {every[name].settings}; loss {every[name].kind}" for name in names)]
    lines += [f"{name}: not run, {reason}" for name, reason in absent.items()]
    return "\n".join([*lines, ""])


def _row(name: str, names: Sequence[str], found: Measured) -> list[str]:
    one = found[name]
    best = min((found[peer]["seconds"]["median"] for peer in peers_of(name, names)), default=None)
    return [
        name,
        str(one["products"]),
        *milliseconds(one["seconds"], best),
        f"{one['mib']:.0f}",
        f"{one['of_floor']:.0%}",
    ]


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    else:
        main()
