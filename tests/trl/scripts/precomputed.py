from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

config = DPOConfig(
    output_dir="out",
    precompute_ref_log_probs=True,
    precompute_ref_batch_size=8,
    loss_type="ipo",
    max_length=24,
    max_steps=4,
    use_cpu=True,
    bf16=False,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    logging_steps=1,
    per_device_train_batch_size=4,
)
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained("model"),
    ref_model=AutoModelForCausalLM.from_pretrained("reference"),
    args=config,
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained("model"),
)
trainer.train()
