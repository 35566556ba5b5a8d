"""Adapters over weights that bitsandbytes quantized (QLoRA), on a CPU; run by `make test-quantised`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, set_seed

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.cli import main
from cpt_kernels.cli.options import ModelArguments
from cpt_kernels.cli.planned import shapes_of
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.planning.engines import state_bytes
from cpt_kernels.reference.fingerprint import fingerprint
from tests.helpers.architectures import tiny_model
from tests.helpers.command import bpe_tokenizer, read_metrics, run, word_pairs, write_model, write_rows
from tests.helpers.engine_run import run_rank
from tests.helpers.exactness import make_batch, make_rows
from tests.helpers.forked import run_ranks
from tests.helpers.toy import config, losses, preference_data, word_tokenizer
from tests.helpers.trl_runs import LOGPS, PAIRS, REWARDS, assert_same_steps, one_thread, run_ours, run_trl
from tests.trl.test_parity import tokenised_pairs

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make test-quantised")
_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS = {
    "nf4": _NF4,
    "fp4, nested": {**_NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    tiny_model("qwen2").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def quantized(folder: Path, **kind):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_the_bytes_of_quantized_weights(folder, kind):
    names = {"load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit"}
    names |= {"bnb_4bit_use_double_quant": "use_bnb_nested_quant"}
    given = {names[name]: value for name, value in KINDS[kind].items() if name in names}
    args = config(folder)
    shapes = shapes_of(ModelArguments(model_name_or_path=str(folder), dtype="float32", **given), args)
    model = quantized(folder, **KINDS[kind])
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]
        tensors += [getattr(parameter, "SCB", None)] if getattr(parameter, "SCB", None) is not None else []
    assert state_bytes(shapes, args)["weights"] == sum(tensor.nbytes for tensor in tensors)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def never_packed(folder: Path, **kind):
    """Returns a model for TRL, whose forwards in eval mode must not make bitsandbytes pack 4-bit weights."""
    model = quantized(folder, **kind)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


# --- FSDP2 ---


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=["whole", "sharded"])
def test_fsdp2_takes_the_steps_of_ddp(folder, tmp_path, storage):
    """4-bit weights in bytes stay whole on every process; those stored as floats are sharded.

    One process would add up gradients in another order, which bf16 adapters show.
    """
    kind = BitsAndBytesConfig(**_NF4, bnb_4bit_quant_storage=storage)
    common = {
        "model": str(folder),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora": {"r": 2},
        "quantization_config": kind,
    }
    runs = [[engine, engine, {**common, "per_device_train_batch_size": 3}] for engine in ("alone", "fsdp2")]
    run_ranks(tmp_path, 2, run_rank, tmp_path, runs[:1])
    run_ranks(tmp_path, 2, run_rank, tmp_path, runs[1:])
    ddp, fsdp = (json.loads((tmp_path / f"{engine}.json").read_text()) for engine in ("alone", "fsdp2"))
    assert fsdp["fingerprint"] == ddp["fingerprint"] and fsdp["sharded"] > ddp["sharded"] == 0
    assert len(ddp["losses"]) == 4 and fsdp["losses"] == pytest.approx(ddp["losses"], abs=1e-6)


# --- Comparison with TRL ---


class InFp32(TrainerCallback):
    """Puts adapters into fp32. Both trainers use bf16, in which differences in the last bit grow from step to step."""

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.bfloat16 or parameter.dim() == 1  # DoRA's magnitudes
                parameter.data = parameter.data.float()


@pytest.mark.parametrize(("kind", "adapter"), [*((kind, {}) for kind in KINDS), ("nf4", {"use_dora": True})])
def test_every_step_is_trls(folder, tmp_path, kind, adapter):
    rows = tokenised_pairs(5 * PAIRS)
    options = {"max_steps": 10, "learning_rate": 1e-2, "peft_config": lora(**adapter), "callbacks": [InFp32()]}
    ours = run_ours(tmp_path / "ours", rows, quantized(folder, **KINDS[kind]), **options)
    # TRL would score its reference ahead in eval mode, which rounds inputs to 8 bits.
    options["precompute_ref_log_probs"] = kind != "int8"
    theirs = run_trl(tmp_path / "trl", rows, model=never_packed(folder, **KINDS[kind]), **options)
    assert_same_steps(ours, theirs, (*REWARDS, *LOGPS))
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert ours.logs[-1]["loss"] < 0.95 * ours.logs[0]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_whole_is_not_rounded(folder, tmp_path, kind):
    """Rewards start at 0. They would not if the reference's head were in fp32 and the policy's in bf16."""
    adapter = lora(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[5, 7])
    trainer = ContrastiveTrainer(
        quantized(folder, **KINDS[kind]),
        args=config(tmp_path, max_steps=3),
        train_dataset=preference_data(8),
        processing_class=word_tokenizer(),
        peft_config=adapter,
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    whole = {name for name, parameter in start.items() if parameter.dtype == torch.float32}
    assert {name.split(".")[-3] for name in whole} == {"modules_to_save", "token_adapter"}
    assert {parameter.dtype for name, parameter in start.items() if name not in whole} == {torch.bfloat16}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters() if n in whole)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("nf4", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}), ("int8", {})],
    ids=["whole head", "scored in eval mode"],
)
def test_where_trls_rewards_do_not_start_at_0(folder, tmp_path, kind, adapter):
    rows, options = tokenised_pairs(PAIRS), {"max_steps": 1, "peft_config": lora(**adapter)}
    ours = run_ours(tmp_path / "ours", rows, quantized(folder, **KINDS[kind]), **options)
    theirs = run_trl(tmp_path / "trl", rows, model=never_packed(folder, **KINDS[kind]), **options)
    assert abs(theirs.logs[0]["rewards/margins"]) > 1e-5 > abs(ours.logs[0]["rewards/margins"])


def test_rounding_of_an_adapter_is_no_warning(folder, tmp_path, caplog):
    """DoRA computes norms in bf16, so its first log-probs differ from the reference's by that rounding."""
    train(folder, tmp_path, peft_config=lora(use_dora=True))
    assert "rewards do not start at 0" not in caplog.text


