"""How fast is shared-prompt attention, compared with other ways to compute the same?

    python -m bench attention --shape llama-1b --prompt 512,2048 --completions 2x256 8x128

Every contestant attends over the same packed row of K completions after one prompt. Each runs in its own process;
rounds are interleaved after a warm-up that compiles. Outputs and gradients are compared with a reference before
anything is timed. A round repeats the run for about 50 ms. On CUDA the L2 cache is cold.

    ours-BACKEND  shared_prompt_attention (--backends, default: all that are available)
    separate      each completion after its own copy of the prompt: SDPA, one sequence at a time, on a CPU; one
                  variable-length flash attention on CUDA; does not sum the gradients of the prompt's copies
    flex          FlexAttention, compiled, with a block mask for the shared prompt; has no backward on a CPU
    dense         one call of SDPA with an explicit mask

The report has time, peak memory and the share of the roofline. ``pairs`` is the number of (query, key) pairs that a
contestant computes, divided by A, the number needed. It is the time relative to ours that we would see if all
contestants computed pairs at the same rate. Dense SDPA computes all T x T pairs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from cpt_kernels.ops.attention.select import capabilities

from . import attentions
from .attentions import Case, Groups, attended, copies_of, dense_mask, inputs_of, spread, tokens_of
from .rounds import REFERENCE, Found, Products, Timed, compete, serve
from .shapes import SHAPES, Shape
from .timing import add_output_options, finish, milliseconds, summarize, table

_PEERS = "separate,flex,dense"
_WAYS = {"forward and backward": 14, "forward": 4}  # operations per head, head dimension and attended pair
_SIDE = {"cpu": 1024, "cuda": 8192}  # side of the square matrix product whose rate is the roofline
_NO_BACKWARD = "FlexAttention has no backward on a CPU"

# --- Worker ---


def work(spec: dict[str, Any]) -> None:
    """Runs the worker of one contestant. A size is ``GROUPS PROMPT COMPLETIONS``."""
    device, case = spec["device"], case_of(spec)

    def build(*size: str) -> Timed | Products:
        groups = groups_of(*size)
        if spec["name"] != REFERENCE:
            return AttentionRun(groups, case, spec)
        a, b = (torch.randn(2 * [_SIDE[device]], device=device).to(case.dtype) for _ in range(2))
        return Products(device, expected(groups, case, device), (a, b))

    serve(device, build)


def case_of(spec: dict[str, Any]) -> Case:
    """Returns the case that a worker's settings describe."""
    return Case(*spec["heads"], dtype=getattr(torch, spec["dtype"]))


def groups_of(count: str, prompt: str, completions: str) -> Groups:
    """Returns ``count`` equal groups. ``completions`` is ``KxLENGTH`` or a comma-separated list of lengths."""
    if repeated := re.fullmatch(r"(\d+)x(\d+)", completions):
        lengths = int(repeated[1]) * [int(repeated[2])]
    else:
        lengths = [int(length) for length in completions.split(",")]
    return [(int(prompt), lengths)] * int(count)


class AttentionRun(Timed):
    """One contestant on one layout."""

    def __init__(self, groups: Groups, case: Case, spec: dict[str, Any]):
        super().__init__(spec["device"])
        name, self.backward = spec["name"], spec["backward"]
        self.tokens, self.index = tokens_of(groups), None
        self.leaves, self.upstream = inputs_of(case, self.tokens, self.device)
        if name == "separate":
            # The inputs of a shared prompt are copied into each of its sequences.
            self.index = copies_of(groups).to(self.device)
            self.leaves = [leaf[self.index] for leaf in self.leaves]
            self.upstream = spread(self.upstream, self.index.cpu())
        self.leaves = [leaf.requires_grad_(self.backward) for leaf in self.leaves]
        backend = name.removeprefix("ours-")
        if backend != name:
            self.attention = attentions.ours(groups, self.device, backend)
        else:
            self.attention = getattr(attentions, name)(groups, self.device)
        self.found: list[torch.Tensor] = []

    def run(self) -> None:
        with torch.set_grad_enabled(self.backward):
            out = self.attention(*self.leaves)
        grads = torch.autograd.grad(out, self.leaves, self.upstream) if self.backward else ()
        self.found = [out.detach(), *grads]

    def clear(self) -> None:
        self.found = []

    def results(self) -> dict[str, list[float]]:
        if self.index is None:
            return norms_and_products(self.found)
        # Map the separate sequences back to the packed row: one copy of each output, the sum of all gradients.
        out, *grads = self.found
        first = out.new_zeros(self.tokens, *out.shape[1:])
        first[self.index.flip(0)] = out.flip(0)  # all copies of a row are equal up to rounding; the first one is kept
        sums = [
            grad.new_zeros(self.tokens, *grad.shape[1:]).float().index_add_(0, self.index, grad.float())
            for grad in grads
        ]
        return norms_and_products([first, *sums])


