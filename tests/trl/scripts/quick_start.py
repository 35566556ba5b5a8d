from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

dataset = load_dataset("json", data_files="train.jsonl", split="train")
trainer = DPOTrainer(
    model="model",
    args=DPOConfig(output_dir="out", max_steps=4, learning_rate=1e-3, logging_steps=1, use_cpu=True, bf16=False),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model("out/final")
