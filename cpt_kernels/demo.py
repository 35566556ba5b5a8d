"""``cpt demo``: a small model from nothing, by SFT and then DPO, through the trainer that users run.

The data are made here: short exercises on letters and digits, each with a right answer in the agreed form and one that
is wrong or sloppy. No network, no files but those it writes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from .config import ContrastiveConfig
from .reports import RunReport, eval_records
from .run import use_progress_lines
from .trainer import ContrastiveTrainer

_ALPHABET = string.ascii_letters + string.digits + " .:!,"
_WORD_LETTERS = "abcdefgh"


@dataclass(frozen=True)
class Size:
    """How much there is to learn from, and for how long."""

    train_rows: int
    held_out_rows: int
    sft_steps: int
    dpo_steps: int


FULL = Size(train_rows=5000, held_out_rows=240, sft_steps=600, dpo_steps=150)
QUICK = Size(train_rows=1000, held_out_rows=80, sft_steps=60, dpo_steps=20)


def main(argv: Sequence[str], prog: str = "cpt demo") -> None:
    """Run the demo and print what came of it."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a much shorter run, too short to learn the tasks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # for matrices this small more threads gain nothing, and lose much on a busy machine
    logging.getLogger("cpt_kernels").setLevel(logging.ERROR)  # of data made here there is nothing to report
    datasets.disable_progress_bars()
    run_demo(options.output_dir, options.seed, QUICK if options.quick else FULL)


# --- The exercises ---


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(_WORD_LETTERS, k=rng.randint(3, 5)))


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"reverse {word}: ", word[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"sort {word}: ", "".join(sorted(word))


def _count(rng: random.Random) -> tuple[str, str]:
    word, letter = _word(rng), rng.choice(_WORD_LETTERS[:3])
    return f"count {letter} in {word}: ", str(word.count(letter))


def _shift(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"next {word}: ", "".join(chr(ord(letter) + 1) for letter in word)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "next letters": _shift,
}


def _slip(answer: str, rng: random.Random) -> str:
    """The answer with one character replaced or two neighbours swapped."""
    at = rng.randrange(len(answer))
    if len(answer) > 1 and at + 1 < len(answer) and answer[at] != answer[at + 1] and rng.random() < 0.5:
        return answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :]
    others = string.digits if answer.isdigit() else _WORD_LETTERS
    return answer[:at] + rng.choice(others.replace(answer[at], "")) + answer[at + 1 :]


_SLOPPY: tuple[Callable[[str], str], ...] = (
    lambda answer: answer,  # no full stop
    lambda answer: f"{answer}!!",
    lambda answer: f"um, {answer}.",
    lambda answer: f"{answer} {answer}.",
)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Different prompts, each with a chosen answer, and a rejected one that is wrong (2 of 3) or sloppy (1 of 3)."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        task = rng.choice(list(TASKS))
        prompt, answer = TASKS[task](rng)
        sloppy = rng.random() < 1 / 3
        rejected = rng.choice(_SLOPPY)(answer) if sloppy else f"{_slip(answer, rng)}."
        rows.setdefault(prompt, {"task": task, "prompt": prompt, "chosen": f"{answer}.", "rejected": rejected})
    return list(rows.values())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    tokens = ["<pad>", "<eos>", *_ALPHABET]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, small enough for two CPU cores."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# --- Training and measuring ---


def run_demo(output: Path, seed: int, size: Size, console: Console | None = None) -> dict[str, dict[str, float]]:
    """Train, measure, print. Returns stage -> what was measured there."""
    console = console or Console(soft_wrap=True)
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    rows = make_rows(size.train_rows + size.held_out_rows, seed)
    held_out, train = rows[: size.held_out_rows], rows[size.held_out_rows :]
    (output / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(train)} pairs to train on, {len(held_out)} held out; a Llama of {parameters:,} parameters",
        highlight=False,
    )
    for row in held_out[:3]:
        console.print(f"  {row['prompt']}[green]{row['chosen']}[/]  not  [red]{row['rejected']}[/]", highlight=False)

    start, _ = measure(model, tokenizer, held_out, output)
    stages, right = {"start": start}, {}
    for name, loss_type, options in (
        ("SFT", "sft", {"max_steps": size.sft_steps, "learning_rate": 2e-3}),
        ("DPO", "sigmoid", {"max_steps": size.dpo_steps, "learning_rate": 2e-5}),
    ):
        console.print(f"\n[bold]{name}[/] on {'the chosen answers' if name == 'SFT' else 'the pairs'}")
        report = train_stage(model, tokenizer, train, held_out, output / name.lower(), loss_type, seed, **options)
        stages[f"after {name}"], right[name] = measure(model, tokenizer, held_out, output)
        last = eval_records(report.records)[-1]
    stages["after DPO"] |= {"reward accuracy": last["rewards/accuracies"], "reward margin": last["rewards/margins"]}
    (output / "results.json").write_text(json.dumps(stages, indent=2) + "\n", encoding="utf-8")
    console.print()
    console.print(_table(stages, held_out))
    for line in verdict(stages, right["SFT"], right["DPO"]):
        console.print(line, highlight=False)
    console.print(f"\n{time.perf_counter() - started:.0f} s. Written to {output}:", highlight=False)
    for file, what in _WRITTEN.items():
        console.print(f"  {file:<40}{what}", highlight=False)
    return stages


