"""Image-text models take TRL's steps on rows with images, with prompts and images run once."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.helpers.image_models import image_rows, tiny_image_model, tiny_processor
from tests.helpers.trl_runs import LOGPS, REWARDS, assert_same_steps, one_thread, run_ours, run_trl

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

STEPS = 10


_SLOW = [(kind, adapter) for kind in ("qwen2_5_vl", "llava", "gemma3") for adapter in (False, True)][1:]


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("qwen2_5_vl", False), *(pytest.param(*each, marks=pytest.mark.slow) for each in _SLOW)],
)
def test_every_step_is_trls(kind: str, adapter: bool, tmp_path) -> None:
    data = Dataset.from_list(image_rows(24))
    options = {"max_steps": STEPS, "per_device_train_batch_size": 4, "max_length": None}
    if adapter:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def models() -> dict:
        made = {"model": tiny_image_model(kind, torch.float32), "processing_class": tiny_processor(kind)}
        return made if adapter else {**made, "ref_model": tiny_image_model(kind, torch.float32)}

    theirs = run_trl(tmp_path / "trl", data, **models(), **options, precompute_ref_log_probs=False)
    ours = run_ours(tmp_path / "ours", data, **models(), **options)
    accuracies = "rewards/accuracies"
    assert_same_steps(ours, theirs, (*(name for name in REWARDS if name != accuracies), *LOGPS))
    assert abs(ours.logs[-1]["rewards/margins"]) > 1e-2