# --- The reference ---


def digest(model) -> str:
    return fingerprint(model, compute_dtype="float32", attention="shared_prompt")


def test_another_quantisation_is_another_reference(folder, tmp_path):
    kinds = {
        **KINDS,
        "nested": {**_NF4, "bnb_4bit_use_double_quant": True},
        "fp4": {**_NF4, "bnb_4bit_quant_type": "fp4"},
        "computes in bf16": {**_NF4, "bnb_4bit_compute_dtype": torch.bfloat16},
        "stored as bf16": {**_NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    }
    digests = {name: digest(quantized(folder, **kind)) for name, kind in kinds.items()}
    digests["not at all"] = digest(tiny_model("qwen2"))
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_reference_stays_itself(folder, tmp_path, kind):
    """The fingerprint is the same after a forward, without the adapter, and after saving. It covers the scales."""
    model = quantized(folder, **KINDS[kind])
    expected = digest(model)
    model.save_pretrained(tmp_path / "saved")
    assert digest(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)) == expected
    packed = PackedModel(model.eval())
    with torch.no_grad():
        packed(make_batch(make_rows("sft"), packed))
    assert digest(model) == expected
    adapted = get_peft_model(model, lora(init_lora_weights=False))
    assert fingerprint(adapted, compute_dtype="float32", attention="shared_prompt", adapters=False) == expected
    assert digest(adapted) != expected
    layer = model.model.layers[0].self_attn.q_proj.base_layer
    scales = layer.state.SCB if kind == "int8" else layer.weight.quant_state.absmax
    scales[0] += 1
    assert fingerprint(adapted, compute_dtype="float32", attention="shared_prompt", adapters=False) != expected


# --- The model ---


def train(folder, tmp_path, model=None, ref_model=None, peft_config=None, data=None, **options) -> list[float]:
    """Returns the losses of a few steps, by default with a new adapter over nf4."""
    trainer = ContrastiveTrainer(
        quantized(folder, **_NF4) if model is None else model,
        ref_model,
        args=config(tmp_path, max_steps=3, **options),
        train_dataset=preference_data(12) if data is None else data,
        processing_class=word_tokenizer(),
        peft_config=lora() if peft_config is None and not hasattr(model, "peft_config") else peft_config,
    )
    trainer.train()
    return losses(trainer)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> list[float]:
    return train(folder, tmp_path_factory.mktemp("plain"))


def test_whichever_way_a_model_comes(plain, folder, tmp_path):
    kind = BitsAndBytesConfig(**_NF4)
    quantized(folder, **_NF4).save_pretrained(tmp_path / "saved")
    ways = {
        "by name": {"model": str(folder), "model_init_kwargs": {"quantization_config": kind}},
        "quantized on disk": {"model": str(tmp_path / "saved")},
        "as PEFT prepares it": {"model": prepare_model_for_kbit_training(quantized(folder, **_NF4))},
        "with a reference": {"ref_model": quantized(folder, **_NF4)},
        "with a reference that stays": {"ref_model": quantized(folder, **_NF4), "precompute_ref_log_probs": False},
    }
    for name, way in ways.items():
        assert train(folder, tmp_path / name, **way) == plain, name


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_offloading": True},
    ],
    ids=["checkpointed", "reentrant", "offloaded"],
)
def test_engines(plain, folder, tmp_path, options):
    assert train(folder, tmp_path, **options) == plain


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_that_came_with_the_model(folder, tmp_path, kind, stream):
    """For a stream, the reference is a copy of the model with its adapter."""
    torch.manual_seed(0)
    model = get_peft_model(quantized(folder, **KINDS[kind]), lora(init_lora_weights=False))
    data = preference_data(16).to_iterable_dataset() if stream else None
    found = train(folder, tmp_path, model, data=data)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[1] != found[0]


