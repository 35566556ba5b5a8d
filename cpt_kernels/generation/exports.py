"""What ``cpt generate`` makes of finished responses: outputs for alpaca_eval, a dataset with a column more."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import replacing, write_text
from .prompts import Prompt, as_completion
from .response_file import ResponseFile, prompt_of

if TYPE_CHECKING:
    from datasets import Dataset

ALPACA_FILE = "model_outputs.json"


def check_exports(args: argparse.Namespace, model: str, dataset: Dataset, prompts: Iterable[Prompt]) -> None:
    """What would make the end fail, before anything is asked."""
    if args.output.suffix != ".jsonl":
        raise UserError(f"output={args.output}: responses go to a .jsonl file")
    if args.add_column and (args.dataset_output is None or args.dataset_output.suffix not in (".jsonl", ".parquet")):
        raise UserError("add_column needs dataset_output, a .jsonl or .parquet file")
    if args.dataset_output is not None and not args.add_column:
        raise UserError("dataset_output needs add_column, the name of the column")
    if args.dataset_output is not None and args.dataset_output.resolve() == Path(args.dataset_name).resolve():
        raise UserError(f"dataset_output={args.dataset_output} is the dataset itself: choose another file")
    if args.add_column in dataset.column_names:
        raise UserError(f"add_column={args.add_column}: the dataset has that column already")
    if args.n > 1 and (args.add_column or args.format == "alpaca_eval"):
        option = "add_column" if args.add_column else "alpaca_eval"
        raise UserError(f"n={args.n}: {option} takes one response to a prompt")
    if args.format == "alpaca_eval":
        for prompt in prompts:
            _instruction(prompt)
        _check_generator(args.output.with_name(ALPACA_FILE), model)


def _check_generator(path: Path, model: str) -> None:
    try:
        there = {output["generator"] for output in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} exists and is no file of alpaca_eval outputs: move it away") from error
    if there - {model}:
        raise UserError(f"{path} has the outputs of {', '.join(sorted(there))}: choose a folder for each model")


def write_exports(
    args: argparse.Namespace, file: ResponseFile, dataset: Dataset, prompts: Sequence[Prompt | None]
) -> list[Path]:
    """Write what the options ask for, whole or not at all, and return the files. Rows whose prompt has no response get
    null in the new column, and are left out of the outputs for alpaca_eval."""
    if not args.add_column and args.format == "responses":
        return []
    first = {prompt_of(row).key: row["response"] for row in file.rows() if row.get("sample", 0) == 0}
    texts = [None if prompt is None else first.get(prompt.key) for prompt in prompts]
    written = []
    if args.add_column:
        values = [
            None if text is None else as_completion(row, prompt, text)
            for row, prompt, text in zip(dataset, prompts, texts)
        ]
        with_column = dataset.add_column(args.add_column, values)
        with replacing(args.dataset_output) as (temporary,), temporary.open("wb") as out:
            (with_column.to_parquet if args.dataset_output.suffix == ".parquet" else with_column.to_json)(out)
        written.append(args.dataset_output)
        print(f"{len(values) - values.count(None)} of {len(values)} rows have `{args.add_column}`")
    if args.format == "alpaca_eval":
        written.append(args.output.with_name(ALPACA_FILE))
        outputs = _alpaca_outputs(file.model, dataset, prompts, texts)
        write_text(written[-1], json.dumps(outputs, indent=2, ensure_ascii=False))
    return written


def _alpaca_outputs(
    model: str, dataset: Dataset, prompts: Sequence[Prompt | None], texts: Sequence[str | None]
) -> list[dict[str, str]]:
    """One per instruction that was answered, in the order of the data."""
    outputs = {}
    for row, prompt, text in zip(dataset, prompts, texts):
        if text is not None:
            # `dataset` is alpaca_eval's own column for where an instruction is from.
            source = {"dataset": row["dataset"]} if isinstance(row.get("dataset"), str) else {}
            outputs[prompt.key] = {**source, "instruction": _instruction(prompt), "output": text, "generator": model}
    return list(outputs.values())


def _instruction(prompt: Prompt) -> str:
    turns = [turn for turn in prompt.messages() if turn["role"] != "system"]
    if len(turns) != 1 or not isinstance(turns[0].get("content"), str):
        raise UserError(f"alpaca_eval compares single instructions, but a prompt has {len(turns)} turns")
    return turns[0]["content"]
