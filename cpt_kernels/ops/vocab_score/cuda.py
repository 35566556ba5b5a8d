"""``vocab_score`` by the CUDA extension; the kernel and how it works: ``csrc/vocab_score.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .reference import VocabScore


def vocab_score_cuda(
    logits: Tensor,  # (R, V) bf16, fp16 or fp32
    targets: Tensor,  # (R,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    vocab_size: int,
    statistics: bool,
    score: bool,
) -> VocabScore:
    """Score a tile; arguments as ``vocab_score_reference``. A target outside the vocabulary makes its row NaN."""
    rows, columns = logits.shape
    out = VocabScore(
        *(torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2)),
        *(
            torch.empty(rows, dtype=dtype, device=logits.device) if statistics else None
            for dtype in (torch.float32, torch.float32, torch.bool, torch.float32)
        ),
    )
    targets = targets.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    pointers = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in out._asdict().items()}
    with backends.on_device_of(logits):
        backends.load_extension().vocab_score(
            logits=logits.data_ptr(),
            dtype=str(logits.dtype).removeprefix("torch."),
            rows=rows,
            columns=columns,
            row_stride=logits.stride(0),
            vocab_size=vocab_size,
            targets=targets.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            logit_scale=logit_scale,
            softcap=softcap or 0.0,
            score=score,
            stream=backends.stream_of(logits),
            **pointers,
        )
    return out