_WRITTEN = {
    "sft/, dpo/": "model and tokenizer",
    "sft/metrics.jsonl, dpo/metrics.jsonl": "every logged step and evaluation",
    "sft/curves.png, dpo/curves.png": "their curves (also .svg)",
    "held_out.jsonl, results.json": "held-out pairs, and the table as numbers",
}


def train_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train: list[dict],
    held_out: list[dict],
    output: Path,
    loss_type: str,
    seed: int,
    **options,
) -> RunReport:
    """Train ``model`` in place and save it; SFT sees the chosen side alone."""
    if loss_type == "sft":
        train = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in train]
    report = RunReport(output, f"cpt demo: {output.name.upper()}")
    steps = options["max_steps"]
    trainer = ContrastiveTrainer(
        model,
        args=ContrastiveConfig(
            output_dir=str(output),
            loss_type=loss_type,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=80,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            weight_decay=0.01,
            gradient_checkpointing=False,
            logging_steps=max(1, steps // 15),
            eval_strategy="steps",
            eval_steps=max(1, steps // 3),
            eval_on_start=True,
            save_strategy="no",
            ref_cache_dir=str(output / "reference"),
            seed=seed,
            bf16=False,
            use_cpu=True,
            **options,
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        callbacks=[report],
    )
    use_progress_lines(trainer)
    trainer.train()
    trainer.save_model()
    return report


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict], output: Path
) -> tuple[dict[str, float], list[bool]]:
    """Loss on the chosen answers, how often they are the likelier side, exact answers by greedy generation; and which
    answers are exact."""
    args = ContrastiveConfig(
        output_dir=str(output),
        loss_type="sft",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        per_device_eval_batch_size=80,
    )
    trainer = ContrastiveTrainer(model, args=args, eval_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    use_progress_lines(trainer)
    found = trainer.evaluate()
    exact = [text == row["chosen"] for text, row in zip(answers(model, tokenizer, rows), rows)]
    result = {
        "loss on the chosen": found["eval_loss"],
        "chosen is likelier": found["eval_rewards/accuracies"],
        "exact answers": sum(exact) / len(rows),
    }
    for task in TASKS:
        of_task = [right for right, row in zip(exact, rows) if row["task"] == task]
        result[f"exact answers: {task}"] = sum(of_task) / max(len(of_task), 1)
    return result, exact


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> list[str]:
    """What the model answers, most likely token by token."""
    model.eval()
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=16,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- The end ---


def _table(stages: dict[str, dict[str, float]], held_out: list[dict]) -> Table:
    table = Table(title=f"{len(held_out)} held-out prompts", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    units = {"loss on the chosen": "nats a token", "reward margin": "nats, beta 0.1", "reward accuracy": "against SFT"}
    for name in dict.fromkeys(name for measured in stages.values() for name in measured):
        is_share = name not in ("loss on the chosen", "reward margin")
        values = (measured.get(name) for measured in stages.values())
        cells = ("-" if v is None else f"{v:.0%}" if is_share else f"{v:.3f}" for v in values)
        table.add_row(f"{name} ({units[name]})" if name in units else name, *cells)
    return table


def verdict(stages: dict[str, dict[str, float]], before: list[bool], after: list[bool]) -> list[str]:
    """What these numbers show, and what they do not; ``before`` and ``after`` DPO say which answers are exact."""
    sft, dpo = stages["after SFT"], stages["after DPO"]
    mended = sum(now and not then for then, now in zip(before, after))
    broken = sum(then and not now for then, now in zip(before, after))
    # Were each change as likely to mend as to break, their difference would have this standard deviation.
    by_chance = abs(mended - broken) < 2 * math.sqrt(max(mended + broken, 1))
    lines = [
        f"DPO ranks {dpo['reward accuracy']:.0%} of the unseen pairs rightly against its reference; the chosen side is"
        f" the likelier one in {dpo['chosen is likelier']:.0%}, after SFT in {sft['chosen is likelier']:.0%}.",
        f"Of {len(after)} answers DPO mended {mended} and broke {broken}:"
        f" {'chance alone could do that.' if by_chance else 'more than chance.'}",
    ]
    if dpo["loss on the chosen"] > sft["loss on the chosen"]:
        lines.append("The chosen answers themselves became less likely, as DPO often has it: it widens the gap.")
    return [*lines, "This shows that the machinery works; it says nothing of large models or real preferences."]
