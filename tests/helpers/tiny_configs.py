"""Tiny models of every class in transformers' table of causal language models, made from each class's own defaults.

A config is shrunk by the names of its fields: widths, depths, vocabularies and experts become small, and everything
else (dropout, biases, norms, scales, RoPE) stays as the class has it. `OVERRIDES` holds what names do not tell.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
WINDOW = 5

# (pattern of a field's name, value), the first that matches. A value of None leaves the field as it is.
_SIZES: list[tuple[str, int | None]] = [
    (r".*token_(id|index|ids)$|.*_tok(en)?_id$", None),
    (r"pad_token_id", 0),
    (r"(.*_)?vocab_size(_per_layer_input)?|.*vocab$", VOCABULARY),
    (r"(num_|n_)?(hidden_|decoder_|encoder_)?layers?|n_layer", 4),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|num_attention_groups|multi_query_group_num)", 2),
    (r"(decoder_|encoder_)?(num_)?attention_heads|n_heads?|num_heads", 4),
    (r".*(moe|expert).*(intermediate|ffn).*size|.*expert_dim", 24),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token|moe_top_k)", 2),
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"(first_k_dense_replace)", 1),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|d_inner|d_ff|dff|dim_ff|n_inner|feed_forward_size).*",
        48,
    ),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|qk_rank)", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_dim|d_kv|attention_key_size)", 8),
    (
        r"(hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width)",
        32,
    ),
    (
        r"(sliding_window|sliding_window_size|attention_chunk_size|window_size|attention_window_size|local_attention)",
        WINDOW,
    ),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length)", 128),
    (r"original_max_position_embeddings", 128),
]


def causal_models() -> dict[str, str]:
    """Model type -> name of its causal language model's class."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, **changes: Any):
    """The config of ``kind``, small; errors are transformers'."""
    return _shrink(CONFIG_MAPPING[kind], {**OVERRIDES.get(kind, {}), **changes})


def tiny_causal_lm(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of ``kind`` in fp64 with weights large enough for tokens to have different log-probs."""
    import transformers

    config = tiny_config(kind, **changes)
    torch.manual_seed(seed)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(config)
    if sum(p.numel() for p in model.parameters()) > 3e6:
        raise RuntimeError(f"{sum(p.numel() for p in model.parameters()):,} parameters: a size was not shrunk")
    model = model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products take no fp64
    return model


def _shrink(cls: type, changes: dict[str, Any]):
    defaults = cls()
    values = {name: value for name, value in vars(defaults).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and value > size:
                small[name] = size
        elif hasattr(value, "to_dict"):  # a config inside, such as text_config
            inner = changes.get(name, {})
            small[name] = _shrink(type(value), inner).to_dict() if isinstance(inner, dict) else inner
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        if isinstance(value, int) and value >= VOCABULARY:
            small[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[name]
    heads = small.get("num_attention_heads", values.get("num_attention_heads"))
    kv = values.get("num_key_value_heads")
    if isinstance(kv, int) and kv == values.get("num_attention_heads"):
        small["num_key_value_heads"] = heads
    kinds = values.get("layer_types")
    if kinds and "num_hidden_layers" in small:
        unique = list(dict.fromkeys(kinds))
        small["layer_types"] = (unique * 4)[: max(small["num_hidden_layers"], len(unique))]
        small["num_hidden_layers"] = len(small["layer_types"])
    return cls(**{**small, **{k: v for k, v in changes.items() if not isinstance(v, dict) or k not in small}})


_HEAD = {"head_dim": 8}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_expand": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_SSM, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {**_SSM, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_SSM, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8},
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    "ministral": _HEAD,
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 4, "n_groups": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
}
