"""Measures in ten seconds how long the micro-batches of a run take on this machine, without the weights of its model.

Time depends on shapes, not on values. So some layers of the model, or all, get random weights and run the run's own
micro-batches, the median and the largest by tokens: packed as in training, packed without a backward as in the
reference pass, and padded as in TRL. Rounds of all these repeat until the time is over, and medians count.

A micro-batch of F operations takes a + b F seconds. Where only n of L layers run, all of them would take
t(L) = t(n) + (L - n) (t(n) - t(1)) / (n - 1).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from ..reference.scorer import scoring_budget
from .budget import free_memory
from .counts import Counts
from .engines import most_moments, state_bytes
from .model_sizes import ModelSizes, sizes_of
from .peer import Sides, peer_tile_bytes, tile_bytes
from .sample import Sample, truncated
from .work import Work

Clock = Callable[[], float]

_ROUNDS = 3  # that must fit into the time; the first one warms up
_MOST_ROUNDS = 15
_PILOT_TOKENS = 512
_OURS, _PEER = ("train", "reference"), ("peer", "peer_reference")
# Below so many bytes a tile of logits is memory that malloc used before. Above, its pages are new, and the CPU clears
# them, which takes a third of TRL's time. So a smaller part of a micro-batch does not tell the time of the whole.
_MAPPED_BYTES = 2**25
_SHARE_OF_MEMORY = 0.8  # of the free memory, that a calibration may take


class Rate(NamedTuple):
    """Seconds of a micro-batch: ``fixed + per_flop * operations``."""

    fixed: float
    per_flop: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Rate:
        """Returns the line through the smallest and the largest of some (operations, seconds).

        It goes through the origin if the two are close, or if noise makes a part of it negative.
        """
        (x0, y0), (x1, y1) = min(points), max(points)
        slope = (y1 - y0) / (x1 - x0) if x1 > 1.2 * x0 else 0.0
        if slope <= 0 or y0 < slope * x0:
            return cls(0.0, sum(y for _, y in points) / sum(x for x, _ in points))
        return cls(y0 - slope * x0, slope)

    def seconds(self, micro_batches: int, flops: float) -> float:
        """Returns the seconds of some micro-batches with ``flops`` operations in total."""
        return self.fixed * micro_batches + self.per_flop * flops


class NotTimedError(UserError):
    """A run cannot be timed: this machine has too little memory for one layer of the model."""


@dataclass(frozen=True)
class Shape:
    """Decides the operations of a micro-batch: the sizes of the model, and which gradients there are."""

    sizes: ModelSizes
    checkpointing: bool
    adapters: bool
    fewest: int  # layers that can run: 1, or all of a model without a list of layers

    @classmethod
    def of(cls, model: nn.Module, args: Any) -> Shape:
        sizes = sizes_of(model)
        fewest = sizes.layers if truncated(model, 1)[1] is None else 1
        return cls(sizes, args.gradient_checkpointing, hasattr(model, "peft_config"), fewest)

    def flops(self, work: Work, backward: bool, layers: int | None = None) -> float:
        """Returns the operations of a micro-batch with all layers, or with some."""
        if backward:
            parts = work.flops(self.sizes, self.checkpointing, self.adapters)
        else:
            parts = work.forward_flops(self.sizes)
        share = 1.0 if layers is None else layers / self.sizes.layers
        return share * (parts["layers"] + parts["attention"]) + parts["head"]


@dataclass
class Task:
    """A micro-batch that is timed: rows of the dataset, or the lengths of padded sequences."""

    kind: str  # "train", "reference", "peer" or "peer_reference"
    work: Work
    rows: Sequence[int] = ()
    sides: Sides = ()
    layers: Sequence[int] = ()  # how many run, fewest first
    seconds: dict[int, list[float]] = field(default_factory=dict)  # by number of layers

    @property
    def backward(self) -> bool:
        return self.kind in ("train", "peer")


@dataclass(frozen=True)
class Calibration:
    """What a calibration measured."""

    rates: dict[str, Rate]  # by kind of micro-batch: "train", "reference", "peer", "peer_reference"
    optimizer: float  # seconds of an optimizer step of the whole model
    layers: dict[str, int]  # how many of the model's layers ran, by kind
    shares: dict[str, float]  # of the rows of each micro-batch that ran, by kind
    # Seconds to "read", "encode" (forward) and "train" (forward and backward) images, for each of their tokens.
    images: dict[str, float]
    rounds: int  # how often each micro-batch was timed


def calibrate(trainer: Any, counts: Counts, *, clock: Clock = time.perf_counter, budget: float = 10.0) -> Calibration:
    """Times micro-batches of a run on this machine.

    Args:
        trainer: a ``ContrastiveTrainer`` whose model has shapes but no weights.
        budget: of the calibration in seconds. One row of each kind is timed, however long that takes.

    Raises:
        NotTimedError: the memory of this machine does not suffice, images run by rows, or logits are needed whole.
    """
    started, model = clock(), trainer.packed.model
    images = trainer.packed.images
    if images is not None and images.by_rows and counts.work.images:
        raise NotTimedError("this model takes images by rows, which are not timed")
    shape = Shape.of(model, trainer.args)
    try:
        # The speed of this machine, from one and two layers and few rows.
        few = sorted({shape.fewest, min(2 * shape.fewest, shape.sizes.layers)})
        share = min(1.0, _PILOT_TOKENS / counts.largest.tokens)
        pilots = {kinds: _tasks(trainer, counts, share, few, kinds[:1])[:1] for kinds in (_PEER, _OURS)}
        needed = needed_bytes(trainer, shape, shape.fewest, [task for tasks in pilots.values() for task in tasks])
        if needed > (free := free_bytes(trainer.args.device)):
            raise NotTimedError(
                f"one layer and the head of this model take about {needed / 2**30:.1f} GiB in training, and"
                f" {free / 2**30:.1f} GiB can be used on {trainer.args.device}"
            )
        sample = Sample(trainer, few[-1])
        if sample.needs_logits():
            raise NotTimedError("this model's forward reads columns of its logits, which are not timed")
        for _ in range(2):
            for tasks in pilots.values():
                _time_round(sample, tasks, clock)

        # As many rows and layers as the time and the memory allow, half of the time for either trainer.
        left = (budget - (clock() - started)) / 2 / _ROUNDS
        speeds = {kinds: Speed.of(tasks, shape) for kinds, tasks in pilots.items()}
        chosen = [_affordable(trainer, counts, shape, kinds, speed, left) for kinds, speed in speeds.items()]
        tasks = [task for found in chosen for task in found.tasks]
        if (layers := max(found.layers[-1] for found in chosen)) > few[-1]:
            sample = Sample(trainer, layers)

        # Rounds: one to warm up, then those that count.
        rows = _rows_with_images(counts, chosen[-1].share)
        _time_round(sample, tasks, clock, rows)
        for task in tasks:
            task.seconds.clear()
        rounds: list[Round] = []
        while not rounds or (len(rounds) < _MOST_ROUNDS and clock() - started < budget):
            rounds.append(_time_round(sample, tasks, clock, rows))
    except torch.OutOfMemoryError as error:
        raise NotTimedError(f"timing this run needs more memory than {trainer.args.device} has") from error

    points: dict[str, list[tuple[float, float]]] = {}
    for task in tasks:
        points.setdefault(task.kind, []).append((shape.flops(task.work, task.backward), _of_all_layers(task, shape)))
    with sample.only(tasks[-1].layers[-1]):
        grown = trained_parameters(model) / trained_parameters(sample.model)
    return Calibration(
        rates={kind: Rate.through(found) for kind, found in points.items()},
        optimizer=statistics.median(one.step for one in rounds) * grown,
        layers={task.kind: task.layers[-1] for task in tasks},
        shares={task.kind: found.share for found in chosen for task in found.tasks},
        images={
            part: statistics.median(one.images[part] for one in rounds) / counts.lengths.work(rows).image_tokens
            for part in rounds[0].images
        },
        rounds=len(rounds),
    )


class Round(NamedTuple):
    """Seconds of an optimizer step, and of the parts of :attr:`Calibration.images`."""

    step: float
    images: dict[str, float]


def _time_round(sample: Sample, tasks: Sequence[Task], clock: Clock, rows: Sequence[int] = ()) -> Round:
    """Times every task with each of its numbers of layers, then the images of some rows and an optimizer step."""
    run: dict[str, Callable[[Any], None]] = {"train": sample.train, "reference": sample.score}
    run |= {"peer": sample.train_peer, "peer_reference": sample.score_peer}
    accumulates = sample.trainer.args.gradient_accumulation_steps > 1
    for task in tasks:
        for layers in task.layers:
            if task.backward and not accumulates:  # the first backward of a step allocates gradients
                sample.forget_gradients()
            with sample.only(layers):
                seconds = _timed(clock, sample.device, run[task.kind], task.rows or task.sides)
            task.seconds.setdefault(layers, []).append(seconds)
    images: dict[str, float] = {}
    if rows:
        images["read"] = _timed(clock, sample.device, sample.read, rows)
        images["encode"] = _timed(clock, sample.device, sample.encode, rows)
        images["train"] = _timed(clock, sample.device, sample.encode, rows, True)
    return Round(_timed(clock, sample.device, sample.step), images)


def _rows_with_images(counts: Counts, share: float) -> list[int]:
    """Returns a share of the rows of the micro-batch with the most tokens of images, those with the most first."""

    def tokens(rows: Sequence[int]) -> float:
        return counts.lengths.work(rows).image_tokens

    batch = max(counts.batches, key=tokens)
    rows = sorted(batch, key=lambda row: -tokens([row]))[: max(1, round(share * len(batch)))]
    return rows if tokens(rows) else []


def _timed(clock: Clock, device: torch.device, run: Callable[..., Any], *arguments: Any) -> float:
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    started = clock()
    run(*arguments)
    synchronize()
    return clock() - started


# --- What is timed ---


class Timed(NamedTuple):
    """The micro-batches of one trainer that are timed."""

    share: float  # of the rows of each micro-batch
    layers: Sequence[int]
    tasks: list[Task]


def _tasks(
    trainer: Any, counts: Counts, share: float, layers: Sequence[int], kinds: Collection[str], only_median: bool = False
) -> list[Task]:
    """Returns the micro-batches to time, each with a share of its rows, but one at least; "train" comes last."""

    def median_and_largest(batches: Sequence[Any], work: Callable[[Any], Work]) -> list[Any]:
        ordered = sorted(batches, key=lambda batch: work(batch).tokens)
        chosen = [ordered[len(ordered) // 2], ordered[-1]][: 1 if only_median else 2]
        return [batch[: max(1, round(share * len(batch)))] for batch in chosen]

    lengths, tasks = counts.lengths, []
    for pairs in median_and_largest(counts.peer_batches, counts.peer_work):
        sides = [side for pair in pairs for side in pair]
        tasks += [Task(kind, counts.peer_work(pairs), (), sides, layers) for kind in ("peer", "peer_reference")]
    # The reference pass has micro-batches of its own size.
    rows, budget = [], share * scoring_budget(trainer.args.max_tokens_per_batch, trainer.args.device)
    for row in dict.fromkeys(row for batch in counts.batches for row in batch):
        if rows and lengths.work([*rows, row]).tokens > budget:
            break
        rows.append(row)
    tasks.append(Task("reference", lengths.work(rows), rows, (), layers))
    for rows in median_and_largest(counts.batches, lengths.work):
        tasks.append(Task("train", lengths.work(rows), rows, (), layers))
    needed = trainer.loss.needs_reference
    return [task for task in tasks if task.kind in kinds and (needed or task.backward)]


class Speed(NamedTuple):
    """Seconds of micro-batches with as many operations as the pilot's, for a layer and for all that is not layers."""

    flops: float  # with the fewest layers
    layer: float
    rest: float

    @classmethod
    def of(cls, tasks: Sequence[Task], shape: Shape) -> Speed:
        # The first round warmed up.
        seconds = {layers: sum(task.seconds[layers][-1] for task in tasks) for layers in tasks[0].layers}
        few, more = min(seconds), max(seconds)
        layer = seconds[few] / few
        if more > few:  # noise may not make a layer free
            layer = min(max((seconds[more] - seconds[few]) / (more - few), 0.1 * layer), layer)
        return cls(_flops(tasks, shape), layer, seconds[few] - shape.fewest * layer)

    def seconds(self, tasks: Sequence[Task], shape: Shape, layers: Sequence[int]) -> float:
        """Returns the estimated seconds of tasks with each number of layers."""
        return _flops(tasks, shape) / self.flops * sum(self.rest + n * self.layer for n in layers)


