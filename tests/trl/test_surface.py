"""Arguments that users of TRL pass to the trainer, and methods and attributes that they use."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.model.loading import prepare_adapter
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, losses, preference_data, word_tokenizer
from tests.helpers.trl_runs import (
    LOGPS,
    REWARDS,
    assert_same_steps,
    both,
    make_trainer,
    one_thread,
    rows,
    run_ours,
    run_trl,
)

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
collators = pytest.importorskip("trl.trainer.dpo_trainer")


def make_trl_trainer(folder, model, ref_model=None, peft_config=None, **options):
    options |= {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}
    return trl.DPOTrainer(
        model, ref_model, trl.DPOConfig(**options), train_dataset=rows(), processing_class=word_tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


# --- Arguments ---


class LeftPadding(collators.DataCollatorForPreference):
    def torch_call(self, examples):
        batch = super().torch_call(examples)
        order = batch["attention_mask"].argsort(dim=1, stable=True)  # pads come first
        return {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask", "completion_mask")}


def with_collator(base, collator):
    class Collating(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, data_collator=collator, **kwargs)

    return Collating


@pytest.mark.parametrize(
    "cut", [{}, {"max_length": 14}, {"max_length": 14, "truncation_mode": "keep_end"}], ids=["", "start", "end"]
)
def test_a_collator_written_for_trl(tmp_path, cut):
    """It truncates to less than max_length; the reference, kept in memory, scores the truncated completions."""
    collator = collators.DataCollatorForPreference(pad_token_id=0, **cut)
    options = {"precompute_ref_log_probs": False, "ref_model": tiny_model("qwen2"), "max_length": 16}
    both(tmp_path, *(with_collator(base, collator) for base in (ContrastiveTrainer, trl.DPOTrainer)), **options)


def test_collators_pad_as_they_like(tmp_path):
    usual = make_trainer(tmp_path)
    left = make_trainer(tmp_path, data_collator=LeftPadding(pad_token_id=0))
    packed = make_trainer(tmp_path, data_collator=PackedCollator(share_prompts=False))
    for trainer in (usual, left, packed):
        trainer.train()
    assert losses(left) == losses(usual)
    assert losses(packed) == pytest.approx(losses(usual), abs=1e-5) and not packed.collator.share_prompts


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            lambda rows: {"input_ids": torch.zeros(2, 2)},
            "data_collator returned input_ids: use a PackedCollator",
        ),
        (
            lambda rows: dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), torch.ones(3, 4)),
            "3 sequences",
        ),
        (collators.DataCollatorForPreference(0, max_length=1), "truncated a whole completion"),
    ],
)
def test_collators_that_do_not_fit(tmp_path, collate, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, data_collator=collate).train()


def test_attributes_set_after_construction(tmp_path):
    usual, changed = make_trainer(tmp_path), make_trainer(tmp_path)
    changed.data_collator = collators.DataCollatorForPreference(pad_token_id=0)
    for trainer in (usual, changed):
        trainer.train()
    assert losses(changed) == losses(usual)
    changed.eval_dataset = preference_data(4, seed=5)
    with pytest.raises(ValueError, match="is not tokenized: give it to the trainer's constructor, or to evaluate"):
        changed.evaluate()


def test_an_optimizer_and_a_schedule(tmp_path):
    def optimizing(base):
        class Optimizing(base):
            def __init__(self, model, *args, **kwargs):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
                schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
                super().__init__(model, *args, optimizers=(optimizer, schedule), **kwargs)

        return Optimizing

    both(tmp_path, optimizing(ContrastiveTrainer), optimizing(trl.DPOTrainer))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_adapters(tmp_path, change):
    made = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | change)
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "peft_config": made}
    ours, theirs = (run(tmp_path / run.__name__, rows(), **options) for run in (run_ours, run_trl))
    assert_same_steps(ours, theirs, (*REWARDS, *LOGPS))
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_config": {"r": 4}}, "peft_config is dict: expected one of peft"),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "adds tokens to prompts"),
        ({"quantization_config": object()}, "quantization_config is for a model given by name"),
        ({"args": trl.DPOConfig("x", use_cpu=True, bf16=False, report_to="none")}, "args is a DPOConfig of trl"),
        ({"processing_class": "tokenizer"}, "processing_class is str, expected a tokenizer"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, arguments, message):
    kept = {"args": config(tmp_path), "processing_class": word_tokenizer()} | arguments
    with pytest.raises(ValueError, match=message):
        ContrastiveTrainer(tiny_model("llama"), train_dataset=preference_data(4), **kept)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer", "the argument tokenizer was removed: pass it as processing_class"),
        ("beta", r"the argument beta was removed: set it in args=DPOConfig\(beta=...\)"),
        ("max_prompt_length", "the argument max_prompt_length was removed: set max_length"),
        ("ref_adapter_name", "for a model that comes with an adapter, that adapter.s start values are the reference"),
        ("is_encoder_decoder", "only decoders are supported"),
    ],
)
def test_removed_arguments(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveTrainer(tiny_model("llama"), args=config(tmp_path), train_dataset=preference_data(4), **{name: 1})
    with pytest.raises(TypeError, match="the trainer has no argument reward_model"):
        ContrastiveTrainer(tiny_model("llama"), args=config(tmp_path), reward_model=1)


def test_two_adapters(tmp_path):
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(tmp_path, model=adapted, peft_config=LoraConfig())


def test_an_adapter_that_is_frozen(tmp_path):
    """PEFT loads adapters frozen by default. The trainer loads a folder with an adapter to train it on."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the model's adapter is frozen.*is_trainable=True"):
        make_trainer(tmp_path, model=adapted)
    loaded = make_trainer(tmp_path, model=str(tmp_path / "adapter")).model
    assert all(p.requires_grad == ("lora_" in name) for name, p in loaded.named_parameters())
    with pytest.raises(ValueError, match="all parameters of the model have requires_grad=False"):
        make_trainer(tmp_path, model=tiny_model("llama").requires_grad_(False))
    assert make_trainer(tmp_path, model=adapted, train_dataset=None, eval_dataset=preference_data(4)).evaluate()


