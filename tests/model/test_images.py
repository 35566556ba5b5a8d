"""Packed rows of prompts with images equal each completion run alone by the model's own forward."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.model import images as model_images
from cpt_kernels.model.images import image_reader
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers.image_models import FAMILIES, WORDS, picture, tiny_image_model, tiny_processor

PACKED = [kind for kind in FAMILIES if kind != "gemma3"]
FLOOR = 2e-6  # transformers keeps RMSNorm, RoPE and softmax in fp32

# (sizes of the prompt's images, words before and after them, tokens of the completions). The sizes repeat.
_GROUPS: list[tuple[list[tuple[int, int]], int, int, list[int]]] = [
    ([(40, 60)], 1, 3, [4, 1]),
    ([], 4, 0, [2, 5]),
    ([(70, 30), (28, 28)], 0, 2, [3]),
    ([(28, 28), (90, 33)], 2, 1, [1, 6, 2, 3]),
    ([], 1, 0, [1, 3]),
    ([(40, 60)], 3, 2, [5, 2, 1]),
]


def make_rows(processor: Any) -> list[dict]:
    """Returns prepared rows of all groups, each with a pair of its first two completions."""
    reader, rng = model_images.ImageReader(processor), random.Random(0)
    rows = []
    for sizes, before, after, lengths in _GROUPS:
        pictures = [picture(*size) for size in sizes]
        text = [
            *rng.choices(WORDS, k=before),
            *" w9 ".join([reader.placeholder] * len(sizes)).split(),
            *rng.choices(WORDS, k=after),
        ]
        firsts = rng.sample(range(3, 3 + len(WORDS)), len(lengths))
        completions = [[first, *rng.choices(range(3, 43), k=n - 1)] for first, n in zip(firsts, lengths)]
        several = len(lengths) > 1
        rows.append(
            {
                "prompt_ids": reader.encode(" ".join(text), pictures),
                "image_ids": [word for each in pictures for word in reader.image_id(each)],
                "images": pictures,
                "completion_ids": completions,
                **{"chosen": [0] * several, "rejected": [1] * several, "targets": [0] * several},
            }
        )
    return rows


def run_alone(model: nn.Module, processor: Any, rows: list[dict]) -> tuple[list[torch.Tensor], dict]:
    """Runs every completion alone behind its prompt; returns log-probs and the gradients of a projection of them."""
    reader, logps = model_images.ImageReader(processor), []
    for row in rows:
        inputs: dict[str, Any] = {}
        if row["images"]:
            output = processor(
                text=[" ".join([reader.placeholder] * len(row["images"]))], images=[row["images"]], return_tensors="pt"
            )
            names = [name for name in output if "token_type_ids" not in name and output[name].is_floating_point()]
            inputs = {
                k: output[k].double() if k in names else output[k]
                for k in output
                if k not in ("input_ids", "attention_mask")
            }
        for completion in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + completion])
            types = {k: reader.mark(ids) for k in inputs if "token_type_ids" in k}
            logits = model(input_ids=ids, use_cache=False, **{**inputs, **types}).logits[
                0, len(row["prompt_ids"]) - 1 : -1
            ]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return logps, _gradients(model, torch.cat(logps))


def _gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    directions = torch.arange(1, len(logps) + 1, dtype=logps.dtype).sin()
    named = dict(model.named_parameters())
    found = torch.autograd.grad(logps @ directions, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


def compare(kind: str, packing: str = "auto", **collate: Any) -> None:
    model, processor = tiny_image_model(kind), tiny_processor(kind)
    rows = make_rows(processor)
    expected, gradients = run_alone(model, processor, rows)
    reader = image_reader(model, processor)
    packed = PackedModel(model, packing=packing, images=reader)
    assert packed.padded == (packing == "false" or kind not in PACKED)
    batch = PackedCollator(padded=packed.padded, images=reader, **collate)(rows)
    with calls(model) as encoded:
        logps = packed(batch).tokens.logps
    # 4 different images are in 6 places; several images may be encoded in one call.
    assert len(encoded) == 1 and len(batch["image_tokens"]) == 4
    torch.testing.assert_close(logps, torch.cat(expected), rtol=FLOOR, atol=FLOOR)
    for name, found in _gradients(model, logps).items():
        largest = gradients[name].abs().max()
        torch.testing.assert_close(found, gradients[name], rtol=FLOOR, atol=FLOOR * (1 + largest.item()), msg=name)
    assert any("vis" in name and gradients[name].abs().max() > 1e-3 for name in gradients)


@contextlib.contextmanager
def calls(model: nn.Module) -> Iterator[list]:
    """Records the inputs of the vision tower."""
    tower = next(m for name, m in model.named_modules() if name.endswith(("visual", "vision_tower", "vision_model")))
    found: list = []
    handle = tower.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_equal_each_completion_alone(kind: str) -> None:
    compare(kind)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_unshared_and_padded_rows_too(kind: str) -> None:
    compare(kind, share_prompts=False)
    compare(kind, packing="false")
