"""Packed rows of prompts with images equal each completion run alone by the model's own forward."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from cpt_kernels.data import images as data_images
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.errors import UserError
from cpt_kernels.model import images as model_images
from cpt_kernels.model import packed_model
from cpt_kernels.model.images import image_reader
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers.image_models import FAMILIES, MORE, WORDS, picture, tiny_image_model, tiny_processor
from tests.numerics import assert_close

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


IN_PADDED_ROWS = ("chameleon", "emu3", "mllama")
ENCODED = {"emu3": 2, "mllama": 2}  # calls of the vision tower, of models that take images by rows


def make_rows(processor: Any) -> list[dict]:
    """Returns prepared rows of all groups, each with a pair of its first two completions."""
    reader, rng = model_images.ImageReader(processor), random.Random(0)
    rows, tokens = [], processor.tokenizer.encode
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
                # PaliGemma's processor refuses text without images.
                "prompt_ids": reader.encode(" ".join(text), pictures) if pictures else tokens(" ".join(text)),
                "image_ids": [word for each in pictures for word in reader.image_id(each)],
                "images": pictures,
                "text": " ".join(text),
                "completion_ids": completions,
                **{"chosen": [0] * several, "rejected": [1] * several, "targets": [0] * several},
            }
        )
    return rows


def run_alone(model: nn.Module, processor: Any, rows: list[dict]) -> tuple[torch.Tensor, dict]:
    """Runs every completion alone behind its prompt; returns log-probs and the gradients of a projection of them."""
    reader, logps, is_prefix = model_images.ImageReader(processor), [], "PaliGemma" in type(processor).__name__
    is_by_rows = image_reader(model, processor).by_rows
    for row in rows:
        inputs: dict[str, Any] = {}
        if row["images"]:
            text = " ".join([reader.placeholder] * len(row["images"]))
            output = processor(text=[text], images=[row["images"]], return_tensors="pt")
            inputs = {name: output[name] for name in output if name not in ("input_ids", "attention_mask", "labels")}
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        start = len(row["prompt_ids"]) - 1
        for completion in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + completion])
            if is_by_rows and row["images"]:
                inputs = _as_generation_has_it(model, processor, row, len(completion))
            types = {name: reader.mark(ids) for name in inputs if "token_type_ids" in name}
            if is_prefix:
                types = {"token_type_ids": torch.tensor([[0] * (start + 1) + [1] * len(completion)])}
            logits = model(input_ids=ids, use_cache=False, **{**inputs, **types}).logits[0, start:-1]
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            logps.append(log_p.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logps).detach(), _gradients(model, torch.cat(logps))


def _as_generation_has_it(model: Any, processor: Any, row: dict, tokens: int) -> dict[str, Any]:
    """Returns the processor's own inputs for a prompt, extended by so many tokens as by transformers' generation."""
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    inputs = dict(processor(text=[row["text"]], images=[row["images"]], **options))
    assert inputs.pop("input_ids").tolist() == [row["prompt_ids"]]
    for _ in range(tokens):
        inputs = model._update_model_kwargs_for_generation(ModelOutput(), inputs, is_encoder_decoder=False)
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def _gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    directions = torch.arange(1, len(logps) + 1, dtype=logps.dtype).sin()
    named = dict(model.named_parameters())
    found = torch.autograd.grad(logps @ directions, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


def compare(kind: str, packing: str = "auto", **collate: Any) -> None:
    model, processor = tiny_image_model(kind), tiny_processor(kind)
    rows = make_rows(processor)
    expected, gradients = run_alone(model, processor, rows)
    packed = PackedModel(model, packing=packing, images=image_reader(model, processor))
    reader = packed.images
    assert packed.padded == (packing == "false" or kind in IN_PADDED_ROWS) and packed.bidirectional == (
        kind in ("gemma3", "paligemma") and not packed.padded
    )
    assert reader.by_rows == (kind in ENCODED) and (packed.options is None) == (kind == "chameleon")
    batch = PackedCollator(padded=packed.padded, images=reader, **collate)(rows)
    with calls(model) as encoded:
        logps = packed(batch).tokens.logps
    # 4 different images are in 6 places; several images may be encoded in one call, if it is a separate one.
    assert len(encoded) == ENCODED.get(kind, 1) and len(batch["image_tokens"]) == (0 if reader.by_rows else 4)
    if kind == "mllama":  # two prompts with one image and 5 completions, two with two images and 5 completions
        assert [given["pixel_values"].shape[:2] for _, given in encoded] == [(2, 1), (2, 2)]
    torch.testing.assert_close(logps, expected, rtol=FLOOR, atol=FLOOR)
    for name, found in _gradients(model, logps).items():
        largest = gradients[name].abs().max()
        torch.testing.assert_close(found, gradients[name], rtol=FLOOR, atol=FLOOR * (1 + largest.item()), msg=name)
    tower = [values for name, values in gradients.items() if "vis" in name]
    assert any(values.abs().max() > 1e-3 for values in tower) or not tower  # codes of images have no gradient


_TOWERS = ("visual", "vision_tower", "vision_model", "vqmodel.encoder")


@contextlib.contextmanager
def calls(model: nn.Module) -> Iterator[list]:
    """Records the inputs of the vision tower."""
    tower = next(m for name, m in model.named_modules() if name.endswith(_TOWERS))
    found: list = []
    handle = tower.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("kind", [*FAMILIES, *MORE])
def test_rows_equal_each_completion_alone(kind: str) -> None:
    compare(kind)


def test_a_prompt_that_attends_in_both_directions() -> None:
    """The marks are those of the processor, and beginnings that are shorter than prompts are not shared."""
    model, processor = tiny_image_model("paligemma"), tiny_processor("paligemma")
    reader, image = image_reader(model, processor), picture(40, 60)
    own = processor(text=["<image> w3 w4"], images=[[image]], suffix=["w5 w6"], return_tensors="pt")
    prompt = reader.encode("<image> w3 w4", [image])
    assert own["input_ids"].tolist()[0][:-1] == prompt + processor.tokenizer.encode("w5 w6")  # then the end
    types = reader.token_types(own["input_ids"], [(0, 0, len(prompt))])
    assert types["token_type_ids"].tolist() == own["token_type_ids"].tolist()
    rows = make_rows(processor)
    rows[4]["prompt_ids"] = [*rows[1]["prompt_ids"], 7]  # begins as another prompt
    expected, _ = run_alone(model, processor, rows)
    packed = PackedModel(model, images=reader)
    with torch.no_grad():
        logps = packed(PackedCollator(images=reader, minimum_shared=1)(rows)).tokens.logps
    torch.testing.assert_close(logps, expected, rtol=FLOOR, atol=FLOOR)


@pytest.mark.parametrize(
    "kind", ["gemma3", "paligemma", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3_vl", "idefics3"))]
)
def test_unshared_and_padded_rows_too(kind: str) -> None:
    compare(kind, share_prompts=False)
    compare(kind, packing="false")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "mllama"])
def test_low_precision_by_the_one_rule(kind: str, dtype: torch.dtype) -> None:
    """Gradients are scaled by their own size and pooled, because their errors consist of a few shared roundings."""
    processor = tiny_processor(kind)
    rows, model = make_rows(processor), tiny_image_model(kind, dtype)
    exact, exact_gradients = run_alone(tiny_image_model(kind, dtype).double(), processor, rows)
    eager, eager_gradients = run_alone(model, processor, rows)
    packed = PackedModel(model, images=image_reader(model, processor))
    assert packed.padded == (kind == "mllama")
    logps = packed(PackedCollator(padded=packed.padded, images=packed.images)(rows)).tokens.logps
    assert_close(logps.detach(), eager, exact, "log-probs", eps=torch.finfo(dtype).eps)
    sizes = {name: values.abs().max() for name, values in exact_gradients.items()}
    largest = max(sizes.values())  # the gradient of a key's bias is rounding alone
    scales = {name: size + 1e-2 * largest for name, size in sizes.items()}

    def pooled(gradients: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([(values.double() / scales[name]).flatten() for name, values in gradients.items()]).to(dtype)

    found = (pooled(_gradients(model, logps), torch.float64), pooled(eager_gradients, torch.float64))
    assert_close(*found, pooled(exact_gradients, torch.float64), "gradients", eps=torch.finfo(dtype).eps)


# --- Faults ---


def _positions_of_text(_: Any, batch: Any) -> Any:
    return batch["position_ids"]


def _completions_not_continued(model: Any, batch: Any) -> Any:
    positions = model_images.packed_positions(model, batch)
    for (_, stop, end), _ in batch["image_prompts"]:
        positions[:, :, stop:end] = batch["position_ids"][:, stop:end]
    return positions


def _second_completion_shifted(model: Any, batch: Any) -> Any:
    positions = model_images.packed_positions(model, batch).clone()
    for (_, _, end), _ in batch["image_prompts"][:1]:
        positions[..., end - 5] += 1  # in the second completion, which has 7 tokens
    return positions


@pytest.mark.parametrize("fault", [_positions_of_text, _completions_not_continued, _second_completion_shifted])
def test_wrong_positions_are_noticed(fault: Any, monkeypatch) -> None:
    _expect_fault(monkeypatch, packed_model, "packed_positions", fault)


def test_features_in_the_wrong_places_are_noticed(monkeypatch) -> None:
    own = model_images._at_places
    wrong = lambda features, tokens, index: own(features, tokens, [*index[1:], index[0]])  # noqa: E731
    _expect_fault(monkeypatch, model_images, "_at_places", wrong)


def test_prompts_that_attend_backwards_alone_are_noticed(monkeypatch) -> None:
    _expect_fault(monkeypatch, packed_model, "image_blocks", lambda *_: [], "paligemma", where="")


def _expect_fault(
    monkeypatch, module: Any, name: str, fault: Any, kind: str = "qwen2_5_vl", where: str = " with images"
) -> None:
    model, processor = tiny_image_model(kind), tiny_processor(kind)
    reader = image_reader(model, processor)
    PackedModel(model, packing="true", images=reader)
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(UserError, match=f"in a packed row{where} log-probs differ"):
        PackedModel(model, packing="true", images=reader)


def _completions_see_no_image(rows: dict) -> None:
    rows["of_tokens"]["cross_attention_mask"][:, -3:] = 0


def _images_of_another_prompt(rows: dict) -> None:
    rows["of_images"]["pixel_values"] = rows["of_images"]["pixel_values"].flip(-1)


@pytest.mark.parametrize("fault", [_completions_see_no_image, _images_of_another_prompt])
def test_wrong_inputs_by_rows_are_noticed(fault: Any, monkeypatch) -> None:
    model, own = tiny_image_model("mllama"), data_images._by_rows
    reader = image_reader(model, tiny_processor("mllama"))

    def faulty(*args: Any) -> list[dict]:
        found = own(*args)
        for rows in found:
            if rows["of_tokens"]:
                fault(rows)
        return found

    monkeypatch.setattr(data_images, "_by_rows", faulty)
    with pytest.raises(UserError, match="in padded rows with images log-probs differ"):
        PackedModel(model, images=reader)


@pytest.mark.parametrize("sequences", [[], [((3, 4), (5,)), ((3, 4), (6, 7))]], ids=["none", "text"])
def test_a_rank_without_images_has_gradients_of_all_parameters(sequences: list) -> None:
    model = tiny_image_model("mllama")
    packed = PackedModel(model, images=image_reader(model, tiny_processor("mllama")))
    batch = PackedCollator(padded=True, images=packed.images, always_images=True).pack(sequences, [], [], [])
    logps = packed(batch).tokens.logps
    if sequences:
        own = model(input_ids=torch.tensor([[3, 4, 6, 7]])).logits[0, 1:3].log_softmax(-1)
        torch.testing.assert_close(logps[1:], own[[0, 1], [6, 7]])
    assert all(g is not None for g in torch.autograd.grad(logps.sum(), list(model.parameters())))


def test_models_by_rows_say_what_they_cannot_do() -> None:
    model, processor = tiny_image_model("mllama"), tiny_processor("mllama")
    with pytest.raises(UserError, match=r"takes the images of each row in its own forward, .*: set packing=auto"):
        PackedModel(model, packing="true", images=image_reader(model, processor))
    processor.tokenizer = copy.copy(processor.tokenizer)
    own = type(processor).__call__
    derived = {"__call__": lambda self, text, **more: own(self, text=text, **more) | {"pixel_mask": _lengths(text)}}
    processor.__class__ = type("MllamaProcessor", (type(processor),), derived)
    with pytest.raises(UserError, match="MllamaProcessor derives more of a text than its tokens"):
        image_reader(model, processor)


def test_the_last_forward_has_images() -> None:
    """DDP sees the last forward alone, and cross-attention that it does not run would count as unused."""
    processor = tiny_processor("mllama")
    reader = model_images.ImageReader(processor, by_rows=True)
    batch = PackedCollator(padded=True, images=reader)(make_rows(processor)[:2])
    assert [bool(rows["of_images"]) for rows in batch["image_rows"]] == [False, True]


def _lengths(text: list[str]) -> torch.Tensor:
    return torch.tensor([list(map(len, text))])


# --- Images of real sizes ---


def test_real_sizes_by_the_defaults_of_a_processor() -> None:
    """Qwen's own resizing: to multiples of 28 pixels, near the aspect ratio, each 28 x 28 pixels one token."""
    processor = tiny_processor("qwen2_5_vl")
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    reader = model_images.ImageReader(processor)
    landscape, portrait = picture(768, 1024), picture(1024, 768)
    found = reader.inputs([landscape, portrait])
    assert found.inputs["image_grid_thw"].tolist() == [[1, 54, 74], [1, 74, 54]] and found.tokens == [27 * 37] * 2
    assert reader.encode(f"w3 {reader.placeholder} w4", [landscape]).count(reader.feature_token) == 27 * 37