def _flops(tasks: Sequence[Task], shape: Shape) -> float:
    return sum(shape.flops(task.work, task.backward, shape.fewest) for task in tasks)


def _affordable(
    trainer: Any, counts: Counts, shape: Shape, kinds: Collection[str], speed: Speed, seconds: float
) -> Timed:
    """Returns the largest share of the rows, then the most layers, that the time and the memory allow.

    A share too small for a tile of :data:`_MAPPED_BYTES` is taken only if the median micro-batch alone, timed once
    after a run to warm up, takes too long as well.

    Args:
        seconds: of a round; there is time for :data:`_ROUNDS`.
    """
    free, depth, fewest = free_bytes(trainer.args.device), shape.sizes.layers, shape.fewest
    # All layers, or two numbers of them, whose difference tells the time of a layer.
    layer_counts = [[depth], *([fewest, depth >> i] for i in range(1, depth.bit_length()) if depth >> i > fewest)]
    choices = [(2.0**-i, layers) for i in range(8) for layers in layer_counts]
    found = functools.cache(lambda share, only_median: _tasks(trainer, counts, share, (), kinds, only_median))
    large = [choice for choice in choices if _tile_bytes(trainer, shape, found(choice[0], False)) >= _MAPPED_BYTES]
    tries = [(*choice, False, seconds) for choice in large]
    tries += [(*choice, True, seconds * _ROUNDS / 2) for choice in large]
    tries += [(*choice, False, seconds) for choice in choices]
    # If one row takes too long, it runs all the same; if it does not fit, with the fewest layers.
    tries += [(*choices[-1], False, float("inf")), (choices[-1][0], [fewest], False, float("inf"))]
    for share, layers, only_median, limit in tries:
        tasks = [replace(task, layers=layers, seconds={}) for task in found(share, only_median)]
        needed = needed_bytes(trainer, shape, layers[-1], tasks)
        if speed.seconds(tasks, shape, layers) <= limit and needed <= free:
            break
    return Timed(share, layers, tasks)


