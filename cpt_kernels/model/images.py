"""Images in a packed row: the model encodes each different image once, wherever it occurs.

The image-text models of transformers call ``get_image_features`` in their forward, and put its result in the places of
a special token, in the order of the row. During a forward of this package that method runs on the different images of
the batch, and its result is repeated for the places of each.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ..data.collate import PackedBatch, Tokens
from ..data.image_files import open_image
from ..data.images import ImageId, ImageReader, ImageRows, ids_of, split_key
from ..errors import UserError
from ..ops.exchange import SequenceGroup
from .hooks import noise_per_sequence
from .proof import Probe, token_source

_OURS = ("layout", "attention_backend", "state_layout")  # keywords of a packed forward, for the layers of text only
_PER_PLACE = ("image_grid_thw",)  # inputs that a model reads for every place of an image, to compute positions
_SIZES = ((60, 44), (36, 72))  # pixels of a probe's images, (height, width)


def image_reader(model: PreTrainedModel, processor: Any) -> ImageReader:
    """Returns the reader of images for a model.

    Raises:
        UserError: the model takes no images, or not in the way that transformers' image-text models do.
    """
    token = next((x for n in ("image_token_id", "image_token_index") if (x := getattr(model.config, n, None))), None)
    reader = ImageReader(processor, token, by_rows=not hasattr(image_encoder(model), "get_image_features"))
    assert reader.placeholder  # raises for a processor without one
    if reader.by_rows:
        names, taken = reader.row_names, inspect.signature(model.forward).parameters
        if unknown := sorted(name for name in names if name not in taken):
            raise UserError(
                f"{type(model).__name__} does not take {', '.join(unknown)}, which {type(processor).__name__} makes of"
                " images: remove the images, or use the processor's model"
            )
    return reader


def image_probe(model: PreTrainedModel, reader: ImageReader) -> Probe:
    """Returns the tokens and images of a proof of prompts with images.

    The first prompt has one image and two completions that begin alike, the second one completion and both images.
    """
    import PIL.Image

    draw = token_source(model, {reader.feature_token, *reader.token_ids})
    random = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in _SIZES]
    spelled = [tuple(reader.encode(reader.placeholder, [picture])) for picture in pictures]
    ids = [reader.image_id(picture) for picture in pictures]
    first: tuple[int, ...] = (*ids[0], *draw(3), *spelled[0], *draw(4))
    second: tuple[int, ...] = (*ids[1], *ids[0], *draw(2), *spelled[1], *draw(1), *spelled[0], *draw(2))
    one, two = draw(5), draw(7)
    sequences: list[Tokens] = [(first, one), (first, one[:2] + two[2:]), (second, draw(4))]
    return replace(Probe.of(model), sequences=sequences, images=dict(zip(ids, pictures)))


def own_inputs(
    model: PreTrainedModel,
    reader: ImageReader,
    images: Mapping[ImageId, Any],
    sequences: Sequence[Tokens],
    rows: Tensor,
) -> dict[str, Tensor]:
    """Returns the inputs of a model's own forward for the images in rows of tokens, as its processor makes them.

    Args:
        images: by identity.
        rows: token ids of some of the sequences, (B, L).
    """
    prompts = [split_key(prompt) for prompt, _ in sequences]
    keys = {tuple(tokens): words for words, tokens in prompts if words}
    held: list[list[Any]] = []  # the images of each row
    spans = []
    for number, row in enumerate(map(tuple, rows.tolist())):
        lengths = [len(tokens) for _, tokens in prompts if row[: len(tokens)] == tuple(tokens)]
        spans.append((number, 0, max(lengths, default=0)))
        at, found = 0, []
        while at < len(row):  # a row may hold several prompts
            prompt = next((tokens for tokens in keys if row[at : at + len(tokens)] == tokens), None)
            found += [] if prompt is None else [open_image(images[image]) for image in ids_of(keys[prompt])]
            at += 1 if prompt is None else len(prompt)
        held.append(found)
    if pictures := [picture for each in held for picture in each]:
        inputs = reader.row_inputs(rows.tolist(), held) if reader.by_rows else reader.inputs(pictures).inputs
    else:
        inputs = {}
    if (pictures and not reader.by_rows) or reader.marks_prompts:
        inputs |= reader.token_types(rows, spans)
    return {name: value.to(rows.device) for name, value in in_its_dtype(model, inputs).items()}


def in_its_dtype(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns inputs with numbers of the dtype of a model's weights: not every vision tower converts pixels itself."""
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def image_inputs(model: PreTrainedModel, batch: PackedBatch, padded: bool) -> dict[str, Tensor]:
    """Returns the keyword arguments of a model's forward for the images of a batch."""
    inputs = in_its_dtype(model, batch["images"])
    if padded:
        index = torch.tensor(batch["image_index"], dtype=torch.int64, device=batch["input_ids"].device)
        inputs |= {name: inputs[name][index] for name in _PER_PLACE if name in inputs} | batch["token_types"]
    return inputs


