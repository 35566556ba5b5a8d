"""The proof that completions are run exactly: log-probs of a few tokens, as in training and by the model's own forward.

Nothing is assumed of the architecture. The truth is the model's own forward of each completion alone behind its
prompt, with the model's own attention, masks, positions and logits. The same forward in a batch measures how far
rounding moves a log-prob. The same forward of everything in one plain row measures how far a wrong layout would move
it. A proof counts only if the second distance is far above the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.collate import PackedBatch, Tokens
from ..data.images import ImageId, split_key
from ..data.packing import paths_of
from ..errors import UserError
from .conditions import PinnedRouting

OwnForward = Callable[[Tensor], Tensor]  # token ids (B, L) -> logits (B, L, V)

_SIGNAL = 8  # a wrong layout must move a log-prob by so many bounds to be told from rounding
_FP64_PARTS = 2e-8  # epsilon of an fp64 model, parts of which (routers, states) may compute in fp32
_GRADED = 2  # gradients are compared for the first completions of a probe, which share a prompt


@dataclass(frozen=True)
class Probe:
    """The tokens of a proof: two prompts, one of them with three uneven completions, which part one after the other.

    So they are a tree of four levels. Sequences are longer than a convolution's kernel, and the tokens are drawn by a
    fixed seed.
    """

    sequences: list[Tokens]  # with the keys of prompts
    pad: int
    device: torch.device
    dtype: torch.dtype  # the coarsest of the model's parameters
    images: Mapping[ImageId, Any] = field(default_factory=dict)  # of the prompts

    @classmethod
    def of(cls, model: Any, mark: Sequence[int] = ()) -> Probe:
        """The probe of a transformers model, within its vocabulary.

        Args:
            mark: tokens that change how a model runs the tokens after them. They lie in a prompt and in a completion.
        """
        draw = token_source(model)
        first, second = draw(4) + tuple(mark) + draw(5), draw(4)
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        pad = pad if isinstance(pad, int) and 0 <= pad < _vocabulary(model) else 0
        one, two, three = draw(5), draw(8), draw(3)
        two = one[:1] + two[1:]
        three = two[:2] + three[2:]
        sequences = [(first, one), (first, two), (first, three), (second, draw(2) + tuple(mark) + draw(4))]
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
        return cls(sequences, pad, model.device, max(dtypes, key=_eps, default=torch.float32))

    @property
    def tokens(self) -> list[Tokens]:
        """The sequences as token ids."""
        return [(tuple(split_key(prompt)[1]), completion) for prompt, completion in self.sequences]


def token_source(model: Any, without: Collection[int] = ()) -> Callable[[int], tuple[int, ...]]:
    """Returns a function that draws token ids of a model's vocabulary, the same ones for every source.

    Args:
        without: tokens that are not drawn.
    """
    size = _vocabulary(model)
    random = torch.Generator().manual_seed(0)
    low = min(5, size // 2)  # special tokens come first
    # Chameleon gives codes of images no probability at all.
    without = {*without, *getattr(getattr(model.base_model, "vocabulary_mapping", None), "image_tokens", ())}

    def draw(count: int) -> tuple[int, ...]:
        drawn: list[int] = []
        while len(drawn) < count:
            more = torch.randint(low, size, (count - len(drawn),), generator=random).tolist()
            drawn += [token for token in more if token not in without]
        return tuple(drawn)

    return draw


def _vocabulary(model: Any) -> int:
    config = model.config.get_text_config()
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty weight outside of forwards
    return min(rows, getattr(config, "vocab_size", None) or 1 << 30)


@dataclass(frozen=True)
class Truth:
    """What the model's own forward says of a probe."""

    logps: Tensor  # (N,) fp32 or fp64: of the tokens of all completions, each completion run alone behind its prompt
    noise: float  # how far a batch moves one of them
    epsilon: float  # how far rounding may move one of them at least
    fault: float  # how far one moves if completions see the sequences before them
    look_ahead: float  # how far one moves with the token after it
    is_coarse: bool = False  # computed in bf16 or fp16, whose rounding is as large as a small fault
    gradients: list[Tensor | None] = field(default_factory=list)  # of `project`, one per parameter asked for

    @property
    def bound(self) -> float:
        """The largest difference of a log-prob that rounding explains."""
        return 2 * self.noise + self.epsilon

    def is_clear(self) -> bool:
        """Whether a wrong layout can be told from rounding."""
        return self.fault > _SIGNAL * self.bound

    def difference(self, logps: Tensor) -> float:
        """The largest difference of log-probs (N,) from the truth; NaN where one is not finite."""
        return (logps.detach().to(self.logps) - self.logps).abs().max().item()

    def gradient_difference(self, gradients: Sequence[Tensor | None]) -> float:
        """The largest difference from the true gradients, relative to their size; 0 if rounding explains it.

        Rounding moves gradients by a similar share as log-probs, so `noise` and `fault` say what it explains.
        """
        true = [g for g in self.gradients if g is not None]
        if not true:
            return 0.0 if all(g is None or not g.any() for g in gradients) else float("inf")
        eps = max(_eps(g.dtype) for g in true)
        tolerance = eps**0.5 + 4 * self.noise / self.fault
        floor = 32 * eps * max(map(_largest, true))
        worst = 0.0
        for one, other in zip(self.gradients, gradients, strict=True):
            if one is None and other is None:
                continue
            both = one is not None and other is not None
            difference = _largest(one - other) if both else max(_largest(one), _largest(other))
            size = _largest(one)
            if not difference <= tolerance * size + floor:
                worst = max(worst, difference / (size + floor))
        return worst

    def has_gradient(self) -> bool:
        """Whether any parameter that was asked for changes the log-probs."""
        return any(g is not None and bool(g.any()) for g in self.gradients)

    def check(self, name: str) -> None:
        """Raises UserError if the model is not causal, or if nothing can be proven of it."""
        if self.look_ahead > self.bound:
            raise UserError(
                f"{name} is not causal: a token's log-prob changes by {self.look_ahead:.2g} with the token after it;"
                " for an encoder, such as a BERT, set is_decoder=True in its config"
            )
        if not self.is_clear():
            raise UserError(
                f"{name} cannot be proven to run completions exactly: its own log-probs differ by {self.noise:.2g}"
                f" between one sequence alone and two of it in a batch, and by {self.fault:.2g} with another context"
            )


