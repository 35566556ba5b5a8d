"""vocab_score: every output of every implementation by the tolerance rule; infinities and NaN as in eager PyTorch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cpt_kernels.ops import backends
from cpt_kernels.ops.vocab_score import TileOptions, VocabScore, vocab_score
from cpt_kernels.ops.vocab_score.reference import vocab_score_reference
from tests.helpers.devices import device_params
from tests.helpers.emulation import emulated
from tests.helpers.ptx import executed
from tests.numerics import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = torch.cuda.is_available()

# Ways to run the kernels. With little shared memory small rows are split over a cluster (16 KiB: 2 to 4 blocks, 6 KiB:
# 8 blocks); with compute capability 8 a row that does not fit in one block streams.
IMPLEMENTATIONS = {
    "triton": {},
    "cuda-cluster": {"shared_kib": 16},
    "cuda-cluster-descending": {"shared_kib": 6, "descending": True},
    "cuda-block": {"major": 8},
    "cuda-stream-descending": {"major": 8, "shared_kib": 4, "descending": True},
    # The code that nvcc makes, interpreted. Long rows stream.
    "ptx-cluster": {"architecture": "sm_90a", "shared_kib": 6},
    "ptx-block": {"architecture": "sm_80", "shared_kib": 16},
}
if GPU and backends.has_extension():
    IMPLEMENTATIONS["cuda-gpu"] = {}


@contextlib.contextmanager
def implementation(name: str, monkeypatch, patches=()):
    """(backend, device) under which ``vocab_score`` runs implementation ``name``."""
    if name.startswith("ptx"):
        with executed(monkeypatch, **IMPLEMENTATIONS[name]):
            yield "cuda", "cpu"
    elif name.startswith("cuda") and name != "cuda-gpu":
        with emulated(monkeypatch, patches, **IMPLEMENTATIONS[name]):
            yield "cuda", "cpu"
    else:
        yield name.split("-")[0], "cuda" if GPU else "cpu"


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    rows: int
    columns: int
    vocab_size: int | None = None
    bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    statistics: bool = True
    score: bool = True
    stride: int | None = None  # elements from row to row
    offset: int = 0  # elements from an aligned address to the first row
    spread: float = 3.0  # standard deviation of the logits


CASES = [
    Case(BF16, 67, 1),
    Case(FP16, 67, 3, vocab_size=2, bias=True, stride=8),
    Case(FP32, 67, 3, softcap=5.0, offset=1),
    Case(BF16, 67, 1021, bias=True, softcap=30.0, vocab_size=1000, stride=1024),
    Case(FP16, 67, 1021, logit_scale=0.7, statistics=False),
    Case(FP32, 67, 1021, vocab_size=1013, bias=True, logit_scale=0.25, stride=1100, offset=3),
    Case(BF16, 67, 1021, score=False, softcap=30.0, logit_scale=2.0),
    Case(FP16, 5, 1021, score=False, statistics=False, vocab_size=1016, bias=True, logit_scale=2.0, stride=1040),
    Case(FP32, 5, 1024, score=False),
    Case(FP32, 1, 1024, vocab_size=1, statistics=False, softcap=30.0),  # the one log-prob is 0, with no rounding
    Case(FP32, 67, 2, vocab_size=1, statistics=False, logit_scale=0.7),
    Case(BF16, 67, 1021, spread=30.0, logit_scale=1.5),  # peaked: log-probs down to hundreds of nats
    Case(BF16, 5, 1021, logit_scale=-0.5, bias=True, offset=8),  # the largest logit comes from the smallest number
    Case(BF16, 3, 50257, vocab_size=50255, statistics=False, stride=50272),
    Case(FP16, 3, 50257, stride=50264, softcap=30.0),
    Case(FP32, 3, 50257, bias=True, statistics=False, logit_scale=0.5),
    Case(BF16, 1, 1 << 19, offset=5),
]


def test_every_pair_of_options_is_covered():
    def choices(case: Case) -> dict[str, object]:
        stride = case.stride or case.columns
        return {
            "dtype": case.dtype,
            "statistics": case.statistics,
            "score": case.score,
            "bias": case.bias,
            "scale": case.logit_scale != 1,
            "softcap": case.softcap is not None,
            "padding columns": case.vocab_size not in (None, case.columns),
            "memory between rows": stride > case.columns,
            "aligned rows": stride % 16 == case.offset == 0,
        }

    chosen = [choices(case) for case in CASES]
    for one, other in itertools.combinations(chosen[0], 2):
        values = (sorted({case[name] for case in chosen}, key=str) for name in (one, other))
        missing = set(itertools.product(*values)) - {(case[one], case[other]) for case in chosen}
        assert not missing, f"{one} and {other}: {missing}"


def make(case: Case, device: str = "cpu", seed: int = 0):
    """Returns a tile inside a buffer of NaNs, and other arguments. The mean logit is -2: a sum near 0 would cancel."""
    generator = torch.Generator().manual_seed(seed)
    stride = case.stride or case.columns
    buffer = torch.full((case.offset + case.rows * stride + 16,), float("nan"), dtype=case.dtype, device=device)
    tile = buffer[case.offset :].as_strided((case.rows, case.columns), (stride, 1))
    values = case.spread * torch.randn(case.rows, case.columns, generator=generator) - 2
    tile.copy_(values)
    targets = torch.randint(case.vocab_size or case.columns, (case.rows,), generator=generator)
    targets[0] = (case.vocab_size or case.columns) - 1  # bugs show in the last column
    bias = torch.randn(case.columns, generator=generator).to(case.dtype).to(device) if case.bias else None
    options = {"logit_scale": case.logit_scale, "softcap": case.softcap, "vocab_size": case.vocab_size}
    return buffer, tile, targets.to(device), {"bias": bias, **options, "statistics": case.statistics}


def compare(result: VocabScore, tile, eager: VocabScore, eager_tile, exact: VocabScore, exact_tile, case: Case) -> None:
    for name, value in result._asdict().items():
        if name == "correct" and value is not None:
            assert torch.equal(value.cpu(), eager.correct.cpu()), "correct"
        elif case.statistics or name in ("logps", "lse"):
            assert_close(value, getattr(eager, name), getattr(exact, name), name)
        else:
            assert value is None
    if case.score:
        assert_close(tile, eager_tile, exact_tile, "score")
    else:
        assert torch.equal(tile.double(), exact_tile), "the tile was written to"


def check(case: Case, backend: str, device: str = "cpu", run=vocab_score) -> None:
    """Checks one run by the tolerance rule, and that memory outside the tile is unchanged."""
    buffer, tile, targets, options = make(case, device)
    eager_tile, exact_tile = tile.clone(), tile.double()
    exact_bias = None if options["bias"] is None else options["bias"].double()
    result = run(tile, targets, **options, score=case.score, backend=backend)
    eager = vocab_score(eager_tile, targets, **options, score=case.score, backend="eager")
    exact = vocab_score(exact_tile, targets, **{**options, "bias": exact_bias}, score=case.score)
    compare(result, tile, eager, eager_tile, exact, exact_tile, case)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[case.offset :].as_strided(tile.shape, tile.stride()).fill_(True)
    assert buffer[~inside].isnan().all(), "written outside the tile"


@pytest.fixture
def _poisoned():
    """Makes uninitialised memory NaN, so that results that a kernel leaves unwritten show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rows}x{case.columns}-{str(case.dtype)[6:]}")
