"""Options of other trainers, and of older versions, that are refused or have no effect here, each with its mend."""

# Options of TRL and transformers that have no effect here, by reason. They are accepted, so that a configuration made
# for TRL works, and the reason is logged.
_IGNORED_BY_REASON = {
    "batches are always packed, without padding": ("padding_free",),
    "nothing is padded": ("pad_to_multiple_of",),
    "nothing is padded; set tokenizer.pad_token to save a tokenizer with a padding token": ("pad_token",),
    "the reference scores whole prompt groups, max_tokens_per_batch tokens at a time": ("precompute_ref_batch_size",),
    "a run trains, and evaluates if it has evaluation data": ("do_train", "do_eval", "do_predict"),
    "evaluation keeps sums and rewards, no logits": (
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics"),
    ),
    "evaluation runs in the precision of training": ("bf16_full_eval", "fp16_full_eval"),
    "only the columns of the data's form are read": ("remove_unused_columns", "label_names", "length_column_name"),
    "a step always averages over its pairs": ("average_tokens_across_devices",),
    "preferences are smoothed by label_smoothing": ("label_smoothing_factor",),
    "training keeps no key-value cache": ("use_cache",),
    "the launcher sets the rank by LOCAL_RANK": ("local_rank",),
}
# Option -> reason.
IGNORED_OPTIONS = {name: reason for reason, names in _IGNORED_BY_REASON.items() for name in names}
# Options of older versions of TRL and transformers. They are refused with this advice.
REMOVED_OPTIONS = {
    # TRL
    "rpo_alpha": "set loss_type=[sigmoid, sft] and loss_weights=[1, rpo_alpha]",
    "reference_free": "set loss_type=cpo and cpo_alpha=0, which is DPO without a reference; or simpo, orpo, slic",
    "max_prompt_length": "set max_length, the longest prompt and completion together",
    "max_completion_length": "set max_length, the longest prompt and completion together",
    "max_target_length": "only decoders are supported; set max_length",
    "is_encoder_decoder": "only decoders are supported",
    "label_pad_token_id": "nothing is padded",
    "padding_value": "nothing is padded",
    "generate_during_eval": "evaluation draws no samples; generate from a saved model with cpt generate",
    "use_logits_to_keep": "the head always reads completion rows only",
    "use_num_logits_to_keep": "the head always reads completion rows only",
    "use_liger_loss": "the head has its own kernels",
    "base_model_attribute_name": "the head has its own kernels",
    "model_adapter_name": "the active adapter is trained",
    "ref_adapter_name": "for a model that comes with an adapter, that adapter's start values are the reference",
    "force_use_ref_model": "a ref_model that is passed is used",
    "ref_model_init_kwargs": "load the reference yourself and pass it as ref_model",
    "tools": "give the data a column of tools",
    # transformers
    "warmup_ratio": "set warmup_steps, which below 1 is a share of all steps",
    "evaluation_strategy": "set eval_strategy",
    "torch_dtype": "set dtype",
    "no_cuda": "set use_cpu",
    "group_by_length": "set max_tokens_per_batch, which fills micro-batches with rows of any length",
    "overwrite_output_dir": "an existing output_dir is written to",
    "logging_dir": "set the directory in the tracker's own variable: TENSORBOARD_LOGGING_DIR, WANDB_DIR",
    "save_safetensors": "weights are always saved as safetensors",
    "push_to_hub_model_id": "set hub_model_id",
    "include_tokens_per_second": "num_tokens is always logged",
    "fsdp_transformer_layer_cls_to_wrap": "set transformer_layer_cls_to_wrap in fsdp_config",
    "gradient_checkpointing_use_reentrant": "set use_reentrant in gradient_checkpointing_kwargs",
    "use_liger": "set use_liger_kernel",
}
# Options of other trainers and recipes that do the same under another name -> what to set here. They are refused with
# this advice. Those whose values mean the same here are read: see ALIASES.
FOREIGN_OPTIONS = {
    # alignment-handbook and SimPO
    "dataset_mixer": "set datasets, a list of mappings with path and fraction; or dataset_name",
    "dataset_splits": "set split in the entries of datasets; or dataset_train_split and dataset_test_split",
    "dataset_configs": "set name in the entries of datasets; or dataset_config",
    "gamma_beta_ratio": "set simpo_gamma, which is gamma_beta_ratio times beta",
    "preprocessing_num_workers": "set dataset_num_proc",
    "use_flash_attention_2": "set attention_backend, which is auto by default",
    "max_seq_length": "set max_length",
    # LLaMA-Factory and Axolotl
    "use_lora": "set use_peft",
    "finetuning_type": "set use_peft=true for LoRA, and nothing to train all weights",
    "lora_rank": "set lora_r",
    "lora_target": "set lora_target_modules",
    "pref_loss": "set loss_type",
    "pref_beta": "set beta",
    "pref_ftx": "set loss_type=[sigmoid, sft] and loss_weights=[1, pref_ftx]",
    "cutoff_len": "set max_length",
    "template": "the tokenizer's own chat template is used; name a tokenizer by tokenizer_name",
    "base_model": "set model_name_or_path",
    "sequence_len": "set max_length",
    "micro_batch_size": "set per_device_train_batch_size",
    "num_epochs": "set num_train_epochs",
    "rl": "set loss_type",
    "rl_beta": "set beta",
    "sample_packing": "set packing, which is auto by default",
    # short names
    "model": "set model_name_or_path",
    "dataset": "set dataset_name",
    "lr": "set learning_rate",
    "batch_size": "set per_device_train_batch_size",
    "epochs": "set num_train_epochs",
    "loss": "set loss_type",
}
# Other names of options, with the same values.
ALIASES = {"val_set_size": "test_split_size", "val_size": "test_split_size"}
