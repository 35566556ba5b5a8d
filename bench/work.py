"""Counts the operations of a training step from lengths and the model's shape, to predict ratios of times.

Floating-point operations of forward and backward, for p parameters in the layers' matrices, T tokens run, L layers, Hq
heads of dimension D, A attended (query, key) pairs, R head rows and a head weight of H x V:

    layers      6 p T          4 p T if only adapters are trained; gradient checkpointing adds 2 p T
    attention   14 L Hq D A    2 matrix products forward, 5 backward; gradient checkpointing adds 4 L Hq D A
    head        2 R H V x GEMMs

A trainer that pads B pairs runs T = 2 B x longest tokens; its head reads either all of them or completion rows only. A
packed row runs every completion once, and a prompt once per completion or, if shared, once. A head that recomputes
logits in the backward takes 4 GEMMs, ours takes 3; a frozen head weight saves one.
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
    tied: bool = True  # head and embeddings share one weight

    @property
    def head_size(self) -> int:
        """The dimension of an attention head."""
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """The number of parameters in the matrices of all layers."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """The number of parameters in all matrices, embeddings and head included."""
        return self.layer_parameters + (1 if self.tied else 2) * self.hidden * self.vocab

    def fitted(self, limit: float) -> Shape:
        """Returns the shape with as many of its layers as ``limit`` parameters allow.

        Raises:
            ValueError: Not even one layer fits.
        """
        a_layer = self.layer_parameters / self.layers
        rest = self.parameters - self.layer_parameters
        if rest + a_layer > limit:
            raise ValueError(
                f"one layer and the embeddings have {(rest + a_layer) / 1e6:.0f} million parameters, but the"
                f" memory suffices for {limit / 1e6:.0f} million per contestant: use a smaller --shape or fewer --peers"
            )
        return replace(self, layers=min(self.layers, int((limit - rest) / a_layer)))

    def config(self) -> dict[str, Any]:
        """Returns the keyword arguments of ``transformers.Qwen2Config``."""
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


# Sizes of published models. Two cores train "small" in seconds.
SHAPES = {
    "small": Shape(),
    "qwen-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256),
    "qwen-3b": Shape(2048, 36, 16, 2, 11008, 151936),
    "llama-8b": Shape(4096, 32, 32, 8, 14336, 128256, tied=False),
}


@dataclass(frozen=True)
class Work:
    """The work of one step."""

    tokens: int
    attended: int  # (query, key) pairs
    head_rows: int
    head_gemms: int  # matrix products of the head when its weight is trained

    def flops(self, shape: Shape, gradient_checkpointing: bool = False, adapters: bool = False) -> dict[str, float]:
        """Returns floating-point operations by part and their ``total``. With ``adapters``, only those are trained."""
        again = 1 if gradient_checkpointing else 0
        layers = ((4 if adapters else 6) + 2 * again) * shape.layer_parameters * self.tokens
        attention = (14 + 4 * again) * shape.layers * shape.heads * shape.head_size * self.attended
        head = 2 * self.head_rows * shape.hidden * shape.vocab * (self.head_gemms - adapters)
        return {"layers": layers, "attention": attention, "head": head, "total": layers + attention + head}

    def asdict(self) -> dict[str, int]:
        return asdict(self)


Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of prompt, chosen, rejected


def padded(pairs: Sequence[Pair], completion_rows_only: bool, head_gemms: int = 4) -> Work:
    """Returns the work of one batch with all prompt + chosen above all prompt + rejected, right-padded."""
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
    """Returns the work of packed rows. A completion runs once for all pairs of its prompt.

    With ``share_prompts`` the prompt runs once as well, else once per completion.
    """
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
    """Returns the number of attended (query, key) pairs of a prompt group."""
    prompts = 1 if group.share else len(group.completions)
    completions = sum(group.prompt * length + _causal(length) for length in group.completions)
    return prompts * _causal(group.prompt) + completions


def _causal(length: int) -> int:
    """Returns the number of (query, key) pairs in causal attention over ``length`` tokens."""
    return length * (length + 1) // 2