def test_a_model_built_in_memory_has_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="pass the tokenizer as processing_class"):
        make_trainer(tmp_path, processing_class=None)


def test_the_best_of_several_evaluation_sets(tmp_path):
    sets = {"a": preference_data(4, seed=3), "b": preference_data(5, seed=4)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "eval_dataset": sets}
    with pytest.raises(ValueError, match=r"names no evaluation set.*set a_rewards/margins$"):
        make_trainer(tmp_path, metric_for_best_model="rewards/margins", **options)
    trainer = make_trainer(tmp_path, metric_for_best_model="eval_b_loss", greater_is_better=False, **options)
    trainer.train()
    assert trainer.state.best_metric == min(e["eval_b_loss"] for e in trainer.state.log_history if "eval_b_loss" in e)


def test_init_kwargs_of_a_model_that_is_loaded(tmp_path, caplog):
    make_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert "model_init_kwargs has no effect: the model is loaded already" in caplog.text


def test_models_and_a_reference_by_name(tmp_path):
    """Both are loaded with model_init_kwargs."""
    word_tokenizer().save_pretrained(tmp_path / "model")
    for name, seed in (("model", 0), ("reference", 1)):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager", "revision": "main"}
    trainer = make_trainer(
        tmp_path,
        model=str(tmp_path / "model"),
        ref_model=str(tmp_path / "reference"),
        processing_class=None,
        model_init_kwargs=kwargs,
    )
    for packed in (trainer.packed, trainer.reference.packed):
        assert packed.model.dtype == torch.bfloat16 and packed.model.config._attn_implementation.endswith("eager")
    assert trainer.evaluate(preference_data(4, seed=3))["eval_rewards/margins"] != 0
    fp32 = make_trainer(tmp_path, model=str(tmp_path / "model"), processing_class=None)
    assert fp32.model.dtype == torch.float32


