"""Tiny random image-text models with processors of transformers' own classes, and preference rows with images.

The image processors are those that need Pillow alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

WORDS = [f"w{i}" for i in range(40)]
# A turn is its role, its parts and </s>; the placeholder stands for an image.
TEMPLATE = (
    "{% for m in messages %}{{ 'w0 ' if m['role'] == 'user' else 'w1 ' }}"
    "{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}</s> "
    "{% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
)
_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
_TEXT |= dict(max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8)
_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_IDEFICS = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
_IDEFICS += [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]


class Family(NamedTuple):
    """A kind of image-text model.

    Attributes:
        tokens: special tokens of its tokenizer, by the name that the tokenizer gives them, or a list.
        config: of the token ids, to the config.
        processor: of the tokenizer, to the processor.
    """

    model: str
    tokens: Any
    config: Callable[[dict[str, int]], Any]
    processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin]


def _tokenizer(tokens: Any) -> PreTrainedTokenizerFast:
    names = tokens if isinstance(tokens, list) else list(tokens.values())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate([*WORDS, *names])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"extra_special_tokens": tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left", **special
    )


def _qwen_processor(name: str) -> Callable[[PreTrainedTokenizerFast], ProcessorMixin]:
    base = getattr(hf, name)

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids, _QWEN[:2])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    # The class itself asks for a video processor, which needs torchvision.
    cls = type(name, (base,), {"__init__": init, "__module__": __name__})
    globals()[name] = cls  # to be pickled
    patch = 16 if "3" in name else 14
    pixels = {"patch_size": patch, "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}}
    return lambda tokenizer: cls(Qwen2VLImageProcessorPil(**pixels), tokenizer)


_QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def _qwen_config(name: str, vision: dict[str, Any]) -> Callable[[dict[str, int]], Any]:
    def make(ids: dict[str, int]) -> Any:
        text = {**_TEXT, "vocab_size": len(ids), "rope_parameters": _ROPE}
        named = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), _QWEN))
        return getattr(hf, name)(text_config=text, vision_config=vision, **{k: ids[v] for k, v in named.items()})

    return make


_QWEN2 = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
_QWEN25 = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_QWEN25 |= {"fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14}
_QWEN3 = {**_QWEN25, "deepstack_visual_indexes": [0, 1], "patch_size": 16, "num_position_embeddings": 64}
for _name in ("fullatt_block_indexes", "window_size"):
    _QWEN3.pop(_name)


def _llava(ids: dict[str, int], kind: str = "LlavaConfig", **more: Any) -> Any:
    vision = hf.CLIPVisionConfig(**{**_VISION, "patch_size": 14, "projection_dim": 16})
    text = hf.LlamaConfig(**_TEXT, vocab_size=len(ids))
    layers = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    return getattr(hf, kind)(vision_config=vision, text_config=text, image_token_id=ids["<image>"], **layers, **more)


def _llava_processor(tokenizer: Any, kind: str = "LlavaProcessor") -> ProcessorMixin:
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if kind == "LlavaProcessor":
        images: Any = hf.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(**size)
    else:
        images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=_PINPOINTS)
    more = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return getattr(hf, kind)(images, tokenizer, **more)


_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _gemma3(ids: dict[str, int]) -> Any:
    text = {**_TEXT, "vocab_size": len(ids), "sliding_window": 8, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {**_VISION, "patch_size": 14, "vision_use_head": False}
    return hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=ids["<image_soft_token>"],
        boi_token_id=ids["<boi>"],
        eoi_token_id=ids["<eoi>"],
    )


def _gemma3_processor(tokenizer: Any) -> ProcessorMixin:
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return hf.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _idefics(kind: str) -> Callable[[dict[str, int]], Any]:
    def make(ids: dict[str, int]) -> Any:
        text = hf.LlamaConfig(**_TEXT, vocab_size=len(ids))
        vision = {**_VISION, "patch_size": 7}
        return getattr(hf, kind)(
            text_config=text, vision_config=vision, scale_factor=2, image_token_id=ids["<image>"], pad_token_id=0
        )

    return make


def _idefics_processor(images: Any) -> Callable[[PreTrainedTokenizerFast], ProcessorMixin]:
    def make(tokenizer: Any) -> ProcessorMixin:
        sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
        return hf.Idefics3Processor(images(**sizes), tokenizer, image_seq_len=4)  # SmolVLM's own needs num2words

    return make


def _internvl(ids: dict[str, int]) -> Any:
    text = hf.Qwen2Config(**_TEXT, vocab_size=len(ids))
    vision = {**_VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    return hf.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<IMG_CONTEXT>"], downsample_ratio=0.5
    )


def _internvl_processor(tokenizer: Any) -> ProcessorMixin:
    images = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        hf.InternVLProcessor.__init__(self, image_processor, tokenizer, None, image_seq_length=4)

    cls = type("InternVLProcessor", (hf.InternVLProcessor,), {"__init__": init, "__module__": __name__})
    return cls(images, tokenizer)


def _mistral3(ids: dict[str, int]) -> Any:
    text = hf.MistralConfig(**_TEXT, vocab_size=len(ids), sliding_window=None)
    vision = hf.PixtralVisionConfig(**{**_VISION, "image_size": 56, "patch_size": 7, "head_dim": 8})
    return hf.Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["[IMG]"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


class PixtralProcessor(ProcessorMixin):
    """Spells images as transformers' class of this name, whose file needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token = "[IMG]"
        ids = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
        self.image_token_id, self.image_token_ids = ids[0], ids
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        height, width = (int(size) // 14 for size in image_inputs["image_sizes"][image_idx])  # merged patches
        return ("[IMG]" * width + "[IMG_BREAK]") * (height - 1) + "[IMG]" * width + "[IMG_END]"


def _mistral3_processor(tokenizer: Any) -> ProcessorMixin:
    images = PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return PixtralProcessor(images, tokenizer)


def _mllama(ids: dict[str, int]) -> Any:
    text = {**_TEXT, "vocab_size": ids["<|image|>"], "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text.pop("head_dim")
    vision = {**_VISION, "patch_size": 14, "num_global_layers": 1, "vision_output_dim": 48, "attention_heads": 2}
    vision |= {"intermediate_layers_indices": [0, 1]}
    vision.pop("num_attention_heads")
    return hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=ids["<|image|>"])


def _mllama_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.MllamaProcessor(MllamaImageProcessorPil(size={"height": 28, "width": 28}), tokenizer)


_VQ = dict(base_channels=32, num_res_blocks=1, latent_channels=4, embed_dim=4, attn_resolutions=None)
_CODES = [f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z" for i in range(16)]
_EMU3_CODES = [f"<|visual token {i:06}|>" for i in range(16)]
_EMU3 = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "image_wrapper_token": "<wrap>"}
_EMU3 |= {"eof_token": "<eof>", "eol_token": "<|extra_200|>"}


def _chameleon(ids: dict[str, int]) -> Any:
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    vq = {**_VQ, "channel_multiplier": [1, 1, 1], "num_embeddings": 16, "resolution": 16}
    return hf.ChameleonConfig(**text, vocab_size=len(ids), vq_config=vq, vocabulary_map=ids)


def _chameleon_processor(tokenizer: Any) -> ProcessorMixin:
    tokenizer.sep_token = "</s>"  # ends a turn
    images = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.ChameleonProcessor(images, tokenizer, image_seq_length=16)


def _emu3(ids: dict[str, int]) -> Any:
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    vq = {**_VQ, "channel_multiplier": [1, 1, 1, 1], "codebook_size": 16, "hidden_size": 32, "attn_resolutions": [3]}
    return hf.Emu3Config(text_config={**text, "vocab_size": len(ids)}, vq_config=vq, vocabulary_map=ids)


def _emu3_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.Emu3Processor(Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=32 * 32), tokenizer)


