from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
training_args = DPOConfig(
    output_dir="out",
    beta=0.2,
    max_steps=4,
    use_cpu=True,
    bf16=False,
    learning_rate=1e-2,
    logging_steps=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)
trainer = DPOTrainer(
    model=model,
    args=training_args,
    train_dataset=load_dataset("json", data_files="chats.jsonl", split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model(training_args.output_dir)
