from datasets import load_dataset
from transformers import EarlyStoppingCallback
from trl import DPOConfig, DPOTrainer

data = load_dataset("json", data_files={"train": "train.jsonl", "test": "test.jsonl"})
trainer = DPOTrainer(
    "model",
    args=DPOConfig(
        "out",
        num_train_epochs=4,
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/accuracies",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
)
trainer.train()
trainer.evaluate()
