"""Tests of ``cpt demo-real``: the instructions and their checks; a quick run on a tiny model; slow: on SmolLM2."""

from __future__ import annotations

import json
import logging
import random

import datasets
import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from cpt_kernels import cli
from cpt_kernels.demo.real import REAL_ARM_NAMES
from cpt_kernels.demo.real.experiment import REAL_ARMS
from cpt_kernels.demo.real.instructions import RULES, TOPICS, UNSEEN, Instruction, make_instructions
from cpt_kernels.demo.teachers import TEACHERS, Teacher
from tests.helpers.command import bpe_tokenizer, write_model
from tests.helpers.smollm2 import smollm2  # noqa: F401, a fixture

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
BY_NAME = {topic.name: topic for topic in TOPICS}


# --- Instructions ---


@pytest.mark.parametrize(
    ("topic", "rule", "passing", "failing"),
    [
        ("Italy", 'Answer as JSON with the key "capital".', '{"capital": "Rome"}', '{"city": "Rome"}'),
        ("Italy", 'Answer as JSON with the key "capital".', ' {"capital":"rome"}\n', 'Sure! {"capital": "Rome"}'),
        ("Italy", "Answer with the name alone.", "Rome", "It is Rome."),
        ("Italy", 'Do not use the word "the".', "Rome, then.", "The capital is Rome."),
        ("Italy", "Answer in uppercase letters.", "ROME!", "Rome"),
        ("Italy", "Answer in lowercase letters.", "it is rome.", "it is Romeo."),
        ("Italy", "Put your answer in double quotes.", '"Rome"', 'Rome "is"'),
        ("Italy", 'Start with "Answer:".', "Answer: Rome", "The answer: Rome"),
        ("Italy", 'End with "Thank you."', "Rome. Thank you.", "Thank you. Rome"),
        ("Italy", 'Use the word "often".', "Often, Rome", "Rome soften"),
        ("fruits", "Answer as a JSON list of strings.", '["plum", "fig", "pears"]', '["plum", "fig", "pear", "kiwi"]'),
        ("fruits", "Answer as a JSON list of strings.", '["plum","fig","pear"]', '["plum", "fig", "stone"]'),
        ("fruits", "Answer as a numbered list.", "1. plum\n2. fig\n3. pear", "1. plum\n2. fig\n4. pear"),
        ("fruits", "Answer as a list with a hyphen before each item.", "- plum\n- fig\n- pear", "plum\nfig\npear"),
        (
            "fruits",
            "Answer on one line with commas, and nothing else.",
            "plum, fig, pear",
            "They are plum, fig and pear",
        ),
        ("rain", 'Answer as JSON with the key "text".', '{"text": "Rain."}', '{"text": ["rain"]}'),
        ("rain", "Use at most 8 words.", "Rain falls.", "Rain falls and falls and falls and falls on."),
        ("rain", "Write exactly two sentences.", "Rain! It falls.", "Rain falls at 3.5 m/s."),
        (
            "rain",
            "Write one sentence of at least 10 words.",
            "Rain is the water that falls from clouds to earth.",
            "Rain.",
        ),
    ],
)
def test_checks(topic, rule, passing, failing):
    instruction = Instruction(BY_NAME[topic], 3 if BY_NAME[topic].kind == "list" else 1, (rule,))
    assert instruction.check(passing).passed and not instruction.check(failing).passed


def test_instructions_have_a_solution_and_other_topics_in_each_part():
    made = make_instructions({"train": 400, "held out": 300}, random.Random(0))
    train, held_out = made.values()
    assert len({each.prompt for each in train + held_out}) == 700
    assert not {each.topic for each in train} & {each.topic for each in held_out}
    used = [{rule for each in part for rule in each.rules} for part in (train, held_out)]
    assert used == [set(RULES) - UNSEEN, set(RULES)]
    perfect, hopeless = Teacher("perfect", 0, 0, 0), Teacher("hopeless", 1, 1, 0)
    assert all(each.check(each.respond(perfect, random.Random(1))).passed for each in train + held_out)
    assert not any(each.check(each.respond(hopeless, random.Random(1))).right for each in train)
    rng = random.Random(2)
    rates = [sum(each.check(each.respond(t, rng)).passed for each in train) / 400 for t in TEACHERS]
    assert rates[0] > rates[1] + 0.15 > rates[2] + 0.3 and rates[0] < 0.9


# --- The command ---


@pytest.fixture
def _process_settings():
    """Restores the settings that the command changes for its whole process."""
    level = logging.getLogger("cpt_kernels").level
    yield
    logging.getLogger("cpt_kernels").setLevel(level)
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


def check_run(folder, printed, arms):
    """Checks the files and the output of a quick run."""
    results = json.loads((folder / "results.json").read_text())
    assert list(results["results"]) == ["chat", "start", *arms]
    for name, row in results["results"].items():
        assert (
            0 <= row["passed"]["low"] <= row["passed"]["rate"] <= row["passed"]["high"] <= 1 and row["title"] in printed
        )
        if name != "chat":
            assert row["drift"]["own"]["kl"]["mean"] >= 0 and row["drift"]["text"]["perplexity_ratio"]["mean"] > 0
    assert sum(kind["pairs"] for kind in results["pairs"].values()) > 16
    assert "it only shows that every stage runs" in printed
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert all(row["difficulty"] > 0 for row in scored)
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert len(outputs) == 8 * len(results["results"])
    assert not {row["prompt"] for row in outputs} & {row["prompt"][0]["content"] for row in scored}
    html = (folder / "report.html").read_text()
    assert "What it does not show" in html and all(REAL_ARMS[arm].title in html for arm in arms)


@pytest.mark.usefixtures("_process_settings")
def test_quick_run_on_a_tiny_chat_model(tmp_path, capsys):
    tokenizer = bpe_tokenizer([each.prompt for each in make_instructions({"train": 50}, random.Random(0))["train"]])
    tokenizer.chat_template = TEMPLATE
    # Large weights in an untied head, so that the responses are not empty.
    folder = write_model(tmp_path / "chat", tokenizer, tie_word_embeddings=False, initializer_range=0.1)
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    argv = ["demo-real", "--quick", "--model", str(folder), "--output", str(tmp_path / "run")]
    assert cli.main([*argv, "--arms", "selected"]) == 0
    check_run(tmp_path / "run", capsys.readouterr().out, ["selected"])
    assert cli.main(argv) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.usefixtures("_process_settings")
def test_mistakes_are_one_line(tmp_path, capsys):
    assert tuple(REAL_ARMS) == REAL_ARM_NAMES
    write_model(tmp_path / "base", bpe_tokenizer(["a"]))
    for argv, message in (
        (["--model", str(tmp_path / "base")], "has no chat template"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
    ):
        assert cli.main(["demo-real", "--output", str(tmp_path / "run"), *argv]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2", "_process_settings")
def test_quick_run_on_smollm2(tmp_path, capsys):
    assert cli.main(["demo-real", "--quick", "--output", str(tmp_path / "run")]) == 0
    check_run(tmp_path / "run", capsys.readouterr().out, REAL_ARMS)
    chat = tmp_path / "run" / "chat"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat), AutoTokenizer.from_pretrained(chat)
    assert not hasattr(model.config, "quantization_config") and model.num_parameters() == 134_515_008
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
