"""What becomes of a model: packed exactly, in padded rows exactly, refused, or not run.

A model is held to its own forward of every completion alone: log-probs and gradients in one forward, and losses and
weights in a run of the trainer with gradient checkpointing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
from cpt_kernels.data.collate import PackedCollator, Tokens
from cpt_kernels.errors import UserError
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.model.trials import disable_dropout
from cpt_kernels.training.checks import aux_loss_coef
from tests.helpers.tiny_configs import VOCABULARY, causal_models, encoders, image_text_models
from tests.helpers.toy import word_tokenizer

BETA = 0.5
STEPS, PAIRS = 2, 3  # pairs per step
LEARNING_RATE = 2e-3
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}  # parts of fp64 models compute in fp32
TRAINED_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-3}  # reference log-probs are in fp32

# Name of a table -> classes by model type, and changes of their configs.
TABLES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "causal": (causal_models(), {}),
    "decoder": (encoders(), {"is_decoder": True}),
    "image-text": (image_text_models(), {}),
}

Build = Callable[..., PreTrainedModel]  # changes of the config -> the model


def outcome(build: Build, folder: Path) -> str:
    """What becomes of a model, with its embeddings as by default and tied the other way; raises where it is not exact.

    Args:
        build: makes the model, always with the same weights.
        folder: for the trainer's files.
    """
    try:
        model = build()
    except ImportError as error:
        return f"not built: {' '.join(str(error).split()[:4])}"  # "TimmWrapperModel requires the timm"
    except Exception as error:  # whatever a class raises that cannot be built from its own defaults
        return f"not built: {type(error).__name__}"
    found = _outcome(model, folder / "default")
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", None)
    if tied is None:
        return found
    try:
        other = build(tie_word_embeddings=not tied)
    except Exception:  # the class has its embeddings in one way only
        return found
    if other.config.get_text_config().tie_word_embeddings != tied:
        assert _outcome(other, folder / "other") == found, f"tie_word_embeddings={not tied} has another outcome"
    return found


def _outcome(model: PreTrainedModel, folder: Path) -> str:
    own = copy.deepcopy(model.eval())
    try:
        trainer = make_trainer(model, folder)
    except UserError as error:
        reason = str(error).removeprefix(f"{type(model).__name__} ").split(":")[0]
        return f"refused: {reason}"
    packed = trainer.packed
    if own.config.model_type == "reformer":  # it has gradients in training mode only
        disable_dropout(own.train())
        model.train()
    check_forward(packed, own)
    way = "padded rows" if packed.padded else "packed"
    way += ", own logits" if packed.options is None else ""
    if _is_random(trainer.model):  # no two runs of it are equal
        trainer.train()
        return f"{way}, random in training"
    check_training(trainer, own)
    return way


# --- One forward ---


def sequences() -> list[Tokens]:
    """Other tokens and lengths than those of the proof, longer than a window and than a convolution's kernel."""
    random = torch.Generator().manual_seed(7)
    first, second = _draw(random, 11), _draw(random, 3)
    return [
        (first, _draw(random, 7)),
        (first, _draw(random, 2)),
        (second, _draw(random, 9)),
        (second, _draw(random, 4)),
    ]


def alone(model: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of a completion's tokens by the model's own forward."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def check_forward(packed: PackedModel, own: nn.Module, rows: Sequence[Tokens] | None = None) -> None:
    """Raises AssertionError if log-probs or a gradient differ from those of each completion alone."""
    rows = sequences() if rows is None else rows
    expected = torch.cat([alone(own, *sequence) for sequence in rows])
    found = packed(PackedCollator(padded=packed.padded).pack(rows, [], [], [])).tokens.logps
    tolerance = TOLERANCE[expected.dtype]
    assert (found - expected).abs().max() < tolerance * max(1, expected.abs().max()), "log-probs differ"
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    expected_grads, grads = (
        _gradients(logps @ weights.to(logps), m) for logps, m in ((expected, own), (found, packed.model))
    )
    scale = max(grad.abs().max() for grad in expected_grads.values())
    for name, expected_grad in expected_grads.items():
        assert (grads[name] - expected_grad).abs().max() < tolerance * scale, f"gradients of {name} differ"


def _gradients(value: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}


# --- Training ---


def make_trainer(model: PreTrainedModel, folder: Path) -> ContrastiveTrainer:
    """A trainer with gradient checkpointing where the class has it, and the auxiliary loss of a mixture on."""
    try:
        is_mixture = aux_loss_coef(model, None) > 0
    except AttributeError:  # Llama 4 with images does not run on token ids alone, so the trainer refuses it
        is_mixture = False
    args = ContrastiveConfig(
        output_dir=str(folder / "out"),
        ref_cache_dir=str(folder / "ref"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        train_sampling_strategy="sequential",
        logging_steps=1,
        # Tokens of a shared prompt count once in the auxiliary loss, where the model's own counts them twice.
        share_prompts="false" if is_mixture else "auto",
        gradient_checkpointing=model.supports_gradient_checkpointing,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    data = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row)) for row in pairs()]
    return ContrastiveTrainer(
        model, args=args, train_dataset=Dataset.from_list(data), processing_class=word_tokenizer()
    )


