"""``cpt study``: compares SFT, SLiC, DPO on each model pair, and curricula, on your model and your responses.

  cpt study --data responses.jsonl --model MODEL --order "large > medium > small" [--steps 100] [--minutes 60]
            [--judge my_package.judges:prefer] [any option of cpt-train]

All arms start from the same model and train for the same number of steps; the reference is that model. The data are
responses in any form that cpt pairs reads. A part of the prompts is held out. Every arm is scored on the held-out
pairs along its curve, and answers held-out prompts at its end. A judge may compare these answers with those of the
start. Differences from the arm sft have intervals over prompts, also corrected for the number of arms.

A finished arm is kept in --output, and an unfinished one continues from its checkpoint: start a stopped command again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_64_hexdigest

from ..errors import UserError
from ..evaluation.judged import OutputEvaluation, win_rate_differences
from ..evaluation.outputs import Comparisons
from ..evaluation.report import (
    arms_of_study,
    difference_lines,
    draw_lines,
    draw_pairs,
    drift_tables,
    win_rate_table,
    write_page,
)
from ..evaluation.win_rate import Bootstrap
from ..files import stored_json, write_text
from ..losses.functions import LOSSES, loss_options
from ..pairs.order import parse_order
from .console import print_results
from .evaluate import JUDGE_MODEL_DEFAULTS, add_judge_options, make_judge
from .parsing import Help, Parser, make_options, number_type, read_options

if TYPE_CHECKING:
    from ..evaluation.pair_metrics import PairEvaluation
    from ..training.report import Point
    from .options import Options

_LOGGER = logging.getLogger("cpt_kernels")
BASE_ARM = "sft"  # the arm that the others are compared with
_CURVE = 4  # points of the curve of an arm
_SHOWN = 5  # prompts whose answers the report shows
_LIMITS = (
    "Intervals are bootstrap intervals over held-out prompts. Each arm was trained once, so they do not cover how"
    " trainings differ; repeat the study with another --seed and --output. Rewards are against the start."
)
_PAIRS = "pairs.jsonl"
_OF_LOSS = {loss: {*loss_options(loss)} for loss in ("sft", "slic", "sigmoid")}  # options of the losses of the arms
_OF_LOSSES = {name for loss in LOSSES for name in loss_options(loss)}
_KEEP = 0.6  # share of the pairs that the arm `selected` keeps, the easiest
# Options of cpt-train that the study sets itself.
_SET = (
    *("dataset_name", "model_name_or_path", "loss_type", "curriculum", "max_steps", "num_train_epochs", "output_dir"),
    *("ref_model_name_or_path", "sync_ref_model", "target_column"),
    *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "eval_strategy", "push_to_hub"),
    *("load_best_model_at_end", "datasets", "dataset_streaming", "eval_dataset_name", "test_split_size"),
    "from_scratch",
)


@dataclass(frozen=True)
class StudyArm:
    """One way to train the start model: options of cpt-train, and the file and the pairs that it trains on."""

    options: dict[str, Any]
    file: str = _PAIRS
    pairs: tuple[str, ...] = ()  # chosen>rejected; none: all rows
    model: str | None = None  # only rows of this model (of the file of single responses)


def make_arms(order: Sequence[str], pairs: Sequence[str]) -> dict[str, StudyArm]:
    """Returns the arms of the paper's comparison for the model pairs of the data.

    Args:
        order: models, strongest first.
        pairs: ``chosen>rejected`` of all pairs, the largest difference of strength first.
    """
    best = [pair for pair in pairs if pair.split(">")[0] == order[0]]  # from easy to hard
    arms = {
        BASE_ARM: StudyArm({"loss_type": "sft"}, "pairs.sft.jsonl", model=order[0]),
        f"slic {pairs[0]}": StudyArm({"loss_type": "slic"}, pairs=(pairs[0],)),
        **{f"dpo {pair}": StudyArm({"loss_type": "sigmoid"}, pairs=(pair,)) for pair in pairs},
    }
    if len(best) > 1:
        for name, schedule in (("curriculum", "linear"), ("reversed", "reversed"), ("mixed", "none")):
            curriculum = {"levels": best, "schedule": schedule}
            arms[name] = StudyArm({"loss_type": "sigmoid", "curriculum": curriculum}, pairs=tuple(best))
    curriculum = {"column": "difficulty", "keep": _KEEP, "schedule": "none"}
    arms["selected"] = StudyArm({"loss_type": "sigmoid", "curriculum": curriculum}, "scored.jsonl")
    return arms


def main(argv: Sequence[str], prog: str = "cpt study") -> None:
    """Builds the pairs, runs the arms that have no result, and reports on all that have one.

    Raises:
        UserError: data, model or options that cannot be used, or a folder that holds another study.
    """
    own, rest = _study_parser(prog).parse_known_args(argv)
    own.given, own.prog, own.output_dir = read_options(rest, prog), prog, own.output
    if taken := [name for name in _SET if name in own.given]:
        raise UserError(f"{taken[0]} is set by {prog} itself: leave it out")
    if unread := [name for name in own.given if name in _OF_LOSSES and not any(name in of for of in _OF_LOSS.values())]:
        raise UserError(f"{unread[0]} has no effect on the losses of the arms, {', '.join(_OF_LOSS)}: leave it out")
    if not 0 < own.validation < 1:
        raise UserError(f"--validation {own.validation}: give a share of the pairs, above 0 and below 1")
    _check_same(own)
    Study(own).run()


def _check_same(own: argparse.Namespace) -> None:
    """Checks that the folder holds no study with other options; one that has no pairs yet begins anew."""
    free = {"output", "output_dir", "minutes", "arms", "keep_models", "prog", "judge", "judge_model", "both_orders"}
    given = {name: value for name, value in vars(own).items() if name not in {*free, *JUDGE_MODEL_DEFAULTS}}
    deciding = json.loads(json.dumps(given.pop("given") | given, default=str))
    if not (own.output / _PAIRS).exists():
        (own.output / "study.json").unlink(missing_ok=True)
    known = stored_json(own.output / "study.json", lambda: deciding)
    if changed := [name for name in deciding | known if deciding.get(name) != known.get(name)]:
        before, now = known.get(changed[0], "its default"), deciding.get(changed[0], "its default")
        raise UserError(
            f"--output {own.output} holds a study with {changed[0]} {before}, not {now}: choose another folder, or the"
            " same options"
        )


class Study:
    """The arms of a study, and its results in a folder."""

    def __init__(self, own: argparse.Namespace) -> None:
        self.own, self.output = own, own.output
        self.ends = time.monotonic() + 60 * own.minutes

    def run(self) -> None:
        """Runs what is missing and reports."""
        self._build_pairs()
        arms = self._arms()
        self._start()
        done = [name for name in arms if self._file(name).exists()]
        about = f"{len(arms)} arms of {self.own.steps} steps, {len(done)} done; the first shows how long one takes"
        print(about, flush=True)
        results: dict[str, Any] = {}
        for name, arm in arms.items():
            started = time.perf_counter()
            try:
                results[name] = stored_json(self._file(name), lambda: self._run_arm(name, arm))  # noqa: B023
            except _TimeIsUp:
                print(f"{self.own.minutes:g} minutes are over: start the command again to continue with {name}")
                break
            shutil.rmtree(self._file(name).with_suffix(""), ignore_errors=True)  # once the result is on disk
            if name not in done:
                print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        if results:
            self._report(results)

    def _file(self, arm: str) -> Path:
        return self.output / "arms" / f"{_arm_file(arm)}.json"

    # --- Data ---

    def _build_pairs(self) -> None:
        """Writes the pairs, those held out and the single responses, once."""
        from . import pairs
        from .models import load_policy_tokenizer

        path = self.output / _PAIRS
        if path.exists():
            return
        options = self._options(self.output / "data")
        chat = getattr(load_policy_tokenizer(options.model, options.training), "chat_template", None)
        flags = ["--order", self.own.order, "--validation", str(self.own.validation), "--sft", "--output", str(path)]
        flags += ["--pairs", self.own.pairs] if self.own.pairs else []
        pairs.main([*self.own.data, *flags, *(["--conversational"] if chat else [])], self.own.prog)

    def _arms(self) -> dict[str, StudyArm]:
        """Returns the arms that were asked for."""
        strength = parse_order(self.own.order)
        found = {(row["chosen_model"], row["rejected_model"]) for row in _read_rows(self.output / _PAIRS)}
        pairs = sorted(found, key=lambda pair: (strength[pair[1]] - strength[pair[0]], -strength[pair[0]], *pair))
        order = sorted({name for pair in pairs for name in pair}, key=lambda name: (-strength[name], name))
        arms = make_arms(order, [">".join(pair) for pair in pairs])
        if unknown := [name for name in self.own.arms or () if name not in arms]:
            raise UserError(f"--arms {unknown[0]!r} is none of this data: choose of {', '.join(map(repr, arms))}")
        return {name: arm for name, arm in arms.items() if not self.own.arms or name in self.own.arms}

    def _rows(self, arm: StudyArm) -> Any:
        from ..data.sources import load_data

        path = self.output / arm.file
        if arm.file == "scored.jsonl" and not path.exists():
            from . import difficulty

            config = self.output / "difficulty.yaml"  # JSON is YAML, too
            write_text(config, json.dumps(self._given("sigmoid") | {"max_steps": self.own.steps}) + "\n")
            data = self.own.model, str(self.output / _PAIRS), "--output", str(path), "--config", str(config)
            difficulty.main([*data, "--folds", "2", "--seeds", "1"], self.own.prog)
        data = load_data(str(path))
        if arm.model is not None:
            return data.select(np.flatnonzero(np.array(data["model"][:]) == arm.model))
        pairs = np.array([">".join(pair) for pair in zip(data["chosen_model"][:], data["rejected_model"][:])])
        return data.select(np.flatnonzero(np.isin(pairs, arm.pairs))) if arm.pairs else data

    # --- Arms ---

    def _given(self, loss: str) -> dict[str, Any]:
        """Returns the options of cpt-train that were given and have an effect on a loss."""
        return {name: v for name, v in self.own.given.items() if name not in _OF_LOSSES - _OF_LOSS[loss] - {"beta"}}

    def _options(self, folder: Path, loss_type: str = "sigmoid", **more: Any) -> Options:
        """Returns the options of a run in a folder."""
        more |= {"model_name_or_path": self.own.model, "dataset_name": self.output / _PAIRS, "loss_type": loss_type}
        more |= {"output_dir": folder, "report_to": "none", "max_steps": self.own.steps}
        values = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in more.items()}
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        return make_options(self._given(loss_type) | read_options(flags, self.own.prog))

    def _start(self) -> None:
        """Scores the held-out pairs by the start model, the reference of all arms, and asks for its answers."""
        from .models import load_policy, load_policy_tokenizer

        options = self._options(self.output / "start")
        if options.training.world_size > 1:
            raise UserError("a study runs in one process: start the command without a launcher")
        tokenizer = load_policy_tokenizer(options.model, options.training)
        model = load_policy(options.model, options.training)  # evaluate_pairs moves it to its device
        found = self._score(model, tokenizer, options.training)
        self.held_out = replace(found, logps={}, ref_logps=found.logps["model"])
        self.answers = stored_json(self._file("start"), lambda: self._answer(model, tokenizer))

    def _score(self, model: Any, tokenizer: Any, args: Any, reference: Any = None) -> PairEvaluation:
        """Scores the held-out pairs; with a reference, also measures what training changed."""
        from ..data.sources import load_data
        from ..evaluation.pairs import evaluate_pairs

        data = load_data(str(self.output / "pairs.validation.jsonl"))
        drift = reference is not None
        known = self.held_out.ref_logps if drift else None
        given = {"reference": reference, "ref_logps": known, "drift": drift}
        return evaluate_pairs({"model": model}, data, tokenizer, args=args, **given)

    def _answer(self, model: Any, tokenizer: Any) -> list[str]:
        """Returns a response of the model to each of the first held-out prompts."""
        from ..generation.local import generate_local
        from ..generation.prompts import Sampling

        sampling = Sampling(self.own.response_tokens, temperature=self.own.response_temperature)
        return generate_local(model, tokenizer, self._prompts(), sampling, batch_size=self.own.batch_size)

    def _prompts(self) -> list[Any]:
        rows = _read_rows(self.output / "pairs.validation.jsonl")
        prompts = {json.dumps(row["prompt"]): row["prompt"] for row in rows}
        return list(prompts.values())[: self.own.prompts]

    def _run_arm(self, name: str, arm: StudyArm) -> dict[str, Any]:
        """Trains an arm, from its checkpoint if it has one, and returns its curve, log-probs and answers."""
        from ..training.report import Curve
        from ..training.run_folder import checkpoints_in
        from .models import load_policy
        from .run import make_trainer, quieten, use_progress_lines

        folder, every = self._file(name).with_suffix(""), -(-self.own.steps // _CURVE)
        more = {"save_strategy": "steps", "save_steps": every, "save_total_limit": 2} | arm.options
        if name == BASE_ARM and self.own.sft_learning_rate is not None:
            more["learning_rate"] = self.own.sft_learning_rate
        options = self._options(folder, **more)
        quieten(options.training)
        # The log-probs of a model in training serve once, so they do not go into the user's cache.
        scoring = copy.copy(options.training)
        scoring.ref_cache_dir = str(folder / "log-probs")

        def examine(model: Any, step: int) -> Point:
            level = _LOGGER.level
            _LOGGER.setLevel(logging.ERROR)  # a line on every use of the folder of log-probs
            logps = self._score(model, trainer.processing_class, scoring).logps
            _LOGGER.setLevel(level)
            if step < self.own.steps:  # at the end they serve again, beside the drift
                shutil.rmtree(folder / "log-probs")
            metrics = replace(self.held_out, logps=logps).metrics("model")
            return {metric: float(values.mean()) for metric, values in metrics.items()}

        steps = {*range(every, self.own.steps, every), self.own.steps}
        curve, deadline = Curve(steps, examine, folder / "curve.json"), _deadline(self.ends)
        trainer = make_trainer(options, callbacks=[curve, deadline], data=(self._rows(arm), None))
        use_progress_lines(trainer)
        trainer.train(resume_from_checkpoint=bool(checkpoints_in(folder)) or None)
        if trainer.state.global_step < self.own.steps:
            raise _TimeIsUp
        start = functools.partial(load_policy, options.model, scoring)
        held_out = self._score(trainer.model, trainer.processing_class, scoring, start)
        answers = self._answer(trainer.model, trainer.processing_class)
        if self.own.keep_models:
            trainer.save_model(str(self.output / "models" / _arm_file(name)))
        logps, drift = held_out.logps["model"].tolist(), held_out.drift_summary()
        return {"curve": curve.points, "logps": logps, "drift": drift, "answers": answers}

    # --- Report ---

    def _report(self, results: dict[str, Any]) -> None:
        """Prints the tables, and writes them with curves, lengths and answers to report.html and study's JSON."""
        # Differences are from the first arm that has a result; the second interval is corrected for their number.
        base = BASE_ARM if BASE_ARM in results else next(iter(results))
        arms = {base: results[base]} | results
        intervals = [Bootstrap(), Bootstrap(20_000, 1 - 0.05 / max(1, len(arms) - 1))]
        held_out = replace(self.held_out, logps={name: np.array(each["logps"]) for name, each in arms.items()})
        summary = held_out.summary()
        differences = [held_out.differences(bootstrap) for bootstrap in intervals]
        answers = {"start": self.answers, **{name: each["answers"] for name, each in arms.items()}}
        lengths = {name: float(np.mean([*map(len, texts)] or [0])) for name, texts in answers.items()}
        drifts = [row | {"model": name} for name, each in arms.items() for row in each["drift"]]
        tables = [arms_of_study(summary, differences, lengths), *drift_tables(drifts)]
        judged = self._judge(arms, intervals)
        lines = []
        if judged:
            tables.append(win_rate_table(judged["models"], 0.95))
            for rows, kind in zip(judged["differences"], ("95 %", f"corrected for {len(arms) - 1}")):
                shown = difference_lines(rows, {"win_rate": ("win rate", 100, "+.1f")})
                lines += [f"{line} ({kind})" for line in shown]
        curves = {
            metric: {name: [(point["step"], point[metric]) for point in each["curve"]] for name, each in arms.items()}
            for metric in ("rewards/accuracies", "rewards/margins")
        }
        figures = [*draw_lines(curves, self.output / "curves"), *draw_pairs(summary, self.output, "held-out pairs")]
        found = {"arms": list(arms), "summary": summary, "differences": differences, "drift": drifts}
        found |= {"lengths": lengths, "judged": judged}
        write_text(self.output / "results.json", json.dumps(found, indent=1) + "\n")
        texts = [("prompt", "model", "response")]
        for number, prompt in enumerate(self._prompts()[:_SHOWN]):
            texts += [("" if i else _as_text(prompt), n, each[number]) for i, (n, each) in enumerate(answers.items())]
        svg = [path for path in figures if path.suffix == ".svg"]
        parts = [_LIMITS, "# Held-out pairs", *tables, *lines, "# Curves and groups", *svg, "# Answers", texts]
        write_page(self.output / "report.html", f"{self.own.model}: arms of {self.own.steps} steps", parts)
        print_results(tables, [*lines, _LIMITS, f"written: {self.output / 'report.html'}, results.json, figures"])

    def _judge(self, arms: dict[str, Any], intervals: Sequence[Bootstrap]) -> dict[str, Any] | None:
        """Compares the answers of every arm with those of the start; ``None`` without a judge."""
        if not (self.own.judge or self.own.judge_model) or not self.answers:
            return None
        ask = make_judge(self.own)
        prompts = [_as_text(prompt) for prompt in self._prompts()]
        evaluations = []
        for name, each in arms.items():
            compared = Comparisons(name, "start", prompts, each["answers"], self.answers, 0, 0)
            evaluations.append(OutputEvaluation(compared, ask(compared)))
        return {
            "models": [each.summary() for each in evaluations],
            "differences": [win_rate_differences(evaluations, bootstrap) for bootstrap in intervals],
        }


