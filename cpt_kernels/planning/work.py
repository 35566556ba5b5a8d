"""Counts the operations of a training step from lengths and the model's shape, to predict ratios of times.

Floating-point operations of forward and backward, for p parameters in the layers' matrices, T tokens run, L layers with
attention, Hq heads of dimension D, A attended (query, key) pairs, R head rows and a head weight of H x V:

    layers      6 p T          4 p T if only adapters are trained; gradient checkpointing adds 2 p T
    attention   14 L Hq D A    2 matrix products forward, 5 backward; gradient checkpointing adds 4 L Hq D A
    head        2 R H V x GEMMs
    images      F I            for I tokens of images that are encoded, with F of a forward; gradients add 2 F I, those
                               of adapters alone F I

A trainer that pads B pairs runs T = 2 B x longest tokens; its head reads either all of them or completion rows only. A
packed row runs every completion once, and a prompt once per completion or, if shared, once. A head that recomputes
logits in the backward takes 4 GEMMs, ours takes 3; a frozen head weight saves one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..data.packing import GroupLengths

if TYPE_CHECKING:
    from .model_sizes import ModelSizes


@dataclass(frozen=True)
class Work:
    """The work of one step."""

    tokens: int
    attended: int  # (query, key) pairs
    head_rows: int
    head_gemms: int  # matrix products of the head when its weight is trained
    images: int = 0  # how often the vision tower encodes an image
    image_tokens: float = 0  # tokens of these images

    def flops(
        self, shape: ModelSizes, gradient_checkpointing: bool = False, adapters: bool = False
    ) -> dict[str, float]:
        """Returns floating-point operations by part and their ``total``. With ``adapters``, only those are trained."""
        again = 1 if gradient_checkpointing else 0
        layers = ((4 if adapters else 6) + 2 * again) * shape.layer_parameters * self.tokens
        attention = (14 + 4 * again) * shape.attention_layers * shape.heads * shape.head_size * self.attended
        head = 2 * self.head_rows * shape.hidden * shape.vocab * (self.head_gemms - adapters)
        parts = {"layers": layers, "attention": attention, "head": head}
        if self.image_tokens:
            passes = 1 + shape.image_backward + again * (shape.image_backward > 0)
            parts["images"] = passes * shape.image_flops * self.image_tokens
        return {**parts, "total": sum(parts.values())}

    def forward_flops(self, shape: ModelSizes) -> dict[str, float]:
        """Returns floating-point operations of a forward alone by part, and their ``total``."""
        layers = 2 * shape.layer_parameters * self.tokens
        attention = 4 * shape.attention_layers * shape.heads * shape.head_size * self.attended
        head = 2 * self.head_rows * shape.hidden * shape.vocab
        parts = {"layers": layers, "attention": attention, "head": head}
        if self.image_tokens:
            parts["images"] = shape.image_flops * self.image_tokens
        return {**parts, "total": sum(parts.values())}

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.head_rows + other.head_rows,
            self.head_gemms,
            self.images + other.images,
            self.image_tokens + other.image_tokens,
        )

    def asdict(self) -> dict[str, float]:
        return asdict(self)


Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of prompt, chosen, rejected


def padded(pairs: Sequence[Pair], completion_rows_only: bool, head_gemms: int = 4) -> Work:
    """Returns the work of one batch with all prompt + chosen above all prompt + rejected, right-padded."""
    longest = max(len(prompt) + max(map(len, sides)) for prompt, *sides in pairs)
    completions = sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)
    return padded_sequences(2 * len(pairs), longest, completions, completion_rows_only, head_gemms)


def padded_sequences(
    rows: int, longest: int, completions: int, completion_rows_only: bool = True, head_gemms: int = 4
) -> Work:
    """Returns the work of ``rows`` sequences that are padded to ``longest`` tokens and hold ``completions`` tokens."""
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
    return packed_groups(
        GroupLengths(len(prompt), [len(completion) for completion in completions], share_prompts)
        for prompt, completions in groups.items()
    )


def packed_groups(groups: Iterable[GroupLengths]) -> Work:
    """Returns the work of packed rows of prompt groups, whose completions are all different."""
    tokens = attended = rows = 0
    for group in groups:
        tokens += group.tokens()
        attended += attended_pairs(group)
        rows += sum(group.completions)
    return Work(tokens, attended, rows, head_gemms=3)


def packed_row(segments: Sequence[tuple[int, int]], head_rows: int) -> Work:
    """Returns the work of a packed row with segments of (queries, keys)."""
    attended = sum(queries * (keys - queries) + _causal(queries) for queries, keys in segments)
    return Work(sum(queries for queries, _ in segments), attended, head_rows, head_gemms=3)


def attended_pairs(group: GroupLengths) -> int:
    """Returns the number of attended (query, key) pairs of a prompt group."""
    prompts = 1 if group.share else len(group.completions)
    completions = sum(group.prompt * length + _causal(length) for length in group.completions)
    return prompts * _causal(group.prompt) + completions


def _causal(length: int) -> int:
    """Returns the number of (query, key) pairs in causal attention over ``length`` tokens."""
    return length * (length + 1) // 2
