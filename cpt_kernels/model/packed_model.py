"""Runs a transformers causal language model on batches of prompt groups: log-probs or a preference loss in one forward.

The head runs *as* the forward of the model's ``lm_head``, inside the forward of the wrapped model, so that the hooks of
DDP, FSDP and DeepSpeed see every module run. The model's forward then returns a single number in place of logits: 0,
with the gradient of the loss. The model may scale or cap its logits; both map 0 to 0 with a known derivative.

Packed rows are exact only for some architectures. So :class:`PackedModel` proves on a few tokens, when it is made, that
the model runs a packed row as it runs each completion alone. If it does not, completions run in padded rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from ..data.collate import PackedBatch, PackedCollator
from ..data.images import ImageReader
from ..errors import UnavailableError, UserError
from ..losses import Loss, PairLogps
from ..ops.attention import AttentionLayout
from ..ops.attention.segments import SEGMENTWISE
from ..ops.attention.select import kernels_of
from ..ops.exchange import SequenceGroup
from ..ops.gather import TokenMap, gather_rows, segment_sum
from ..ops.head.tiles import completion_tokens
from ..ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss
from ..ops.vocab_score import VocabScore
from .adapters import check_adapters, invocations, marked_tokens
from .conditions import (
    PinnedRouting,
    gathered,
    is_of_machine,
    is_sharded,
    magnified,
    perturbed,
    undisturbed,
    why_not_finite,
)
from .heads import find_head_options, head_operands, head_options, logits_logps
from .hooks import (
    attention_over,
    bitsandbytes_layers,
    in_training_mode,
    lacks_window,
    length_dependent_rotaries,
    packed_forward,
    recorded_windows,
    replaced_forward,
    rope_length_limit,
    rope_per_sequence,
    set_attention,
)
from .images import (
    image_blocks,
    image_inputs,
    image_probe,
    own_inputs,
    packed_positions,
    run_forwards,
    shared_features,
    whole_rows,
)
from .proof import Probe, Truth, check_architecture, find_truth, in_given_order, projected_gradients, run_parts
from .sequence_groups import OwnRows, whole_router_logits
from .states import StateLayout, prepare_state_layers, state_row, unpackable_layers

logger = logging.getLogger(__name__)

Packing = Literal["auto", "true", "false"]

_BY_ROWS = "takes the images of each row in its own forward, because no separate call encodes them exactly"


class Scores(NamedTuple):
    """Result of :meth:`PackedModel.__call__`, for S completions of M tokens and P pairs of the batch."""

    tokens: VocabScore  # (M,) each
    completion_logps: Tensor  # (S,) sums of token log-probs, each times its weight
    loss: Tensor | None = None  # () sum over the pairs; its gradient flows through the model's output
    losses: Tensor | None = None  # (P,) without gradient
    aux_loss: Tensor | None = None  # () load-balancing loss of a mixture of experts, over the packed row's tokens
    pair_logps: PairLogps | None = None  # (P,) each, without gradient: the input of the loss


@dataclass
class PackedModel:
    """A causal language model prepared for batches of prompt groups, and proven to run them exactly.

    Args:
        model: a transformers model or a PEFT model around one, not wrapped for distribution.
        head_memory_mb: memory budget of a tile of logits, see :class:`HeadOptions`.
        attention_backend: backend for packed rows, see :func:`cpt_kernels.ops.attention.shared_prompt_attention`.
        packing: "true" runs all completions of a batch in one packed row, "false" each in a padded row of its own, and
            "auto" takes the packed row if the proof holds for it.
        images: reads images, for a model whose prompts have some; the proof then has images, too.
        group: ranks that run every packed row together, each a part of its tokens; they must call this object at the
            same time with the same batch. Parameters then have gradients whose mean over the ranks is the gradient.

    Attributes:
        padded: whether completions run in padded rows. The collator must agree: ``PackedCollator(padded=...)``.
        trees: whether sequences may share other beginnings than prompts in a packed row; `tree_failure` says why not.
        bidirectional: whether the tokens of an image, or of a prompt, attend to each other in both directions in a
            packed row.
        has_gradient: whether a trained parameter changes log-probs, as far as the proof has compared gradients.
        noisy: whether the model adds noise to itself in training mode; the trainer measures and sets it.
        share_limit: sequences longer than this must not share their prompt; None without a limit. See
            :func:`rope_length_limit`.
        options: how the model's logits follow from the head's product; None if log-probs are taken from the model's own
            logits, because they do not follow from a product, a scale and a soft-cap.

    Raises:
        UserError: the model is not causal, or it does not run completions exactly in the way that was asked for.
    """

    model: nn.Module
    head_memory_mb: float | None = None
    attention_backend: str = "auto"
    packing: Packing = "auto"
    images: ImageReader | None = None
    group: SequenceGroup | None = None
    padded: bool = field(default=False, init=False)
    trees: bool = field(default=False, init=False)
    tree_failure: str = field(default="", init=False)
    noisy: bool = field(default=False, init=False)
    bidirectional: bool = field(default=False, init=False)
    has_gradient: bool = field(default=True, init=False)
    options: HeadOptions | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        base = base_model(self.model)
        check_architecture(base)
        check_adapters(self.model)
        if self.attention_backend not in SEGMENTWISE:
            kernels_of(self.attention_backend)  # an unknown name raises here
        self.rotaries = length_dependent_rotaries(base)
        self.quantized = bitsandbytes_layers(base)
        self.invocations = invocations(self.model)
        self.batch_norms = [module for module in base.modules() if isinstance(module, _BatchNorm)]
        self.share_limit = rope_length_limit(self.rotaries)
        self.options = head_options(base, self.head_memory_mb)
        self.state_layers = prepare_state_layers(base)
        self._check_group(base)
        by_rows = self.images is not None and self.images.by_rows
        if by_rows and self.packing == "true":
            raise UserError(f"{type(base).__name__} {_BY_ROWS}: set packing=auto")
        unpackable = by_rows or bool(unpackable_layers(base))
        self.padded = self.packing == "false" or (self.packing == "auto" and unpackable)
        self.trees = not self.padded
        # Ranks of a group run the proof together, which shows that the model can be cut. A rank with weights that has
        # a rank without them in its group runs it alone.
        group = self.group
        if group is not None and not all(gather_object([self.is_proven])):
            self.group = None
        try:
            if self.is_proven:
                with undisturbed(self.model), gathered(self.model), in_training_mode(self.quantized):
                    self._prove(base)
        finally:
            self.group = group

    def _check_group(self, base: PreTrainedModel) -> None:
        """Raises UserError for what is known not to run on a part of a packed row; the proof finds the rest."""
        if self.group is None:
            return
        needs = f"sp_size={self.group.size} needs packed rows of text"
        if self.packing == "false" or self.padded:
            raise UserError(f"{needs}: leave out packing=false, or sp_size for models that run in padded rows")
        if self.images is not None:
            raise UserError(f"{needs}: leave it out for rows with images")
        if kinds := {type(layer).__name__ for layer in self.state_layers}:
            raise UserError(
                f"{needs}, and layers of {type(base).__name__} carry a state from token to token"
                f" ({', '.join(sorted(kinds))}), so that no process can run a part of a row alone: leave it out"
            )

    @property
    def is_proven(self) -> bool:
        """Whether this process has the weights to run the proof; under FSDP perhaps only the first process has them.

        Others take over what it found, see :meth:`agree`.
        """
        return not any(p.is_meta for p in self.model.parameters())

    def agree(self) -> None:
        """Makes all ranks run completions in the same way; all ranks must call it.

        Padded rows are exact for every model, so one rank that needs them decides for all.

        Raises:
            UserError: no rank has weights to run a proof with.
        """
        base = base_model(self.model)
        by_rows = self.images is not None and self.images.by_rows
        own = (self.padded, self.options, self.bidirectional, self.trees, by_rows)
        found = gather_object([own if self.is_proven else None])
        proven = [each for each in found if each is not None]
        if not proven:
            raise UserError(
                f"no process holds the weights of {type(base).__name__}: load them before the model is prepared"
            )
        worst = max(proven, key=lambda each: (each[0], each[4], each[1] is None))
        self.padded, self.options, self.bidirectional, _, by_rows = worst
        self.images = None if self.images is None else dataclasses.replace(self.images, by_rows=by_rows)
        self.trees = all(each[3] for each in proven)
        self._check_group(base)
        if not self.is_proven and not self.padded:
            base.set_attn_implementation(attention_over(base.config.get_text_config()._attn_implementation))

    def _prove(self, base: PreTrainedModel) -> None:
        """Takes the first way of running completions whose log-probs are those of the model's own forward."""
        name, attention = type(base).__name__, base.config.get_text_config()._attn_implementation
        asked = self.attention_backend
        try:
            # A kernel that was asked for may need a GPU, where the model is not yet, and half precision.
            if asked not in SEGMENTWISE and base.device.type == "cpu":
                self.attention_backend = "auto"
            with perturbed(self.model):
                conclusion = self._conclude(base, attention, may_repeat=True)
                if conclusion is None:
                    self.attention_backend = asked if asked in SEGMENTWISE else "auto"
                    with magnified(self.model):
                        conclusion = self._conclude(base, attention, may_repeat=False)
        finally:
            self.attention_backend = asked
        assert conclusion is not None, "the second proof is final"
        is_exact, failures = conclusion
        if not is_exact:
            hint = "; set packing=auto to run each completion in a padded row" if self.packing == "true" else ""
            if self.group is not None:
                hint = f"; sp_size={self.group.size} needs packed rows of text: leave it out"
            raise UserError(f"{name} does not run completions exactly: {'; '.join(failures)}{hint}")
        set_attention(base, attention if self.padded else attention_over(attention))
        if failures:
            logger.warning("%s runs each completion in a padded row: %s", name, failures[0])

    def _conclude(self, base: PreTrainedModel, attention: str, *, may_repeat: bool) -> tuple[bool, list[str]] | None:
        """Tries the ways of running completions in turn, with the model's weights as they are now.

        Returns:
            Whether a way is exact, which `padded` and `options` are then, and why the ways before it are not; None if
            the proof must be repeated with weights in fp32 that tell more, which it may.

        Raises:
            UserError: the model is not causal, its logits are not finite, or nothing can be proven of it.
        """
        # Flash attention does not run on a CPU, where the model may be until the trainer moves it.
        runnable = "sdpa" if "flash" in attention and (base.device.type == "cpu" or not may_repeat) else attention
        probes = self.probes()
        parameters = self._compared_parameters(base)

        def own(ids: Tensor, probe: Probe = probes[0]) -> Tensor:
            try:
                more = {} if self.images is None else own_inputs(base, self.images, probe.images, probe.sequences, ids)
                return self.model(input_ids=ids, use_cache=False, **more).logits
            except Exception as error:  # whatever a model raises that needs more inputs
                if isinstance(error, UserError) or is_of_machine(error):
                    raise
                kind = type(base).__name__
                raise UserError(f"{kind} does not run on token ids alone: {type(error).__name__}: {error}") from error

        set_attention(base, runnable)
        routings = [PinnedRouting() for _ in probes]
        truths = [find_truth(partial(own, probe=p), p, r, parameters) for p, r in zip(probes, routings)]
        if not all(truth.logps.isfinite().all() for truth in truths):
            raise UserError(f"{type(base).__name__} gives logits that are not finite: {why_not_finite(base)}")
        if may_repeat and not all(truth.is_clear() for truth in truths):
            return None
        for truth in truths:
            truth.check(type(base).__name__)
        self.has_gradient = not parameters or any(truth.has_gradient() for truth in truths)

        # Packed rows, padded rows, and padded rows with the model's own logits, as far as they are asked for.
        options = find_head_options(base, head_options(base, self.head_memory_mb), own, probes[0])
        images, is_padded = self.images, self.packing != "true" and self.group is None
        by_rows = images is not None and images.by_rows
        marks = images is not None and images.marks_blocks
        blocks = [*([True] if marks else []), False] if self.packing != "false" and not by_rows else []
        ways = [(False, options, both, trees, images) for both in blocks for trees in (True, False)]
        readers = [images] if images is None or by_rows else [images, dataclasses.replace(images, by_rows=True)]
        heads = [options] + [None] * (options is not None)
        ways += [(True, head, False, False, reader) for reader in readers for head in heads if is_padded]
        failures = [_BY_ROWS] if by_rows else []
        for self.padded, self.options, self.bidirectional, self.trees, self.images in ways:
            set_attention(base, runnable if self.padded else attention_over(runnable))
            tries = (self._try(base, *each, parameters) for each in zip(probes, routings, truths))
            failure = next(filter(None, tries), None)
            if failure is None:
                return True, failures
            if may_repeat and truths[0].is_coarse:  # rounding of bf16 and fp16 is as large as a small fault
                return None
            if self.trees:
                self.tree_failure = failure
            else:
                failures.append(failure)
        return False, failures

    def _compared_parameters(self, base: PreTrainedModel) -> list[nn.Parameter]:
        """Returns the parameters whose gradient the proof compares: an adapter's, or the head's and the first layer's.

        A backward reaches the first layer through all others. An engine that shards weights computes gradients only in
        its own backward, so none is compared there.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if any(map(is_sharded, self.model.parameters())):
            return []
        if hasattr(self.model, "peft_config"):
            return list(trained.values())
        head = base.get_output_embeddings()
        ends = [] if head is None else [p for p in head.parameters() if p.requires_grad]
        layers = [(match[0], p) for name, p in trained.items() if (match := re.match(r".*?\.\d+\.", name))]
        return [*ends, *(p for layer, p in layers if layer == layers[0][0])]

    def _try(
        self,
        base: PreTrainedModel,
        probe: Probe,
        routing: PinnedRouting,
        truth: Truth,
        parameters: list[nn.Parameter],
    ) -> str | None:
        """Runs the probe as training would. Returns why that is not exact, or None if it is."""
        way = "in padded rows" if self.padded else "in a packed row"
        way += " with images" if probe.images else ""
        if not self.padded and self.options is None:
            return f"{way} its logits would not be those of a linear head with a scale and a soft-cap"
        if not self.padded and not base._can_set_attn_implementation():
            return f"{way} its attention cannot be replaced (it does not use transformers' AttentionInterface)"
        if not self.padded and (kinds := unpackable_layers(base)):
            return f"{way} its layers of the kind {', '.join(sorted(kinds))} are not supported"
        if not self.padded and self.invocations:
            return f"{way} an aLoRA adapter would look for its invocation in the row, not in each sequence"
        try:
            batch = self.probe_batch(probe)
            with recorded_windows() as windows, torch.set_grad_enabled(bool(parameters)):
                rows, cut = len(batch["input_ids"]), self.own_tokens(batch)
                with routing.follow(*run_parts(batch), rows, cut):
                    logps = in_given_order(self(batch).tokens.logps, batch)
                gradients = projected_gradients(logps, probe, parameters) if parameters else []
                if self.group is not None:
                    gradients = [None if g is None else self.group.sum(g) / self.group.size for g in gradients]
        except Exception as error:  # anything that a forward does with masks and positions that it does not expect
            if isinstance(error, UnavailableError) or is_of_machine(error):
                raise
            return f"{way} its forward fails ({type(error).__name__}: {error})"
        if not (difference := truth.difference(logps)) <= truth.bound:
            return f"{way} log-probs differ by {difference:.2g} from those of each completion alone"
        if difference := truth.gradient_difference(gradients):
            return f"{way} gradients differ by {difference:.2g} of their size from those of each completion alone"
        if not self.padded and lacks_window(base, windows):
            return f"{way} a layer would not know its sliding window"
        return None

    def probes(self) -> list[Probe]:
        """Returns the probes of a proof: tokens, and for a model that reads images, also tokens with images."""
        base = base_model(self.model)
        text = Probe.of(base, marked_tokens(self.model))
        return [text] if self.images is None else [text, image_probe(base, self.images)]

    def own_tokens(self, batch: PackedBatch) -> slice:
        """Returns which tokens of the packed row this process runs: all without a group."""
        return slice(None) if self.group is None else self.group.own(batch["input_ids"].shape[1])

    def probe_batch(self, probe: Probe) -> PackedBatch:
        """Returns the tokens of a proof as a batch on the model's device, packed or padded as in training."""
        collator = PackedCollator(
            padded=self.padded,
            share_limit=self.share_limit,
            pad_token_id=probe.pad,
            images=self.images,
            minimum_shared=1 if self.trees else None,
        )
        batch = collator.pack(probe.sequences, [], [], [], probe.images)
        return cast("PackedBatch", send_to_device(batch, base_model(self.model).device))

    def __call__(
        self,
        batch: PackedBatch,
        loss: Loss | None = None,
        *,
        wrapped: nn.Module | None = None,
        general: bool = False,
        statistics: bool = False,
        tokens_per_pair: Tensor | float = 1.0,
        aux_loss: bool = False,
    ) -> Scores:
        """Runs a packed batch.

        Args:
            loss: loss over the batch's pairs. Without one, only log-probs are computed, with gradient if it is enabled.
            wrapped: the model as DDP, FSDP or DeepSpeed wrapped it; default the model itself.
            general: keep token and completion log-probs differentiable beside the loss.
            statistics: compute entropy, mean logit, top-1 and log sum p^2 of every token.
            tokens_per_pair: see :class:`PairLogps`.
            aux_loss: compute the load-balancing loss of a mixture of experts.
        """
        base = base_model(self.model)
        for module in self.batch_norms:  # statistics of a micro-batch would depend on its other rows
            module.eval()
        head, group = base.get_output_embeddings(), self.group
        scores: list[Scores] = []  # head_forward leaves its result here, because the model returns only logits
        parts: list[Tensor] = []  # hidden rows of each forward

        def head_forward(part: Tensor, *_, **__) -> Tensor:
            parts.append(part)
            if len(parts) < len(batch["image_rows"]):
                return part.new_zeros(1, 1, 1)
            hidden = whole_rows(batch, parts)
            result = self._run_head(head, hidden, batch, loss, general, statistics, tokens_per_pair)
            scores.append(result)
            if result.loss is None:
                return result.tokens.logps.new_zeros(1, 1, 1)
            # The model multiplies this by its logit scale; the division makes the gradient that of the loss.
            return ((result.loss - result.loss.detach()) / self.options.logit_scale).reshape(1, 1, 1)

        def own(row: Tensor) -> Tensor:  # (1, T) -> (1, tokens of this rank)
            return row if group is None else group.take(row, 1)

        inputs: dict[str, Any] = {"input_ids": own(batch["input_ids"]), "use_cache": False}
        with contextlib.ExitStack() as stack:
            if aux_loss:
                if batch["image_rows"]:
                    raise UserError(f"{type(base).__name__} {_BY_ROWS}: set router_aux_loss_coef=0")
                inputs["output_router_logits"] = True
                stack.enter_context(whole_router_logits(base, group, batch["input_ids"].shape[1]))
            stack.enter_context(in_training_mode(self.quantized))
            if self.options is not None:
                stack.enter_context(replaced_forward(head, head_forward))
            # In padded rows attention, masks and positions are the model's own. A causal model needs no mask for the
            # pads, because they come last; but the load-balancing loss must leave them out.
            if self.padded and aux_loss:
                inputs["attention_mask"] = batch["attention_mask"]
            if self.padded and self.invocations:
                inputs["input_ids"] = self._without_invocations_in_pads(batch)
            inputs |= image_inputs(base, batch, self.padded)
            stack.enter_context(shared_features(base, batch))
            segments = batch["segment_lengths"]
            if not self.padded:
                stack.enter_context(packed_forward())
                positions = cast("Tensor", packed_positions(base, batch))
                stack.enter_context(rope_per_sequence(self.rotaries, self.share_limit, segments, positions, group))
                inputs["position_ids"] = own(positions)
                layout = AttentionLayout.of(batch, group)
                if self.bidirectional and self.images is not None:
                    layout.blocks = image_blocks(batch, self.images)
                inputs |= {"layout": layout, "attention_backend": self.attention_backend}
                if self.state_layers:
                    inputs["state_layout"] = StateLayout(segments, batch["input_ids"].device)
                    stack.enter_context(state_row(inputs["state_layout"]))
            outputs = run_forwards(base, self.model, wrapped, batch, inputs, group)
        if self.options is None:
            logits = whole_rows(batch, [each.logits for each in outputs])
            result = self._score_logits(logits, batch, loss, statistics, tokens_per_pair)
            return result._replace(aux_loss=_aux_loss(outputs[-1], result.completion_logps) if aux_loss else None)
        (result,) = scores
        if result.loss is not None:
            # The value of the loss, with the gradient that arrives through the wrapped model's output.
            result = result._replace(loss=result.loss.detach() + outputs[-1].logits.sum())
        return result._replace(aux_loss=_aux_loss(outputs[-1], result.completion_logps) if aux_loss else None)

    def _without_invocations_in_pads(self, batch: PackedBatch) -> Tensor:
        """Returns the token ids with pads of a token that is in no invocation, because PEFT searches the pads, too."""
        taken = {token for invocation in self.invocations for token in invocation}
        pad = next(token for token in range(len(taken) + 1) if token not in taken)
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)

    def _run_head(
        self,
        head: nn.Module,
        hidden: Tensor,  # (T, H), or the rows of this rank's tokens
        batch: PackedBatch,
        loss: Loss | None,
        general: bool,
        statistics: bool,
        tokens_per_pair: Tensor | float,
    ) -> Scores:
        """Computes log-probs, and the loss if there is one, from the hidden rows; arguments as of :meth:`__call__`."""
        own = None if self.group is None else OwnRows.of(batch, self.group)
        index = (batch["predictor_index"], batch["predictor_rounds"]) if own is None else own[1:3]
        rows = gather_rows(hidden, *index)
        statistics = statistics or (own is not None and loss is not None and loss.needs_log_sum_sq)
        options = dataclasses.replace(self.options, statistics=statistics)
        operands = head_operands(head, rows)
        if operands is None:  # an adapter that was not there, or not active, when the model was proven
            raise UserError(
                "an adapter on the output head changed after the trainer was made: only plain LoRA can be switched"
                " on then; make the trainer with the adapters that it trains"
            )
        rows, weight, bias = operands
        if own is not None:
            # One tile of a trained head is kept, scored, until the loss of all ranks' tokens has weighed its rows.
            tokens = linear_logprobs(rows, weight, own.targets, bias, options)
            return _weigh(own.whole(tokens, self.group), batch, loss, tokens_per_pair)
        if loss is None:
            tokens = linear_logprobs(rows, weight, batch["targets"], bias, options)
            return _weigh(tokens, batch, None, tokens_per_pair)
        pairs = _pairs(batch, tokens_per_pair)
        out = linear_preference_loss(rows, weight, batch["targets"], pairs, loss, bias, options, general=general)
        with torch.no_grad():
            pair_logps = pairs.pair_logps(out.completion_logps, loss=loss, tokens=pairs.weigh(out.tokens))
        return Scores(out.tokens, out.completion_logps, out.loss, out.losses, pair_logps=pair_logps)

    def _score_logits(
        self,
        logits: Tensor,  # (S * L, V)
        batch: PackedBatch,
        loss: Loss | None,
        statistics: bool,
        tokens_per_pair: Tensor | float,
    ) -> Scores:
        """Computes log-probs and loss by autograd from the model's own logits; arguments as of :meth:`__call__`."""
        rows = gather_rows(logits, batch["predictor_index"], batch["predictor_rounds"])
        statistics = statistics or (loss is not None and loss.needs_log_sum_sq)
        return _weigh(logits_logps(rows, batch["targets"], statistics), batch, loss, tokens_per_pair)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return cast("Any", model).get_base_model() if is_peft else cast("PreTrainedModel", model)


