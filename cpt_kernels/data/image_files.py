"""Images in files of data: what names them, their pixels, and their identity.

A value is a path, a URL (of any protocol of fsspec), a ``data:`` URL or the base64 text of a file, the bytes of a file,
the {"bytes", "path"} of ``datasets.Image(decode=False)``, or a PIL image. A path in a file of data is relative to that
file (:func:`resolve_images`). Files are opened only when pixels are needed.
"""

from __future__ import annotations

import base64
import binascii
import io
import posixpath
import re
import reprlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
from datasets import Dataset, Image, IterableDataset, List, Value
from xxhash import xxh3_128

from ..errors import UserError, at_place
from .forms import IMAGE_COLUMNS, image_column
from .messages import as_list
from .stores import is_remote

DIGESTS = "digests of the images"  # the column of :func:`with_digests`
DIGEST_BYTES = 16  # of each image

_BASE64 = re.compile(r"(/9j/|iVBOR|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{60,}={0,2}\s*")  # JPEG, PNG, GIF, ...
_KINDS = {b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*": "tiff", b"MM": "tiff"}
_AT_ONCE = 256  # rows whose images are decoded together


def image_values(row: Mapping[str, Any]) -> list[Any]:
    """Returns the images in a row's column `images` (a list) or `image` (one); none if it is null."""
    return as_list(next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None))


def image_source(value: Any) -> Any:
    """Returns a path or URL as text, or the bytes of a file; a PIL image is returned as it is.

    Raises:
        UserError: the value names no image.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and (value.startswith("data:") or _BASE64.fullmatch(value)):
        try:
            text = value.partition(",")[2] if value.startswith("data:") else value
            return base64.b64decode("".join(text.split()), validate=True)
        except binascii.Error as error:
            raise UserError(f"an image is not valid base64: {error}") from error
    if (isinstance(value, (str, bytes)) and value) or hasattr(value, "getexif"):
        return value
    raise UserError(f"an image is {reprlib.repr(value)}: expected a path, a URL, base64 text, or the bytes of a file")


def image_file(value: Any) -> dict[str, Any]:
    """Returns the {"bytes", "path"} that ``datasets.Image`` stores for an image that is no PIL image."""
    source = image_source(value)
    return {"bytes": None, "path": source} if isinstance(source, str) else {"bytes": source, "path": None}


def image_text(value: Any) -> str:
    """Returns the path or URL of an image, or the ``data:`` URL of one that has neither, for a JSON file."""
    source = image_source(value)
    return source if isinstance(source, str) else data_url(source)


def data_url(source: Any) -> str:
    """Returns a ``data:`` URL of the file that a path or URL names, of its bytes, or of a PIL image as PNG."""
    if not isinstance(source, (str, bytes)):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        source = buffer.getvalue()
    content = read_image(source)
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def read_image(source: str | bytes) -> bytes:
    """Returns the bytes of the file that a path or URL names.

    Raises:
        UserError: there is no such file, or it cannot be read; the message names it.
    """
    if isinstance(source, bytes):
        return source
    try:
        if source.startswith(("http://", "https://")):  # fsspec needs another client for these
            with urlopen(Request(source, headers={"User-Agent": "cpt-kernels"})) as reply:
                return reply.read()
        with fsspec.open(source, "rb") as file:
            return file.read()
    except Exception as error:  # fsspec's clients raise errors of their own
        raise UserError(f"the image {source} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def open_image(value: Any) -> Any:
    """Returns a PIL image, decoded and turned upright as its EXIF says; RGB if the value is text.

    These are the pixels that TRL's processor sees: transformers converts images that are named to RGB, `datasets` does
    not convert those that a column holds.

    Raises:
        UserError: the file is missing or is no image; the message names it.
    """
    image = _decode_file(image_source(value))
    return image.convert("RGB") if isinstance(value, str) else image


def _decode_file(source: Any) -> Any:
    import PIL.Image
    import PIL.ImageOps

    if not isinstance(source, (str, bytes)):
        return source
    name = source if isinstance(source, str) else f"of {len(source)} bytes"
    file = io.BytesIO(read_image(source))
    try:
        image = PIL.Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        reason = "it is no image" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise UserError(f"the image {name} cannot be decoded: {reason}") from error
    return PIL.ImageOps.exif_transpose(image)


def pixel_digest(image: Any) -> bytes:
    """Returns 16 bytes, equal for PIL images of equal mode, size and pixels."""
    if image.mode in ("P", "PA"):  # pixels of these are numbers of colors
        image = image.convert("RGBA")
    return xxh3_128(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()


# --- Paths ---


def resolve_images(row: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns a row in which relative paths of images are absolute, for the path or URL of the file that holds it."""
    given = {name: row[name] for name in IMAGE_COLUMNS if row.get(name) is not None}
    return {**row, **{name: _absolute_image(value, file) for name, value in given.items()}} if given else row


