"""Images in prompts: how they are decoded, what identifies their pixels, and what a model takes of them.

A prompt with images is the same as another one if its tokens and its pixels are the same. So wherever prompts are
compared, looked up or hashed, a *prompt key* stands for the prompt: two negative numbers for each image, which identify
its pixels and the processor's configuration, and then the token ids, which are never negative.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import torch
from datasets import Dataset, DatasetInfo, Features, Image, IterableDataset, LargeList, List
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from torch import Tensor
from xxhash import xxh3_128_intdigest

from ..errors import UserError
from .forms import IMAGE_COLUMNS
from .image_files import image_values, open_image, pixel_digest
from .messages import MALFORMED, RowError, with_images
from .rows import read_columns, visible_rows

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import BatchEncoding, ProcessorMixin

    from .formats import Example

ImageId = tuple[int, int]  # two negative numbers, see `ImageReader.image_id`

IMAGES = "images"  # the column of prepared rows with images
WORDS = 2  # numbers of an image's identity
# What processors return for each token, and not for each image.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_OF_TEXT = ("input_ids", "attention_mask", "labels", *TOKEN_TYPES)
_WORD = (1 << 63) - 1


class ImageInputs(NamedTuple):
    """The model's inputs for U different images."""

    inputs: dict[str, Tensor]  # keyword arguments of the model, such as ``pixel_values``
    tokens: list[int]  # (U,) number of the tokens that each image's features take
    # names of the model's arguments that mark the tokens of images, see ``ImageReader.mark``
    token_types: tuple[str, ...]


class ImageRows(TypedDict):
    """R rows of a padded batch that run together, for a model whose own forward takes images by rows."""

    rows: list[int]  # (R,) of the batch
    prompts: Tensor  # (R,) int64, the prompt of each row, of U different ones
    different: int  # U
    of_tokens: dict[str, Tensor]  # arguments of the model, (R, L, ...)
    of_images: dict[str, Tensor]  # (U, ...) or (U * images, ...)


