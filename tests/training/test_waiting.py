"""No step makes the CPU wait for the GPU, except those that log.

On a CPU two modes raise where an operator or a method would wait on a GPU. With a GPU, CUDA itself reports each wait.
"""

from __future__ import annotations

import contextlib
import sys
import warnings

import pytest
import torch
from peft import LoraConfig
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import TrainerCallback

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.ops import vocab_score
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import make_trainer, preference_data, word_tokenizer

ARCHITECTURES = ["llama", "llama-tied", "gemma2", "gpt2", "qwen3"]
# Operators whose result on the CPU, or whose output shape, depends on values on the device.
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive", "_unique2"),
    *("unique_dim", "bincount"),
}
WAITERS = [torch.Tensor.item, torch.Tensor.tolist, bool, torch.nonzero]  # examples
READING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
ON_A_CPU = {"_weigh_closed_form", "_check_sides", "rescale_eager"}  # functions that read tensors on the CPU only


class Waited(AssertionError):
    pass


class NoWaitingOperators(TorchDispatchMode):
    """Raises where an operator would make the CPU wait for the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put_", "_unsafe_index") else []
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or unsized or any(i is not None and i.dtype == torch.bool for i in indices):
            raise Waited(str(func))
        return func(*args, **kwargs)


class NoReading(TorchFunctionMode):
    """Raises where code reads the values of a tensor, or copies a number to a device synchronously."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            raise Waited("a synchronous copy of a number to the device")
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
    """Enters ``context`` from the beginning of each step until its optimizer step.

    Step 0 is left out: the trainer checks its log-probs against the reference's, and waits for the result.
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
def test_the_guard_raises_where_code_waits(ask):
    with pytest.raises(Waited), no_waiting():
        ask(torch.ones(1))


@pytest.mark.parametrize(
    ("model", "options"), [*((m, "plain") for m in ARCHITECTURES), *(("llama", o) for o in OPTIONS)]
)
def test_no_step_asks_the_device_for_a_number(tmp_path, monkeypatch, model, options):
    """Only the last step logs."""
    monkeypatch.setattr(vocab_score, "check_targets", lambda *_: None)  # reads tensors on the CPU only
    guard = Guard(no_waiting)
    trainer = make_trainer(
        tmp_path, Guarded, model, callbacks=[guard], max_steps=4, logging_steps=100, **OPTIONS[options]
    )
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


# Compiling the layers takes most of a minute, so one case does it.
@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "options"), [("compiled", "plain"), *(("eager", name) for name in OPTIONS)])
def test_no_step_synchronises_with_a_gpu(tmp_path, layers, options):
    """CUDA reports no wait in whole steps, from the third step on, when all kernels are compiled."""

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts = 2 <= state.global_step < args.max_steps  # the end of training reads the loss
            torch.cuda.set_sync_debug_mode("warn" if counts else "default")

    trainer = make_trainer(
        tmp_path, max_steps=6, callbacks=[Count()], logging_steps=100, use_cpu=False, layers=layers, **OPTIONS[options]
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counted = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert not counted, counted
