"""DeepSpeed's universal checkpoints, which any number of processes can read."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import replacing_folder, write_text

logger = logging.getLogger(__name__)

_LATEST = "latest_universal"  # DeepSpeed's file with the name of the folder


def make_universal(checkpoint: Path) -> None:
    """Adds DeepSpeed's universal form to a checkpoint of ZeRO, whose own files are those of one number of processes.

    DeepSpeed's converter runs in a process of its own, with workers that read the states of all processes.

    Raises:
        UserError: the conversion fails.
    """
    if (checkpoint / _LATEST).is_file():
        return
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    logger.warning(f"{checkpoint} is of another number of processes: its weights and optimizer states are converted")
    with replacing_folder(checkpoint / f"{tag}_universal") as folder:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", str(checkpoint / tag), "--output_folder", str(folder)]
        done = subprocess.run(command + folders, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{checkpoint} cannot be converted for another number of processes ({last}): keep their number"
            )
    write_text(checkpoint / _LATEST, f"{tag}_universal\n")


def mend_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Gives an optimizer that ZeRO-3 has loaded from a universal checkpoint the options and the steps of each group.

    DeepSpeed 0.19 gives all groups the options of the first, such as its weight decay, and one tensor that counts the
    steps of all, which every group then increases.
    """
    folder = checkpoint / (checkpoint / _LATEST).read_text(encoding="utf-8").strip()
    saved = torch.load(folder / "zero/optimizer_state.pt", weights_only=False)["optimizer_state_dict"]
    for group, options in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