def _paligemma(ids: dict[str, int]) -> Any:
    text = {**_TEXT, "vocab_size": len(ids) + 2000, "sliding_window": 6, "query_pre_attn_scalar": 8}
    text |= {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"]}
    vision = {**_VISION, "patch_size": 14, "vision_use_head": False}
    return hf.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, hidden_size=32, image_token_index=ids["<image>"]
    )


def _paligemma_processor(tokenizer: Any) -> ProcessorMixin:
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    pair = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = pair
    return hf.PaliGemmaProcessor(images, tokenizer)


_INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<boi>", "eoi_token": "<eoi>"}

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _QWEN,
        _qwen_config("Qwen2VLConfig", _QWEN2),
        _qwen_processor("Qwen2VLProcessor"),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN,
        _qwen_config("Qwen2_5_VLConfig", _QWEN25),
        _qwen_processor("Qwen2_5_VLProcessor"),
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        _QWEN,
        _qwen_config("Qwen3VLConfig", _QWEN3),
        _qwen_processor("Qwen3VLProcessor"),
    ),
    "llava": Family("LlavaForConditionalGeneration", ["<image>"], _llava, _llava_processor),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        ["<image>"],
        functools.partial(_llava, kind="LlavaNextConfig", image_grid_pinpoints=_PINPOINTS),
        functools.partial(_llava_processor, kind="LlavaNextProcessor"),
    ),
    "gemma3": Family("Gemma3ForConditionalGeneration", _GEMMA, _gemma3, _gemma3_processor),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        _IDEFICS,
        _idefics("Idefics3Config"),
        _idefics_processor(Idefics3ImageProcessorPil),
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        _IDEFICS,
        _idefics("SmolVLMConfig"),
        _idefics_processor(SmolVLMImageProcessorPil),
    ),
    "internvl": Family("InternVLForConditionalGeneration", _INTERNVL, _internvl, _internvl_processor),
    "paligemma": Family(  # PaliGemma 2, with sliding windows
        "PaliGemmaForConditionalGeneration", {"image_token": "<image>"}, _paligemma, _paligemma_processor
    ),
    "chameleon": Family(
        "ChameleonForConditionalGeneration",
        ["<image>", "<racm3:break>", "<eoss>", *_CODES],
        _chameleon,
        _chameleon_processor,
    ),
    "emu3": Family(
        "Emu3ForConditionalGeneration", {**_EMU3, **{name: name for name in _EMU3_CODES}}, _emu3, _emu3_processor
    ),
    "mllama": Family("MllamaForConditionalGeneration", ["<|image|>"], _mllama, _mllama_processor),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration", ["[IMG]", "[IMG_BREAK]", "[IMG_END]"], _mistral3, _mistral3_processor
    ),
}

