"""Rows with images become prompt groups: tokens, identities of images, drops and errors."""

from __future__ import annotations

import io
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.digest import digest_rows
from cpt_kernels.data.images import ImageReader
from cpt_kernels.data.preparation import prepare
from cpt_kernels.errors import UserError
from tests.helpers.image_models import image_rows, picture, tiny_processor

PROCESSOR = tiny_processor("llava")
IMAGE = {"type": "image"}


def row(content: Any, images: Any, **more: Any) -> dict:
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "w5 w6"), ("rejected", "w7"))}
    return {"prompt": [{"role": "user", "content": content}], **sides, "images": images, **more}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "idefics3", "internvl"])
def test_tokens_are_trls(kind: str) -> None:
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs TRL")
    processor, rows = tiny_processor(kind), image_rows(8)
    groups, _ = prepare(Dataset.from_list(rows), processor)
    collate = trl.DataCollatorForVisionPreference(processor)
    for given, group in zip(rows, groups, strict=True):
        batch = collate([dict(given)])
        masks = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        for (ids, attended, completed), side in zip(masks, ("chosen", "rejected")):
            prompt, completion = (ids[(attended & (completed == of)).bool()].tolist() for of in (0, 1))
            assert prompt == group["prompt_ids"]
            assert completion == group["completion_ids"][group[side][0]]


def test_every_form_of_an_image_gives_the_same_row(tmp_path) -> None:
    image, file = picture(30, 40), io.BytesIO()
    image.save(tmp_path / "a.png")
    image.save(file, "png")
    content = [IMAGE, text("w3")]
    names = [
        str(tmp_path / "a.png"),
        f"file://{tmp_path}/a.png",
        file.getvalue(),
        {"path": None, "bytes": file.getvalue()},
    ]
    datasets = [Dataset.from_list([row(content, [value])]) for value in [image, *names]]
    datasets += [Dataset.from_list([{**row(content, None), "image": image}]).remove_columns("images")]
    datasets += [Dataset.from_list([row("w3", [image])])]  # images come before text without placeholders
    datasets += [
        IterableDataset.from_generator(lambda: iter([row(content, [image])])),
        datasets[0].to_iterable_dataset(),
    ]
    groups = [next(iter(prepare(dataset, PROCESSOR)[0])) for dataset in datasets]
    for group in groups:
        assert {**group, "images": None} == {**groups[0], "images": None}
        assert PackedCollator(images=ImageReader(PROCESSOR))([group])["images"]["pixel_values"].shape == (1, 3, 28, 28)
    assert len(groups[0]["image_ids"]) == 2 and max(groups[0]["image_ids"]) < 0


def test_the_identity_is_of_pixels_and_processor() -> None:
    one, other = ImageReader(PROCESSOR), ImageReader(tiny_processor("llava"))
    assert one.image_id(picture(8, 9)) == other.image_id(picture(8, 9))
    assert one.image_id(picture(8, 9)) != one.image_id(picture(9, 8)) != one.image_id(picture(9, 8, seed=1))
    other.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert one.image_id(picture(8, 9)) != ImageReader(other.processor).image_id(picture(8, 9))


def test_rows_that_cannot_be_used_are_counted() -> None:
    image = picture(30, 40)
    rows = [
        row([IMAGE, text("w3")], [image]),
        row([IMAGE, IMAGE, text("w3")], [image]),
        row([IMAGE, text("w3")], [{"bytes": b"no image", "path": None}]),
        row([text("w3")], None),
        row([text("<image>")], None),
    ]
    data = Dataset.from_list([{**given, "images": [as_file(i) for i in given["images"] or ()]} for given in rows])
    kept, report = prepare(data, PROCESSOR)
    assert kept["row"] == [0, 3] and report.rows_in == 5
    (reason,) = report.dropped
    assert report.dropped[reason].rows == [1, 2, 4] and "2 parts" in report.dropped[reason].detail


def test_images_that_a_processor_refuses_are_named() -> None:
    """A row is dropped, unless only the micro-batch shows which of its images is too small."""
    qwen = tiny_processor("qwen2_5_vl")
    data = Dataset.from_list([row([IMAGE, text("w3")], [picture(*size)]) for size in ((40, 60), (300, 1))])
    kept, report = prepare(data, qwen)
    (dropped,) = report.dropped.values()
    assert kept["row"] == [0] and dropped.rows == [1]
    assert "Qwen2_5_VLProcessor refuses images of 1 x 300 pixels: ValueError: absolute aspect" in dropped.detail
    pixtral = tiny_processor("mistral3")
    pixtral.image_processor.patch_size = {"height": 7, "width": 7}  # of patches that are not merged
    data = Dataset.from_list([row([IMAGE, IMAGE], [picture(40, 60), picture(*size)]) for size in ((50, 50), (1, 1))])
    kept, report = prepare(data, pixtral)
    assert not report.dropped  # the other image has tokens
    with pytest.raises(UserError, match="rows 0, 1: PixtralProcessor refuses images of 1 x 1 pixels: it"):
        PackedCollator(images=ImageReader(pixtral))(kept.to_list())
    kept, report = prepare(Dataset.from_list([data[0], row([IMAGE, text("w3")], [picture(1, 1)])]), pixtral)
    assert kept["row"] == [0] and "of 1 x 1 pixels: an image has no token" in next(iter(report.dropped.values())).detail


