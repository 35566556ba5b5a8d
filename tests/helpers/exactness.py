"""Compares a packed row of prompt groups with the same completions run alone, each in its own forward.

"Alone" is the definition: transformers' forward of prompt + completion with the model's own attention, then
log-softmax, a sum, the loss, and autograd. Of this package it uses only the loss functions, which have their own tests.

The rule of ``numerics.py`` is applied as follows. In fp64, it is applied to every gradient separately, with a floor for
the parts that transformers keeps in fp32 (``FLOOR``). In fp32 and bf16, the gradient errors of a small model consist of
a few shared roundings, so it is chance whether the error of a single tensor is larger or smaller than eager's. There
gradients are scaled by their own size, and pooled over six batches and over the parameters of a kind (``_KINDS``).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cpt_kernels.data.collate import PackedBatch, PackedCollator
from cpt_kernels.losses import Loss, PairLogps, build_loss
from cpt_kernels.model.packed_model import PackedModel, Scores
from tests.helpers.architectures import LENGTH_DEPENDENT, MIXTURES, STATES, VOCAB, tiny_model
from tests.numerics import assert_close

torch.set_num_threads(1)  # at tiny shapes, several threads are slower

Row = dict[str, Any]
Key = tuple[tuple[int, ...], tuple[int, ...]]  # (prompt, completion)

# With these options no loss saturates, so every pair has a gradient.
LOSSES = {
    "sigmoid": build_loss("sigmoid", beta=0.3, label_smoothing=0.1),
    "slic": build_loss("slic", slic_delta=40.0, slic_lambda=0.5),
    "sft": build_loss("sft"),
}

# transformers leaves some parts in fp32 after .double() (RMSNorm, RoPE, the softmax of eager attention and of routers).
# They round to about 1e-7 of their value, so two runs that agree to 1e-15 may be rounded differently.
FLOOR = 2e-6
FLOORS = {"gpt2": 1e-13, "gpt_neox": 1e-13, "phi": 1e-13}  # all in fp64

BATCHES = 6
_KINDS = {
    "head": r"lm_head|embed_out",
    "embedding": r"embed|wte|wpe",
    "vectors": r"norm|ln_|bias|sinks",
    "attention": r"attn|attention",
    "mlp": "",
}

# (prompt length, completion lengths, pairs of (chosen, target, rejected)). They include 1 to 4 completions, a one-token
# prompt, one-token completions and a completion in no pair. Those in _LONG exceed 16 tokens, the limit of the
# length-dependent RoPE variants.
_GROUPS: list[tuple[int, list[int], list[tuple[int, int, int]]]] = [
    (1, [1, 5], [(0, 0, 1)]),
    (7, [3, 1, 6, 2], [(0, 3, 1), (0, 3, 2), (3, 3, 1)]),
    (4, [4], []),
    (9, [2, 4, 1], [(0, 2, 1)]),
    (3, [6, 2], [(1, 1, 0)]),
    (5, [1, 3, 2], [(1, 1, 0), (1, 2, 2), (0, 0, 2)]),
]
_LONG = [
    (20, [9, 1], [(1, 0, 0)]),
    (15, [1, 8, 4], [(0, 1, 1), (2, 1, 1)]),
    (14, [2, 1], [(0, 0, 1)]),
]


def make_rows(loss: str, *, long: bool = False, seed: int = 0) -> list[Row]:
    """Returns rows in the form of ``data/tokenize.py``, with pairs for sigmoid and slic and without for sft."""
    random = np.random.default_rng(seed)
    rows = []
    groups = _GROUPS + _LONG * long
    for g in random.permutation(len(groups)) if seed else range(len(groups)):
        prompt, lengths, edges = groups[g]
        first = random.permutation(np.arange(3, VOCAB))[
            : len(lengths)
        ]  # distinct first tokens make all completions distinct
        completions = [[int(f), *map(int, random.integers(3, VOCAB, n - 1))] for f, n in zip(first, lengths)]
        chosen, targets, rejected = (list(side) for side in zip(*edges)) if edges else ([], [], [])
        if loss == "sft":
            chosen, targets, rejected = list(range(len(lengths))), list(range(len(lengths))), []
        rows.append(
            {
                "prompt_ids": random.integers(3, VOCAB, prompt).tolist(),
                "completion_ids": completions,
                "chosen": chosen,
                "rejected": rejected,
                "targets": targets,
            }
        )
    return rows


def reference_logps(prompt: Sequence[int], completion: Sequence[int]) -> np.ndarray:
    """Returns log-probs that depend on prompt and completion. They are multiples of 1/8, so sums are exact."""
    return np.array([-((sum(prompt) + 5 * token) % 29 + 1) / 8 for token in completion], dtype=np.float32)


@dataclass
class Result:
    """The values to compare. Keys are token ids, so that the order of completions and pairs does not matter."""

    completion_logps: dict[Key, Tensor]
    losses: dict[tuple[Key, ...], Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("completion_logps", "losses"):
            values = getattr(self, name)
            if values:
                yield name, torch.stack([values[key] for key in sorted(values)]).detach()
        yield from ((f"grad {name}", grad) for name, grad in self.grads.items())


def assert_equal(result: Result, reference: Result, floor: float) -> None:
    """Compares log-probs, losses and every gradient of ``result``, one by one; both in fp64."""
    tensors = dict(reference.tensors())
    for name, tensor in result.tensors():
        assert_close(tensor, tensors[name], tensors[name].double(), name, floor)


def assert_as_exact(results: list[Result], eager: list[Result], reference: list[Result], eps: float) -> None:
    """Applies the rule to log-probs, losses and the gradients of ``results``, pooled over several batches."""
    pools: dict[str, list[list[Tensor]]] = {}
    for batch in zip(results, eager, reference):
        found, *others = (dict(result.tensors()) for result in batch)
        for name, tensor in found.items():
            triple = [tensor, *(other[name] for other in others)]
            if name.startswith("grad "):
                size = triple[2].double().abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
                triple = [(t.double() / size).flatten() for t in triple]
            pools.setdefault(_pool(name), []).append(triple)
    for name, triples in pools.items():
        found, other, exact = (torch.cat(parts) for parts in zip(*triples))
        assert_close(found, other, exact.double(), name, eps)


def _pool(name: str) -> str:
    if not name.startswith("grad "):
        return name
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, name))


def sequences_of(rows: Sequence[Row]) -> list[Key]:
    """Returns the distinct (prompt, completion) of the rows."""
    return list(dict.fromkeys((tuple(r["prompt_ids"]), tuple(c)) for r in rows for c in r["completion_ids"]))


def _tokens_per_pair(rows: Sequence[Row]) -> float:
    lengths = [len(row["completion_ids"][i]) for row in rows for i in row["chosen"]]
    return sum(lengths) / max(len(lengths), 1)


class WithoutFp32(TorchFunctionMode):
    """Runs in fp64 what transformers computes in fp32 whatever the weights are.

    Else the reference of a recurrence would be rounded as eager's is, and not as that of a packed row.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return Tensor.double(*args)
        wider = [torch.float64 if arg is torch.float32 else arg for arg in args]
        return func(*wider, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@functools.cache
def alone(name: str, weights: torch.dtype, dtype: torch.dtype, loss: str) -> tuple[list[Result], list[Routing | None]]:
    """Runs an architecture's batches alone in ``dtype``, with weights rounded to ``weights``; also returns routings."""
    model = tiny_model(name, dtype, weights=weights)
    results, routings = [], []
    for seed in range(BATCHES):
        rows = make_rows(loss, long=name in LENGTH_DEPENDENT, seed=seed)
        routing = None
        if name in MIXTURES:
            recorded = None if dtype == torch.float64 else alone(name, weights, torch.float64, loss)[1][seed]
            routing = Routing(model, recorded)
        model.zero_grad()
        with WithoutFp32() if name in STATES and dtype == torch.float64 else contextlib.nullcontext():
            results.append(run_alone(model, rows, LOSSES[loss], routing))
        routings.append(routing)
    return results, routings


def run_alone(model: nn.Module, rows: Sequence[Row], loss: Loss, routing: Routing | None = None) -> Result:
    """Runs every completion in its own forward, and one backward from the sum of the pairs' losses."""
    logps = {}
    for sequence in sequences_of(rows):
        prompt, completion = sequence
        _forget_longest(model)
        with routing.of(sequence) if routing else contextlib.nullcontext():
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
        logits = logits[0, len(prompt) - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
        logps[sequence] = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
    losses = {}
    for row in rows:
        sequences = [(tuple(row["prompt_ids"]), tuple(c)) for c in row["completion_ids"]]
        sides = zip(row["chosen"], row["targets"], *([row["rejected"]] if row["rejected"] else []))
        for chosen, target, *rejected in ([sequences[i] for i in pair] for pair in sides):
            losses[(chosen, target, *rejected)] = loss(
                _pair_logps(logps, chosen, target, *rejected, tokens_per_pair=_tokens_per_pair(rows))
            )[0]
    torch.stack(list(losses.values())).sum().backward()
    detached = ({key: value.detach() for key, value in values.items()} for values in (logps, losses))
    return Result(*detached, gradients(model))


def _pair_logps(logps: dict, chosen, target, rejected=None, *, tokens_per_pair: float) -> PairLogps:
    def of(sequence: Key | None) -> list[Tensor | None]:
        if sequence is None:
            return [None] * 3
        value = logps[sequence]
        reference = value.new_tensor([reference_logps(*sequence).sum()])
        return [value[None], value.new_tensor([len(sequence[1])]), reference]

    (w, nw, rw), (y, ny, _), (x, nx, rx) = of(chosen), of(target), of(rejected)
    return PairLogps(w, x, y, nw, nx, ny, rw, rx, tokens_per_pair)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of all trained parameters; zeros for those without a gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def _forget_longest(model: nn.Module) -> None:
    """Resets dynamic NTK, which scales RoPE by the longest sequence that the model has seen."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for prefix, kind in ((f"{k}_", v) for k, v in kinds.items()) if isinstance(kinds, dict) else [("", kinds)]:
            if kind and "dynamic" in kind:
                original = getattr(module, f"{prefix}original_inv_freq")
                module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def make_batch(rows: Sequence[Row], packed: PackedModel | None = None, **options) -> PackedBatch:
    """Collates rows with the log-probs of ``reference_logps``."""
    limit = packed.share_limit if packed else None
    return PackedCollator(
        reference=lambda s: np.concatenate([reference_logps(*each) for each in s]), share_limit=limit, **options
    )(rows)


def run_packed(
    packed: PackedModel,
    rows: Sequence[Row],
    loss: Loss,
    *,
    batch: PackedBatch | None = None,
    share: bool = True,
    routing: Routing | None = None,
    **options,
) -> Result:
    """Runs forward and backward of all rows as one packed batch, or of ``batch``; options are ``PackedModel``'s."""
    batch = make_batch(rows, packed, share_prompts=share) if batch is None else batch
    with routing.of(*sequences_in(batch), lengths=batch["segment_lengths"]) if routing else contextlib.nullcontext():
        scores = packed(batch, loss, tokens_per_pair=_tokens_per_pair(rows), **options)
        scores.loss.backward()
    return packed_result(packed.model, batch, scores)


def packed_result(model: nn.Module, batch: PackedBatch, scores: Scores) -> Result:
    sequences = sequences_in(batch)
    sides = [batch[name].tolist() for name in ("chosen", "sft_targets", "rejected") if batch[name] is not None]
    pairs = [tuple(sequences[i] for i in pair) for pair in zip(*sides)]
    losses = [] if scores.losses is None else scores.losses
    return Result(dict(zip(sequences, scores.completion_logps)), dict(zip(pairs, losses)), gradients(model))


def sequences_in(batch: PackedBatch) -> list[Key]:
    """Returns the (prompt, completion) of every completion of a batch, read from its predictions and the keys."""
    row, before = batch["input_ids"][0].tolist(), {}
    for keys in batch["kv_index"].split([k for _, k in batch["segment_lengths"]]):
        before |= zip(keys[1:].tolist(), keys.tolist())  # the token before each one on its path
    index = slice(None) if batch["token_index"] is None else batch["token_index"]
    lengths = batch["completion_lengths"]
    found = []
    for targets, predictors in zip(*(batch[n][index].split(lengths) for n in ("targets", "predictor_index"))):
        at, prompt = predictors[0].item(), []
        while at is not None:
            prompt, at = [row[at], *prompt], before.get(at)
        found.append((tuple(prompt), tuple(targets.tolist())))
    return found


def freeze_head(model: nn.Module) -> None:
    """Freezes the output head, and with tied weights the embedding."""
    model.get_output_embeddings().requires_grad_(False)


class Routing:
    """The experts of every token in a mixture of experts, recorded in one run and reused in the other runs.

    Rounding can flip the choice between two experts with nearly equal scores, and the error is then as large as the
    output itself. With free routing, eager's own error would be of that size, and the rule could not fail. So all runs
    use the experts that the fp64 run chose. Each run still computes its own expert weights.
    """

    def __init__(self, model: nn.Module, recorded: Routing | None = None):
        self.choices: dict[Key, dict[int, Tensor]] = {} if recorded is None else recorded.choices
        self.record = recorded is None
        self.routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
        assert self.routers

    @contextlib.contextmanager
    def of(self, *sequences: Key, lengths: Sequence[tuple[int, int]] | None = None) -> Iterator[None]:
        """Forces these sequences' experts in forwards and recomputations; ``lengths``: (queries, keys) of each."""
        topk = torch.topk

        def choose(layer: int, scores: Tensor, k: int, **_):
            if self.record:
                (sequence,) = sequences
                values, chosen = topk(scores, k, dim=-1)
                self.choices.setdefault(sequence, {})[layer] = chosen
                return values, chosen
            parts = [self.choices[sequence][layer] for sequence in sequences]
            if lengths is not None:
                parts = [part[-queries:] for part, (queries, _) in zip(parts, lengths)]
            chosen = torch.cat(parts)
            return scores.gather(-1, chosen), chosen

        def routed(layer: int, forward):
            def run(*args):
                torch.topk = lambda scores, k, **kwargs: choose(layer, scores, k, **kwargs)
                try:
                    return forward(*args)
                finally:
                    torch.topk = topk

            return run

        for layer, router in enumerate(self.routers):
            router.forward = routed(layer, router.forward)
        try:
            yield
        finally:
            for router in self.routers:
                del router.forward