@pytest.mark.parametrize(
    "kind",
    [_NF4, {**_NF4, "bnb_4bit_quant_storage": torch.bfloat16}, {"load_in_8bit": True}],
    ids=["nf4", "stored as bf16", "int8"],
)
def test_a_quantized_head(folder, kind):
    with pytest.raises(ValueError, match="the output head is quantized"):
        PackedModel(quantized(folder, **kind, llm_int8_skip_modules=["nothing"]))


@pytest.mark.parametrize("wrapped", [False, True])
def test_dora_over_8_bits(folder, tmp_path, wrapped):
    """PEFT itself would fail in the first step with an AttributeError on None."""
    model, adapter = quantized(folder, **KINDS["int8"]), lora(use_dora=True)
    with pytest.raises(ValueError, match=r"8-bit .*: load the model in 4 bits \(nf4 or fp4\), or set use_dora=False"):
        if wrapped:
            model, adapter = get_peft_model(model, adapter), None
        train(folder, tmp_path, model, peft_config=adapter)


def test_weights_that_are_packed_for_inference(folder):
    """A forward in eval mode packs them on some CPUs. This rounds scales, and gives no gradient."""
    model = quantized(folder, **_NF4)
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="load the model again"):
        PackedModel(model)


def test_nobody_packs_weights_between_two_steps(folder):
    model = quantized(folder, **_NF4).eval()
    PackedModel(model)
    with torch.no_grad():
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    PackedModel(model)


# --- The command ---


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_cpt_train_resumes_bit_by_bit(tmp_path, caplog, bits):
    """Both runs read a cache that `cpt cache build` filled."""
    pairs = word_pairs(24)
    folder = write_model(tmp_path / "model", bpe_tokenizer(text for row in pairs for text in row.values()))
    set_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    flags = ["--model_name_or_path", folder, "--dataset_name", data, "--ref_cache_dir", tmp_path / "cache"]
    flags += ["--dtype", "float32", f"--load_in_{bits}", "--use_peft", "--use_cpu", "--report_to", "none"]
    assert main(["cache", "build", *map(str, flags)]) == 0
    caplog.clear()
    flags += ["--lora_target_modules", "all-linear", "--lora_r", 4, "--learning_rate", "1e-2", "--logging_steps", 1]
    flags += ["--per_device_train_batch_size", 4, "--lr_scheduler_type", "constant", "--save_steps", 3]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*flags, "--output_dir", whole, "--max_steps", 6) == 0
    assert "all 48 reference log-probs were cached" in caplog.text
    assert run(*flags, "--output_dir", parts, "--max_steps", 3) == 0
    assert run(*flags, "--output_dir", parts, "--max_steps", 6, "--resume_from_checkpoint", "last") == 0
    expected, found = ([r["loss"] for r in read_metrics(out) if "loss" in r] for out in (whole, parts))
    assert found == expected and len(found) == 6
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (whole, parts))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_merge_onto_the_weights_that_were_trained_on(tmp_path, capsys, bits):
    """The run's configuration says how to quantize. A second run trains the adapter on, over 4 or 8 bits again."""
    pairs = word_pairs(24)
    folder = write_model(tmp_path / "model", bpe_tokenizer(text for row in pairs for text in row.values()))
    set_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    flags = ["--dataset_name", data, "--ref_cache_dir", tmp_path / "cache", "--dtype", "float32", f"--load_in_{bits}"]
    flags += ["--use_cpu", "--report_to", "none", "--max_steps", 3, "--learning_rate", "1e-2"]
    if bits == "4bit":
        flags += ["--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant"]
    new = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", 4]
    assert (
        run("--model_name_or_path", folder, *flags, *new, "--output_dir", tmp_path / "sft", "--loss_type", "sft") == 0
    )
    assert main(["merge", str(tmp_path / "sft"), "--output", str(tmp_path / "merged")]) == 0
    assert f"quantized in {bits[0]} bits, as {tmp_path}/sft/training_config.yaml says" in capsys.readouterr().out

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config") and merged.config.tie_word_embeddings
    kind = KINDS["int8"] if bits == "8bit" else KINDS["fp4, nested"]
    base = quantized(folder, **kind).dequantize(dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, tmp_path / "sft")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, whole.eval()(ids).logits, rtol=0, atol=2e-5)
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert (
            PeftModel.from_pretrained(plain, tmp_path / "sft").eval()(ids).logits - merged(ids).logits
        ).abs().max() > 1e-3
