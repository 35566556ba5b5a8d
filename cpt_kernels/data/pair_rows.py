"""Splits rows that hold several preferences of one conversation or tree into rows of one pair.

    turns     [{prompt, chosen, rejected}, ...]  a conversation with a preference at each turn; it goes on with chosen
    paths     [[node, ...], ...]                 paths of a tree from its root, with `pairs` or `scores`

A row may also have a `prompt`, with which the conversation begins. In `turns`, prompts and answers are text or
messages; a turn without `rejected` is no pair, and a list of texts there makes a pair of each. The nodes of all paths
of a row are messages, or texts that are the steps of an answer. `pairs` holds [better, worse] positions of paths;
`scores` one number per path, and every two paths with different scores are a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from ..errors import UserError
from .formats import is_edge, ranked_pairs
from .forms import match_roles
from .messages import RowError, Text, read_text_or_messages
from .rows import ExactJson, drop_nulls, find_null_places, read_columns
from .weights import read_number

_READ = {"turns": ("turns", "prompt"), "paths": ("paths", "prompt", "pairs", "scores")}
_STEPS = ("initial_steps", "chosen_step", "rejected_step", "chosen_rest", "rejected_rest")
_WRITTEN = {"turns": ("prompt", "chosen", "rejected"), "paths": ("prompt", "chosen", "rejected", *_STEPS)}
_BATCH = 200  # rows that are split together


def one_pair_rows(dataset: Dataset | IterableDataset, weight_column: str | None = None) -> Dataset | IterableDataset:
    """Returns the dataset with a row for each pair, in order, and all other columns; other datasets as they are.

    A list in ``weight_column`` holds the weight of each pair of its row.

    Raises:
        UserError: a row cannot be split; the message names it.
    """
    columns = read_columns(dataset)
    form = next((name for name in _READ if name in columns), None)
    if form is None or match_roles(columns) is not None:
        return dataset
    read, nulls = _READ[form], find_null_places(dataset.features, _READ[form])
    written = _WRITTEN[form]
    kept = [name for name in columns if name not in (*read, *written)]
    if form == "paths":  # all rows have nodes of the first row's kind
        nodes = (node for row in dataset for path in dict(row).get("paths") or () for node in path or ())
        is_text = isinstance(next(nodes, None), str)
        written = ("prompt", *_STEPS) if is_text else written[:3]

    def split(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        output: dict[str, list] = {name: [] for name in (*kept, *written)}
        for i, index in enumerate(indices):
            row = {name: drop_nulls(batch[name][i], nulls.get(name)) for name in read if name in batch}
            try:
                found = [*(_split_turns(row) if form == "turns" else _split_paths(row))]
            except (RowError, KeyError, TypeError, AttributeError) as error:
                why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"row {index}: `{form}` cannot be read: {why}") from error
            if found and {*found[0]} != {*written}:
                raise UserError(f"row {index}: the nodes of `paths` are of another kind than in the first row")
            for name in written:
                output[name] += [pair[name] for pair in found]
            for name in kept:
                value, is_each = batch[name][i], name == weight_column and isinstance(batch[name][i], list)
                if is_each and len(value) != len(found):
                    raise UserError(f"row {index}: `{name}` holds {len(value)} weights for {len(found)} pairs")
                output[name] += value if is_each else [value] * len(found)
        # Later rows of a stream may have columns that its first one lacks.
        output |= {name: [None] * len(output[written[0]]) for name in batch if name not in columns}
        return output | {name: list(map(ExactJson().encode_example, output[name])) for name in exact}

    features, exact = None, []
    if isinstance(dataset, Dataset):
        features = Features({**{name: dataset.features[name] for name in kept}, **dict.fromkeys(written, ExactJson())})
        if weight_column in kept and not isinstance(features[weight_column], Value):
            features[weight_column] = ExactJson()
        exact = [name for name in features if isinstance(features[name], ExactJson)]
    options: dict[str, Any] = {"desc": "Splitting rows into pairs"} if isinstance(dataset, Dataset) else {}
    options |= {"batched": True, "with_indices": True, "batch_size": _BATCH, "features": features}
    found = dataset.map(split, remove_columns=columns, **options)
    if isinstance(found, Dataset) and not len(found):
        raise UserError(f"no row of `{form}` has a pair: give turns with `rejected`, or paths with `pairs` or `scores`")
    return found


def _split_turns(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not isinstance(row["turns"], list) or not all(isinstance(turn, dict) for turn in row["turns"]):
        raise TypeError("expected a list of objects")
    so_far = _messages("prompt", row.get("prompt"), "user")
    for number, turn in enumerate(row["turns"]):
        name = f"turns[{number}]"
        if unread := [key for key, value in turn.items() if key not in _WRITTEN["turns"] and value is not None]:
            raise TypeError(
                f"`{name}` has the key `{unread[0]}`, and only prompt, chosen and rejected are read: remove it"
            )
        so_far = [*so_far, *_messages(f"{name}.prompt", turn.get("prompt"), "user")]
        chosen = _messages(f"{name}.chosen", turn["chosen"], "assistant")
        rejected = turn.get("rejected")
        several = isinstance(rejected, list) and all(isinstance(text, str) for text in rejected)
        for side in rejected if several else [] if rejected is None else [rejected]:
            yield {"prompt": so_far, "chosen": chosen, "rejected": _messages(f"{name}.rejected", side, "assistant")}
        so_far = [*so_far, *chosen]


def _split_paths(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    paths, pairs = row["paths"], row.get("pairs")
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise TypeError("expected a list of lists")
    if pairs is None and row.get("scores") is None:
        raise TypeError("`pairs` and `scores` are null")
    if pairs is None:
        numbers = map(read_number, row["scores"])
        scores = [number for number in numbers if number is not None and math.isfinite(number)]
        if not len(scores) == len(row["scores"]) == len(paths):
            raise TypeError(f"`scores` is {row['scores']}; expected a finite number for each of the {len(paths)} paths")
        order = sorted(range(len(paths)), key=lambda i: -scores[i])
        pairs = [(order[i], order[j]) for i, j in ranked_pairs([scores[i] for i in order], "all")]
    elif not isinstance(pairs, list) or not all(is_edge(pair, range(len(paths))) for pair in pairs):
        raise TypeError(f"`pairs` is {pairs}; expected [better, worse] positions in the {len(paths)} paths")
    for better, worse in pairs:
        one, other = paths[better], paths[worse]
        cut = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        if one and isinstance(one[0], str):
            yield {
                "prompt": row["prompt"],
                "initial_steps": "".join(one[:cut]),
                **{"chosen_step": "".join(one[cut : cut + 1]), "chosen_rest": "".join(one[cut + 1 :])},
                **{"rejected_step": "".join(other[cut : cut + 1]), "rejected_rest": "".join(other[cut + 1 :])},
            }
        else:
            prompt = [*_messages("prompt", row.get("prompt"), "user"), *one[:cut]]
            yield {"prompt": prompt, "chosen": one[cut:], "rejected": other[cut:]}


def _messages(field: str, value: Any, role: str) -> list:
    """Returns text as one message of a role, messages as they are, and null as none."""
    found: Text | None = read_text_or_messages(field, value)
    return [] if found is None else [{"role": role, "content": found}] if isinstance(found, str) else found
