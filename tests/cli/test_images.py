"""The commands on rows with images: plan, cache, train and evaluate an image-text model from files."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoProcessor

from cpt_kernels import cli
from cpt_kernels.cli import difficulty, planned
from cpt_kernels.cli.decoded import decoded_pair
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.images import ImageReader
from cpt_kernels.planning.calibration import calibrate
from cpt_kernels.planning.work import Work
from tests.helpers.command import write_rows
from tests.helpers.image_models import image_rows, picture, tiny_image_model, tiny_processor

ROWS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Returns a folder with a LLaVA model and with pairs whose images are files beside them."""
    home = tmp_path_factory.mktemp("images")
    tiny_image_model("llava").float().save_pretrained(home / "start")
    tiny_processor("llava").save_pretrained(home / "start")
    rows = image_rows(ROWS)
    for i, row in enumerate(rows):
        for j, image in enumerate(row["images"]):
            image.save(home / f"{i}-{j}.png")
        row["images"] = [f"{i}-{j}.png" for j in range(len(row["images"]))]
        row |= {"chosen_model": "a", "rejected_model": "b"}
    rows[4]["images"] = rows[0]["images"]  # the same image in two prompts
    write_rows(home / "pairs.jsonl", rows)
    return home


def run(home: Path, *argv, **options) -> int:
    """Runs a command on the pairs with short options of cpt-train."""
    defaults = {"use_cpu": "true", "disable_tqdm": "true", "report_to": "none", "bf16": "false"}
    defaults |= {"ref_cache_dir": home / "cache", "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    given = {"model_name_or_path": home / "start", "dataset_name": home / "pairs.jsonl", **defaults, **options}
    return cli.main([*map(str, argv), *(str(text) for name, value in given.items() for text in (f"--{name}", value))])


def test_the_plan_counts_tokens_of_images_without_weights(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planned, "calibrate", partial(calibrate, budget=0.0))
    (tmp_path / "model").mkdir()
    for file in home.glob("start/*.j*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    argv = ["plan", tmp_path / "model", home / "pairs.jsonl", "--json", tmp_path / "plan.json"]
    argv += ["--num_train_epochs", 1, "--use_cpu", "true", "--per_device_train_batch_size", ROWS]
    assert cli.main([*map(str, argv)]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["run"]
    # Counted by the processor itself.
    processor, rows = AutoProcessor.from_pretrained(home / "start"), image_rows(ROWS)
    reader, count, peer, sides_images, different = ImageReader(processor), 0, 0, 0, {}
    for i, row in enumerate(rows):
        images = rows[0]["images"] if i == 4 else row["images"]
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        prompt = reader.encode(text, images)
        sides = [processor.tokenizer(f"{row[side][0]['content']} </s>")["input_ids"] for side in ("chosen", "rejected")]
        count += len(prompt) + sum(map(len, sides))
        each = prompt.count(reader.feature_token) / max(len(images), 1)
        different |= {reader.image_id(image): each for image in images}
        peer += 2 * each * len(images)
        sides_images += 2 * len(images)
    assert plan["work"]["tokens"] == count
    assert plan["work"]["image_tokens"] == plan["reference"]["image_tokens"] == sum(different.values())
    assert plan["peer"]["image_tokens"] == peer
    assert (plan["work"]["images"], plan["peer"]["images"]) == (len(different), sides_images)
    flops = Work(**plan["work"])
    assert plan["operations"]["work"] > 0 and flops.image_tokens
    out = capsys.readouterr().out
    assert re.search(rf"images, encoded +│ {len(different)}; padded {sides_images}\b", out)
    assert "TRL / ours, first run, reference in every step" in out


def test_the_towers_operations_are_those_of_its_matrices(home):
    from cpt_kernels.planning.model_sizes import sizes_of

    model = tiny_image_model("llava")
    inputs = ImageReader(tiny_processor("llava")).inputs([picture(28, 28)] * 3)
    sizes = sizes_of(model, {"images": inputs.inputs, "image_tokens": inputs.tokens})
    tower = [p for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n]
    own = (
        sum(p.numel() for p in tower if p.dim() > 1)
        - model.model.vision_tower.embeddings.position_embedding.weight.numel()
    )
    assert sizes.image_flops * inputs.tokens[0] == 2 * own * 4 + 4 * 2 * 16 * 4**2
    assert sizes.image_backward == 2
    for parameter in tower:
        parameter.requires_grad_(False)
    assert sizes_of(model, {"images": inputs.inputs, "image_tokens": inputs.tokens}).image_backward == 0
    text = sum(p.numel() for p in model.get_decoder().parameters() if p.dim() > 1)
    assert sizes.layer_parameters == text - model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_from_the_cache_to_the_evaluation(home, tmp_path, lora, capsys):
    output = tmp_path / "out"
    adapter = {"use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear"} if lora else {}
    assert run(home, "cache", "build", output_dir=output) == 0
    assert run(home, "cache", "verify", output_dir=output) == 0
    assert "16 completions scored again; " in capsys.readouterr().out
    options = {"output_dir": output, "max_steps": 2, "save_steps": 1, **adapter}
    assert run(home, "train", **options) == 0
    out = capsys.readouterr().out
    assert "processor" in out
    for folder in (output, output / "checkpoint-1"):
        assert AutoProcessor.from_pretrained(folder).image_token == "<image>"
    argv = ["eval", "pairs", "--models", output, "--data", home / "pairs.jsonl", "--output_dir", tmp_path / "eval"]
    assert cli.main([*map(str, argv), "--use_cpu", "true"]) == 0
    found = json.loads((tmp_path / "eval/pairs.json").read_text())
    (whole,) = [row for row in found["summary"] if row["by"] == "all pairs"]
    assert whole["pairs"] == ROWS


def test_a_run_continues_and_is_checked(home, tmp_path, capsys):
    options = {"output_dir": tmp_path / "out", "save_steps": 1, "logging_steps": 1}
    assert run(home, "train", max_steps=2, **options) == 0
    assert run(home, "train", "--resume_from_checkpoint", "last", max_steps=3, **options) == 0
    assert run(home, "train", "--check", max_steps=2, output_dir=tmp_path / "check") == 0
    assert "FAILED" not in capsys.readouterr().out


def test_pairs_with_images_have_a_difficulty(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(difficulty, "_CALIBRATION", 0.0)
    options = {"output": tmp_path / "scored.jsonl", "seeds": 1, "max_steps": 1}
    assert run(home, "difficulty", **options) == 0
    assert re.search(r"and scores the others, in about \d+ s", capsys.readouterr().out)
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [len(row["images"]) for row in scored] == [len(row["images"]) for row in image_rows(ROWS)[:ROWS]]
    assert len({row["difficulty"] for row in scored}) == ROWS


def test_the_tokens_of_an_image_are_shown_once():
    processor = tiny_processor("llava")
    prompt = processor.tokenizer("w0 w1")["input_ids"] + [processor.image_token_id] * 9
    row = {"row": 0, "prompt_ids": prompt, "completion_ids": [[5]], "chosen": [0], "rejected": []}
    lines = [line.plain for line in decoded_pair(row, processor, PackedCollator(None, "keep_start"))]
    assert "  prompt, 11 tokens: w0 w1 <image> x 9" in lines


def test_tokens_that_are_not_scored_are_in_brackets():
    tokenizer = tiny_processor("llava").tokenizer
    prompt, *sides = (tokenizer(text)["input_ids"] for text in ("w0", "w1 w2 w3", "w4 w5"))
    row = {"row": 0, "prompt_ids": prompt, "completion_ids": sides, "chosen": [0], "rejected": [1]}
    row["scored"] = [[True, False, True], [True, True]]
    lines = [line.plain for line in decoded_pair(row, tokenizer, PackedCollator(4))]
    assert lines[1:] == [
        "  prompt, 1 tokens: w0",
        "  chosen (2 scored), 3 tokens: w1[w2]w3",
        "  rejected (scored), 2 tokens: w4 w5",
    ]
    lines = [line.plain for line in decoded_pair(row, tokenizer, PackedCollator(3))]
    assert lines[2:4] == [
        "  chosen (1 scored), 2 tokens: w1[w2]",
        "  chosen, cut by max_length (not scored), 1 tokens: w3",
    ]
    row["scored"] = [[0.5, 0, 2], [1, 1]]
    assert "  chosen (2 scored), 3 tokens: w1{x 0.5}[w2]w3{x 2}" in [
        line.plain for line in decoded_pair(row, tokenizer, PackedCollator())
    ]


def test_images_need_a_processor(home, tmp_path, capsys):
    tiny_processor("llava").tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert run(home, "train", output_dir=tmp_path / "out", tokenizer_name=tmp_path / "tokenizer") == 2
    assert "has no processor for the images of the prompts" in capsys.readouterr().err
