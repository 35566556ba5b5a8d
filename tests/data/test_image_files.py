"""Tests of images of rows: what names them, their pixels, their identity and their paths."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import threading

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, List

from cpt_kernels.data.image_files import (
    DIGESTS,
    as_files,
    image_source,
    open_image,
    pixel_digest,
    with_digests,
)
from cpt_kernels.data.sources import load_data
from cpt_kernels.errors import UserError
from tests.helpers.command import write_rows


def picture(seed: int = 0, size=(24, 16), mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def as_bytes(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / f"pictures/{seed}.png")
    return tmp_path


def test_every_notation_names_the_same_pixels(folder):
    file = folder / "pictures/0.png"
    content = file.read_bytes()
    text = base64.b64encode(content).decode()
    for value in (
        *(str(file), content, {"bytes": content, "path": "x.png"}, {"bytes": None, "path": str(file)}, picture()),
        *(text, f"data:image/png;base64,{text}", file.as_uri()),
    ):
        assert pixel_digest(open_image(value)) == pixel_digest(picture()), value
    assert open_image(str(file)).tobytes() != picture(1).tobytes()


def test_pixels_are_upright_and_rgb_as_for_trl(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6  # turned by 90 degrees
    content = as_bytes(picture(), exif=exif)
    assert open_image(content).size == (16, 24)
    assert open_image(content).tobytes() == picture().transpose(PIL.Image.Transpose.ROTATE_270).tobytes()
    (tmp_path / "a.png").write_bytes(as_bytes(picture(mode="RGBA")))
    assert open_image(str(tmp_path / "a.png")).mode == "RGB"
    assert open_image((tmp_path / "a.png").read_bytes()).mode == "RGBA"


def test_digests_tell_modes_sizes_and_palettes_apart():
    same, flipped = picture().quantize(4), picture().quantize(4)
    flipped.putpalette(flipped.getpalette()[::-1])
    wide = PIL.Image.frombytes("RGB", (16, 24), picture().tobytes())
    kinds = [picture(), picture(1), wide, picture(mode="L"), same, flipped]
    assert len({pixel_digest(image) for image in kinds}) == len(kinds)
    assert pixel_digest(picture().quantize(4)) == pixel_digest(same)


@pytest.mark.parametrize("value", ["", 3, None, {"path": None, "bytes": None}, "data:image/png;base64,???"])
def test_what_names_no_image_is_an_error(value):
    with pytest.raises(UserError, match="an image is"):
        open_image(value)


# --- Files ---


def test_paths_are_relative_to_the_file_of_data(folder, monkeypatch):
    text = base64.b64encode((folder / "pictures/0.png").read_bytes()).decode()
    rows = [
        {"prompt": "p", "images": ["pictures/0.png", f"{folder}/pictures/1.png", text, "https://example.com/a.png"]},
        {"prompt": "pictures/2.png", "images": [None, "pictures/2.png"]},
    ]
    write_rows(folder / "data.jsonl", rows)
    (folder / "data.csv").write_text("prompt,image\np,pictures/1.png\n")
    monkeypatch.chdir(folder)
    for name in (folder / "data.jsonl", "data.jsonl"):
        first, second = load_data(name)
        assert first["images"] == [str(folder / "pictures/0.png"), f"{folder}/pictures/1.png", *rows[0]["images"][2:]]
        assert second["images"] == [None, str(folder / "pictures/2.png")]
    (row,) = load_data(folder / "data.csv")
    assert row["image"] == str(folder / "pictures/1.png")
    (row,) = load_data((folder / "data.csv").as_uri())
    assert row["image"] == str(folder / "pictures/1.png")
    Dataset.from_list([{"images": ["pictures/0.png"]}]).to_parquet(folder / "data.parquet")
    for streaming in (False, True):
        (row,) = load_data(folder / "data.parquet", streaming=streaming)
        assert row["images"] == [str(folder / "pictures/0.png")]


def test_rows_are_read_without_decoding(folder, monkeypatch):
    rows = [{"images": [str(folder / "pictures/0.png")]}, {"images": []}]
    dataset = Dataset.from_list(rows, Features({"images": List(Image())}))
    (value,) = as_files(dataset)[0]["images"]
    assert image_source(value) == str(folder / "pictures/0.png")


def test_digests_of_rows(folder, monkeypatch):
    """Equal images have equal digests whatever their names, and each is decoded once."""
    (folder / "pictures/copy.png").write_bytes((folder / "pictures/0.png").read_bytes())
    opened = []
    real = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda file: (opened.append(file), real(file))[1])
    write_rows(
        folder / "data.jsonl",
        [
            *({"images": [f"pictures/{name}.png"]} for name in ("0", "copy", "1", "0")),
            *({"images": images} for images in (["pictures/0.png", "pictures/1.png"], [], None)),
            {"images": ["pictures/1.png", "pictures/0.png"]},
            {"images": ["https://127.0.0.1:1/nothing.png"]},
        ],
    )
    digests = with_digests(load_data(folder / "data.jsonl"), "data")[DIGESTS]
    assert digests[0] == digests[1] == digests[3] and digests[5] is digests[6] is None
    assert digests[4] == digests[0] + digests[2]
    assert len({*digests} - {None}) == 5 and len(opened) == 3


def test_a_file_has_one_digest_whatever_its_mode_and_notation(tmp_path):
    (tmp_path / "a.png").write_bytes(content := as_bytes(picture().quantize(4)))
    text = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    rows = [{"image": {"bytes": content}}, {"image": {"path": str(tmp_path / "a.png")}}]
    stored = with_digests(Dataset.from_list(rows, Features({"image": Image()})), "data")[DIGESTS]
    named = with_digests(Dataset.from_list([{"image": str(tmp_path / "a.png")}, {"image": text}]), "data")[DIGESTS]
    assert len({*stored, *named}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "row 1: the image .*/bad.png cannot be read: No such file or directory"),
        (b"no image", "row 1: the image .*/bad.png cannot be decoded: it is no image"),
        (as_bytes(picture(size=(200, 200)), "JPEG")[:-900], "row 1: the image .*bad.png cannot be .*truncated"),
    ],
)
def test_a_missing_or_damaged_file_is_named_with_its_row(folder, content, message):
    if content is not None:
        (folder / "bad.png").write_bytes(content)
    rows = [{"image": "pictures/0.png"}, {"image": "bad.png"}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=f"data.jsonl {message}"):
        with_digests(load_data(folder / "data.jsonl"), str(folder / "data.jsonl"))


def test_an_image_of_an_http_url_is_fetched_when_its_pixels_are_needed(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/pictures/"
        assert pixel_digest(open_image(f"{url}0.png")) == pixel_digest(picture())
        with pytest.raises(UserError, match=r"the image .*/nothing.png cannot be read: .*404"):
            open_image(f"{url}nothing.png")
        server.shutdown()