def test_adapters_are_prepared_as_trl_does_it(tmp_path):
    """QLoRA adapters train in bf16, except DoRA's magnitudes. Under ZeRO-3 checkpointing is reentrant."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    args = config(tmp_path, gradient_checkpointing=True)
    prepare_adapter(model, args)
    assert args.gradient_checkpointing_kwargs is None
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    model.is_loaded_in_4bit = True
    prepare_adapter(model, args)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    read_by_transformers = getattr(args, "activation_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
    assert read_by_transformers == {"use_reentrant": True}
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {dtype for name, dtype in dtypes.items() if "magnitude" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "magnitude" not in name} == {torch.bfloat16}


# --- Methods and attributes ---


def test_no_public_attribute_of_trls_trainer_is_missing(tmp_path):
    options = {"loss_type": ["sigmoid", "sft"], "beta": 0.3, "ld_alpha": 0.5, "label_smoothing": 0.1}
    ours = make_trainer(tmp_path, model=tiny_model("mixtral"), **options)
    theirs = make_trl_trainer(tmp_path, tiny_model("mixtral"), tiny_model("mixtral", seed=1), **options)
    assert [name for name in dir(theirs) if not name.startswith("_") and not hasattr(ours, name)] == []
    for name in ("beta", "ld_alpha", "label_smoothing", "loss_types", "loss_weights", "use_weighting", "padding_free"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("f_divergence_type", "f_alpha_divergence_coef", "router_aux_loss_coef", "aux_loss_enabled"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.aux_loss_enabled and not make_trainer(tmp_path, loss_weights=[1.0]).aux_loss_enabled
    assert make_trainer(tmp_path, model=tiny_model("mixtral"), router_aux_loss_coef=0.0).aux_loss_enabled is False
    assert ours.precompute_ref_logps and not make_trainer(tmp_path, sync_ref_model=True).precompute_ref_logps


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"ref_model": 1}, 1),
        ({"ref_model": 1, "precompute_ref_log_probs": True}, 1),
        ({"precompute_ref_log_probs": True}, None),
        ({}, 0),
        ({"sync_ref_model": True}, 0),
        ({"peft_config": LoraConfig(r=4, target_modules="all-linear")}, None),
    ],
    ids=["given", "given and precomputed", "precomputed", "start weights", "moving", "adapter"],
)
def test_the_reference_in_memory(tmp_path, options, held):
    """Its weights are those of the given reference, of seed 1, or the start weights, of seed 0."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    options = {"precompute_ref_log_probs": False, "model": model, **options}
    if "ref_model" in options:
        options["ref_model"] = tiny_model("llama", seed=options["ref_model"])
    for make in (make_trainer, make_trl_trainer):
        found = make(tmp_path, **options).ref_model
        if held is None:
            assert found is None
            continue
        expected = tiny_model("llama", seed=held)
        assert found is not model and not found.training
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.parameters(), expected.parameters()))
        assert "ref_model" not in options or found is options["ref_model"]


def test_the_reference_is_read(tmp_path, caplog):
    """``trainer.ref_model`` runs like any transformers model, also after training."""
    given, ids = tiny_model("llama", seed=1), torch.tensor([[5, 6, 7]])
    expected = tiny_model("llama", seed=1)(ids).logits
    trainer = make_trainer(tmp_path, ref_model=given)
    trainer.train()
    torch.testing.assert_close(trainer.ref_model(ids).logits, expected)
    with pytest.raises(AttributeError):
        trainer.ref_model = None
    assert "is not used" not in caplog.text
    assert make_trainer(tmp_path, ref_model=given, loss_type="sft").ref_model is None
    assert "ref_model is not used: the loss 'sft' has no reference" in caplog.text


