"""Arithmetic of a training step, counted from lengths and the model's shape: what a ratio of times should be.

Floating-point operations of forward and backward; p parameters of the layers' matrices, T tokens run, L layers, Hq
heads of size D, A attended (query, key) pairs, R rows of the head, H x V its weight:

    layers      6 p T          (8 p T with gradient checkpointing)
    attention   14 L Hq D A    (18 with): 2 products forward, 5 backward
    head        2 R H V x GEMMs

A trainer that pads runs T = 2 B longest tokens and scores either all of them or completion tokens, with 4 GEMMs; a
packed row with shared prompts runs every prompt and completion once, and its head takes 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen2-shaped model."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 1024
    vocab: int = 32000

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def config(self) -> dict[str, Any]:
        """Keyword arguments of ``transformers.Qwen2Config``."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }


@dataclass(frozen=True)
class Work:
    """What one step runs."""

    tokens: int
    attended: int  # (query, key) pairs
    head_rows: int
    head_gemms: int

    def flops(self, shape: Shape, gradient_checkpointing: bool = False) -> dict[str, float]:
        """Floating-point operations by part, and their ``total``."""
        layers = (8 if gradient_checkpointing else 6) * shape.layer_parameters * self.tokens
        attention = (
            (18 if gradient_checkpointing else 14) * shape.layers * shape.heads * shape.head_size * self.attended
        )
        head = 2 * self.head_rows * shape.hidden * shape.vocab * self.head_gemms
        return {"layers": layers, "attention": attention, "head": head, "total": layers + attention + head}

    def asdict(self) -> dict[str, int]:
        return asdict(self)


Pair = tuple[int, int, int]  # tokens of prompt, chosen, rejected


def padded(pairs: Sequence[Pair], completion_rows_only: bool) -> Work:
    """Right-padded ``[all prompt + chosen; all prompt + rejected]``; the head computes its logits again to go back."""
    longest = max(prompt + max(sides) for prompt, *sides in pairs)
    completions = sum(chosen + rejected for _, chosen, rejected in pairs)
    rows = 2 * len(pairs)
    return Work(
        tokens=rows * longest,
        attended=rows * _causal(longest),
        head_rows=completions if completion_rows_only else rows * (longest - 1),
        head_gemms=4,
    )


def packed(pairs: Sequence[Pair], share_prompts: bool = True) -> Work:
    """Nothing padded; with ``share_prompts`` the prompt once for both completions. The head goes back at once."""
    again = [0 if share_prompts else prompt for prompt, *_ in pairs]  # of the prompt, for the second completion
    completions = sum(chosen + rejected for _, chosen, rejected in pairs)
    second = [
        prompt * rejected + _causal(rejected) if share_prompts else _causal(prompt + rejected)
        for prompt, _, rejected in pairs
    ]
    return Work(
        tokens=sum(sum(pair) for pair in pairs) + sum(again),
        attended=sum(_causal(prompt + chosen) for prompt, chosen, _ in pairs) + sum(second),
        head_rows=completions,
        head_gemms=3,
    )


def _causal(length: int) -> int:
    return length * (length + 1) // 2
