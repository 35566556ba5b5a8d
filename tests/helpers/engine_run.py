"""Runs one rank of test_engines.py: the trainer on models in folders, under FSDP2 or ZeRO-3, or alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.model.conditions import is_sharded
from tests.helpers.toy import losses, make_trainer, preference_data

ENGINES: dict[str, dict[str, Any]] = {
    "alone": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "zero3": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
        "use_cpu": False,
        "accelerator_config": {"use_configured_state": True},
    },
}


def run(folder: Path, name: str, engine: str, options: dict[str, Any]) -> None:
    """Trains, and writes what test_engines.py compares to ``<name>.json``."""
    from peft import LoraConfig

    checkpoint = options.pop("resume", None)
    if lora := options.pop("lora", None):
        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
    data = preference_data(18)
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    trainer = make_trainer(folder / name, ContrastiveTrainer, train_dataset=data, **{**ENGINES[engine], **options})
    found = {"fingerprint": trainer.reference.cache.fingerprint, "padded": trainer.packed.padded}
    found["sharded"] = sum(map(is_sharded, trainer.model.parameters()))
    trainer.train(resume_from_checkpoint=checkpoint)
    found |= {"losses": losses(trainer), "ref_model": trainer.ref_model and "kept"}
    trainer.save_model(str(folder / name / "final"))
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


def run_all(folder: Path, runs: list) -> None:
    for name, engine, options in runs:
        run(folder, name, engine, dict(options))


if __name__ == "__main__":
    torch.set_num_threads(1)
    to_run = json.loads(sys.argv[2])
    if to_run[0][1] == "zero3":
        # Without a GPU accelerate would find no backend for DeepSpeed, and each process would be alone.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    run_all(Path(sys.argv[1]), to_run)
    os._exit(0)  # at the normal exit, gloo's threads sometimes abort or block the process
