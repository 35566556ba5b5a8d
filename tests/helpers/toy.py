"""A word-level tokenizer, random preference rows, and trainers of tiny models on them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
from tests.helpers.architectures import CONFIGS, VOCAB, tiny_model

# A header, the content and </s> for each turn; MARKED_TEMPLATE says what the assistant writes.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w0 ', 'assistant': 'w1 '}.get(m.role, 'w2 ') }}"
    "{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)
MARKED_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ m.content }} </s> ",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} </s> {% endif %}",
)
WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of w0, w1, ..., <pad>, <s> and </s>, with the vocabulary size of the tiny models."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(rng: random.Random, longest: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def preference_rows(count: int, seed: int = 0) -> list[dict]:
    """Returns random rows. Every third has the model pair a>c, the others a>b; ``gap`` is the row's index modulo 7."""
    rng = random.Random(seed)
    return [
        {
            **{name: text(rng) + " " for name in ("prompt", "chosen", "rejected", "sampled")},
            **{"chosen_model": "a", "rejected_model": "b" if i % 3 else "c", "gap": float(i % 7)},
        }
        for i in range(count)
    ]


def preference_data(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_list(preference_rows(count, seed))


def config(folder: Path, **options) -> ContrastiveConfig:
    """Returns options of a short run on a CPU, with the reference cache and the output in ``folder``."""
    defaults = {
        "output_dir": f"{folder}/out",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "ref_cache_dir": f"{folder}/ref",
    }
    return ContrastiveConfig(**{**defaults, **options})


def make_trainer(
    folder: Path, cls: type[ContrastiveTrainer] = ContrastiveTrainer, model="llama", rows: int = 16, **arguments
) -> ContrastiveTrainer:
    """Returns a trainer of a tiny model. ``arguments`` are options of the configuration or of the constructor."""
    fields = {field.name for field in dataclasses.fields(ContrastiveConfig)}
    options = {name: arguments.pop(name) for name in fields & arguments.keys()}
    defaults = {"train_dataset": preference_data(rows), "processing_class": word_tokenizer()}
    model = tiny_model(model) if isinstance(model, str) and model in CONFIGS else model
    return cls(model, args=config(folder, **options), **{**defaults, **arguments})


def pairs_of(batch: dict) -> list[str]:
    """Returns the pairs of a packed batch as texts, "chosen tokens > rejected tokens"."""
    ends, tokens = batch["cu_completions"].tolist(), batch["targets"].tolist()
    texts = [" ".join(map(str, tokens[start:end])) for start, end in itertools.pairwise(ends)]
    return [f"{texts[c]} > {texts[r]}" for c, r in zip(batch["chosen"].tolist(), batch["rejected"].tolist())]


def losses(trainer: ContrastiveTrainer) -> list[float]:
    """Returns the logged loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