def _tile_bytes(trainer: Any, shape: Shape, tasks: Sequence[Task]) -> int:
    """Returns the bytes of the smallest tile of the imitation's logits on a CPU, 0 for other tasks."""
    device = trainer.args.device
    tokens = [task.work.tokens for task in tasks if task.kind == "peer" and device.type == "cpu"]
    return min((tile_bytes(count, shape.sizes.vocab) for count in tokens), default=0)


def _of_all_layers(task: Task, shape: Shape) -> float:
    """Returns the median seconds of a micro-batch with all layers of the model."""
    medians = {layers: statistics.median(seconds) for layers, seconds in task.seconds.items()}
    most, fewest, depth = max(medians), min(medians), shape.sizes.layers
    if most == fewest:  # the layers that did not run take as long for each operation as what did
        return medians[most] * shape.flops(task.work, task.backward) / shape.flops(task.work, task.backward, most)
    return medians[most] + (depth - most) * (medians[most] - medians[fewest]) / (most - fewest)


# --- Memory ---


def needed_bytes(trainer: Any, shape: Shape, layers: int, tasks: Sequence[Task]) -> float:
    """Returns a rough upper bound of the bytes that the micro-batches take with so many layers."""
    model, args = trainer.packed.model, trainer.args
    state = state_bytes(truncated(model, layers)[0], args)
    held = state["weights"] + most_moments(state) + state["gradients"]
    # The inputs of all products of a token: about three values for each row of the layers' matrices.
    values = 3 * shape.sizes.layer_parameters / shape.sizes.layers / shape.sizes.hidden
    kept = values + layers * shape.sizes.hidden if shape.checkpointing else layers * values
    tokens = max(task.work.tokens for task in tasks)
    return held + 4 * tokens * kept + peer_tile_bytes(tokens, shape.sizes.vocab, args.device)


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that a calibration may take on a device."""
    return _SHARE_OF_MEMORY * free_memory(device)


def trained_parameters(model: nn.Module) -> int:
    """Returns the number of trained values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- Prediction ---


