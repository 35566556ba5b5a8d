"""Arithmetic of a training step, counted from lengths and the model's shape: what a ratio of times should be.

Floating-point operations of forward and backward; p parameters of the layers' matrices, T tokens run, L layers, Hq
heads of size D, A attended (query, key) pairs, R rows of the head, H x V its weight:

    layers      6 p T          (4 p T where only adapters are trained; 2 p T more with gradient checkpointing)
    attention   14 L Hq D A    (4 L Hq D A more): 2 products forward, 5 backward
    head        2 R H V x GEMMs

A trainer that pads runs T = 2 B longest tokens and scores either all of them or completion tokens. A packed row runs
every completion once and every prompt once for each or, shared, once. A head that computes its logits again to go back
takes 4 GEMMs, ours 3; where its weight is frozen, one less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cpt_kernels.data.packing import GroupLengths


@dataclass(frozen=True)
class Shape:
    """A Qwen2-shaped model."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 1024
    vocab: int = 32000
    tied: bool = True  # the head's weight is the embeddings'

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        return self.layer_parameters + (1 if self.tied else 2) * self.hidden * self.vocab

    def fitted(self, limit: float) -> Shape:
        """The same with as many of its layers as ``limit`` parameters allow, at least one."""
        a_layer = self.layer_parameters / self.layers
        rest = self.parameters - self.layer_parameters
        if rest + a_layer > limit:
            raise ValueError(
                f"one layer and the embeddings have {(rest + a_layer) / 1e6:.0f} million parameters, and there is"
                f" memory for {limit / 1e6:.0f} million a contestant: take a smaller --shape, or fewer --peers"
            )
        return replace(self, layers=min(self.layers, int((limit - rest) / a_layer)))

    def config(self) -> dict[str, Any]:
        """Keyword arguments of ``transformers.Qwen2Config``."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": self.tied,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }


# Sizes of published models; "small" is what two cores train in seconds.
SHAPES = {
    "small": Shape(),
    "qwen-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256),
    "qwen-3b": Shape(2048, 36, 16, 2, 11008, 151936),
    "llama-8b": Shape(4096, 32, 32, 8, 14336, 128256, tied=False),
}


@dataclass(frozen=True)
class Work:
    """What one step runs."""

    tokens: int
    attended: int  # (query, key) pairs
    head_rows: int
    head_gemms: int  # where its weight is trained

    def flops(self, shape: Shape, gradient_checkpointing: bool = False, adapters: bool = False) -> dict[str, float]:
        """Floating-point operations by part, and their ``total``; with ``adapters`` all other weights are frozen."""
        again = 1 if gradient_checkpointing else 0
        layers = ((4 if adapters else 6) + 2 * again) * shape.layer_parameters * self.tokens
        attention = (14 + 4 * again) * shape.layers * shape.heads * shape.head_size * self.attended
        head = 2 * self.head_rows * shape.hidden * shape.vocab * (self.head_gemms - adapters)
        return {"layers": layers, "attention": attention, "head": head, "total": layers + attention + head}

    def asdict(self) -> dict[str, int]:
        return asdict(self)


Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of prompt, chosen, rejected


def padded(pairs: Sequence[Pair], completion_rows_only: bool, head_gemms: int = 4) -> Work:
    """Right-padded ``[all prompt + chosen; all prompt + rejected]``."""
    longest = max(len(prompt) + max(map(len, sides)) for prompt, *sides in pairs)
    completions = sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)
    rows = 2 * len(pairs)
    return Work(
        tokens=rows * longest,
        attended=rows * _causal(longest),
        head_rows=completions if completion_rows_only else rows * (longest - 1),
        head_gemms=head_gemms,
    )


def packed(pairs: Iterable[Pair], share_prompts: bool = True) -> Work:
    """Nothing padded, a completion once for all pairs of its prompt; with ``share_prompts`` the prompt, too."""
    groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for prompt, *sides in pairs:
        groups.setdefault(tuple(prompt), set()).update(map(tuple, sides))
    tokens = attended = rows = 0
    for prompt, completions in groups.items():
        group = GroupLengths(len(prompt), [len(completion) for completion in completions], share_prompts)
        tokens += group.tokens()
        attended += attended_pairs(group)
        rows += sum(group.completions)
    return Work(tokens, attended, rows, head_gemms=3)


def attended_pairs(group: GroupLengths) -> int:
    """(query, key) pairs of a prompt and its completions."""
    prompts = 1 if group.share else len(group.completions)
    behind = sum(group.prompt * length + _causal(length) for length in group.completions)
    return prompts * _causal(group.prompt) + behind


def _causal(length: int) -> int:
    return length * (length + 1) // 2
