"""Writes the figures of README.md and docs/benchmarks.md from recorded results: ``python -m bench readme``.

A generated block lies between ``<!-- bench: SUBJECT MACHINE -->`` and ``<!-- /bench -->``; MACHINE is a folder of
bench/results. The block shows the machine's newest result of that subject and the command that measured it. The plots
of that result are drawn again. All benchmark figures on these pages are in such blocks. ``--check`` writes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import plot
from .step import compared_with
from .timing import RESULTS, ROOT, folder_name

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BLOCK = re.compile(r"(<!-- bench: (\w+) ([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_NAMES = {
    "ours": "cpt_kernels",
    "ours-tuned": "cpt_kernels, the same allocator settings",
    "ours-unshared": "cpt_kernels, prompts not shared",
    "ours-padded": "cpt_kernels, padded",
    "trl": "TRL {trl} as installed",
    "trl-tuned": "TRL {trl} tuned",
}
_TRL = ("trl", "trl-tuned")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench readme", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a page and the results differ")
    options = parser.parse_args(arguments)
    pages = {path: updated(path.read_text()) for path in PAGES}
    if options.check:
        stale = [path.relative_to(ROOT) for path, text in pages.items() if path.read_text() != text]
        print(f"{', '.join(map(str, stale))}: run python -m bench readme" if stale else "the pages match the results")
        return int(bool(stale))
    for path, text in pages.items():
        path.write_text(text)
        for subject, machine in dict.fromkeys((match[2], match[3]) for match in _BLOCK.finditer(text)):
            if subject in plot.DRAWINGS:
                plot.DRAWINGS[subject](newest(subject, machine), RESULTS / machine)
        print(f"written: {path.relative_to(ROOT)}, {len(_BLOCK.findall(text))} blocks")
    return 0


def updated(text: str) -> str:
    """Returns ``text`` with every block generated again."""
    return _BLOCK.sub(lambda match: match[1] + block(match[2], match[3]) + match[4], text)


def block(subject: str, machine: str) -> str:
    """Returns the Markdown of a machine's newest result.

    Raises:
        ValueError: the subject has no block, or the machine has no result of it.
    """
    if subject not in BLOCKS:
        raise ValueError(f"no block for '{subject}': choose one of {', '.join(BLOCKS)}")
    result = newest("step" if subject == "headline" else subject, machine)
    return BLOCKS[subject](result).rstrip() + "\n"


def newest(subject: str, machine: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Returns the newest recorded result of a subject."""
    found = [json.loads(path.read_text()) for path in sorted((folder / machine).glob("*.json"))]
    results = [whole[subject] for whole in found if subject in whole]
    if not results:
        raise ValueError(f"no result of '{subject}' in bench/results/{machine}")
    return max(results, key=lambda result: result["date"])


# --- Blocks ---


def headline(result: dict[str, Any]) -> str:
    """Returns the README's sentence about a training step. :func:`step` returns the table."""
    measured = result["measured"]
    installed, tuned = (_median(measured[name]) / _median(measured[compared_with(name, measured)]) for name in _TRL)
    memory = measured["trl"]["peak_mib"] / measured["ours"]["peak_mib"]
    return (
        f"For the same training steps, TRL {result['versions']['trl']} as installed takes {installed:.1f} times as long"
        f" and {memory:.1f} times the memory; with its head limited to completion tokens and a tuned allocator it takes"
        f" {tuned:.2f} times as long ({_machine(result)}; [what was measured](docs/benchmarks.md)).\n"
    )


def step(result: dict[str, Any]) -> str:
    options, measured, predicted = result["options"], result["measured"], result["predicted"]
    rows = []
    for name, found in measured.items():
        own = compared_with(name, measured)
        ratio = _median(found) / _median(measured[own])
        operations = predicted[name]["total_gflop"] / predicted[own]["total_gflop"]
        rows.append(
            [
                _NAMES[name].format(**result["versions"]),
                f"{_median(found):.2f}",
                f"{ratio:.2f}",
                f"{operations:.2f}",
                f"{100 * ratio / operations:.0f} %",
                f"{found['peak_mib'] / 1024:.1f} GiB",
                f"{predicted[name]['tokens']:,.0f}",
                f"{predicted[name]['head_rows']:,.0f}",
                f"{100 * predicted[name]['floor_s'] / _median(found):.0f} %",
            ]
        )
    header = ["", "s/step", "× ours", "operations × ours", "measured / predicted", "peak memory", "tokens run"]
    header += ["head rows", "of the floor"]
    return (
        f"An fp32 training step of a Qwen2-shaped model (hidden {options['hidden']}, {options['layers']} layers,"
        f" vocabulary {options['vocab']:,}), {options['pairs']} pairs of {options['lengths']} lengths;"
        f" {options['rounds']} interleaved rounds, medians ({_where(result)}):\n\n"
        f"{_table(header, rows)}\n"
        f"Over {options['steps']} steps losses differ by at most {result['max_loss_difference']:.1e}, reward margins by"
        f" {result['max_margin_difference']:.1e}.\n"
    )


