"""pair_loss: sums, losses and weights of every implementation by the tolerance rule; weights equal autograd's."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from cpt_kernels.losses import LOSSES, Loss, PairLogps, build_loss, loss_options, user_loss
from cpt_kernels.ops import backends
from cpt_kernels.ops.pair_loss import KERNEL_LOSSES, PairLossInput, PairLossOutput, has_kernel, kernel_loss, pair_loss
from cpt_kernels.ops.pair_loss.reference import pair_loss_reference
from tests.helpers.devices import device_params
from tests.helpers.emulation import emulated
from tests.helpers.ptx import executed
from tests.numerics import assert_close

# numpy warns under the interpreter, of means over empty completions that are in no pair.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GPU = torch.cuda.is_available()
KERNELS = ["triton", "cuda", "cuda-descending", "ptx"]
if GPU and backends.has_extension():
    KERNELS.append("cuda-gpu")
IMPLEMENTATIONS = [*KERNELS, "eager"]

LOSS_OPTIONS = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.3, "label_smoothing": 0.2}),
    ("hinge", {"beta": 0.05}),
    ("ipo", {"beta": 0.2}),
    ("slic", {}),
    ("slic", {"slic_delta": 0.3, "slic_lambda": 0.5, "slic_length_normalize": True}),
    ("sft", {"tokens_per_pair": 13.7}),
]

# Lengths of completions, number of pairs, whether they have a y_ref of their own.
BATCHES = {
    "one pair": ([5, 3], 1, False),
    "pairs share completions": ([1, 40, 3000, 17, 2, 300, 64], 9, True),
    "more than one program": ([*range(1, 70), 20000, 1, 33000], 130, True),
    "no pairs": ([4, 2, 1], 0, False),
    "an empty completion in no pair": ([0, 7, 0, 9, 0], 3, False),
    "one long completion": ([100_000, 1], 1, False),
    "a thousand completions": ([7 * s % 60 for s in range(1100)], 100, False),
}


@contextlib.contextmanager
def implementation(name: str, monkeypatch):
    """(backend, device) under which ``pair_loss`` runs implementation ``name``."""
    if name in ("cuda", "cuda-descending"):
        with emulated(monkeypatch, descending=name.endswith("descending"), multiprocessors=3):
            yield "cuda", "cpu"
    elif name == "ptx":
        with executed(monkeypatch, multiprocessors=3):
            yield "cuda", "cpu"
    else:
        yield name.split("-")[0], "cuda" if GPU else "cpu"


def make(batch: str, wide: bool = True, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    lengths, pairs, own_targets = BATCHES[batch]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = 3 * torch.rand(int(offsets[-1]), generator=generator).log()
    sums = torch.segment_reduce(tokens, "sum", offsets=offsets, initial=0)
    full = lengths.nonzero()[:, 0]  # the mean over an empty completion is NaN

    def some() -> torch.Tensor:
        return full[torch.randint(len(full), (pairs,), generator=generator)].to(device)

    return {
        "token_logps": tokens.to(device),
        "cu_completions": (offsets if wide else offsets.int()).to(device),
        "chosen": some(),
        "rejected": some(),
        "targets": some() if own_targets else None,
        "ref_logps": (sums + 5 * torch.randn(len(lengths), generator=generator)).to(device),
    }


def double(arguments: dict) -> dict:
    return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments.items()}


def definition(arguments: dict, loss: str, tokens_per_pair: float = 1.0, **options) -> PairLossOutput:
    """Autograd through the functions of ``cpt_kernels.losses``, which none of the implementations uses."""
    return pair_loss_reference(PairLossInput(**arguments), build_loss(loss, **options), tokens_per_pair)


def check(arguments: dict, loss: str, options: dict, run) -> PairLossOutput:
    eager = definition(arguments, loss, **options)
    exact = definition(double(arguments), loss, **options)
    result = run(**arguments, loss=loss, **options)
    for name in result._fields:
        assert_close(getattr(result, name), getattr(eager, name), getattr(exact, name), name)
    return result


def operator_keywords(loss: str, options: dict, tokens_per_pair: float, backend: str) -> dict:
    flat = {"loss": loss, "loss_options": list(options), "loss_values": list(options.values())}
    return {**flat, "tokens_per_pair": tokens_per_pair, "backend": backend}


@pytest.fixture
def _poisoned():
    """Makes uninitialised memory NaN, so that results that a kernel leaves unwritten show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
