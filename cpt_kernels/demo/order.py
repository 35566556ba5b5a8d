"""``cpt demo --study order``: which pairs, in which order, against which reference? Measured over paired seeds.

A seed has its own start model, pairs, difficulties and held-out prompts. All arms of a seed start from the same model
and train for the same number of steps of the same size. The pool of pairs is so large that every schedule that draws
without replacement draws a pair at most once. An arm is a curriculum, by public options; nothing else differs.

The learning rate of a setting is the one with which the arm ``random-all`` wins most often, on seeds of their own.
Difficulty is the held-out DPO loss of two runs, each on the prompts of the other, at the main setting's beta.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import LlamaForCausalLM

from ..errors import UserError
from ..evaluation.difficulty import MEASURES, MeasuredPairs, split_folds
from ..evaluation.pairs import evaluate_pairs
from ..files import replacing_folder, stored_json
from ..model.pretrained import load_whole
from ..pairs.build import factorize
from ..training.report import Curve, Point
from .arms import EASY, HARD, demo_config, demo_trainer
from .experiment import ARM_BATCH, DemoRow, Experiment, Size, make_pairs, pair_kind

CURVE = (0.25, 0.5, 0.75, 1.0)  # shares of the steps after which an arm is examined
TUNING_SEEDS = (100, 101)
_DIFFICULTY = {"column": "difficulty"}
_EASIEST = {**_DIFFICULTY, "keep": 0.5}
_STAGES = {**_DIFFICULTY, "stages": 3, "refresh_reference": True}
_KINDS = {"levels": [EASY, HARD]}
# Arm -> its curriculum, an option of cpt-train.
ORDER_ARMS: dict[str, dict[str, Any]] = {
    "random-all": {**_KINDS, "schedule": "none"},
    "random-easiest": {**_EASIEST, "schedule": "none"},
    "sorted-easiest": {**_EASIEST, "schedule": "sorted"},
    "sorted-all": {**_DIFFICULTY, "schedule": "sorted"},
    "reversed-all": {**_DIFFICULTY, "schedule": "sorted", "easy": "high"},
    "alpha-gap": {**_KINDS, "schedule": "linear"},
    "alpha-difficulty": {**_DIFFICULTY, "schedule": "linear"},
    "stages-random": {**_STAGES, "schedule": "none"},
    "stages-sorted": {**_STAGES, "schedule": "sorted"},
    "stages-sqrt": {**_STAGES, "schedule": "sqrt"},
    "easy-only": {"levels": [EASY], "schedule": "none"},
    "hard-only": {"levels": [HARD], "schedule": "none"},
    "sft-hardest": {**_EASIEST, "schedule": "none", "hard_loss": "sft"},
}
BASELINE = "random-all"
FEW = (BASELINE, "random-easiest", "sorted-all", "alpha-gap", "stages-sorted")  # the arms of all settings but the main


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share."""

    beta: float = 0.1
    noise: float = 0.0  # share of the pairs whose sides are swapped
    start: str = "sft"  # or "pretraining", the model before SFT

    def __str__(self) -> str:
        return f"beta-{self.beta:g}_noise-{self.noise:g}_start-{self.start}"


MAIN = Setting()
# Block -> its settings; one option differs from the main setting's.
BLOCKS = {
    "arms": (MAIN,),
    "beta": (Setting(beta=0.01), Setting(beta=0.5)),
    "noise": (Setting(noise=0.1), Setting(noise=0.2)),
    "start": (Setting(start="pretraining"),),
}


@dataclass(frozen=True)
class OrderSize:
    """Sizes of the study."""

    start: Size
    steps: int  # of an arm
    rates: tuple[float, ...]  # learning rates to choose from
    difficulty_steps: int
    samples: int  # responses per held-out prompt at the end; 1 before
    # Seconds of one core of an AMD EPYC, for the prediction of the cost: a start, a cross-fit, a cell.
    seconds: tuple[float, float, float]


# The pool has 1.45 prompts for each pair that an arm draws.
FULL_ORDER = OrderSize(
    start=Size(1000, 100, 70, 400, hidden=64, layers=2, longest=4, two_steps=0.0),
    steps=48,
    rates=(2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    difficulty_steps=48,
    samples=4,
    seconds=(50, 6, 4),
)
QUICK_ORDER = OrderSize(
    start=Size(8, 2, 6, 8, hidden=32, layers=1, longest=4, two_steps=0.0),
    steps=4,
    rates=(1e-3,),
    difficulty_steps=2,
    samples=1,
    seconds=(2, 1, 1),
)


class Cell(NamedTuple):
    """One training run."""

    setting: Setting
    rate: float
    arm: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.setting}_rate-{self.rate:g}_{self.arm}_seed-{self.seed}.json"


