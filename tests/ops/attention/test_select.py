"""The choice of attention: signatures of releases, the capability table, fall-backs and errors."""

from __future__ import annotations

import dataclasses
import inspect
import logging

import pytest
import torch

from cpt_kernels.ops.attention import select as attention_backends
from cpt_kernels.ops.attention.flash import flash_kernel
from cpt_kernels.ops.attention.select import capabilities, choose_attention, describe_backend, kernels
from cpt_kernels.ops.attention.trial import trial_failure
from cpt_kernels.ops.attention.varlen import Abilities, CudnnKernel, Need, TorchKernel
from cpt_kernels.trainer import ContrastiveTrainer
from tests.helpers import dense_flash
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, preference_data, word_tokenizer

BF16, FP64 = torch.bfloat16, torch.float64
HERE = Abilities(device="cpu", head_size=256)


@pytest.fixture
def install(monkeypatch):
    """Returns a function that replaces the table of variable-length kernels."""

    def put(**found):
        monkeypatch.setattr(attention_backends, "kernels", lambda: found)
        choose_attention.cache_clear()
        attention_backends._announce.cache_clear()
        dense_flash.backwards.clear()

    yield put
    choose_attention.cache_clear()


# --- Signatures ---


def test_the_operators_of_this_torch_take_what_is_passed():
    stand_ins = vars(dense_flash.torch_operators()) | vars(dense_flash.cudnn_operators())
    for name, stand_in in stand_ins.items():
        schema = getattr(torch.ops.aten, name).default._schema
        has = {a.name: a.kwarg_only for a in schema.arguments}
        parameters = inspect.signature(stand_in).parameters.values()
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        assert [n for n, keyword in has.items() if not keyword] == positional
        assert {p.name for p in parameters} <= set(has)


def test_options_that_a_release_does_not_have_are_not_passed_but_lacking():
    old = flash_kernel("flash_attn_2", dense_flash.flash_attn_2_5(), "2.5.9", HERE)
    assert not old.abilities.softcap and not old.abilities.sinks and old.abilities.window and old.abilities.dropout
    three = flash_kernel("flash_attn_3", dense_flash.flash_attn_3(), "3.0", HERE)
    assert three.abilities.softcap and three.abilities.sinks and not three.abilities.dropout
    with pytest.raises(ImportError, match=r"flash_attn_2 2.3.0 is too old: no deterministic"):
        flash_kernel("flash_attn_2", dense_flash.flash_attn_2_3(), "2.3.0", HERE)
    with pytest.raises(ImportError, match="has no flash_attn_varlen_func"):
        flash_kernel("flash_attn_2", object(), "4", HERE)


def test_inner_functions_that_are_custom_operators():
    """From 2.7 and in 3 they are ``torch.library.custom_op``, whose Python signature is ``(*args, **kwargs)``."""

    @torch.library.custom_op("cpt_test_varlen::forward", mutates_args=())
    def inner(
        q: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        unknown: int,
        window_size_left: int = -1,
    ) -> torch.Tensor:
        return q.clone()

    module = dense_flash.flash_attn_2_8()
    module._flash_attn_varlen_forward = inner
    kernel = flash_kernel("flash_attn_2", module, "9", HERE)
    assert not kernel.abilities.sinks  # it requires a parameter that we do not know

    @torch.library.custom_op("cpt_test_varlen::known_forward", mutates_args=())
    def known(q: torch.Tensor, cu_seqlens_q: torch.Tensor, window_size_left: int = -1) -> torch.Tensor:
        return q.clone()

    module._flash_attn_varlen_forward = known
    assert flash_kernel("flash_attn_2", module, "9", HERE).abilities.sinks


# --- Which one runs ---

H200 = Need("cuda", (9, 0), BF16, 128)
ATOMICS = dataclasses.replace(H200, deterministic=False)
B200 = dataclasses.replace(H200, architecture=(10, 0))


def on_cuda(name: str, **changes):
    """Returns the stand-in of a kernel, with the real kernel's limits."""
    module = {
        "flash_attn_2": dense_flash.flash_attn_2_8,
        "flash_attn_3": dense_flash.flash_attn_3,
        "flash_attn_4": dense_flash.flash_attn_4,
    }
    if name == "cudnn":
        return CudnnKernel(version="2.13")
    return TorchKernel(version="2.13") if name == "varlen" else flash_kernel(name, module[name](), "1.0")


