"""``max_tokens_per_batch=auto``: how many tokens a micro-batch may have, by an estimate and a probe before training.

The rows of an optimizer step stay those of ``per_device_train_batch_size`` and ``gradient_accumulation_steps``, in the
same order. They fill as few micro-batches as fit into memory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset

from ..data.loader import StepBudget, micro_batch_tokens
from ..errors import UserError
from ..model.loading import is_quantised
from ..planning.budget import find_budget, free_memory
from ..planning.engines import most_moments, state_bytes
from ..planning.memory import set_checkpointing
from .resume import read_record
from .saving import log_on_main

_SHRINK = 0.8  # of a budget whose probe ran out of memory


def unpredictable(trainer: Any) -> str | None:
    """Returns why the memory of a run cannot be predicted, as the end of a sentence; None if it can be."""
    engine, planned = trainer.accelerator.distributed_type, trainer.args.planned
    if trainer.args.sp_size > 1:
        return "does not know the memory of rows that sp_size cuts"
    if not isinstance(trainer.train_dataset, Dataset):
        return "needs the lengths of all rows, and a stream does not tell them"
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return f"does not know the memory of weights that {engine.value} shards"
    if planned is not None and planned.engine != "DDP":
        return f"does not know the memory of weights that {planned.engine} shards"
    return "does not know the memory of quantized layers" if is_quantised(trainer.packed.model) else None


def check_can_choose(trainer: Any) -> None:
    """Raises UserError if the memory of a run cannot be predicted: of a stream, of sharded or quantized weights."""
    if reason := unpredictable(trainer):
        raise UserError(f"max_tokens_per_batch=auto {reason}: set a number of tokens")


def rank_memory(args: Any) -> int:
    """Returns the bytes that this process can still allocate on its device."""
    free = free_memory(args.device)
    if args.device.type == "cpu":  # the processes of a machine share its memory
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    return free


@contextmanager
def chosen_budget(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """Context of a training run with ``max_tokens_per_batch=auto``, in which ``trainer.budget`` is set.

    ``gradient_accumulation_steps`` is the number of micro-batches of a step there. A run that resumes keeps the budget
    that its checkpoint records.
    """
    args = trainer.args
    if not args.finds_budget:
        yield
        return
    given = args.gradient_accumulation_steps
    step_rows = args.data_ranks * given * trainer._train_batch_size
    saved = None if checkpoint is None else (read_record(Path(checkpoint)) or {}).get("budget")
    try:
        if saved is None:
            _choose_tokens(trainer, step_rows, given * trainer._train_batch_size)
        else:
            _use(trainer, StepBudget(saved, step_rows))
        micro_batches = args.gradient_accumulation_steps
        how = "chosen for this device" if saved is None else "as in the checkpoint"
        line = f"max_tokens_per_batch=auto: {trainer.budget.tokens} tokens, {how}; a step has {step_rows} rows in"
        log_on_main([f"{line} {micro_batches} micro-batch{'es' if micro_batches > 1 else ''} on each device"])
        yield
    finally:
        trainer.budget, args.gradient_accumulation_steps = None, given


def _use(trainer: Any, budget: StepBudget) -> Any:
    """Sets the budget, and the micro-batches of a step that it takes; returns the loader."""
    trainer.budget = budget
    loader = trainer._loader(trainer.train_dataset, training=True)
    trainer.args.gradient_accumulation_steps = loader.batch_sampler.micro_batches
    return loader


def _choose_tokens(trainer: Any, step_rows: int, rank_rows: int) -> None:
    """Chooses the budget that the estimate permits, and lowers it until a probe of its largest micro-batch runs."""
    args = trainer.args
    tokens, sequences = micro_batch_tokens(trainer.train_dataset, trainer.collator)
    sizes = tokens if sequences is None else tokens * sequences
    longest, most = int(sizes.max()), int(np.sort(sizes)[-rank_rows:].sum())
    estimate = find_budget(trainer, rank_memory(args), has_weights=True, most=most) or longest
    budget = min(gather_object([estimate]))
    while True:
        loader = _use(trainer, StepBudget(budget, step_rows))
        if all(gather_object([_fits(trainer, loader)])):
            return
        if budget == longest:
            raise UserError(
                f"out of memory: the longest row has {longest} tokens, and a micro-batch of it alone does not fit;"
                " lower max_length, set gradient_checkpointing=true, or train an adapter"
            )
        smaller = max(longest, int(_SHRINK * budget))
        log_on_main([f"max_tokens_per_batch=auto: {budget} tokens do not fit into memory, trying {smaller}"])
        budget = smaller


def _fits(trainer: Any, loader: Any) -> bool:
    """Runs forward and backward of the largest micro-batch of all ranks; returns whether memory sufficed.

    Gradients are cleared afterwards, and random numbers are those that they would have been without this.
    """
    sampler, model, args = loader.batch_sampler, trainer.model, trainer.args
    rows = max(sampler._epoch(0), key=lambda rows: _size(sampler, rows))
    if args.gradient_checkpointing:
        set_checkpointing(model, args, True)
    model.train()
    state = state_bytes(trainer.packed.model, args)
    devices = [args.device] if args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            reserved = torch.empty(most_moments(state), dtype=torch.uint8, device=args.device)  # for the optimizer
            batch = loader.collate_fn(loader.dataset.__getitems__(rows))
            for _ in range(min(2, args.gradient_accumulation_steps)):  # the second has gradients beside it
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
                loss.backward()
            del reserved, loss
        return True
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        trainer._reset_counts()
        gc.collect()
        if args.device.type != "cpu":
            torch.get_device_module(args.device).empty_cache()


def _size(sampler: Any, rows: list[int]) -> int:
    tokens = sampler.tokens[rows]
    if not rows or sampler.sequences is None:
        return int(tokens.sum())
    return int(tokens.max() * sampler.sequences[rows].sum())
