"""How many tokens a micro-batch may have, so that a training step fits into the memory of this device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ..data.collate import PackedCollator
from ..data.loader import micro_batch_tokens
from ..errors import UserError
from ..losses import Loss
from ..model.packed_model import PackedModel, base_model
from .engines import most_moments, state_bytes
from .memory import StepMemory, measure_step
from .model_sizes import layer_stack

SHARE = 0.9  # of the free memory that a step may take; the rest is for fragments and what operations need inside
MOST = 2**17  # a search for larger budgets would take minutes where a small model could take all rows at once
_DEEP, _FEW = 16, 2  # layers of a model that is measured by some of its layers, and how many these are, or twice that
_CLOSE = 0.02  # a budget this close to the largest one is good enough
_CGROUPS = Path("/sys/fs/cgroup")
# Files of a cgroup, by version: limit, usage, and the line of memory.stat with the files that can be dropped.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this process can still allocate on an accelerator, or on a CPU in main memory."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_free_in_cgroups()])
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def _free_in_cgroups() -> list[int]:
    """Returns the bytes that are left in each control group of this process that limits memory."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        # Within a container the path may be that of the host; the container's own group is then the root.
        for folder in {root, *(root / path.lstrip("/")).parents, root / path.lstrip("/")}:
            for limit, usage, droppable in _CGROUP_FILES:
                if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()) != "max":
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    found.append(int(text) - int((folder / usage).read_text()) + int(stat.get(droppable, 0)))
    return found


def fill_batch(tokens: NDArray[np.int64], sequences: NDArray[np.int64] | None, budget: int) -> list[int]:
    """Returns rows that fill a micro-batch, the longest first: no other has attention over longer sequences.

    Args:
        tokens: (rows,) tokens of each row; with ``sequences`` those of its longest sequence.
        sequences: (rows,) number of sequences of each row, if they run in padded rows.
    """
    chosen: list[int] = []
    used = width = 0
    for row in np.argsort(-tokens, kind="stable").tolist():
        width = width or int(tokens[row])  # padded rows are as wide as the longest
        size = int(tokens[row]) if sequences is None else width * int(sequences[row])
        if used + size <= budget:
            chosen.append(row)
            used += size
    return chosen


def largest_budget(peak_of: Callable[[int], int], limit: int, smallest: int, largest: int) -> int | None:
    """Returns the largest budget in tokens whose peak is within ``limit``, to 2 %; None if the smallest is not.

    Memory grows nearly linearly, so a line through the last two budgets leads to the next one.

    Args:
        peak_of: budget -> bytes.
    """
    peaks = {smallest: peak_of(smallest)}
    if peaks[smallest] > limit:
        return None
    fits, fails = smallest, largest + 1
    following = 2 * smallest
    while fails > fits * (1 + _CLOSE) and fails > fits + 1:
        following = min(max(following, int(fits * (1 + _CLOSE)), fits + 1), fails - 1)
        peaks[following] = peak_of(following)
        before, now = fits, following
        if peaks[now] <= limit:
            fits = now
        else:
            fails = now
        slope = (peaks[now] - peaks[before]) / (now - before)
        following = largest if slope <= 0 else int(fits + (limit - peaks[fits]) / slope)
        following = min(following, 4 * fits)  # far ahead the line may be wrong, and its batch takes long to run
    return fits


# --- A run ---


class PlannedRun(Protocol):
    """What the memory of a run depends on; a ``ContrastiveTrainer``, whose model may have shapes only."""

    packed: PackedModel
    collator: PackedCollator
    loss: Loss
    args: Any
    train_dataset: Any


def measure_rows(run: PlannedRun, rows: Sequence[int], *, checkpointing: bool, accumulates: bool) -> StepMemory | None:
    """Returns the memory of a micro-batch of rows, see :func:`.memory.measure_step`.

    Memory is linear in the number of equal layers, so that of a deep model follows from few layers. With ``sp_size`` it
    is that of a process, which holds a part of the activations.
    """

    def measure(layers: int | None) -> StepMemory | None:
        batch = run.collator(run.train_dataset.select(rows).to_list())
        how = {"checkpointing": checkpointing, "accumulates": accumulates}
        return measure_step(run.packed, batch, run.args, run.loss, layers=layers, **how)

    stack = layer_stack(base_model(run.packed.model))
    if stack is None or len(stack) < _DEEP:
        step = measure(None)
    else:
        step = measure(_FEW)
        more = None if step is None else measure(2 * _FEW)
        step = None if step is None or more is None else step.extended(more, (len(stack) - _FEW) / _FEW, accumulates)
    return step if step is None or run.args.sp_size == 1 else step.cut(run.args.sp_size)


