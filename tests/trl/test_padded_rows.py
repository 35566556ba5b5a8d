"""Hybrid and recurrent models, which run in padded rows, take TRL's steps."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tests.helpers.architectures import VOCAB
from tests.helpers.tiny_configs import tiny_causal_lm
from tests.helpers.trl_runs import LOGPS, PAIRS, REWARDS, assert_same_steps, one_thread, run_ours, run_trl
from tests.trl.test_parity import STEPS, tokenised_pairs

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["lfm2", "bamba", "qwen3_next"])
def test_every_step_is_trls(kind: str, adapter: bool, tmp_path) -> None:
    rows = tokenised_pairs(STEPS // 4 * PAIRS)
    options = {"max_steps": STEPS, "router_aux_loss_coef": 0.0}
    if adapter:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    models = (tiny_causal_lm(kind, vocab_size=VOCAB).to(torch.float32) for _ in range(2))
    theirs = run_trl(tmp_path / "trl", rows, model=next(models), **options)
    ours = run_ours(tmp_path / "ours", rows, model=next(models), **options)
    assert_same_steps(ours, theirs, (*REWARDS, *LOGPS))
