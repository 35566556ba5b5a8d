"""Tests of pairs whose prompts have images: which responses are joined, and the files that are written."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset

from cpt_kernels.cli.pairs import main
from cpt_kernels.data.image_files import open_image, pixel_digest
from cpt_kernels.errors import UserError
from tests.helpers.command import write_rows

ORDER = ["--order", "a > b > c"]
QUESTION = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image"}


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8))


def as_user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.write_bytes(b""))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a folder with the responses of a and b in other forms and with other names of the same images."""
    (tmp_path / "a").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / f"a/{seed}.png")
    both = as_user(IMAGE, QUESTION, IMAGE)
    write_rows(
        tmp_path / "a/a.jsonl",
        [
            {"prompt": "what is it?", "images": ["0.png"], "model": "a", "response": "a of 0"},
            {"prompt": "what is it?", "images": ["1.png"], "model": "a", "response": "a of 1"},
            {"prompt": both, "images": ["1.png", "2.png"], "model": "a", "response": "a of 1 and 2"},
            {"prompt": "what is it?", "images": [], "model": "a", "response": "a of nothing"},
            {"prompt": both, "images": ["1.png"], "model": "a", "response": "an image is missing"},
        ],
    )
    text = base64.b64encode((tmp_path / "a/2.png").read_bytes()).decode()
    parts = Features({"type": Value("string"), "text": Value("string")})
    prompts = [as_user(IMAGE, QUESTION), as_user(IMAGE, QUESTION), both, as_user(QUESTION)]
    images = [[picture(0)], [picture(2)], [picture(1), picture(2)], []]
    Dataset.from_dict(
        {"prompt": prompts, "images": images, "model": list("bbbb"), "response": [f"b{i}" for i in range(4)]},
        Features(
            {
                "prompt": List({"role": Value("string"), "content": List(dict(parts))}),
                "images": List(Image()),
                **dict.fromkeys(("model", "response"), Value("string")),
            }
        ),
    ).to_parquet(tmp_path / "b.parquet")
    write_rows(tmp_path / "c.jsonl", [{"prompt": "what is it?", "image": text, "model": "c", "response": "c of 2"}])
    return tmp_path


def build(folder: Path, output: str, *options) -> dict:
    sources = (str(folder / name) for name in ("a/a.jsonl", "b.parquet", "c.jsonl"))
    main([*sources, *ORDER, "--output", str(folder / output), *options])
    return json.loads((folder / output).with_suffix(".report.json").read_text())


def pixels(values) -> list[bytes]:
    return [pixel_digest(open_image(value)) for value in values]


# (prompt, seeds of its images, chosen, rejected)
WANTED = [
    (as_user(IMAGE, QUESTION), [0], "a of 0", "b0"),
    (as_user(IMAGE, QUESTION, IMAGE), [1, 2], "a of 1 and 2", "b2"),
    (as_user(QUESTION), [], "a of nothing", "b3"),
    (as_user(IMAGE, QUESTION), [2], "b1", "c of 2"),
]


def test_prompts_are_joined_by_their_text_and_their_pixels(folder, tmp_path, capsys):
    report = build(folder, "pairs.jsonl")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        (prompt, chosen, rejected) for prompt, _, chosen, rejected in WANTED
    ]
    assert [pixels(row["images"]) for row in rows] == [pixels(map(picture, seeds)) for _, seeds, *_ in WANTED]
    assert rows[0]["images"] == [str(folder / "a/0.png")], "a file stays a file"
    assert rows[3]["images"][0].startswith("data:image/png;base64,")
    counts = report["prompts"]
    assert (counts["in_pairs"], counts["with_images"], counts["images"]) == (4, 3, 4)
    assert report["form"] == "messages" and "3 prompts in pairs have images, 4 in all" in capsys.readouterr().out
    (drop,) = (report["responses"]["dropped"][reason] for reason in ("malformed row",))
    assert drop["count"] == 1 and "2 parts" in drop["detail"] and "1 images" in drop["detail"]


def test_a_parquet_file_of_pairs_is_in_the_form_of_trl(folder):
    prepare = pytest.importorskip("trl.data_utils").prepare_multimodal_messages
    build(folder, "pairs.parquet", "--sft")
    rows = load_dataset("parquet", data_files=str(folder / "pairs.parquet"), split="train")
    assert rows.features["images"] == List(Image())
    for row, (prompt, seeds, chosen, _) in zip(rows, WANTED, strict=True):
        assert pixels(row["images"]) == pixels(map(picture, seeds))
        (turn,) = prepare(row["prompt"], images=row["images"])
        kinds = [part["type"] for part in turn["content"]]
        assert kinds == [part["type"] for part in prompt[0]["content"]] and row["chosen"][0]["content"] == chosen
        assert pixels(part["image"] for part in turn["content"] if part["type"] == "image") == pixels(row["images"])
    sft = load_dataset("parquet", data_files=str(folder / "pairs.sft.parquet"), split="train")
    assert [pixels(row["images"]) for row in sft] == [pixels(map(picture, seeds)) for _, seeds, *_ in WANTED]


def test_grouped_rows_have_the_images_of_their_prompt(folder):
    build(folder, "groups.jsonl", "--grouped", "--validation", "0.4")
    files = [folder / "groups.jsonl", folder / "groups.validation.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = sorted((row["completions"][0][0]["content"], pixels(row["images"])) for row in rows)
    assert found == sorted((chosen, pixels(map(picture, seeds))) for _, seeds, chosen, _ in WANTED)


def test_text_is_written_as_before_if_no_usable_prompt_has_images(tmp_path):
    rows = [{"prompt": "p", "images": None, "model": m, "response": m} for m in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    main([str(tmp_path / "r.parquet"), "--order", "a > b", "--output", str(tmp_path / "pairs.jsonl")])
    (row,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert row["prompt"] == "p" and "images" not in row


def test_a_changed_image_is_not_taken_from_the_cache(folder):
    build(folder, "pairs.jsonl")
    picture(3).save(folder / "a/0.png")
    report = build(folder, "pairs.jsonl")
    assert report["prompts"]["in_pairs"] == 3


def test_an_image_that_cannot_be_decoded_is_an_error_that_names_it(folder):
    (folder / "a/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.jsonl row 1: the image .*1\.png cannot be decoded"):
        build(folder, "pairs.jsonl")


def test_images_in_a_response_are_dropped(tmp_path):
    picture(0).save(tmp_path / "0.png")
    row = {"prompt": "p", "images": ["0.png"], "model": "a"}
    answer = [{"role": "assistant", "content": [IMAGE, {"type": "text", "text": "so"}]}]
    write_rows(tmp_path / "r.jsonl", [{**row, "response": answer}, {**row, "model": "b", "response": "b"}])
    with pytest.raises(UserError, match="no response of a can be used: 1 malformed row"):
        main([str(tmp_path / "r.jsonl"), "--order", "a > b", "--output", str(tmp_path / "pairs.jsonl")])