def test_evaluation_of_every_kind_of_data(tmp_path):
    sets = {"a": preference_data(4, seed=3), "b": preference_data(5, seed=4)}
    trainer = make_trainer(tmp_path, eval_dataset=DatasetDict(sets))
    expected = trainer.evaluate()
    names = {name for name in expected if name.endswith("rewards/margins")}
    assert names == {"eval_a_rewards/margins", "eval_b_rewards/margins"}
    for found in (trainer.evaluate(sets), trainer.evaluate(DatasetDict(sets)), trainer.evaluate(trainer.eval_dataset)):
        assert {k: v for k, v in found.items() if "log" in k} == {k: v for k, v in expected.items() if "log" in k}
    one = trainer.evaluate("b", metric_key_prefix="held_out")
    assert one["held_out_logps/chosen"] == expected["eval_b_logps/chosen"]
    stream = trainer.evaluate(sets["a"].to_iterable_dataset())
    assert stream["eval_logps/chosen"] == pytest.approx(expected["eval_a_logps/chosen"], abs=1e-4)
    with pytest.raises(ValueError, match=r"the eval data is list; expected a Dataset or IterableDataset"):
        trainer.evaluate(list(sets["a"]))


def test_predictions_are_rewards(tmp_path):
    trainer = make_trainer(
        tmp_path, compute_metrics=lambda p: {"spread": float(np.ptp(p.predictions))}, eval_dataset=preference_data(4)
    )
    trainer.train()
    data = preference_data(5, seed=8)
    trainer.args.precompute_ref_log_probs = False
    trainer.reference.packed, trainer.reference.owned = (
        trainer.packed,
        False,
    )  # any model in memory can be the reference here
    output = trainer.predict(data)
    assert output.predictions.shape == (5, 2) and output.metrics["test_spread"] == np.ptp(output.predictions)
    margins = output.predictions[:, 0] - output.predictions[:, 1]
    assert output.metrics["test_rewards/margins"] == pytest.approx(margins.mean(), abs=1e-6)
    assert "eval_spread" in trainer.evaluate()


def test_metrics_batch_by_batch(tmp_path):
    """transformers calls the function per batch; here it is called once, for all pairs."""

    def compute_metrics(prediction, compute_result):
        return {"count": len(prediction.predictions) if compute_result else None}

    options = {"compute_metrics": compute_metrics, "batch_eval_metrics": True, "eval_dataset": preference_data(9)}
    assert make_trainer(tmp_path, **options).evaluate()["eval_count"] == 9


def test_new_data_after_training(tmp_path):
    """The start weights are not in memory; they are loaded again from their folder if it is unchanged."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    data = preference_data(4, seed=9)
    with_reference = make_trainer(tmp_path / "a", ref_model=tiny_model("llama"), model=str(tmp_path / "model"))
    again = make_trainer(tmp_path / "b", model=str(tmp_path / "model"))
    for trainer in (with_reference, again):
        trainer.train()
    assert again.reference.packed is None
    expected, found = (trainer.evaluate(data)["eval_rewards/margins"] for trainer in (with_reference, again))
    assert found == pytest.approx(expected, abs=1e-5) and abs(found) > 1e-3
    again.reference.packed = None
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"start weights.*holds other weights than training started from"):
        again.evaluate(preference_data(4, seed=10))


def test_new_data_after_training_of_an_adapter_that_came_with_the_model(tmp_path):
    def adapted():
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(tiny_model("llama"), lora)

    data = preference_data(4, seed=9)
    before = make_trainer(tmp_path / "a", model=adapted())
    expected = before.evaluate(data)
    after = make_trainer(tmp_path / "b", model=adapted(), learning_rate=1e-2)
    after.train()
    trained = {name: p.clone() for name, p in after.model.named_parameters()}
    found = after.evaluate(data)
    assert found["eval_rewards/margins"] != 0
    for name in ("chosen", "rejected"):
        reference = found[f"eval_logps/{name}"] - found[f"eval_rewards/{name}"] / after.args.beta
        assert reference == pytest.approx(expected[f"eval_logps/{name}"], abs=1e-4)
    assert all(torch.equal(p, trained[name]) for name, p in after.model.named_parameters())
