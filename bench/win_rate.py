"""How far are length-controlled win rates from those that AlpacaEval publishes?

    git clone https://github.com/tatsu-lab/alpaca_eval
    python -m bench win_rate alpaca_eval

Reads the annotations of every model in results/ and the leaderboard of AlpacaEval 2. Models without annotations on disk
(some are kept elsewhere because of their size), without a published rate, and the baseline itself are left out. The
report has, in percentage points,

    plain      most that a plain win rate differs from the published one
    mean       mean difference of the length-controlled rates, without sign
    worst      largest difference, and its model
    covered    share of models whose published rate lies in our 95 % interval

for the default prior of the length effect and without a prior.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpt_kernels.evaluation.win_rate import Bootstrap, LengthPrior, length_controlled_win_rate, win_rate

from .timing import add_output_options, finish, table

_ANNOTATIONS = "weighted_alpaca_eval_gpt4_turbo/annotations.json"
_LEADERBOARD = "src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
_BASELINE = "gpt4_1106_preview"
_PRIORS = {"prior": LengthPrior(), "no prior": LengthPrior(0, 100)}


class Model(NamedTuple):
    name: str
    preferences: NDArray[np.float64]  # (n,) for the model, in [0, 1]
    lengths: NDArray[np.int64]  # (n,) characters
    baseline_lengths: NDArray[np.int64]  # (n,)
    published: dict[str, float]  # the model's row of the leaderboard, in %


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench win_rate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a copy of the repository")
    parser.add_argument("--resamples", type=int, default=500, help="of the intervals")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    models = list(read(options.folder))
    if not models:
        parser.error(f"{options.folder} has no annotations of a model with published rates")
    plain = max(abs(100 * win_rate(each.preferences).rate - each.published["win_rate"]) for each in models)
    results = {name: compare(models, prior, options.resamples) for name, prior in _PRIORS.items()}
    print(f"{len(models)} models; plain win rates differ by at most {plain:.1e} points")
    rows = [
        [name, *(f"{each[key]:.2f}" for key in ("mean", "worst")), each["worst_model"], f"{each['covered']:.2f}"]
        for name, each in results.items()
    ]
    print(table(["", "mean", "worst", "of", "covered"], rows))
    summary = {key: results["prior"][key] for key in ("mean", "worst", "worst_model", "covered")}
    finish("win_rate", {"results": results}, {"models": len(models), "plain": plain, **summary}, options)


def read(folder: Path) -> Iterator[Model]:
    """Reads the models whose annotations and published length-controlled rate are in the folder."""
    with (folder / _LEADERBOARD).open(newline="") as file:
        published = {row.pop(""): row for row in csv.DictReader(file)}
    for path in sorted((folder / "results").glob(f"*/{_ANNOTATIONS}")):
        name = path.parent.parent.name
        row = published.get(name, {})
        if name == _BASELINE or not row.get("length_controlled_winrate"):
            continue
        annotations = [each for each in json.loads(path.read_text()) if each["preference"] is not None]
        # Preferences lie in [1, 2], where 2 is the model's output; 0 is an old form of a tie.
        preferences = np.array([float(each["preference"]) or 1.5 for each in annotations]) - 1
        baseline, model = (np.array([len(each[f"output_{i}"]) for each in annotations]) for i in (1, 2))
        rates = {key: float(row[key]) for key in ("win_rate", "length_controlled_winrate")}
        yield Model(name, preferences, model, baseline, rates)


def compare(models: Sequence[Model], prior: LengthPrior, resamples: int) -> dict[str, Any]:
    """Compares our length-controlled rates with the published ones."""
    bootstrap, found = Bootstrap(resamples), []
    for each in models:
        ours = length_controlled_win_rate(*each[1:4], bootstrap=bootstrap, prior=prior)
        assert ours is not None, each.name
        found.append([ours.rate, ours.low, ours.high])
    rates, low, high = 100 * np.array(found).T
    published = np.array([each.published["length_controlled_winrate"] for each in models])
    errors = abs(rates - published)
    return {
        "mean": float(errors.mean()),
        "worst": float(errors.max()),
        "worst_model": models[int(errors.argmax())].name,
        "covered": float(((low <= published) & (published <= high)).mean()),
        "rates": {each.name: round(float(rate), 2) for each, rate in zip(models, rates)},
    }


if __name__ == "__main__":
    main()
