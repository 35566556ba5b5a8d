"""Writes finished responses in other forms: outputs for alpaca_eval, and the dataset with a column of responses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError
from ..files import replacing, write_text
from .prompts import Prompt, as_completion, single_instruction
from .response_file import ResponseFile, prompt_of

if TYPE_CHECKING:
    from datasets import Dataset

ALPACA_FILE = "model_outputs.json"


@dataclass(frozen=True)
class Exports:
    """What is written besides the file of responses."""

    column: str | None = None  # name of a new column of the dataset that gets the responses, or None
    dataset_output: Path | None = None  # .jsonl or .parquet file for the dataset with that column
    alpaca_eval: bool = False  # also write ``model_outputs.json`` beside the file of responses

    def check_paths(self, output: Path, dataset_name: str, n: int) -> None:
        """Raises UserError if an option contradicts another one or names a file that cannot be used."""
        if output.suffix != ".jsonl":
            raise UserError(f"output={output}: responses go to a .jsonl file")
        if self.column and (self.dataset_output is None or self.dataset_output.suffix not in (".jsonl", ".parquet")):
            raise UserError("add_column needs dataset_output, a .jsonl or .parquet file")
        if self.dataset_output is not None and not self.column:
            raise UserError("dataset_output needs add_column, the name of the new column")
        if self.dataset_output is not None and self.dataset_output.resolve() == Path(dataset_name).resolve():
            raise UserError(f"dataset_output={self.dataset_output} is the dataset itself: choose another file")
        if n > 1 and (self.column or self.alpaca_eval):
            option = "add_column" if self.column else "alpaca_eval"
            raise UserError(f"n={n}: {option} takes one response per prompt")

    def check_data(self, output: Path, model: str, columns: Sequence[str], prompts: Iterable[Prompt]) -> None:
        """Raises UserError if the data, or the outputs already in the folder, do not fit; called before generation."""
        if self.column in columns:
            raise UserError(f"add_column={self.column}: the dataset already has a column of this name")
        if self.alpaca_eval:
            for prompt in prompts:
                _instruction(prompt)
            _check_generator(output.with_name(ALPACA_FILE), model)


class WrittenExports(NamedTuple):
    """Result of :func:`write_exports`."""

    files: list[Path]
    filled: int | None  # rows with a response in the new column, or None without such a column


def write_exports(
    exports: Exports, file: ResponseFile, dataset: Dataset, prompts: Sequence[Prompt | None]
) -> WrittenExports:
    """Writes the exports, each file whole or not at all.

    A row whose prompt has no response gets null in the new column and is left out of the outputs for alpaca_eval.

    Args:
        prompts: the prompt of every row of ``dataset``; None if it has none.
    """
    if not exports.column and not exports.alpaca_eval:
        return WrittenExports([], None)
    # The first response to each prompt, by row of the dataset.
    first = {prompt_of(row).key: row["response"] for row in file.rows() if row.get("sample", 0) == 0}
    texts = [None if prompt is None else first.get(prompt.key) for prompt in prompts]
    files, filled = [], None
    # The dataset with the column of responses.
    if exports.column:
        from ..data.image_files import as_files
        from ..data.rows import write_rows

        values = [
            None if text is None else as_completion(row, prompt, text)
            for row, prompt, text in zip(as_files(dataset), prompts, texts)
        ]
        filled = len(values) - values.count(None)
        with replacing(exports.dataset_output) as (temporary,):
            write_rows(dataset.add_column(exports.column, values), temporary, exports.dataset_output.suffix)
        files.append(exports.dataset_output)
    # The outputs for alpaca_eval.
    if exports.alpaca_eval:
        files.append(file.path.with_name(ALPACA_FILE))
        write_alpaca_eval(files[-1], file.model, _alpaca_outputs(dataset, prompts, texts))
    return WrittenExports(files, filled)


# --- alpaca_eval ---


class AlpacaOutput(NamedTuple):
    """One answered instruction."""

    instruction: str
    output: str
    dataset: str | None = None  # alpaca_eval's column for the source of an instruction


def write_alpaca_eval(path: Path, generator: str, outputs: Iterable[AlpacaOutput]) -> None:
    """Writes the JSON file that ``alpaca_eval --model_outputs`` reads: a list of ``instruction, output, generator``."""
    rows = []
    for instruction, output, dataset in outputs:
        source = {} if dataset is None else {"dataset": dataset}
        rows.append({**source, "instruction": instruction, "output": output, "generator": generator})
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


def _alpaca_outputs(
    dataset: Dataset, prompts: Sequence[Prompt | None], texts: Sequence[str | None]
) -> list[AlpacaOutput]:
    """Returns one output for each answered instruction, in the order of the data."""
    outputs = {}
    for row, prompt, text in zip(dataset, prompts, texts):
        if text is not None:
            source = row["dataset"] if isinstance(row.get("dataset"), str) else None
            outputs[prompt.key] = AlpacaOutput(_instruction(prompt), text, source)
    return list(outputs.values())


def _instruction(prompt: Prompt) -> str:
    if prompt.images:
        raise UserError("alpaca_eval compares responses to text, but a prompt has images: leave the format out")
    instruction = single_instruction(prompt.content)
    if instruction is None:
        raise UserError(f"alpaca_eval compares single instructions, but a prompt has {len(prompt.content)} turns")
    return instruction


def _check_generator(path: Path, model: str) -> None:
    """Raises UserError if the file has outputs of another model, which would be overwritten."""
    try:
        generators = {output["generator"] for output in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} exists, but is not a file of alpaca_eval outputs: move it away") from error
    if generators - {model}:
        raise UserError(f"{path} has the outputs of {', '.join(sorted(generators))}: use one folder for each model")
