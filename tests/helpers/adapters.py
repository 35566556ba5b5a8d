"""PEFT's adapters on a tiny Llama: every tuner, every variant of LoRA, and combinations of adapters.

A case builds its model when it is run, because PEFT may refuse it. `TUNERS` has an entry for every tuner of PEFT's own
table, and `LORA` with `NOT_VARIANTS` one for every option of LoRA; tests compare both with the installed PEFT.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from tests.helpers.architectures import VOCAB, tiny_model

INVOCATION = [7, 8]  # what switches aLoRA on
PLACES = {
    "attention": ["q_proj", "v_proj"],
    "mlp": ["up_proj", "down_proj"],
    "head": ["lm_head"],
    "embedding": ["embed_tokens"],
}
_PROMPT = {"num_virtual_tokens": 4}
# PEFT's name of a tuner -> the options that it needs on a model this small.
TUNERS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 2, "tfinal": 2},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 8},
    "CARTRIDGE": _PROMPT,
    "CPT": {**_PROMPT, "cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4, "alpha": 8},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 4},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "PVERA": {"r": 4},
    "P_TUNING": {**_PROMPT, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHADOW": {"shadow_dropout": 0.0},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.5},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5, 6, 7, 8]},
    "UNILORA": {},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
    "XLORA": {"hidden_size": 32, "xlora_depth": 1},
}
# Tuners that choose their modules themselves.
_WITHOUT_PLACES = {"ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS"}

# A variant of LoRA -> its options; PREPARED has what must be done before and after the adapter is made.
LORA: dict[str, dict[str, Any]] = {
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora lora_bias": {"use_dora": True, "lora_bias": True},
    "dropout": {"lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "corda": {"init_lora_weights": "corda", "corda_config": lora_configs.CordaConfig()},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": lora_configs.LoraGAConfig()},
    "alora": {"alora_invocation_tokens": INVOCATION},
    "qalora": {"use_qalora": True, "qalora_group_size": 8},
    "velora": {"velora_config": lora_configs.VeloraConfig(num_groups=4, init_type="batch_average_once")},
    "kasa": {"kasa_config": lora_configs.KasaConfig()},
    "monteclora": {"monteclora_config": lora_configs.MontecloraConfig(num_samples=2)},
    "bdlora": {
        "use_bdlora": lora_configs.BdLoraConfig(
            target_modules_bd_a=["down_proj", "lm_head"], target_modules_bd_b=["q_proj", "v_proj", "up_proj"], nblocks=2
        )
    },
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "up_proj": 2, "lm_head": 2, "embed_tokens": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 16, "up_proj": 16, "lm_head": 16, "embed_tokens": 16}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "modules_to_save head": {"modules_to_save": ["lm_head"]},
    "modules_to_save embedding": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save norm": {"modules_to_save": ["norm"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4, 5, 6, 7, 8]},
    "trainable_token_indices head": {"trainable_token_indices": {"embed_tokens": [3, 4, 5], "lm_head": [5, 6, 7, 8]}},
}
# Options of LoRA that need no entry: sizes, Megatron's, parts of another option, and what `cases` has by itself.
NOT_VARIANTS = {
    *("r", "lora_alpha", "layers_pattern", "runtime_config", "megatron_config", "megatron_core", "arrow_config"),
    *("target_parameters", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}


class Case(NamedTuple):
    """A model to train: a plain one with the config of its adapter, or a PEFT model."""

    model: nn.Module
    config: peft.PeftConfig | None = None


def cases() -> dict[str, Callable[[], Case]]:
    """Returns what builds each case by the name "adapter / place"; errors are PEFT's."""
    found: dict[str, Callable[[], Case]] = {}
    for tuner, options in sorted(TUNERS.items()):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[tuner]
        if issubclass(config, peft.PromptLearningConfig) or tuner in _WITHOUT_PLACES:
            found[f"{tuner.lower()} / model"] = partial(_of_config, tuner, options)
            continue
        for place, modules in PLACES.items():
            build = _xlora if tuner == "XLORA" else partial(_of_config, tuner)
            inner = {"feedforward_modules": modules} if tuner == "IA3" and place == "mlp" else {}
            found[f"{tuner.lower()} / {place}"] = partial(build, {**options, **inner, "target_modules": modules})
    for name, options in LORA.items():
        architecture = "qwen2" if "bias" in options else "llama"  # Llama has no biases
        for place, modules in PLACES.items():
            targets = {"r": 4, "target_modules": modules, **options}
            found[f"lora {name} / {place}"] = partial(_lora, targets, architecture)
            if place in ("attention", "embedding") and {"modules_to_save", "trainable_token_indices"} & options.keys():
                found[f"lora {name} tied / {place}"] = partial(_lora, targets, "llama-tied")
    for name, options in {"lora tied": {}, "lora ensure_weight_tying tied": {"ensure_weight_tying": True}}.items():
        for place in ("head", "embedding"):
            targets = {"r": 4, "target_modules": PLACES[place], **options}
            found[f"{name} / {place}"] = partial(_lora, targets, "llama-tied")
    parameters = {"head": ["lm_head.weight"], "mlp": ["up_proj.weight"]}
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for place, names in parameters.items():
        targets = {"r": 4, "target_modules": [], "target_parameters": names}
        found[f"lora target_parameters / {place}"] = partial(_lora, targets, "llama")
    targets = {"r": 4, "target_modules": ["q_proj"], "target_parameters": experts}
    found["lora target_parameters experts / mlp"] = partial(_lora, targets, "mixtral")
    combinations = {
        "two loras active": partial(_two, both=True),
        "the second of two loras": partial(_two, both=False),
        "lora of another name": _named,
        "mixed lora and loha": _mixed,
        "lora from a folder": _from_folder,
        "lora of transformers": _of_transformers,
        "merged lora": _merged,
        "arrow": _arrow,
    }
    for name, build in combinations.items():
        for place, modules in PLACES.items():
            found[f"{name} / {place}"] = partial(build, modules)
    return found


