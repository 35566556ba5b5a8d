"""The loop: no waiting for the device within a step, what is filtered from the log, what is retried, how it resumes."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import TrainerCallback

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.loader import StreamBatches, row_tokens
from cpt_kernels.ops import vocab_score
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, losses, preference_data, word_tokenizer

ARCHITECTURES = ["llama", "llama-tied", "gemma2", "gpt2", "qwen3"]
# What needs a number, or a shape, from the device.
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive", "_unique2"),
    *("unique_dim", "bincount"),
}
WAITERS = [torch.Tensor.item, torch.Tensor.tolist, bool, torch.nonzero]  # a few of them
READING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
ON_A_CPU = {"_closed_form", "_check_sides"}  # functions that read a tensor where it is on a CPU, and there alone


class Waited(AssertionError):
    pass


class NoWaitingOperators(TorchDispatchMode):
    """Raises where an operator would make a GPU's host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put_", "_unsafe_index") else []
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or unsized or any(i is not None and i.dtype == torch.bool for i in indices):
            raise Waited(str(func))
        return func(*args, **kwargs)


class NoReading(TorchFunctionMode):
    """Raises where a tensor's values are asked for, or a number is copied to a device at once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            raise Waited("a copy of a number to the device")
        if getattr(func, "__name__", "") not in READING:
            return func(*args, **(kwargs or {}))
        if sys._getframe(1).f_code.co_name not in ON_A_CPU:
            raise Waited(resolve_name(func) or func.__name__)
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting():
    with NoReading(), NoWaitingOperators():
        yield


class Guard(TrainerCallback):
    """Lets nothing wait from the beginning of a step to where the optimizer takes over; the first step is checked
    against the reference, once.
    """

    def __init__(self, context, first: int = 1) -> None:
        self.context, self.first, self.steps = context, first, 0
        self.stack = contextlib.ExitStack()

    def on_step_begin(self, args, state, control, **_):
        if state.global_step >= self.first:
            self.stack.enter_context(self.context())
            self.steps += 1

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.stack.close()


class Guarded(ContrastiveTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        with no_waiting() if self.state.global_step else contextlib.nullcontext():
            return super().get_batch_samples(iter(batches), num_batches, device)


def make_trainer(
    folder,
    cls=ContrastiveTrainer,
    model="llama",
    rows=16,
    callbacks=(),
    peft_config=None,
    train_dataset=None,
    **options,
):
    return cls(
        tiny_model(model) if isinstance(model, str) else model,
        args=config(folder, **{"max_steps": 4, **options}),
        train_dataset=train_dataset or preference_data(rows),
        processing_class=word_tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


OPTIONS = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "accumulated by tokens": {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2},
    "slic": {"loss_type": "slic"},
    "several, not separable": {"loss_type": ["aot", "sft"]},
    "LD-DPO, WPO": {"ld_alpha": 0.5, "use_weighting": True},
    "bf16": {"bf16": True},
    "offloaded": {"activation_offloading": True},
    "curriculum": {"curriculum": {"levels": ["a>b", "a>c"]}},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "gradient_checkpointing": True},
    "dora": {"peft_config": LoraConfig(r=4, target_modules="all-linear", use_dora=True)},
}


@pytest.mark.parametrize("ask", [*WAITERS, lambda x: x[x > 0], lambda x: torch.tensor(1.0, device="cpu")])
def test_the_guard_sees_what_waits(ask):
    with pytest.raises(Waited), no_waiting():
        ask(torch.ones(1))


@pytest.mark.parametrize(
    ("model", "options"), [*((m, "plain") for m in ARCHITECTURES), *(("llama", o) for o in OPTIONS)]
)
def test_no_step_asks_the_device_for_a_number(tmp_path, monkeypatch, model, options):
    """On a CPU, by operators and methods that would wait on a GPU; steps log nothing here but the last."""
    monkeypatch.setattr(vocab_score, "check_targets", lambda *_: None)  # on a CPU alone it looks
    guard = Guard(no_waiting)
    trainer = make_trainer(tmp_path, Guarded, model, callbacks=[guard], logging_steps=100, **OPTIONS[options])
    with guard.stack:
        trainer.train()
    assert guard.steps == 3 and trainer.state.global_step == 4


def test_a_step_of_trl_asks_more_than_ten_times(tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
    asked = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            asked.extend([func] if getattr(func, "__name__", "") in READING else [])
            return func(*args, **(kwargs or {}))

    class Counted(trl.DPOTrainer):
        def training_step(self, *args, **kwargs):
            with Counting():
                return super().training_step(*args, **kwargs)

    Counted(
        tiny_model("llama"),
        tiny_model("llama"),
        args=trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=2, logging_steps=100, report_to="none"),
        train_dataset=preference_data(16),
        processing_class=word_tokenizer(),
    ).train()
    assert len(asked) > 2 * 10


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_synchronises_with_a_gpu(tmp_path, options):
    """CUDA's own count, fetching and optimizer included, from the third step on: by then kernels are compiled."""

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts = 2 <= state.global_step < args.max_steps  # the end of training reads its loss
            torch.cuda.set_sync_debug_mode("warn" if counts else "default")

    trainer = make_trainer(
        tmp_path, max_steps=6, callbacks=[Count()], logging_steps=100, use_cpu=False, **OPTIONS[options]
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counted = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert not counted, counted


def test_a_loss_that_is_no_number_is_replaced_in_the_log_as_transformers_does_it(tmp_path):
    """By the sum so far over one step more; transformers looks at each loss, here it is chosen on the device."""

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
    """transformers rounds what is no integer to the dtype of DeepSpeed's configuration."""
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
    found = make_trainer(tmp_path, Small, per_device_train_batch_size=8, auto_find_batch_size=True, **options)
    found.train()
    given = make_trainer(tmp_path, per_device_train_batch_size=2, **options)
    given.train()
    assert losses(found) == losses(given) and found._train_batch_size == 2
    keep = ("loss", "num_tokens", "logps/chosen")
    logs = [
        [[entry[name] for name in keep] for entry in t.state.log_history if "loss" in entry] for t in (found, given)
    ]
    assert logs[0] == logs[1]


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


def test_a_step_that_no_rows_fill(tmp_path):
    with pytest.raises(ValueError, match="dataloader_drop_last leaves nothing of 16 rows"):
        make_trainer(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=32).train()


def test_a_stream_is_read_by_one_process(tmp_path):
    stream = preference_data(16).to_iterable_dataset(num_shards=2)
    with pytest.raises(ValueError, match="a stream is read by one process: set dataloader_num_workers to 0 or 1"):
        make_trainer(tmp_path, train_dataset=stream, dataloader_num_workers=2).train()


def test_nothing_is_pinned_for_a_cpu(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.dataloader_pin_memory = True  # the default, which use_cpu changes
    assert not trainer.get_train_dataloader().pin_memory


def test_another_order_of_pairs_is_not_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "rows": 20}
    make_trainer(tmp_path, max_steps=2, **options).train()
    checkpoint = str(tmp_path / "out/checkpoint-2")
    assert json.loads((tmp_path / "out/checkpoint-2/order.json").read_text())["rows a step"] == 4
    for change, message in (
        ({"per_device_train_batch_size": 2}, "rows a step 4, now 2"),
        ({"seed": 1}, "seed 42, now 1"),
        ({"max_tokens_per_batch": 100}, "max_tokens_per_batch None, now 100"),
    ):
        with pytest.raises(ValueError, match=f"cannot be resumed with the same order of pairs.*{message}"):
            make_trainer(tmp_path, **options, **change).train(resume_from_checkpoint=checkpoint)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for change in (split, {"seed": 1, "ignore_data_skip": True}):
        trainer = make_trainer(tmp_path, **options, **change)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4


@pytest.mark.parametrize("by", [{"max_tokens": None}, {"max_tokens": 60}])
def test_a_stream_has_the_same_rows_in_a_step_on_any_number_of_ranks(tmp_path, by):
    trainer = make_trainer(tmp_path, train_dataset=preference_data(23).to_iterable_dataset())
    count = partial(row_tokens, max_length=None, truncation_mode="keep_start", share_prompts=True)

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
    """The third step is logged nowhere; nor is it among what the second call logs first."""
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0, **OPTIONS["curriculum"])
    logs = []
    for _ in range(2):
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k != "grad_norm"})
    assert logs[0] == logs[1] and "logps/chosen" in logs[0] and any("curriculum" in name for name in logs[0])
