"""Runs one rank of test_engines.py: the trainer on models in folders, under FSDP2 or ZeRO, or alone."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.model.conditions import is_sharded
from tests.helpers.toy import losses, make_trainer, preference_data
from tests.training.test_trees import conversations


def zero(**options: Any) -> dict[str, Any]:
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": options,
        },
        "use_cpu": False,
        "accelerator_config": {"use_configured_state": True},
    }


# What ZeRO-3 keeps gathered, and in buffers, is a layer at most.
SMALL = {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 0, "sub_group_size": 1_000_000}
SMALL |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
ENGINES: dict[str, dict[str, Any]] = {
    "alone": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "zero2": zero(stage=2),
    "zero3": zero(stage=3, stage3_param_persistence_threshold=0),
    "zero3 small": zero(stage=3, stage3_param_persistence_threshold=0, **SMALL),
}


class Meter(threading.Thread):
    """Measures the peak of this process's anonymous memory, which leaves out pages of mapped files, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.empty = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def take(self) -> int:
        peak, self.peak = self.peak, self.now()
        return peak - self.empty


class CountedTrainer(ContrastiveTrainer):
    """Counts the bytes that the first forward saves for the backward, without parameters."""

    saved = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = super().compute_loss(*args, **kwargs)
        self.saved = self.saved or sum(storages.values())
        return loss


def run(folder: Path, name: str, engine: str, options: dict[str, Any]) -> None:
    """Trains, and writes what test_engines.py compares to ``<name>.json``."""
    from peft import LoraConfig

    checkpoint = options.pop("resume", None)
    if lora := options.pop("lora", None):
        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
    data = conversations(6) if options.pop("trees", False) else preference_data(18)
    meter = Meter() if options.pop("measure", False) else None
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    trainer = make_trainer(
        folder / name,
        CountedTrainer if meter else ContrastiveTrainer,
        train_dataset=data,
        eval_dataset=data if options.get("load_best_model_at_end") else None,
        **{**ENGINES[engine], **options},
    )
    found = {"fingerprint": trainer.reference.cache.fingerprint, "padded": trainer.packed.padded}
    found["loading"] = meter and max(gather_object([meter.take()]))
    found["sharded"] = sum(map(is_sharded, trainer.model.parameters()))
    trainer.train(resume_from_checkpoint=checkpoint)
    found |= {"losses": losses(trainer), "ref_model": trainer.ref_model and "kept"}
    found |= {
        "step": meter and max(gather_object([meter.take()])),
        "saved": max(gather_object([getattr(trainer, "saved", 0)])),
    }
    trainer.save_model(str(folder / name / "final"))
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


def run_all(folder: Path, runs: list) -> None:
    for name, engine, options in runs:
        run(folder, name, engine, dict(options))


def run_rank(folder: Path, runs: list) -> None:
    if runs[0][1].startswith("zero"):
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # DeepSpeed's CPUs are no use_cpu
        # Without a GPU accelerate would find no backend for DeepSpeed, and each process would be alone.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    run_all(folder, runs)
