"""Contrastive post-training of language models, made fast: packed prompt groups, a head that consumes
logits tile by tile, without storing them, and a cached reference.

The names below are imported when they are first used, so that kernels and losses need torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import ContrastiveConfig
    from .losses import Loss, PairLogps, build_loss, user_loss
    from .model.packed_model import PackedModel
    from .ops.attention import AttentionLayout, shared_prompt_attention
    from .ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss
    from .ops.pair_loss import pair_loss
    from .ops.vocab_score import vocab_score
    from .trainer import ContrastiveTrainer

    DPOConfig, DPOTrainer = ContrastiveConfig, ContrastiveTrainer

_MODULES = {
    "AttentionLayout": "ops.attention",
    "ContrastiveConfig": "config",
    "ContrastiveTrainer": "trainer",
    "HeadOptions": "ops.linear_preference",
    "Loss": "losses",
    "PackedModel": "model.packed_model",
    "PairLogps": "losses",
    "Pairs": "ops.linear_preference",
    "build_loss": "losses",
    "linear_logprobs": "ops.linear_preference",
    "linear_preference_loss": "ops.linear_preference",
    "pair_loss": "ops.pair_loss",
    "shared_prompt_attention": "ops.attention",
    "user_loss": "losses",
    "vocab_score": "ops.vocab_score",
}
# For scripts written for TRL: change the import and nothing else.
_ALIASES = {"DPOConfig": "ContrastiveConfig", "DPOTrainer": "ContrastiveTrainer"}

__all__ = [
    "AttentionLayout",
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "DPOConfig",
    "DPOTrainer",
    "HeadOptions",
    "Loss",
    "PackedModel",
    "PairLogps",
    "Pairs",
    "build_loss",
    "linear_logprobs",
    "linear_preference_loss",
    "pair_loss",
    "shared_prompt_attention",
    "user_loss",
    "vocab_score",
]


def __getattr__(name: str):
    target = _ALIASES.get(name, name)
    if target not in _MODULES:
        raise AttributeError(f"module 'cpt_kernels' has no attribute '{name}'")
    return getattr(import_module(f".{_MODULES[target]}", __name__), target)
