"""Contestants of the head benchmarks: all modes of ours, and the peers.

Every contestant is a function of hidden rows (N, H) and a weight (V, H) that returns a loss: the mean DPO loss over
pairs of completions, or, for peers without a pair loss, the mean cross-entropy over tokens (``nll``), which needs the
same matrix products. A peer runs with its best settings that we found; ``settings`` names them. The reference log-probs
of all pairs are zero.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_kernels.losses import build_loss
from cpt_kernels.ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss

BETA = 0.1
_LOSS = build_loss("sigmoid", beta=BETA)
_CHUNK = 512  # hidden rows whose logits the expected values compute at a time

Head = Callable[[Tensor, Tensor], Tensor]  # (hidden rows, weight) -> loss

# What a contestant differentiates, and the fewest matrix products of N V H multiply-adds that this takes.
TRAINED, FROZEN, SCORE = "hidden and weight", "hidden", "nothing"
PRODUCTS = {TRAINED: 3, FROZEN: 2, SCORE: 1}


@dataclass
class Problem:
    """The inputs of all contestants. Pair i is completions 2i and 2i+1, each of ``completion`` tokens."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    completion: int
    pairs: Pairs

    @classmethod
    def make(
        cls, tokens: int, size: int, vocab: int, completion: int, device: str, dtype: torch.dtype, seed: int = 0
    ) -> Problem:
        """Makes random inputs, the same in every process on one device."""
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.randn(vocab, size, dtype=dtype, device=device, generator=generator).div_(math.sqrt(size))
        hidden = torch.randn(tokens, size, dtype=dtype, device=device, generator=generator)
        targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
        completions = tokens // completion
        index = torch.arange(completions, device=device)
        pairs = Pairs(
            torch.arange(0, tokens + 1, completion, device=device),
            [completion] * completions,
            index[::2],
            index[1::2],
            index[::2],
            [(2, 1)] * (completions // 2),
            torch.zeros(completions, device=device),
        )
        return cls(hidden, weight, targets, completion, pairs)

    def dpo(self, logps: Tensor) -> Tensor:
        """Returns the mean DPO loss over the pairs, by definition."""
        sums = logps.view(-1, self.completion).sum(1)
        return -F.logsigmoid(BETA * (sums[::2] - sums[1::2])).mean()

    def expected(self, gradients: bool = True) -> dict[str, dict[str, float]]:
        """Returns the expected loss and gradient norms by kind (``dpo``, ``nll``).

        They come from autograd through log_softmax and gather, in chunks of rows.
        """
        hidden, weight = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        chunks = list(zip(hidden.split(_CHUNK), self.targets.split(_CHUNK)))
        with torch.no_grad():
            logps = torch.cat([token_logps(rows @ weight.t(), targets) for rows, targets in chunks])
        logps.requires_grad_()
        found = {}
        for kind, loss in {"dpo": self.dpo(logps), "nll": -logps.mean()}.items():
            found[kind] = {"loss": loss.item()}
            if gradients:
                (g,) = torch.autograd.grad(loss, logps)
                hidden.grad = weight.grad = None
                for (rows, targets), some in zip(chunks, g.split(_CHUNK)):
                    torch.dot(token_logps(rows @ weight.t(), targets), some).backward(retain_graph=True)
                found[kind] |= norms(hidden.grad, weight.grad)
        return found


def norms(grad_hidden: Tensor | None, grad_weight: Tensor | None = None) -> dict[str, float]:
    """Returns the Euclidean norms of the given gradients as ``dX`` and ``dW``."""
    grads = {"dX": grad_hidden, "dW": grad_weight}
    return {name: grad.norm(dtype=torch.float32).item() for name, grad in grads.items() if grad is not None}


def disagreement(found: Mapping[str, float], expected: Mapping[str, float], half: bool) -> str | None:
    """Describes the first of a contestant's loss and norms that is not as expected, or returns None.

    ``half`` selects the wider tolerance for half precision, where sums of log-probs lose more digits.
    """
    tolerance = 0.03 if half else 1e-3
    for name, value in found.items():
        if not abs(value - expected[name]) <= tolerance * max(abs(expected[name]), 1e-3):
            return f"{name} is {value:.6g}, expected {expected[name]:.6g}"
    return None


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the fp32 log-prob of each target."""
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@dataclass(frozen=True)
class Contestant:
    """One head to compare, its settings, and where it can run."""

    build: Callable[[Problem], Head]
    gradients: str = TRAINED
    settings: str = ""
    kind: str = "dpo"  # which loss it computes
    peer: bool = True
    package: str | None = None  # the package that it needs
    device: str | None = None  # the only device that it runs on; None: any
    compiles: bool = False  # compiles its whole loss, which takes half a minute

    @property
    def products(self) -> int:
        """The fewest matrix products that its gradients take."""
        return PRODUCTS[self.gradients]

    def absent(self, device: str) -> str | None:
        """Returns the reason why the contestant cannot run here, or None if it can."""
        if self.device not in (None, device):
            return f"{self.device} only"
        if self.package == "torch" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.compiles and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler on a CPU"
        if self.package == "quack" and torch.cuda.get_device_capability()[0] < 9:
            return "needs compute capability 9.0"
        return None


def contestants(
    backend: str = "auto", statistics: bool = False, memory_mb: float | None = None
) -> dict[str, Contestant]:
    """Returns all contestants by name: our modes with ``backend``, then the peers.

    The suffix ``-frozen`` means that only hidden rows are differentiated, ``-score`` that nothing is. ``memory_mb`` is
    the budget of our tiles. With ``statistics``, all of our modes but ``score`` compute what training logs.
    """
    options = HeadOptions(backend=backend, statistics=statistics, memory_mb=memory_mb)
    ours = partial(Contestant, settings=f"backend {backend}", peer=False)
    found = {
        "trained": ours(partial(_preference, options, False)),
        "general": ours(partial(_preference, options, True)),
        "frozen": ours(partial(_preference, options, False), FROZEN),
        "score": ours(partial(_scoring, replace(options, statistics=False)), SCORE, kind="nll"),
    }
    # Peers: which of them also run frozen or without gradients is decided by name below.
    liger, chunked = "liger_kernel", "chunks of {} rows on a CPU, 4096 on CUDA".format
    compiled = partial(Contestant, compiles=True)
    peers: dict[str, Callable[..., Contestant]] = {
        "eager": partial(Contestant, _eager, settings="all logits, log_softmax in fp32"),
        "compiled": partial(compiled, _compiled, settings="torch.compile of eager, static shapes"),
        "trl": partial(Contestant, _trl, settings="TRL's 32768 columns x 4096 rows, no statistics", package="trl"),
        "torch-ce": partial(Contestant, _torch_ce, settings=chunked(512), kind="nll", package="torch"),
        "liger-dpo": partial(compiled, _liger_dpo, settings="compiled, chunks of 1024 rows or a pair", package=liger),
        "liger-ce": partial(
            Contestant, _liger_ce, settings="accumulates in fp32", kind="nll", package=liger, device="cuda"
        ),
        "cce": partial(
            Contestant, _cce, settings="Apple's kernels, filter 'high'", kind="nll", package="cut_cross_entropy",
            device="cuda",
        ),
        "quack": partial(
            Contestant, _quack, settings="tuned, chunks of 4096 rows", kind="nll", package="quack", device="cuda"
        ),
    }  # fmt: skip
    for name, peer in peers.items():
        found[name] = peer()
        if name not in ("compiled", "cce", "quack"):
            found[f"{name}-frozen"] = peer(gradients=FROZEN)
        if name in ("eager", "trl", "torch-ce"):
            found[f"{name}-score"] = peer(gradients=SCORE)
    return found


# --- Ours ---


def _preference(options: HeadOptions, general: bool, p: Problem) -> Head:
    count = len(p.pairs.chosen)
    return lambda x, w: (
        linear_preference_loss(x, w, p.targets, p.pairs, _LOSS, None, options, general=general).loss / count
    )


def _scoring(options: HeadOptions, p: Problem) -> Head:
    return lambda x, w: -linear_logprobs(x, w, p.targets, None, options).logps.mean()


# --- Peers, called as their current releases require ---


def _eager(p: Problem) -> Head:
    return lambda x, w: p.dpo(token_logps(x @ w.t(), p.targets))


def _compiled(p: Problem) -> Head:
    torch.compiler.reset()  # after a few shapes Dynamo falls back to eager
    return torch.compile(_eager(p), dynamic=False)


def _trl(p: Problem) -> Head:
    """TRL's chunked log-probs, which its ``DPOTrainer`` uses for the head."""
    chunked = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    columns = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda x, w: p.dpo(chunked(x, w, None, p.targets, 1.0, columns, None, 1.0, ())[0])


def _torch_ce(p: Problem) -> Head:
    """PyTorch's linear_cross_entropy with larger chunks than its "auto", which is ten times slower on a CPU."""
    cuda = p.hidden.is_cuda
    policy = "compact" if p.hidden.dtype == torch.float32 else "auto"
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4096 if cuda else 512, acc_policy=policy)
    return lambda x, w: F.linear_cross_entropy(x, w, p.targets, options=options)


def _liger_dpo(p: Problem) -> Head:
    """Liger's DPO loss in chunks of some 1024 rows; its default of one pair is slow if completions are short."""
    torch.compiler.reset()
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    chunk = max(1, 1024 // (2 * p.completion))
    dpo = loss(beta=BETA, use_ref_model=False, compiled=True, chunk_size=chunk)
    halves = torch.cat([p.pairs.chosen, p.pairs.rejected])  # chosen first, then rejected
    targets = p.targets.view(-1, p.completion)[halves]
    return lambda x, w: dpo(w, x.view(-1, p.completion, x.shape[-1])[halves], targets)[0]


def _liger_ce(p: Problem) -> Head:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda x, w: loss(w, x, p.targets)


def _cce(p: Problem) -> Head:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, w: function(x, w, p.targets)


def _quack(p: Problem) -> Head:
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda x, w: function(x, w, p.targets)
