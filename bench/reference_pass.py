"""How long does the reference take to score all pairs of a response file, compared with TRL?

    python -m bench reference_pass --data FILE.jsonl

Rows are ``{"prompt_id", "prompt", "model", "response"}``. Any two different responses to a prompt are a pair. TRL runs
both sides of every pair, padded, in the order of the data. Ours runs every prompt and every response once. Each pass
is the trainer's own, timed inside its constructor. The passes run one after the other on the same model, tokens and
machine, each in its own process that has warmed up the model. The report has seconds, CPU seconds, counts of what was
run, and the largest difference between the completions' log-probs.

``trl`` is TRL with default settings. ``trl-tuned`` runs the head on completion rows only, puts ``--trl-batch`` pairs in
a batch, and has the allocator settings of ``bench step``; ``ours-tuned`` has the same allocator settings. ``ratio_trl``
is trl / ours, ``ratio_trl_tuned`` is trl-tuned / ours-tuned. Predicted ratios are ratios of floating-point operations,
counted from lengths for the forward only: 2 p T + 4 L Hq D A + 2 R H V with p parameters of the layers, T tokens run,
L layers, Hq heads of dimension D, A attended (query, key) pairs, R head rows, and a head of H x V.

Words are hashed to token ids, because the time depends on lengths only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from datasets import Dataset

from cpt_kernels.planning.work import Work, packed, padded

from .lengths import FIRST_TOKEN, pair_of
from .shapes import Shape
from .step import ALLOCATOR
from .timing import Channel, Worker, add_output_options, finish, table
from .trainers import arguments, build_model, tokenizer

Groups = list[tuple[list[int], list[list[int]]]]  # token ids of each prompt and of its distinct responses

CONTESTANTS = {
    "ours": {"side": "ours"},
    "ours-tuned": {"side": "ours", "tuned": True},
    "trl": {"side": "trl", "pairs": 8},  # TRL's default batch
    "trl-tuned": {"side": "trl", "tuned": True},
}
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)


def read_groups(path: Path, prompts: int | None, vocab: int, longest: int) -> Groups:
    """Reads the first ``prompts`` prompts with their responses as token ids, at most ``longest`` tokens each."""

    def ids(text: str) -> list[int]:
        words = re.findall(r"\w{1,6}|\W", text)[:longest]
        return [crc32(word.encode()) % (vocab - FIRST_TOKEN) + FIRST_TOKEN for word in words] or [FIRST_TOKEN]

    groups: dict[str, tuple[list[int], dict[tuple[int, ...], None]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        _, responses = groups.setdefault(row["prompt_id"], (ids(row["prompt"]), {}))
        responses[tuple(ids(row["response"]))] = None
    return [(prompt, [*map(list, responses)]) for prompt, responses in list(groups.values())[:prompts]]


def pairs_of(groups: Groups) -> list[dict[str, list[int]]]:
    """Returns all pairs of responses of every group, as tokenized rows."""
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, responses in groups
        for chosen, rejected in combinations(responses, 2)
    ]


def forward_flops(work: Work, shape: Shape) -> float:
    """Returns the floating-point operations of a forward."""
    layers = 2 * shape.layer_parameters * work.tokens
    attention = 4 * shape.attention_layers * shape.heads * shape.head_size * work.attended
    return layers + attention + 2 * work.head_rows * shape.hidden * shape.vocab


def padded_work(pairs: list[dict[str, list[int]]], batch: int, completion_rows_only: bool) -> Work:
    """Returns the total work of padded batches of ``batch`` pairs."""
    sides = list(map(pair_of, pairs))
    parts = [padded(sides[i : i + batch], completion_rows_only) for i in range(0, len(sides), batch)]
    return Work(*(sum(getattr(part, name) for part in parts) for name in ("tokens", "attended", "head_rows")), 1)


# --- One pass, in its own process ---


class Pass:
    """Records the time of a pass, and the completions, prompts and tokens that its model ran."""

    def __init__(self) -> None:
        self.counts = {"completions": 0, "prompts": 0, "tokens": 0, "batches": 0}

    def time(self, call: Callable, *arguments: Any) -> Any:
        """Times the call that is the pass, and returns its result."""
        started, busy = time.perf_counter(), time.process_time()
        result = call(*arguments)
        self.counts |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
        return result

    def count(self, completions: int, prompts: int, tokens: int) -> None:
        """Adds one batch."""
        for name, value in zip(self.counts, (completions, prompts, tokens, 1)):
            self.counts[name] += value


def run_trl(spec: dict[str, Any], model: torch.nn.Module, rows: Dataset, folder: str) -> tuple[Pass, np.ndarray]:
    """Runs TRL's pass. Returns it with the log-probs of each pair's completions, (pairs, 2)."""
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    if spec.get("tuned"):
        trl.trainer.utils._use_triton = lambda device: True  # only the fused head reads this switch
    done = Pass()

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *arguments):
            return done.time(super()._precompute_ref_logps, *arguments)

        def compute_ref_log_probs(self, model, inputs):
            done.count(len(inputs["input_ids"]), len(inputs["input_ids"]), inputs["input_ids"].numel())
            return super().compute_ref_log_probs(model, inputs)

    args = DPOConfig(**arguments(spec, folder))
    trainer = Timed(model, args=args, train_dataset=rows, processing_class=tokenizer(spec["shape"]["vocab"]))
    columns = (trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps"))
    return done, np.array([*columns]).T


def run_ours(spec: dict[str, Any], model: torch.nn.Module, rows: Dataset, folder: str) -> tuple[Pass, np.ndarray]:
    """Runs our pass. Returns it with the log-probs of each pair's completions, (pairs, 2)."""
    from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
    from cpt_kernels.reference.scorer import Reference

    done = Pass()
    fill, score = Reference.fill, Reference._score

    def counted(self, batch):
        starts = int((batch["position_ids"] == 0).sum())  # position 0 is the first token of a prompt
        done.count(len(batch["completion_lengths"]), starts, batch["input_ids"].numel())
        return score(self, batch)

    Reference.fill, Reference._score = lambda *arguments: done.time(fill, *arguments), counted
    args = ContrastiveConfig(
        **arguments(spec, folder), ref_cache_dir=f"{folder}/cache", max_tokens_per_batch=spec["tokens_per_batch"]
    )
    trainer = ContrastiveTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer(spec["shape"]["vocab"])
    )
    sides = [[(row["prompt_ids"], row[f"{side}_ids"]) for row in rows] for side in ("chosen", "rejected")]
    found = [trainer.reference.cache.get_many(side) for side in sides]
    return done, np.array([[values.sum(dtype=np.float64) for values in side] for side in found]).T


