"""Commands read folders of adapters, as model, policy and reference, with all weights that training saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.cli import main
from tests.helpers.architectures import tiny_model
from tests.helpers.command import one_error, read_metrics, run, write_rows
from tests.helpers.toy import config, preference_data, preference_rows, word_tokenizer

COMMON = ["--use_cpu", "--disable_tqdm", "--no_gradient_checkpointing"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base model, rows, and an adapter of two parts named "policy": DoRA and a whole head, trained for 4 steps."""
    home = tmp_path_factory.mktemp("adapters")
    tiny_model("llama").save_pretrained(home / "base")
    word_tokenizer().save_pretrained(home / "base")
    keys = ("prompt", "chosen", "rejected")
    write_rows(home / "rows.jsonl", ({key: row[key] for key in keys} for row in preference_rows(12, seed=3)))
    lora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), lora, adapter_name="policy")
    trainer = ContrastiveTrainer(
        model,
        args=config(home, max_steps=4, learning_rate=3e-2),
        train_dataset=preference_data(16),
        eval_dataset=preference_data(12, seed=3),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    (home / "metrics.json").write_text(json.dumps(trainer.evaluate()))
    trainer.save_model(str(home / "adapter"))
    return home


def logged(home: Path, name: str) -> float:
    return json.loads((home / "metrics.json").read_text())[f"eval_{name}"]


def test_eval_pairs_shows_the_margin_of_training(home, tmp_path):
    flags = ["--output_dir", tmp_path, *COMMON[:1], "--ref_cache_dir", tmp_path / "cache"]
    files = ["--models", home / "adapter", "--reference", home / "base", "--data", home / "rows.jsonl"]
    assert main([str(arg) for arg in ("eval", "pairs", *files, *flags)]) == 0
    (whole,) = [row for row in json.loads((tmp_path / "pairs.json").read_text())["summary"] if row["by"] == "all pairs"]
    assert abs(logged(home, "rewards/margins")) > 0.05
    for name in ("rewards/margins", "logps/chosen"):
        assert whole[name]["mean"] == pytest.approx(logged(home, name), abs=1e-4), name


def test_generate_asks_the_adapter(home, tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in preference_rows(6, seed=3)])
    flags = ["--dataset_name", tmp_path / "prompts.jsonl", "--max_new_tokens", 6, "--temperature", 0, "--device", "cpu"]
    texts = []
    for name in ("adapter", "base"):
        output = tmp_path / f"{name}.jsonl"
        argv = ("generate", "--model_name_or_path", home / name, *flags, "--output", output)
        assert main([str(arg) for arg in argv]) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        texts.append({row["prompt"]: row["response"] for row in rows})
    assert texts[0] != texts[1] and len(texts[0]) == 6
    from cpt_kernels.model.pretrained import load_pretrained

    model, tokenizer = load_pretrained(str(home / "adapter")), word_tokenizer()
    prompt = preference_rows(6, seed=3)[0]["prompt"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):  # greedy, without a cache of keys
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).endswith(texts[0][prompt].strip())


def test_train_continues_an_adapter_and_takes_one_as_reference(home, tmp_path):
    """The adapter's start values are the reference, so rewards start at 0; against the base model they do not."""
    found = {}
    for name, more in (("start", []), ("base", ["--ref_model_name_or_path", home / "base"])):
        flags = ["--dataset_name", home / "rows.jsonl", "--max_steps", 1, "--per_device_train_batch_size", 12]
        flags += ["--logging_steps", 1, "--ref_cache_dir", tmp_path / "cache", "--learning_rate", 1e-2]
        out = tmp_path / name
        assert run("--model_name_or_path", home / "adapter", *flags, *COMMON, *more, "--output_dir", out) == 0
        found[name] = read_metrics(out)[0]["rewards/margins"]
        before, after = (load_file(folder / "policy/adapter_model.safetensors") for folder in (home / "adapter", out))
        assert before.keys() == after.keys()
        assert not torch.equal(before["base_model.model.lm_head.weight"], after["base_model.model.lm_head.weight"])
    assert found["start"] == pytest.approx(0, abs=1e-4)
    assert found["base"] == pytest.approx(logged(home, "rewards/margins"), abs=1e-4)


