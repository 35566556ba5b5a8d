"""Tiny random models of the supported architectures."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import transformers as tf
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 61

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(kind: str, **changes) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(tf, kind + "Config")(**{**_SMALL, **changes})


_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("Llama"),
    "llama-tied": _config("Llama", tie_word_embeddings=True),
    "qwen2": _config("Qwen2"),
    "qwen3": _config("Qwen3", head_dim=8),
    "mistral": _config("Mistral", sliding_window=5),
    "gemma2": _config("Gemma2", head_dim=8, sliding_window=5, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3": _config("Gemma3Text", head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "phi3": _config("Phi3"),
    "phi": _config("Phi"),  # its head has a bias
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": _config("GPTNeoX", num_key_value_heads=None),
    "olmo2": _config("Olmo2"),
    "granite": _config("Granite", logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": _config("Cohere", logit_scale=0.25),
    "mixtral": _config("Mixtral", **_MOE, output_router_logits=False),
    "qwen3_moe": _config("Qwen3Moe", **_MOE, head_dim=8),
    "gpt_oss": _config(
        "GptOss", **_MOE, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3-longrope": _config(
        "Phi3",
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        },
    ),
    "llama-dynamic": _config(
        "Llama", max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "gemma3-dynamic": _config(
        "Gemma3Text",
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
}
# Layers that carry a state: a short convolution, Mamba 2, a gated delta net.
STATES: dict[str, Callable[[], PretrainedConfig]] = {
    "lfm2": _config("Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "bamba": _config(
        "Bamba",
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_expand": 2},
        attn_layer_indices=[1],
    ),
    "qwen3_next": _config(
        "Qwen3Next",
        **{
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
        head_dim=8,
    ),
}
CONFIGS |= STATES
# A gated delta net runs chunks of 64 tokens. Chunks of 4 let these sequences have several, as real ones have.
_delta_rule = inspect.unwrap(tf.models.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule)
_delta_rule.__defaults__ = (4, *_delta_rule.__defaults__[1:])
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
# The RoPE of these models depends on the length of a sequence beyond 16 positions.
LENGTH_DEPENDENT = ["phi3-longrope", "llama-dynamic", "gemma3-dynamic"]


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, weights: torch.dtype | None = None
) -> PreTrainedModel:
    """Returns a random model in ``dtype`` whose weights are larger than at initialization, so that attention matters.

    Args:
        weights: dtype to which the weights are rounded before they are converted to ``dtype``.
    """
    torch.manual_seed(seed)
    implementation = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    config = CONFIGS[name]()
    kwargs = {"experts_implementation": "eager"} if name in MIXTURES else {}
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, **kwargs)
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "sinks" in name_:
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    for parameter in model.parameters():  # not buffers: RoPE's frequencies stay in fp32, as after from_pretrained
        parameter.data = parameter.data.to(weights or dtype).to(dtype)
    return model.eval()


def recompute_activations(model: PreTrainedModel) -> None:
    """Turns gradient checkpointing on; transformers 5.24 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