def predict_seconds(trainer: Any, counts: Counts, calibration: Calibration) -> dict[str, float]:
    """Returns the seconds of the parts of a run and of TRL's run at the same settings on the same pairs.

    TRL either runs its reference in every step, or once over the dataset before training; with images in every step.
    """
    shape, rates, images = Shape.of(trainer.packed.model, trainer.args), calibration.rates, calibration.images
    steps = counts.steps * calibration.optimizer
    batches = len(counts.peer_batches)
    seconds = {
        "training": rates["train"].seconds(counts.micro_batches, shape.flops(counts.work, True)) + steps,
        "TRL, training": rates["peer"].seconds(batches, shape.flops(counts.peer, True)) + steps,
    }
    if "reference" in rates:
        live = rates["peer_reference"].seconds(batches, shape.flops(counts.peer, False))
        seconds |= {
            "reference pass": rates["reference"].seconds(0, shape.flops(counts.reference, False)),
            "TRL, reference in every step": live,
            "TRL, reference before training": live * counts.dataset_pairs / counts.pairs,
        }
    if images:
        training = images["read"] + images["train"]
        of_token = {"training": training, "TRL, training": training}
        of_token |= {
            "reference pass": images["read"] + images["encode"],
            "TRL, reference in every step": images["encode"],
        }
        for part in of_token.keys() & seconds.keys():
            work = counts.peer if "TRL" in part else counts.reference if part == "reference pass" else counts.work
            seconds[part] += of_token[part] * work.image_tokens
        seconds.pop("TRL, reference before training", None)
    return seconds


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Returns TRL's seconds as multiples of ours: of the first run, and of later ones, which find the reference cached.

    TRL keeps no log-probs beyond a dataset's own cache, so it runs its reference in every run.
    """
    ours, trl, reference = (seconds.get(part, 0.0) for part in ("training", "TRL, training", "reference pass"))
    if "reference pass" not in seconds:
        return {"no reference": trl / ours}
    return {
        f"{run}, {when}": (trl + seconds[f"TRL, {when}"]) / ours_whole
        for when in ("reference in every step", "reference before training")
        if f"TRL, {when}" in seconds
        for run, ours_whole in (("first run", ours + reference), ("reference cached", ours))
    }
