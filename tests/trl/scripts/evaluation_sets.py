from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

data = load_dataset("json", data_files={"train": "train.jsonl", "test": "test.jsonl"})
chats = load_dataset("json", data_files="chats.jsonl", split="train")
trainer = DPOTrainer(
    "model",
    args=DPOConfig(
        "out",
        max_steps=4,
        use_cpu=True,
        bf16=False,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
    ),
    train_dataset=data["train"],
    eval_dataset={"text": data["test"], "chat": chats},
)
trainer.train()
metrics = trainer.evaluate()
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
