"""Tests of the prediction of seconds: the arithmetic with a clock of its own, and the imitation of TRL's step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bench.lengths import preference_rows
from bench.trainers import tokenizer
from cpt_kernels import ContrastiveConfig
from cpt_kernels.cli.planned import PlannedTrainer
from cpt_kernels.model.packed_model import base_model
from cpt_kernels.planning import calibration, peer
from cpt_kernels.planning.calibration import (
    NotTimedError,
    Rate,
    Shape,
    calibrate,
    predict_seconds,
    ratios,
    trained_parameters,
)
from cpt_kernels.planning.counts import count_run
from cpt_kernels.planning.sample import Sample, truncated
from tests.helpers.architectures import STATES
from tests.helpers.image_models import FAMILIES, image_rows, tiny_image_model, tiny_processor

SIZES = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=50)


def planned(
    tmp_path, layers: int = 6, lora: bool = False, mixture: bool = False, tied: bool = False, **options: Any
) -> PlannedTrainer:
    """Returns a trainer of a model without weights, on 24 pairs."""
    args = ContrastiveConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, bf16=False, **options)
    config, cls = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied, **SIZES), LlamaForCausalLM
    if mixture:
        config = MixtralConfig(num_hidden_layers=layers, num_local_experts=4, **SIZES)
        cls = MixtralForCausalLM
    with torch.device("meta"):
        model = cls(config)
    adapter = None
    if lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list(preference_rows("tiny", 24, SIZES["vocab_size"]))
    words = tokenizer(SIZES["vocab_size"])
    return PlannedTrainer(model, None, args, adapter, train_dataset=rows, processing_class=words)


def counts_of(trainer: PlannedTrainer):
    return count_run(trainer.get_train_dataloader(), trainer.train_dataset, trainer.collator, trainer.args)


class Machine:
    """A machine on which a micro-batch takes seconds by a rule, with a clock that only its runs move."""

    def __init__(self, monkeypatch, trainer: PlannedTrainer, counts: Any) -> None:
        self.now, self.layers = 0.0, 0
        shape, lengths = Shape.of(trainer.packed.model, trainer.args), counts.lengths
        self.rates = {
            "train": (0.02, 1e-7),
            "reference": (0.0, 2e-7),
            "peer": (0.001, 3e-7),
            "peer_reference": (0.001, 2e-7),
        }

        def method(kind: str, work: Callable[[Any], Any], backward: bool) -> Callable[[Sample, Any], None]:
            def run(sample: Sample, items: Any) -> None:
                layers = len(sample.stack)
                fixed, per_flop = self.rates[kind]
                self.layers = layers
                self.now += fixed + per_flop * shape.flops(work(items), backward, layers)

            return run

        def of_sides(sides: Any) -> Any:
            return counts.peer_work([sides])

        for name, kind, work, backward in (
            ("train", "train", lengths.work, True),
            ("score", "reference", lengths.work, False),
            ("train_peer", "peer", of_sides, True),
            ("score_peer", "peer_reference", of_sides, False),
        ):
            monkeypatch.setattr(Sample, name, method(kind, work, backward))
        monkeypatch.setattr(Sample, "step", lambda sample: self.step(sample))

    def step(self, sample: Sample) -> None:
        with sample.only(self.layers):  # only these have gradients
            self.now += 1e-5 * trained_parameters(sample.model)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize(
    ("options", "short"),
    [({}, 24), ({"gradient_checkpointing": False, "lora": True}, 16), ({"loss_type": "simpo"}, 14)],
)
def test_seconds_are_those_of_the_machine(tmp_path, monkeypatch, options, short, all_layers):
    """With all layers, and with so little time that only some of them run."""
    trainer = planned(tmp_path, per_device_train_batch_size=3, **options)
    counts = counts_of(trainer)
    machine = Machine(monkeypatch, trainer, counts)
    found = calibrate(trainer, counts, clock=machine.clock, budget=1e9 if all_layers else short)
    assert (found.layers["train"] == 6 and found.shares["train"] == 1) == all_layers
    seconds = predict_seconds(trainer, counts, found)

    shape = Shape.of(trainer.packed.model, trainer.args)

    def total(kind: str, works: Any, backward: bool) -> float:
        fixed, per_flop = machine.rates[kind]
        return sum(fixed + per_flop * shape.flops(work, backward) for work in works)

    steps = 1e-5 * trained_parameters(trainer.packed.model) * counts.steps
    peers = [counts.peer_work(pairs) for pairs in counts.peer_batches]
    expected = {
        "training": total("train", map(counts.lengths.work, counts.batches), True) + steps,
        "TRL, training": total("peer", peers, True) + steps,
    }
    if trainer.loss.needs_reference:
        expected["reference pass"] = total("reference", [counts.reference], False)
        expected["TRL, reference in every step"] = total("peer_reference", peers, False)
        expected["TRL, reference before training"] = expected["TRL, reference in every step"] / 3  # of three epochs
    assert seconds == pytest.approx(expected, rel=0.02)


def test_a_part_of_a_micro_batch_keeps_tiles_that_malloc_maps(tmp_path, monkeypatch):
    trainer = planned(tmp_path, per_device_train_batch_size=8)
    counts = counts_of(trainer)
    machine = Machine(monkeypatch, trainer, counts)
    tokens = sorted(counts.peer_work(pairs).tokens for pairs in counts.peer_batches)[1]
    for mapped in (0, peer.tile_bytes(tokens, SIZES["vocab_size"]) // 5):
        monkeypatch.setattr(calibration, "_MAPPED_BYTES", mapped)
        shares = calibrate(trainer, counts, clock=machine.clock, budget=machine.now + 14).shares
        assert (shares["peer"] >= 0.25) == (mapped > 0), shares


def test_the_peers_batches_are_those_of_transformers(tmp_path):
    from accelerate import Accelerator, DataLoaderConfiguration
    from torch.utils.data import DataLoader, RandomSampler

    trainer = planned(tmp_path, per_device_train_batch_size=5, num_train_epochs=2, seed=7)
    counts = counts_of(trainer)
    torch.manual_seed(7)
    pairs = [pair for of_row in counts.lengths.pairs for pair in of_row]
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    loader = accelerator.prepare(DataLoader(pairs, 5, sampler=RandomSampler(pairs), collate_fn=list))
    assert counts.peer_batches == [batch for _ in range(2) for batch in loader]


def test_a_line_through_two_points_has_no_negative_part():
    assert Rate.through([(10, 3.0), (20, 5.0)]) == pytest.approx((1.0, 0.2))
    assert Rate.through([(10, 3.0), (20, 7.0)]) == pytest.approx((0.0, 1 / 3))
    assert Rate.through([(10, 3.0), (20, 2.0)]) == pytest.approx((0.0, 1 / 6))
    assert Rate.through([(10, 3.0), (10, 3.2)]) == pytest.approx((0.0, 0.31))


def test_ratios_are_of_a_first_run_and_of_later_ones():
    seconds = {"training": 2.0, "reference pass": 1.0, "TRL, training": 6.0}
    seconds |= {"TRL, reference in every step": 3.0, "TRL, reference before training": 1.5}
    assert ratios(seconds) == {
        "first run, reference in every step": 3.0,
        "reference cached, reference in every step": 4.5,
        "first run, reference before training": 2.5,
        "reference cached, reference before training": 3.75,
    }
    assert ratios({"training": 2.0, "TRL, training": 6.0}) == {"no reference": 3.0}


@pytest.mark.parametrize("kind", ["llama", "mixture", "lora", "tied", "padded"])
def test_every_kind_of_model_runs(tmp_path, kind):
    options = {} if kind == "llama" else {"packing": "false"} if kind == "padded" else {kind: True}
    trainer = planned(tmp_path, layers=3, **options)
    counts = counts_of(trainer)
    before = trainer.packed.model
    found = calibrate(trainer, counts, budget=0.0)
    assert found.rounds == 1 and set(found.rates) == {"train", "reference", "peer", "peer_reference"}
    assert all(seconds > 0 for seconds in predict_seconds(trainer, counts, found).values())
    assert trainer.packed.model is before and all(p.is_meta for p in before.parameters())


def test_a_machine_that_is_too_small_is_named(tmp_path, monkeypatch):
    trainer = planned(tmp_path)
    monkeypatch.setattr(calibration, "free_bytes", lambda device: 1e3)
    with pytest.raises(NotTimedError, match="one layer and the head of this model take about"):
        calibrate(trainer, counts_of(trainer))


@pytest.mark.parametrize("columns", [7, 64])
def test_the_imitation_of_trl_computes_log_probs(tmp_path, monkeypatch, columns):
    """Its value and gradients are those of the model's own logits, with tiles smaller and larger than they are."""
    monkeypatch.setattr(peer, "_ROWS", 5)
    monkeypatch.setattr(peer, "_COLUMNS", columns)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    ids = torch.randint(50, (4, 11))
    monkeypatch.setattr(torch, "randint", lambda *_: ids)
    sides = [(3, 4), (3, 8), (1, 2), (2, 5)]
    value = peer.run_peer(model, model, sides)
    found = torch.autograd.grad(value, [*model.parameters()])

    expected = torch.zeros(())
    for row, (prompt, completion) in zip(ids, sides):
        logps = F.log_softmax(model(input_ids=row[None, : prompt + completion]).logits[0], -1)
        rows = torch.arange(prompt - 1, prompt + completion - 1)
        expected = expected + logps[rows, row[rows + 1]].sum()
    torch.testing.assert_close(value, expected)
    for one, other in zip(found, torch.autograd.grad(expected, [*model.parameters()])):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", STATES)