@pytest.mark.usefixtures("_poisoned")
def test_outputs_and_score(name, case, monkeypatch):
    with implementation(name, monkeypatch) as (backend, device):
        check(case, backend, device)


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
def test_not_finite(name, softcap, dtype, monkeypatch):
    """For infinite and NaN logits every element equals that of eager PyTorch."""
    inf, lowest = float("inf"), torch.finfo(dtype).min
    with implementation(name, monkeypatch) as (backend, device):
        tile = torch.randn(9, 37, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        targets = torch.tensor([0, 0, 0, 0, 7, 1, 2, 3, 5], device=device)
        tile[0] = -inf
        tile[1, 3] = inf
        tile[2, :2] = inf
        tile[3, 4] = float("nan")
        tile[4, :5] = -inf
        tile[5, 1] = -inf  # the target
        tile[6, 3:] = -inf
        tile[7, 1:] = lowest
        tile[8, 5] = inf  # the target
        eager_tile = tile.clone()
        options = {"statistics": True, "score": True, "softcap": softcap}
        result = vocab_score(tile, targets, **options, backend=backend)
        eager = vocab_score(eager_tile, targets, **options, backend="eager")
    for field in VocabScore._fields:
        torch.testing.assert_close(
            getattr(result, field), getattr(eager, field), equal_nan=True, msg=lambda m, f=field: f"{f}: {m}"
        )
    torch.testing.assert_close(tile, eager_tile, equal_nan=True)


@pytest.mark.parametrize("name", device_params(["eager", *IMPLEMENTATIONS]))
@pytest.mark.parametrize("offset", [3e4, -3e4, 1e6])
def test_a_number_that_all_logits_have_in_common_costs_no_digits(name, offset, monkeypatch):
    with implementation(name, monkeypatch) as (backend, device):
        tile = (3 * torch.randn(9, 517, generator=torch.Generator().manual_seed(0)) + offset).to(device)
        targets, exact_tile = torch.arange(9, device=device), tile.double()
        found = vocab_score(tile, targets, statistics=True, score=True, backend=backend)
    exact = vocab_score(exact_tile, targets, statistics=True, score=True, backend="eager")
    for field in ("logps", "entropy", "log_sum_sq"):
        torch.testing.assert_close(getattr(found, field).double(), getattr(exact, field), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(tile.double(), exact_tile, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
def test_targets_outside_the_vocabulary(name, monkeypatch):
    """Kernels return NaN for such a row and read nothing outside the tile. The operator has no check on the host."""
    with implementation(name, monkeypatch) as (backend, device):
        tile = torch.randn(5, 1021, device=device)
        targets = torch.tensor([1000, 1, -1, 1 << 40, -(1 << 62)], device=device)
        options = {"logit_scale": 1.0, "softcap": None, "vocab_size": 1000, "statistics": True, "backend": backend}
        out = torch.ops.cpt_kernels.vocab_score_(tile, targets, None, **options)
    known = torch.tensor([False, True, False, False, False], device=device)
    assert torch.equal(out[0].isfinite(), known)
    assert torch.equal(tile[:, :1000].isfinite().all(1), known)
    assert torch.equal(tile[:, :1000].isnan().all(1), ~known)
    assert out[1].isfinite().all() and not out[4][~known].any()


@pytest.mark.parametrize("name", device_params(IMPLEMENTATIONS))
def test_no_rows(name, monkeypatch):
    with implementation(name, monkeypatch) as (backend, device):
        tile, targets = torch.empty(0, 7, device=device), torch.empty(0, dtype=torch.int64, device=device)
        out = vocab_score(tile, targets, statistics=True, score=True, backend=backend)
    assert all(value.shape == (0,) for value in out)


@pytest.mark.parametrize("name", device_params(["triton", "cuda-cluster", "cuda-block"]))
def test_rows_far_apart(name, monkeypatch):
    """Offsets beyond 2^31 elements. Memory between the rows is never touched, so the system never allocates it."""
    with implementation(name, monkeypatch) as (backend, device):
        stride = (1 << 31) + 64
        tile = torch.empty(stride + 64, dtype=BF16, device=device).as_strided((2, 61), (stride, 1))
        tile.copy_(torch.randn(2, 61))
        near, targets = tile.clone(), torch.tensor([60, 0], device=device)
        out = vocab_score(tile, targets, statistics=True, score=True, backend=backend)
        expected = vocab_score(near, targets, statistics=True, score=True, backend=backend)
    torch.testing.assert_close(tile, near)
    torch.testing.assert_close(list(out), list(expected))


def test_small_fp16_scores_give_the_gradient_of_a_weight():
    """Almost equal probabilities of 2^17 columns lie below fp16's normal range, and the sum over rows meets the rule.

    Eager PyTorch scales the loss, by 2^16, so its gradients of logits are normal numbers.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns, width, scale = 8, 1 << 17, 8, 2.0**16
    hidden = torch.randn(rows, width, generator=generator).half()
    weight = (0.05 * torch.randn(columns, width, generator=generator)).half()
    targets = torch.randint(columns, (rows,), generator=generator)
    logits = (hidden.float() @ weight.float().T).half()

    exact = -(hidden.double() @ weight.double().T).softmax(1)
    exact[range(rows), targets] += 1
    eager = -logits.float().softmax(1)
    eager[range(rows), targets] += 1
    tile = logits.clone()
    vocab_score(tile, targets, score=True)
    assert (tile.abs() < 6e-5).float().mean() > 0.99
    expected = exact.T @ hidden.double() / rows * scale
    ours = (tile.float().T @ hidden.float() * (scale / rows)).half()
    assert_close(ours, ((eager * scale / rows).half().float().T @ hidden.float()).half(), expected, "weight's gradient")


def test_same_in_any_order_of_threads(monkeypatch):
    """Results do not depend on the order of blocks and threads: equal bit for bit."""
    case, found = CASES[3], []
    for descending in (False, True):
        _, tile, targets, options = make(case)
        with emulated(monkeypatch, shared_kib=6, descending=descending):
            out = vocab_score(tile, targets, **options, score=True, backend="cuda")
        found.append([*out, tile])
    assert all(map(torch.equal, *found))


def test_eager_blocks_of_rows(monkeypatch):
    """The reference works in blocks of rows on a CPU; their size changes nothing."""
    _, tile, targets, _ = make(CASES[0])
    monkeypatch.setattr("cpt_kernels.ops.vocab_score.reference._BLOCK_ELEMENTS", 10)
    blocked = tile.clone()
    options = TileOptions(statistics=True, score=True)
    out = vocab_score_reference(blocked, targets, options)
    monkeypatch.undo()
    expected = vocab_score_reference(tile, targets, options)
    assert torch.equal(blocked, tile) and all(map(torch.equal, out, expected))


TRITON_BUGS = {
    "tail column not summed": ("inside = whole + tile < vocab_size\n", "inside = whole + tile < vocab_size - 1\n"),
    "tail column not scored": ("there = column < columns\n", "there = column < columns - 1\n"),
    "tail column of aligned rows not scored": ("x, column, column < columns,", "x, column, column < columns - 1,"),
    "last whole vector of aligned rows not scored": ("< columns // WIDTH\n", "< columns // WIDTH - 1\n"),
    "padding scored": ("tl.where(column < vocab_size, _minus_p", "tl.where(column >= 0, _minus_p"),
    "target's element not scored": ("mask=known)\n\n\n", "mask=known & (row < 0))\n\n\n"),
    "sum not rescaled": ("s = s * rescale + _sum(e)", "s = s + _sum(e)"),
    "lanes merged without rescaling": ("row_s = tl.sum(s * rescale, axis=0)", "row_s = tl.sum(s, axis=0)"),
    "entropy not rescaled": ("w = (w + s * shift) * rescale + ", "w = w * rescale + "),
}


def load_triton(tmp_path: Path, *changes: tuple[str, str]):
    """Returns ``vocab_score_triton`` from a patched copy of its source."""
    path = Path(backends.__file__).parent / "vocab_score" / "triton.py"
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"found {text.count(old)} times: {old}"
        text = text.replace(old, new)
    copy = tmp_path / "patched_triton.py"
    copy.write_text(text)
    spec = importlib.util.spec_from_file_location("cpt_kernels.ops.vocab_score.patched_triton", copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks kernels up by their module
    spec.loader.exec_module(module)
    return module.vocab_score_triton


@pytest.mark.parametrize("bug", [None, *TRITON_BUGS])
def test_planted_bugs_are_found_in_triton(bug, tmp_path):
    """The checks above fail on a wrong kernel. Tiles are small, so that 1021 columns take several."""
    changes = [("_TILE_BYTES = 8192", "_TILE_BYTES = 1024"), *([TRITON_BUGS[bug]] if bug else [])]
    function = load_triton(tmp_path, *changes)

    def run(tile, targets, *, backend, **options):
        return function(tile, targets, TileOptions(**options))

    with pytest.raises(AssertionError) if bug else contextlib.nullcontext():
        for vocab, stride in ((1021, 1021), (1021, 1024), (1000, 1024)):
            check(Case(FP32, 5, 1021, vocab, stride=stride), "triton", "cuda" if GPU else "cpu", run)


@pytest.mark.parametrize(
    ("scale", "softcap", "fused"),
    [(1.0, None, True), (0.7, None, True), (-0.7, None, False), (0.0, None, False), (1.0, 30.0, False)],
)
def test_a_product_that_rounds_is_not_fused_with_the_subtraction_behind_it(scale, softcap, fused, monkeypatch):
    """The interpreter never fuses. On a GPU the cases with one column of vocabulary above would show the error."""
    module, given = importlib.import_module("cpt_kernels.ops.vocab_score.triton"), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: given.append(options["enable_fp_fusion"])

    monkeypatch.setattr(module, "_vocab_score_kernel", Kernel())
    options = TileOptions(logit_scale=scale, softcap=softcap, statistics=True, score=True)
    module.vocab_score_triton(torch.randn(2, 5), torch.tensor([0, 1]), options)
    assert given == [fused]


@pytest.mark.parametrize("mutating", [False, True])
@pytest.mark.parametrize("name", device_params(["eager", "triton", "cuda-block"]))
@pytest.mark.parametrize("statistics", [False, True])
def test_operators(mutating, name, statistics, monkeypatch):
    operator = torch.ops.cpt_kernels.vocab_score_ if mutating else torch.ops.cpt_kernels.vocab_score
    with implementation(name, monkeypatch) as (backend, device):
        tile, targets = torch.randn(5, 40, device=device), torch.randint(0, 38, (5,), device=device)
        bias = torch.randn(40, device=device)
        options = {"logit_scale": 1.0, "softcap": 30.0, "vocab_size": 38, "statistics": statistics, "backend": backend}
        torch.library.opcheck(operator.default, (tile, targets, bias), options)


def test_arguments():
    tile, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    wrong = [
        (tile[0], targets, {}),
        (tile.int(), targets, {}),
        (tile.T.contiguous().T, targets, {}),
        (tile[:, :0], targets, {}),
        (tile, targets[:2], {}),
        (tile, targets.int(), {}),
        (tile, targets + 8, {}),
        (tile, targets - 1, {}),
        (tile, targets + 5, {"vocab_size": 5}),
        (tile, targets, {"vocab_size": 9}),
        (tile, targets, {"vocab_size": 0}),
        (tile, targets, {"bias": torch.zeros(7)}),
        (tile[:1].expand(3, 8), targets, {"score": True}),
        (tile, targets, {"backend": "rocm"}),
        (tile.double(), targets, {"backend": "triton"}),
    ]
    for logits, index, options in wrong:
        with pytest.raises(ValueError):
            vocab_score(logits, index, **options)
    assert vocab_score(tile.double(), targets).logps.dtype == torch.float64


def test_backends_that_are_missing_say_how_to_get_them(monkeypatch):
    tile, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cpt_kernels._C", None)
        backends.has_extension.cache_clear()
        with pytest.raises(RuntimeError, match="CPT_BUILD_CUDA=1 pip install"):
            vocab_score(tile, targets, backend="cuda")
    backends.has_extension.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        with pytest.raises(RuntimeError, match="pip install triton"):
            vocab_score(tile, targets, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        vocab_score(tile, targets, backend="triton")


def test_operators_import_without_triton_or_transformers():
    code = (
        "import sys; sys.modules.update(triton=None, transformers=None)\n"
        "import torch\n"
        "from cpt_kernels.ops.vocab_score import vocab_score\n"
        "from cpt_kernels.ops.pair_loss import pair_loss\n"
        "vocab_score(torch.zeros(1, 2), torch.tensor([0]), score=True)\n"
        "pair_loss(torch.zeros(1), torch.tensor([0, 1]), torch.tensor([0]), loss='sft')\n"
    )
    root = Path(backends.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.device
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_into_one_graph(backend):
    def function(tile, targets):
        tile = 2 * tile
        out = vocab_score(tile, targets, statistics=True, score=True, backend=backend)
        return out.logps + out.entropy, tile

    device = "cuda" if GPU else "cpu"
    arguments = torch.randn(4, 50, device=device), torch.tensor([1, 2, 3, 49], device=device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, function(*arguments))
