"""How long does it take to compute the fingerprint of a reference?

    python -m bench fingerprint --gb 4

A Llama-shaped bf16 model of random bits is saved in shards and loaded as ``cpt-train`` loads a model. Its fingerprint
is computed on one core and on all cores. The report has seconds, CPU seconds and GB/s.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cpt_kernels.reference.fingerprint import fingerprint

from .timing import add_output_options, finish, table


def save_random_model(folder: Path, gigabytes: float) -> None:
    """Saves a random model of about ``gigabytes`` GB; the size is rounded to whole layers."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if gigabytes < 1:
        sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layers = max(1, round(gigabytes * 1e9 / 2 / (2.5 * hidden**2 + 3 * hidden * inner)))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=layers, **sizes)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(generator=random)
    model.save_pretrained(folder, max_shard_size="1GB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench fingerprint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=4.0, help="size of the weights; --folder needs as much space")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    add_output_options(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-fingerprint-", dir=args.folder) as folder:
        save_random_model(Path(folder) / "model", args.gb)
        result = _run(Path(folder))
    finish("fingerprint", {}, result, args)


def _run(folder: Path) -> dict[str, float]:
    """Loads the model and times its fingerprint on one core and on all cores."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.bfloat16)
    loading = time.perf_counter() - started
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    cores = os.sched_getaffinity(0)

    def take() -> str:
        return fingerprint(model, compute_dtype=torch.bfloat16, attention="shared_prompt")

    os.sched_setaffinity(0, {min(cores)})
    one = _timed(take)
    os.sched_setaffinity(0, cores)
    every = _timed(take)
    if one[0] != every[0]:
        raise RuntimeError("fingerprints of one model differ")
    names = ("one core", f"{len(cores)} cores")
    rows = [
        [name, f"{seconds:.3f}", f"{cpu:.3f}", f"{gigabytes / seconds:.2f}"]
        for name, (_, seconds, cpu) in zip(names, (one, every))
    ]
    print(f"{gigabytes:.2f} GB of bf16 weights, loaded in {loading:.1f} s")
    print(table(["fingerprint", "seconds", "of CPU", "GB/s"], rows))
    rates = {"gb": gigabytes, "gb_per_s_one_core": gigabytes / one[1], "gb_per_s": gigabytes / every[1]}
    return rates | {"gb_per_cpu_s": gigabytes / every[2], "loading_s": loading}


def _timed(take: Callable[[], str]) -> tuple[str, float, float]:
    """Returns (fingerprint, seconds, CPU seconds)."""
    started, busy = time.perf_counter(), time.process_time()
    digest = take()
    return digest, time.perf_counter() - started, time.process_time() - busy


if __name__ == "__main__":
    main()
