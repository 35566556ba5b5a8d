"""The files of the README's quickstart: responses of three models, and a small model to train on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

RESPONSES = Path(__file__).with_name("data") / "responses.jsonl"
_VOCABULARY = 600
_PAD, _EOS = "<pad>", "<eos>"


def write_quickstart(folder: Path) -> None:
    """Write ``responses.jsonl`` and ``model/``, a Llama with random weights and its tokenizer, to ``folder``.

    The responses are 51 rows of prompt, model and response. The model has about 250,000 parameters, and its byte-level
    BPE tokenizer is trained on the responses.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RESPONSES, folder / RESPONSES.name)
    tokenizer = _train_tokenizer([json.loads(line) for line in RESPONSES.read_text(encoding="utf-8").splitlines()])
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _train_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    texts = [row[column] for row in rows for column in ("prompt", "response")]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_PAD, eos_token=_EOS)
