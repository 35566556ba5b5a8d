"""The arms of the experiment, trained by the public trainer with public options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from ..config import ContrastiveConfig
from ..trainer import ContrastiveTrainer
from ..training.report import RunReport

EASY, HARD = "strong>weak", "strong>medium"  # kinds of pairs: teacher of the chosen > of the rejected response


@dataclass(frozen=True)
class Arm:
    """One way to continue training the start model."""

    title: str
    pairs: tuple[str, ...]  # kinds of pairs to train on (EASY, HARD); empty: the strong teacher's responses alone
    options: Mapping[str, Any] = field(default_factory=dict)  # of ContrastiveConfig


# Shared by all arms. The options of the single losses were chosen on seeds 100 to 102 (bench/NOTES.md), and the
# results are reported for other seeds.
ARM_OPTIONS = {"learning_rate": 5e-5, "lr_scheduler_type": "constant", "per_device_train_batch_size": 32}
_DPO = {"loss_type": "sigmoid", "beta": 0.5}
_SLIC = {"loss_type": "slic", "slic_delta": 10.0, "slic_lambda": 0.1, "target_column": "sampled"}
ARMS = {
    "sft": Arm("SFT continued", (), {"loss_type": "sft"}),
    "slic-easy": Arm("SLiC easy", (EASY,), _SLIC),
    "dpo-easy": Arm("DPO easy", (EASY,), _DPO),
    "dpo-hard": Arm("DPO hard", (HARD,), _DPO),
    "dpo-easy-to-hard": Arm(
        "DPO easy→hard", (EASY, HARD), _DPO | {"curriculum": {"schedule": "linear", "levels": [EASY, HARD]}}
    ),
    "dpo-hard-to-easy": Arm(
        "DPO hard→easy", (EASY, HARD), _DPO | {"curriculum": {"schedule": "reversed", "levels": [EASY, HARD]}}
    ),
}


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int, hidden: int = 128, layers: int = 3) -> LlamaForCausalLM:
    """Returns a Llama with random weights (0.6 million parameters by default), small enough to train on a CPU."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Trained:
    """The record of one training run."""

    records: list[dict[str, Any]]  # the trainer's logs, in order
    tokens_per_second: float
    found: int  # completions whose reference log-probs were in the cache
    scored: int  # completions that the reference had to score


def demo_config(folder: Path, **options: Any) -> ContrastiveConfig:
    """Returns the options of a run of the demo, which writes to ``folder`` and saves no checkpoint."""
    fixed = {"max_length": 128, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
    return ContrastiveConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **(fixed | options))


def demo_trainer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    args: ContrastiveConfig,
    callbacks: Sequence[TrainerCallback],
    peft_config: Any = None,
) -> ContrastiveTrainer:
    """Returns the trainer of a run of the demo, which prints nothing."""
    data, given = Dataset.from_list(list(rows)), {"processing_class": tokenizer, "callbacks": list(callbacks)}
    trainer = ContrastiveTrainer(model, args=args, train_dataset=data, peft_config=peft_config, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_in_place(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    title: str,
    on_step: Callable[[], object],
    *,
    peft_config: Any = None,
    **options: Any,
) -> Trained:
    """Trains ``model``, or a new adapter, in place, and writes weights, tokenizer, metrics and curves to ``folder``.

    Args:
        rows: dataset rows, in any form that the trainer reads.
        title: of the curves.
        on_step: called after every optimizer step.
        options: of :class:`ContrastiveConfig`; ``max_steps`` is required.
    """
    report = RunReport(folder, title)
    args = demo_config(folder, logging_steps=max(1, options["max_steps"] // 15), **options)
    trainer = demo_trainer(model, tokenizer, rows, args, [report, _StepCallback(on_step)], peft_config)
    cache = None if trainer.reference is None else trainer.reference.cache
    # The trainer's constructor fills the cache, so the counts are final before training starts.
    found, scored = (0, 0) if cache is None else (cache.hits, cache.misses)
    trainer.train()
    trainer.save_model()
    return Trained(report.records, report.tokens_per_second(), found, scored)


class _StepCallback(TrainerCallback):
    """Calls ``on_step`` after every optimizer step."""

    def __init__(self, on_step: Callable[[], object]) -> None:
        self.on_step = on_step

    def on_step_end(self, args, state, control, **_) -> None:
        self.on_step()