def _absolute_image(value: Any, file: str) -> Any:
    if isinstance(value, list):
        return [_absolute_image(item, file) for item in value]
    if isinstance(value, dict):
        return value if value.get("bytes") else value | {"path": _absolute_image(value.get("path"), file)}
    is_relative = isinstance(value, str) and value and not value.startswith(("data:", "file://", "/", "~"))
    if not is_relative or is_remote(value) or _BASE64.fullmatch(value):
        return value
    if is_remote(file):
        return posixpath.join(posixpath.dirname(file), value)
    return str(Path(file).absolute().parent / value)


def resolve_columns(dataset: Dataset | IterableDataset, file: str) -> Dataset | IterableDataset:
    """Returns the rows of a Parquet file with absolute paths of images (see :func:`resolve_images`)."""
    kinds = [(dataset.features or {}).get(name) for name in IMAGE_COLUMNS]
    if not any(isinstance(getattr(kind, "feature", kind), Value) for kind in kinds):
        return dataset
    return dataset.map(resolve_images, fn_kwargs={"file": file}, features=dataset.features)


# --- Images of a dataset ---


def as_files(dataset: Any) -> Any:
    """Returns a dataset whose image column holds files and not PIL images, so that reading a row decodes nothing."""
    for column in IMAGE_COLUMNS:
        kind = (dataset.features or {}).get(column)
        if isinstance(getattr(kind, "feature", kind), Image):
            raw = Image(decode=False)
            dataset = dataset.cast_column(column, raw if isinstance(kind, Image) else List(raw))
    return dataset


def with_digests(dataset: Dataset, name: str) -> Dataset:
    """Returns a dataset with a column ``DIGESTS``: the joined digests of each row's images, null for none.

    Equal images have equal digests, whatever their names; an image of a URL counts by its URL and is not fetched. Every
    other image is decoded, each distinct one once, so files that cannot be decoded are found here. A dataset without a
    column of images is returned as it is.

    Raises:
        UserError: an image is missing or is no image; the message names the row and the file, and begins with ``name``.
    """
    if (column := image_column(dataset.column_names)) is None:
        return dataset
    dataset = as_files(dataset)
    known: dict[bytes, bytes] = {}  # digest of a name or of a file's bytes -> digest of pixels
    found: list[bytes | None] = []

    def decode(new: tuple[bytes, tuple[int, Any]]) -> None:
        key, (row, source) = new
        with at_place(f"{name} row {row}"):
            is_of_url = isinstance(source, str) and is_remote(source)
            known[key] = key if is_of_url else pixel_digest(_decode_file(source))

    with ThreadPoolExecutor() as pool:  # PIL decodes without the GIL
        for batch in dataset.select_columns([column]).iter(_AT_ONCE):
            rows, sources = [], dict[bytes, tuple[int, Any]]()
            for number, value in enumerate(batch[column], len(found)):
                with at_place(f"{name} row {number}"):
                    given = [image_source(image) for image in as_list(value)]
                rows.append([_source_key(source) for source in given])
                sources |= {key: (number, source) for key, source in zip(rows[-1], given) if key not in sources}
            for _ in pool.map(decode, [item for item in sources.items() if item[0] not in known]):
                pass  # raises the first error
            found += [b"".join(known[key] for key in keys) or None for keys in rows]
    return dataset.add_column(DIGESTS, found)


def _source_key(source: Any) -> bytes:
    if isinstance(source, (str, bytes)):
        return xxh3_128(source.encode() if isinstance(source, str) else source).digest()
    return pixel_digest(source)
