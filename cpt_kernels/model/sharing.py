"""Chooses what the sequences of a packed row share, given a model and the options of a run."""

from __future__ import annotations

import logging
from typing import Any

from ..config import ContrastiveConfig
from ..data.trees import MINIMUM_SHARED
from ..errors import UserError
from .packed_model import PackedModel, base_model

logger = logging.getLogger(__name__)


def sharing_options(model: PackedModel, args: ContrastiveConfig, *, training: bool = True) -> dict[str, Any]:
    """Returns ``share_prompts`` and ``minimum_shared`` of :class:`PackedCollator`.

    Raises:
        UserError: the options ask for shared tokens, and dropout or NEFTune noise would be correlated; or they ask for
            trees, and the model does not run them exactly.
    """
    how, name = args.sharing, type(base_model(model.model)).__name__
    noisy = training and model.noisy
    random = noisy or (training and args.neftune_noise_alpha is not None)
    given = f"sharing={how}" if args.share_prompts is None else f"share_prompts={args.share_prompts}"
    if how in ("tree", "prompt") and random:
        raise UserError(
            f"{given} with dropout, NEFTune noise, or a router or adapter that samples, would give all completions of a"
            " prompt the same noise: set disable_dropout=true and leave out neftune_noise_alpha, or set sharing=none"
        )
    if how == "tree" and not model.trees:
        why = "each completion runs in a padded row" if model.padded else model.tree_failure
        raise UserError(f"sharing=tree: {name} does not run trees of shared beginnings ({why}): set sharing=auto")
    is_first = args.process_index == 0
    if how == "auto" and noisy and not model.padded and is_first:
        missed = ", which disable_dropout=true does not reach" if args.disable_dropout else ""
        logger.warning(
            f"every completion runs its own copy of the prompt: {name} adds noise in training mode{missed}, and"
            " completions that share a prompt would have the same noise"
        )
    shares = how != "none" and not random and not model.padded
    if shares and how == "auto" and model.tree_failure and is_first:
        logger.warning(f"{name} shares prompts and no longer beginnings: {model.tree_failure}")
    minimum = {"tree": 1, "auto": MINIMUM_SHARED}.get(how) if shares and model.trees else None
    return {"share_prompts": shares, "minimum_shared": minimum}