def as_file(image: Any) -> Any:
    if isinstance(image, dict):
        return image
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("mode", "limit", "rows", "images"),
    [
        ("keep_start", 11, [0], [4]),
        ("keep_start", 10, [0], [4]),
        ("keep_end", 11, [0, 1], [4]),
        ("keep_end", 10, [1], []),
        ("keep_end", 8, [1], []),
    ],
)
def test_truncation_cuts_no_image(mode: str, limit: int, rows: list[int], images: list[int]) -> None:
    """The first prompt has 8 tokens, its completions 3 and 2. The second has no image."""
    data = Dataset.from_list([row([IMAGE, text("w3")], [picture(30, 40)]), row([text("w4 " * 20)], [])])
    kept, report = prepare(data, PROCESSOR, max_length=limit, truncation_mode=mode)
    assert kept["row"] == rows and sum(drop.count for drop in report.dropped.values()) == 2 - len(rows)
    if mode == "keep_end" and len(rows) < 2:
        assert [*report.dropped] == ["max_length would cut an image"]
    assert PackedCollator(limit, mode, images=ImageReader(PROCESSOR))(kept.to_list())["image_tokens"] == images


def test_errors_name_the_row_and_the_mend() -> None:
    image = picture(8, 8)
    good, bad = ({"chosen": [{"role": "assistant", "content": [part]}]} for part in (text("w5"), IMAGE))
    data = Dataset.from_list([{**row([IMAGE], [image]), **sides} for sides in (good, bad)])
    with pytest.raises(UserError, match="row 1 has an image in a completion: only prompts may have images"):
        prepare(data, PROCESSOR)
    with pytest.raises(
        UserError,
        match=r"vision-related .column `images`., and .* reads no images: give the processor of a vision-language",
    ):
        prepare(Dataset.from_list([row([IMAGE], [image])]), PROCESSOR.tokenizer)
    with pytest.raises(UserError, match="columns `images` and `image`: remove one"):
        prepare(Dataset.from_list([row([IMAGE], [image], image=image)]), PROCESSOR)
    bare = tiny_processor("llava")
    bare.chat_template = None
    with pytest.raises(UserError, match="rows are conversations, and LlavaProcessor has no chat template: set"):
        prepare(Dataset.from_list([row([IMAGE], [image])]), bare)
    kept, _ = prepare(Dataset.from_list([row([IMAGE], [image])]), PROCESSOR)
    with pytest.raises(UserError, match=r"give PackedCollator\(images=\.\.\.\)"):
        PackedCollator()(kept.to_list())


def test_a_file_that_changes_after_preparation_is_refused(tmp_path) -> None:
    """Its prompt key, and so the reference log-probs that are found, would be those of the earlier pixels."""
    file = tmp_path / "a.png"
    picture(28, 28, seed=0).save(file)
    kept, _ = prepare(Dataset.from_list([row([IMAGE, text("w3")], [str(file)])]), PROCESSOR)
    collator = PackedCollator(images=ImageReader(PROCESSOR))
    assert collator(kept.to_list())["image_tokens"]
    picture(28, 28, seed=1).save(file)
    with pytest.raises(UserError, match="an image has other pixels than when the rows were prepared: give a changed"):
        collator(kept.to_list())


def test_equal_tokens_of_different_images_are_different_prompts() -> None:
    data = Dataset.from_list([row([IMAGE, text("w3")], [picture(8, 8, seed=seed)]) for seed in (0, 1, 0)])
    kept, report = prepare(data, PROCESSOR)
    assert kept[0]["prompt_ids"] == kept[1]["prompt_ids"] and report.repeated == 1
    assert digest_rows(kept.select([0])) != digest_rows(kept.select([1]))
    batch = PackedCollator(images=ImageReader(PROCESSOR))(kept.to_list())
    assert len(batch["images"]["pixel_values"]) == 2 and batch["image_index"] == [0, 1]
    assert len(batch["completion_lengths"]) == 4
