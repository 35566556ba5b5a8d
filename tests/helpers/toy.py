"""A word-level tokenizer and random preference rows for trainer tests."""

from __future__ import annotations

import itertools
import random

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cpt_kernels.config import ContrastiveConfig
from tests.helpers.architectures import VOCAB

WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... and <pad>, <s>, </s>, as many as the tiny models have rows."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(rng: random.Random, longest: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def preference_rows(count: int, seed: int = 0) -> list[dict]:
    """Every third row is of the models a>c, the others of a>b; ``gap`` grows with the row's number, then repeats."""
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


def config(folder, **options) -> ContrastiveConfig:
    """Quiet CPU options; reference log-probs beside the output."""
    defaults = {
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
    return ContrastiveConfig(output_dir=f"{folder}/out", **{**defaults, **options})


def pairs_of(batch: dict) -> list[str]:
    """The pairs of a packed batch, as the tokens of chosen > rejected."""
    ends, tokens = batch["cu_completions"].tolist(), batch["targets"].tolist()
    texts = [" ".join(map(str, tokens[start:end])) for start, end in itertools.pairwise(ends)]
    return [f"{texts[c]} > {texts[r]}" for c, r in zip(batch["chosen"].tolist(), batch["rejected"].tolist())]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
