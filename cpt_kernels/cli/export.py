"""``cpt export``: writes the weights of a sharded checkpoint to one folder of safetensors, as transformers loads it.

    cpt export runs/dpo/checkpoint-100 --output runs/dpo-100

Runs under FSDP2 and ZeRO-3 save checkpoints in parts, one of each process. The weights are read on the CPU, in one
process. Configuration and tokenizer are those of the checkpoint. An adapter stays an adapter: cpt merge merges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .console import print_results
from .merge import check_output
from .parsing import DTYPES, Parser


def main(argv: Sequence[str], prog: str = "cpt export") -> None:
    """Exports a checkpoint, and prints what was written."""
    parser = Parser(prog=prog, usage=f"{prog} CHECKPOINT --output FOLDER [--dtype TYPE]", description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder checkpoint-N of a run under FSDP2 or ZeRO-3")
    add("--output", type=Path, required=True, metavar="FOLDER", help="new folder for the model or adapter")
    add("--dtype", choices=DTYPES, default="auto", help="type of the saved weights [auto: that of the config]")
    args = parser.parse_args(argv)
    checkpoint, output = args.checkpoint.expanduser(), args.output.expanduser()
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: there is no such folder")
    check_output(output)
    import torch

    from ..model.exporting import export

    state = export(checkpoint, output, None if args.dtype == "auto" else getattr(torch, args.dtype))
    numbers = sum(value.numel() for value in state.values())
    files = ", ".join(sorted(file.name for file in output.iterdir()))
    print_results([], [f"{numbers:,} numbers in {len(state)} weights", f"written to {output}: {files}"])
