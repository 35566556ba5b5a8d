"""What the trainer refuses: shared weights, unsupported engines, dropout in shared prompts, foreign checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Adafactor

from cpt_kernels.config import ContrastiveConfig
from cpt_kernels.model.sharding import check_fsdp, check_optimizer
from cpt_kernels.training.checks import check_engine, check_machine, check_reference_model
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config
from tests.helpers.trl_runs import make_trainer


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig())])
def test_a_reference_with_the_policys_weights(wrap):
    """It would be frozen, and its adapter with it."""
    model = tiny_model("llama")
    policy = wrap(model)
    with pytest.raises(ValueError, match="model and ref_model are the same weights: leave ref_model out"):
        check_reference_model(policy, model)
    check_reference_model(policy, tiny_model("llama"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"version": 1}, "FSDP1 is not supported: set fsdp_version to 2"),
        ({"fsdp_offload_params": True}, "no key 'offload_params': transformers calls it cpu_offload"),
        ({"no_such": 1}, "no key 'no_such': its keys are activation_checkpointing, "),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 9}, "set TRANSFORMER_BASED_WRAP"),
        ({"xla": True}, "xla is not supported"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused_before_models_are_loaded(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model="no-such-model", fsdp=True, fsdp_config=given)


@pytest.mark.parametrize(("word", "mend"), [("hybrid_shard", "dp_replicate_size and dp_shard"), ("no_shard", "is DDP")])
def test_strategies_of_fsdp1_are_refused(tmp_path, word, mend):
    for fsdp in (f"{word} auto_wrap", ["auto_wrap", word]):
        with pytest.raises(ValueError, match=f"fsdp={word} is of FSDP1, which is not supported: .*{mend}"):
            config(tmp_path, fsdp=fsdp)


def test_fsdp1_of_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP1 is not supported: set fsdp_version to 2"):
        check_fsdp(config(tmp_path))
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_fsdp(config(tmp_path))
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert config(tmp_path, gradient_checkpointing=False).gradient_checkpointing is True


def test_values_of_deepspeed_that_contradict_options(tmp_path):
    args = config(tmp_path)
    args.hf_deepspeed_config = SimpleNamespace(mismatches=["- ds zero=1 vs hf one=2", "- ds a=1 vs hf b=2"])
    with pytest.raises(ValueError, match=r"\(ds zero=1 vs hf one=2; ds a=1 vs hf b=2\): set them to auto"):
        check_machine(args)


def test_zero_says_which_optimizers_take_other_steps(caplog):
    """Adafactor's statistics are those of rows and columns, and ZeRO trains flat parts of weights."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    accelerator = SimpleNamespace(state=state, is_fsdp2=False, is_main_process=True, device="cpu")
    check_optimizer(torch.optim.AdamW, {"lr": 1e-2}, accelerator)
    assert not caplog.records
    check_optimizer(Adafactor, {"lr": 1e-2, "scale_parameter": False, "relative_step": False}, accelerator)
    assert "Adafactor does not take the steps of one process under ZeRO" in caplog.text


def test_the_optimizer_that_deepspeed_names_is_checked(tmp_path, caplog):
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator: Any = SimpleNamespace(state=state, is_fsdp2=False, is_main_process=True, device="cpu")
    args = config(tmp_path, optim="adafactor")  # which is not used
    check_engine(args, accelerator)
    assert not caplog.records
    plugin.deepspeed_config["optimizer"] = {"type": "Adafactor", "params": {"lr": 1e-2}}
    check_engine(args, accelerator)
    assert "Adafactor does not take the steps of one process under ZeRO" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    other = make_trainer(tmp_path, model=tiny_model("qwen2"), max_steps=2)
    with pytest.raises(ValueError, match="checkpoint of another model: its model_type is llama"):
        other.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))


def test_dropout_is_disabled_or_prompts_are_not_shared(tmp_path):
    def model():
        made = tiny_model("llama")
        for layer in made.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return made

    off = make_trainer(tmp_path, model=model(), max_steps=1)
    assert off.collator.share_prompts and off.model.model.layers[0].self_attn.attention_dropout == 0
    on = make_trainer(tmp_path, model=model(), max_steps=1, disable_dropout=False)
    assert not on.collator.share_prompts
    with pytest.raises(ValueError, match="share_prompts=true with dropout"):
        make_trainer(tmp_path, model=model(), disable_dropout=False, share_prompts="true")
    with pytest.raises(ValueError, match="sharing=tree with dropout"):
        make_trainer(tmp_path, model=model(), disable_dropout=False, sharing="tree")


def test_what_sequences_share(tmp_path, caplog):
    def shared(**options):
        collator = make_trainer(tmp_path, model=tiny_model("llama"), max_steps=1, **options).collator
        return collator.share_prompts, collator.minimum_shared

    expected = {"auto": (True, 64), "tree": (True, 1), "prompt": (True, None), "none": (False, None)}
    assert {how: shared(sharing=how) for how in expected} == expected
    assert {how: shared(share_prompts=how) for how in ("auto", "true", "false")} == {
        "auto": (True, 64),
        "true": (True, None),
        "false": (False, None),
    }
    with pytest.raises(ValueError, match=r"sharing=tree: LlamaForCausalLM does not run trees .*padded row"):
        shared(sharing="tree", packing="false")


def test_both_names_of_sharing():
    args = ContrastiveConfig("out", share_prompts=False)
    assert args.sharing == "none"
    args.share_prompts = "true"
    assert args.sharing == "prompt"
    with pytest.raises(ValueError, match="share_prompts=true contradicts sharing=tree"):
        ContrastiveConfig("out", share_prompts=True, sharing="tree")
    with pytest.raises(ValueError, match="sharing"):
        ContrastiveConfig("out", sharing="trees")