def run_forwards(
    base: PreTrainedModel,
    model: nn.Module,
    wrapped: nn.Module | None,
    batch: PackedBatch,
    inputs: Mapping[str, Any],
    group: SequenceGroup | None,
) -> list[Any]:
    """Runs a batch in one forward or, if the model takes images by rows, in one for all rows that can run together.

    The vision tower then runs on the images of each different prompt once.

    Args:
        base, model: the transformers model, and the PEFT model around it or the same.
        wrapped: the model as an engine wrapped it; its forward is the last one. DDP synchronizes buffers there, so
            every rank must call it equally often.
        inputs: of all rows.
        group: ranks over which the packed row is cut.

    Returns:
        The model's output of each forward.
    """
    segments, last = batch["segment_lengths"], model if wrapped is None else wrapped
    embeddings = base.get_input_embeddings()
    if not batch["image_rows"]:
        with noise_per_sequence(embeddings, segments, group):
            return [last(**inputs)]
    outputs = []
    for rows in batch["image_rows"]:
        given = {name: value[rows["rows"]] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        lengths = [segments[row] for row in rows["rows"]] or [(1, 1)]
        called = last if rows is batch["image_rows"][-1] else model
        with _of_prompts(base, rows) as of_images, noise_per_sequence(embeddings, lengths, group):
            outputs.append(called(**(given | rows["of_tokens"] | of_images)))
    return outputs


@contextlib.contextmanager
def _of_prompts(model: PreTrainedModel, rows: ImageRows) -> Iterator[dict[str, Tensor]]:
    """Context in which a model takes the images of U different prompts for R rows; yields its arguments for images.

    A vision tower that is a module of its own runs on the U prompts, and its result is repeated for the rows.
    """

    def repeat(values: Tensor) -> Tensor:
        return values.unflatten(0, (rows["different"], -1))[rows["prompts"]].flatten(0, 1)

    of_images, vision = in_its_dtype(model, rows["of_images"]), getattr(model.config, "vision_config", None)
    towers = [] if vision is None else [m for m in model.modules() if type(getattr(m, "config", None)) is type(vision)]
    if not towers or hasattr(image_encoder(model), "get_image_features"):
        yield {name: repeat(value) for name, value in of_images.items()}
        return
    handle = towers[0].register_forward_hook(lambda _module, _args, output: tree_map_only(Tensor, repeat, output))
    try:
        yield of_images
    finally:
        handle.remove()


def whole_rows(batch: PackedBatch, parts: Sequence[Tensor]) -> Tensor:
    """Returns what the forwards of a batch give, (R, L, X) each, for all tokens in the order of the batch, (T, X)."""
    groups = batch["image_rows"]
    if len(parts) == 1:
        return parts[0].flatten(0, -2)
    order = np.argsort([row for group in groups for row in group["rows"]])
    found = torch.cat([part for part, group in zip(parts, groups) if group["rows"]])[order].flatten(0, 1)
    # Of an image in no row nothing is left but a gradient of zero, which DDP needs on every rank.
    return torch.cat([found, *(part.flatten(0, 1)[:0] for part, group in zip(parts, groups) if not group["rows"])])


def image_blocks(batch: PackedBatch, reader: ImageReader) -> list[tuple[int, int]]:
    """Returns (first, end) of tokens in a packed row that attend to each other: of images in a row, or of a prompt."""
    types = batch["token_types"].get("token_type_ids")
    if types is None:
        return []
    inside = types[0].cpu().numpy() == (0 if reader.marks_prompts else 1)
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def packed_positions(model: PreTrainedModel, batch: PackedBatch) -> Tensor | None:
    """Returns positions in a packed row: (1, T), or (3, 1, T) if the model gives images positions of their own.

    The model computes the positions of each prompt alone, and completions continue after the largest one.
    """
    positions, encoder = batch["position_ids"], image_encoder(model)
    if not batch["image_prompts"] or not hasattr(encoder, "get_rope_index"):
        return positions
    assert positions is not None, "the row is packed"
    positions = positions.expand(3, *positions.shape).clone()
    types = batch["token_types"]["mm_token_type_ids"]
    for (start, stop, end), images in batch["image_prompts"]:
        prompt = slice(start, stop)
        own, delta = encoder.get_rope_index(
            batch["input_ids"][:, prompt],
            mm_token_type_ids=types[:, prompt],
            image_grid_thw=batch["images"]["image_grid_thw"][images],
        )
        positions[:, :, prompt] = own
        positions[:, :, stop:end] += delta.view(1, 1, 1)
    return positions


def encode_images(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the features of images, as one tensor or several, from the inputs that the processor makes of them."""
    forward = image_encoder(model).get_image_features
    names = inspect.signature(forward).parameters
    given = {name: value for name, value in in_its_dtype(model, inputs).items() if name in names}
    features = forward(**given).pooler_output
    return [features] if isinstance(features, Tensor) else [*features]


@contextlib.contextmanager
def shared_features(model: PreTrainedModel, batch: PackedBatch) -> Iterator[None]:
    """Context of a forward in which each different image of a batch is encoded once, for all its places."""
    images = in_its_dtype(model, batch["images"])
    encoder, tokens, index = image_encoder(model), batch["image_tokens"], batch["image_index"]
    if not images:
        yield
        return
    forward = encoder.get_image_features
    signature = inspect.signature(forward)

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in _OURS})
        given = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        given.pop("kwargs", None)
        output = forward(**{name: images.get(name, value) for name, value in given.items()})
        if index != list(range(len(tokens))):
            output.pooler_output = _at_places(output.pooler_output, tokens, index)
            if (more := getattr(output, "deepstack_features", None)) is not None:
                output.deepstack_features = [_at_places(each, tokens, index) for each in more]
        return output

    encoder.get_image_features = get_image_features
    # DDP would wait for gradients of what it finds in the output, and the loss does not depend on all of it.
    handle = model.register_forward_hook(_without_features)
    try:
        yield
    finally:
        del encoder.get_image_features
        handle.remove()


def _without_features(_module: nn.Module, _args: tuple, output: Any) -> Any:
    return type(output)(**{name: value for name, value in output.items() if not name.startswith("image_")})


def image_encoder(model: PreTrainedModel) -> Any:
    """Returns the module whose forward encodes images: the model without its head, if that has the method."""
    inner = model.base_model
    return inner if hasattr(inner, "get_image_features") else model


def _at_places(features: Any, tokens: Sequence[int], index: Sequence[int]) -> Any:
    """Returns the features of images, a tensor or one per image, in the order of ``index``."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    rows = torch.cat([part.flatten(0, -2) for part in parts])
    each = rows.split(list(tokens))
    found = [each[u] for u in index] or [rows[:0]]
    if not isinstance(features, Tensor):
        return found
    joined = torch.cat(found)
    return joined if features.dim() == 2 else joined.unflatten(0, (len(joined) // features.shape[1], features.shape[1]))