@pytest.mark.parametrize(("loss", "options"), LOSS_OPTIONS)
@pytest.mark.parametrize("batch", list(BATCHES)[:2])
@pytest.mark.usefixtures("_poisoned")
def test_losses(name, loss, options, batch, monkeypatch):
    with implementation(name, monkeypatch) as (backend, device):
        check(make(batch, device=device), loss, options, lambda **kw: pair_loss(**kw, backend=backend))


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("batch", list(BATCHES)[2:-1])
@pytest.mark.usefixtures("_poisoned")
def test_batches(name, wide, batch, monkeypatch):
    loss, options = ("slic", {"slic_length_normalize": True}) if wide else ("sigmoid", {"beta": 0.01})
    with implementation(name, monkeypatch) as (backend, device):
        check(make(batch, wide, device), loss, options, lambda **kw: pair_loss(**kw, backend=backend))


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
@pytest.mark.usefixtures("_poisoned")
def test_a_thousand_completions(name, monkeypatch):
    with implementation(name, monkeypatch) as (backend, device):
        arguments = make("a thousand completions", device=device)
        check(arguments, "ipo", {}, lambda **kw: pair_loss(**kw, backend=backend))


def test_every_loss_of_the_kernels_is_covered():
    assert {loss for loss, _ in LOSS_OPTIONS} == set(KERNEL_LOSSES) <= set(LOSSES)
    for loss, options in KERNEL_LOSSES.items():
        assert set(options) <= set(loss_options(loss))
        assert {option for name, given in LOSS_OPTIONS if name == loss for option in given} >= set(options)


@pytest.mark.parametrize(("loss", "options"), LOSS_OPTIONS)
def test_weights_are_the_gradient(loss, options):
    """The reference against autograd through the sums, to the gradients of the tokens."""
    arguments = double(make("pairs share completions"))
    tokens = arguments["token_logps"].requires_grad_()
    out = definition(arguments, loss, **options)
    offsets, chosen, rejected, targets = (
        arguments[name] for name in ("cu_completions", "chosen", "rejected", "targets")
    )
    logps = torch.stack([tokens[a:b].sum() for a, b in offsets.unfold(0, 2, 1)])
    lengths, ref = offsets.diff().double(), arguments["ref_logps"]
    sides = [x[index] for x in (logps, lengths) for index in (chosen, rejected, targets)]
    numbers = PairLogps(*sides, ref[chosen], ref[rejected], options.get("tokens_per_pair", 1.0))
    bound = build_loss(loss, **{k: v for k, v in options.items() if k != "tokens_per_pair"})
    bound(numbers).sum().backward()
    torch.testing.assert_close(out.losses, bound(numbers).detach())
    torch.testing.assert_close(out.weights.repeat_interleave(offsets.diff()), tokens.grad)


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
def test_margins_and_missing_numbers(name, monkeypatch):
    """At the kink of a hinge the weight is 0, and NaN spreads as in eager PyTorch."""
    with implementation(name, monkeypatch) as (backend, device):
        tokens = torch.tensor([-1.0, -2.0, float("nan"), -4.0, -float("inf")], device=device)
        arguments = {
            "token_logps": tokens,
            "cu_completions": torch.arange(6, device=device),
            "chosen": torch.tensor([0, 2, 3, 4, 0], device=device),
            "rejected": torch.tensor([1, 0, 1, 0, 4], device=device),
            "targets": None,
            "ref_logps": torch.zeros(5, device=device),
        }
        for loss, options in [("slic", {}), ("hinge", {"beta": 1.0}), ("sigmoid", {}), ("ipo", {}), ("sft", {})]:
            result = pair_loss(**arguments, loss=loss, **options, backend=backend)
            eager = definition(arguments, loss, **options)
            for field in result._fields:
                got, expected = getattr(result, field), getattr(eager, field)
                torch.testing.assert_close(got, expected, equal_nan=True, msg=f"{loss} {field}: {got} {expected}")