def worker(spec: dict[str, Any]) -> None:
    """Prepares model and data, says that it is ready, and runs the pass on request."""
    channel = Channel()
    torch.set_num_threads(spec["threads"])
    shape = Shape(**spec["shape"])
    groups = read_groups(Path(spec["data"]), spec["prompts"], shape.vocab, spec["longest"])
    rows = Dataset.from_list(pairs_of(groups))
    model = build_model(shape)
    __import__("trl" if spec["side"] == "trl" else "cpt_kernels.trainer")
    with torch.no_grad():  # starts threads and loads kernels before the clock starts
        model(torch.arange(256)[None] % shape.vocab)
    channel.reply(checksum=sum(parameter.double().sum().item() for parameter in model.parameters()))
    channel.receive()
    with tempfile.TemporaryDirectory() as folder:
        done, sums = {"trl": run_trl, "ours": run_ours}[spec["side"]](spec, model, rows, folder)
    channel.reply(**done.counts, threads=torch.get_num_threads(), sums=sums.tolist())


# --- The comparison ---


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench reference_pass", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="responses, one JSON object per line")
    parser.add_argument("--prompts", type=int, help="number of prompts to use; default: all")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a prompt or a response")
    parser.add_argument("--trl-batch", type=int, default=1, help="batch size of trl-tuned, in pairs; 1 is fastest here")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="budget of our micro-batches")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="passes to measure, separated by commas")
    parser.add_argument("--quick", action="store_true", help="smoke test with a toy model")
    add_output_options(parser)
    args = parser.parse_args(argv)
    # Settings that all contestants share.
    shape = _TOY if args.quick else Shape()
    names = args.contestants.split(",")
    groups = read_groups(args.data, args.prompts, shape.vocab, args.longest)
    common = {"data": str(args.data.resolve()), "shape": vars(shape), "device": "cpu", "loss": "sigmoid", "steps": 1}
    common |= {name: getattr(args, name) for name in ("prompts", "longest", "tokens_per_batch", "threads")}
    common |= {"pairs": args.trl_batch, "gradient_checkpointing": False, "learning_rate": 1e-6}
    # Each pass runs alone, in a process of its own.
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            spec = {**common, **CONTESTANTS[name]}
            environment = ALLOCATOR if spec.get("tuned") else {}
            worker = Worker(name, "bench.reference_pass", spec, environment)
            measured[name].append(worker.hello | worker.ask("pass"))
            worker.close()
            print(f"{name}: {measured[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    # Compare log-probs, and count operations for the predicted ratios.
    sums = {name: np.array(found[0].pop("sums")) for name, found in measured.items()}
    differences = {name: float(np.abs(sums[name] - sums[names[0]]).max()) for name in names}
    flops = {
        name: forward_flops(
            packed(map(pair_of, pairs_of(groups)))
            if entry["side"] == "ours"
            else padded_work(pairs_of(groups), entry.get("pairs", args.trl_batch), bool(entry.get("tuned"))),
            shape,
        )
        for name, entry in CONTESTANTS.items()
        if name in names
    }
    print(_report(measured, flops, differences, len(groups), len(pairs_of(groups))))
    summary = _ratios(measured, flops) | {"largest_difference": max(differences.values())}
    for found in measured.values():
        for one in found:
            one.pop("sums", None)
    finish("reference_pass", {"measured": measured, "gflop": {k: v / 1e9 for k, v in flops.items()}}, summary, args)


def _median(found: list[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in found)


def _ratios(measured: dict[str, list], flops: dict[str, float]) -> dict[str, float]:
    """Returns each contestant's time and operations over those of ours with the same allocator settings."""
    ratios = {}
    for name in measured:
        own = "ours-tuned" if CONTESTANTS[name].get("tuned") else "ours"
        if CONTESTANTS[name]["side"] == "trl" and own in measured:
            key = name.replace("-", "_")
            for kind, what in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
                ratios[f"{kind}_{key}"] = round(_median(measured[name], what) / _median(measured[own], what), 3)
            ratios[f"predicted_ratio_{key}"] = round(flops[name] / flops[own], 3)
    return ratios


def _report(measured: dict, flops: dict, differences: dict, prompts: int, pairs: int) -> str:
    rows = [
        [
            name,
            f"{_median(found, 'seconds'):.2f}",
            f"{_median(found, 'cpu_seconds'):.2f}",
            f"{found[0]['completions']:,}",
            f"{found[0]['prompts']:,}",
            f"{found[0]['tokens']:,}",
            f"{flops[name] / 1e9:,.0f}",
            f"{flops[name] / 1e9 / _median(found, 'seconds'):.0f}",
            f"{differences[name]:.1e}",
        ]
        for name, found in measured.items()
    ]
    header = ["pass", "seconds", "CPU s", "completions", "prompts", "tokens", "GFLOP", "GFLOP/s", "difference"]
    return f"{prompts} prompts, {pairs} pairs\n{table(header, rows)}"


if __name__ == "__main__":
    worker(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