def scaling(result: dict[str, Any]) -> str:
    rows = []
    for axis, points in result["axes"].items():
        for name in list(next(iter(points.values())))[1:]:
            cells = []
            for value, point in points.items():
                ratio = point[name]["seconds"]["median"] / point["ours"]["seconds"]["median"]
                cells.append(f"{value}: {ratio:.2f} ({point[name]['gflop'] / point['ours']['gflop']:.2f})")
            rows.append([plot.TITLES[axis], _NAMES[name].format(**result["versions"]), "; ".join(cells)])
    return (
        f"Seconds of a step as a multiple of ours, medians of {result['options']['steps'] - 1} steps; in parentheses"
        f" the ratio of operations. TRL has the tuned allocator, ours does not ({_where(result)};"
        f" [plot]({_picture(result, 'scaling')})):\n\n{_table(['', '', '× ours'], rows)}"
    )


def packing(result: dict[str, Any]) -> str:
    options, worst = result["options"], max(result["results"], key=lambda one: one["imbalance_worst"])
    budgets, ranks = (sorted({one[name] for one in result["results"]}) for name in ("budget", "ranks"))
    return (
        f"Packing of {options['rows']} pairs of {options['lengths']} lengths into micro-batches of {budgets[0]:,} to"
        f" {budgets[-1]:,} tokens on {ranks[0]} to {ranks[-1]} ranks ({_where(result)}): {result['pads']} pad tokens,"
        f" micro-batches at least {100 * result['fill']:.1f} % full in the mean over {options['epochs']} epochs, and in"
        f" the worst step, on {worst['ranks']} ranks, one rank has {100 * worst['imbalance_worst']:.1f} % fewer tokens"
        f" than another. In right-padded batches of {options['pairs']} such pairs, {100 * result['padded_share']:.0f} %"
        " of the tokens are pads.\n"
    )


def cache(result: dict[str, Any]) -> str:
    stores, large = result["stores"], result["large"]
    rows = [
        [
            text,
            f"{stores[name]['fill_mb_per_s']:.0f}" if "fill_mb_per_s" in stores[name] else "",
            f"{stores[name]['lookups_per_s']:,.0f}",
            f"{large[name]['lookups_per_s']:,.0f}" if name in large else "",
        ]
        for name, text in plot.STORES.items()
        if name in stores
    ]
    header = ["", "fill MB/s", f"look-ups/s at {_millions(result['valued'])}", f"at {_millions(result['index_of'])}"]
    return (
        f"The reference cache, {result['tokens']} values a completion, batches of 512 look-ups with their values"
        f" ({_where(result)}); {result['index_of'] / 1e6:.0f} million open in {result['open_s']:.1f} s with"
        f" {result['peak_anonymous_mb']:.0f} MB, and a training step spends {100 * result['share_of_step']:.3f} % of"
        " its time in it:\n\n"
        f"{_table(header, rows)}"
    )


def tokenize(result: dict[str, Any]) -> str:
    found = {(one["pairs"], one["form"]): one for one in result["results"]}
    every, once = "all pairs", "one pair a prompt"

    def ratios(pairs: str, key: str) -> str:
        return f"{found[pairs, 'text'][key]:.1f} (chats {found[pairs, 'chat'][key]:.1f})"

    return (
        f"Tokenizing {result['rows']:,} pairs of real lengths to the same tokens,"
        f" {_runs(len(result['results'][0]['seconds']['trl']))} ({_where(result)}): {ratios(every, 'ratio')} times"
        f" TRL's rate for all pairs of four models, where a response is in several pairs, and {ratios(once, 'ratio')}"
        f" times where every text occurs once. Against TRL with `dataset_num_proc={result['processes']}`:"
        f" {ratios(every, 'ratio_processes')} and {ratios(once, 'ratio_processes')} times.\n"
    )


def reference_pass(result: dict[str, Any]) -> str:
    measured, rows = result["measured"], []
    for name, found in measured.items():
        own = compared_with(name, measured)
        seconds, ours = (statistics.median(one["seconds"] for one in measured[side]) for side in (name, own))
        counts = [f"{found[0][key]:,}" for key in ("completions", "prompts", "tokens")]
        operations = result["gflop"][name] / result["gflop"][own]
        cells = [f"{seconds:.0f}", f"{seconds / ours:.2f}", f"{operations:.2f}", *counts]
        rows.append([_NAMES[name].format(**result["versions"]), *cells])
    header = ["", "seconds", "× ours", "operations × ours", "completions", "prompts", "tokens run"]
    return (
        f"Scoring the reference, once, for all pairs of the responses of four models,"
        f" {_runs(len(measured['ours']))} ({_where(result)}); log-probs of completions differ by at most"
        f" {result['largest_difference']:.1e}:\n\n{_table(header, rows)}"
    )


def fingerprint(result: dict[str, Any]) -> str:
    return (
        f"The digest of {result['gb']:.1f} GB of weights takes {result['gb'] / result['gb_per_s']:.1f} s"
        f" ({result['gb_per_s']:.2f} GB/s, {result['gb_per_s_one_core']:.2f} on one core; {_where(result)}).\n"
    )


