"""How fast are preference pairs tokenized, compared with TRL's ``DPOTrainer``?

    python -m bench tokenize --data FILE.jsonl --pairs 50000

FILE has rows ``{"prompt", "model", "response"}``; a pair is the responses of two models to one prompt. Pairs are
repeated, with a number in front of the prompt, until there are enough. A byte-level BPE tokenizer with the
pre-tokenizer of recent models is trained on the file's text. The timed part is all that the trainers do to the rows
before the first step: TRL's ``_prepare_dataset``, in one process and in one process per core (``dataset_num_proc``),
and our ``prepare`` in one process, with the cache of ``datasets`` off. The tokens are checked to be the same. The
report has rows per second and ratios.

    one pair a prompt    the responses of the first and the last model: every text occurs once
    all pairs            the pairs of all models: a response is in several pairs
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, count, islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cpt_kernels.data.preparation import prepare

from .lengths import train_bpe
from .timing import add_output_options, finish, summarize, table

# GPT-4's pre-tokenizer, which Llama 3 and Qwen use with small changes.
_WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench tokenize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines file with prompt, model and response")
    parser.add_argument("--pairs", type=int, default=50_000, help="number of pairs to tokenize")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--quick", action="store_true", help="smoke test with 500 pairs")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs = 500
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    answers: dict[str, dict[str, str]] = {}
    for line in options.data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers.setdefault(row["prompt"], {})[row["model"]] = row["response"]
    tokenizer = train_tokenizer(answers, options.vocab)
    results = []
    for name, every in (("one pair a prompt", False), ("all pairs", True)):
        rows = list(islice(repeat(answers, every), options.pairs))
        for form in ("text", "chat"):
            dataset = Dataset.from_list(rows if form == "text" else list(map(as_chat, rows)))
            results.append({"pairs": name, "form": form, **measure(dataset, tokenizer, options)})
    print(report(results, options))
    summary = {
        f"{r['form']}, {r['pairs']}": [round(r[key], 2) for key in ("ratio", "ratio_processes")] for r in results
    }
    more = {"data": options.data.name, "rows": options.pairs, "processes": cores()}
    finish("tokenize", {"results": results, **more}, summary, options)


def train_tokenizer(answers: dict[str, dict[str, str]], vocab: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the responses and gives it a chat template."""
    texts = (text for said in answers.values() for text in said.values())
    tokenizer = train_bpe(texts, vocab, _WORDS, ("<|user|>", "<|assistant|>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = _TEMPLATE
    return wrapped


def repeat(answers: dict[str, dict[str, str]], every: bool):
    """Yields pairs forever: all pairs of a prompt if ``every``, else the first and the last response."""
    for number in count():
        for prompt, said in answers.items():
            texts = list(dict.fromkeys(said.values()))
            for better, worse in combinations(texts, 2) if every else [(texts[0], texts[-1])] * (len(texts) > 1):
                yield {"prompt": f"{number}. {prompt}\n", "chosen": better, "rejected": worse}


def as_chat(row: dict[str, str]) -> dict[str, Any]:
    """Converts a row of texts to messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}


def measure(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> dict[str, Any]:
    """Checks that the tokens are the same, then times all contestants, rounds interleaved."""
    theirs = make_trl(dataset.select(range(2)), tokenizer, options.max_length)
    contestants = {
        "trl": partial(theirs, processes=None),
        "trl_processes": partial(theirs, processes=cores()),
        "ours": lambda data: prepare(data, tokenizer, max_length=options.max_length)[0],
    }
    few = dataset.select(range(min(len(dataset), 500)))
    check_same(contestants["ours"](few), contestants["trl"](few))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(dataset)
            times[name].append(time.perf_counter() - start)
    medians = {name: summarize(values)["median"] for name, values in times.items()}
    ratios = {
        "ratio": medians["trl"] / medians["ours"],
        "ratio_processes": medians["trl_processes"] / medians["ours"],
    }
    return {"seconds": times, **ratios, **medians}


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def make_trl(few: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Callable[..., Dataset]:
    """Returns TRL's preparation as a function of a dataset and ``processes``.

    It is a method of the trainer, so this builds a trainer with a tiny model.
    """
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(**tokens, **sizes)).save_pretrained(folder)
        args = DPOConfig(folder, use_cpu=True, bf16=False, report_to="none", max_length=max_length)
        trainer = DPOTrainer(folder, args=args, train_dataset=few, processing_class=tokenizer)

    def run(data: Dataset, processes: int | None) -> Dataset:
        args.dataset_num_proc = processes
        return trainer._prepare_dataset(data, tokenizer, args, "train")

    return run


def check_same(ours: Dataset, theirs: Dataset) -> None:
    """Checks that every row of ours is a row of TRL's.

    Ours may have fewer rows, because it drops pairs whose two sides are equal after truncation.
    """
    found = {json.dumps([row["prompt_ids"], *row["completion_ids"]]) for row in ours}
    expected = {json.dumps([row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]) for row in theirs}
    assert found <= expected and len(found) > 0.9 * len(expected), "the tokens differ from TRL's"


def report(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    names = {"trl": "TRL", "trl_processes": f"TRL, {cores()} processes", "ours": "ours"}
    header = ["", *(f"{name} rows/s" for name in names.values()), "TRL / ours, s", "with processes"]
    lines = [
        [f"{r['form']}, {r['pairs']}"]
        + [f"{options.pairs / r[name]:,.0f}" for name in names]
        + [f"{r['ratio']:.2f}", f"{r['ratio_processes']:.2f}"]
        for r in results
    ]
    threads = os.environ.get("RAYON_NUM_THREADS") or cores()
    return (
        f"{options.pairs} pairs of {options.data.name}; {threads} threads for the Rust tokenizer\n\n"
        f"{table(header, lines)}\n"
    )


if __name__ == "__main__":
    main()
