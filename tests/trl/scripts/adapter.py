import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

torch.manual_seed(0)
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("model", dtype="float32"), lora)
tokenizer = AutoTokenizer.from_pretrained("model")
tokenizer.pad_token = None

data = load_dataset("json", data_files={"train": "train.jsonl", "test": "test.jsonl"})
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        "out",
        max_steps=3,
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        logging_steps=1,
        remove_unused_columns=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
    ),
    train_dataset=data["train"].add_column("source", ["somewhere"] * 16),
    processing_class=tokenizer,
)
trainer.train()
trainer.evaluate(data["test"])
trainer.save_model("out/final")

again = AutoPeftModelForCausalLM.from_pretrained("out/final").merge_and_unload()
ids = tokenizer("the sky is blue", return_tensors="pt").input_ids
with torch.no_grad():
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
