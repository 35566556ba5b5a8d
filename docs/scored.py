"""Draws docs/what-is-scored.svg, a row of the data in colours, with the function that ``cpt plan`` uses:
``python docs/scored.py``.
"""

from __future__ import annotations

import io
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cpt_kernels.cli.decoded import decoded_pair
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.preparation import prepare

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    """Returns messages given as "role: content"."""
    return [dict(zip(("role", "content"), content.split(": ", 1))) for content in contents]


ROW = {
    "prompt": turns("user: what is the weather in Oslo ?"),
    "chosen": turns(
        "assistant: weather( Oslo )", "tool: 4 degrees , rain", "assistant: it rains , and it is 4 degrees ."
    ),
    "rejected": turns("assistant: weather( Oslo )", "tool: 4 degrees , rain", "assistant: it is sunny ."),
}


def main() -> None:
    texts = [turn["content"] for side in ROW.values() for turn in side]
    words = ["<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", *dict.fromkeys(" ".join(texts).split())]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|end|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)
    data, _ = prepare(Dataset.from_list([ROW]), tokenizer, assistant_only_loss=True)
    console = Console(record=True, width=100, file=io.StringIO())
    for line in decoded_pair(data[0], tokenizer, PackedCollator()):
        console.print(line)
    picture = Path(__file__).with_name("what-is-scored.svg")
    picture.write_text(console.export_svg(title="assistant_only_loss: true"), encoding="utf-8")


if __name__ == "__main__":
    main()