# --- Families of text, vision and processor as those above, for the exactness of packed rows alone ---


def _siglip(patch: int) -> Any:
    return hf.SiglipVisionConfig(**_VISION, patch_size=patch, vision_use_head=False)


def _vipllava(ids: dict[str, int]) -> Any:
    vision = hf.CLIPVisionConfig(**_VISION, patch_size=14, projection_dim=16)
    text = hf.LlamaConfig(**_TEXT, vocab_size=len(ids))
    return hf.VipLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ids["<image>"], vision_feature_layers=[-1, -2]
    )


def _idefics2(ids: dict[str, int]) -> Any:
    perceiver = dict(resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8)
    return hf.Idefics2Config(
        text_config=hf.MistralConfig(**_TEXT, vocab_size=len(ids)),
        vision_config={**_VISION, "patch_size": 7},
        perceiver_config={**perceiver, "num_key_value_heads": 1, "hidden_size": 32},
        image_token_id=ids["<image>"],
    )


def _idefics2_processor(tokenizer: Any) -> ProcessorMixin:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 28}, do_image_splitting=False)
    return hf.Idefics2Processor(images, tokenizer, image_seq_len=4)


def _aya(ids: dict[str, int]) -> Any:
    text = hf.Cohere2Config(**_TEXT, vocab_size=len(ids))
    return hf.AyaVisionConfig(
        vision_config=_siglip(7), text_config=text, image_token_index=ids["<|IMG_PATCH|>"], downsample_factor=2
    )