class PlacedImages(TypedDict):
    """The images of a batch; fields as in ``collate.PackedBatch``."""

    image_rows: list[ImageRows]
    images: dict[str, Tensor]
    image_tokens: list[int]
    image_index: list[int]
    image_prompts: list[tuple[list[int], list[int]]]
    token_types: dict[str, Tensor]


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of prompts with a model's processor."""

    processor: ProcessorMixin  # a processor of transformers, with an image processor and a tokenizer
    # the token whose embeddings the model replaces by an image's features; default the processor's own
    token_id: int | None = None
    by_rows: bool = False  # the model takes the images of each row in its own forward

    @cached_property
    def placeholder(self) -> str:
        """The text that the processor expands to the tokens of an image."""
        text, images = (getattr(self.processor, name, None) for name in ("image_token", "image_processor"))
        # Kosmos 2.5 spells the tokens of an image as its bos token, and puts them before the text itself.
        if not isinstance(text, str) or images is None or text == self.processor.tokenizer.bos_token:
            raise UserError(
                f"{type(self.processor).__name__} does not say which text stands for an image (image_token), so its"
                " images cannot be trained on: remove the images, or use a model of another family"
            )
        return text

    @cached_property
    def token_ids(self) -> list[int]:
        """The tokens that occur only in images."""
        return [token for token in self.processor.image_token_ids if token is not None] or [self.feature_token]

    @property
    def feature_token(self) -> int:
        """The token in whose places the model puts an image's features."""
        own = getattr(self.processor, "image_token_id", None) if self.token_id is None else self.token_id
        return self.processor.tokenizer.convert_tokens_to_ids(self.placeholder) if own is None else own

    @property
    def marks_blocks(self) -> bool:
        """Whether the model is told tokens whose attention may go in both directions: of images, or of prompts."""
        return "token_type_ids" in self.blank.token_types

    @cached_property
    def marks_prompts(self) -> bool:
        """Whether all tokens of a prompt attend to each other (PaliGemma): the processor marks them by 0, answers by 1.

        Only such a processor takes the text of an answer, as ``suffix``.
        """
        return "suffix" in inspect.signature(type(self.processor).__call__).parameters

    @cached_property
    def blank(self) -> ImageInputs:
        """The model's inputs for a grey image."""
        return self.inputs([self.blank_prompt[1]])

    @cached_property
    def blank_prompt(self) -> tuple[tuple[int, ...], Picture]:
        """The key of a prompt that is a grey image alone, and the image."""
        import PIL.Image

        image = PIL.Image.new("RGB", (64, 64), (128, 128, 128))
        return (*self.image_id(image), *self.encode(self.placeholder, [image])), image

    @cached_property
    def row_names(self) -> dict[str, bool]:
        """The model's arguments by rows, and whether each has a value for every token.

        Raises:
            UserError: the processor derives some of them from other texts than the tokens' own.
        """
        image, names = self.blank_prompt[1], dict[str, list[Tensor]]()
        for text in (f"a {self.placeholder} b", f"{self.placeholder} a b c d e f g"):
            own = self._run(self.processor, [text], [[image]], return_tensors="pt")
            given = self.row_inputs(own["input_ids"].tolist(), [[image]])
            if not all(torch.equal(value, own[name]) for name, value in given.items()):
                raise UserError(
                    f"{type(self.processor).__name__} derives more of a text than its tokens, so its images cannot be"
                    " trained on: remove the images, or use a model of another family"
                )
            for name, value in given.items():
                names.setdefault(name, []).append(value)
        return {name: one.shape != other.shape for name, (one, other) in names.items()}

    @cached_property
    def _salt(self) -> bytes:
        """The configuration of the processor without what does not change pixels, as bytes."""
        settings = self.processor.image_processor.to_dict()
        plain = {name: x for name, x in vars(self.processor).items() if isinstance(x, (bool, int, float, str))}
        rest = {name: x for name, x in plain.items() if name != "chat_template"}
        return json.dumps([type(self.processor).__name__, settings, rest], sort_keys=True, default=str).encode()

    def image_id(self, image: Picture) -> ImageId:
        """Returns two negative numbers, 126 bits, that identify decoded pixels under this processor."""
        digest = xxh3_128_intdigest(pixel_digest(image) + self._salt)
        return -1 - (digest >> 64 & _WORD), -1 - (digest & _WORD)

    def render(self, example: Example) -> tuple[str, list[str]]:
        """Returns the text of a row's prompt and of its completions, which the chat template makes of messages.

        As in TRL, the prompt ends where the text of the prompt with some completion differs from that of the prompt
        alone, and text that is no conversation stays as it is.

        Raises:
            RowError: the messages have another number of images than the row, or the template refuses them.
            UserError: the processor has no chat template.
        """
        if isinstance(example.prompt, str):
            return example.prompt, [str(completion) for completion in example.completions]
        if getattr(self.processor, "chat_template", None) is None and "chat_template" not in example.template_kwargs:
            raise UserError(
                f"rows are conversations, and {type(self.processor).__name__} has no chat template: set"
                f" processor.chat_template, or give prompts as text, with {self.placeholder} for each image"
            )
        prompt = with_images(example.prompt, len(example.images))
        wholes = [[*prompt, *with_images(list(turns), 0)] for turns in example.completions]
        options = {"tools": example.tools, **example.template_kwargs, "tokenize": False}
        try:
            text = self.processor.apply_chat_template(prompt, add_generation_prompt=True, **options)
            texts = [self.processor.apply_chat_template(whole, **options) for whole in wholes]
        except (TemplateError, TypeError) as error:
            raise RowError(MALFORMED, f"the chat template cannot render it: {type(error).__name__}: {error}") from error
        text = os.path.commonprefix([text, *texts])  # noqa: RUF071 (of characters)
        return text, [whole[len(text) :] for whole in texts]

    def encode(self, text: str, images: Sequence[Picture]) -> list[int]:
        """Returns the token ids of a text in which each image has its placeholder, with the tokens of images.

        Raises:
            RowError: the processor refuses the text or an image.
        """
        try:
            ids = list(self._run(self.processor, [text], [images])["input_ids"][0])
        except UserError as error:
            raise RowError(MALFORMED, str(error)) from error
        if ids.count(self.feature_token) < len(images):
            raise RowError(MALFORMED, f"{self._refuses(images)}: an image has no token")
        return ids

    def _run(self, processor: Any, text: list[str], images: Sequence[Sequence[Picture]], **options: Any) -> Any:
        """Returns what a processor makes of texts with images."""
        given = {"images": list(map(list, images))} if any(images) else {}
        try:
            return processor(text=text, **given, add_special_tokens=False, **options)
        except MemoryError:
            raise
        except Exception as error:  # whatever it raises for an image that is too small or too thin
            refuses = self._refuses([image for each in images for image in each])
            raise UserError(f"{refuses}: {type(error).__name__}: {error}") from error

    def _refuses(self, images: Sequence[Picture]) -> str:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        return f"{type(self.processor).__name__} refuses {f'images of {sizes} pixels' if images else 'it'}"

    def inputs(self, images: Sequence[Picture]) -> ImageInputs:
        """Returns the model's inputs for images, each processed as in a prompt of its own.

        Raises:
            UserError: the processor marks the tokens of images in a way that is not known here, or an image has none.
        """
        text, each = [self.placeholder] * len(images), [[image] for image in images]
        output = self._run(self.processor, text, each, return_tensors="pt", padding=True)
        ids, types = output["input_ids"], tuple(name for name in TOKEN_TYPES if name in output)
        expected = torch.zeros_like(ids) if self.marks_prompts else self.mark(ids)
        if any(not torch.equal(output[name] == 1, expected == 1) for name in types):
            kind = type(self.processor).__name__
            raise UserError(f"{kind} returns {', '.join(types)} of a kind that is not supported: remove the images")
        inputs = {name: value for name, value in output.items() if name not in _OF_TEXT and isinstance(value, Tensor)}
        tokens = (ids == self.feature_token).sum(1).tolist()
        if 0 in tokens:
            raise UserError(f"{self._refuses(images[tokens.index(0) :][:1])}: it has no token; remove the row")
        return ImageInputs(inputs, tokens, types)

    def row_inputs(self, rows: Sequence[Sequence[int]], images: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
        """Returns the model's inputs beside token ids for rows of tokens, each with its images, as the processor does.

        The processor is given tokens in place of text, so that what it derives from text fits the tokens of the rows.
        """
        processor = copy.copy(self.processor)
        processor.tokenizer = _GivenTokens(processor.tokenizer, rows)
        output = self._run(processor, [self.placeholder * len(each) for each in images], images, return_tensors="pt")
        return {name: value for name, value in output.items() if name not in _OF_TEXT and isinstance(value, Tensor)}

    def mark(self, ids: Tensor) -> Tensor:
        """Returns 1 for tokens of images and 0 for others."""
        return torch.isin(ids, torch.tensor(self.token_ids, device=ids.device)).to(ids.dtype)

    def token_types(self, ids: Tensor, prompts: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        """Returns what marks the tokens ``ids`` (B, L) for the model.

        Args:
            prompts: (row of ``ids``, first token, token after the last one) of each prompt.
        """
        if not self.marks_prompts:
            return dict.fromkeys(self.blank.token_types, self.mark(ids))
        types = torch.ones_like(ids)
        for row, start, end in prompts:
            types[row, start:end] = 0
        return dict.fromkeys(self.blank.token_types, types)


class _GivenTokens:
    """A tokenizer whose texts have the given rows of tokens, padded on the right; all else is another tokenizer's."""

    def __init__(self, tokenizer: Any, rows: Sequence[Sequence[int]]) -> None:
        self._tokenizer, self._rows = tokenizer, rows

    def __call__(self, *_: Any, **__: Any) -> BatchEncoding:
        from transformers import BatchEncoding

        longest = max(map(len, self._rows))
        masks = [[1] * len(row) + [0] * (longest - len(row)) for row in self._rows]
        ids = [[*row, *[self._tokenizer.pad_token_id or 0] * (longest - len(row))] for row in self._rows]
        return BatchEncoding({"input_ids": ids, "attention_mask": masks})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def undecoded(dataset: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    """Returns a dataset whose column of images has the name `images`, and values that are decoded here."""
    if column != IMAGES:
        dataset = dataset.rename_column(column, IMAGES)
    if dataset.features is None:
        return dataset  # a stream whose rows are Python objects
    if isinstance(dataset, IterableDataset):
        return dataset.decode(False)
    features = Features({**dataset.features, IMAGES: _undecoded(dataset.features[IMAGES])})
    # `Dataset.cast` would copy the images into a new file.
    table, fingerprint = dataset.data.cast(features.arrow_schema), Hasher.hash(["undecoded", dataset._fingerprint])
    return Dataset(table, DatasetInfo(features=features), indices_table=dataset._indices, fingerprint=fingerprint)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return Image(mode=feature.mode, decode=False) if isinstance(feature, Image) else feature


def holds_images(*data: Any) -> bool:
    """Whether one of several datasets, or of dictionaries of datasets, has a column of images."""
    each = [one for given in data for one in (given.values() if isinstance(given, dict) else (given,))]
    known = [dataset for dataset in each if isinstance(dataset, (Dataset, IterableDataset))]
    return any(not {*IMAGE_COLUMNS}.isdisjoint(read_columns(visible_rows(dataset))) for dataset in known)


def is_processor(tokenizer: Any) -> bool:
    """Whether an object is a processor that holds a tokenizer and an image processor."""
    return hasattr(tokenizer, "tokenizer") and hasattr(tokenizer, "image_processor")


def ids_of(words: Sequence[int]) -> list[ImageId]:
    """Returns the identity of each image, of the numbers of a prompt key or of a row's ``image_ids``."""
    return [(words[i], words[i + 1]) for i in range(0, len(words), WORDS)]


def split_key(key: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the numbers of images and the token ids of a prompt key."""
    count = 0
    while count < len(key) and key[count] < 0:
        count += WORDS
    return key[:count], key[count:]


def images_of(rows: Iterable[Mapping[str, Any]]) -> dict[ImageId, Any]:
    """Returns the images of prepared rows by their identity, as the dataset holds them."""
    found: dict[ImageId, Any] = {}
    for row in rows:
        if row.get("image_ids"):
            found |= zip(ids_of(row["image_ids"]), image_values(row))
    return found


def place_images(
    reader: ImageReader | None,
    always: bool,
    trees: Sequence[tuple[Sequence[int], Sequence[int]]],  # prompt key; (first token, token after it) in the row
    input_ids: Tensor,  # (1, T), or (S, L) of padded rows
    images: Mapping[ImageId, Any],
) -> PlacedImages:
    """Decodes and preprocesses each different image of a batch once, and finds its places in the packed row.

    Args:
        trees: of the sequences that share something; all sequences of a tree with images have one prompt.
        always: a batch without images gets one that is in no place.

    Raises:
        UserError: images cannot be read, or take other tokens than their prompts have.
    """
    places: list[tuple[list[ImageId], Sequence[int], list[int]]] = []  # images, tokens and span of each prompt
    for key, (start, end) in trees:
        words, tokens = split_key(key)
        if words:
            places.append((ids_of(words), tokens, [start, start + len(tokens), end]))
    different = list(dict.fromkeys(image for each, *_ in places for image in each))
    types: dict[str, Tensor] = {}
    if reader is not None and (different or always or reader.marks_prompts):
        is_padded = len(input_ids) > 1  # then each tree is a row
        starts = [(row, 0) if is_padded else (0, start) for row, (_, (start, _)) in enumerate(trees)]
        ends = [start + len(split_key(key)[1]) for (_, start), (key, _) in zip(starts, trees)]
        types = reader.token_types(input_ids, [(*at, end) for at, end in zip(starts, ends)])
    none = dict(image_rows=[], images={}, image_tokens=[], image_index=[], image_prompts=[], token_types=types)
    if reader is not None and reader.by_rows:
        pictures = dict(zip(different, _opened(reader, different, images)))
        rows = _by_rows(reader, [tuple(key) for key, _ in trees], pictures, input_ids.shape[1])
        if always and not different:
            key, image = reader.blank_prompt
            (blank,) = _by_rows(reader, [key], {ids_of(key[:WORDS])[0]: image}, len(key) - WORDS)
            ids = torch.tensor([key[WORDS:]])
            of_tokens = {**blank["of_tokens"], "input_ids": ids, **reader.token_types(ids, [(0, 0, ids.shape[1])])}
            rows.append({**blank, "rows": [], "of_tokens": of_tokens})
        return cast("PlacedImages", none | {"image_rows": rows})
    if not different and (reader is None or not always):
        return cast("PlacedImages", none)
    if reader is None:
        raise UserError("rows have images, and the collator has none to read them: give PackedCollator(images=...)")
    found = reader.inputs(_opened(reader, different, images)) if different else reader.blank
    number = {image: u for u, image in enumerate(different)}
    for each, tokens, _ in places:
        have = sum(token == reader.feature_token for token in tokens)
        if have != (need := sum(found.tokens[number[image]] for image in each)):
            raise UserError(f"a prompt has {have} tokens of images, and its images take {need}: remove the row")
    return PlacedImages(
        image_rows=[],
        images=found.inputs,
        image_tokens=found.tokens,
        image_index=[number[image] for each, *_ in places for image in each],
        image_prompts=[(span, [number[image] for image in each]) for each, _, span in places],
        token_types=types,
    )


def _opened(reader: ImageReader, different: Sequence[ImageId], images: Mapping[ImageId, Any]) -> list[Picture]:
    """Returns images by their identities, decoded."""
    if not all(image in images for image in different):
        raise UserError("the images of some prompts are not given: hand on those of `images_of`")
    pictures = [open_image(images[image]) for image in different]
    # Prepared rows may be from a cache, with references of the earlier pixels.
    if any(reader.image_id(picture) != image for picture, image in zip(pictures, different)):
        raise UserError(
            "an image has other pixels than when the rows were prepared: give a changed file another name, or remove"
            " the prepared rows with dataset.cleanup_cache_files()"
        )
    return pictures


def _by_rows(
    reader: ImageReader, keys: Sequence[tuple[int, ...]], pictures: Mapping[ImageId, Picture], length: int
) -> list[ImageRows]:
    """Returns the rows of a batch of ``length`` tokens each, whose prompts have ``keys``, as they run together.

    Those are rows for which the processor makes inputs of the same shapes: others would have images of padding, which a
    model may attend to. Tokens of completions have what holds for the last token of their prompt, as in transformers'
    generation.
    """
    own: dict[tuple[int, ...], dict[str, Tensor]] = {}
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for row, key in enumerate(keys):
        if key not in own:
            words, tokens = split_key(key)
            own[key] = reader.row_inputs([tokens], [[pictures[image] for image in ids_of(words)]]) if words else {}
        shapes = [(name, value.shape[2 * reader.row_names[name] :]) for name, value in own[key].items()]
        groups.setdefault(tuple(shapes), []).append(row)
    found = []
    # Rows with images run last, because DDP sees the last forward alone, and it must run all modules.
    for _, rows in sorted(groups.items(), key=lambda group: len(group[0])):
        of, of_tokens, of_images = [keys[row] for row in rows], dict[str, Tensor](), dict[str, Tensor]()
        different = list(dict.fromkeys(of))
        for name in own[of[0]]:
            if reader.row_names[name]:
                values = [own[key][name][0] for key in of]
                of_tokens[name] = torch.stack([v[torch.arange(length).clamp(max=len(v) - 1)] for v in values])
            else:
                of_images[name] = torch.cat([own[key][name] for key in different])
        prompts = torch.tensor([different.index(key) for key in of])
        found.append(
            ImageRows(rows=rows, prompts=prompts, different=len(different), of_tokens=of_tokens, of_images=of_images)
        )
    return found