def test_a_hybrid_runs_whole(tmp_path, name):
    """Its layers differ, so none stands for the others."""
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "router_aux_loss_coef": 0.0}
    args = ContrastiveConfig(str(tmp_path), **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(STATES[name]())
    rows = Dataset.from_list(preference_rows("tiny", 6, SIZES["vocab_size"]))
    trainer = PlannedTrainer(
        model, None, args, None, train_dataset=rows, processing_class=tokenizer(SIZES["vocab_size"])
    )
    counts = counts_of(trainer)
    found = calibrate(trainer, counts, budget=0.5)
    assert found.layers["train"] == 2
    assert min(predict_seconds(trainer, counts, found).values()) > 0


def planned_with_images(folder, kind: str, lora: bool = False, **options: Any) -> PlannedTrainer:
    """Returns a trainer of an image-text model without weights; every fourth of 12 rows has no image."""
    args = ContrastiveConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, bf16=False, **options)
    with torch.device("meta"):
        model = tiny_image_model(kind, torch.float32)
    adapter = None
    if lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows, processor = Dataset.from_list(image_rows(12)), tiny_processor(kind)
    return PlannedTrainer(model, None, args, adapter, train_dataset=rows, processing_class=processor)


def test_seconds_of_images_are_added_to_those_of_text(tmp_path, monkeypatch):
    trainer = planned_with_images(tmp_path, "llava", per_device_train_batch_size=3)
    counts = counts_of(trainer)
    machine = Machine(monkeypatch, trainer, counts)
    each = {"read": 3e-3, "encode": 1e-3, "train": 5e-3}  # seconds for each token of an image

    def take(part: str, rows: Any) -> None:
        machine.now += each[part] * counts.lengths.work(rows).image_tokens

    monkeypatch.setattr(Sample, "read", lambda sample, rows: take("read", rows))
    monkeypatch.setattr(Sample, "encode", lambda _, rows, backward=False: take("train" if backward else "encode", rows))
    found = calibrate(trainer, counts, clock=machine.clock, budget=1e9)
    assert found.images == pytest.approx(each)
    both, text = (predict_seconds(trainer, counts, replace(found, images=images)) for images in (each, {}))
    assert both.keys() == text.keys() - {"TRL, reference before training"}  # which TRL refuses
    ours, trl, once = (work.image_tokens for work in (counts.work, counts.peer, counts.reference))
    assert trl == 2 * ours == 6 * once > 0  # both sides of a pair, and three epochs
    added = {part: both[part] - text[part] for part in both}
    expected = {"training": 8e-3 * ours, "TRL, training": 8e-3 * trl}
    expected |= {"reference pass": 4e-3 * once, "TRL, reference in every step": 1e-3 * trl}
    assert added == pytest.approx(expected)
    assert ratios(both).keys() == {"first run, reference in every step", "reference cached, reference in every step"}


