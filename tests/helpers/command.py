"""Writes the files that runs of ``cpt-train`` read (a tiny model, a tokenizer, pairs), and runs it in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from cpt_kernels.cli import train_main

NEEDED = ("--model_name_or_path", "m", "--dataset_name", "d.jsonl")
WORDS = ["the", "sky", "is", "blue", "and", "sun", "so", "bright", "today", "or", "grey", "with", "rain", "over"]


def bpe_tokenizer(texts: Iterable[str], size: int = 330, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on ``texts``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=eos)


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, **config) -> Path:
    """Writes a config and a tokenizer, which suffice for ``from_scratch``."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    LlamaConfig(**{**sizes, **tokens, "tie_word_embeddings": True, **config}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Returns rows whose chosen side repeats the prompt's words and whose rejected side does not."""
    rng = random.Random(seed)
    draw = lambda: " ".join(rng.choices(WORDS, k=4))  # noqa: E731
    prompts = [draw() for _ in range(count)]
    return [{"prompt": p, "chosen": f" {p}", "rejected": f" {draw()} {draw()}"} for p in prompts]


def write_options(path: Path, **options) -> Path:
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


def run(*argv) -> int:
    """Runs ``cpt-train`` and returns its exit code."""
    return train_main([str(arg) for arg in argv])


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def one_error(capsys) -> str:
    """Returns the only line of cpt-train on stderr, which must be an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt-train: ")]
    assert len(lines) == 1 and lines[0].startswith("cpt-train: error: ")
    return lines[0]