def test_the_trainer_takes_an_adapter_as_reference(home, tmp_path):
    trainer = ContrastiveTrainer(
        str(home / "base"),
        str(home / "adapter"),
        config(tmp_path, max_steps=1),
        train_dataset=preference_data(12, seed=3),
        eval_dataset=preference_data(12, seed=3),
    )
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(-logged(home, "rewards/margins"), abs=1e-4)


def test_a_weight_that_is_missing_ends_every_command(home, tmp_path, capsys):
    weights = load_file(home / "base/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "damaged").mkdir()
    for file in (home / "base").iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "damaged/model.safetensors", metadata={"format": "pt"})
    damaged, base, rows = (str(path) for path in (tmp_path / "damaged", home / "base", home / "rows.jsonl"))
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w1"}])
    train = ["--dataset_name", rows, *COMMON, "--max_steps", "1"]
    for command in (
        ["train", "--model_name_or_path", damaged, *train, "--output_dir", str(tmp_path / "out")],
        ["train", "--model_name_or_path", base, "--ref_model_name_or_path", damaged, *train, "--output_dir", "out"],
        ["cache", "build", "--model_name_or_path", damaged, *train, "--ref_cache_dir", str(tmp_path / "cache")],
        ["eval", "pairs", "--models", damaged, "--reference", "none", "--data", rows, "--output_dir", str(tmp_path)],
        ["eval", "pairs", "--models", base, "--reference", damaged, "--data", rows, "--output_dir", str(tmp_path)],
        [
            *("generate", "--model_name_or_path", damaged, "--dataset_name", str(tmp_path / "prompts.jsonl")),
            *("--output", str(tmp_path / "responses.jsonl")),
        ],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert main(command) == 2, command
        error = capsys.readouterr().err
        assert "lacks weights that would be random: model.layers.1.mlp.up_proj.weight" in error, command
    assert run(*COMMON, "--model_name_or_path", base, "--dataset_name", rows, "--from_scratch", "--use_peft") == 2
    assert "use_peft saves the adapter alone" in one_error(capsys)


# --- adapter_name_or_path ---


def train_flags(home: Path, tmp_path: Path) -> list:
    flags = ["--dataset_name", home / "rows.jsonl", "--max_steps", 1, "--per_device_train_batch_size", 12]
    return [*flags, "--logging_steps", 1, "--ref_cache_dir", tmp_path / "cache", "--learning_rate", 1e-2, *COMMON]


def test_an_adapter_is_trained_on_by_name(home, tmp_path, caplog):
    """On its own base model, on one that is named, and against another reference."""
    flags, runs = train_flags(home, tmp_path), {}
    shutil.copytree(home / "base", tmp_path / "moved")
    for name, given, reference in (
        ("folder", ["--model_name_or_path", home / "adapter"], None),
        ("alone", ["--adapter_name_or_path", home / "adapter"], None),
        ("on base", ["--model_name_or_path", tmp_path / "moved", "--adapter_name_or_path", home / "adapter"], None),
        ("against base", ["--adapter_name_or_path", home / "adapter"], home / "base"),
    ):
        caplog.clear()
        given += ["--ref_model_name_or_path", reference] if reference else []
        assert run(*given, *flags, "--output_dir", tmp_path / name) == 0
        base = tmp_path / "moved" if name == "on base" else home / "base"
        assert f"{home / 'adapter'} holds an adapter on {base}: it is trained further" in caplog.text
        assert f"compares with {reference or 'the adapter'}" in caplog.text
        runs[name] = read_metrics(tmp_path / name)[0]["rewards/margins"]
        saved = json.loads((tmp_path / name / "policy/adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(base) and saved["use_dora"]
    assert runs.pop("against base") == pytest.approx(logged(home, "rewards/margins"), abs=1e-4)
    assert all(margin == pytest.approx(0, abs=1e-4) for margin in runs.values())
    weights = [load_file(tmp_path / name / "policy/adapter_model.safetensors") for name in runs]
    start = load_file(home / "adapter/policy/adapter_model.safetensors")
    for name, tensor in weights[0].items():
        assert all(torch.equal(other[name], tensor) for other in weights)
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)


def test_sft_then_dpo_then_merge(home, tmp_path, capsys):
    """DPO starts from the adapter of SFT; the reference is that adapter, also as a folder or as the merged model."""
    flags = train_flags(home, tmp_path)
    new = ["--model_name_or_path", home / "base", "--use_peft", "--lora_target_modules", "lm_head", "q_proj"]
    assert run(*new, *flags, "--loss_type", "sft", "--output_dir", tmp_path / "sft") == 0
    assert main(["merge", str(tmp_path / "sft"), "--output", str(tmp_path / "sft-merged")]) == 0
    steps = []
    for reference in ([], ["--ref_model_name_or_path", tmp_path / "sft"], ["--ref_model_name_or_path", home / "base"]):
        out = tmp_path / f"dpo{len(steps)}"
        assert run("--adapter_name_or_path", tmp_path / "sft", *flags, *reference, "--output_dir", out) == 0
        steps.append(read_metrics(out)[0])
    merged = ["--adapter_name_or_path", tmp_path / "sft", "--ref_model_name_or_path", tmp_path / "sft-merged"]
    assert run(*merged, *flags, "--output_dir", tmp_path / "dpo3") == 0
    steps.append(read_metrics(tmp_path / "dpo3")[0])
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert steps[1][name] == steps[0][name], name
        assert steps[3][name] == pytest.approx(steps[0][name], abs=1e-4), name
    assert abs(steps[2]["rewards/margins"]) > 1e-3 > abs(steps[0]["rewards/margins"])
    # Evaluation finds the reference of a run that named its adapter and its base model.
    both = ["--model_name_or_path", home / "base", "--adapter_name_or_path", tmp_path / "sft"]
    assert run(*both, *flags, "--output_dir", tmp_path / "dpo4") == 0
    capsys.readouterr()
    flags = ["--data", home / "rows.jsonl", "--output_dir", tmp_path / "eval", "--use_cpu"]
    assert main([str(arg) for arg in ("eval", "pairs", "--models", tmp_path / "dpo4", *flags)]) == 0
    assert json.loads((tmp_path / "eval/pairs.json").read_text())["settings"]["reference"] == str(tmp_path / "sft")


def test_the_tokenizer_of_an_adapter(home, tmp_path):
    """The adapter's own, else that of its base model."""
    bare = tmp_path / "bare"
    shutil.copytree(home / "adapter", bare, ignore=shutil.ignore_patterns("token*", "special*", "chat_template*"))
    assert not list(bare.glob("token*"))
    assert run("--model_name_or_path", bare, *train_flags(home, tmp_path), "--output_dir", tmp_path / "one") == 0
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(bare)
    both = ["--model_name_or_path", home / "base", "--adapter_name_or_path", bare]
    assert run(*both, *train_flags(home, tmp_path), "--output_dir", tmp_path / "two") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == tokenizer.chat_template


def test_options_that_contradict_an_adapter(home, tmp_path, capsys):
    flags = [*train_flags(home, tmp_path), "--output_dir", tmp_path / "out"]
    adapter, base = home / "adapter", home / "base"
    for given, message in (
        (["--model_name_or_path", adapter, "--use_peft"], f"run cpt merge {adapter} --output {adapter}-merged"),
        (["--adapter_name_or_path", adapter, "--use_peft"], "use_peft makes"),
        (["--model_name_or_path", base, "--adapter_name_or_path", adapter, "--use_peft"], "use_peft makes new weights"),
        (["--model_name_or_path", base, "--adapter_name_or_path", adapter, "--from_scratch"], "from_scratch makes new"),
        (["--model_name_or_path", base, "--adapter_name_or_path", base], "holds no adapter"),
        (["--model_name_or_path", adapter, "--adapter_name_or_path", adapter], "is an adapter itself: merge it first"),
        (
            ["--model_name_or_path", base, "--adapter_name_or_path", adapter, "--output_dir", adapter],
            "is also adapter_name_or_path, which would be overwritten",
        ),
        (["--adapter_name_or_path", tmp_path / "nowhere"], "nowhere: there is no such folder"),
        (["--model_name_or_path", base, "--load_in_4bit"], "needs use_peft=true or adapter_name_or_path"),
    ):
        assert run(*flags, *given) == 2, given
        assert message in one_error(capsys), given
