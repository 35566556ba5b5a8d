"""How many bytes do the layers move beside their matrix products, in a forward and a backward? Needs no GPU.

    python -m bench bytes [--layers eager,compiled,liger] [--quick]

Two numbers per case: bytes per token, hidden unit and layer, and bytes per parameter of the layers. They are slopes,
from steps with one and two layers and short and long packed rows, so embeddings, head and loss are not in them. The
model is Llama-1B with all widths divided by 4. Attention's own kernel is left out, its gathers are counted. Compiled
layers are counted as Inductor schedules them for Triton, Liger's by the arguments of their launches; see ``traffic``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
from cpt_kernels.model import layers as model_layers
from cpt_kernels.model.packed_model import base_model
from cpt_kernels.ops import attention

from .timing import add_output_options, finish, table
from .traffic import BACKEND, Traffic, counted_launches
from .trainers import tokenizer

VOCAB = 64
CONFIG = {
    **{"hidden_size": 512, "intermediate_size": 2048, "head_dim": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": VOCAB, "tie_word_embeddings": True},
}
LENGTHS = ((16, 24, 24), (32, 48, 48))  # tokens of prompt, chosen and rejected of each batch
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
# Options by layers. Liger replaces functions of transformers' modules, so it comes last, once all trainers are built.
LAYERS: dict[str, dict[str, Any]] = {
    "eager": {"layers": "eager"},
    "compiled": {"layers": "compiled", "torch_compile_backend": BACKEND},
    "liger": {"layers": "liger"},
}


@dataclass(frozen=True)
class Case:
    """What is trained: all weights or LoRA, how they are loaded, and whether activations are recomputed."""

    lora: bool
    dtype: torch.dtype
    checkpointing: bool
    by_name: bool = False  # the trainer has loaded the model, and rounds its frozen weights

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        name = f"LoRA, {dtype} base{' by name' * self.by_name}" if self.lora else f"full, {dtype}"
        return f"{name}, checkpointing" if self.checkpointing else name


CASES = [
    Case(lora, dtype, checkpointing)
    for lora in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    for checkpointing in (False, True)
] + [Case(True, torch.float32, checkpointing, by_name=True) for checkpointing in (False, True)]


class Moved(NamedTuple):
    """Bytes moved in a training step under bf16 autocast; the parts are those of ``per_token``, by operator."""

    per_token: float  # per token, hidden unit and layer
    per_parameter: float  # of the layers
    parts: dict[str, float]


def count(trainer: ContrastiveTrainer) -> Moved:
    """Returns what a training step of a trainer of :func:`build` moves. Prepares its model as ``train`` does."""
    with trainer._rounded_weights():
        return _count(trainer)


def _count(trainer: ContrastiveTrainer) -> Moved:
    from transformers.integrations.liger import apply_liger_kernel

    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    if trainer.args.use_liger_kernel:
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    if trainer.args.gradient_checkpointing:
        enable = getattr(trainer.model, "activation_checkpointing_enable", trainer.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    traffic = Traffic()
    config = base_model(trainer.packed.model).config
    batches = [trainer.collator([row]) for row in trainer.train_dataset]
    found: dict[tuple[int, int], Counter[str]] = {}
    torch._dynamo.reset()
    with mock.patch.object(attention, "choose_attention", return_value=_Attention()):
        for layers in (1, 2):
            config.num_hidden_layers = layers
            for size, batch in enumerate(batches):
                trainer.model.zero_grad(set_to_none=True)
                traffic.by_operator.clear()
                with traffic, counted_launches(traffic):
                    counts = trainer._counts([batch], torch.device("cpu"))
                    trainer.training_step(trainer.model_wrapped, dict(batch), counts)
                found[layers, size] = Counter(traffic.by_operator)

    # The second layer alone, in a short and a long row; then the slope and the rest.
    short, long = ({name: n - found[1, size][name] for name, n in found[2, size].items()} for size in (0, 1))
    tokens = [batch["input_ids"].numel() for batch in batches]
    slopes = {name: (long[name] - short.get(name, 0)) / (tokens[1] - tokens[0]) for name in long}
    fixed = sum(short.values()) - sum(slopes.values()) * tokens[0]
    parameters = sum(p.numel() for name, p in trainer.model.named_parameters() if ".layers.0." in name)
    parts = {name: round(slope / CONFIG["hidden_size"], 2) for name, slope in slopes.items() if slope}
    return Moved(sum(slopes.values()) / CONFIG["hidden_size"], fixed / parameters, parts)


def build(case: Case, options: dict[str, Any]) -> ContrastiveTrainer:
    """Returns a trainer of a case, with these options."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(case.dtype)
    draw = np.random.default_rng(0).integers
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: draw(3, VOCAB, n).tolist() for name, n in zip(names, lengths)} for lengths in LENGTHS]
    common: dict[str, Any] = {"loss_type": "cpo", "max_length": None, "use_cpu": True, "bf16": True}
    common |= {"report_to": "none", "disable_tqdm": True, "gradient_checkpointing": case.checkpointing}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(model_layers, "_liger_problem", return_value=None):
        trainer = ContrastiveTrainer(
            model,
            args=ContrastiveConfig(folder, **common, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(VOCAB),
            peft_config=LoraConfig(**LORA) if case.lora else None,
        )
    trainer.is_loaded_here = case.by_name
    return trainer


class _Attention:
    """In place of a variable-length kernel: takes and gives tensors of the right shapes, and moves nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
        return _NoAttention.apply(q, k, v)


class _NoAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.new_empty(*q.shape[:2], v.shape[2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench bytes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", default=",".join(LAYERS), help="comma-separated list; default: all")
    parser.add_argument("--quick", action="store_true", help="two cases instead of ten")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.layers = options.layers.split(",")
    if unknown := set(options.layers) - set(LAYERS):
        parser.error(f"unknown layers {sorted(unknown)}: choose from {', '.join(LAYERS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    cases = [CASES[2], CASES[6]] if options.quick else CASES
    found: dict[str, dict[str, Moved]] = {str(case): {} for case in cases}
    for layers in filter(options.layers.__contains__, LAYERS):
        for case, trainer in [(case, build(case, LAYERS[layers])) for case in cases]:
            found[str(case)][layers] = count(trainer)
    rows = [
        [name, *(f"{by[kind].per_token:.0f} + {by[kind].per_parameter:.1f}" for kind in by)]
        for name, by in found.items()
    ]
    print("bytes per token, hidden unit and layer + bytes per parameter")
    print(table(["trained", *next(iter(found.values()))], rows))
    summary = {f"{name}, {kind}": round(moved.per_token, 1) for name, by in found.items() for kind, moved in by.items()}
    details = {name: {kind: moved._asdict() for kind, moved in by.items()} for name, by in found.items()}
    finish("bytes", {"cases": details}, summary, options)


if __name__ == "__main__":
    main()