def norms_and_products(tensors: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """Returns the Euclidean norm of output and gradients, and a dot product with random numbers.

    The dot product detects permuted rows, which leave the norm unchanged.
    """
    found = {}
    for name, tensor in zip(("out", "dq", "dk", "dv"), tensors):
        probe = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.device)
        found[name] = [tensor.float().norm().item(), (tensor.float() * probe).sum().item()]
    return found


def expected(groups: Groups, case: Case, device: str) -> dict[str, list[float]]:
    """Computes softmax attention and its gradients by definition, in fp32, one group at a time."""
    leaves, upstream = inputs_of(case, tokens_of(groups), device)
    leaves = [leaf.float().requires_grad_() for leaf in leaves]
    start, outs = 0, []
    for prompt, completions in groups:
        rows = slice(start, start + prompt + sum(completions))
        mask, start = dense_mask([(prompt, completions)], device), rows.stop
        q, *kv = (leaf[rows].transpose(0, 1) for leaf in leaves)
        k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=0) for x in kv)
        scores = (q @ k.mT * case.size**-0.5).masked_fill(~mask, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    out = torch.cat(outs)
    return norms_and_products([out.detach(), *torch.autograd.grad(out, leaves, upstream.float())])


# --- Parent ---


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench attention", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="small", help="model whose heads are used; default on cuda: llama-8b"
    )
    parser.add_argument("--prompt", help="prompt lengths, comma-separated; default 256,1024, on cuda 2048,4096")
    parser.add_argument(
        "--completions", nargs="+", help="KxLENGTH or LENGTH,LENGTH; default 2x256 8x128, on cuda 2x1024 8x512"
    )
    parser.add_argument("--groups", type=int, default=1, help="number of prompts in the packed row")
    parser.add_argument("--backends", help="our backends, comma-separated; default: all that are available")
    parser.add_argument("--peers", default=_PEERS, help="comma-separated list of separate, flex and dense")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32, on cuda bfloat16")
    parser.add_argument("--quick", action="store_true", help="smoke test: short prompts, nothing compiled")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    # Defaults depend on the device.
    cuda = options.device == "cuda"
    if cuda and options.shape == "small":
        options.shape = "llama-8b"
    if options.quick:
        options.prompt, options.completions, options.rounds = "32", ["2x16", "9,1,5"], 2
        options.peers = "separate,dense" if options.peers == _PEERS else options.peers
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.prompt = [int(n) for n in (options.prompt or ("2048,4096" if cuda else "256,1024")).split(",")]
    options.completions = options.completions or (["2x1024", "8x512"] if cuda else ["2x256", "8x128"])
    for text in options.completions:
        if not re.fullmatch(r"\d+x\d+|\d+(,\d+)*", text):
            parser.error(f"--completions {text}: must be KxLENGTH or LENGTH,LENGTH,...")
    options.peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(options.peers) - set(_PEERS.split(",")):
        parser.error(f"unknown peers {sorted(unknown)}: choose from {_PEERS}")
    there = backends_of(options.device)
    options.backends = options.backends.split(",") if options.backends else there
    if unknown := set(options.backends) - set(there):
        parser.error(f"backends {sorted(unknown)} are not available here: choose from {', '.join(there)}")
    return options


def backends_of(device: str) -> list[str]:
    """Returns our backends that run on a device. ``eager`` is left out on CUDA, where its score matrix fills memory."""
    there = {name: one for name, one in capabilities().items() if not isinstance(one, str)}
    found = [name for name, one in there.items() if one.device in (None, device) and one.deterministic]
    return found if device == "cpu" else [name for name in found if name != "eager"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = [*(f"ours-{backend}" for backend in options.backends), *options.peers]
    absent = {"forward and backward": {"flex": _NO_BACKWARD}} if options.device == "cpu" and "flex" in names else {}
    measured = run(names, absent, options)
    print(report(options, absent, measured))
    ratios = {
        size: {way: {name: one["x_ours"] for name, one in found.items()} for way, found in ways.items()}
        for size, ways in measured.items()
    }
    predicted = {
        size: {name: round(one["pairs"], 3) for name, one in ways["forward"].items()} for size, ways in measured.items()
    }
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "record")}
    finish(
        "attention",
        {"options": settings, "measured": measured},
        {"ratio": ratios, "predicted_ratio": predicted, "absent": absent},
        options,
    )


