from datasets import load_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3
        return control


class WeightedTrainer(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (2 * loss[0], loss[1]) if return_outputs else 2 * loss


def add_question_mark(row):
    return {"prompt": row["prompt"] + "?"}


trainer = WeightedTrainer(
    model="model",
    args=DPOConfig(
        output_dir="out",
        model_init_kwargs={"dtype": "float32"},
        max_steps=4,
        use_cpu=True,
        bf16=False,
        learning_rate=1e-3,
        logging_steps=1,
        per_device_train_batch_size=4,
        label_names=[],
    ),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train").map(add_question_mark),
    callbacks=[StopEarly()],
)
trainer.train()
trainer.create_model_card(model_name="tiny-dpo", dataset_name="pairs", tags=["test"])