def find_truth(
    own: OwnForward,
    probe: Probe,
    routing: PinnedRouting | None = None,
    parameters: Sequence[nn.Parameter] = (),
) -> Truth:
    """Runs the model's own forward on the probe: each sequence alone, in a batch, and in a wrong layout.

    Args:
        routing: of a mixture of experts; the runs alone decide it, and all others follow.
        parameters: those whose gradient is computed from the runs alone.
    """
    device, sequences = probe.device, probe.tokens
    routing = PinnedRouting() if routing is None else routing

    def run(*rows: tuple[int, ...], parts: Sequence[tuple[int, ...]] = ()) -> Tensor:
        with routing.follow(parts or rows, rows=len(rows)):
            return own(torch.tensor(rows, device=device))

    # The truth, with a graph where gradients are asked for.
    alone = []
    for i, (p, c) in enumerate(sequences):
        with torch.set_grad_enabled(bool(parameters) and i < _GRADED):
            logits = run(p + c)[0]
            alone.append(_logps(logits, p, c))
    with torch.set_grad_enabled(bool(parameters)):
        gradients = projected_gradients(torch.cat(alone), probe, parameters) if parameters else []
    logps = torch.cat(alone).detach()

    with torch.no_grad():
        # Rounding: other shapes take other kernels. Both rows have one length, because frequencies of RoPE may depend
        # on the longest row of a batch. The second row has another last token, which no token before it may notice.
        longest = max(range(len(sequences)), key=lambda i: len(sequences[i][1]))
        p, c = sequences[longest]
        other = (*c[:-1], next(token for token in p if token != c[-1]))
        both = run(p + c, p + other, parts=[p + c] * 2)
        first, second = (_logps(row, p, tokens) for row, tokens in zip(both, (c, other)))
        # A wrong layout: all sequences in one plain row.
        everything = run(sum((p + c for p, c in sequences), ()), parts=[p + c for p, c in sequences])[0]
        misplaced, start = [], 0
        for p, c in sequences:
            misplaced.append(_logps(everything[start:], p, c))
            start += len(p) + len(c)
    epsilon, is_coarse = rounding_of(logps, (logits.dtype, probe.dtype))
    return Truth(
        logps=logps,
        noise=(alone[longest].detach() - first).abs().max().item(),
        epsilon=epsilon,
        fault=(logps - torch.cat(misplaced)).abs().max().item(),
        look_ahead=(first - second)[:-1].abs().max().item(),
        is_coarse=is_coarse,
        gradients=gradients,
    )


