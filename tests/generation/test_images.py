"""Tests of generating responses to prompts with images, by a local model and by an endpoint."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from cpt_kernels import cli
from cpt_kernels.data.image_files import open_image, pixel_digest
from cpt_kernels.data.sources import load_data
from cpt_kernels.generation.local import LocalModel, encode_prompt
from cpt_kernels.generation.prompts import Answer, Prompt, Request, Sampling, read_prompts
from tests.helpers.command import write_rows
from tests.helpers.image_models import FAMILIES, picture, tiny_image_model, tiny_processor
from tests.helpers.stub_endpoint import StubEndpoint, shorten_waits

IMAGE = {"type": "image"}
FAST = ("qwen2_5_vl", "gemma3", "idefics3")
SIZES = [(40, 60), (28, 28), (70, 30)]


def as_user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Returns a folder with prompts of no, one and two images, which are files."""
    shorten_waits(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    for number, size in enumerate(SIZES):
        picture(*size).save(tmp_path / f"{number}.png")
    between = as_user(IMAGE, {"type": "text", "text": "w5"}, IMAGE)
    write_rows(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "w2 w3", "images": ["0.png"]},
            {"prompt": "w2 w3", "images": ["1.png"]},
            {"prompt": "w2 w3", "images": []},
            {"prompt": between, "images": ["1.png", "2.png"]},
            {"prompt": "w2 w3", "images": ["0.png"]},
            {"prompt": between, "images": ["0.png"]},
        ],
    )
    return tmp_path


def run(home: Path, output: str, **options) -> list[dict]:
    given = {"dataset_name": home / "prompts.jsonl", "output": home / output, "prompt_format": "chat", **options}
    argv = ["generate", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]
    assert cli.main(argv) == 0
    return [json.loads(line) for line in (home / output).read_text().splitlines()]


# --- An endpoint ---


def test_an_endpoint_gets_images_in_openais_form(home, capsys):
    with StubEndpoint() as stub:
        options = {"backend": "openai", "base_url": stub.url, "model_name_or_path": "m", "concurrency": 1}
        rows = run(home, "out.jsonl", **options)
        assert len(run(home, "out.jsonl", **options)) == len(rows) == len(stub.asked) == 4, "asked again"
        # A file with other pixels makes other prompts of the same names.
        picture(9, 9).save(home / "1.png")
        assert len(run(home, "out.jsonl", **options)) == 6
    assert "dropped, malformed row: 1" in capsys.readouterr().out
    contents = [body["messages"][-1]["content"] for body in stub.asked]
    kinds = [[part["type"] for part in content] if isinstance(content, list) else content for content in contents]
    assert kinds[:4] == [["image_url", "text"], ["image_url", "text"], "w2 w3", ["image_url", "text", "image_url"]]
    url = contents[0][0]["image_url"]["url"]
    assert url == f"data:image/png;base64,{base64.b64encode((home / '0.png').read_bytes()).decode()}"
    assert [row.get("images") for row in rows] == [
        *([str(home / "0.png")], [str(home / "1.png")], None, [str(home / "1.png"), str(home / "2.png")])
    ]


def test_urls_are_left_to_the_endpoint_and_bytes_are_kept(home):
    content = (home / "0.png").read_bytes()
    features = Features({"prompt": Value("string"), "image": Image()})
    images = [{"path": "https://127.0.0.1:1/a.png"}, {"bytes": content}]
    rows = [{"prompt": prompt, "image": image} for prompt, image in zip("pq", images)]
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), home / "p.parquet")
    with StubEndpoint() as stub:
        options = {"backend": "openai", "base_url": stub.url, "model_name_or_path": "m", "concurrency": 1}
        rows = run(home, "out.jsonl", dataset_name=home / "p.parquet", **options)
    sent = [body["messages"][-1]["content"][0]["image_url"]["url"] for body in stub.asked]
    assert sent[0] == "https://127.0.0.1:1/a.png" and base64.b64decode(sent[1].partition(",")[2]) == content
    assert [row["images"] for row in rows] == [[sent[0]], [sent[1]]]


@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_damaged_image_ends_the_command_before_the_first_request(home, content, capsys):
    (home / "2.png").unlink()
    if content is not None:
        (home / "2.png").write_bytes(content)
    argv = ["--dataset_name", str(home / "prompts.jsonl"), "--output", str(home / "o.jsonl"), "--backend", "openai"]
    assert cli.main(["generate", *argv, "--base_url", "http://127.0.0.1:1", "--model_name_or_path", "m"]) == 2
    assert f"prompts.jsonl row 3: the image {home}/2.png cannot be" in capsys.readouterr().err


