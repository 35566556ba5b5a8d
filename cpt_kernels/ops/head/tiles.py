"""What the head is asked for, and how its rows are cut into tiles that hold whole pair blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import Loss, PairLogps
from ..gather import segment_sum
from ..pair_loss import check_pairs
from ..vocab_score import VocabScore, score_tile

# Fewer rows make slow products, and a pair that fits no tile costs a fourth one; more only take memory.
_CPU_ROWS = 512

# For so few rows a CPU makes the transposed product, in pieces that stay in cache: its sgemm prefers few columns to few
# rows, by up to 1.8 times on the machine of bench/NOTES.md.
_CPU_FEW_ROWS, _CPU_PIECE = 128, 2048


@dataclass(frozen=True)
class HeadOptions:
    """What lies between ``hidden @ weight.T`` and the softmax, and how the work is cut.

    Attributes:
        logit_scale, softcap, vocab_size: see :func:`cpt_kernels.vocab_score`.
        statistics: also return entropy, mean logit, top-1 and log sum p^2 of every token.
        memory_mb: budget of the tile of logits, in MiB; default 1024 on an accelerator, and 512 rows on a CPU.
        compute_dtype: dtype of the GEMMs, as autocast would choose; default the dtype of ``hidden``.
        backend: of the kernels between the GEMMs, see ``ops.backends``.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    statistics: bool = False
    memory_mb: float | None = None
    compute_dtype: torch.dtype | None = None
    backend: str = "auto"

    def tile_rows(self, hidden: Tensor, weight: Tensor) -> int:
        """Rows of a tile of logits within the budget, at least 1."""
        if self.memory_mb is None and hidden.device.type == "cpu":
            return _CPU_ROWS
        budget = self.memory_mb or 1024
        itemsize = (self.compute_dtype or hidden.dtype).itemsize
        return max(1, int(budget * 2**20) // (row_stride(weight.shape[0], hidden.device) * itemsize))

    def score(self, logits: Tensor, targets: Tensor, bias: Tensor | None, score: bool, backend: str) -> VocabScore:
        """``vocab_score`` of a tile with these options, on a resolved backend."""
        vocab_size = logits.shape[1] if self.vocab_size is None else self.vocab_size
        between = (bias, self.logit_scale, self.softcap, vocab_size)
        return score_tile(logits, targets, *between, self.statistics, score, backend)


@dataclass(frozen=True)
class Pairs:
    """Which completions the N rows form, and which of them are paired; fields as in ``data.collate.PackedBatch``."""

    cu_completions: Tensor  # (S+1,) int64
    completion_lengths: Sequence[int]  # S, the same on the host
    chosen: Tensor  # (P,) int64
    rejected: Tensor | None  # (P,)
    sft_targets: Tensor  # (P,)
    # (completions, pairs) per block: the smallest consecutive completions containing both sides of all their pairs
    pair_blocks: Sequence[tuple[int, int]]
    ref_logps: Tensor | None = None  # (S,) reference log-probs
    tokens_per_pair: Tensor | float = 1.0
    ref_token_logps: Tensor | None = None  # (N,) for losses with needs_tails
    gaps: Tensor | None = None  # (P,) for losses with needs_gap

    def check(self, loss: Loss, device: torch.device, rows: int) -> None:
        """Hold the pairs of so many rows on a device to what they should be, and to what the loss needs.

        Raises:
            ValueError: they do not fit.
        """
        if loss.needs_reference and self.ref_logps is None:
            raise ValueError(f"loss '{loss.name}' needs reference log-probs")
        if loss.needs_rejected and self.rejected is None:
            raise ValueError(f"loss '{loss.name}' needs pairs with a rejected side")
        if loss.needs_reference and loss.needs_tails and self.ref_token_logps is None:
            raise ValueError(f"loss '{loss.name}' with ld_alpha needs the reference log-prob of every token")
        if loss.needs_gap and self.gaps is None:
            raise ValueError(f"loss '{loss.name}' needs the gap of every pair")
        sides = (self.chosen, self.rejected, self.sft_targets)
        check_pairs(device, self.cu_completions, *sides, self.ref_logps)
        if not torch.compiler.is_compiling():
            self._check_blocks(rows)

    def _check_blocks(self, rows: int) -> None:
        """Rows outside all blocks would be in no tile, and their gradients would stay unwritten."""
        found = len(self.completion_lengths), sum(self.completion_lengths)
        if found != (expected := (len(self.cu_completions) - 1, rows)):
            raise ValueError(
                "completion_lengths are of {} completions with {} tokens; cu_completions and hidden have {} and"
                " {}".format(*found, *expected)
            )
        found = tuple(sum(block[i] for block in self.pair_blocks) for i in (0, 1))
        if found != (expected := (len(self.completion_lengths), len(self.chosen))):
            raise ValueError(
                "pair_blocks hold {} completions and {} pairs, and there are {} and {}".format(*found, *expected)
            )
        if self.chosen.device.type == "cpu":  # else to look at indices is to wait for the device
            self._check_sides()

    def _check_sides(self) -> None:
        """A pair that reaches into another block would be given wrong log-probs where that lies in another tile."""
        blocks = list(enumerate(self.pair_blocks))
        owners = dict(enumerate(block for block, (completions, _) in blocks for _ in range(completions)))
        expected = [block for block, (_, pairs) in blocks for _ in range(pairs)]
        for name in ("chosen", "rejected", "sft_targets"):
            if (side := getattr(self, name)) is None or [*map(owners.get, indices := side.tolist())] == expected:
                continue
            pair, index = next((p, i) for p, i in enumerate(indices) if owners.get(i) != expected[p])
            place = f"of block {owners[index]}" if index in owners else "of no block"
            raise ValueError(
                f"{name} of pair {pair} is completion {index} {place}, and the pair is of block {expected[pair]}"
            )

    def pair_logps(
        self,
        logps: Tensor,  # (S,) of the completions, or of those from first to last
        first: tuple[int, int] = (0, 0),
        last: tuple[int, int] | None = None,
        loss: Loss | None = None,
        tokens: VocabScore | None = None,  # (N,) of the same completions
    ) -> PairLogps:
        """What a loss sees of the pairs from ``first`` to ``last`` (completion, pair).

        With ``loss`` and ``tokens`` also what this loss needs besides sums of log-probs.
        """
        last = last or (len(self.completion_lengths), len(self.chosen))
        lengths = self.cu_completions.diff().to(logps.dtype)

        def select(index: Tensor | None) -> tuple[Tensor | None, ...]:
            if index is None:
                return None, None, None
            index = index[first[1] : last[1]]
            ref = None if self.ref_logps is None else self.ref_logps[index]
            return logps[index - first[0]], lengths[index], ref

        chosen, chosen_length, ref_chosen = select(self.chosen)
        rejected, rejected_length, ref_rejected = select(self.rejected)
        target, target_length, _ = select(self.sft_targets)
        more = {} if loss is None else self._more(loss, tokens, first, last)
        return PairLogps(
            chosen, rejected, target, chosen_length, rejected_length, target_length, ref_chosen, ref_rejected,
            self.tokens_per_pair, **more,
        )  # fmt: skip

    def _more(self, loss: Loss, tokens: VocabScore, first: tuple[int, int], last: tuple[int, int]) -> dict[str, Tensor]:
        some, row = slice(first[1], last[1]), self.cu_completions[first[0]]
        more: dict[str, Tensor] = {}
        if loss.needs_tails:
            more["chosen_tail"], more["rejected_tail"] = self._tails(tokens.logps, row, some)
            if self.ref_token_logps is not None:
                more["ref_chosen_tail"], more["ref_rejected_tail"] = self._tails(self.ref_token_logps, 0, some)
        if loss.needs_log_sum_sq:
            sums = segment_sum(tokens.log_sum_sq.detach(), self.cu_completions[first[0] : last[0] + 1] - row)
            more["chosen_log_sum_sq"] = sums[self.chosen[some] - first[0]]
            more["rejected_log_sum_sq"] = sums[self.rejected[some] - first[0]]
        if loss.needs_gap:
            more["gap"] = self.gaps[some].to(tokens.logps.dtype)
        return more

    def _tails(self, values: Tensor, row: Tensor | int, some: slice) -> Iterator[Tensor]:
        """Sums beyond the other side's length of token values that start at ``row``, (P,) for chosen and rejected."""
        starts, lengths = self.cu_completions[:-1] - row, self.cu_completions.diff()
        steps = torch.arange(max(self.completion_lengths), device=values.device)
        chosen, rejected = self.chosen[some], self.rejected[some]
        for side, other in ((chosen, rejected), (rejected, chosen)):
            position = lengths[other, None] + steps  # (P, longest)
            inside = position < lengths[side, None]
            index = (starts[side, None] + position).clamp(max=len(values) - 1)
            yield torch.where(inside, values[index], 0.0).double().sum(1).to(values.dtype)


class Tile(NamedTuple):
    """A run of whole pair blocks."""

    rows: slice
    first: tuple[int, int]  # (completion, pair) where it starts
    last: tuple[int, int]  # and ends


def row_stride(columns: int, device: torch.device) -> int:
    """Elements from row to row of a tile.

    On a GPU a multiple of 16: GEMMs and kernels load 16 bytes at once where rows start at multiples of 16 bytes, and
    what Triton knows of a stride is whether it is a multiple of 16. On a CPU an odd multiple of 64: rows that are
    multiples of 4 KiB apart evict each other from its caches, which costs GEMMs up to a fifth of their time.
    """
    if device.type == "cpu":
        return (-(-columns // 64) | 1) * 64
    return -(-columns // 16) * 16


def tile_buffer(x: Tensor, w: Tensor, options: HeadOptions) -> Tensor:
    """Room for the largest tile. One for the whole call: on a CPU a new one would be faulted in page by page."""
    rows, columns = max(1, min(options.tile_rows(x, w), x.shape[0])), w.shape[0]
    return x.new_empty(rows, row_stride(columns, x.device))[:, :columns]


def tile_logits(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """``x @ w.T``, written to ``out`` (R, V)."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) > _CPU_FEW_ROWS:
        return torch.mm(x, w.t(), out=out)
    piece = x.new_empty(min(_CPU_PIECE, len(w)), len(x))
    for some, columns in zip(w.split(_CPU_PIECE), out.split(_CPU_PIECE, dim=1)):
        columns.copy_(torch.mm(some, x.t(), out=piece[: len(some)]).t())
    return out


def logits_tiles(x: Tensor, w: Tensor, buffer: Tensor, rows: slice | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of logits in the buffer: each is overwritten by the next."""
    start, stop = (0, x.shape[0]) if rows is None else (rows.start, rows.stop)
    for first in range(start, stop, len(buffer)):
        rows = slice(first, min(first + len(buffer), stop))
        yield rows, tile_logits(x[rows], w, buffer[: rows.stop - rows.start])


def pair_block_tiles(pairs: Pairs, budget: int) -> Iterator[Tile]:
    """Runs of whole pair blocks with at most ``budget`` rows; a block that is larger is a tile of its own."""
    row, completion, pair = 0, 0, 0
    start = (0, (0, 0))
    for completions, block_pairs in pairs.pair_blocks:
        rows = sum(pairs.completion_lengths[completion : completion + completions])
        if row > start[0] and row + rows - start[0] > budget:
            yield Tile(slice(start[0], row), start[1], (completion, pair))
            start = (row, (completion, pair))
        row, completion, pair = row + rows, completion + completions, pair + block_pairs
    if row > start[0]:
        yield Tile(slice(start[0], row), start[1], (completion, pair))
