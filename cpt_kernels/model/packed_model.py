"""A transformers causal language model on packed batches: completion log-probs or a preference loss, in one forward.

The head runs *as* the model's ``lm_head`` forward, inside the forward of the wrapped model, so that the hooks of DDP,
FSDP and DeepSpeed see every module run. What the model's forward returns as logits is then one number: 0, with the
gradient of the loss. Scales and caps that the model applies to its logits map 0 to 0, with a known derivative.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

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
    as_in_training,
    attention_over,
    length_dependent_rotaries,
    noise_per_sequence,
    packed_forward,
    quantised_layers,
    replaced_forward,
    rope_length_limit,
    rope_per_sequence,
)


class Scores(NamedTuple):
    """Result of :meth:`PackedModel.__call__`; N tokens, S completions, P pairs as in the batch."""

    tokens: VocabScore  # (N,) each
    completion_logps: Tensor  # (S,)
    loss: Tensor | None  # () sum over the pairs, through the forward's output
    losses: Tensor | None  # (P,) without gradient
    aux_loss: Tensor | None  # () load-balancing loss of a mixture of experts, over the row's tokens
    pair_logps: PairLogps | None = None  # (P,) each, without gradient: what the loss saw


@dataclass
class PackedModel:
    """A causal LM prepared for packed batches.

    Args:
        model: a transformers model or a PEFT model around one, not wrapped for distribution.
        head_memory_mb: budget for a tile of logits, see :class:`HeadOptions`.
        attention_backend: of packed rows, see :func:`cpt_kernels.ops.attention.shared_prompt_attention`.

    Raises:
        UserError: an architecture whose attention, state, positions or logits cannot be packed exactly.
    """

    model: nn.Module
    head_memory_mb: float | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        base = base_model(self.model)
        _check_architecture(base)
        base.set_attn_implementation(attention_over(base.config._attn_implementation))
        self.rotaries = length_dependent_rotaries(base)
        self.quantised = quantised_layers(base)
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
        """Run a packed batch.

        Args:
            loss: to take over the batch's pairs; without one, log-probs are scored (differentiable where grad is on).
            wrapped: the model as DDP, FSDP or DeepSpeed wrapped it; default the model itself.
            general: keep token and completion log-probs differentiable beside the loss.
            statistics: entropy, mean logit, top-1 and log sum p^2 of every token.
            tokens_per_pair: see :class:`PairLogps`.
            aux_loss: ask a mixture of experts for its load-balancing loss.
        """
        scores: list[Scores] = []

        def head_forward(hidden: Tensor, *_, **__) -> Tensor:
            rows = gather_rows(hidden.squeeze(0), batch["predictor_index"], batch["predictor_rounds"])
            options = dataclasses.replace(self.options, statistics=statistics, compute_dtype=_autocast_dtype(rows))
            rows, weight, bias = _head_operands(head, rows)
            if loss is None:
                tokens = linear_logprobs(rows, weight, batch["targets"], bias, options)
                scores.append(Scores(tokens, segment_sum(tokens.logps, batch["cu_completions"]), None, None, None))
                return tokens.logps.new_zeros(1, 1, 1)
            pairs = _pairs(batch, tokens_per_pair)
            out = linear_preference_loss(rows, weight, batch["targets"], pairs, loss, bias, options, general)
            with torch.no_grad():
                pair_logps = pairs.pair_logps(out.completion_logps, loss=loss, tokens=out.tokens)
            scores.append(Scores(out.tokens, out.completion_logps, out.loss, out.losses, None, pair_logps))
            return ((out.loss - out.loss.detach()) / options.logit_scale).reshape(1, 1, 1)

        base = base_model(self.model)
        head = base.get_output_embeddings()
        layout = AttentionLayout.of(batch)
        with (
            packed_forward(),
            as_in_training(self.quantised),
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
        if loss is not None:
            result = result._replace(loss=result.loss.detach() + outputs.logits.sum())
        return result._replace(aux_loss=outputs.aux_loss if aux_loss else None)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _pairs(batch: PackedBatch, tokens_per_pair: Tensor | float) -> Pairs:
    ref = batch["ref_token_logps"]
    return Pairs(
        batch["cu_completions"],
        batch["completion_lengths"],
        batch["chosen"],
        batch["rejected"],
        batch["sft_targets"],
        batch["pair_blocks"],
        None if ref is None else segment_sum(ref, batch["cu_completions"]),
        tokens_per_pair,
        ref,
        batch["gaps"],
    )


def _autocast_dtype(rows: Tensor) -> torch.dtype | None:
    device = rows.device.type
    if not torch.is_autocast_enabled(device) or rows.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _head_operands(head: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, weight, bias) whose ``rows @ weight.T + bias`` is what ``head`` computes, PEFT's wrappers included."""
    if hasattr(head, "modules_to_save"):
        trained = not head.disable_adapters and head.active_adapters
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    if hasattr(head, "token_adapter"):  # some tokens of an embedding that is tied to the head
        tokens = head.token_adapter
        trained = not (tokens.disable_adapters or tokens.merged) and tokens.active_adapters
        return rows, tokens.get_merged_weights(trained or []), None if trained else tokens.base_layer.bias
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight, bias = base.weight, base.bias
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):  # 4 bits may be stored as any dtype
        raise UserError(
            f"the output head is quantised ({weight.dtype}): load the model with the head left unquantised"
            " (llm_int8_skip_modules=['lm_head'])"
        )
    if base is head or head.disable_adapters or head.merged:
        return rows, weight, bias
    # X W^T + s (X A^T) B^T = [X, X A^T] [W, s B]^T: an adapter is columns more.
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
    return getattr(dropout, "p", 0.0) > 0  # PEFT has an Identity where there is none


