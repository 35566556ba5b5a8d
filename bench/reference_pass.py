"""``python -m bench reference_pass --data FILE.jsonl``: the reference pass over all pairs of a file of responses.

Rows are ``{"prompt_id", "prompt", "model", "response"}``; every two responses to a prompt are a pair. TRL's pass runs
both sides of every pair, padded, in the order of the data; ours runs a prompt once and a response once. Both are the
trainers' own, timed inside of their constructors on the same model, tokens and machine, one after the other, each in
a process of its own. The expected ratio is that of floating-point operations counted from lengths, forward only:
2 p T + 4 L Hq D A + 2 R H V with T tokens run, A attended pairs, R rows of the head.

Words are hashed to token ids: what a pass costs depends on lengths alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset

from .lengths import FIRST_TOKEN
from .trainers import arguments, build_model, tokenizer
from .work import Pair, Shape, Work, padded


def read_groups(path: Path, vocab: int, longest: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts and their different responses as token ids; a prompt and a response have at most ``longest`` each."""

    def ids(text: str) -> list[int]:
        words = re.findall(r"\w{1,6}|\W", text)[:longest]
        return [crc32(word.encode()) % (vocab - FIRST_TOKEN) + FIRST_TOKEN for word in words] or [FIRST_TOKEN]

    groups: dict[str, tuple[list[int], list[list[int]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = ids(f"{row['prompt_id']} {row['prompt']}")
        groups.setdefault(row["prompt_id"], (prompt, []))[1].append(ids(f"{row['response']} {row['model']}"))
    return list(groups.values())


def pairs_of(groups: list[tuple[list[int], list[list[int]]]]) -> list[dict[str, list[int]]]:
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, responses in groups
        for chosen, rejected in combinations(responses, 2)
    ]


def forward_flops(work: Work, shape: Shape) -> float:
    layers = 2 * shape.layer_parameters * work.tokens
    attention = 4 * shape.layers * shape.heads * shape.head_size * work.attended
    return layers + attention + 2 * work.head_rows * shape.hidden * shape.vocab


def shared_work(groups: list[tuple[list[int], list[list[int]]]]) -> Work:
    """Every prompt and every response once."""
    tokens = attended = rows = 0
    for prompt, responses in groups:
        tokens += len(prompt) + sum(map(len, responses))
        rows += sum(map(len, responses))
        attended += len(prompt) * (len(prompt) + 1) // 2
        attended += sum(len(prompt) * len(r) + len(r) * (len(r) + 1) // 2 for r in responses)
    return Work(tokens=tokens, attended=attended, head_rows=rows, head_gemms=1)


def padded_work(pairs: list[dict[str, list[int]]], batch: int, completion_rows_only: bool) -> Work:
    lengths: list[Pair] = [tuple(map(len, row.values())) for row in pairs]
    parts = [padded(lengths[i : i + batch], completion_rows_only) for i in range(0, len(lengths), batch)]
    sums = (sum(getattr(part, name) for part in parts) for name in ("tokens", "attended", "head_rows"))
    return Work(*sums, head_gemms=1)


# --- One pass, in a process of its own ---


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """Seconds of the pass, sequences and prompts that the model ran."""
    torch.set_num_threads(spec["threads"])
    shape = Shape(**spec["shape"])
    rows = Dataset.from_list(pairs_of(read_groups(Path(spec["data"]), shape.vocab, spec["longest"])))
    model = build_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        return {"trl": _measure_trl, "ours": _measure_ours}[spec["side"]](spec, model, rows, folder)


def _measure_trl(spec: dict[str, Any], model: torch.nn.Module, rows: Dataset, folder: str) -> dict[str, float]:
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    if spec["completion_rows_only"]:
        trl.trainer.utils._use_triton = lambda device: True  # read by the fused head alone, for this one switch
    counted = {"seconds": 0.0, "completions": 0, "prompts": 0}

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *args):
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            counted["seconds"] = time.perf_counter() - started
            return dataset

        def compute_ref_log_probs(self, model, inputs):
            counted["completions"] += len(inputs["input_ids"])
            counted["prompts"] += len(inputs["input_ids"])
            return super().compute_ref_log_probs(model, inputs)

    Timed(
        model,
        args=DPOConfig(**arguments(spec, folder)),
        train_dataset=rows,
        processing_class=tokenizer(spec["shape"]["vocab"]),
    )
    return counted


def _measure_ours(spec: dict[str, Any], model: torch.nn.Module, rows: Dataset, folder: str) -> dict[str, float]:
    from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
    from cpt_kernels.reference import Reference

    counted = {"seconds": 0.0, "completions": 0, "prompts": 0}
    fill, score = Reference.fill, Reference._score

    def timed(self, *args):
        started = time.perf_counter()
        fill(self, *args)
        counted["seconds"] = time.perf_counter() - started

    def counting(self, batch):
        counted["completions"] += len(batch["completion_lengths"])
        counted["prompts"] += int((batch["position_ids"] == 0).sum())
        return score(self, batch)

    Reference.fill, Reference._score = timed, counting
    args = ContrastiveConfig(
        **arguments(spec, folder), ref_cache_dir=f"{folder}/cache", max_tokens_per_batch=spec["tokens_per_batch"]
    )
    ContrastiveTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer(spec["shape"]["vocab"]))
    return counted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench reference_pass", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="responses, one JSON object per line")
    parser.add_argument("--prompts", type=int, help="only the first so many; default: all")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt, and of a response")
    parser.add_argument("--trl_batch", type=int, default=8, help="pairs that TRL runs together")
    parser.add_argument("--tokens_per_batch", type=int, default=4096, help="of ours")
    parser.add_argument(
        "--completion_rows_only", action="store_true", help="turn on what TRL's head does on CUDA alone"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    if args.data is None:
        parser.error("--data is needed")
    shape = Shape()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "responses.jsonl"
        lines = args.data.read_text(encoding="utf-8").splitlines()
        wanted = list(dict.fromkeys(json.loads(line)["prompt_id"] for line in lines))[: args.prompts]
        data.write_text("\n".join(line for line in lines if json.loads(line)["prompt_id"] in set(wanted)))
        spec = {
            **{
                name: getattr(args, name) for name in ("longest", "tokens_per_batch", "completion_rows_only", "threads")
            },
            **{"data": str(data), "shape": vars(shape), "pairs": args.trl_batch, "device": "cpu", "loss": "sigmoid"},
            **{"steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-6},
        }
        found = {}
        for side in ("trl", "ours"):
            command = [sys.executable, "-m", "bench.reference_pass", "--worker", json.dumps({**spec, "side": side})]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        groups = read_groups(data, shape.vocab, args.longest)
    theirs = forward_flops(padded_work(pairs_of(groups), args.trl_batch, args.completion_rows_only), shape)
    expected = theirs / forward_flops(shared_work(groups), shape)
    ratio = found["trl"]["seconds"] / found["ours"]["seconds"]
    print(f"{'':6}{'seconds':>10}{'completions':>13}{'prompts':>9}")
    for side, numbers in found.items():
        print(f"{side:6}{numbers['seconds']:10.2f}{numbers['completions']:13,}{numbers['prompts']:9,}")
    print(f"ratio {ratio:.2f}, expected from lengths {expected:.2f}: {ratio / expected:.0%}")
    print(json.dumps({**found, "ratio": ratio, "expected": expected, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
