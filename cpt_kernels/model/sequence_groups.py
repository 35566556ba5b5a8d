"""Runs a packed row on the ranks of a sequence group: which rows of the head are this rank's, and their log-probs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..config import ContrastiveConfig
from ..data.collate import PackedBatch
from ..data.packing import scatter_rounds
from ..errors import UserError
from ..ops.exchange import SequenceGroup, whole_tokens
from ..ops.gather import Rounds
from ..ops.vocab_score import VocabScore

_BALANCE = "load_balancing_loss_func"  # in transformers' modules


def join_group(args: ContrastiveConfig) -> SequenceGroup | None:
    """Returns the group of ``args.sp_size`` consecutive ranks that this process is in; None for groups of one.

    All ranks must call it. The group of a plan, which is of one process, exchanges nothing.
    """
    if args.sp_size == 1:
        return None
    if args.planned is not None:
        return SequenceGroup(None, 0, args.sp_size)
    timeout = timedelta(seconds=args.ddp_timeout)
    process_group, _ = dist.new_subgroups(group_size=args.sp_size, timeout=timeout)
    return SequenceGroup(process_group, dist.get_rank(process_group), args.sp_size)


class OwnRows(NamedTuple):
    """The predictor rows that a rank holds, of the N of a packed row."""

    index: Tensor  # (own rows,) int64, their places among the N
    predictor_index: Tensor  # (own rows,) int64, their places among the rank's hidden rows
    predictor_rounds: Rounds
    targets: Tensor  # (own rows,)
    total: int  # N

    @classmethod
    def of(cls, batch: PackedBatch, group: SequenceGroup) -> OwnRows:
        """Finds a rank's rows on the host: reading indices from a GPU would wait for it."""
        tokens = batch["predictors"]
        own = np.flatnonzero(tokens % group.size == group.rank)
        places = tokens[own] // group.size
        hidden_rows = max(1, group.count(sum(queries for queries, _ in batch["segment_lengths"])))
        device = batch["targets"].device

        def moved(values: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        rounds = [(moved(to), moved(source)) for to, source in scatter_rounds(places, hidden_rows)]
        index = moved(own)
        return cls(index, moved(places), rounds, batch["targets"][index], len(tokens))

    def whole(self, own: VocabScore, group: SequenceGroup) -> VocabScore:
        """Returns log-probs and statistics of all N tokens, from those of every rank's rows.

        They are a few numbers per token, where a hidden row or a row of logits has thousands. All losses, metrics and
        reference log-probs follow from them as they do on one rank.
        """
        logps = whole_tokens(own.logps, self.index, self.total, group)
        names = [name for name, values in zip(own._fields, own) if values is not None and name != "logps"]
        stacked = torch.stack([getattr(own, name).detach().to(logps.dtype) for name in names])
        found = dict(zip(names, whole_tokens(stacked, self.index, self.total, group)))
        if "correct" in found:
            found["correct"] = found["correct"] > 0
        return VocabScore(logps, **found)


@contextlib.contextmanager
def whole_router_logits(model: Any, group: SequenceGroup | None, tokens: int) -> Iterator[None]:
    """Context in which a mixture of experts computes its load-balancing loss from the router logits of all ranks.

    The loss is a product of means over tokens, so it is not the mean of the ranks' losses.

    Args:
        tokens: T, of the whole row.

    Raises:
        UserError: the model computes this loss in another way than by transformers' function.
    """
    if group is None:
        yield
        return
    module: Any = sys.modules[type(model).__module__]
    own = getattr(module, _BALANCE, None)
    if own is None:
        raise UserError(
            f"sp_size={group.size}: {type(model).__name__} computes its load-balancing loss in a way of its own: set"
            " router_aux_loss_coef=0"
        )

    def balance(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, tuple):
            return own(logits, *args, **kwargs)
        index = torch.arange(tokens, device=logits[0].device)[group.own(tokens)][: group.count(tokens)]
        whole = (whole_tokens(each.flatten(0, -2)[: len(index)].t(), index, tokens, group).t() for each in logits)
        return own(tuple(whole), *args, **kwargs)

    setattr(module, _BALANCE, balance)
    try:
        yield
    finally:
        setattr(module, _BALANCE, own)
