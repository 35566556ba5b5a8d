"""Which backend ``auto`` takes and logs, what a backend asked for by name needs, and tables of backends."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cpt_kernels.losses import build_loss
from cpt_kernels.ops import backends
from cpt_kernels.ops import pair_loss as pairs
from cpt_kernels.ops import vocab_score as scores
from cpt_kernels.ops.attention import AttentionLayout, segments, select, shared_prompt_attention
from cpt_kernels.ops.attention.varlen import Abilities
from cpt_kernels.ops.backends import BUILD_HINT, Backend, check_triton, resolve
from cpt_kernels.ops.linear_preference import HeadOptions, linear_logprobs, linear_preference_loss
from cpt_kernels.ops.pair_loss import BACKENDS as PAIR_LOSS
from cpt_kernels.ops.pair_loss import PairLossInput, PairLossOutput, kernel_loss, pair_loss
from cpt_kernels.ops.vocab_score import BACKENDS as VOCAB_SCORE
from cpt_kernels.ops.vocab_score import TileOptions, VocabScore, vocab_score
from tests.helpers.heads import Head


@pytest.fixture(autouse=True)
def _fresh():
    for cached in (backends.extension_misses, backends._announce_choice):
        cached.cache_clear()
    yield
    backends.extension_misses.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Simulates a GPU for the choice of a backend; returns a function that makes a tensor on it."""

    def make(capability=(9, 0), extension=True, hip=None, releases=(13, 13)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backends, "has_extension", lambda: extension)
        monkeypatch.setattr(backends, "load_extension", lambda: SimpleNamespace(cuda_releases=lambda: releases))
        monkeypatch.setattr(torch.version, "hip", hip)
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)

    return make


@pytest.mark.parametrize(
    ("options", "expected", "said"),
    [
        ({}, "cuda", "kernels on cuda: cuda"),
        ({"capability": (8, 0)}, "cuda", "kernels on cuda: cuda"),
        (
            {"extension": False},
            "triton",
            f"kernels on cuda: triton; backend 'cuda' needs the compiled extension cpt_kernels._C; {BUILD_HINT}",
        ),
        (
            {"capability": (7, 5)},
            "triton",
            "kernels on cuda: triton; backend 'cuda' needs compute capability 8.0, and cuda:0 has 7.5;"
            " take backend='triton'",
        ),
        ({"releases": (12, 13)}, "cuda", "kernels on cuda: cuda"),
        (
            {"releases": (13, 12)},
            "triton",
            "kernels on cuda: triton; backend 'cuda' needs a driver for CUDA 13, and this one is for CUDA 12: build it"
            " with that CUDA's nvcc",
        ),
        (
            {"hip": "6.4"},
            "triton",
            "kernels on cuda: triton; backend 'cuda' needs an NVIDIA GPU; take backend='triton' on AMD's",
        ),
    ],
)
def test_auto_on_a_gpu(gpu, caplog, options, expected, said):
    tensor = gpu(**options)
    assert [resolve("auto", tensor, PAIR_LOSS) for _ in range(3)] == [expected] * 3
    assert caplog.messages == [said]


def test_auto_logs_its_choice_once(caplog):
    tile, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    offsets, first = torch.tensor([0, 3]), torch.tensor([0])
    for _ in range(2):
        vocab_score(tile, targets)
        pair_loss(tile[:, 0], offsets, first, loss="sft")
        linear_logprobs(tile, torch.randn(5, 8, requires_grad=True), targets)
    assert caplog.messages == ["kernels on cpu: eager"]


EAGER, FP32, BF16 = Backend("m:eager"), (torch.float32,), (torch.bfloat16,)
TRITON = Backend("m:triton", FP32, check_triton)


@pytest.mark.parametrize(
    ("table", "dtype", "expected"),
    [
        ({"eager": EAGER, "triton": TRITON}, torch.float32, "triton"),
        ({"eager": EAGER, "triton": TRITON}, torch.float64, "eager"),
        ({"eager": EAGER, "triton": TRITON, "half": Backend("m:half", BF16)}, torch.float32, "triton"),
        ({"eager": EAGER, "triton": TRITON, "half": Backend("m:half", BF16)}, torch.bfloat16, "half"),
        ({"eager": EAGER, "half": Backend("m:half", BF16), "mine": Backend("m:mine")}, torch.bfloat16, "mine"),
    ],
)
def test_auto_takes_the_last_entry_that_runs_on_a_gpu_and_the_first_on_a_cpu(gpu, table, dtype, expected):
    tensor = gpu()
    tensor.dtype = dtype
    assert resolve("auto", tensor, table) == expected
    assert resolve("auto", torch.zeros(1, dtype=dtype), table) == "eager"


