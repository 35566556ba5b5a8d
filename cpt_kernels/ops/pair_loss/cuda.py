"""``pair_loss`` by the CUDA extension, one cooperative launch; the kernel: ``csrc/pair_loss.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .reference import PairLossOutput


def pair_loss_cuda(
    token_logps: Tensor,  # (N,) fp32
    cu_completions: Tensor,  # (S+1,) int32 or int64
    chosen: Tensor,  # (P,) int64, as the next two
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,  # (S,) fp32
    loss: str,
    tokens_per_pair: float,
    **options,
) -> PairLossOutput:
    """Losses and weights; arguments as ``pair_loss``, with every option of every built-in loss."""
    completions = len(cu_completions) - 1
    out = PairLossOutput(*(token_logps.new_empty(size) for size in (completions, len(chosen), completions)))
    tensors = {
        "token_logps": token_logps,
        "cu_completions": cu_completions,
        "chosen": chosen,
        "rejected": rejected,
        "targets": targets,
        "ref_logps": ref_logps,
        **out._asdict(),
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    absent = dict.fromkeys(("rejected", "targets", "ref_logps"), 0)
    with backends.on_device_of(token_logps):
        backends.load_extension().pair_loss(
            **{**absent, **{name: tensor.data_ptr() for name, tensor in tensors.items()}},
            tokens=len(token_logps),
            wide=cu_completions.dtype == torch.int64,
            completions=completions,
            pairs=len(chosen),
            loss=loss,
            tokens_per_pair=tokens_per_pair,
            stream=backends.stream_of(token_logps),
            **options,
        )
    return out