def crash(result: dict[str, Any]) -> str:
    assert not result["problems"]
    return (
        f"Killed {result['kills']} times on two ranks ({_where(result)}), no build of the reference cache lost or"
        f" changed a value (largest difference {result['largest_difference']:g}); the oldest completion scored again"
        f" was {result['oldest_repeated_s']:.2f} s old, with a flush every {result['flush_s']:g} s.\n"
    )


def head(result: dict[str, Any]) -> str:
    """Returns a table of all contestants at the largest number of tokens, and the ratio eager / ours by tokens."""
    vocabs, ours = result["measured"], {3: "trained", 2: "frozen", 1: "score"}
    tokens = list(next(iter(vocabs.values())))
    header, rows = [""], []
    # The table: one row per contestant, four columns per vocabulary.
    for vocab in vocabs:
        header += [f"ms at {int(vocab):,}", "× ours", "MiB", "of the floor"]
    for name in next(iter(vocabs.values()))[tokens[-1]]:
        cells = []
        for sizes in vocabs.values():
            found = sizes[tokens[-1]]
            one, own = found[name], found.get(ours[found[name]["products"]])
            ratio = f"{one['seconds']['median'] / own['seconds']['median']:.2f}" if own else ""
            cells += [f"{1e3 * one['seconds']['median']:,.0f}", ratio, f"{one['mib']:,.0f}", f"{one['of_floor']:.0%}"]
        rows.append([name, *cells])
    # The sentence below it: eager / trained at every number of tokens.
    speeds = []
    for vocab, sizes in result["speed_ratio"].items():
        over = [sizes[n].get("trained", {}).get("eager") for n in tokens]
        if None not in over:
            speeds.append(f"{', '.join(f'{ratio:.2f}' for ratio in over)} (vocabulary {int(vocab):,})")
    absent = "; ".join(f"{name}: {reason}" for name, reason in result["absent"].items())
    options = result["options"]
    return (
        f"The head, hidden size {options['hidden']:,}, {options['dtype']}, {int(tokens[-1]):,} completion tokens,"
        f" forward and backward, {_runs(options['rounds'], 'rounds')} ({_where(result)}). The floor is the matrix"
        " products that are needed, alone; × ours compares with our mode that computes the same gradients:\n\n"
        f"{_table(header, rows)}\n"
        f"Eager / trained at {', '.join(f'{int(n):,}' for n in tokens)} tokens: {'; '.join(speeds) or 'not measured'}."
        + (f" Not run: {absent}.\n" if absent else "\n")
    )


def attention(result: dict[str, Any]) -> str:
    header = ["", "", "ours, ms", "of the floor"]
    peers = dict.fromkeys(name for ways in result["ratio"].values() for found in ways.values() for name in found)
    peers = [name for name in peers if not name.startswith("ours")]
    header += [f"{name} / ours (by pairs)" for name in peers]
    rows = []
    for size, ways in result["measured"].items():
        _, prompt, completions = size.split()
        for way, found in ways.items():
            own = min((one for name, one in found.items() if name.startswith("ours")), key=lambda one: one["x_ours"])
            ratios = [f"{found[n]['x_ours']:.2f} ({found[n]['pairs']:.2f})" if n in found else "" for n in peers]
            what = f"prompt {int(prompt):,}, completions {completions.replace('x', ' × ')}"
            cells = [what, way, f"{1e3 * own['seconds']['median']:.1f}", f"{own['of_floor']:.0%}"]
            rows.append([*cells, *ratios])
    return (
        f"Attention with a shared prompt, {result['options']['dtype']}, {_runs(result['options']['rounds'], 'rounds')}"
        f" ({_where(result)}); in parentheses the ratio of (query, key) pairs computed:\n\n"
        f"{_table(header, rows)}"
    )


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "headline": headline,
    "step": step,
    "scaling": scaling,
    "head": head,
    "attention": attention,
    "packing": packing,
    "cache": cache,
    "tokenize": tokenize,
    "reference_pass": reference_pass,
    "fingerprint": fingerprint,
    "crash": crash,
}


def _median(found: dict[str, Any]) -> float:
    return statistics.median(found["seconds"])


def _runs(count: int, what: str = "runs") -> str:
    return f"medians of {count} {what}" if count > 1 else "one run each"


def _millions(count: int) -> str:
    return f"{count / 1e6:g} million"


def _where(result: dict[str, Any]) -> str:
    """Returns machine, day and command for a caption."""
    command = re.sub(r" --device cpu\b", "", result["command"]).removesuffix(" --record")
    return f"{_machine(result)}, {result['date'][:10]}, `{command}`"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return machine["gpu"] or f"{machine['cores']} cores of an {machine['cpu']}"


def _picture(result: dict[str, Any], subject: str) -> str:
    """Returns the path of a plot relative to docs/, where all plots are shown."""
    return f"../bench/results/{folder_name(result['machine'])}/{subject}.svg"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