@pytest.mark.parametrize("name", device_params(KERNELS))
def test_indices_out_of_range(name, monkeypatch):
    """The operator does not check on the host: such a pair gives NaN, others are unchanged, nothing else is read."""
    with implementation(name, monkeypatch) as (backend, device):
        arguments = make("pairs share completions", device=device)
        good = pair_loss(**arguments, backend=backend)
        sigmoid = operator_keywords("sigmoid", {"beta": 0.1}, 1.0, backend)
        for value in (-1, 7, 1 << 40, -(1 << 62)):
            arguments["rejected"][4] = value
            losses = torch.ops.cpt_kernels.pair_loss(*arguments.values(), **sigmoid)[1]
            assert losses[4].isnan()
            assert torch.equal(losses[torch.arange(9) != 4], good.losses[torch.arange(9) != 4])
        arguments["cu_completions"][3] = 1 << 40
        arguments["cu_completions"][4] = -5
        torch.ops.cpt_kernels.pair_loss(*arguments.values(), **sigmoid)


def test_same_in_any_order_of_threads(monkeypatch):
    """Equal bit for bit, whatever the order of threads and the number of multiprocessors."""
    found = []
    for descending, multiprocessors in ((False, 1), (True, 4)):
        with emulated(monkeypatch, descending=descending, multiprocessors=multiprocessors):
            found.append(pair_loss(**make("pairs share completions"), backend="cuda"))
    assert all(map(torch.equal, *found))


@pytest.mark.device
def test_one_launch_or_two(monkeypatch):
    """One launch of Triton or two: the results differ by the order of fp64 sums alone."""
    triton = importlib.import_module("cpt_kernels.ops.pair_loss.triton")
    arguments = make("pairs share completions", device="cuda" if GPU else "cpu")
    one = pair_loss(**arguments, backend="triton")
    monkeypatch.setattr(triton, "_SINGLE_PROGRAM_COMPLETIONS", 0)
    two = pair_loss(**arguments, backend="triton")
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_loss_of_ones_own():
    """Any function of PairLogps runs in eager PyTorch, also one that is not separable."""
    arguments = make("pairs share completions")
    centred = user_loss(lambda logps: (logps.chosen - logps.chosen.mean()) ** 2, needs_reference=False)
    out = pair_loss(**arguments, loss=centred)
    assert all(map(torch.equal, out, pair_loss_reference(PairLossInput(**arguments), centred))) and out.weights.any()
    with pytest.raises(ValueError, match=r"has no kernel .* 'auto' or 'eager'"):
        pair_loss(**arguments, loss=centred, backend="triton")
    with pytest.raises(ValueError, match="has its options bound already: beta"):
        pair_loss(**arguments, loss=centred, beta=0.1)


@pytest.mark.device
def test_a_bound_loss_is_the_loss_of_that_name():
    arguments = make("pairs share completions", device="cuda" if GPU else "cpu")
    for backend in ("auto", "triton"):
        bound = pair_loss(**arguments, loss=build_loss("hinge", beta=0.3), backend=backend)
        assert all(map(torch.equal, bound, pair_loss(**arguments, loss="hinge", beta=0.3, backend=backend)))


def test_built_in_losses_and_options_that_the_kernels_do_not_know(monkeypatch):
    """They run in eager PyTorch, and are never confused with a loss of the kernels."""

    def function(logps: PairLogps) -> torch.Tensor:
        return torch.tanh(logps.rejected - logps.chosen)

    arguments = make("pairs share completions")
    for name, options in (("square", {}), ("square", {"beta": 0.3}), ("sigmoid", {"temperature": 2.0})):
        loss = Loss(name, function, needs_reference=False, options=options)
        assert not has_kernel(loss)
        expected = pair_loss_reference(PairLossInput(**arguments), loss)
        assert all(map(torch.equal, pair_loss(**arguments, loss=loss), expected))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in (*KERNEL_LOSSES, "odpo")])