def run(names: Sequence[str], absent: dict[str, dict[str, str]], options: argparse.Namespace) -> dict[str, Any]:
    """Times all contestants. Returns size -> way -> contestant -> measurements."""
    shape = SHAPES[options.shape]
    common = {"heads": [shape.heads, shape.kv_heads, shape.head_size], "device": options.device}
    common["dtype"] = options.dtype
    sizes = [f"{options.groups} {prompt} {text}" for prompt in options.prompt for text in options.completions]
    specs = {REFERENCE: {**common, "name": REFERENCE}}
    entries = {way: [name for name in names if name not in absent.get(way, {})] for way in _WAYS}
    for way, some in entries.items():
        specs |= {f"{name} {way}": {**common, "name": name, "backward": way != "forward"} for name in some}
    found = compete("bench.attention", specs, sizes, options.rounds, lambda found: check(found, options.dtype))
    return {
        size: {way: describe(size, way, some, found[size], shape, options.device) for way, some in entries.items()}
        for size in sizes
    }


def check(found: Found, dtype: str) -> None:
    """Raises RuntimeError if a contestant's output or gradients differ from the reference."""
    expected, tolerance = found[REFERENCE]["results"], 1e-3 if dtype == "float32" else 0.02
    for name, one in found.items():
        for part, (norm, product) in one["results"].items():
            size, along = expected[part]
            if not (abs(norm - size) <= tolerance * size and abs(product - along) <= tolerance * size):
                raise RuntimeError(
                    f"'{name}' computes wrong results: {part} has norm {norm:.6g} and product {product:.6g},"
                    f" expected {size:.6g} and {along:.6g}"
                )


def describe(size: str, way: str, names: Sequence[str], found: Found, shape: Shape, device: str) -> dict[str, Any]:
    """Returns time, memory, computed pairs and roofline share of each contestant at one size."""
    groups = groups_of(*size.split())
    least = attended(groups, True)
    pairs = {"separate": attended(groups, False), "dense": tokens_of(groups) ** 2}
    seconds = {name: summarize(found[f"{name} {way}"]["runs"]) for name in names}
    fastest = min(seconds[name]["median"] for name in names if name.startswith("ours"))
    rate = 2 * _SIDE[device] ** 3 / statistics.median(product for (product,) in found[REFERENCE]["runs"])
    floor = _WAYS[way] * shape.heads * shape.head_size * least / rate
    return {
        name: {
            "seconds": seconds[name],
            "mib": found[f"{name} {way}"]["mib"],
            "pairs": pairs.get(name, least) / least,
            "x_ours": round(seconds[name]["median"] / fastest, 3),
            "gflop_s": rate / 1e9,
            "floor_s": floor,
            "of_floor": floor / seconds[name]["median"],
        }
        for name in names
    }


def report(options: argparse.Namespace, absent: dict[str, dict[str, str]], measured: dict[str, Any]) -> str:
    shape = SHAPES[options.shape]
    lines = [
        f"attention, {shape.heads} heads on {shape.kv_heads} of size {shape.head_size}, {options.dtype} on"
        f" {options.device}; {options.rounds} rounds, interleaved",
        "x ours: time / time of our fastest backend; pairs: (query, key) pairs computed / pairs needed, A",
        "of floor: operations / rate / median; operations: 14 Hq D A forward and backward, 4 Hq D A forward; rate: of a"
        f" square matrix product of side {_SIDE[options.device]}, measured in this run",
        "MiB: peak beyond the inputs",
    ]
    header = ["contestant", "ms", "quartiles", "x best peer", "x ours", "pairs", "MiB", "of floor"]
    for size, ways in measured.items():
        count, prompt, completions = size.split()
        for way, found in ways.items():
            best = min((one["seconds"]["median"] for n, one in found.items() if n in _PEERS.split(",")), default=None)
            rate = next(iter(found.values()))["gflop_s"]
            what = f"{count} prompt{'s' * (count != '1')} of {prompt}, completions {completions}"
            lines += ["", f"{what}: {way}; matrix products run at {rate:,.0f} GFLOP/s"]
            lines += [table(header, [_row(name, one, best) for name, one in found.items()])]
            lines += [f"{name}: not run, {reason}" for name, reason in absent.get(way, {}).items()]
    return "\n".join([*lines, ""])


def _row(name: str, one: dict[str, Any], best: float | None) -> list[str]:
    return [
        name,
        *milliseconds(one["seconds"], best),
        f"{one['x_ours']:.2f}",
        f"{one['pairs']:.2f}",
        f"{one['mib']:.0f}",
        f"{one['of_floor']:.0%}",
    ]


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    else:
        main()