class OrderStudy:
    """The study, in a folder that holds all results so far.

    Args:
        seeds: of the arms. Processes with different seeds can share a folder.
        say: called with a line after each step of the study.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], size: OrderSize, say: Callable[[str], object]) -> None:
        self.folder, self.seeds, self.size, self.say = folder, list(dict.fromkeys(seeds)), size, say
        self._experiment = cache(self._open)

    # --- The plan ---

    def arms(self, setting: Setting) -> Sequence[str]:
        """Returns the arms that are run at a setting."""
        return tuple(ORDER_ARMS) if setting == MAIN else FEW

    def cost(self) -> str:
        """Returns a line on the work of the study and on its cost by the times of ``size.seconds``."""
        settings = [setting for block in BLOCKS.values() for setting in block]
        starts, tuned = len(self.seeds) + len(TUNING_SEEDS), len(settings) * len(TUNING_SEEDS) * len(self.size.rates)
        cells = tuned + len(self.seeds) * sum(len(self.arms(setting)) for setting in settings)
        fits = len(self.seeds) * len({(setting.noise, setting.start) for setting in settings})
        counts, each = (starts, fits, cells), self.size.seconds
        done = len(list((self.folder / "cells").glob("*.json")))
        minutes = sum(count * seconds for count, seconds in zip(counts, each)) / 60
        parts = [f"{n} {name} of about {s:g} s" for n, name, s in zip(counts, ("starts", "cross-fits", "cells"), each)]
        return f"{', '.join(parts)}: {minutes:.0f} minutes of one core; {done} cells are done"

    def run(self) -> Iterator[str]:
        """Runs the cells that have no result, and yields the name of each block when it is complete."""
        for block, settings in BLOCKS.items():
            rates = {setting: self.rate(setting) for setting in settings}
            for seed in self.seeds:  # the outer loop: a start is opened once
                for setting in settings:
                    self.examine_start(setting.start, seed)
                    for arm in self.arms(setting):
                        self.result(Cell(setting, rates[setting], arm, seed))
            yield block

    def rate(self, setting: Setting) -> float:
        """Returns the learning rate with which random-all wins most often on the seeds of the tuning."""
        won = {
            rate: np.mean([self.result(Cell(setting, rate, BASELINE, s))["curve"][-1]["win"] for s in TUNING_SEEDS])
            for rate in self.size.rates
        }
        return max(won, key=lambda rate: won[rate])

    def result(self, cell: Cell) -> dict[str, Any]:
        """Returns the result of a cell, which is run if it has none."""
        path = self.folder / "cells" / cell.file
        is_new = not path.exists()
        found = stored_json(path, lambda: self.run_cell(cell))
        if is_new:
            self.say(f"{path.stem}: {found['seconds']} s, win rate {100 * found['curve'][-1]['win']:.1f}")
        return found

    def examine_start(self, start: str, seed: int) -> Point:
        """Returns what is found of a start model itself, as of an arm at its end."""

        def examine() -> Point:
            experiment = self._experiment(seed)
            model = load_whole(LlamaForCausalLM, str(experiment.folder / start))
            found = self._examine(experiment, model, self.size.samples)
            return {"start": start, "seed": seed} | found | {"greedy": self._examine(experiment, model, 0)}

        return stored_json(self.folder / "examined" / f"{start}_seed-{seed}.json", examine)

    # --- Starts ---

    def _start(self, seed: int) -> Path:
        """Returns the folder of a seed: its start models, its pairs, and the reference log-probs of both models.

        All arms find the same log-probs, so that the result of a cell does not depend on the cells before it.
        """
        folder = self.folder / "starts" / f"seed-{seed}"
        if not folder.exists():
            started = time.process_time()
            with replacing_folder(folder) as temporary:
                experiment = Experiment(seed, self.size.start, temporary, lambda *_: None)
                experiment.train_start()
                pairs = make_pairs(experiment.ask_teachers())
                random.Random(seed).shuffle(pairs)
                draws = self.size.steps * ARM_BATCH
                if min(len(pairs) // 2, *(sum(pair_kind(p) == kind for p in pairs) for kind in (EASY, HARD))) < draws:
                    raise UserError(f"seed {seed} has too few pairs for {draws} draws: raise arm_steps of the size")
                experiment.write("pairs.jsonl", pairs)
                for model in ("pretraining", "sft"):
                    self._logps(experiment, temporary / model, pairs, temporary / "reference")
            self.say(f"start of seed {seed}: {time.process_time() - started:.0f} s")
        return folder

    def _open(self, seed: int) -> Experiment:
        experiment = Experiment(seed, self.size.start, self._start(seed), lambda *_: None)
        experiment.exercises.clear()  # tens of thousands; the prompts and the baseline's responses are known
        return experiment

    def _logps(self, experiment: Experiment, model: Any, pairs: Sequence[DemoRow], folder: Path) -> Any:
        """Scores pairs by a model or the folder of one; the log-probs go into a reference cache."""
        args = demo_config(folder, ref_cache_dir=str(folder), beta=MAIN.beta)
        data = Dataset.from_list(list(pairs))
        return evaluate_pairs(
            {"model": str(model) if isinstance(model, Path) else model}, data, experiment.tokenizer, args=args
        )

    # --- Cells ---

    def _pairs(self, setting: Setting, seed: int) -> list[DemoRow]:
        """Returns the pairs of a seed, a share of them with swapped sides; more noise swaps the same pairs and more."""
        text = (self._experiment(seed).folder / "pairs.jsonl").read_text(encoding="utf-8")
        pairs = [json.loads(line) for line in text.splitlines()]
        swapped = np.random.default_rng((seed, 1)).random(len(pairs)) < setting.noise
        return [
            pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} if wrong else pair
            for pair, wrong in zip(pairs, swapped)
        ]

    def _difficulty(self, setting: Setting, seed: int) -> list[float]:
        """Returns the difficulty of the pairs of a seed: the held-out loss of two runs, each on the other's prompts."""
        setting = Setting(MAIN.beta, setting.noise, setting.start)
        pairs, rate = self._pairs(setting, seed), self.rate(setting)

        def fit() -> list[float]:
            started, found = time.process_time(), np.empty(len(pairs))
            folds = split_folds(factorize([pair["prompt"] for pair in pairs]).astype(np.uint64), 2, seed)
            for fold in (0, 1):
                train, held_out = (
                    [pair for pair, f in zip(pairs, folds) if (f == fold) == same] for same in (False, True)
                )
                with self._run(setting, rate, seed) as (experiment, model, options):
                    cache = Path(options["ref_cache_dir"])
                    before = self._logps(experiment, model, held_out, cache)
                    args = demo_config(cache.parent, max_steps=self.size.difficulty_steps, **options)
                    demo_trainer(model, experiment.tokenizer, train, args, []).train()
                    after = self._logps(experiment, model, held_out, cache.parent / "held-out")
                    assert np.array_equal(after.rows, np.arange(len(held_out)))
                    measured = MeasuredPairs(after.logps["model"], before.logps["model"], after.lengths, args)
                    found[folds == fold] = MEASURES["loss"](measured)
            self.say(f"difficulty, {setting}, seed {seed}: {time.process_time() - started:.1f} s")
            return found.tolist()

        return stored_json(self.folder / "difficulty" / f"{setting}_seed-{seed}.json", fit)

    @contextmanager
    def _run(self, setting: Setting, rate: float, seed: int) -> Iterator[tuple[Experiment, Any, dict[str, Any]]]:
        """Yields the experiment, the start model and the options of one training run, in a folder of its own."""
        experiment = self._experiment(seed)
        model = load_whole(LlamaForCausalLM, str(experiment.folder / setting.start))
        with tempfile.TemporaryDirectory(prefix="cpt-order-") as folder:
            cache = Path(folder) / "reference"
            shutil.copytree(experiment.folder / "reference", cache)
            options = {"learning_rate": rate, "lr_scheduler_type": "constant", "per_device_train_batch_size": ARM_BATCH}
            options |= {"beta": setting.beta, "seed": seed, "ref_cache_dir": str(cache), "logging_strategy": "no"}
            yield experiment, model, options

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Trains an arm and returns its result: rates and shares along the curve, and greedy ones at its end.

        The result depends on the cell and the size alone, to the last digit, apart from ``seconds``.
        """
        setting, rate, arm, seed = cell
        curriculum, pairs, steps = ORDER_ARMS[arm], self._pairs(setting, seed), self.size.steps
        if "column" in curriculum:
            pairs = [pair | {"difficulty": d} for pair, d in zip(pairs, self._difficulty(setting, seed))]
        started = time.process_time()
        with self._run(setting, rate, seed) as (experiment, model, options):
            curve = Curve(
                {round(share * steps) for share in CURVE},
                lambda trained, step: self._examine(experiment, trained, self.size.samples if step == steps else 1),
            )
            folder = Path(options["ref_cache_dir"]).parent
            args = demo_config(folder, max_steps=steps, curriculum=dict(curriculum), **options)
            demo_trainer(model, experiment.tokenizer, pairs, args, [curve]).train()
            greedy = self._examine(experiment, model, 0)
        about = {"arm": arm, "seed": seed, "beta": setting.beta, "noise": setting.noise, "start": setting.start}
        seconds = round(time.process_time() - started, 1)
        return about | {"learning_rate": rate, "curve": curve.points, "greedy": greedy, "seconds": seconds}

    def _examine(self, experiment: Experiment, model: Any, samples: int) -> Point:
        """Returns the win rate against the medium teacher, the share of right answers, and mean characters.

        Args:
            samples: responses to each held-out prompt at temperature 1; 0 for one greedy response.
        """
        n = max(samples, 1)
        texts = experiment.generate(model, experiment.prompts, float(samples > 0), n=n)
        judged = [experiment.judge_texts(texts[number::n]) for number in range(n)]
        return {
            "win": float(np.mean([each.wins.mean() for each in judged])),
            "right": float(np.mean([each.share("exact") for each in judged])),
            "characters": float(np.mean([len(text) for text in texts])),
        }