def test_auto_without_an_entry_that_runs():
    with pytest.raises(RuntimeError, match=r"no backend takes torch\.float64 on cpu$"):
        resolve("auto", torch.zeros(1, dtype=torch.float64), {"triton": TRITON})


def test_nothing_is_logged_without_a_choice(caplog, monkeypatch):
    tile, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    vocab_score(tile, targets, backend="eager")
    vocab_score(tile.double(), targets)
    linear_logprobs(tile, torch.randn(5, 8), targets, options=HeadOptions(backend="eager"))
    monkeypatch.setenv("RANK", "1")
    vocab_score(tile, targets)
    assert caplog.messages == []


def test_a_gpu_that_the_extension_is_not_for(gpu):
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0, and cuda:0 has 7.5; take backend='triton'"):
        resolve("cuda", gpu(capability=(7, 5)), PAIR_LOSS)
    assert resolve("eager", gpu(capability=(7, 5)), PAIR_LOSS) == "eager"
    backends.extension_misses.cache_clear()
    assert resolve("cuda", gpu(capability=(8, 6)), PAIR_LOSS) == "cuda"


@pytest.mark.skipif(not backends.has_extension(), reason="the CUDA extension is not built")
def test_the_extension_knows_its_cuda_and_the_drivers():
    runtime, driver = backends.load_extension().cuda_releases()
    assert runtime >= 12 and (driver > 0) == torch.cuda.is_available()


def test_unknown_backends_and_dtypes():
    tensor = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="choose one of auto, eager, triton, cuda"):
        resolve("rocm", tensor, PAIR_LOSS)
    with pytest.raises(ValueError, match=r"takes torch.float32, not torch.float64"):
        resolve("triton", tensor, PAIR_LOSS)
    assert resolve("auto", tensor, PAIR_LOSS) == "eager"


@pytest.mark.parametrize("name", ["vocab_score", "pair_loss"])
def test_triton_launches_on_the_gpu_of_its_tensors(name, monkeypatch):
    """A head may lie on another GPU than the current one, where the addresses of its tensors are invalid."""
    module, inside = importlib.import_module(f"cpt_kernels.ops.{name}.triton"), []

    @contextlib.contextmanager
    def on_device_of(tensor):
        inside.append(tensor)
        yield
        inside.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: inside.append("launched")

    monkeypatch.setattr(backends, "on_device_of", on_device_of)
    monkeypatch.setattr(module, f"_{name}_kernel", Kernel())
    if name == "vocab_score":
        tensor, launches = torch.zeros(2, 5), 1
        module.vocab_score_triton(tensor, torch.tensor([0, 1]), TileOptions())
    else:
        tensor, launches = torch.zeros(100), 2
        inputs = PairLossInput(tensor, torch.arange(101), torch.arange(100), None, None, None)
        module.pair_loss_triton(inputs, kernel_loss(build_loss("sft")))
    assert inside[0] is tensor and inside[1:] == ["launched"] * launches + ["left"]


# --- A backend is an entry of the operator's table ---


def my_vocab_score(logits: torch.Tensor, targets: torch.Tensor, options: TileOptions) -> VocabScore:
    out = VocabScore.empty(len(targets), logits, options.statistics)
    out.logps.fill_(-7.0)
    out.lse.zero_()
    if options.score:
        logits.zero_()
    return out


def my_pair_loss(inputs: PairLossInput, loss) -> PairLossOutput:
    out = PairLossOutput.empty(inputs)
    for values, value in zip(out, (-1.0, 3.0, 0.0)):
        values.fill_(value)
    return out


MINE = {
    "vocab_score": (VOCAB_SCORE, Backend(f"{__name__}:my_vocab_score")),
    "pair_loss": (PAIR_LOSS, Backend(f"{__name__}:my_pair_loss")),
}


def _attend(backend: str) -> torch.Tensor:
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    layout = AttentionLayout(offsets, offsets, torch.arange(3), [], [(3, 3)], shared=False)
    return shared_prompt_attention(*torch.randn(3, 3, 2, 4), layout, backend=backend)


def test_a_name_that_is_in_no_table_runs_nothing():
    """Neither in the public functions nor in those that the passes call with a resolved name."""
    tile, targets, pair = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), torch.tensor([0])
    for table in (VOCAB_SCORE, PAIR_LOSS):
        with pytest.raises(ValueError, match=r"choose one of auto, eager, triton, cuda$"):
            resolve("rocm", tile, table)
    for call in (
        lambda: vocab_score(tile, targets, backend="rocm"),
        lambda: pair_loss(tile[:, 0], torch.tensor([0, 3]), pair, loss="sft", backend="rocm"),
        lambda: linear_logprobs(tile, torch.randn(5, 8), targets, options=HeadOptions(backend="rocm")),
    ):
        with pytest.raises(ValueError, match="unknown backend 'rocm': choose one of auto, eager, triton, cuda"):
            call()
    with pytest.raises(ValueError, match="unknown attention backend 'rocm': choose one of auto, sdpa, eager"):
        _attend("rocm")
    with pytest.raises(KeyError):
        scores.score_tile(tile, targets, TileOptions(), "rocm")
    inputs = PairLossInput(tile[:, 0], torch.tensor([0, 3]), pair, None, None, None)
    with pytest.raises(KeyError):
        pairs.weigh_pairs(inputs, build_loss("sft"), 1.0, "rocm")


