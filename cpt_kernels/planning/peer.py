"""Imitates a training step of TRL 1.16's ``DPOTrainer`` on padded rows, to time it where TRL is not installed.

The layers are transformers' own, with an attention mask. TRL's head computes logits in tiles of 4,096 rows and 32,768
columns, and computes them again in the backward. With Triton it reads completion rows only, and one kernel reads each
tile; without, it reads all rows, and a tile passes through some ten elementwise operations of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import ImageReader
from ..model.hooks import replaced_forward
from ..model.packed_model import base_model
from ..ops.linear_preference import HeadOptions, linear_logprobs

_ROWS, _COLUMNS = 4096, 32768  # of a tile

Sides = Sequence[tuple[int, int]]  # tokens of (prompt, completion) of every sequence of a batch


def reads_all_rows(device: torch.device) -> bool:
    """Whether TRL's head reads the rows of prompts and pads, too."""
    return device.type not in ("cuda", "xpu")


def tile_bytes(tokens: int, vocab: int) -> int:
    """Returns the bytes of a tile of logits in fp32."""
    return 4 * min(tokens, _ROWS) * min(vocab, _COLUMNS)


def peer_tile_bytes(tokens: int, vocab: int, device: torch.device) -> int:
    """Returns the bytes that a tile of logits takes with the results of its operations."""
    return tile_bytes(tokens, vocab) * (8 if reads_all_rows(device) else 1)


def run_peer(model: nn.Module, wrapped: Callable[..., Any], sides: Sides, reader: ImageReader | None = None) -> Tensor:
    """Runs a padded batch of random tokens, and returns a number that depends on all its log-probs.

    Args:
        model: a transformers or PEFT model with the attention that it was loaded with.
        wrapped: the model as the trainer calls it, for example under autocast.
        reader: of the images of a model that marks their tokens; here all tokens are text.
    """
    head = base_model(model).get_output_embeddings()
    device = head.weight.device
    lengths = torch.tensor([prompt + completion for prompt, completion in sides])
    columns = torch.arange(int(lengths.max()))
    mask = (columns < lengths[:, None]).to(device)
    scored = (columns >= torch.tensor([prompt for prompt, _ in sides])[:, None]).to(device) & mask
    ids = torch.randint(head.weight.shape[0], mask.shape).to(device)
    types: dict[str, Tensor] = {}
    if reader is not None:
        ids[torch.isin(ids, torch.tensor([reader.feature_token, *reader.token_ids], device=device))] = 0
        types = reader.token_types(ids, [(row, 0, prompt) for row, (prompt, _) in enumerate(sides)])

    def head_forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        weight = getattr(head, "base_layer", head).weight.to(dtype)
        rows, targets = hidden[:, :-1].to(dtype), ids[:, 1:]
        if reads_all_rows(device):
            logps = _TiledLogps.apply(rows.flatten(0, 1), weight, targets.flatten()) * scored[:, 1:].flatten()
        else:
            chosen = scored[:, 1:]
            logps = linear_logprobs(rows[chosen], weight, targets[chosen], None, HeadOptions(statistics=True)).logps
        return logps.sum().reshape(1, 1, 1)

    with replaced_forward(head, head_forward):
        return wrapped(input_ids=ids, attention_mask=mask.long(), use_cache=False, **types).logits.sum()


class _TiledLogps(torch.autograd.Function):
    """Log-probs by a running log-sum-exp over tiles, with as many passes over each tile as TRL makes in PyTorch."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (N, H), (V, H), (N,)
        largest = hidden.new_full((len(hidden),), -torch.inf)
        before, logits, total, weighted, plain = largest.clone(), *(torch.zeros_like(largest) for _ in range(4))
        for rows, columns, tile in _tiles(hidden, weight):
            z = tile.float() * 1.0 * 1.0  # the scale of the logits, and the temperature
            local = targets[rows] - columns.start
            plain[rows] += z.sum(1)
            earlier = torch.arange(z.shape[1], device=z.device) < local[:, None]
            before[rows] = torch.maximum(before[rows], z.masked_fill(~earlier, -torch.inf).amax(1))
            new = torch.maximum(largest[rows], z.amax(1))
            e = torch.exp(z - new[:, None])
            rescale = torch.exp(largest[rows] - new)
            total[rows] = total[rows] * rescale + e.sum(1)
            weighted[rows] = weighted[rows] * rescale + (e * z).sum(1)
            largest[rows] = new
            found = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
            logits[rows] = torch.where((local >= 0) & (local < z.shape[1]), found, logits[rows])
        lse = largest + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        return logits - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        by_hidden = torch.zeros_like(hidden)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows, columns, tile in _tiles(hidden, weight):
            z = tile.float() * 1.0 * 1.0
            p = torch.exp(z - lse[rows, None])
            gradient = torch.zeros_like(z)
            is_target = torch.arange(columns.start, columns.stop, device=z.device) == targets[rows, None]
            gradient += gradients[0][rows, None] * (is_target.float() - p)
            tile.copy_(gradient * 1.0 * 1.0)
            by_hidden[rows].addmm_(tile, weight[columns])
            if by_weight is not None:
                by_weight[columns].addmm_(tile.t(), hidden[rows])
        return by_hidden, by_weight, None


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows, columns and logits of every tile, in one buffer."""
    buffer = hidden.new_empty(min(len(hidden), _ROWS), min(len(weight), _COLUMNS))
    for row in range(0, len(hidden), _ROWS):
        rows = slice(row, min(row + _ROWS, len(hidden)))
        for column in range(0, len(weight), _COLUMNS):
            columns = slice(column, min(column + _COLUMNS, len(weight)))
            tile = buffer[: rows.stop - row, : columns.stop - column]
            torch.mm(hidden[rows], weight[columns].t(), out=tile)
            yield rows, columns, tile
