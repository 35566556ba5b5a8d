"""Hybrid models, whose states are forked in packed rows, take TRL's steps."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tests.helpers.architectures import VOCAB
from tests.helpers.tiny_configs import tiny_causal_lm
from tests.helpers.trl_runs import LOGPS, PAIRS, REWARDS, assert_same_steps, one_thread, run_ours, run_trl
from tests.trl.test_parity import STEPS, tokenised_pairs

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

# Its layers loop over chunks of 64 tokens, in Python.
SHALLOW = {"qwen3_next": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}}


@pytest.mark.parametrize("ahead", [True, False], ids=["cached", "live"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["lfm2", "bamba", "qwen3_next"])
def test_every_step_is_trls(kind: str, adapter: bool, ahead: bool, tmp_path) -> None:
    """Reference log-probs come from a pass ahead, or from the reference during the steps."""
    rows = tokenised_pairs(STEPS // 4 * PAIRS)
    options = {"max_steps": STEPS, "router_aux_loss_coef": 0.0, "precompute_ref_log_probs": ahead}
    if adapter:
        # By name: PEFT 0.19 takes "all-linear" apart into letters where experts are joined (Qwen3-Next).
        targets = ["q_proj", "v_proj", "in_proj", "in_proj_qkvz", "in_proj_ba", "out_proj", "o_proj"]
        options["peft_config"] = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")

    def model() -> torch.nn.Module:
        return tiny_causal_lm(kind, vocab_size=VOCAB, **SHALLOW.get(kind, {})).to(torch.float32)

    def reference() -> dict:
        return {} if ahead or adapter else {"ref_model": model()}  # TRL loads it by the name of the model otherwise

    theirs = run_trl(tmp_path / "trl", rows, model=model(), **reference(), **options)
    ours = run_ours(tmp_path / "ours", rows, model=model(), **reference(), **options)
    # In the first step the policy is the reference, and the accuracy of margins that are zero up to rounding is chance.
    accuracies = "rewards/accuracies"
    assert_same_steps(ours, theirs, (*(name for name in REWARDS if name != accuracies), *LOGPS))
    for a, b in zip(ours.logs[1:], theirs.logs[1:]):
        assert a[accuracies] == b[accuracies]
