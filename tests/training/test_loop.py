"""The loop: NaN in the log, retried batch sizes, token counts, loader options, the order of pairs in checkpoints."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial

import pytest
import torch
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.loader import StreamBatches, row_tokens
from tests.helpers import toy
from tests.helpers.toy import losses, preference_data

make_trainer = partial(toy.make_trainer, max_steps=4)


def test_a_loss_of_nan_is_replaced_in_the_log_as_transformers_does_it(tmp_path):
    """By the sum since the last log over the steps since then plus one; here the device chooses."""

    class Broken(ContrastiveTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    found = {}
    for filtered in (True, False):
        trainer = make_trainer(
            tmp_path, Broken, max_steps=3, logging_steps=3, logging_nan_inf_filter=filtered, learning_rate=0.0
        )
        trainer.train()
        (found[filtered],) = losses(trainer)
        assert trainer.args.logging_nan_inf_filter is filtered
    two = 2 * math.log(2)
    assert found[True] == pytest.approx((two + two / 3) / 3, abs=1e-5) and math.isnan(found[False])


def test_reference_log_probs_keep_their_precision_under_deepspeed(tmp_path, monkeypatch):
    """transformers rounds floating-point inputs to the dtype of DeepSpeed's configuration."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer._prepare_inputs(batch)["ref_token_logps"].dtype == torch.float32


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    class Small(ContrastiveTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if inputs["num_pairs"] > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    options = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    found = make_trainer(tmp_path, Small, per_device_train_batch_size=4, auto_find_batch_size=True, **options)
    found.train()
    given = make_trainer(tmp_path, per_device_train_batch_size=2, **options)
    given.train()
    assert losses(found) == losses(given) and found._train_batch_size == 2
    keep = ("loss", "num_tokens", "logps/chosen")
    logs = [
        [[entry[name] for name in keep] for entry in t.state.log_history if "loss" in entry] for t in (found, given)
    ]
    assert logs[0] == logs[1]


def test_memory_that_ends_after_some_steps_is_an_error(tmp_path):
    """transformers would begin again, at step 0, with weights that are trained already."""

    class Small(ContrastiveTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = make_trainer(tmp_path, Small, per_device_train_batch_size=8, auto_find_batch_size=True)
    with pytest.raises(ValueError, match=r"enough for 2 steps of 8 rows.*again with per_device_train_batch_size=7"):
        trainer.train()


def test_options_of_loading_reach_the_loader(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_in_order": False}
    loader = make_trainer(tmp_path, dataloader_multiprocessing_context="spawn", **options).get_train_dataloader()
    assert loader.num_workers == 1 and loader.in_order is False
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_tokens_are_counted_once(tmp_path):
    counts = []
    for option in ("no", "all"):
        trainer = make_trainer(tmp_path, include_num_input_tokens_seen=option)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        counts.append([entry["num_tokens"] for entry in steps])
    assert counts[0] == counts[1] and counts[0][0] > 0
    assert [entry["num_input_tokens_seen"] for entry in steps] == counts[0]
    last = trainer.state.log_history[-1]
    assert (
        "train_loss" in last and last["num_input_tokens_seen"] == trainer.state.num_input_tokens_seen == counts[0][-1]
    )


def test_fewer_rows_than_a_step_needs(tmp_path):
    with pytest.raises(ValueError, match="dataloader_drop_last drops all 16 rows"):
        make_trainer(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=32).train()


def test_a_stream_is_read_by_one_process(tmp_path):
    stream = preference_data(16).to_iterable_dataset(num_shards=2)
    with pytest.raises(ValueError, match="only one process can read a stream: set dataloader_num_workers to 0 or 1"):
        make_trainer(tmp_path, train_dataset=stream, dataloader_num_workers=2).train()


def test_nothing_is_pinned_for_a_cpu(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.dataloader_pin_memory = True  # the default; use_cpu turns it off
    assert not trainer.get_train_dataloader().pin_memory


def test_another_order_of_pairs_is_not_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "rows": 20}
    make_trainer(tmp_path, max_steps=2, **options).train()
    checkpoint = str(tmp_path / "out/checkpoint-2")
    record = json.loads((tmp_path / "out/checkpoint-2/run.json").read_text())
    assert record["order of pairs"]["rows a step"] == 4
    for change, message in (
        ({"per_device_train_batch_size": 2}, "rows a step 4, now 2"),
        ({"seed": 1}, "seed 42, now 1"),
        ({"max_tokens_per_batch": 100}, "max_tokens_per_batch None, now 100"),
    ):
        with pytest.raises(ValueError, match=f"cannot be resumed with another order of pairs.*{message}"):
            make_trainer(tmp_path, **options, **change).train(resume_from_checkpoint=checkpoint)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for change in (split, {"seed": 1, "ignore_data_skip": True}):
        trainer = make_trainer(tmp_path, **options, **change)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4


@pytest.mark.parametrize("by", [{"max_tokens": None}, {"max_tokens": 60}])
def test_a_stream_has_the_same_rows_in_a_step_on_any_number_of_ranks(tmp_path, by):
    trainer = make_trainer(tmp_path, train_dataset=preference_data(23).to_iterable_dataset())
    count = partial(row_tokens, layout=PackedCollator())

    def steps(world: int) -> list[list[int]]:
        size = 4 // (1 if by["max_tokens"] else world)
        ranks = [
            StreamBatches(trainer.train_dataset, size, count_tokens=count, world_size=world, rank=r, endless=True, **by)
            for r in range(world)
        ]
        micro_batches = 4 // world if by["max_tokens"] else 1
        taken = [list(itertools.islice(iter(rank), 9 * micro_batches)) for rank in ranks]
        parts = [[row["row"] for batches in taken for batch in batches[i : i + micro_batches] for row in batch]
                 for i in range(0, 9 * micro_batches, micro_batches)]  # fmt: skip
        return [sorted(part) for part in parts]

    assert steps(2) == steps(1) and all(steps(1))


def test_training_twice(tmp_path):
    """The first call never logs its third step, and the first log of the second call does not contain it either."""
    trainer = make_trainer(
        tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0, curriculum={"levels": ["a>b", "a>c"]}
    )
    logs, varying = [], ("grad_norm", "tokens_per_second", "peak_memory_gib")
    for _ in range(2):
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k not in varying})
    assert logs[0] == logs[1] and "logps/chosen" in logs[0] and any("curriculum" in name for name in logs[0])


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_adamw_is_fused_and_gradients_are_read_once_for_their_norm(tmp_path, monkeypatch, max_grad_norm):
    """The norm that clipping has computed is the one in the log. On a GPU torch takes multi-tensor kernels for it."""
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def counted(parameters, *given, **options):
        calls.append((len(list(parameters)), options.get("foreach")))
        return clip(parameters, *given, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    trainer = make_trainer(tmp_path, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm)
    trainer.train()
    assert calls == [(len(list(trainer.model.parameters())), None)] * 3  # None: what the device supports
    assert "cuda" in _get_foreach_kernels_supported_devices()
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
