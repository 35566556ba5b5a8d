"""DPO in a script written for TRL: only the import is changed.

python examples/train_dpo.py quickstart/model quickstart/pairs.jsonl     # files of the README's quickstart
python examples/train_dpo.py Qwen/Qwen2.5-0.5B-Instruct trl-lib/ultrafeedback_binarized --learning_rate 1e-6
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

from cpt_kernels import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("data", help="JSONL file or hub name; rows with prompt, chosen and rejected")
    parser.add_argument("--output_dir", default="runs/train_dpo")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="the default suits a tiny random model")
    parser.add_argument("--max_steps", type=int, default=20)
    options = parser.parse_args()

    if Path(options.data).is_file():
        dataset = load_dataset("json", data_files=options.data, split="train")
    else:
        dataset = load_dataset(options.data, split="train")
    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            output_dir=options.output_dir,
            learning_rate=options.learning_rate,
            max_steps=options.max_steps,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
