"""Every loss of TRL 1.16 equals TRL's own, full and LoRA, on every form of data; and the deliberate differences."""

from __future__ import annotations

import inspect
import math

import pytest
from datasets import Dataset
from peft import LoraConfig

from cpt_kernels.losses import LOSSES
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import preference_rows
from tests.helpers.trl_runs import (
    LOGPS,
    LOSS_TOLERANCE,
    REWARDS,
    TOKEN_MEANS,
    Record,
    assert_same_steps,
    one_thread,
    run_ours,
    run_trl,
)

STEPS = 10
PAIRS = 4  # per step
EPOCHS = 2

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

# Options that a loss needs, or whose defaults would hide their effect.
OPTIONS = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.5, "beta": 0.5},
    "sigmoid_norm": {"beta": 2.0},
    "sppo_hard": {"beta": 0.5},  # at 0.1 the loss is 50, of which fp32 rounding exceeds the tolerance
}
TRLS = [name for name, row in LOSSES.items() if row.trl == name]
CHANGES = {
    "several": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "several, one of them not separable": {"loss_type": ["aot", "ipo"]},
    "forward KL": {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"loss_type": ["hinge", "sft"], "f_divergence_type": "js_divergence"},
    "alpha divergence": {
        "loss_type": "ipo",
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
    },
    "alpha divergence, default": {"loss_type": "sigmoid_norm", "f_divergence_type": "alpha_divergence"},
    "LD-DPO": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "LD-DPO, tails unseen": {"loss_type": ["ipo", "sft"], "ld_alpha": 0.0},
    "LD-DPO, aot_unpaired": {"loss_type": "aot_unpaired", "ld_alpha": 0.5},
    "WPO": {"loss_type": "sigmoid", "use_weighting": True},
    "WPO, LD-DPO, several": {"loss_type": ["sppo_hard", "apo_zero"], "use_weighting": True, "ld_alpha": 0.5},
}


def message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text.strip()}]


