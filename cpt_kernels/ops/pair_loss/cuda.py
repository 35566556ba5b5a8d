"""``pair_loss`` by the CUDA extension, one cooperative launch; ``csrc/pair_loss.cu`` holds the kernel."""

from __future__ import annotations

import torch

from .. import backends
from .closed_form import KernelLoss
from .reference import PairLossInput, PairLossOutput


def pair_loss_cuda(
    inputs: PairLossInput,  # token_logps and ref_logps fp32
    loss: KernelLoss,
) -> PairLossOutput:
    """Computes losses and weights as ``pair_loss_closed_form`` does."""
    out = PairLossOutput.empty(inputs)
    # Copies must live until the launch is enqueued, so they have a name here. 0 stands for an absent tensor.
    tensors = {name: x if x is None else x.contiguous() for name, x in {**inputs._asdict(), **out._asdict()}.items()}
    with backends.on_device_of(inputs.token_logps):
        backends.load_extension().pair_loss(
            **{name: 0 if x is None else x.data_ptr() for name, x in tensors.items()},
            tokens=len(inputs.token_logps),
            wide=inputs.cu_completions.dtype == torch.int64,
            completions=len(inputs.cu_completions) - 1,
            pairs=len(inputs.chosen),
            loss=loss.name,
            tokens_per_pair=loss.tokens_per_pair,
            beta=loss.beta,
            label_smoothing=loss.label_smoothing,
            slic_delta=loss.slic_delta,
            slic_lambda=loss.slic_lambda,
            slic_length_normalize=loss.slic_length_normalize,
            stream=backends.stream_of(inputs.token_logps),
        )
    return out
