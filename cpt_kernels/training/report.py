"""Reports of a training run: metrics.jsonl, curves, one terminal line per log, and a closing table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..files import write_text
from ..plots import color_of, cut_off_outlier, distinct, legend_above, new_figure, save_figure, shorten

Point = dict[str, Any]  # numbers by name, of a model after some optimizer steps
LogRecord = dict[str, Any]  # one log: "step" and metrics by name; names of evaluations start with "eval_"

# Panel title -> metrics drawn in it. Token accuracy is drawn only for data without pairs, which has no reward accuracy.
_PANELS = {
    "loss": ("loss",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
    "token accuracy": ("mean_token_accuracy",),
}
# Rows of the closing table.
_TABLE = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", "aux_loss"),
)
# Metric -> its word in the terminal line.
_IN_LINE = {
    **{"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy", "learning_rate": "lr"},
    "tokens_per_second": "tokens/s",
}
_IN_BAR = ("loss", "tokens_per_second")


class RunReport(TrainerCallback):
    """Writes ``metrics.jsonl`` during a run, and ``curves.png`` and ``curves.svg`` at its end.

    ``metrics.jsonl`` has one JSON object per log, and the last step is always logged. A resumed run continues the file
    from its checkpoint: later logs of the earlier run are removed, so no step occurs twice. Only the main process
    writes.

    Attributes:
        records: all logs, as in the file.
        files: the curves that were drawn.
        tokens: tokens that this call of ``train()`` has seen, once it has ended.
    """

    def __init__(self, folder: str | Path, title: str = "") -> None:
        self.folder, self.title = Path(folder), title
        self.records: list[LogRecord] = []
        self.files: list[Path] = []
        self._first = 0  # index in records of the first log of this call of train()
        self.tokens = self._tokens_before = 0

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        # A checkpoint's state holds all logs up to it. Without one, keep an evaluation that ran before training.
        self.records = [_order(record) for record in state.log_history] or self.records
        self._first = len(self.records)
        self._tokens_before = state.num_input_tokens_seen
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics_file.write_text("".join(map(_line, self.records)), encoding="utf-8")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # the last step may not be a multiple of logging_steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        record = _order(state.log_history[-1])
        same = (old for old in self.records if old["step"] == record["step"] and old.keys() == record.keys())
        if next(same, None) is not None:  # with eval_on_start a resumed run repeats the checkpoint's evaluation
            return
        self.records.append(record)
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(_line(record))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        self.tokens = state.num_input_tokens_seen - self._tokens_before
        if state.is_world_process_zero:
            self.draw()

    def draw(self) -> None:
        """Draws the curves of all logs so far."""
        self.files = draw_curves(self.records, self.folder, self.title)

    def note(self) -> str | None:
        """Returns an explanation of an evaluation at step 0 whose rewards are all 0, else ``None``."""
        for record in eval_records(self.records)[:1]:
            if record["step"] == 0 and abs(record.get("rewards/margins", math.inf)) < 1e-3:
                return (
                    "At step 0 the policy equals its reference: rewards are 0, and reward accuracy is rounding noise."
                )
        return None

    def tokens_per_second(self) -> float | None:
        """Returns tokens per second of this training, evaluations excluded; ``None`` before training has ended."""
        records = self.records[self._first :]
        end = next((index for index, record in enumerate(records) if "train_loss" in record), None)
        if end is None:
            return None
        evaluating = sum(record.get("eval_runtime", 0.0) for record in records[:end])
        return self.tokens / max(records[end]["train_runtime"] - evaluating, 1e-9)


class Curve(TrainerCallback):
    """Examines the model after some of the optimizer steps of a run.

    Args:
        steps: the steps.
        examine: model and step -> numbers by name.
        file: keeps the points, so that a run that resumes from a checkpoint has those of the steps before it.

    Attributes:
        points: what was found, each with its ``step``, in order.
    """

    def __init__(self, steps: Container[int], examine: Callable[[Any, int], Point], file: Path | None = None) -> None:
        self.steps, self.examine, self.file = steps, examine, file
        self.points: list[Point] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.file is not None and self.file.exists():
            found = json.loads(self.file.read_text(encoding="utf-8"))
            self.points = [point for point in found if point["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.steps:
            self.points.append({"step": state.global_step} | self.examine(model, state.global_step))
            if self.file is not None:
                write_text(self.file, json.dumps(self.points) + "\n")


class ProgressLines(ProgressCallback):
    """One short line per log instead of a dictionary; in a terminal also a bar with loss, speed and the time left.

    ``disable_tqdm`` removes the bar, not the lines.
    """

    def on_train_begin(self, args, state: TrainerState, control, **kwargs) -> None:
        if state.is_world_process_zero:
            # disable=None: no bar without a terminal
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm or None)
        self.current_step = 0

    def on_prediction_step(self, args, state: TrainerState, control, **kwargs) -> None:
        if sys.stderr.isatty() and not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state: TrainerState, control, logs: dict | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        parts = [f"{word} {_number(logs[prefix + key])}" for key, word in _IN_LINE.items() if prefix + key in logs]
        if not prefix and "loss" in logs:
            self.training_bar.set_postfix({_IN_LINE[key]: _number(logs[key]) for key in _IN_BAR if key in logs})
        if parts:
            kind = "held out" if prefix else f"step {state.global_step}"
            total = "" if prefix else f"/{state.max_steps}"
            self.training_bar.write(f"{kind + total:>12}  {'  '.join(parts)}")


def _order(record: LogRecord) -> LogRecord:
    return {"step": record["step"], **{key: value for key, value in record.items() if key != "step"}}


def _line(record: LogRecord) -> str:
    """Returns a record as a line of JSON; NaN and infinity, which JSON lacks, become null."""
    broken = {key: None for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(record | broken) + "\n"


def train_records(records: Iterable[LogRecord]) -> list[LogRecord]:
    """Returns the logs of training steps."""
    return [record for record in records if "loss" in record]


def eval_records(records: Iterable[LogRecord]) -> list[LogRecord]:
    """Returns the logs of evaluations, metric names without the prefix ``eval_``."""
    return [
        {key.removeprefix("eval_"): value for key, value in record.items()}
        for record in records
        if "eval_loss" in record
    ]


def _shown(records: list[LogRecord]) -> list[LogRecord]:
    """Returns the records, without the rewards of data that has no rejected side, where a reward compares nothing."""
    if any("rewards/margins" in record for record in records):
        return records
    return [{key: record[key] for key in record if not key.startswith("rewards/")} for record in records]


def draw_curves(records: Sequence[LogRecord], folder: str | Path, title: str = "") -> list[Path]:
    """Draws loss, rewards, margins and accuracy over steps, evaluations as marked points.

    Returns:
        The files written, in ``folder``: curves.png and curves.svg, or none if there is nothing to draw.
    """
    # Keep the panels of which at least one metric was logged.
    train, held_out = _shown(train_records(records)), _shown(eval_records(records))
    known = {key for record in (*train, *held_out) for key in record}
    levels = [key for key in dict.fromkeys(key for record in train for key in record) if key.startswith("curriculum/")]
    panels = {**_PANELS, "share of level" if len(levels) > 1 else "place in the curriculum": tuple(levels)}
    panels = {name: metrics for name, metrics in panels.items() if known.intersection(metrics)}
    if "reward accuracy" in panels:
        panels.pop("token accuracy", None)
    if not panels:
        return []
    # Draw two panels per row, a solid line for training and a dashed line with markers for evaluations.
    columns, rows = min(len(panels), 2), math.ceil(len(panels) / 2)
    figure = new_figure(5 * columns, 3.2 * rows)
    figure.suptitle(shorten(title, 60 * columns), fontsize="medium")
    grid = figure.add_gridspec(rows, columns)
    for place, (name, metrics) in enumerate(panels.items()):
        is_wide = place == len(panels) - 1 and place % columns == 0  # the last panel of an odd number
        axis = figure.add_subplot(grid[place // columns, slice(None) if is_wide else place % columns])
        short = distinct(metric.split("/", 1)[-1] for metric in metrics)
        series = []
        for number, metric in enumerate(metrics):
            label = short[metric.split("/", 1)[-1]] if len(metrics) > 1 else "train"
            held_label = f"{label}, held out" if len(metrics) > 1 else "held out"
            for records, text, style in (
                (train, label, {"linewidth": 1.2}),
                (held_out, held_label, {"marker": "o", "linestyle": "--"}),
            ):
                if (points := _curve(records, metric))[0]:
                    marker = {"marker": "."} if len(points[0]) == 1 else {}
                    axis.plot(*points, color=color_of(number), label=text, **(marker | style))
                    series += points[1]
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        legend_above(axis, 10 if is_wide and columns > 1 else 5)
        if (extreme := cut_off_outlier(axis, "y", [[value] for value in series])) is not None:
            axis.set_ylabel(f"{name}\n(cut off: up to {_number(extreme)})")
    return save_figure(figure, Path(folder, "curves.png"), Path(folder, "curves.svg"))


def _curve(records: Iterable[LogRecord], metric: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a metric, from the records that have it."""
    points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def metrics_table(records: Sequence[LogRecord], title: str = "") -> Table:
    """Returns a table of the first and the last value of every metric, in training and on held-out data."""
    train, held_out = _shown(train_records(records)), _shown(eval_records(records))
    table = Table(title=escape(title), title_justify="left")
    table.add_column("", no_wrap=True)
    columns = []
    for kind, logs in (("training", train), ("held out", held_out)):
        for record in dict.fromkeys([0, len(logs) - 1]) if logs else ():  # one column if the first is the last
            table.add_column(f"{kind}\nstep {logs[record]['step']}", justify="right", no_wrap=True)
            columns.append(logs[record])
    for metric in _TABLE:
        if any(metric in column for column in columns):
            table.add_row(metric, *(_number(column.get(metric)) for column in columns))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
