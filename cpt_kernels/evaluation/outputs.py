"""Reads outputs of models, as ``cpt generate`` or AlpacaEval writes them, and pairs them with a baseline's outputs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..data.formats import RowError, Text, parse_prompt, without_nulls
from ..data.response_columns import ALPACA_COLUMNS, RESPONSE_COLUMNS
from ..errors import UserError
from ..generation.exports import AlpacaOutput
from ..generation.prompts import single_instruction

_FORMS = (RESPONSE_COLUMNS, ALPACA_COLUMNS)  # each: prompt, model, response; the column of models is optional
_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class ModelOutputs:
    """The outputs of one model."""

    model: str
    responses: Mapping[str, list[str]]  # prompt -> responses to it, in the order of the file
    conversations: frozenset[str] = frozenset()  # the prompts of several turns; their text is JSON

    def __len__(self) -> int:
        return sum(map(len, self.responses.values()))


@dataclass(frozen=True)
class Comparisons:
    """n pairs of outputs to the same prompt, one of a model and one of the baseline."""

    model: str  # name
    baseline: str  # name
    prompts: list[str]  # n texts each. A prompt with several responses occurs several times.
    outputs: list[str]  # likewise
    baseline_outputs: list[str]  # likewise
    without_baseline: int  # number of prompts that only the model answered
    without_output: int  # number of prompts that only the baseline answered

    def __len__(self) -> int:
        return len(self.prompts)


def read_outputs(path: str | Path) -> dict[str, ModelOutputs]:
    """Reads the outputs of each model from a JSONL, JSON, Parquet or CSV file.

    The columns are ``prompt, model, response``, or AlpacaEval's ``instruction, generator, output``. A conversation of
    one turn (apart from a system prompt) is the same prompt as the text of that turn.

    Returns:
        The outputs by the name of the model.

    Raises:
        UserError: the file does not exist or has other columns, or a row lacks a prompt or a response; the message
            names the row.
    """
    from ..data.rows import drop_nulls, find_null_places
    from ..data.sources import load_data

    data = load_data(path)
    form = next((form for form in _FORMS if {form[0], form[2]} <= set(data.column_names)), None)
    if form is None:
        expected = " or ".join(", ".join(form) for form in _FORMS)
        raise UserError(f"{path} has the columns {sorted(data.column_names)}; outputs have {expected}")
    responses: dict[str, dict[str, list[str]]] = {}  # model -> prompt -> responses
    conversations = set()
    nulls = find_null_places(data.features, form)
    for number, given in enumerate(data.select_columns([name for name in form if name in data.column_names])):
        row = drop_nulls(given, nulls)
        prompt, model, response = (row.get(name) for name in form)
        if not prompt or not isinstance(response, str):
            name = form[2] if prompt else form[0]
            raise UserError(f"{path}, row {number} (from 0): {name} is {row.get(name)!r}, expected text")
        model = Path(path).stem if model is None else str(model)
        try:
            content = parse_prompt(row, form[0]).prompt
        except RowError as error:
            raise UserError(f"{path}, row {number} (from 0): {error.detail}") from error
        text = single_instruction(content)
        if text is None:
            text = _conversation_text(content)
            conversations.add(text)
        responses.setdefault(model, {}).setdefault(text, []).append(response)
    return {
        model: ModelOutputs(model, of_model, frozenset(conversations.intersection(of_model)))
        for model, of_model in responses.items()
    }


def select_models(found: Mapping[str, ModelOutputs], names: Sequence[str], option: str) -> list[ModelOutputs]:
    """Returns the outputs of the models that ``option`` names.

    Raises:
        UserError: the file has no outputs of a model.
    """
    if lacking := [name for name in names if name not in found]:
        raise UserError(f"{option}={lacking[0]}: the file has outputs of {', '.join(found)}")
    return [found[name] for name in names]


def join(outputs: ModelOutputs, baseline: ModelOutputs) -> Comparisons:
    """Pairs each output with the baseline's output to the same prompt, in the order of the baseline's file.

    If both answered a prompt n times, the i-th output is compared with the i-th output of the baseline. If one of them
    answered it once, that output is compared with every output of the other.

    Raises:
        UserError: the two have no prompt in common, or they answered a prompt a different number of times, both more
            than once.
    """
    prompts, mine, theirs = [], [], []
    for prompt, answers in baseline.responses.items():
        own = outputs.responses.get(prompt, [])
        if own and len(own) != len(answers) and min(len(own), len(answers)) > 1:
            raise UserError(
                f"{outputs.model} has {len(own)} responses to {_short(prompt)}, {baseline.model} has {len(answers)}:"
                " give the same number of responses for both, or one response for one of them"
            )
        # Repeat a single response to match the other list; skip prompts without a response.
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


def as_alpaca_outputs(outputs: ModelOutputs) -> list[AlpacaOutput]:
    """Returns the rows that :func:`write_alpaca_eval` writes.

    Raises:
        UserError: a prompt has several responses or several turns; ``alpaca_eval`` supports neither.
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
        rows.append(AlpacaOutput(prompt, responses[0]))
    return rows


def _conversation_text(content: Text) -> str:
    return json.dumps([without_nulls(turn) for turn in content], ensure_ascii=False)


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]} ...")


def distinct_bigrams(*of_models: Sequence[str]) -> list[float | None]:
    """Returns the share of different pairs of consecutive words in each model's texts, a measure of diversity.

    The share falls with the number of pairs, so equally many are drawn from each model's texts, with a fixed seed.
    None if a model has no pair.
    """
    split = [[re.findall(r"\w+", text.lower()) for text in texts] for texts in of_models]
    found = [[pair for words in texts for pair in pairwise(words)] for texts in split]
    count = min(map(len, found))
    drawn = [random.Random(0).sample(pairs, count) for pairs in found]
    return [len({*pairs}) / count if count else None for pairs in drawn]
