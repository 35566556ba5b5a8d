"""Outputs of models, as ``cpt generate`` or AlpacaEval writes them, and which of them answer the same prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.formats import RowError, parse_prompt, without_nulls
from ..data.sources import load_data
from ..errors import UserError
from ..files import write_text

# Columns of a file: prompt, output, name of the model. Without a name, the file's own serves.
_FORMS = (("prompt", "response", "model"), ("instruction", "output", "generator"))
_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Outputs:
    """What one model answered.

    Attributes:
        responses: prompt -> responses to it, in the order of the file.
        conversations: prompts of several turns, which stand here as JSON.
    """

    model: str
    responses: Mapping[str, list[str]]
    conversations: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return sum(map(len, self.responses.values()))


@dataclass(frozen=True)
class Comparisons:
    """n prompts that a model and the baseline both answered; a prompt with several responses counts as several.

    Attributes:
        model, baseline: their names.
        prompts, outputs, baseline_outputs: n texts each.
        without_baseline, without_output: prompts that only the one or the other answered.
    """

    model: str
    baseline: str
    prompts: list[str]
    outputs: list[str]
    baseline_outputs: list[str]
    without_baseline: int
    without_output: int

    def __len__(self) -> int:
        return len(self.prompts)


def read_outputs(path: str | Path) -> dict[str, Outputs]:
    """Model -> its outputs, from a JSONL, JSON, Parquet or CSV file with the columns ``prompt, response, model`` or, as
    AlpacaEval has them, ``instruction, output, generator``.

    A conversation of one turn, besides a system prompt, is the same prompt as that turn's text.

    Raises:
        UserError: no such file, other columns, or a row without a prompt or a response; the message names it.
    """
    data = load_data(path)
    form = next((form for form in _FORMS if set(form[:2]) <= set(data.column_names)), None)
    if form is None:
        expected = " or ".join(", ".join(form) for form in _FORMS)
        raise UserError(f"{path} has the columns {sorted(data.column_names)}; outputs have {expected}")
    responses: dict[str, dict[str, list[str]]] = {}
    conversations = set()
    for number, row in enumerate(data.select_columns([name for name in form if name in data.column_names])):
        prompt, response, model = (row.get(name) for name in form)
        if not prompt or not isinstance(response, str):
            name = form[1] if prompt else form[0]
            raise UserError(f"{path}, row {number} (from 0): {name} is {row.get(name)!r}, expected text")
        model = Path(path).stem if model is None else str(model)
        try:
            text, is_conversation = _text(parse_prompt(row, form[0]).prompt)
        except RowError as error:
            raise UserError(f"{path}, row {number} (from 0): {error.detail}") from error
        if is_conversation:
            conversations.add(text)
        responses.setdefault(model, {}).setdefault(text, []).append(response)
    return {
        model: Outputs(model, of_model, frozenset(conversations.intersection(of_model)))
        for model, of_model in responses.items()
    }


def choose(found: Mapping[str, Outputs], names: Sequence[str], option: str) -> list[Outputs]:
    """Some of a file's models.

    Raises:
        UserError: one is not there.
    """
    if lacking := [name for name in names if name not in found]:
        raise UserError(f"{option}={lacking[0]}: the outputs are of {', '.join(found)}")
    return [found[name] for name in names]


def join(outputs: Outputs, baseline: Outputs) -> Comparisons:
    """Outputs beside the baseline's to the same prompt, in the order of the baseline's file.

    Where both answered a prompt several times, the first is compared with the first, and so on; where one of them
    answered it once, this one is compared with all of the other's.

    Raises:
        UserError: no prompt is in both, or one was answered by them a different number of times.
    """
    prompts, mine, theirs = [], [], []
    for prompt, answers in baseline.responses.items():
        own = outputs.responses.get(prompt, [])
        if own and len(own) != len(answers) and min(len(own), len(answers)) > 1:
            raise UserError(
                f"{outputs.model} has {len(own)} responses to {_short(prompt)}, {baseline.model} has {len(answers)}:"
                " give the same number of each, or one"
            )
        count = max(len(own), len(answers)) if own else 0
        prompts += [prompt] * count
        mine += own * (count // max(len(own), 1))
        theirs += answers * (count // len(answers))
    if not prompts:
        raise UserError(
            f"no prompt of {outputs.model} is among those of {baseline.model}: the first are"
            f" {_short(next(iter(outputs.responses)))} and {_short(next(iter(baseline.responses)))}"
        )
    both = len(set(prompts))
    unmatched = len(outputs.responses) - both, len(baseline.responses) - both
    return Comparisons(outputs.model, baseline.model, prompts, mine, theirs, *unmatched)


def write_alpaca_eval(outputs: Outputs, path: str | Path) -> None:
    """Write ``model_outputs.json`` for ``alpaca_eval``: a list of ``instruction, output, generator``.

    Raises:
        UserError: a prompt has several responses or several turns, which ``alpaca_eval`` does not know.
    """
    if outputs.conversations:
        raise UserError(
            f"alpaca_eval compares single instructions, but {len(outputs.conversations)} prompts of {outputs.model}"
            " have several turns"
        )
    rows = []
    for prompt, responses in outputs.responses.items():
        if len(responses) > 1:
            raise UserError(
                f"{outputs.model} has {len(responses)} responses to {_short(prompt)}; alpaca_eval takes one"
            )
        rows.append({"instruction": prompt, "output": responses[0], "generator": outputs.model})
    text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    write_text(Path(path), text)


def _text(prompt: Any) -> tuple[str, bool]:
    """The prompt as text, and whether it is a conversation that no one turn stands for."""
    if isinstance(prompt, str):
        return prompt, False
    turns = [without_nulls(turn) for turn in prompt]
    said = [turn for turn in turns if turn["role"] != "system"]
    if len(said) == 1 and isinstance(said[0].get("content"), str):
        return said[0]["content"], False
    return json.dumps(turns, ensure_ascii=False), True


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]} ...")