# --- A local model ---


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(FAMILIES)]
)
def test_each_response_is_that_of_the_prompt_alone(home, kind):
    """Checks greedy responses in a batch of uneven prompts against transformers' own generation of each prompt."""
    model, processor = tiny_image_model(kind), tiny_processor(kind)
    prompts, _ = read_prompts(load_data(home / "prompts.jsonl"))
    unique = {prompt.key: prompt for prompt in prompts if prompt is not None}
    requests = [Request(prompt) for prompt in unique.values()]
    found: dict = {}
    LocalModel(model, processor, Sampling(max_new_tokens=6, temperature=0, chat=True), 4).answer(requests, found.update)
    assert len(found) == 4
    for i, (prompt, _) in enumerate(requests):
        if kind == "paligemma" and not prompt.images:
            assert found[i].reason == "images"  # its processor refuses text alone
            continue
        turns = (
            prompt.messages() if prompt.images else [{"role": "user", "content": [{"type": "text", "text": "w2 w3"}]}]
        )
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        images = {"images": [[*map(open_image, prompt.images)]]} if prompt.images else {}
        inputs = processor(text=[text], **images, add_special_tokens=False, return_tensors="pt").to(dtype=model.dtype)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert found[i].prompt_tokens == inputs["input_ids"].shape[1]
        assert found[i].text == processor.tokenizer.decode(ids, skip_special_tokens=True)
    texts = {answer.text for answer in found.values() if isinstance(answer, Answer)}
    assert len(texts) > 1, "images do not matter"


def test_a_conversation_needs_a_chat_template():
    processor = tiny_processor("llava")
    processor.chat_template = None
    failure = encode_prompt(processor, Prompt([{"role": "user", "content": "w2"}]), Sampling())
    assert failure.reason == "no chat template"


def test_files_of_responses_to_images(home, capsys):
    """Checks the command from files to a file of pairs, also after an interruption."""
    tiny_image_model("llava").save_pretrained(home / "model")
    tiny_processor("llava").save_pretrained(home / "model")
    options = {"model_name_or_path": home / "model", "device": "cpu", "max_new_tokens": 4, "batch_size": 2, "n": 2}
    rows = run(home, "a.jsonl", **options)
    assert len(rows) == 8 and "8 answered" in capsys.readouterr().out
    lines = (home / "a.jsonl").read_text().splitlines(keepends=True)
    (home / "a.jsonl").write_text("".join(lines[:3]))
    assert [row["response"] for row in run(home, "a.jsonl", **options)] == [row["response"] for row in rows]
    assert "3 skipped" in capsys.readouterr().out
    options |= {"n": 1, "temperature": 0, "model_label": "b"}
    write_rows(home / "text.jsonl", [{"prompt": "w2 w3", "image": f"{i}.png"} for i in range(3)])
    more = {"add_column": "y_ref", "dataset_output": home / "with_y.jsonl", "dataset_name": home / "text.jsonl"}
    run(home, "b.jsonl", **options, **more)
    written = load_data(home / "with_y.jsonl")
    assert written[0]["image"] == str(home / "0.png") and isinstance(written[0]["y_ref"], str)
    sources = [str(home / "a.jsonl"), str(home / "b.jsonl")]
    assert cli.main(["pairs", *sources, "--order", f"b > {home}/model", "--output", str(home / "pairs.jsonl")]) == 0
    pairs = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    assert pairs[0]["prompt"][0]["content"] == [IMAGE, {"type": "text", "text": "w2 w3"}]
    assert pixel_digest(open_image(pairs[0]["images"][0])) == pixel_digest(picture(*SIZES[0]))


def test_images_need_a_model_with_a_processor(home, capsys):
    from tests.helpers.architectures import tiny_model
    from tests.helpers.toy import word_tokenizer

    tiny_model("llama").save_pretrained(home / "text")
    word_tokenizer().save_pretrained(home / "text")
    argv = ["--dataset_name", str(home / "prompts.jsonl"), "--output", str(home / "o.jsonl")]
    assert cli.main(["generate", *argv, "--model_name_or_path", str(home / "text")]) == 2
    assert "has no processor for the images of the prompts" in capsys.readouterr().err


def test_rows_with_images_are_written_as_json(home, tmp_path):
    from cpt_kernels.data.rows import write_rows as write

    content = (home / "0.png").read_bytes()
    rows = {"images": [[{"bytes": content}, {"path": str(home / "1.png")}], []]}
    write(Dataset.from_dict(rows, Features({"images": List(Image())})), tmp_path / "rows.jsonl", ".jsonl")
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert first["images"] == [f"data:image/png;base64,{base64.b64encode(content).decode()}", str(home / "1.png")]
    assert second["images"] == []