def expected_memory(run: PlannedRun, rows: Sequence[int]) -> dict[str, Any]:
    """Returns the bytes of a run by part, with and without activation checkpointing, for its largest micro-batch.

    ``peak`` is the most that is allocated at a time; None if the forward depends on values, or if the optimizer's
    state is not known.
    """
    args = run.args
    state = state_bytes(run.packed.model, args)
    found: dict[str, Any] = {"checkpointing": args.gradient_checkpointing}
    for name, checkpointing in (("with checkpointing", True), ("without checkpointing", False)):
        step = measure_rows(run, rows, checkpointing=checkpointing, accumulates=args.gradient_accumulation_steps > 1)
        if step is None:
            return found | {"with checkpointing": None, "without checkpointing": None}
        known = state["optimizer"] is not None
        peak = state["weights"] + state["optimizer"] + state.get("engine", 0) + step.peak if known else None
        found[name] = {"activations": step.activations, "head": step.head, "peak": peak}
    return found


def without_checkpointing(run: PlannedRun, free: int, has_weights: bool) -> tuple[int, int] | None:
    """Returns the bytes of the largest micro-batch without activation checkpointing, and the bytes that it may take.

    No micro-batch has longer rows than this one, in whatever order they come. None if the forward depends on values.

    Args:
        free, has_weights: as for :func:`find_budget`.
    """
    args = run.args
    tokens, sequences = micro_batch_tokens(run.train_dataset, run.collator)
    if args.max_tokens_per_batch is None:
        rows = np.argsort(-tokens, kind="stable")[: args.train_batch_size].tolist()
    else:
        rows = fill_batch(tokens, sequences, args.max_tokens_per_batch)
    step = measure_rows(run, rows, checkpointing=False, accumulates=False)
    if step is None:
        return None
    # An upper bound for the second micro-batch of a step. To measure that one would take twice as long.
    accumulated = state_bytes(run.packed.model, args)["gradients"] if args.gradient_accumulation_steps > 1 else 0
    return step.peak + accumulated, _room(run, free, has_weights)


def _room(run: PlannedRun, free: int, has_weights: bool) -> int:
    """Returns the bytes that a micro-batch with its gradients may take beside all else that training allocates."""
    state = state_bytes(run.packed.model, run.args)
    return int(SHARE * free) - most_moments(state) - state.get("engine", 0) - (0 if has_weights else state["weights"])


def find_budget(run: PlannedRun, free: int, has_weights: bool, most: int | None = None) -> int | None:
    """Returns the largest ``max_tokens_per_batch`` with which a step of several micro-batches fits.

    Args:
        free: bytes that can be allocated; :data:`SHARE` of them are used.
        has_weights: the model's weights are allocated already.
        most: the budget that no micro-batch exceeds; default the tokens of all rows, at most :data:`MOST`.

    Returns:
        None if not even a micro-batch of the longest row fits.

    Raises:
        UserError: the memory of this model cannot be predicted.
    """
    args, limit = run.args, _room(run, free, has_weights)
    tokens, sequences = micro_batch_tokens(run.train_dataset, run.collator)
    sizes = tokens if sequences is None else tokens * sequences

    @functools.cache
    def peak_of_rows(rows: tuple[int, ...]) -> int:
        step = measure_rows(run, rows, checkpointing=args.gradient_checkpointing, accumulates=True)
        if step is None:
            raise UserError(
                f"the memory of {type(base_model(run.packed.model)).__name__} cannot be predicted, because its forward"
                " depends on values: set max_tokens_per_batch to a number"
            )
        return step.peak

    def peak_of(budget: int) -> int:
        return peak_of_rows(tuple(fill_batch(tokens, sequences, budget)))

    longest = int(sizes.max())
    return largest_budget(peak_of, limit, longest, max(longest, most or min(int(sizes.sum()), MOST)))