def plain_model(architecture: str = "llama") -> nn.Module:
    """Returns a tiny model whose vocabulary is even: some adapters cut the head's rows into blocks."""
    model = tiny_model(architecture)
    model.config.use_cache = False  # X-LoRA asks for it
    model.resize_token_embeddings(64, mean_resizing=False)
    return model


def _config(tuner: str, options: dict[str, Any]) -> peft.PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[tuner](task_type="CAUSAL_LM", **options)


def _of_config(tuner: str, options: dict[str, Any]) -> Case:
    return Case(plain_model(), _config(tuner, options))


def _lora(options: dict[str, Any], architecture: str) -> Case:
    """LoRA, with the calibration that some variants need before or after the adapter is made."""
    base, config = plain_model(architecture), _config("LORA", options)
    ids = torch.randint(3, VOCAB, (8, 16), generator=torch.Generator().manual_seed(3))

    def run(backward: bool = False) -> None:
        for row in ids.split(1):
            output = base(input_ids=row, labels=row)
            if backward:
                output.loss.backward()

    if config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT does not install

        preprocess_corda(base, config, run_model=run)
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(base, config, partial(run, backward=True))
        base.zero_grad()
    if config.init_lora_weights == "eva":
        model = peft.get_peft_model(base, config)
        peft.initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 8)
        return Case(model)
    return Case(base, config)


def _random_lora(modules: list[str], **options: Any) -> peft.LoraConfig:
    return _config("LORA", {"r": 4, "target_modules": modules, "init_lora_weights": False, **options})


def _two(modules: list[str], both: bool) -> Case:
    model = peft.get_peft_model(plain_model(), _random_lora(modules), adapter_name="first")
    model.add_adapter("second", _random_lora(modules, lora_alpha=16))
    model.base_model.set_adapter(["first", "second"] if both else "second")
    return Case(model)


def _named(modules: list[str]) -> Case:
    return Case(peft.get_peft_model(plain_model(), _random_lora(modules), adapter_name="policy"))


def _mixed(modules: list[str]) -> Case:
    model = peft.get_peft_model(plain_model(), _random_lora(modules), adapter_name="first", mixed=True)
    model.add_adapter("second", _config("LOHA", {"r": 4, "target_modules": modules}))
    model.set_adapter(["first", "second"])
    return Case(model)


def _from_folder(modules: list[str]) -> Case:
    with saved_loras(modules, 1) as (folder,):
        return Case(peft.PeftModel.from_pretrained(plain_model(), folder, is_trainable=True))


def _of_transformers(modules: list[str]) -> Case:
    model = plain_model()
    model.add_adapter(_random_lora(modules))
    return Case(model)


def _merged(modules: list[str]) -> Case:
    model = peft.get_peft_model(plain_model(), _random_lora(modules))
    model.merge_adapter()
    return Case(model)


def _arrow(modules: list[str]) -> Case:
    with saved_loras(modules, 2) as folders:
        return Case(create_arrow_model(plain_model(), folders, lora_configs.ArrowConfig(top_k=1)))


def _xlora(options: dict[str, Any]) -> Case:
    options = dict(options)
    modules = options.pop("target_modules")
    with saved_loras(modules, 2) as folders:
        config = _config("XLORA", {**options, "adapters": dict(zip("01", folders))})
        return Case(peft.get_peft_model(plain_model(), config))


@contextlib.contextmanager
def saved_loras(modules: list[str], count: int) -> Iterator[list[str]]:
    """Folders with a LoRA adapter each."""
    with tempfile.TemporaryDirectory() as parent:
        folders = [f"{parent}/{i}" for i in range(count)]
        for i, folder in enumerate(folders):
            model = plain_model()
            torch.manual_seed(i)  # different adapters
            peft.get_peft_model(model, _random_lora(modules)).save_pretrained(folder)
        yield folders