def _weigh(tokens: VocabScore, batch: PackedBatch, loss: Loss | None, tokens_per_pair: Tensor | float) -> Scores:
    """Computes the loss from differentiable log-probs of all predictions, by autograd."""
    rows, tokens = len(tokens.logps), completion_tokens(tokens, _shared_tokens(batch))
    weights = batch["token_weights"]
    logps = tokens.logps if weights is None else tokens.logps * weights
    completion_logps = segment_sum(logps, batch["cu_completions"])
    if loss is None:
        return Scores(tokens, completion_logps)
    pairs = _pairs(batch, tokens_per_pair)
    pairs.check(loss, completion_logps.device, rows)
    pair_logps = pairs.pair_logps(completion_logps, loss=loss, tokens=pairs.weigh(tokens))
    losses = pairs.losses(loss, pair_logps)
    return Scores(tokens, completion_logps, losses.sum(), losses.detach(), pair_logps=pair_logps)


def embedding_rows(model: nn.Module) -> int:
    """Returns the tokens that a model has embeddings of, also if ZeRO-3 has partitioned them."""
    weight = base_model(model).get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _pairs(batch: PackedBatch, tokens_per_pair: Tensor | float) -> Pairs:
    """Returns the pairs of a batch, with reference log-probs summed by completion."""
    ref = weighted_reference(batch)
    return Pairs(
        cu_completions=batch["cu_completions"],
        completion_lengths=batch["completion_lengths"],
        chosen=batch["chosen"],
        rejected=batch["rejected"],
        sft_targets=batch["sft_targets"],
        pair_blocks=batch["pair_blocks"],
        ref_logps=None if ref is None else segment_sum(ref, batch["cu_completions"]),
        tokens_per_pair=tokens_per_pair,
        ref_token_logps=ref,
        gaps=batch["gaps"],
        hard=batch["hard"],
        weights=batch["weights"],
        token_weights=batch["token_weights"],
        token_map=_shared_tokens(batch),
        prediction_lengths=batch["prediction_lengths"],
    )


def weighted_reference(batch: PackedBatch) -> Tensor | None:
    """Returns the reference log-probs of a batch's scored tokens, each times its weight, (M,); None without them."""
    ref, weights = batch["ref_token_logps"], batch["token_weights"]
    return ref if ref is None or weights is None else ref * weights


def _shared_tokens(batch: PackedBatch) -> TokenMap | None:
    index, order, offsets = batch["token_index"], batch["token_order"], batch["token_offsets"]
    return None if index is None or order is None or offsets is None else TokenMap(index, order, offsets)


def _aux_loss(outputs: Any, like: Tensor) -> Tensor | None:
    """Returns the load-balancing loss, () on the device of ``like``; None if the model computes none.

    transformers returns None, or the number 0, for a model that keeps no router logits.
    """
    value = getattr(outputs, "aux_loss", None)
    return None if value is None else torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())
