"""From responses of three models to a model trained from easy pairs to hard ones (arXiv 2310.02263).

    python examples/curriculum_from_responses.py quickstart/model quickstart/responses.jsonl   # the README's files

Pairs follow from the order of the models: no judge and no human. ``cpt pairs`` and ``cpt-train --curriculum`` do the
same from the command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
from cpt_kernels.cli import main as cpt

ORDER = "large > medium > small"
EASY, HARD = "large>small", "large>medium"  # a larger difference in strength is easier to learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("responses", help="JSONL file of prompt, model, response")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/curriculum"))
    parser.add_argument("--max_steps", type=int, default=20)
    options = parser.parse_args()

    pairs = options.output_dir / "pairs.jsonl"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if cpt(["pairs", options.responses, "--order", ORDER, "--pairs", f"{EASY}, {HARD}", "--output", str(pairs)]):
        raise SystemExit(1)  # the command has printed the reason

    trainer = ContrastiveTrainer(
        options.model,
        args=ContrastiveConfig(
            output_dir=str(options.output_dir),
            curriculum={"schedule": "linear", "levels": [EASY, HARD]},
            learning_rate=1e-3,  # for a tiny random model; 5e-7 to 5e-6 suits a pre-trained one
            max_steps=options.max_steps,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(pairs), split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
