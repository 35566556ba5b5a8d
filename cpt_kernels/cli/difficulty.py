"""``cpt difficulty``: scores how difficult each pair is for a model, for the curriculum of ``cpt-train``.

  cpt difficulty MODEL DATA --output scored.jsonl [--folds 2] [--seeds 2] [any option of cpt-train]
  cpt difficulty MODEL DATA --output scored.jsonl --scorer reference-margin

By default scores are cross-fitted: the prompts are split into folds, a short run of cpt-train trains on all folds but
one, and scores the pairs of that one. Each seed splits anew, so each pair has one score per seed, from a run that has
not seen its prompt. The rows are written with the columns difficulty, the mean, and difficulty_std; a larger value is
harder. The scores of a run that is done are kept in --output_dir, so a killed command continues after it.

Cheaper scorers need no training: reference-margin, the log-prob of rejected minus that of chosen; log-ratio, the same
per token; gap, minus the column gap.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import replacing
from .console import print_results
from .option_table import option_table
from .parsing import Parser, number_type, parse
from .plan import with_names

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from .options import Options

_SCORERS = ("cross-fit", "reference-margin", "log-ratio", "gap")
_MEASURES = ("loss", "margin", "reference-free")
_COLUMNS = ("difficulty", "difficulty_std")
# Options of cpt-train that have no meaning here, and options that change no score.
_MEANINGLESS = (
    *("curriculum", "sync_ref_model", "dataset_streaming", "datasets", "eval_dataset_name", "test_split_size"),
    *("resume_from_checkpoint", "from_scratch", "push_to_hub", "eval_strategy", "load_best_model_at_end", "check"),
)
_COSMETIC = (
    *("seed", "output_dir", "ref_cache_dir", "disable_tqdm", "logging_steps", "logging_strategy", "report_to"),
    *("save_strategy", "save_steps", "dataloader_num_workers", "dataset_num_proc"),
)
_CALIBRATION = 3.0  # seconds that the prediction of the time may take


def main(argv: Sequence[str], prog: str = "cpt difficulty") -> None:
    """Parses the options, scores the pairs and writes the rows."""
    own, rest = _difficulty_parser(prog).parse_known_args(with_names(argv))
    _check_own(own)
    own.rest, own.prog = rest, prog
    own.output_dir = own.output_dir or own.output.with_name(f"{own.output.stem}.difficulty")
    options = _options(own)
    if given := [name for name in _MEANINGLESS if options.values.get(name) != option_table().defaults.get(name)]:
        raise UserError(f"{given[0]} has no meaning for cpt difficulty: leave it out")

    data, notes = _load_rows(options), []
    if own.scorer == "gap":
        columns = {_COLUMNS[0]: _gaps(data)}
    else:
        pairs = CrossFit(own, data, options)
        scored, notes = pairs.cross_fit() if own.scorer == "cross-fit" else ([pairs.untrained()], [])
        columns = {name: np.full(len(data), np.nan) for name in _COLUMNS[: len(scored)]}
        for column, values in zip(columns.values(), scored):
            column[pairs.rows] = values
    _write(own.output, data, columns)
    counted = int((~np.isnan(columns[_COLUMNS[0]])).sum())
    print_results([], [f"{counted} of {len(data)} rows scored; {', '.join(columns)} written to {own.output}", *notes])


def _options(own: argparse.Namespace, *more: str) -> Options:
    """Returns the options of a run, which evaluates and saves nothing."""
    options = parse([*own.rest, "--output_dir", str(own.output_dir), *more], own.prog)
    options.training.save_strategy, options.training.report_to = "no", []
    return options


def _load_rows(options: Options) -> Dataset:
    """Returns the rows to score, a row for each pair of `turns` and `paths`."""
    from ..data.pair_rows import one_pair_rows
    from ..data.rows import visible_rows
    from ..data.sources import load_data, parse_columns

    script = options.script
    where = {"config": script.dataset_config, "split": script.dataset_train_split}
    data = visible_rows(load_data(script.dataset_name, **where, columns=parse_columns(script.columns)))
    data = one_pair_rows(data, options.training.weight_column)
    if taken := [name for name in _COLUMNS if name in data.column_names]:
        raise UserError(f"{script.dataset_name} has a column {taken[0]} already: rename or remove it")
    return data


def _gaps(data: Dataset) -> NDArray[np.float64]:
    """Returns minus the values of the column ``gap``, NaN where it is null."""
    from ..data.weights import read_number

    if "gap" not in data.column_names:
        raise UserError("the data has no column gap, which the scorer gap reads: rename the column that holds gaps")
    given = data["gap"][:]
    found = [np.nan if value is None else read_number(value) for value in given]
    if None in found:
        raise UserError(f"gap of row {found.index(None)} is {given[found.index(None)]!r}, not a number: mend the row")
    return 0.0 - np.array(found, np.float64)


def _write(path: Path, data: Dataset, columns: dict[str, NDArray[np.float64]]) -> None:
    from ..data.rows import write_rows

    for name, values in columns.items():
        data = data.add_column(name, [None if np.isnan(value) else value for value in values.tolist()])
    with replacing(path) as (temporary,):
        write_rows(data, temporary, path.suffix)


class CrossFit:
    """The pairs of the data under the model before training, and how they are scored.

    Attributes:
        rows: (P,) the row of each pair.

    Raises:
        UserError: a row has several pairs, or the model cannot score them.
    """

    def __init__(self, own: argparse.Namespace, data: Dataset, options: Options) -> None:
        from ..data.images import holds_images
        from ..evaluation.pairs import evaluate_pairs
        from ..reference.fingerprint import fingerprint
        from .models import load_policy, load_policy_tokenizer, load_reference
        from .run import quieten

        self.own, self.data, self.args = own, data, options.training
        quieten(self.args)
        if self.args.world_size > 1:
            raise UserError("the scores are computed in one process: start the command without a launcher")
        tokenizer = load_policy_tokenizer(options.model, self.args, images=holds_images(data))
        model = load_policy(options.model, self.args)
        named = options.model.ref_model_name_or_path is not None
        reference = (lambda: load_reference(options.model, self.args)) if named else None
        found = evaluate_pairs({"start": model}, data, tokenizer, reference=reference, args=self.args)
        self.rows, self.prompts, self.lengths = found.rows, found.prompts, found.lengths
        self.logps = found.logps["start"]
        self.ref_logps = self.logps if found.ref_logps is None else found.ref_logps
        rows, counts = np.unique(self.rows, return_counts=True)
        if several := rows[counts > 1].tolist():
            raise UserError(f"row {several[0]} has several pairs, so its difficulty is not one number: split it")
        # What decides the scores of a run, besides its seed and folds.
        self.deciding = {name: value for name, value in options.values.items() if name not in _COSMETIC}
        self.deciding["weights"] = fingerprint(model, compute_dtype="", attention="")

    def _measured(self, measure: Any, logps: NDArray[np.float64], where: Any = slice(None)) -> NDArray[np.float64]:
        from ..evaluation.difficulty import MeasuredPairs

        return measure(MeasuredPairs(logps, self.ref_logps[where], self.lengths[where], self.args))

    def untrained(self) -> NDArray[np.float64]:
        """Returns (P,) the difficulty by a scorer that trains nothing."""
        from ..evaluation.difficulty import UNTRAINED

        return self._measured(UNTRAINED[self.own.scorer], self.logps)

    def cross_fit(self) -> tuple[list[NDArray[np.float64]], list[str]]:
        """Returns the mean and the standard deviation over seeds of the difficulty, (P,) each, and lines about them."""
        from xxhash import xxh3_64_hexdigest

        from ..data.digest import digest_rows
        from ..evaluation.difficulty import MEASURES, spearman, split_folds
        from .run import check_options

        check_options(_options(self.own))
        own, measure = self.own, MEASURES[self.own.measure]
        self._measured(measure, self.logps)  # raises what the loss does not permit
        seeds = range(self.args.seed, self.args.seed + own.seeds)
        fold_of = np.stack([split_folds(self.prompts, own.folds, seed) for seed in seeds])
        # The digest of the rows leaves images out. The hashes of the prompts have them.
        rows = [digest_rows(self.data), self.prompts.tolist()]
        deciding = json.dumps([rows, own.folds, self.deciding], default=str, sort_keys=True)
        digest = xxh3_64_hexdigest(deciding.encode())
        files = {
            (number, fold): own.output_dir / f"{digest}-seed-{seed}-fold-{fold + 1}-of-{own.folds}.npz"
            for number, seed in enumerate(seeds)
            for fold in range(own.folds)
        }
        left = [run for run, file in files.items() if not file.exists()]
        print(f"{own.folds} folds x {own.seeds} seeds: {len(files)} runs, {len(files) - len(left)} done", flush=True)
        if left:
            print(self._costs(np.flatnonzero(fold_of[left[0][0]] != left[0][1]), len(left)), flush=True)
        scores = np.full(fold_of.shape, np.nan)
        for (number, fold), file in files.items():
            held_out = np.flatnonzero(fold_of[number] == fold)
            if (number, fold) in left:
                started = time.perf_counter()
                self._run(file, seeds[number], held_out)
                print(f"{file.name}: {time.perf_counter() - started:.1f} s", flush=True)
            with np.load(file) as stored:
                scores[number, held_out] = self._measured(measure, stored["logps"], held_out)
        assert not np.isnan(scores).any()
        mean, hardest = scores.mean(axis=0), self.rows[np.argsort(-scores.mean(axis=0), kind="stable")[:5]].tolist()
        alike = [spearman(scores[i], scores[j])[0] for i in range(own.seeds) for j in range(i)]
        lines = [f"mean Spearman correlation of two seeds: {np.mean(alike):.2f}"] if alike else []
        std = scores.std(axis=0, ddof=1) if alike else np.full(len(mean), np.nan)
        return [mean, std], [*lines, f"the hardest rows: {', '.join(map(str, hardest))}"]

    def _costs(self, trained: NDArray[np.int64], runs: int) -> str:
        """Returns a line that predicts, as ``cpt plan``, what ``runs`` runs that train on so many pairs cost."""
        from ..planning.calibration import NotTimedError, calibrate, predict_seconds
        from ..planning.counts import count_run
        from .planned import PlannedTrainer, shapes_of
        from .run import make_trainer

        data = self.data.select(self.rows[trained])
        no_reference = {"policy": shapes_of, "reference": lambda *_: None}
        trainer = make_trainer(_options(self.own), PlannedTrainer, data=(data, None), **no_reference)
        counts = count_run(trainer.get_train_dataloader(), trainer.train_dataset, trainer.collator, trainer.args)
        text = f"a run trains {counts.steps:,} steps on {len(trained):,} pairs ({counts.work.tokens:,} tokens)"
        try:
            found = predict_seconds(trainer, counts, calibrate(trainer, counts, budget=_CALIBRATION))
        except NotTimedError as error:
            return f"{text}; seconds are not predicted: {error}"
        seconds = found["training"] + found.get("reference pass", 0.0) / (self.own.folds - 1)
        return f"{text} and scores the others, in about {seconds:,.0f} s; {runs} runs: {runs * seconds:,.0f} s"

    def _run(self, file: Path, seed: int, held_out: NDArray[np.int64]) -> None:
        """Trains on all pairs but those held out, and writes the log-probs of these."""
        from ..evaluation.pairs import evaluate_pairs
        from .run import make_trainer, use_progress_lines

        folder, rows = file.with_suffix(""), self.rows[held_out]
        shutil.rmtree(folder, ignore_errors=True)  # of a killed command
        options = _options(self.own, "--seed", str(seed), "--output_dir", str(folder))
        trainer = make_trainer(options, data=(self.data.select(np.setdiff1d(self.rows, rows)), None))
        use_progress_lines(trainer)
        trainer.train()
        # Without the autocast that accelerate puts around the forward: the evaluation has its own.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        # The log-probs of this model serve once, so they do not go into the user's cache.
        options.training.ref_cache_dir = str(folder / "log-probs")
        given = self.data.select(rows), trainer.processing_class
        found = evaluate_pairs({"trained": model}, *given, args=options.training)
        assert np.array_equal(rows[found.rows], rows)
        with replacing(file) as (temporary,), temporary.open("wb") as opened:
            np.savez(opened, rows=rows, logps=found.logps["trained"])
        shutil.rmtree(folder)


# --- Options ---


def _check_own(own: argparse.Namespace) -> None:
    if own.output.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {own.output}: its name must end in .jsonl or .parquet")
    defaults = {"folds": 2, "seeds": 2, "measure": "loss", "output_dir": None}
    given = [name for name, default in defaults.items() if getattr(own, name) != default]
    if given and own.scorer != "cross-fit":
        raise UserError(f"--{given[0]} has no effect with --scorer {own.scorer}, which trains nothing: leave it out")


def _difficulty_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} MODEL DATA --output FILE [--scorer NAME] [--folds H] [--seeds M] [--option value ...]",
        description=__doc__,
        epilog="All options of cpt-train are allowed; cpt-train --help lists them.",
    )
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FILE", help="the rows with their difficulty: .jsonl or .parquet")
    add("--scorer", choices=_SCORERS, default="cross-fit", help="[%(default)s]")
    add("--measure", choices=_MEASURES, default="loss", help="what a held-out pair is scored by [%(default)s]")
    folds, seeds = number_type("a number of folds", 2), number_type("a number of seeds", 1)
    add("--folds", type=folds, default=2, metavar="H", help="parts of the data, by prompt [%(default)s]")
    add("--seeds", type=seeds, default=2, metavar="M", help="splits and runs to average over [%(default)s]")
    add("--output_dir", type=Path, metavar="FOLDER", help="keeps the scores of runs that are done [FILE.difficulty]")
    return parser