class _TimeIsUp(Exception):
    """The minutes of the study are over; the arm has a checkpoint."""


def _deadline(ends: float) -> Any:
    """Returns a callback that saves a checkpoint and stops training after a time, in seconds of the monotonic clock."""
    from transformers import TrainerCallback

    class Deadline(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if time.monotonic() >= ends and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    return Deadline()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _arm_file(arm: str) -> str:
    """Returns a name for the files of an arm, with a digest if the arm's own name has other characters."""
    plain = re.sub(r"[^\w-]+", "-", arm)
    return plain if plain == arm else f"{plain[:80]}-{xxh3_64_hexdigest(arm.encode())[:8]}"


def _as_text(prompt: Any) -> str:
    """Returns a prompt as text; of messages, those in order."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


# --- Options ---


def _study_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} --data FILE ... --model MODEL --order TEXT [--steps N] [--minutes M] [--option value ...]",
        description=__doc__,
        epilog="All options of cpt-train are allowed but those of its steps, loss, curriculum and folder.",
        formatter_class=Help,
    )
    add = parser.add_argument_group("The study").add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="responses of at least two models")
    add("--model", required=True, metavar="MODEL", help="the start of all arms, and their reference")
    add("--order", required=True, metavar="TEXT", help="strength of the models, as 'gpt4 > chatgpt > td003'")
    add("--pairs", metavar="TEXT", help="all, adjacent, or 'gpt4 > td003, ...' [all]")
    add("--validation", type=float, default=0.2, metavar="SHARE", help="held-out share of the pairs [%(default)s]")
    add("--output", type=Path, default=Path("runs/study"), metavar="FOLDER", help="[%(default)s]")
    add("--arms", nargs="+", metavar="ARM", help="only these [all]")
    add("--keep_models", action="store_true", help="keep the model of every arm in OUTPUT/models")
    add = parser.add_argument_group("Budget").add_argument
    count, number = functools.partial(number_type, least=1), functools.partial(number_type, least=0, kind=float)
    steps, minutes = number_type("a number of steps", _CURVE), number("a number of minutes")
    add("--steps", type=steps, default=100, metavar="N", help="optimizer steps of every arm [%(default)s]")
    add("--minutes", type=minutes, default=np.inf, metavar="M", help="stop then; the same command continues [never]")
    rate = number("a learning rate")
    add("--sft_learning_rate", type=rate, metavar="X", help="of the arm sft [that of the other arms]")
    add = parser.add_argument_group("Answers").add_argument
    prompts, tokens, batch = number_type("a number of prompts", 0), count("a number of tokens"), count("a batch size")
    add("--prompts", type=prompts, default=100, metavar="N", help="held-out prompts that the arms answer [%(default)s]")
    add("--response_tokens", type=tokens, default=256, metavar="N", help="most tokens of an answer [%(default)s]")
    heat = number("a temperature")
    add("--response_temperature", type=heat, default=1.0, metavar="T", help="0: greedy [%(default)s]")
    add("--batch_size", type=batch, default=16, metavar="N", help="answers that are generated together [%(default)s]")
    add_judge_options(parser, required=False)
    return parser