def rows(form: str) -> Dataset:
    plain = preference_rows(STEPS * PAIRS // EPOCHS)
    sides = ("chosen", "rejected")
    if form == "string":
        return Dataset.from_list([{key: row[key] for key in ("prompt", *sides)} for row in plain])
    if form == "implicit":
        return Dataset.from_list([{side: row["prompt"] + row[side] for side in sides} for row in plain])
    return Dataset.from_list(
        [{"prompt": message("user", r["prompt"])} | {s: message("assistant", r[s]) for s in sides} for r in plain]
    )


def both(folder, form: str, tuned: str, **options) -> tuple[Record, Record]:
    """Returns the records of our run and of TRL's."""
    options |= {"max_steps": STEPS, "per_device_train_batch_size": PAIRS}
    if tuned == "lora":
        options |= {"learning_rate": 1e-2, "peft_config": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")}
    return tuple(run(folder / run.__name__, rows(form), **options) for run in (run_ours, run_trl))


def assert_parity(ours: Record, theirs: Record, rewards: bool = True) -> None:
    assert_same_steps(ours, theirs, (*(REWARDS if rewards else ()), *LOGPS, *TOKEN_MEANS))
    assert set(theirs.logs[0]) <= set(ours.logs[0])
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert ours.logs[-1]["num_tokens"] == theirs.logs[-1]["num_tokens"]
    moved = ours.logs[STEPS // EPOCHS]["loss"] - ours.logs[0]["loss"]  # the same rows, one epoch later
    assert abs(moved) > 10 * LOSS_TOLERANCE


def test_these_are_all_of_trls():
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    source = inspect.getsource(dpo_trainer.DPOTrainer._compute_loss)
    assert [name for name in TRLS if f'loss_type == "{name}"' not in source] == []
    assert len(TRLS) == source.count('loss_type == "') == 15


@pytest.mark.parametrize("form", ["string", "conversational", "implicit"])
@pytest.mark.parametrize("tuned", ["full", "lora"])
@pytest.mark.parametrize("loss", TRLS)
def test_every_step_is_trls(tmp_path, loss, tuned, form):
    ours, theirs = both(tmp_path, form, tuned, loss_type=loss, **OPTIONS.get(loss, {}))
    assert_parity(ours, theirs, rewards=loss != "sft")


@pytest.mark.parametrize(("tuned", "form"), [("full", "string"), ("lora", "conversational")])
@pytest.mark.parametrize("change", CHANGES)
def test_every_step_of_what_changes_a_loss_is_trls(tmp_path, change, tuned, form):
    assert_parity(*both(tmp_path, form, tuned, **CHANGES[change]))


def test_a_reference_that_follows_the_policy(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.4}
    options |= {"precompute_ref_log_probs": False, "max_steps": STEPS, "per_device_train_batch_size": PAIRS}
    ours, theirs = (
        run(tmp_path / run.__name__, rows("string"), ref_model=tiny_model("qwen2"), **options)
        for run in (run_ours, run_trl)
    )
    assert_parity(ours, theirs)
    assert abs(ours.logs[3]["rewards/chosen"]) < abs(
        ours.logs[2]["rewards/chosen"]
    )  # the reference moved after the third step


# --- Deliberate differences ---


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def first_step(run, folder, **options) -> dict[str, float]:
    """Returns the log of one step on one pair, whose margin is not 0 as the reference is another model."""
    arguments = {"max_steps": 1, "per_device_train_batch_size": 1, "ref_model": tiny_model("qwen2", seed=1)}
    return run(folder / run.__name__, rows("string"), **arguments, **options).logs[0]


def test_label_smoothing_of_sigmoid_is_not_ignored(tmp_path):
    """TRL 1.16 accepts the option and computes plain DPO; ours computes conservative DPO."""
    theirs, ours = (first_step(run, tmp_path, beta=1.0, label_smoothing=0.2) for run in (run_trl, run_ours))
    margin = ours["rewards/margins"]
    assert abs(margin) > 0.1 and theirs["rewards/margins"] == pytest.approx(margin, abs=1e-4)
    assert theirs["loss"] == pytest.approx(softplus(-margin), abs=1e-4)
    assert ours["loss"] == pytest.approx(0.8 * softplus(-margin) + 0.2 * softplus(margin), abs=1e-4)


def test_sft_runs_no_reference(tmp_path):
    """TRL runs a reference only for its metrics. Here the reward is beta times the log-prob."""
    theirs, ours = (first_step(run, tmp_path, loss_type="sft") for run in (run_trl, run_ours))
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ours["rewards/chosen"] == pytest.approx(0.1 * ours["logps/chosen"], abs=1e-4)
    assert abs(theirs["rewards/chosen"] - ours["rewards/chosen"]) > 0.1
    assert not (tmp_path / "run_ours" / "cache").exists()


def test_the_auxiliary_loss_is_over_unique_tokens(tmp_path):
    """The tokens of a prompt count once; in TRL and with share_prompts=false they count once per completion."""
    options = {"max_steps": 1, "router_aux_loss_coef": 0.5, "per_device_train_batch_size": PAIRS}
    theirs, unshared, shared = (
        run(tmp_path / name, rows("string"), model=tiny_model("mixtral"), **options, **more).logs[0]
        for name, run, more in (
            ("trl", run_trl, {}),
            ("unshared", run_ours, {"share_prompts": "false"}),
            ("shared", run_ours, {}),
        )
    )
    for name in ("loss", "aux_loss"):
        assert unshared[name] == pytest.approx(theirs[name], abs=1e-4)
    assert abs(shared["aux_loss"] - theirs["aux_loss"]) > 5e-4
    without = theirs["loss"] - 0.5 * theirs["aux_loss"]
    assert shared["loss"] == pytest.approx(without + 0.5 * shared["aux_loss"], abs=1e-4)


def test_losses_that_trl_refuses_or_crashes_on(tmp_path):
    """WPO with sft: TRL multiplies an expanded tensor in place and fails. Ours leaves the sft term unweighted."""
    options = {"loss_type": ["sigmoid", "sft"], "use_weighting": True, "max_steps": 2, "per_device_train_batch_size": 2}
    with pytest.raises(RuntimeError, match="unsupported operation"):
        run_trl(tmp_path / "trl", rows("string"), **options)
    assert len(run_ours(tmp_path / "ours", rows("string"), **options).logs) == 2
