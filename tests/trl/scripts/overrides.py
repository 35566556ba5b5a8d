import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer


class LongerEvaluation(TrainerCallback):
    batches = 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.batches += 1
        assert self.batches <= len(eval_dataloader)


class OwnTrainer(DPOTrainer):
    def create_optimizer(self):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate, momentum=0.5)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (loss[0] + self.beta, loss[1]) if return_outputs else loss + self.beta

    def training_step(self, *args, **kwargs):
        return 2 * super().training_step(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return 3 * loss, outputs, labels

    def log(self, logs, start_time=None):
        super().log({**logs, "own_loss": logs.get("loss", 0.0)}, start_time)


data = load_dataset("json", data_files={"train": "train.jsonl", "test": "test.jsonl"})
trainer = OwnTrainer(
    "model",
    args=DPOConfig(
        "out",
        max_steps=3,
        use_cpu=True,
        bf16=False,
        beta=0.3,
        learning_rate=1e-1,
        logging_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
    ),
    train_dataset=data["train"].to_iterable_dataset(),
    eval_dataset=data["test"],
    callbacks=[LongerEvaluation()],
)
trainer.train()
trainer.evaluate()