def run_parts(batch: PackedBatch) -> tuple[list[tuple[int, ...]], list[int]]:
    """Returns what a batch runs, as :meth:`PinnedRouting.follow` takes it.

    That is the tokens up to the end of each part, and how many of them an earlier part has run.
    """
    rows, segments = batch["input_ids"].cpu().numpy(), batch["segment_lengths"]
    if batch["attention_mask"] is not None:
        return [tuple(row[:queries].tolist()) for row, (queries, _) in zip(rows, segments)], []
    return [tuple(rows[0][path].tolist()) for path in paths_of(segments)], [
        keys - queries for queries, keys in segments
    ]


def in_given_order(values: Tensor, batch: PackedBatch) -> Tensor:
    """Returns values of completion tokens (M,) of a batch in the order of the sequences that it was made of."""
    parts = dict(zip(batch["order"], values.split(batch["completion_lengths"])))
    return torch.cat([parts[s] for s in range(len(parts))])


def projected_gradients(logps: Tensor, probe: Probe, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Returns the gradients of a fixed projection of log-probs (N,) of a probe by parameters; one backward."""
    count = sum(len(c) for _, c in probe.sequences[:_GRADED])
    directions = torch.arange(1, count + 1, device=logps.device).to(logps.dtype).sin()
    projection = logps[:count] @ directions
    if not projection.requires_grad:  # of a merged adapter
        return [None] * len(parameters)
    return list(torch.autograd.grad(projection, parameters, allow_unused=True))


def rounding_of(logps: Tensor, dtypes: Iterable[torch.dtype]) -> tuple[float, bool]:
    """Returns how far rounding may move one of ``logps`` (N,) at least, and whether a dtype is half precision.

    Args:
        dtypes: of the logits and of the weights.
    """
    eps = max(map(_eps, dtypes))
    is_coarse = eps > 1e-4
    # Half precision leaves a rounding of the logits beside the measured noise.
    return (2 if is_coarse else 32) * eps * (1 + logps.abs().max().item()), is_coarse


def _largest(values: Tensor | None) -> float:
    return 0.0 if values is None else torch.linalg.vector_norm(values, float("inf")).item()


def _eps(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps, _FP64_PARTS)


def _logps(logits: Tensor, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    rows = logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
    return rows.gather(-1, torch.tensor(completion, device=rows.device)[:, None])[:, 0]


def check_architecture(model: PreTrainedModel) -> None:
    """Raises UserError for a model that is refused without running it."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; only causal language models are supported")
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), Tensor):
        raise UserError(f"{name} has no single matrix of token embeddings, so it does not run on rows of text")
    if len(places := set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UserError(
            f"{name} is spread over devices ({', '.join(sorted(map(str, places)))}) by its device_map, but a packed row"
            " runs on one device: leave device_map out, and for several GPUs start a process on each (accelerate"
            " launch, torchrun)"
        )
