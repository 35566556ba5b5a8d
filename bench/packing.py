"""How much does packing waste: pad tokens, unfilled budget, and ranks that wait for each other?

    python -m bench packing --lengths responses

Rows of the given lengths pass through the trainer's preparation, sampler and collator, for several epochs and for 1, 2
and 4 ranks. The report has

    pads       positions of the packed rows that belong to no prompt or completion
    fill       tokens / (micro-batches x budget), over all epochs
    imbalance  (most - fewest tokens of a rank) / most, per step: mean over the steps, and worst step
    padded     for comparison: share of pad tokens in right-padded batches of --pairs pairs, chosen above rejected
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from cpt_kernels.data.batches import BatchSampler
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.loader import row_tokens
from cpt_kernels.data.preparation import prepare

from .lengths import HELP, preference_rows
from .timing import add_output_options, finish, table
from .trainers import tokenizer

_VOCAB = 32_000


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench packing", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="responses", help=HELP)
    parser.add_argument("--rows", type=int, default=300, help="number of pairs, each with its own prompt")
    parser.add_argument("--budget", default="2048,4096,8192", help="values of max_tokens_per_batch, comma-separated")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, comma-separated")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=8, help="pairs per padded batch")
    parser.add_argument("--quick", action="store_true", help="smoke test: one budget, one epoch")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.budget, options.epochs = options.budget.split(",")[0], 1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    pairs = Dataset.from_list(preference_rows(options.lengths, options.rows, _VOCAB))
    rows, prepared = prepare(pairs, tokenizer(_VOCAB), max_length=options.max_length, name="benchmark")
    results = [
        measure(rows, int(budget), int(ranks), options.epochs, options.max_length)
        for budget in options.budget.split(",")
        for ranks in options.ranks.split(",")
    ]
    padded = padded_share(rows, options.pairs, options.max_length)
    print("\n".join(prepared.summary()))
    print(report(results, padded, options))
    summary = {
        "pads": sum(result["pads"] for result in results),
        "fill": round(min(result["fill"] for result in results), 4),
        "imbalance_mean": round(max(result["imbalance_mean"] for result in results), 4),
        "imbalance_worst": round(max(result["imbalance_worst"] for result in results), 4),
        "padded_share": round(padded, 4),
    }
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "record")}
    finish("packing", {"results": results, "options": settings}, summary, options)


def measure(rows: Dataset, budget: int, ranks: int, epochs: int, max_length: int) -> dict[str, Any]:
    """Returns pads, fill and imbalance for one budget and number of ranks, over all epochs."""
    tokens = row_tokens(rows, PackedCollator(max_length))
    collate = PackedCollator(max_length)
    samplers = [
        BatchSampler(tokens, max_tokens=budget, shuffle=True, seed=0, world_size=ranks, rank=rank)
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.plan_epochs(epochs)
    pads, seen, batches, imbalances = 0, 0, 0, []
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for step in zip(*samplers, strict=True):
            packed = []
            for members in step:
                members = [rows[i] for i in members]
                positions = collate(members)["input_ids"].shape[1] if members else 0
                pads += positions - needed_tokens(members, max_length)
                packed.append(positions)
            imbalances.append((max(packed) - min(packed)) / max(packed))
            seen, batches = seen + sum(packed), batches + ranks
    return {
        "budget": budget,
        "ranks": ranks,
        "steps": len(imbalances),
        "pads": pads,
        "fill": seen / (batches * budget),
        "imbalance_mean": float(np.mean(imbalances)),
        "imbalance_worst": float(np.max(imbalances)),
    }


def needed_tokens(rows: Sequence[dict[str, Any]], max_length: int) -> int:
    """Returns the number of tokens in ``rows`` if each prompt and each of its distinct completions counts once."""
    groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        room = max_length - len(prompt)
        groups.setdefault(prompt, set()).update(tuple(completion[:room]) for completion in row["completion_ids"])
    return sum(len(prompt) + sum(map(len, completions)) for prompt, completions in groups.items())


def padded_share(rows: Dataset, pairs: int, max_length: int) -> float:
    """Returns pad tokens / all tokens of right-padded batches of ``pairs`` pairs, in the order of the rows."""
    real = total = 0
    sides = [
        [min(len(row["prompt_ids"]) + len(completion), max_length) for completion in row["completion_ids"]]
        for row in rows
    ]
    for start in range(0, len(sides), pairs):
        lengths = [length for row in sides[start : start + pairs] for length in row]
        real, total = real + sum(lengths), total + len(lengths) * max(lengths)
    return 1 - real / total


def report(results: Sequence[dict[str, Any]], padded: float, options: argparse.Namespace) -> str:
    header = ["budget", "ranks", "steps", "pads", "fill %", "imbalance mean %", "worst step %"]
    lines = [
        [r["budget"], r["ranks"], r["steps"], r["pads"]]
        + [f"{100 * r[name]:.2f}" for name in ("fill", "imbalance_mean", "imbalance_worst")]
        for r in results
    ]
    return "\n".join(
        [
            f"{options.rows} pairs of {options.lengths} lengths, max_length {options.max_length},"
            f" {options.epochs} epochs",
            "",
            table(header, lines),
            "",
            f"right-padded, {options.pairs} pairs per batch: {100 * padded:.1f} % of all tokens are pads",
        ]
    )


if __name__ == "__main__":
    main()
