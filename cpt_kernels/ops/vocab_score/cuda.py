"""``vocab_score`` by the CUDA extension; ``csrc/vocab_score.cu`` holds the kernel and explains it."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from .reference import TileOptions, VocabScore


def vocab_score_cuda(
    logits: Tensor,  # (R, V) bf16, fp16 or fp32
    targets: Tensor,  # (R,) int64
    options: TileOptions,
) -> VocabScore:
    """Scores a tile as ``vocab_score_reference`` does. A target outside the vocabulary makes its row NaN."""
    rows, columns = logits.shape
    out = VocabScore.empty(rows, logits, options.statistics)
    # Copies must live until the launch is enqueued, so they have names here.
    targets = targets.contiguous()
    bias = None if options.bias is None else options.bias.float().contiguous()
    pointers = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in out._asdict().items()}
    with backends.on_device_of(logits):
        backends.load_extension().vocab_score(
            logits=logits.data_ptr(),
            dtype=str(logits.dtype).removeprefix("torch."),
            rows=rows,
            columns=columns,
            row_stride=logits.stride(0),
            vocab_size=options.vocabulary(columns),
            targets=targets.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            logit_scale=options.logit_scale,
            softcap=options.softcap or 0.0,
            score=options.score,
            stream=backends.stream_of(logits),
            **pointers,
        )
    return out
