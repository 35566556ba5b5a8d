"""Runs a transformers causal language model on packed batches: log-probs or a preference loss in one forward.

The head runs *as* the forward of the model's ``lm_head``, inside the forward of the wrapped model, so that the hooks of
DDP, FSDP and DeepSpeed see every module run. The model's forward then returns a single number in place of logits: 0,
with the gradient of the loss. The model may scale or cap its logits; both map 0 to 0 with a known derivative.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.collate import PackedBatch
from ..errors import UserError
from ..losses import Loss, PairLogps
from ..ops.attention import AttentionLayout
from ..ops.gather import gather_rows, segment_sum
from ..ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss
from ..ops.vocab_score import VocabScore, vocab_score
from .hooks import (
    attention_over,
    bitsandbytes_layers,
    in_training_mode,
    length_dependent_rotaries,
    noise_per_sequence,
    packed_forward,
    replaced_forward,
    rope_length_limit,
    rope_per_sequence,
)


class Scores(NamedTuple):
    """Result of :meth:`PackedModel.__call__`, for N tokens, S completions and P pairs of the batch."""

    tokens: VocabScore  # (N,) each
    completion_logps: Tensor  # (S,)
    loss: Tensor | None = None  # () sum over the pairs; its gradient flows through the model's output
    losses: Tensor | None = None  # (P,) without gradient
    aux_loss: Tensor | None = None  # () load-balancing loss of a mixture of experts, over the packed row's tokens
    pair_logps: PairLogps | None = None  # (P,) each, without gradient: the input of the loss


@dataclass
class PackedModel:
    """A causal language model prepared for packed batches.

    Args:
        model: a transformers model or a PEFT model around one, not wrapped for distribution.
        head_memory_mb: memory budget of a tile of logits, see :class:`HeadOptions`.
        attention_backend: backend for packed rows, see :func:`cpt_kernels.ops.attention.shared_prompt_attention`.

    Attributes:
        share_limit: sequences longer than this must not share their prompt; None without a limit. See
            :func:`rope_length_limit`.
        options: how the model's logits follow from the head's product.

    Raises:
        UserError: the attention, state, positions or logits of the architecture cannot be packed exactly.
    """

    model: nn.Module
    head_memory_mb: float | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        base = base_model(self.model)
        _check_architecture(base)
        base.set_attn_implementation(attention_over(base.config._attn_implementation))
        self.rotaries = length_dependent_rotaries(base)
        self.quantized = bitsandbytes_layers(base)
        self.share_limit = rope_length_limit(self.rotaries)
        self.options = _head_options(base, self.head_memory_mb)
        _check_head(base, self.options)

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
        head = base.get_output_embeddings()
        scores: list[Scores] = []  # head_forward leaves its result here, because the model returns only logits

        def head_forward(hidden: Tensor, *_, **__) -> Tensor:
            result = self._run_head(head, hidden.squeeze(0), batch, loss, general, statistics, tokens_per_pair)
            scores.append(result)
            if result.loss is None:
                return result.tokens.logps.new_zeros(1, 1, 1)
            # The model multiplies this by its logit scale; the division makes the gradient that of the loss.
            return ((result.loss - result.loss.detach()) / self.options.logit_scale).reshape(1, 1, 1)

        layout = AttentionLayout.of(batch)
        with (
            packed_forward(),
            in_training_mode(self.quantized),
            rope_per_sequence(self.rotaries, self.share_limit, batch["segment_lengths"]),
            noise_per_sequence(base.get_input_embeddings(), batch["segment_lengths"]),
            replaced_forward(head, head_forward),
        ):
            outputs = (self.model if wrapped is None else wrapped)(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                layout=layout,
                attention_backend=self.attention_backend,
                **({"output_router_logits": True} if aux_loss else {}),
            )
        (result,) = scores
        if result.loss is not None:
            # The value of the loss, with the gradient that arrives through the wrapped model's output.
            result = result._replace(loss=result.loss.detach() + outputs.logits.sum())
        return result._replace(aux_loss=outputs.aux_loss if aux_loss else None)

    def _run_head(
        self,
        head: nn.Module,
        hidden: Tensor,  # (T, H)
        batch: PackedBatch,
        loss: Loss | None,
        general: bool,
        statistics: bool,
        tokens_per_pair: Tensor | float,
    ) -> Scores:
        """Computes log-probs, and the loss if there is one, from the hidden rows; arguments as of :meth:`__call__`."""
        rows = gather_rows(hidden, batch["predictor_index"], batch["predictor_rounds"])
        options = dataclasses.replace(self.options, statistics=statistics, compute_dtype=_autocast_dtype(rows))
        rows, weight, bias = _head_operands(head, rows)
        if loss is None:
            tokens = linear_logprobs(rows, weight, batch["targets"], bias, options)
            return Scores(tokens, segment_sum(tokens.logps, batch["cu_completions"]))
        pairs = _pairs(batch, tokens_per_pair)
        out = linear_preference_loss(rows, weight, batch["targets"], pairs, loss, bias, options, general=general)
        with torch.no_grad():
            pair_logps = pairs.pair_logps(out.completion_logps, loss=loss, tokens=out.tokens)
        return Scores(out.tokens, out.completion_logps, out.loss, out.losses, pair_logps=pair_logps)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return cast("Any", model).get_base_model() if is_peft else cast("PreTrainedModel", model)


def _pairs(batch: PackedBatch, tokens_per_pair: Tensor | float) -> Pairs:
    """Returns the pairs of a batch, with reference log-probs summed by completion."""
    ref = batch["ref_token_logps"]
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
    )


def _autocast_dtype(rows: Tensor) -> torch.dtype | None:
    """Returns the dtype in which autocast would compute the head's products; None if it is off."""
    device = rows.device.type
    if not torch.is_autocast_enabled(device) or rows.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _head_operands(head: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (rows, weight, bias) such that ``head`` computes ``rows @ weight.T + bias``, including PEFT's wrappers.

    Raises:
        UserError: the head is quantized, or has an adapter that cannot be written as a matrix product.
    """
    # modules_to_save: a full copy of the head is trained.
    if hasattr(head, "modules_to_save"):
        trained = not head.disable_adapters and head.active_adapters
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    # trainable_token_indices: rows of an embedding that is tied to the head are trained.
    if hasattr(head, "token_adapter"):
        tokens = head.token_adapter
        trained = not (tokens.disable_adapters or tokens.merged) and tokens.active_adapters
        return rows, tokens.get_merged_weights(trained or []), None if trained else tokens.base_layer.bias
    # A plain head, or one whose adapter is off or merged.
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight, bias = base.weight, base.bias
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):  # bitsandbytes stores 4 bits in any dtype
        raise UserError(
            f"the output head is quantized ({weight.dtype}): load the model with an unquantized head"
            " (llm_int8_skip_modules=['lm_head'])"
        )
    if base is head or head.disable_adapters or head.merged:
        return rows, weight, bias
    # LoRA: X W^T + s (X A^T) B^T = [X, X A^T] [W, s B]^T, so an adapter adds columns to both operands.
    hidden_columns, weight_columns = [rows], [weight]
    for name in head.active_adapters:
        if name not in getattr(head, "lora_A", {}) or head.use_dora.get(name) or _drops(head.lora_dropout[name]):
            raise UserError(
                "an adapter on the output head must be plain LoRA without dropout or DoRA: leave the head out of"
                " target_modules, or set lora_dropout=0 and use_dora=False"
            )
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        hidden_columns.append(rows.to(a.dtype) @ a.t())
        weight_columns.append(b * head.scaling[name])
    dtype = rows.dtype
    return (
        torch.cat([c.to(dtype) for c in hidden_columns], 1),
        torch.cat([c.to(dtype) for c in weight_columns], 1),
        bias,
    )


def _drops(dropout: nn.Module) -> bool:
    return getattr(dropout, "p", 0.0) > 0  # PEFT uses an Identity for no dropout


def _head_options(model: PreTrainedModel, memory_mb: float | None) -> HeadOptions:
    """Returns the logit scale and soft-cap of a model. Configs keep them under several names."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            scale = float(value)
            break
    else:
        if (value := getattr(config, "logits_scaling", None)) is not None:
            scale = float(value) if config.model_type == "hyperclovax" else 1 / float(value)
    return HeadOptions(scale, getattr(config, "final_logit_softcapping", None), memory_mb=memory_mb)


def _check_architecture(model: PreTrainedModel) -> None:
    """Raises UserError for an architecture that cannot be packed exactly."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds & {"linear_attention", "mamba", "recurrent"}:
        raise UserError(
            f"{name} has layers that carry a state along the row (recurrent or linear attention), so packed completions"
            " would leak into each other: choose a model without such layers"
        )
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; only causal language models are supported")
    if "chunked_attention" in kinds or getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{name} uses chunked or bidirectional attention, which packed rows do not support")
    if len(places := set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UserError(
            f"{name} is spread over devices ({', '.join(sorted(map(str, places)))}) by its device_map, but a packed row"
            " runs on one device: leave device_map out, and for several GPUs start a process on each (accelerate"
            " launch, torchrun)"
        )
    if not model._can_set_attn_implementation() or model.get_output_embeddings() is None:
        raise UserError(
            f"{name} has no output head, or its attention cannot be replaced (transformers' AttentionInterface)"
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel, options: HeadOptions) -> None:
    """Compares the model's own log-probs of three tokens with those that the head computes from the same hidden rows.

    Without this check, a model with an unknown transform of its logits would train on a wrong softmax. Attention is
    eager here, because the model may still be on the CPU or in fp32, which flash attention does not support.

    Raises:
        UserError: the log-probs differ by more than rounding, or the logits are not finite.
    """
    head = model.get_output_embeddings()
    if any(p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") for p in head.parameters()):
        return  # sharded (ZeRO-3): the weight exists only during the wrapped model's forward
    # Run the model, and record input and output of its head.
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, args, output: seen.append((args[0], output.detach().clone())))
    training = {module: module.training for module in model.modules()}
    ids = torch.arange(3, device=head.weight.device if hasattr(head, "weight") else model.device)
    ends = torch.tensor([0, 3], dtype=torch.int32, device=ids.device)
    layout = AttentionLayout(ends, ends, ids, [], [(3, 3)], shared=False)
    try:
        with packed_forward():
            logits = model.eval()(
                input_ids=ids[None],
                position_ids=ids[None],
                use_cache=False,
                layout=layout,
                attention_backend="eager",
            ).logits[0]
    finally:
        hook.remove()
        for module, mode in training.items():
            module.training = mode
    ((hidden, raw),) = seen
    _head_operands(head, hidden[0])  # raises now, rather than after the data has been prepared
    # Compare log-probs.
    targets = torch.zeros(3, dtype=torch.int64, device=logits.device)
    expected = vocab_score(logits.float(), targets).logps
    if not expected.isfinite().all():
        raise UserError(f"{type(model).__name__} gives logits that are not finite: {why_not_finite(model)}")
    found = vocab_score(
        raw[0].float(), targets, logit_scale=options.logit_scale, softcap=options.softcap, vocab_size=options.vocab_size
    ).logps
    eps = max(torch.finfo(raw.dtype).eps, torch.finfo(torch.float32).eps)
    bound = 20 * eps * (1 + logits.float().abs().max())
    if not (difference := (expected - found).abs().max()) <= bound:
        raise UserError(
            f"{type(model).__name__} transforms its logits in a way that is not supported (log-probs differ by"
            f" {difference:.3g}); scale {options.logit_scale} and soft-cap {options.softcap} were read from its config"
        )


def why_not_finite(model: PreTrainedModel) -> str:
    """Returns the likely cause of log-probs that are NaN or inf, and the mend, for an error message."""
    tensors = *model.named_parameters(), *model.named_buffers()
    if broken := [name for name, tensor in tensors if not tensor.float().isfinite().all()]:
        return (
            f"{len(broken)} of its weights hold NaN or inf, such as {broken[0]}: its files are damaged, or training"
            " had diverged when they were saved; load an earlier checkpoint"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    return f"its weights are finite, but its forward overflows in {dtype}; load it with dtype bfloat16 or float32"
