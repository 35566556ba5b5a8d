"""``gradient_checkpointing=auto``: activations are recomputed only if a step would not fit into memory otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..planning.budget import without_checkpointing
from ..planning.memory import set_checkpointing
from .resume import read_record
from .saving import log_on_main
from .token_budget import rank_memory, unpredictable


@contextmanager
def chosen_checkpointing(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """Context of a training run, in which ``gradient_checkpointing`` is what ``auto`` chooses.

    A run that resumes keeps the choice that its checkpoint records.
    """
    args = trainer.args
    if not args.chooses_checkpointing:
        yield
        return
    saved = None if checkpoint is None else (read_record(Path(checkpoint)) or {}).get("gradient_checkpointing")
    is_on, reason = _decide(trainer) if saved is None else (saved, "as in the checkpoint")
    log_on_main([f"gradient_checkpointing=auto: {'on' if is_on else 'off'}, {reason}"])
    try:
        args.gradient_checkpointing = is_on
        if not is_on:  # an earlier run of this trainer may have turned it on
            set_checkpointing(trainer.model, args, False)
        yield
    finally:
        args.gradient_checkpointing = True
        args.chooses_checkpointing = True  # setting the option has ended the choice


def _decide(trainer: Any) -> tuple[bool, str]:
    """Returns whether to recompute activations, the same on all ranks, and the reason."""
    if reason := unpredictable(trainer):
        return True, f"because auto {reason}"
    found = without_checkpointing(trainer, rank_memory(trainer.args), has_weights=True)
    if found is None:
        return True, "because the forward of this model depends on values, so its memory cannot be predicted"
    needed, room = min(gather_object([found]), key=lambda each: each[1] - each[0])
    sizes = f"the largest micro-batch needs {needed / 2**30:.3g} GiB without it, and {room / 2**30:.3g} GiB are free"
    return needed > room, sizes