def _head_options(model: PreTrainedModel, memory_mb: float | None) -> HeadOptions:
    """Scale and cap between the head's product and the softmax, from the names under which configs keep them."""
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
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds & {"linear_attention", "mamba", "recurrent"}:
        raise UserError(
            f"{name} has layers that carry a state along the row (recurrent or linear attention); packed completions"
            " would leak into each other. Such models are not supported"
        )
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; only causal language models are supported")
    if "chunked_attention" in kinds or getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{name} uses chunked or bidirectional attention, which packed rows do not support")
    if len(places := set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UserError(
            f"{name} is spread over devices ({', '.join(sorted(map(str, places)))}) by its device_map; packed rows run"
            " on one: leave device_map out, and for several GPUs start a process on each (accelerate launch, torchrun)"
        )
    if not model._can_set_attn_implementation() or model.get_output_embeddings() is None:
        raise UserError(
            f"{name} does not let its attention be replaced (transformers' AttentionInterface) or has no output head"
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel, options: HeadOptions) -> None:
    """Compare the model's own logits of three tokens with what the head will make of the same hidden rows.

    An unknown transform of the logits would otherwise train on a wrong softmax without a word. Attention is eager here:
    flash attention, which the model may have been loaded with, knows neither the CPU that it still is on nor fp32.
    """
    head = model.get_output_embeddings()
    if any(p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") for p in head.parameters()):
        return  # sharded already (ZeRO-3): the weight is there only in the wrapped model's forward
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
    _head_operands(head, hidden[0])  # or what cannot be trained would be told when data are prepared
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
            f"{type(model).__name__} transforms its logits in a way that the head does not know (log-probs differ by"
            f" {difference:.3g}); scale {options.logit_scale} and soft-cap {options.softcap} were read from its config"
        )


def why_not_finite(model: PreTrainedModel) -> str:
    """The likely cause of log-probs that are NaN or inf, and the mend."""
    tensors = *model.named_parameters(), *model.named_buffers()
    if broken := [name for name, tensor in tensors if not tensor.float().isfinite().all()]:
        return (
            f"{len(broken)} of its weights hold NaN or inf, such as {broken[0]}: its files are damaged, or training"
            " had gone wrong when they were saved; load an earlier checkpoint"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    return f"its weights are finite, and what it computes overflows in {dtype}; load it with dtype bfloat16 or float32"
