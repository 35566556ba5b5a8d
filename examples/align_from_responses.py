"""The whole way from responses of several models to an aligned model, by the commands of the package.

    python examples/align_from_responses.py MODEL responses.jsonl --order "gpt4 > gpt-3.5-turbo-0301 > text_davinci_003"

Pairs follow from the order of the models. A LoRA adapter is trained on the responses of the strongest model (SFT), then
further on the pairs (DPO), from easy to hard, with its state after SFT as the reference. It is merged into the model,
which is compared with the model after SFT on held-out prompts: by reward accuracy, and by a judge. Every command is
printed before it runs, so that it can be copied.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from cpt_kernels.cli import main as cpt


def prefer(prompt: str, output_1: str, output_2: str) -> float:
    """A judge for demonstration: the output that repeats fewer of its words is better. Put your own here."""

    def variety(text: str) -> float:
        words = text.split()
        return len(set(words)) / max(len(words), 1)

    first, second = variety(output_1), variety(output_2)
    return 0.5 if first == second else float(first > second)


def run(*argv: object) -> None:
    """Prints and runs ``cpt ARGV``; ends the script if the command fails, which has printed the reason."""
    words = [str(word) for word in argv]
    print(f"\n$ cpt {shlex.join(words)}", flush=True)
    if code := cpt(words):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of the model to align")
    parser.add_argument("responses", help="JSONL file of prompt, model, response")
    parser.add_argument("--order", required=True, help="the models of the file, the strongest first: 'a > b > c'")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/align"))
    parser.add_argument("--learning_rate", default="1e-3", help="the default suits a tiny random model")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_steps", type=int, default=50, help="of each of the two trainings")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    options = parser.parse_args()
    out = options.output_dir
    pairs, held_out = out / "pairs.jsonl", out / "pairs.validation.jsonl"
    sft, dpo, merged = out / "sft", out / "dpo", out / "merged"

    # Pairs of the strongest model with each weaker one; some prompts are kept for the evaluation.
    strongest, *weaker = [name.strip() for name in options.order.split(">")]
    chosen = ["--order", options.order, "--base", strongest]
    run("pairs", options.responses, *chosen, "--validation", 0.1, "--sft", "--output", pairs)

    # SFT: a new adapter on the chosen responses, each of them once.
    cache = ["--ref_cache_dir", out / "cache"]
    train = ["--max_length", options.max_length, "--max_steps", options.max_steps]
    train += ["--learning_rate", options.learning_rate, "--logging_steps", 10, "--report_to", "none"]
    adapter = ["--use_peft", "--lora_target_modules", "all-linear"]
    of_sft = ["--dataset_name", out / "pairs.sft.jsonl", *train, *adapter, "--loss_type", "sft"]
    run("train", "--model_name_or_path", options.model, *of_sft, "--output_dir", sft)

    # DPO: the same adapter, on pairs with ever stronger rejected models. The plan counts the run without weights.
    # The check takes the first step without training.
    levels = [f"{strongest}>{name}" for name in reversed(weaker)]
    curriculum = ["--curriculum", json.dumps({"schedule": "linear", "levels": levels})]
    of_dpo = ["--dataset_name", pairs, *train, *cache, *curriculum]
    run("plan", "--model_name_or_path", options.model, *of_dpo, *adapter)
    run("train", "--adapter_name_or_path", sft, *of_dpo, "--output_dir", dpo, "--check")
    run("train", "--adapter_name_or_path", sft, *of_dpo, "--output_dir", dpo)
    run("merge", dpo, "--output", merged)

    # Evaluation on the held-out prompts.
    for model in (sft, merged):
        sampling = ["--max_new_tokens", options.max_new_tokens, "--temperature", 0]
        run(
            "generate",
            "--model_name_or_path",
            model,
            "--dataset_name",
            held_out,
            *sampling,
            "--output",
            f"{model}.jsonl",
        )
    evaluation = ["--data", held_out, *cache, "--output_dir", out / "eval-pairs"]
    run("eval", "pairs", "--models", sft, dpo, merged, *evaluation)
    outputs = ["--outputs", f"{merged}.jsonl", "--baseline", f"{sft}.jsonl"]
    # This script is the module __main__.
    run("eval", "win-rate", *outputs, "--judge", "__main__:prefer", "--output_dir", out / "eval-win-rate")
    run("cache", "info", *cache)


if __name__ == "__main__":
    main()