ALL = ("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "varlen")


@pytest.mark.parametrize(
    ("installed", "need", "expected"),
    [
        (("varlen",), H200, "varlen"),
        (("flash_attn_2", "varlen"), H200, "flash_attn_2"),
        (ALL, H200, "flash_attn_3"),
        (ALL, B200, "flash_attn_4"),
        (ALL, dataclasses.replace(H200, architecture=(8, 0)), "flash_attn_2"),
        (ALL, dataclasses.replace(H200, head_size=256), "flash_attn_2"),
        (ALL, dataclasses.replace(H200, head_size=320), "sdpa"),
        (ALL, dataclasses.replace(H200, dtype=torch.float32), "sdpa"),
        (ALL, dataclasses.replace(H200, dtype=torch.float32, softcap=True), "eager"),
        (ALL, dataclasses.replace(H200, dtype=torch.float16, gqa=True, window=True, sinks=True), "flash_attn_3"),
        (ALL, dataclasses.replace(H200, dropout=True), "flash_attn_2"),
        (ALL, dataclasses.replace(H200, dropout=True, sinks=True), "eager"),
        (ALL, dataclasses.replace(H200, architecture=(7, 5)), "sdpa"),
        (ALL, Need("cpu", (0, 0), BF16, 128), "sdpa"),
        (ALL, Need("cpu", (0, 0), FP64, 128, sinks=True), "eager"),
        (("varlen",), dataclasses.replace(H200, softcap=True), "eager"),
        (("varlen",), dataclasses.replace(H200, sinks=True), "varlen"),
        (("cudnn", "flash_attn_2", "varlen"), H200, "flash_attn_2"),
        (("cudnn", "flash_attn_2", "varlen"), ATOMICS, "cudnn"),
        (("cudnn", "varlen"), dataclasses.replace(ATOMICS, gqa=True), "varlen"),
        (("cudnn", "varlen"), dataclasses.replace(ATOMICS, window=True), "varlen"),
        ((), H200, "sdpa"),
    ],
)
def test_auto_takes_the_first_that_can(install, installed, need, expected):
    install(**{name: on_cuda(name) if name in installed else "not installed" for name in ALL})
    found = choose_attention("auto", need)
    assert found.name == expected


def test_a_fall_back_is_announced_once_with_its_reason(install, caplog):
    install(flash_attn_2="not installed", varlen=on_cuda("varlen"))
    with caplog.at_level(logging.WARNING):
        choose_attention("auto", H200)
        choose_attention("auto", Need("cpu", (0, 0), BF16, 64))
        assert not caplog.messages
        for head_size in (64, 128, 64):  # different calls, the same reason
            choose_attention("auto", dataclasses.replace(H200, head_size=head_size, softcap=True))
    assert caplog.messages == [
        "attention runs segment by segment (eager), slow where there are many: varlen 2.13 lacks soft-cap"
    ]
    caplog.clear()
    install(flash_attn_3=on_cuda("flash_attn_3"), varlen=on_cuda("varlen"))
    choose_attention("auto", dataclasses.replace(H200, architecture=(8, 6)))
    assert caplog.messages == ["attention runs on varlen 2.13: flash_attn_3 1.0 lacks compute capability 8.6"]
    caplog.clear()
    install(flash_attn_2="not installed", varlen="this PyTorch has no CUDA flash attention")
    choose_attention("auto", H200)
    assert "not installed; varlen: this PyTorch has no CUDA flash attention" in caplog.text


def test_a_backend_asked_for_by_name_says_what_it_lacks(install):
    install(flash_attn_3=on_cuda("flash_attn_3"), flash_attn_2="not installed", varlen=on_cuda("varlen"))
    with pytest.raises(ValueError, match=r"'varlen' cannot do this: varlen 2.13 lacks float32, soft-cap"):
        choose_attention("varlen", dataclasses.replace(H200, dtype=torch.float32, softcap=True))
    with pytest.raises(ValueError, match=r"'flash_attn' cannot do this: flash_attn_3 1.0 lacks head size 256"):
        choose_attention("flash_attn", dataclasses.replace(H200, head_size=256))
    with pytest.raises(ValueError, match="lacks tensors on cpu"):
        choose_attention("varlen", Need("cpu", (0, 0), BF16, 64))
    with pytest.raises(ValueError, match="'sdpa' lacks soft-cap, sinks: take eager"):
        choose_attention("sdpa", dataclasses.replace(H200, softcap=True, sinks=True))
    with pytest.raises(ValueError, match="unknown attention backend 'flash': choose one of auto, sdpa"):
        choose_attention("flash", H200)
    with pytest.raises(RuntimeError, match=r"'flash_attn_2' is not available \(flash_attn_2: not installed\)"):
        choose_attention("flash_attn_2", H200)
    assert [choose_attention(name, H200).name for name in ("eager", "flash_attn")] == ["eager", "flash_attn_3"]


def test_description(install):
    install(flash_attn_3="not installed", flash_attn_2=on_cuda("flash_attn_2"), varlen=on_cuda("varlen"))
    tail = "segment by segment (sdpa or eager)"
    assert describe_backend("auto", "cuda") == f"attention: flash_attn_2 1.0, else varlen 2.13, else {tail}"
    assert describe_backend("auto", "cpu") == f"attention: {tail}"
    assert describe_backend("flash_attn", "cuda") == "attention: flash_attn_2 1.0"
    assert describe_backend("eager", "cpu") == "attention: segment by segment, eager"
    with pytest.raises(ValueError, match=r"varlen 2.13 lacks tensors on cpu"):
        describe_backend("varlen", "cpu")
    with pytest.raises(RuntimeError, match="'flash_attn_3' is not available"):
        describe_backend("flash_attn_3", "cuda")


def test_packages_that_are_absent_or_broken(monkeypatch):
    def import_module(name):
        if name == "flash_attn.cute.interface":
            raise ImportError("libcudart.so.13: cannot open\nshared object file")
        if name == "flash_attn_interface":
            raise ModuleNotFoundError("No module named 'flash_attn_3'", name="flash_attn_3")
        raise ModuleNotFoundError("No module named 'flash_attn'", name=name.rpartition(".")[0])

    monkeypatch.setattr(attention_backends.importlib, "import_module", import_module)
    found = kernels.__wrapped__()
    assert found["flash_attn_2"] == "not installed"
    assert found["flash_attn_3"] == "does not import (ModuleNotFoundError: No module named 'flash_attn_3')"
    assert found["flash_attn_4"] == "does not import (ImportError: libcudart.so.13: cannot open"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert isinstance(kernels.__wrapped__()["varlen"], TorchKernel)


def test_the_capability_table_names_all():
    assert list(capabilities()) == [*ALL, "sdpa", "eager"]


# --- A trial on the device ---

CUDNN = dataclasses.replace(CudnnKernel().abilities, architectures=None, device="cpu")
STAND_INS = {
    "flash_attn_3": lambda: flash_kernel("flash_attn_3", dense_flash.flash_attn_3(), "3.0", HERE, is_trusted=False),
    "flash_attn_4": lambda: flash_kernel("flash_attn_4", dense_flash.flash_attn_4(), "4.0", HERE, is_trusted=False),
    "cudnn": lambda: CudnnKernel(dense_flash.cudnn_operators(), CUDNN),
}
ON_CPU = Need("cpu", (0, 0), BF16, 64)
NEEDS = {
    "plain": dataclasses.replace(ON_CPU, deterministic=False),
    "grouped": dataclasses.replace(ON_CPU, gqa=True, dtype=torch.float16),
    "window": dataclasses.replace(ON_CPU, window=True, head_size=36),
    "sinks": dataclasses.replace(ON_CPU, sinks=True, window=True, gqa=True),
    "softcap": dataclasses.replace(ON_CPU, softcap=True, dtype=FP64),
}


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("name", STAND_INS)
def test_a_right_kernel_passes_its_trial(name, need):
    kernel = STAND_INS[name]()
    if kernel.abilities.lacks(NEEDS[need]):
        assert name == "cudnn" and need != "plain"
        return
    assert trial_failure(kernel, NEEDS[need]) is None


@pytest.mark.parametrize("name", STAND_INS)
def test_a_kernel_that_is_aligned_at_the_start_is_refused(name, install, monkeypatch):
    monkeypatch.setattr(dense_flash, "at_the_ends", False)
    trusted = flash_kernel("flash_attn_2", dense_flash.flash_attn_2_8(), "2.8", HERE)
    install(**{name: STAND_INS[name](), "flash_attn_2": trusted})
    with pytest.raises(ValueError, match=rf"{name} .* lacks results like the reference's: the output differs by"):
        choose_attention(name, NEEDS["plain"])
    assert choose_attention("flash_attn", NEEDS["plain"]) is trusted  # the next one


@pytest.mark.parametrize("name", STAND_INS)
def test_a_right_kernel_is_used(name, install):
    install(**{name: STAND_INS[name]()})
    assert choose_attention(name, NEEDS["plain"]).name == name
    choose_attention(name, NEEDS["plain"])
    assert len(dense_flash.backwards) == 1, "the trial of a choice runs once"


def _wrong_gradient(kernel, monkeypatch):
    backward = dense_flash.backward
    monkeypatch.setattr(dense_flash, "backward", lambda *x: (*backward(*x)[:2], backward(*x)[2] * 0.5))
    return "the gradient of value differs by"


def _no_backward(kernel, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no backward for head size 64\non this GPU")

    monkeypatch.setattr(dense_flash, "backward", fail)
    return "a trial fails (NotImplementedError: no backward for head size 64"


def _window_of_one_more(kernel, monkeypatch):
    scores = dense_flash.capped_scores
    monkeypatch.setattr(
        dense_flash,
        "capped_scores",
        lambda q, k, scale, causal, left, right, softcap: scores(q, k, scale, causal, (left or 0) + 1, right, softcap),
    )
    return "the output differs by"


@pytest.mark.parametrize("fault", [_wrong_gradient, _no_backward, _window_of_one_more])
@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4"])
def test_a_fault_is_found_on_the_device(name, fault, monkeypatch):
    kernel = STAND_INS[name]()
    expected = fault(kernel, monkeypatch)
    failure = trial_failure(kernel, NEEDS["window"])
    assert failure is not None and failure.startswith(expected) and "\n" not in failure


def test_out_of_memory_is_no_verdict_on_a_kernel(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dense_flash, "backward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trial_failure(STAND_INS["flash_attn_3"](), NEEDS["plain"])


def test_the_modes_of_the_caller_do_not_reach_the_trial():
    """It may be the first call under no_grad, in a checkpointed layer, or under autocast."""
    kernel, packed = STAND_INS["flash_attn_3"](), []
    hooks = torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x)
    with torch.inference_mode(), torch.autocast("cpu", BF16), hooks:
        assert trial_failure(kernel, NEEDS["softcap"]) is None
    assert packed == []


def test_installed_packages_of_3_and_4_are_not_trusted(monkeypatch):
    modules = {
        "flash_attn_interface": dense_flash.flash_attn_3(),
        "flash_attn.cute.interface": dense_flash.flash_attn_4(),
        "flash_attn.flash_attn_interface": dense_flash.flash_attn_2_8(),
    }
    monkeypatch.setattr(attention_backends.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)  # as a CPU build says
    found = kernels.__wrapped__()
    assert {name: k.is_trusted for name, k in found.items() if not isinstance(k, str)} == {
        "flash_attn_3": False,
        "flash_attn_4": False,
        "cudnn": False,
        "flash_attn_2": True,
    }


# --- The trainer's option ---


def test_the_trainer_says_what_attention_runs_on(tmp_path, caplog):
    ContrastiveTrainer(
        tiny_model("llama"),
        args=config(tmp_path, attention_backend="eager"),
        train_dataset=preference_data(4),
        processing_class=word_tokenizer(),
    )
    assert "attention: segment by segment, eager" in caplog.messages


def test_the_trainer_refuses_a_backend_that_cannot_run_before_any_work(tmp_path, install):
    install(flash_attn_2="not installed", varlen=on_cuda("varlen"))
    for name, error in (("varlen", ValueError), ("flash_attn", RuntimeError)):
        with pytest.raises(error, match=f"attention backend '{name}'"):
            ContrastiveTrainer(
                tiny_model("llama"),
                args=config(tmp_path, attention_backend=name),
                train_dataset=preference_data(4),
                processing_class=word_tokenizer(),
            )
    with pytest.raises(ValueError, match="attention_backend='flex' is unknown"):
        config(tmp_path, attention_backend="flex")


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager", "flash_attn", *ALL])
def test_the_option_takes_every_name_that_the_operator_takes(name, tmp_path):
    assert config(tmp_path, attention_backend=name).attention_backend == name
    if name not in attention_backends.SEGMENTWISE:
        assert attention_backends.kernels_of(name)


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(ValueError, match=rf"choose one of auto, sdpa, eager, flash_attn, {', '.join(ALL)}$"):
        attention_backends.kernels_of("flex")
