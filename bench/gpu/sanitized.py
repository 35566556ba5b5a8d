"""Runs the CUDA kernels on tiny shapes: the program that ``gpu_check`` runs under Compute Sanitizer.

    compute-sanitizer --tool memcheck python -m bench.gpu.sanitized cuda [planted]

``planted`` adds a read behind the end of a tile, which memcheck must report. On a CPU the eager operators run.
"""

from __future__ import annotations

import sys

import torch

from cpt_kernels.ops.backends import load_extension
from cpt_kernels.ops.pair_loss import KERNEL_LOSSES, pair_loss
from cpt_kernels.ops.vocab_score import vocab_score

# (rows, columns, row stride): rows that fill vectors and rows that do not, a row in one block, one in the blocks of a
# cluster, and one that is longer than the shared memory of a cluster in fp32.
TILES = [(5, 1021, 1024), (3, 4096, 4096), (3, 50257, 50272), (2, 128256, 128256), (1, 600_001, 600_064)]


def score_tiles(device: str, backend: str) -> int:
    """Scores every tile in every dtype, with and without statistics, bias and soft-cap. Returns the number of calls."""
    calls = 0
    for rows, columns, stride in TILES[: 2 if device == "cpu" else None]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for full in (False, True):
                generator = torch.Generator().manual_seed(calls)
                tile = torch.randn(rows, stride, generator=generator).to(device, dtype)[:, :columns]
                targets = torch.randint(columns - 5, (rows,), generator=generator).to(device)
                bias = torch.randn(columns, generator=generator).to(device) if full else None
                options = {"bias": bias, "softcap": 30.0, "vocab_size": columns - 5} if full else {}
                found = vocab_score(tile, targets, statistics=full, score=True, backend=backend, **options)
                assert bool(found.logps.cpu().isfinite().all()), (rows, columns, dtype, full)
                calls += 1
    return calls


def weigh_pairs(device: str, backend: str) -> int:
    """Runs every loss of the kernel on completions of very different lengths. Returns the number of calls."""
    lengths = torch.tensor([1, 40, 3000, 17, 2, 300, 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    tokens, reference = -torch.rand(int(lengths.sum())).to(device), torch.zeros(7).to(device)
    chosen, rejected = torch.tensor([0, 2, 4, 2]).to(device), torch.tensor([1, 3, 5, 6]).to(device)
    for loss in KERNEL_LOSSES:
        found = pair_loss(tokens, offsets, chosen, rejected, None, reference, loss=loss, backend=backend)
        assert bool(found.losses.cpu().isfinite().all()), loss
    return len(KERNEL_LOSSES)


def read_behind_the_end() -> None:
    """Tells the kernel of 64 rows where the tile has one."""
    tile = torch.zeros(1, 4096, device="cuda", dtype=torch.bfloat16)
    targets = torch.zeros(64, device="cuda", dtype=torch.int64)
    outputs = {name: torch.empty(64, device="cuda") for name in ("logps", "lse")}
    load_extension().vocab_score(
        logits=tile.data_ptr(),
        dtype="bfloat16",
        rows=64,
        columns=4096,
        row_stride=4096,
        vocab_size=4096,
        targets=targets.data_ptr(),
        bias=0,
        logit_scale=1.0,
        softcap=0.0,
        score=False,
        stream=torch.cuda.current_stream().cuda_stream,
        **{name: output.data_ptr() for name, output in outputs.items()},
        **dict.fromkeys(("entropy", "mean_logit", "correct", "log_sum_sq"), 0),
    )
    torch.cuda.synchronize()


def main(device: str, planted: bool) -> None:
    """Runs the kernels and prints the number of calls."""
    backend = "cuda" if device == "cuda" else "eager"
    calls = score_tiles(device, backend) + weigh_pairs(device, backend)
    if planted:
        read_behind_the_end()
    print(f"{calls} calls of {backend} operators")


if __name__ == "__main__":
    main(sys.argv[1], "planted" in sys.argv[2:])