def test_losses_without_a_kernel_are_eager(loss):
    arguments = make("pairs share completions")
    found = pair_loss(**arguments, loss=loss)
    assert all(map(torch.equal, found, pair_loss(**arguments, loss=build_loss(loss)))) and not has_kernel(
        build_loss(loss)
    )
    for options in ({"loss": loss}, {"loss": "sigmoid", "f_divergence_type": "js_divergence"}):
        with pytest.raises(ValueError, match="has no kernel"):
            pair_loss(**arguments, **options, backend="triton")


def test_losses_that_need_more_than_log_probs():
    for options in ({"loss": "odpo"}, {"loss": "ipo", "ld_alpha": 0.5}, {"loss": "ipo", "use_weighting": True}):
        with pytest.raises(ValueError, match="linear_preference_loss"):
            pair_loss(**make("one pair"), **options)


TRITON_BUGS = {
    "last token not summed": ("there = i < length[:, None]", "there = i < length[:, None] - 1"),
    "last pair not seen": ("real = pair < pairs\n", "real = pair < pairs - 1\n"),
    "rejected side forgotten": (" + _scatter(s, r, by_rejected)", ""),
    "y_ref ignored": ("if targets is not None:", "if False:"),
}


@pytest.mark.parametrize("bug", [None, *TRITON_BUGS])
def test_planted_bugs_are_found_in_triton(bug, tmp_path):
    text = (Path(backends.__file__).parent / "pair_loss" / "triton.py").read_text()
    if bug:
        assert text.count(TRITON_BUGS[bug][0]) == 1
        text = text.replace(*TRITON_BUGS[bug])
    copy = tmp_path / "patched_triton.py"
    copy.write_text(text)
    spec = importlib.util.spec_from_file_location("cpt_kernels.ops.pair_loss.patched_triton", copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def run(loss, slic_delta, **tensors):
        bound = build_loss(loss, slic_delta=slic_delta)
        return module.pair_loss_triton(PairLossInput(**tensors), kernel_loss(bound))

    arguments = make("pairs share completions", device="cuda" if GPU else "cpu")
    with pytest.raises(AssertionError) if bug else contextlib.nullcontext():
        check(arguments, "slic", {"slic_delta": 1e4}, run)  # a margin so wide that every pair is within it


@pytest.mark.parametrize("name", device_params(["triton", "cuda"]))
@pytest.mark.parametrize("loss", ["slic", "sft"])
def test_operator(name, loss, monkeypatch):
    arguments = make("pairs share completions", device="cuda" if GPU and name == "triton" else "cpu")
    if loss == "sft":
        arguments |= {"rejected": None, "targets": None, "ref_logps": None}
    options = {"slic": {"slic_delta": 0.5, "slic_length_normalize": True}, "sft": {}}[loss]
    with implementation(name, monkeypatch) as (backend, _):
        keywords = operator_keywords(loss, options, 2.0, backend)
        torch.library.opcheck(torch.ops.cpt_kernels.pair_loss.default, tuple(arguments.values()), keywords)


@pytest.mark.device
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_into_one_graph(backend):
    arguments = make("pairs share completions", device="cuda" if GPU else "cpu")

    def function(arguments):
        return pair_loss(**arguments, loss="slic", slic_delta=0.5, slic_length_normalize=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(arguments), function(arguments)))


def test_arguments():
    good = make("pairs share completions")
    wrong = [
        {"token_logps": good["token_logps"].half()},
        {"cu_completions": good["cu_completions"].float()},
        {"cu_completions": good["cu_completions"] + 1},
        {"cu_completions": good["cu_completions"].flip(0)},
        {"chosen": good["chosen"][:3]},
        {"chosen": good["chosen"].int()},
        {"rejected": good["rejected"] + 7},
        {"targets": good["targets"] - 7},
        {"rejected": None},
        {"ref_logps": None},
        {"ref_logps": good["ref_logps"].double()},
        {"loss": "dpo"},
        {"backend": "rocm"},
    ]
    for change in wrong:
        with pytest.raises(ValueError):
            pair_loss(**{**good, **change})
    with pytest.raises(TypeError):
        pair_loss(**good, slic_delta=1.0)
    with pytest.raises(ValueError, match="float32"):
        pair_loss(**double(good), backend="triton")