def pairs() -> list[tuple[tuple[int, ...], ...]]:
    """(prompt, chosen, rejected) of every pair, of uneven lengths."""
    random = torch.Generator().manual_seed(9)
    lengths = [(7, 3, 6), (2, 8, 1), (9, 4, 4), (1, 5, 7), (12, 2, 9), (4, 6, 3)]
    return [tuple(_draw(random, n) for n in row) for row in lengths]


def check_training(trainer: ContrastiveTrainer, own: nn.Module) -> None:
    """Raises AssertionError if losses or weights differ from those of steps with each completion alone."""
    start = [p.detach().clone() for p in own.parameters()]
    expected = _train_alone(own)
    trainer.train()
    tolerance = TOLERANCE[own.dtype]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, (loss, expected_loss) in enumerate(zip(losses, expected, strict=True)):
        assert abs(loss - expected_loss) < tolerance * max(1, abs(expected_loss)), f"the loss of step {step} differs"
    trained = dict(trainer.model.named_parameters())
    scale = max((p - before).abs().max().item() for p, before in zip(own.parameters(), start))
    for name, p in own.named_parameters():
        assert (trained[name] - p).abs().max() < TRAINED_TOLERANCE[own.dtype] * scale, (
            f"{name} differs after {STEPS} steps"
        )


def _is_random(model: nn.Module) -> bool:
    """Whether log-probs are random in training mode, dropout disabled: routers may draw experts."""
    model.train()
    runs = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            runs.append(torch.cat([alone(model, *sequence) for sequence in sequences()]))
    return not (torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]))


def _train_alone(model: nn.Module) -> list[float]:
    """Trains a model by its own forward of each completion alone; returns the loss of every step."""
    coef = aux_loss_coef(model, None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    rows, losses = pairs(), []
    with torch.no_grad():
        references = {(p, c): alone(model, p, c).sum() for p, *both in rows for c in both}
    for step in range(STEPS):
        batch = rows[step * PAIRS : (step + 1) * PAIRS]
        margins = []
        for prompt, chosen, rejected in batch:
            ratios = [alone(model, prompt, c).sum() - references[prompt, c] for c in (chosen, rejected)]
            margins.append(BETA * (ratios[0] - ratios[1]))
        loss = -nn.functional.logsigmoid(torch.stack(margins)).mean()
        if coef:
            loss = loss + coef * _aux_loss(model, [p + c for p, *both in batch for c in both])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _aux_loss(model: nn.Module, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """The model's own auxiliary loss, of the router logits of all sequences, each of which is run alone."""
    module, logits, arguments = sys.modules[type(model).__module__], [], []
    own = getattr(module, "load_balancing_loss_func", None)
    if own is None:
        return torch.zeros(())  # not every mixture has one

    def record(gate_logits, num_experts=None, top_k=2, attention_mask=None):
        if gate_logits is not None:  # None where all layers are dense
            logits.append(gate_logits)
            arguments.append((num_experts, top_k))
        return own(gate_logits, num_experts, top_k, attention_mask)

    module.load_balancing_loss_func = record
    try:
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False, output_router_logits=True)
    finally:
        module.load_balancing_loss_func = own
    return own(tuple(torch.cat(layer) for layer in zip(*logits)), *arguments[0]) if logits else torch.zeros(())


def _draw(random: torch.Generator, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, VOCABULARY - 8, (count,), generator=random).tolist())