@pytest.mark.parametrize("name", MINE)
def test_an_entry_of_the_table_is_what_runs(name, monkeypatch):
    table, mine = MINE[name]
    monkeypatch.setitem(table, "mine", mine)
    with pytest.raises(ValueError, match="choose one of auto, eager, triton, cuda, mine"):
        resolve("rocm", torch.zeros(1), table)
    if name == "vocab_score":
        tile = torch.randn(3, 8)
        assert (vocab_score(tile, torch.zeros(3, dtype=torch.int64), score=True, backend="mine").logps == -7).all()
        assert not tile.any()
    else:
        found = pair_loss(torch.randn(3), torch.tensor([0, 3]), torch.tensor([0]), loss="sft", backend="mine")
        assert found.losses.tolist() == [3.0] and found.completion_logps.tolist() == [-1.0]


def test_the_head_runs_a_backend_of_both_tables(monkeypatch):
    for table, mine in MINE.values():
        monkeypatch.setitem(table, "mine", mine)
    head = Head(trained=("hidden", "weight")).with_options(backend="mine")
    leaves = head.leaves(torch.float32)
    out = linear_preference_loss(
        leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss, None, head.options
    )
    assert (out.tokens.logps == -7).all() and (out.losses == 3).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["trained", "frozen", "general"])
@pytest.mark.parametrize("name", MINE)
def test_the_head_runs_a_backend_of_one_table(name, mode, compiled, monkeypatch):
    """The other operator runs its `auto` choice, in every mode of the head."""
    table, mine = MINE[name]
    monkeypatch.setitem(table, "mine", mine)
    head = Head(trained=("hidden",) if mode == "frozen" else ("hidden", "weight")).with_options(backend="mine")
    leaves, pairs = head.leaves(torch.float32), head.pairs()

    def run(hidden, weight, options):
        general = mode == "general"
        return linear_preference_loss(hidden, weight, head.targets, pairs, head.loss, None, options, general=general)

    if compiled:
        torch.compiler.reset()
    compute = torch.compile(run, backend="aot_eager") if compiled else run
    expected = run(*(leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves.values()), HeadOptions())
    found = compute(*leaves.values(), head.options)
    found.loss.backward()
    if name == "vocab_score":
        assert (found.tokens.logps == -7).all()
    else:
        assert torch.equal(found.tokens.logps, expected.tokens.logps)
        assert (found.losses == 3).all() == (mode == "trained")  # the other modes differentiate the loss by autograd
    with pytest.raises(ValueError, match=r"unknown backend 'yours': choose one of auto, eager, triton, cuda, mine$"):
        run(*leaves.values(), replace(head.options, backend="yours"))


def test_an_entry_of_the_table_of_segmentwise_attention_is_what_runs(monkeypatch):
    def values(q, k, v, call, sinks):
        return v

    monkeypatch.setitem(select.SEGMENTWISE, "mine", segments.SegmentKernel("mine", values, Abilities()))
    select.choose_attention.cache_clear()
    torch.manual_seed(0)
    found = _attend("mine")
    torch.manual_seed(0)
    assert torch.equal(found, torch.randn(3, 3, 2, 4)[2])
    select.choose_attention.cache_clear()


def test_an_entry_of_the_table_of_variable_length_kernels_is_what_runs(monkeypatch):
    class Mine:
        name, version, abilities, is_trusted = "mine", "1", Abilities(), True

        def attend(self, q, k, v, call):
            return 2 * v

    def absent():
        raise LookupError("no such chip")

    monkeypatch.setattr(select, "KERNELS", {"absent": absent, "mine": Mine})
    select.kernels.cache_clear()
    select.choose_attention.cache_clear()
    torch.manual_seed(0)
    found = _attend("mine")
    torch.manual_seed(0)
    assert torch.equal(found, 2 * torch.randn(3, 3, 2, 4)[2][..., :4])
    with pytest.raises(RuntimeError, match=r"'absent' is not available .absent: no such chip"):
        _attend("absent")
    select.kernels.cache_clear()
    select.choose_attention.cache_clear()