def _aya_processor(tokenizer: Any) -> ProcessorMixin:
    size = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    return hf.AyaVisionProcessor(images, tokenizer, patch_size=7, img_size=28, downsample_factor=2)


def _deepseek_vl(ids: dict[str, int]) -> Any:
    text = hf.LlamaConfig(**_TEXT, vocab_size=len(ids))
    return hf.DeepseekVLConfig(text_config=text, vision_config=_siglip(14), image_token_id=ids["<image>"])


def _janus(ids: dict[str, int]) -> Any:
    vision = {**_VISION, "patch_size": 14, "mlp_ratio": 2.0, "projection_dim": 32, "depth": 2, "num_image_tokens": 4}
    vision.pop("intermediate_size")
    vq = dict(base_channels=32, num_res_blocks=1, latent_channels=32, embed_dim=4, num_embeddings=16, num_patches=4)
    vq |= {"channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32}
    text = hf.LlamaConfig(**_TEXT, vocab_size=len(ids))
    return hf.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=ids["<image>"])


_IMAGE = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
_AYA = ["<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL", "<image>"]
_AYA += [f"TILE_{i}" for i in range(1, 9)]
_JANUS_SIZE = {"size": {"height": 28, "width": 28}, "min_size": 14}
MORE: dict[str, Family] = {
    "vipllava": Family("VipLlavaForConditionalGeneration", ["<image>"], _vipllava, _llava_processor),
    "idefics2": Family("Idefics2ForConditionalGeneration", _IDEFICS[:2], _idefics2, _idefics2_processor),
    "aya_vision": Family("AyaVisionForConditionalGeneration", _AYA, _aya, _aya_processor),
    "deepseek_vl": Family(
        "DeepseekVLForConditionalGeneration",
        _IMAGE,
        _deepseek_vl,
        lambda tokenizer: hf.DeepseekVLProcessor(
            DeepseekVLImageProcessorPil(**_JANUS_SIZE), tokenizer, num_image_tokens=4
        ),
    ),
    "janus": Family(
        "JanusForConditionalGeneration",
        _IMAGE,
        _janus,
        lambda tokenizer: hf.JanusProcessor(JanusImageProcessorPil(**_JANUS_SIZE), tokenizer, num_image_tokens=4),
    ),
}


def tiny_processor(kind: str) -> ProcessorMixin:
    """Returns a processor of a family, with a word-level tokenizer and a chat template."""
    family = (FAMILIES | MORE)[kind]
    tokenizer = _tokenizer(family.tokens)
    processor = family.processor(tokenizer)
    spelled = f"<|vision_start|> {processor.image_token} <|vision_end|>" if "qwen" in kind else processor.image_token
    template = TEMPLATE.replace("PLACEHOLDER", spelled)
    processor.chat_template = tokenizer.chat_template = template
    return processor


def tiny_image_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Returns a random model of a family, in eval mode."""
    family = (FAMILIES | MORE)[kind]
    torch.manual_seed(seed)
    ids = _tokenizer(family.tokens).get_vocab()
    model = getattr(hf, family.model)(family.config(ids))
    with torch.no_grad():  # so that images and places matter
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif "bias" in name or "gate" in name:
                parameter.normal_(std=0.1 if "bias" in name else 0.5)
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Returns an image of noise."""
    pixels = np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS[2:]) for _ in range(count))


def image_rows(count: int, seed: int = 0) -> list[dict]:
    """Returns conversational pairs in TRL's form with 0 to 2 images of different sizes; every fourth has none."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        sizes = [[(40, 60)], [(70, 30), (28, 28)], [(33, 90)], []][i % 4]
        parts = [*({"type": "image"} for _ in sizes), {"type": "text", "text": words(rng, rng.randint(1, 5))}]
        sides = {
            side: [{"role": "assistant", "content": words(rng, rng.randint(1, 7))}] for side in ("chosen", "rejected")
        }
        prompt = [{"role": "user", "content": parts}]
        rows.append({"images": [picture(*size, seed=i) for size in sizes], "prompt": prompt, **sides})
    return rows
