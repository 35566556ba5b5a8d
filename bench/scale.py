"""What do one million pairs cost on 8 to 512 ranks: idle ranks, planning, preparation, and the reference cache?

    python -m bench scale
    python -m bench scale --lengths responses --groups 1,2,8 --prepare 0

No model runs. Rows of the given lengths are stored as a prepared dataset, and the trainer's own loader plans an epoch
of them for every number of ranks. Each part runs in a process of its own. The report has

    tokens      mean tokens of a rank in a turn. A turn is one micro-batch on every rank; ranks wait at its end
    idle        1 - work of all ranks / (ranks x most work of a rank), over all turns; by tokens, and by the operations
                of an 8B model, which count attention
    worst       idle share of the worst turn
    planning    CPU seconds from the stored dataset to the first micro-batch of a rank, and the peak of its memory
                without mapped files
    preparation rows tokenized per CPU second, and the growth of memory without mapped files
    cache       files, requests and bytes of the reference log-probs: the files of a build of --rate tokens a second and
                rank by arithmetic, the index and its look-ups measured

A sequence group of n ranks shares a micro-batch of n times the tokens, each rank an even part of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.loader import longest_sequence, make_loader
from cpt_kernels.data.preparation import prepare
from cpt_kernels.data.tokenize import GROUP_FEATURES
from cpt_kernels.planning.work import Work
from cpt_kernels.reference.cache import ReferenceCache

from .lengths import HELP, draw_groups, train_bpe
from .shapes import SHAPES
from .timing import MIB, add_output_options, finish, resident_mib, table

_STEP = 1000  # rows of a record batch, as `datasets` writes them
_VOCAB = 32_000


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="ultrafeedback", help=HELP)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="number of rows, each with its own prompt")
    parser.add_argument("--ranks", default="8,64,512", help="numbers of ranks, comma-separated")
    parser.add_argument("--groups", default="1,4", help="sizes of sequence groups, comma-separated")
    parser.add_argument("--budget", type=int, default=8192, help="max_tokens_per_batch of one rank")
    parser.add_argument("--rows", type=int, default=8, help="per_device_train_batch_size, without a budget")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--prepare", type=int, default=1_000_000, help="rows to tokenize; 0 leaves this part out")
    parser.add_argument("--rate", type=float, default=20_000, help="tokens that a rank scores in a second, assumed")
    parser.add_argument("--quick", action="store_true", help="smoke test: 3,000 pairs, 4 and 8 ranks")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.ranks, options.prepare = 3000, "4,8", 300
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    ranks, groups = ([int(part) for part in text.split(",")] for text in (options.ranks, options.groups))
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        file = Path(folder, "rows.arrow")
        tokens = alone(write_rows, file, options.lengths, options.pairs)
        cases = [
            (world, group, budget)
            for budget in (options.budget, None)
            for world in ranks
            for group in groups
            if world % group == 0 and (budget or group == 1)
        ]
        plans = alone(plan_all, file, cases, options.rows, options.max_length)
        prepared = [
            alone(measure_preparation, rows, folder) for rows in (options.prepare // 100, options.prepare) if rows
        ]
        cached = alone(measure_index, Path(folder), 2 * options.pairs, max(ranks))
    files = [count_files(tokens, 2 * options.pairs, world, options.rate) for world in ranks]
    print(report(plans, prepared, cached, files, options))
    packed = [each for each in plans if each["budget"]]
    summary = {
        "idle": {str(world): max(each["idle"] for each in packed if each["ranks"] == world) for world in ranks},
        "planning_seconds": max(each["seconds"] for each in plans),
        "planning_mib": max(each["peak_mib"] for each in plans),
    }
    if prepared:
        summary["preparation_ratio"] = round(prepared[-1]["rate"] / prepared[0]["rate"], 3)
        summary["preparation_growth_mib"] = round(prepared[-1]["growth_mib"] - prepared[0]["growth_mib"])
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "record")}
    more = {"plans": plans, "preparation": prepared, "index": cached, "files": files, "options": settings}
    finish("scale", more, summary, options)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a new process, so that its memory and time are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --- Rows ---


def write_rows(file: Path, lengths: str, count: int) -> int:
    """Writes prepared rows of random tokens, and returns the tokens of all completions."""
    random = np.random.default_rng(0)
    drawn = draw_groups(lengths, count, 2, random)
    prompts, sides = np.array([prompt for prompt, _ in drawn]), np.array([sides for _, sides in drawn])
    schema = GROUP_FEATURES.arrow_schema
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, count, _STEP):
            cut = slice(start, min(start + _STEP, count))
            rows = cut.stop - start
            prompt, completion = (_lists(part, random) for part in (prompts[cut], sides[cut].ravel()))
            pairs = pa.ListArray.from_arrays(pa.array(range(0, 2 * rows + 1, 2), pa.int32()), completion)
            zero, one = (_cut([1] * rows, pa.array([side] * rows, pa.int32())) for side in (0, 1))
            scores = _cut([0] * rows, pa.array([], pa.float32()))
            images = _cut([0] * rows, pa.array([], pa.int64()))
            masks, numbers = _cut([0] * rows, pa.array([], pa.list_(pa.bool_()))), pa.array(range(start, cut.stop))
            columns = [prompt, images, pairs, masks, zero, one, zero, scores, scores, numbers, numbers]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return int(sides.sum())


def _cut(lengths: Sequence[int] | np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)


def _lists(lengths: np.ndarray, random: np.random.Generator) -> pa.ListArray:
    return _cut(lengths, pa.array(random.integers(3, _VOCAB, lengths.sum(), dtype=np.int32)))


# --- The plan of an epoch ---


def plan_all(
    file: Path, cases: Sequence[tuple[int, int, int | None]], rows: int, max_length: int
) -> list[dict[str, Any]]:
    """Plans an epoch for each (ranks, size of a sequence group, budget)."""
    return [plan(file, *case, rows, max_length) for case in cases]


def plan(file: Path, ranks: int, group: int, budget: int | None, rows: int, max_length: int) -> dict[str, Any]:
    """Plans an epoch with the trainer's loader. Returns its tokens, idle shares, seconds and memory."""
    dataset = Dataset.from_file(str(file))
    # A few rows are dropped, as preparation does; the rows that stay are then selected by a list of indices.
    kept = np.flatnonzero(np.arange(len(dataset)) % 97)
    dataset = dataset.select(kept)
    world, layout = ranks // group, PackedCollator(max_length)
    args = SimpleNamespace(
        **dict(max_tokens_per_batch=budget and budget * group, max_length=max_length, data_ranks=world, data_rank=0),
        **dict(
            gradient_accumulation_steps=1,
            train_sampling_strategy="random",
            seed=0,
            data_seed=None,
            group_by_prefix=False,
        ),
        **dict(dataloader_drop_last=False, max_steps=-1, num_train_epochs=1, device=SimpleNamespace(type="cpu")),
        **dict(dataloader_num_workers=0, dataloader_pin_memory=False, dataloader_persistent_workers=False),
        **dict(dataloader_prefetch_factor=None, dataloader_multiprocessing_context=None, dataloader_in_order=True),
    )
    resident_mib()  # returns unused memory
    with _anonymous_peak() as memory:
        began = time.process_time()
        longest_sequence(dataset, max_length)  # the trainer checks it against the model's positions
        sampler = make_loader(dataset, lambda rows: rows, args, layout, True, batch_size=rows).batch_sampler
        next(iter(sampler))
        seconds = time.process_time() - began
    turns = sampler._epoch(0)
    return {
        **dict(ranks=ranks, group=group, budget=budget, turns=len(turns) // world),
        **dict(seconds=round(seconds, 2), peak_mib=round(memory["peak"])),
        **_idle(turns, world, group, sampler.tokens, _operations(dataset, kept, max_length)),
    }


def _operations(dataset: Dataset, kept: np.ndarray, max_length: int) -> np.ndarray:
    """Returns (rows,) operations of a training step of an 8B model on each row."""
    columns = [dataset.data.column(name).combine_chunks() for name in ("prompt_ids", "completion_ids")]
    prompts = columns[0].value_lengths().to_numpy()[kept].astype(np.int64)
    sides = columns[1].flatten().value_lengths().to_numpy().reshape(-1, 2)[kept].astype(np.int64)
    sides = np.minimum(prompts[:, None] + sides, max_length) - prompts[:, None]
    causal = sides * (sides + 1) // 2 + prompts[:, None] * sides
    attended = prompts * (prompts + 1) // 2 + causal.sum(1)
    work: Any = Work(prompts + sides.sum(1), attended, sides.sum(1), 3)  # type: ignore[arg-type]
    return work.flops(SHAPES["llama-8b"])["total"]


def _idle(
    turns: list[list[int]], world: int, group: int, tokens: np.ndarray, operations: np.ndarray
) -> dict[str, float]:
    ends = np.cumsum([0, *map(len, turns)])
    order = np.concatenate([np.asarray(batch, np.int64) for batch in turns])
    loads, work = (np.diff(np.cumsum([0, *sizes[order]])[ends]).reshape(-1, world) for sizes in (tokens, operations))
    loads = -(-loads // group)  # the tokens of the rank of a group that has the longest part
    idle, idle_work = (1 - part.mean() / part.max(axis=1).mean() for part in (loads, work))
    worst = (1 - loads.mean(axis=1) / loads.max(axis=1)).max()
    found = dict(tokens=round(loads.mean()), idle=idle, idle_operations=idle_work, worst=worst)
    return {name: round(float(value), 4) for name, value in found.items()}


# --- Preparation ---


def measure_preparation(rows: int, folder: str) -> dict[str, Any]:
    """Tokenizes pairs of short text, and returns rows per CPU second and the growth of anonymous memory."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    random = np.random.default_rng(0)
    words = np.array(["".join(map(chr, random.integers(97, 123, size))) for size in random.integers(2, 9, 5000)])
    texts = [
        {
            name: " ".join(random.choice(words, size))
            for name, size in zip(("prompt", "chosen", "rejected"), (p, *sides))
        }
        for p, sides in draw_groups("tiny", 1000, 2, random)
    ]
    backend = train_bpe([row["prompt"] for row in texts], 8000)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    dataset = Dataset.from_list(texts, features=None)
    cached = Path(folder, f"texts-{rows}")
    dataset.save_to_disk(str(cached))
    dataset = Dataset.load_from_disk(str(cached)).select(np.arange(rows) % len(texts))
    with _anonymous_peak() as growth:
        began = time.process_time()
        prepare(dataset, tokenizer, max_length=1024)
        seconds = time.process_time() - began
    return {"rows": rows, "rate": round(rows / seconds, 1), "growth_mib": round(growth["mib"], 1)}


@contextmanager
def _anonymous_peak() -> Iterator[dict[str, float]]:
    """Yields a dictionary with the peak of this process's anonymous memory and its growth in MiB, by a sampler."""

    def anonymous() -> float:
        statm = Path("/proc/self/statm").read_text().split()
        return (int(statm[1]) - int(statm[2])) * os.sysconf("SC_PAGE_SIZE") / MIB

    done, start = threading.Event(), anonymous()
    found = {"mib": 0.0, "peak": start}

    def sample() -> None:
        while not done.wait(0.02):
            found["peak"] = max(found["peak"], anonymous())
            found["mib"] = found["peak"] - start

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


# --- The reference cache ---


def measure_index(folder: Path, completions: int, shards: int) -> dict[str, float]:
    """Stores one log-prob for each completion in as many files as there are ranks, opens them and looks keys up."""
    each = -(-completions // shards)
    cache = ReferenceCache(folder / "cache", "0" * 32, flush_seconds=1e9)
    for start in range(0, completions, each):
        ids = [([0], [number]) for number in range(start, min(start + each, completions))]
        cache.add_many(ids, [np.zeros(1, np.float32)] * len(ids))
        cache.flush()
    return alone(_open_index, folder, completions)


def _open_index(folder: Path, completions: int) -> dict[str, float]:
    wanted = [([0], [number]) for number in np.random.default_rng(0).integers(0, completions, 2000).tolist()]
    with _anonymous_peak() as growth:
        began = time.perf_counter()
        cache = ReferenceCache(folder / "cache", "0" * 32)
        opened = time.perf_counter() - began
        found = [cache.get_many(wanted[i : i + 2]) for i in range(0, len(wanted), 2)]
        looked = time.perf_counter() - began - opened
    assert all(values is not None for pair in found for values in pair)
    return {
        **dict(completions=completions, files=len(cache.shards), open_seconds=round(opened, 3)),
        **dict(
            bytes_per_row=round(growth["mib"] * MIB / completions, 1), lookups_per_second=round(len(wanted) / looked)
        ),
    }


def count_files(tokens: int, completions: int, ranks: int, rate: float) -> dict[str, float]:
    """Returns seconds, files and their size of a build of the cache, by arithmetic."""
    seconds = tokens / (ranks * rate)
    flush = signature(ReferenceCache).parameters["flush_seconds"].default
    files = ranks * max(1, round(seconds / flush))
    size = 4 * tokens + 24 * completions  # values; keys and places
    return {
        **dict(ranks=ranks, seconds=round(seconds), files=files, mib_per_file=round(size / files / MIB, 2)),
        **dict(writes_per_second=round(files / max(seconds, 1), 1), opened_by_all=files * ranks),
    }


def report(
    plans: list[dict[str, Any]],
    prepared: list[dict[str, Any]],
    cached: dict[str, float],
    files: list[dict[str, float]],
    options: argparse.Namespace,
) -> str:
    header = ["micro-batches", "ranks", "group", "turns", "tokens", "idle %", "operations %", "worst %", "s", "MiB"]
    lines = [
        [f"{each['budget']} tokens" if each["budget"] else f"{options.rows} rows"]
        + [each[name] for name in ("ranks", "group", "turns", "tokens")]
        + [f"{100 * each[name]:.2f}" for name in ("idle", "idle_operations", "worst")]
        + [each["seconds"], each["peak_mib"]]
        for each in plans
    ]
    parts = [
        f"{options.pairs:,} pairs of {options.lengths} lengths, max_length {options.max_length}",
        "",
        table(header, lines),
    ]
    for each in prepared:
        parts.append(
            f"{each['rows']:,} rows prepared: {each['rate']:,.0f} a CPU second, {each['growth_mib']:.0f} MiB more"
        )
    parts += ["", table([*files[0]], [[*each.values()] for each in files]), ""]
    opened = f"opened in {cached['open_seconds']} s, {cached['bytes_per_row']} bytes a row"
    parts.append(
        f"index of {cached['completions']:,} completions in {cached['files']} files: {opened},"
        f" {cached['lookups_per_second']:,} look-ups a second"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
