"""Heads that are compared: ours in all their modes, and what else computes a loss from hidden rows and a vocabulary.

Every contestant takes hidden rows (N, H) and a weight (V, H) to a loss, mean DPO over pairs of completions or, where it
knows no pairs, mean cross-entropy over tokens (``nll``), which has the same products. A peer runs at the best of its
settings that we found; they stand in ``settings``. Reference log-probs of the pairs are zero.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_kernels.losses import build_loss
from cpt_kernels.ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss

BETA = 0.1
_LOSS = build_loss("sigmoid", beta=BETA)
_CHUNK = 512  # rows of the reference's logits

Head = Callable[[Tensor, Tensor], Tensor]  # loss of hidden rows and weight

# What is differentiated, and how many products of N V H multiplications that takes at least.
TRAINED, FROZEN, SCORE = "hidden and weight", "hidden", "nothing"
PRODUCTS = {TRAINED: 3, FROZEN: 2, SCORE: 1}


@dataclass
class Problem:
    """Inputs of all contestants. Completions 2i and 2i+1, of ``completion`` tokens each, are pair i."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    completion: int
    pairs: Pairs

    @classmethod
    def make(
        cls, tokens: int, size: int, vocab: int, completion: int, device: str, dtype: torch.dtype, seed: int = 0
    ) -> Problem:
        """The same in every process on a device."""
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
        """Mean DPO loss over the pairs, as one would write it."""
        sums = logps.view(-1, self.completion).sum(1)
        return -F.logsigmoid(BETA * (sums[::2] - sums[1::2])).mean()

    def expected(self, gradients: bool = True) -> dict[str, dict[str, float]]:
        """Loss and norms of its gradients of both kinds, by autograd over log_softmax and gather, in chunks of rows."""
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
    """``dX`` and ``dW``: the Euclidean norms, of those that are there."""
    grads = {"dX": grad_hidden, "dW": grad_weight}
    return {name: grad.norm(dtype=torch.float32).item() for name, grad in grads.items() if grad is not None}


def disagreement(found: Mapping[str, float], expected: Mapping[str, float], half: bool) -> str | None:
    """What of a contestant's loss and norms is not as expected. Half-precision rows of sums lose more."""
    tolerance = 0.03 if half else 1e-3
    for name, value in found.items():
        if not abs(value - expected[name]) <= tolerance * max(abs(expected[name]), 1e-3):
            return f"{name} is {value:.6g}, expected {expected[name]:.6g}"
    return None


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@dataclass(frozen=True)
class Contestant:
    """Who takes part, with what, and where it can."""

    build: Callable[[Problem], Head]
    gradients: str = TRAINED
    settings: str = ""
    kind: str = "dpo"  # which loss it computes
    peer: bool = True
    package: str | None = None  # without which it is not there
    device: str | None = None  # the only one that it runs on
    compiles: bool = False  # a whole loss, which takes half a minute

    @property
    def products(self) -> int:
        return PRODUCTS[self.gradients]

    def absent(self, device: str) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.device not in (None, device):
            return f"{self.device} only"
        if self.package == "torch" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.compiles and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile wants a C++ compiler on a CPU"
        if self.package == "quack" and torch.cuda.get_device_capability()[0] < 9:
            return "needs compute capability 9.0"
        return None


def contestants(backend: str = "auto") -> dict[str, Contestant]:
    """All by name: our modes, then the peers; ``-frozen`` and ``-score`` where less is differentiated."""
    options = HeadOptions(backend=backend)
    ours = partial(Contestant, settings=f"backend {backend}", peer=False)
    found = {
        "trained": ours(partial(_preference, options, False)),
        "general": ours(partial(_preference, options, True)),
        "frozen": ours(partial(_preference, options, False), FROZEN),
        "score": ours(partial(_scoring, options), SCORE, kind="nll"),
    }
    liger, chunked = "liger_kernel", "chunks of {} rows on a CPU, 4096 on CUDA".format
    compiled = partial(Contestant, compiles=True)
    peers: dict[str, Callable[..., Contestant]] = {
        "eager": partial(Contestant, _eager, settings="all logits, log_softmax in fp32"),
        "compiled": partial(compiled, _compiled, settings="torch.compile of eager, static shapes"),
        "trl": partial(Contestant, _trl, settings="its 32768 columns x 4096 rows, no statistics", package="trl"),
        "torch-ce": partial(Contestant, _torch_ce, settings=chunked(512), kind="nll", package="torch"),
        "liger-dpo": partial(compiled, _liger_dpo, settings="compiled, chunks of 1024 rows or a pair", package=liger),
        "liger-ce": partial(
            Contestant, _liger_ce, settings="accumulates in fp32", kind="nll", package=liger, device="cuda"
        ),
        "cce": partial(
            Contestant, _cce, settings="its kernels, filter 'high'", kind="nll", package="cut_cross_entropy",
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


# --- Peers, called as their current releases want it ---


def _eager(p: Problem) -> Head:
    return lambda x, w: p.dpo(token_logps(x @ w.t(), p.targets))


def _compiled(p: Problem) -> Head:
    torch.compiler.reset()  # beyond a few shapes it would stay with eager
    return torch.compile(_eager(p), dynamic=False)


def _trl(p: Problem) -> Head:
    """TRL's chunked log-probs, what its ``DPOTrainer`` runs on a head."""
    chunked = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    columns = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda x, w: p.dpo(chunked(x, w, None, p.targets, 1.0, columns, None, 1.0, ())[0])


def _torch_ce(p: Problem) -> Head:
    """PyTorch's chunks, not those of its "auto": on a CPU that takes so few rows that it is ten times slower."""
    cuda = p.hidden.is_cuda
    policy = "compact" if p.hidden.dtype == torch.float32 else "auto"
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4096 if cuda else 512, acc_policy=policy)
    return lambda x, w: F.linear_cross_entropy(x, w, p.targets, options=options)


def _liger_dpo(p: Problem) -> Head:
    """In chunks of pairs, not its default of a single one where completions are short."""
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