_TIMED = [kind for kind in FAMILIES if kind not in ("chameleon", "mllama")]  # own logits, by rows
_OTHERS = [(kind, options) for kind in _TIMED for options in ({}, {"packing": "false"}, {"lora": True})]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llava", {}), *(pytest.param(*each, marks=pytest.mark.slow) for each in _OTHERS if each != ("llava", {}))],
    ids=str,
)
def test_every_image_text_model_runs(tmp_path, kind, options):
    """Its vision tower has gradients from images alone, because their tokens run as text elsewhere."""
    trainer = planned_with_images(tmp_path, kind, **options)
    counts, forward, has_gradient = counts_of(trainer), Sample.encode, []

    def encode(sample: Sample, rows: Any, backward: bool = False) -> None:
        forward(sample, rows, backward)
        text = {id(p) for p in base_model(sample.model).get_decoder().parameters()}
        head = base_model(sample.model).get_output_embeddings()
        text |= {id(p) for p in head.parameters()}
        has_gradient.append(any(p.grad is not None for p in sample.model.parameters() if id(p) not in text))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sample, "encode", encode)
        found = calibrate(trainer, counts, budget=0.0)
    assert has_gradient == 2 * [False, kind != "emu3"]  # forward and backward, to warm up and once
    assert found.layers["train"] == 2 and min(found.images.values()) > 0
    assert min(predict_seconds(trainer, counts, found).values()) > 0


def test_images_by_rows_are_not_timed(tmp_path):
    trainer = planned_with_images(tmp_path, "mllama")
    assert truncated(trainer.packed.model, 1)[1] is None, "its layers are of two kinds"
    with pytest.raises(NotTimedError, match="this model takes images by rows, which are not timed"):
        calibrate(trainer, counts_of(trainer))


def test_a_model_that_reads_its_logits_is_not_timed(tmp_path):
    trainer = planned_with_images(tmp_path, "chameleon")
    with pytest.raises(NotTimedError, match="reads columns of its logits"):
        calibrate(trainer, counts_of(trainer))
