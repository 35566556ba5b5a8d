"""Tests of cli/checkpoints.py: names of evaluated models, and the options and references of their training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cpt_kernels.cli.checkpoints import (
    SETTINGS,
    choose_reference,
    load_shared_tokenizer,
    name_models,
    read_configs,
    training_options,
)
from cpt_kernels.cli.option_table import option_table
from tests.helpers.toy import word_tokenizer


def write_config(folder: Path, **values) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training_config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_setting_is_an_option():
    assert set(SETTINGS) <= set(option_table().defaults)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["runs/a/checkpoint-5", "runs/b/checkpoint-5"], ["a/checkpoint-5", "b/checkpoint-5"]),
        (["start=org/model", "runs/a"], ["start", "a"]),
        (["./x=y/a", "b"], ["a", "b"]),
    ],
)
def test_names(given, names):
    assert list(name_models(given)) == names


def test_names_that_cannot_be_told_apart():
    with pytest.raises(ValueError, match="models has runs/a twice"):
        name_models(["runs/a", "runs/a"])
    with pytest.raises(ValueError, match="models has x twice"):
        name_models(["x=runs/a", "x=runs/b"])


def test_training_options_saved_with_models(tmp_path):
    sft = write_config(tmp_path / "sft", loss_type="sft")
    dpo = write_config(tmp_path / "dpo", loss_type=["sft", "sigmoid"])
    (tmp_path / "dpo" / "checkpoint-5").mkdir()
    (tmp_path / "other").mkdir()
    models = [str(tmp_path / name) for name in ("sft", "dpo/checkpoint-5", "other")]
    assert list(read_configs(models, None)) == [dpo, sft], "configurations with a reference come first"
    assert list(read_configs(models, sft)) == [sft]
    assert read_configs(["org/model"], None) == {}
    for model in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(ValueError, match="there is no such folder"):
            read_configs([model], None)
    broken = tmp_path / "broken.yaml"
    for text, message in (
        ("a: [", "broken.yaml, line 1: expected the node content"),
        ("- a", "expected lines of 'option: value', found list"),
    ):
        broken.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_configs(models, broken)


def test_reference():
    sft = {"loss_type": ["sft"], "model_name_or_path": "base"}
    dpo = {"loss_type": "sigmoid", "model_name_or_path": "sft"}
    apart = {"loss_type": "ipo", "model_name_or_path": "x", "ref_model_name_or_path": "sft"}
    scratch = {"loss_type": "sigmoid", "model_name_or_path": "x", "from_scratch": True}

    def choose(given, *configs):
        return choose_reference(given, {Path(str(i)): values for i, values in enumerate(configs)}, ["m"])

    assert choose("other", dpo) == "other" and choose("none", dpo) is None and choose("None") is None
    assert choose(None, dpo, apart, sft) == "sft", "a loss without a reference does not count"
    assert choose(None, sft) == "base"
    for configs, message in (
        ((), "no training_config.yaml beside m"),
        ((dpo, {**dpo, "model_name_or_path": "y"}), "trained against sft and y"),
        ((scratch,), "names no reference that can be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(None, *configs)


def options(flags, **values):
    given = {"model": "m", "data": "d", "output_dir": Path("o"), "reference": "r", "prog": "cpt eval pairs"}
    return training_options({Path("c"): values} if values else {}, flags, **given)


def test_flags_override_the_options_of_training():
    found = options(
        ["--beta", "0.4", "--no_use_cpu", "--use-cpu"],
        beta=0.2,
        max_length=None,
        use_cpu=False,
        learning_rate=1.0,
        fsdp="full_shard",
        model_init_kwargs={"revision": "X"},
    )
    assert found.training.beta == 0.4 and found.training.max_length is None and found.training.use_cpu
    assert found.training.model_init_kwargs == {"revision": "X"} and not found.training.fsdp
    assert found.training.learning_rate == option_table().defaults["learning_rate"], (
        "options that evaluation does not use are not read"
    )
    assert (found.model.model_name_or_path, found.model.ref_model_name_or_path) == ("m", "r")
    assert options([], use_cpu=True, dtype="bfloat16").model.dtype == "bfloat16"
    assert options(["--use_cpu", "--load_in_4bit"]).model.load_in_4bit
    for flags in (["--learning_rate", "1"], ["--betta=1"], ["--use_peft"]):
        with pytest.raises(ValueError, match=f"unknown option {flags[0].partition('=')[0]}"):
            options(flags)


def test_one_tokenizer_for_all(tmp_path):
    folders = [str(tmp_path / name) for name in ("a", "b", "other", "chat")]
    tokenizer = word_tokenizer()
    for folder in folders[:2]:
        tokenizer.save_pretrained(folder)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folders[2])
    chat = word_tokenizer()
    chat.chat_template = "{{ messages }}"
    chat.save_pretrained(folders[3])

    def shared(*models, flags=()):
        given = {"model": models[0], "data": "d", "output_dir": Path("o"), "reference": None, "prog": ""}
        return load_shared_tokenizer(models, training_options({}, ["--use_cpu", *flags], **given))

    assert shared(*folders[:2]).get_vocab() == word_tokenizer().get_vocab()
    for other in folders[2:]:
        with pytest.raises(ValueError, match="has another tokenizer or chat template than"):
            shared(folders[0], other)
    assert shared(*folders, flags=["--tokenizer_name", folders[2]]).get_vocab() == tokenizer.get_vocab()
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"models=.*empty has no config.json or adapter_config.json or tokenizer_config.json"
    ):
        shared(folders[0], str(tmp_path / "empty"))
