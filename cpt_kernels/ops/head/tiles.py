"""Options and pairs of the head, and how its rows are cut into tiles that hold whole pair blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from ...losses import Loss, PairLogps
from ..gather import TokenMap, segment_sum, token_values
from ..pair_loss import check_pairs
from ..vocab_score import TileOptions, VocabScore

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of the head's operands and products

# Default rows of a tile on a CPU. With fewer rows matrix products are slower, and more pair blocks are larger than a
# tile, which costs a fourth product; more rows only take memory.
_CPU_ROWS = 512

# For so few rows a CPU computes the transposed product, in blocks of columns that stay in the cache: its sgemm is up to
# 1.8 times as fast with few columns as with few rows on the machine of bench/NOTES.md.
_CPU_FEW_ROWS, _CPU_COLUMN_BLOCK = 128, 2048


@dataclass(frozen=True)
class HeadOptions:
    """Options of the head: transformation of logits, tile size, dtype, backend.

    Attributes:
        logit_scale, softcap, vocab_size: see :func:`cpt_kernels.vocab_score`.
        statistics: also return entropy, mean logit, top-1 and log sum p^2 of every token.
        memory_mb: budget of the tile of logits, in MiB; default 1024 on an accelerator, and 512 rows on a CPU. One tile
            of all rows may exceed it where that takes less memory than several tiles and the sum of their gradients.
        compute_dtype: dtype of the matrix products; default autocast's dtype where it is on, else that of the operands.
        backend: of ``vocab_score`` and ``pair_loss``, see ``ops.backends``. An operator whose table lacks the name
            takes its ``auto`` choice, if the other operator has it.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    statistics: bool = False
    memory_mb: float | None = None
    compute_dtype: torch.dtype | None = None
    backend: str = "auto"

    def check(self, columns: int) -> None:
        """Checks the values for a weight of this many rows.

        Raises:
            UserError: a value is out of its range.
        """
        if self.vocab_size is not None and not 0 < self.vocab_size <= columns:
            raise UserError(f"vocab_size={self.vocab_size} is not within the {columns} rows of weight")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise UserError(f"softcap={self.softcap}: must be positive and finite, or None for no cap")
        if not math.isfinite(self.logit_scale):
            raise UserError(f"logit_scale={self.logit_scale}: must be finite")
        if self.memory_mb is not None and not self.memory_mb > 0:
            raise UserError(f"memory_mb={self.memory_mb}: must be positive, or None for the default")

    def tile_rows(self, hidden: Tensor, weight: Tensor) -> int:
        """Rows of a tile of logits within the budget, at least 1."""
        if self.memory_mb is None and hidden.device.type == "cpu":
            return _CPU_ROWS
        budget = self.memory_mb or 1024
        itemsize = (self.compute_dtype or hidden.dtype).itemsize
        return max(1, int(budget * 2**20) // (row_stride(weight.shape[0], hidden.device) * itemsize))

    def of_tile(self, bias: Tensor | None, score: bool) -> TileOptions:
        """The options of ``vocab_score`` for a tile."""
        return TileOptions(bias, self.logit_scale, self.softcap, self.vocab_size, self.statistics, score)


@dataclass(frozen=True)
class Pairs:
    """Which completions the N rows form, and which of them are paired; fields as in ``data.collate.PackedBatch``.

    Completions consist of M tokens. Without ``token_map`` they are the N rows.
    """

    cu_completions: Tensor  # (S+1,) int64, from 0 to M
    completion_lengths: Sequence[int]  # S, the differences of cu_completions on the host
    chosen: Tensor  # (P,) int64
    rejected: Tensor | None  # (P,)
    sft_targets: Tensor  # (P,)
    # (completions, pairs) per block: the smallest consecutive completions containing both sides of all their pairs
    pair_blocks: Sequence[tuple[int, int]]
    ref_logps: Tensor | None = None  # (S,) reference log-probs, sums of weighted tokens like the policy's
    tokens_per_pair: Tensor | float = 1.0
    ref_token_logps: Tensor | None = None  # (M,) times the tokens' weights, for losses with needs_tails
    gaps: Tensor | None = None  # (P,) for losses with needs_gap
    hard: Tensor | None = None  # (P,) bool, for losses with needs_hard; None: no pair is hard
    token_map: TokenMap | None = None  # the row of each of the M tokens; completions of one row are in one block
    prediction_lengths: Sequence[int] | None = None  # S, rows of each completion that none before it has; with the map
    weights: Tensor | None = None  # (P,) fp32, factors of the pairs' losses; None: 1 each
    token_weights: Tensor | None = None  # (M,) fp32 above 0, factors of the tokens' log-probs; None: 1 each

    @property
    def row_lengths(self) -> Sequence[int]:
        """Rows of each completion that none before it has."""
        return self.completion_lengths if self.prediction_lengths is None else self.prediction_lengths

    @property
    def has_weights(self) -> bool:
        """Whether pairs or tokens have weights, which no kernel of a loss takes."""
        return self.weights is not None or self.token_weights is not None

    def weigh(self, tokens: VocabScore, some: slice = slice(None)) -> VocabScore:
        """Returns some of the M tokens with what a completion sums over them, times the tokens' weights."""
        if self.token_weights is None:
            return tokens
        weights, squares = self.token_weights[some], tokens.log_sum_sq
        squares = None if squares is None else squares * weights
        return tokens._replace(logps=tokens.logps * weights, log_sum_sq=squares)

    def check(self, loss: Loss, device: torch.device, rows: int) -> None:
        """Checks that the pairs match the number of hidden rows and the device, and have what the loss needs.

        Raises:
            UserError: they do not match, or something is missing.
        """
        if loss.needs_reference and self.ref_logps is None:
            raise UserError(f"loss '{loss.name}' needs reference log-probs")
        if loss.needs_rejected and self.rejected is None:
            raise UserError(f"loss '{loss.name}' needs pairs with a rejected side")
        if loss.needs_reference and loss.needs_tails and self.ref_token_logps is None:
            raise UserError(f"loss '{loss.name}' with ld_alpha needs the reference log-prob of every token")
        if loss.needs_gap and self.gaps is None:
            raise UserError(f"loss '{loss.name}' needs the gap of every pair")
        if self.weights is not None:
            loss.check_weights()
        check_pairs(device, self.cu_completions, self.chosen, self.rejected, self.sft_targets, self.ref_logps)
        tokens = rows if self.token_map is None else len(self.token_map.row)
        of_pairs = dict.fromkeys(("gaps", "hard", "weights"), len(self.chosen))
        for name, length in {"ref_token_logps": tokens, "token_weights": tokens, **of_pairs}.items():
            values = getattr(self, name)
            if values is not None and (values.shape != (length,) or values.device != device):
                raise UserError(
                    f"{name} must have shape ({length},) on {device}, not {tuple(values.shape)} on {values.device}"
                )
        if not torch.compiler.is_compiling():
            self._check_blocks(rows, tokens)

    def _check_blocks(self, rows: int, tokens: int) -> None:
        # Rows outside all blocks would be in no tile, and their gradients would stay unwritten.
        lengths = len(self.completion_lengths), sum(self.completion_lengths)
        if lengths != (given := (len(self.cu_completions) - 1, tokens)):
            raise UserError(
                "completion_lengths describes {} completions ({} tokens), but cu_completions has {} and hidden"
                " {} rows".format(*lengths, *given)
            )
        if (new := sum(self.row_lengths)) != rows:
            raise UserError(f"prediction_lengths has {new} rows, but hidden has {rows}")
        found = sum(completions for completions, _ in self.pair_blocks), sum(pairs for _, pairs in self.pair_blocks)
        if found != (expected := (len(self.completion_lengths), len(self.chosen))):
            raise UserError(
                "pair_blocks cover {} completions and {} pairs; expected {} and {}".format(*found, *expected)
            )
        if self.chosen.device.type == "cpu":  # on a GPU reading offsets and indices would cost a synchronisation
            self._check_sides()

    def _check_lengths(self, offsets: list[int]) -> None:
        for completion, (length, start, end) in enumerate(zip(self.completion_lengths, offsets, offsets[1:])):
            if start + length != end or length < 0 or offsets[0] != 0:
                raise UserError(
                    f"completion {completion} has {length} tokens in completion_lengths, but lies from {start} to {end}"
                    " in cu_completions, which must start at 0"
                )

    def _check_sides(self) -> None:
        self._check_lengths(self.cu_completions.tolist())
        # A pair that reaches into another block would get wrong log-probs if that block is in another tile.
        blocks = list(enumerate(self.pair_blocks))
        owners = dict(enumerate(block for block, (completions, _) in blocks for _ in range(completions)))
        expected = [block for block, (_, pairs) in blocks for _ in range(pairs)]
        for name in ("chosen", "rejected", "sft_targets"):
            if (side := getattr(self, name)) is None or [*map(owners.get, indices := side.tolist())] == expected:
                continue
            pair, index = next((p, i) for p, i in enumerate(indices) if owners.get(i) != expected[p])
            place = f"in block {owners[index]}" if index in owners else "in no block"
            raise UserError(f"pair {pair} is in block {expected[pair]}, but its {name} completion {index} is {place}")

    def pair_logps(
        self,
        logps: Tensor,  # (S,) of the completions, or of those from first to last
        first: tuple[int, int] = (0, 0),
        last: tuple[int, int] | None = None,
        loss: Loss | None = None,
        tokens: VocabScore | None = None,  # (M,) of the same completions, see :meth:`weigh`
    ) -> PairLogps:
        """Returns what a loss sees of the pairs from ``first`` to ``last``, each a (completion, pair).

        With ``loss`` and ``tokens`` the result also has what this loss needs besides sums of log-probs.
        """
        last = last or (len(self.completion_lengths), len(self.chosen))
        lengths = self.cu_completions.diff()
        if self.token_weights is not None:
            lengths = segment_sum(self.token_weights, self.cu_completions)
        lengths = lengths.to(logps.dtype)
        some = slice(first[1], last[1])

        def select(index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            """Log-probs, lengths and reference log-probs of completions."""
            ref = None if self.ref_logps is None else self.ref_logps[index]
            return logps[index - first[0]], lengths[index], ref

        chosen, chosen_length, ref_chosen = select(self.chosen[some])
        rejected, rejected_length, ref_rejected = None, None, None
        if self.rejected is not None:
            rejected, rejected_length, ref_rejected = select(self.rejected[some])
        target, target_length, _ = select(self.sft_targets[some])
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            target=target,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            target_length=target_length,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            tokens_per_pair=self.tokens_per_pair,
            **({} if loss is None or tokens is None else self._more(loss, tokens, first, last)),
        )

    def losses(self, loss: Loss, logps: PairLogps, some: slice = slice(None)) -> Tensor:
        """Returns the losses of pairs, each times the weight of its pair."""
        losses = loss(logps)
        return losses if self.weights is None else losses * self.weights[some].to(losses.dtype)

    def _more(self, loss: Loss, tokens: VocabScore, first: tuple[int, int], last: tuple[int, int]) -> dict[str, Tensor]:
        """Fields of ``PairLogps`` that are made of single tokens, or are properties of pairs."""
        some, row = slice(first[1], last[1]), self.cu_completions[first[0]]
        more: dict[str, Tensor] = {}
        if loss.needs_tails:
            more["chosen_tail"], more["rejected_tail"] = self._tails(tokens.logps, row, some)
            if self.ref_token_logps is not None:
                more["ref_chosen_tail"], more["ref_rejected_tail"] = self._tails(self.ref_token_logps, 0, some)
        if loss.needs_log_sum_sq:
            assert tokens.log_sum_sq is not None and self.rejected is not None
            sums = segment_sum(tokens.log_sum_sq.detach(), self.cu_completions[first[0] : last[0] + 1] - row)
            more["chosen_log_sum_sq"] = sums[self.chosen[some] - first[0]]
            more["rejected_log_sum_sq"] = sums[self.rejected[some] - first[0]]
        if loss.needs_gap:
            assert self.gaps is not None
            more["gap"] = self.gaps[some].to(tokens.logps.dtype)
        if loss.needs_hard:
            hard = torch.zeros_like(self.chosen, dtype=torch.bool) if self.hard is None else self.hard
            more["hard"] = hard[some]
        return more

    def _tails(self, values: Tensor, row: Tensor | int, some: slice) -> Iterator[Tensor]:
        """Yields, for the chosen and the rejected side, (P,) sums of token values beyond the other side's length.

        ``values`` start at row ``row`` of the batch.
        """
        assert self.rejected is not None
        starts, lengths = self.cu_completions[:-1] - row, self.cu_completions.diff()
        steps = torch.arange(max(self.completion_lengths), device=values.device)
        chosen, rejected = self.chosen[some], self.rejected[some]
        for side, other in ((chosen, rejected), (rejected, chosen)):
            position = lengths[other, None] + steps  # (P, longest)
            inside = position < lengths[side, None]
            index = (starts[side, None] + position).clamp(max=len(values) - 1)
            yield torch.where(inside, values[index], 0.0).double().sum(1).to(values.dtype)


def completion_tokens(rows: VocabScore, token_map: TokenMap | None) -> VocabScore:
    """Returns log-probs, with their gradients, and statistics of the M tokens of completions from those of N rows."""
    if token_map is None:
        return rows
    row = token_map.row
    others = (None if x is None else x[row] for x in rows[2:])
    return VocabScore(token_values(rows.logps, token_map), rows.lse[row], *others)


class Tile(NamedTuple):
    """Consecutive whole pair blocks. Usually their logits exist at one time; a large block takes several buffers."""

    rows: slice
    tokens: slice  # of its completions, among the M
    first: tuple[int, int]  # (completion, pair) where it starts
    last: tuple[int, int]  # (completion, pair) where it ends

    @property
    def completions(self) -> slice:
        return slice(self.first[0], self.last[0])

    @property
    def pairs(self) -> slice:
        return slice(self.first[1], self.last[1])


def row_stride(columns: int, device: torch.device) -> int:
    """Elements from row to row of a tile.

    On a GPU it is a multiple of 16: products and kernels access 16 bytes at once if rows start at multiples of 16
    bytes, and Triton only knows whether a stride is a multiple of 16. On a CPU it is an odd multiple of 64: rows that
    are multiples of 4 KiB apart evict each other from the cache, which costs products up to a fifth of their time.
    """
    if device.type == "cpu":
        return (-(-columns // 64) | 1) * 64
    return -(-columns // 16) * 16


def tile_buffer(x: Tensor, w: Tensor, options: HeadOptions, beyond: int = 0) -> Tensor:
    """Allocates the largest tile, (R, V), once per call: on a CPU each new buffer would be faulted in page by page.

    It holds all rows if they exceed the budget by at most ``beyond`` rows.
    """
    rows, columns = options.tile_rows(x, w), w.shape[0]
    rows = x.shape[0] if x.shape[0] <= rows + beyond else rows
    rows = max(1, min(rows, x.shape[0]))
    return x.new_empty(rows, row_stride(columns, x.device))[:, :columns]


def tile_logits(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """Writes ``x @ w.T`` to ``out`` (R, V) and returns it."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) > _CPU_FEW_ROWS:
        return torch.mm(x, w.t(), out=out)
    block = x.new_empty(min(_CPU_COLUMN_BLOCK, len(w)), len(x))
    for some, columns in zip(w.split(_CPU_COLUMN_BLOCK), out.split(_CPU_COLUMN_BLOCK, dim=1)):
        columns.copy_(torch.mm(some, x.t(), out=block[: len(some)]).t())
    return out


def logits_tiles(x: Tensor, w: Tensor, buffer: Tensor, rows: slice | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, logits) of consecutive tiles. All share the buffer: each overwrites the one before."""
    start, stop = (0, x.shape[0]) if rows is None else (rows.start, rows.stop)
    for first in range(start, stop, len(buffer)):
        rows = slice(first, min(first + len(buffer), stop))
        yield rows, tile_logits(x[rows], w, buffer[: rows.stop - rows.start])


def pair_block_tiles(pairs: Pairs, budget: int) -> Iterator[Tile]:
    """Yields runs of whole pair blocks with at most ``budget`` rows. A block with more rows is a tile of its own."""
    here, start = (0, 0, 0, 0), (0, 0, 0, 0)  # (row, token, completion, pair)

    def tile() -> Tile:
        return Tile(slice(start[0], here[0]), slice(start[1], here[1]), start[2:], here[2:])

    for completions, block_pairs in pairs.pair_blocks:
        own = slice(here[2], here[2] + completions)
        rows, tokens = sum(pairs.row_lengths[own]), sum(pairs.completion_lengths[own])
        if here[0] > start[0] and here[0] + rows - start[0] > budget:
            yield tile()
            start = here
        here = (here[0] + rows, here[1] + tokens, own.stop, here[3] + block_pairs)
    if here[0] > start[0]:
        yield tile()
