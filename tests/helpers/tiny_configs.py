"""Tiny models of every class in transformers' table of causal language models, made from each class's own defaults.

A config is shrunk by the names of its fields: widths, depths, vocabularies and experts become small, and everything
else (dropout, biases, norms, scales, RoPE) stays as the class has it. `OVERRIDES` holds what names do not tell.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 96
WINDOW = 5

# (pattern of a field's name, value), the first that matches. A value of None leaves the field as it is.
_SIZES: list[tuple[str, int | None]] = [
    (r".*token_(id|index|ids)$|.*_tok(en)?_id$", None),
    (r"pad_token_id", 0),
    (r"(.*_)?vocab_size(_per_layer_input)?|.*vocab$", VOCABULARY),
    (r"(num_|n_)?(hidden_|decoder_|encoder_)?layers?|n_layer", 4),
    (r"base_channels|vision_output_dim|projector_(in|out)put_dim", 32),
    (r"depth|num_blocks|.*num_hidden_layers", 2),
    (r".*hash_byte_group_vocab|codebook_size|num_embeddings|num_position_embeddings|ngram_vocab_size_base", 64),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|num_attention_groups|multi_query_group_num)", 2),
    (r"(decoder_|encoder_)?(num_)?attention_heads|n_heads?|num_heads", 4),
    (r".*(moe|expert).*(intermediate|ffn).*size|.*expert_dim", 24),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token|moe_top_k)", 2),
    (r"index_topk(_blocks)?", WINDOW - 1),
    (r"index_n_heads", 16),  # its scores are cut off at 0, and ties of keys are broken by the length of the row
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"(first_k_dense_replace)", 1),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|d_inner|d_ff|dff|dim_ff|n_inner|feed_forward_size).*",
        48,
    ),
    (r"(.*q_lora_rank|kv_lora_rank|o_lora_rank|qk_rank)", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_dim|d_kv|attention_key_size)", 8),
    (
        r"(hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width"
        "|out_hidden_size|text_hidden_size|hidden_size_global|projection_(hidden_)?dim|output_dim|adapter_(in|out)_dim"
        "|codebook_dim|adapter_input_size|adapter_rank|.*_hidden_size|.*_out_channels?|nemo_conv_channels)",
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


def image_text_models() -> dict[str, str]:
    """Model type -> name of its image-text class, if that is another class than its causal language model's."""
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    unique = {name: kind for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if name not in causal}
    return {kind: name for name, kind in unique.items()}


def encoders() -> dict[str, str]:
    """Model type -> name of the causal language model's class, of encoders that is_decoder=True makes causal."""
    return {kind: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in ENCODERS}


def tiny_config(kind: str, **changes: Any):
    """The config of ``kind``, small; errors are transformers'."""
    return _shrink(CONFIG_MAPPING[kind], changes)


def tiny_causal_lm(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal language model of ``kind``, see :func:`tiny_lm`."""
    return tiny_lm(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], seed, **changes)


def tiny_lm(kind: str, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The class ``name`` of transformers, tiny, in fp64, or in fp32 where its forward takes no fp64.

    Errors of a class that cannot be built are transformers'.
    """
    import transformers

    cls = getattr(transformers, name)
    # A class for text alone takes the text part of a config of several, as transformers' auto classes do.
    config = _shrink(cls.config_class or CONFIG_MAPPING[kind], changes)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > 1e7:
        raise RuntimeError(f"{count:,} parameters: a size was not shrunk")
    torch.manual_seed(seed)
    model = cls(config)
    model = model.float() if config.get_text_config().model_type in FP32 else model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products take no fp64
    return model


def _shrink(cls: type, changes: dict[str, Any]):
    changes = {**OVERRIDES.get(cls.model_type, {}), **changes}
    defaults = cls(**NEEDED.get(cls.model_type, {}))
    # What a class derives from its fields it derives again from the small ones.
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else vars(defaults)
    values = {name: value for name, value in vars(defaults).items() if not name.startswith("_") and name in fields}
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and value > size:
                small[name] = size
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            small[name] = {**value, "mrope_section": [2, 1, 1]}
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
    for name, value in values.items():  # a value for each layer
        layers = values.get("num_hidden_layers")
        if isinstance(value, list) and len(value) == layers and "num_hidden_layers" in small and name != "layer_types":
            small[name] = value[: small["num_hidden_layers"]]
    kinds = values.get("layer_types")
    if kinds and "num_hidden_layers" in small:
        unique = list(dict.fromkeys(kinds))
        small["layer_types"] = (unique * 4)[: max(small["num_hidden_layers"], len(unique))]
        small["num_hidden_layers"] = len(small["layer_types"])
    return cls(**{**small, **{k: v for k, v in changes.items() if not isinstance(v, dict) or k not in small}})


_HEAD = {"head_dim": 8}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_expand": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}  # of images: parts of the frequencies
_HYBRID = ["linear_attention", "hybrid"] * 2
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_VQ = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
_SIZES_OF_MLA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
_DRAFTER = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
# Fields without which a class's own defaults are an error.
NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": {**_DRAFTER}}
# Type of a config, or of a config inside another, -> fields that names do not tell.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"text_config": {"vocab_size": 192}, "image_token_offset": 8, "audio_token_offset": 72},
    "bamba": {**_SSM, "attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}},
    "chameleon_vqgan": _VQ,
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _MROPE["rope_parameters"]},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}
    },  # the class reads both, and has one default
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2, "n_group": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        **{"head_dim": 16, "index_head_dim": 8},
        **{f"swa_{name}": size for name, size in _SIZES_OF_MLA.items()},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1] * 4},
    "florence_vision": {"embed_dim": [32] * 4, "num_heads": [4] * 4, "num_groups": [4] * 4},
    "muse_spark_audio": {"hidden_sizes": [16] * 4},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}},
    "emu3_vqgan": {**_VQ, "channel_multiplier": [1, 1], "hidden_size": 32},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [24, 24],
    },
    "falcon_h1": {**_SSM, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gemma3n_text": {
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 8},
        **{"hidden_size_per_layer_input": 8, "intermediate_size": 48},
    },
    "gemma4_assistant": _DRAFTER,
    "glm46v_text": _MROPE,
    "glm4v_moe_text": {"head_dim": 16, **_MROPE},
    "glm4v_text": _MROPE,
    "glm5_next_text": {"index_kpool": 2},
    "glm_ocr_text": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gptj": {"rotary_dim": 4},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        **{"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8", "use_spatial_sampling": False},
        **{"spatial_target_layers": [], "image_grid_pinpoints": [[384, 384]]},
    },
    "granitemoehybrid": {**_SSM, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]},
        "head_dim": 8,
        "num_key_value_heads": 2,
    },
    "inkling_vision": {"patch_size": 2, "num_hidden_layers": 3},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    "ministral": _HEAD,
    "mistral4": {"qk_rope_head_dim": 8, "head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 4, "n_groups": 2},
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4},
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 8, "attn_layers": ["local"] * 4},
    "step3p5": {"sliding_window": 5},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": _HYBRID, "chunk_size": 4},
}
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
# Text configs whose models' eager attention or router computes in fp32 whatever the weights are.
FP32 = {"inkling2_loop_text", "inkling2_text", "xglm"}
