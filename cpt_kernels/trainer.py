"""``ContrastiveTrainer``: transformers' Trainer on packed preference pairs, with the constructor of TRL's DPOTrainer.

The constructor shows what a trainer is made of, in order. Steps and evaluations are in
:mod:`cpt_kernels.training.loop`, checkpoints in :mod:`cpt_kernels.training.saving`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, set_seed
from transformers.trainer_utils import EvalPrediction

from .config import ContrastiveConfig
from .data.collate import PackedBatch, PackedCollator
from .data.curriculum import Curriculum, Draws
from .data.forms import FORM_COLUMNS, Form
from .data.images import holds_images, is_processor
from .data.loader import (
    check_budget,
    keep_easiest,
    longest_sequence,
    make_draws,
    make_loader,
    order_seed,
    report_draws,
    report_trees,
)
from .data.padded import UnpaddingCollator, packed_collator, with_reference
from .data.preparation import PreparationReport, prepare
from .data.rows import read_columns, visible_rows
from .data.tokenize import check_same_tokenizer, check_tokenizer
from .errors import UserError, user_error
from .losses import Loss, user_loss
from .model.images import image_reader
from .model.layers import not_compiled_whole, prepared_layers
from .model.loading import engine_weights, load_models, prepare_model, tokenizer_of
from .model.packed_model import PackedModel, Scores, base_model, embedding_rows, weighted_reference
from .model.pretrained import sample_base
from .model.sequence_groups import join_group
from .model.sharding import shard
from .model.sharing import sharing_options
from .model.trials import disable_dropout
from .ops.attention.select import describe_backend
from .ops.gather import segment_sum
from .reference.cache import default_cache_dir
from .reference.fingerprint import fingerprint_without_adapters
from .reference.moving import MovingReference, StagedReference
from .reference.scorer import Reference, put_sums
from .training.checks import (
    aux_loss_coef,
    check_checkpointing,
    check_columns,
    check_data,
    check_engine,
    check_image_counts,
    check_max_length,
    check_metric,
    check_overrides,
    check_positions,
    check_reference_model,
    check_removed_arguments,
    check_trainable,
    checked_config,
    checked_tokenizer,
    is_noisy,
    is_overridden,
    mend_generation_config,
    reading_options,
)
from .training.failures import passed
from .training.loop import PackedLoop
from .training.model_card import write_model_card
from .training.run_folder import check_free, earlier_run, is_finished
from .training.saving import log_on_main
from .training.stages import Stages, check_refresh
from .training.token_budget import check_can_choose

_NOT_RESUMED = "train() replaces its files unless it resumes; choose another output_dir to keep them"

Data: TypeAlias = Dataset | IterableDataset


class ContrastiveTrainer(PackedLoop):
    """Trains a causal language model on preference pairs (DPO, SLiC, RSO, IPO, ...) or on their chosen side (SFT).

    Args:
        model: a model, a PEFT model, or the name or folder of a model to load.
        ref_model: the reference. Default: the model with adapters off if ``peft_config`` makes the adapter and leaves
            the weights below it as they are, else the start weights.
        args: the options; default ``ContrastiveConfig("<model>-CPT")``.
        data_collator: a :class:`PackedCollator`, which is the default, or a collator that pads, such as TRL's.
        train_dataset: rows of any form that ``data.preparation.prepare`` takes, stored or as a stream; a stream needs
            ``max_steps``.
        eval_dataset: one such dataset, or a dictionary of several.
        processing_class: the tokenizer, or the processor of a model whose prompts have images; default the model's own.
        compute_metrics: is called with an ``EvalPrediction`` whose ``predictions`` are (pairs, 2), the rewards of
            chosen and rejected.
        callbacks, optimizers: as for transformers' Trainer.
        quantization_config: for a model given by name.
        peft_config: trains an adapter around the model.
        loss: your own loss instead of ``args.loss_type``: a :class:`Loss` or a function of :class:`PairLogps`.
        ref_tokenizer: the reference's tokenizer, to compare with the policy's.
        removed: arguments that TRL's constructor once had; the error names their replacement.

    Raises:
        UserError: data, models or options that cannot be used; the message says which and how to mend it.
    """

    dataset_name: str | Sequence[str] | None = None  # of the training data, for the model card and trackers

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: ContrastiveConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Data | None = None,
        eval_dataset: Data | dict[str, Data] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        loss: Loss | Callable | None = None,
        ref_tokenizer: PreTrainedTokenizerBase | None = None,
        **removed: Any,
    ) -> None:
        # Arguments, checked before anything is loaded.
        check_removed_arguments(removed)
        check_overrides(type(self), ContrastiveTrainer)
        args = checked_config(model, args, train_dataset, eval_dataset)
        self.loss = args.training_loss(loss if loss is None or isinstance(loss, Loss) else user_loss(loss))
        if args.eval_strategy != "no":
            adds_own = compute_metrics is not None or any(
                is_overridden(self, method) for method in (ContrastiveTrainer.evaluate, PackedLoop.evaluation_loop)
            )
            check_metric(args.metric_for_best_model, eval_dataset, adds_own, self.loss.needs_rejected)
        if train_dataset is not None:
            check_free(args.output_dir)
            if args.resume_from_checkpoint is None and is_finished(args.output_dir):
                log_on_main([f"output_dir={args.output_dir} holds {earlier_run(args.output_dir)}: {_NOT_RESUMED}"])
        set_seed(args.seed)  # before the weights of a new adapter are drawn

        # Loss, tokenizer, policy and reference model.
        has_images = holds_images(train_dataset, eval_dataset)
        if processing_class is None:
            processing_class = tokenizer_of(model, args, has_images)
        self._tokenizer, self._processor = checked_tokenizer(processing_class), processing_class
        has_images &= is_processor(processing_class)  # the data is refused otherwise, when it is prepared
        if ref_tokenizer is not None:
            check_same_tokenizer(self._tokenizer, ref_tokenizer)
        if isinstance(model, str) and not is_overridden(self, ContrastiveTrainer._prepare_dataset):
            check_columns(args, self.loss, self._processor, train_dataset, eval_dataset)
        self.is_loaded_here = isinstance(model, str)
        model, ref_model = load_models(model, ref_model, args, quantization_config)
        check_reference_model(model, ref_model)
        check_max_length(model, args.max_length)
        self.has_own_loss = loss is not None
        new_adapter = peft_config is not None and ref_model is None and self.loss.needs_reference
        given = fingerprint_without_adapters(model) if new_adapter else None
        model = prepare_model(model, args, peft_config)
        mend_generation_config(model)
        self.base_sample = sample_base(model) if hasattr(model, "peft_config") else {}
        if new_adapter and fingerprint_without_adapters(model) != given:
            # With the adapter off, the model would not be the given one.
            log_on_main(["this adapter changes the weights below it, so the reference is the policy at its start"])
            new_adapter = False

        if has_images and args.ddp_find_unused_parameters is None:
            # Vision towers have parameters that their model does not use, such as the last norm of LLaVA's.
            args.ddp_find_unused_parameters = not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")

        # FSDP2 wraps the models before anything runs them, so that no process ever holds them whole.
        self.args, self.model = args, model
        with not_compiled_whole(args), user_error():
            self.create_accelerator_and_postprocess()
        check_engine(args, self.accelerator)
        for each in (model, ref_model):
            if each is not None:
                shard(each, self.accelerator)
        if args.disable_dropout:
            disable_dropout(model, ref_model)

        # Packed model and collator: what turns rows into a loss.
        images = image_reader(base_model(model), self._processor) if has_images else None
        how = (args.attention_backend, args.packing, images, join_group(args))
        self.packed = PackedModel(model, args.head_memory_mb, *how)
        if args.world_size > 1:
            self.packed.agree()
        check_checkpointing(model, args, images)
        self.router_aux_loss_coef = aux_loss_coef(model, args.router_aux_loss_coef)
        self.packed.noisy = is_noisy(model, args)
        sharing = sharing_options(self.packed, args)
        cut = (args.max_length, args.truncation_mode)
        pads = dict(pad_token_id=self._tokenizer.pad_token_id or 0, padded=self.packed.padded)
        pads |= dict(images=self.packed.images, always_images=args.world_size > 1)
        packing = PackedCollator(*cut, share_limit=self.packed.share_limit, **pads, **sharing)
        data_collator = packed_collator(data_collator, packing)
        self.collator = getattr(data_collator, "packing", data_collator)

        # Data, and transformers' Trainer around model and data.
        datasets = self._prepare_datasets(train_dataset, eval_dataset, args)
        options: dict[str, Any] = dict(compute_metrics=compute_metrics, callbacks=callbacks, optimizers=optimizers)
        # transformers raises errors for an unknown tracker, or a hub that refuses the repository.
        with prepared_layers(model, args) as chosen_layers, user_error():
            super().__init__(model, args, data_collator, *datasets, processing_class=self._processor, **options)
        if (group := self.packed.group) is not None:  # else tokens on different ranks would have the same noise
            torch.manual_seed(args.seed + group.rank)
        if args.finds_budget and train_dataset is not None:
            check_can_choose(self)
        self.model_accepts_loss_kwargs = False  # what loss_is_scaled_for_ga says, before transformers 5.19
        base_model(model).add_model_tags(["cpt-kernels", *args.loss_type])

        # Metrics and reference.
        args.names = self._names()
        log_on_main([describe_backend(args.attention_backend, args.device.type), chosen_layers])
        self._start_metrics(args.ld_alpha if loss is None else None)
        if self._refreshes_reference:
            own = is_overridden(self, ContrastiveTrainer.compute_ref_log_probs)
            check_refresh(self.loss, self.precompute_ref_logps, own)
        if self.loss.needs_reference:
            self.reference = self._make_reference(ref_model, new_adapter)
        elif ref_model is not None:
            log_on_main([f"ref_model is not used: the loss '{self.loss.name}' has no reference"])

    # --- Data ---

    def _prepare_datasets(
        self, train_dataset: Data | None, eval_dataset: Data | dict[str, Data] | None, args: ContrastiveConfig
    ) -> tuple[Data | None, Data | dict[str, Data] | None]:
        """Returns the training data and the evaluation sets as prompt groups of token ids; sets ``draws``."""
        self.reports: dict[str, PreparationReport] = {}
        self.curriculum = None if args.curriculum is None else Curriculum.parse(args.curriculum)
        if train_dataset is not None:
            check_trainable(self.packed)
            prepared = self._prepared(train_dataset, args, "train")
            train_dataset, lines = keep_easiest(self.curriculum, prepared, order_seed(args))
            log_on_main(lines)
            self.draws = make_draws(self.curriculum, train_dataset, order_seed(args))
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepared(data, args, name) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, args, "eval")
        return train_dataset, eval_dataset

    def _prepare_dataset(
        self, dataset: Data, processing_class: Any, args: ContrastiveConfig, dataset_name: str
    ) -> Data:
        """Tokenizes rows with ``data.preparation.prepare``. An override may return any form that ``prepare`` takes."""
        name = dataset_name
        # The other processes find the result in the cache of datasets.
        with args.main_process_first(desc=f"tokenizing the {name} data"):
            dataset = visible_rows(dataset)
            options = reading_options(args, dataset, is_training=name == "train")
            dataset, report = prepare(dataset, processing_class, **options, num_proc=args.dataset_num_proc, name=name)
        self.reports[name] = report
        log_on_main(report.notes)
        vocab_size = embedding_rows(self.packed.model)
        if isinstance(dataset, Dataset):
            log_on_main(report.summary())
            check_tokenizer(self._tokenizer, vocab_size, report.max_token_id)
            check_data(self.loss, dataset, report.pairs, name)
        else:  # a stream is prepared while it is read, so its report is still empty
            check_tokenizer(self._tokenizer, vocab_size)
        return dataset

    def _prepared(self, dataset: Any, args: ContrastiveConfig, name: str) -> Data:
        """Prepares a dataset, and checks the lengths of its rows against the model and the micro-batches."""
        dataset = self._call_prepare(dataset, args, name)
        check_image_counts(self.packed, dataset, name)
        if isinstance(dataset, Dataset) and "completion_ids" in dataset.column_names:
            check_positions(self.packed.model, *longest_sequence(dataset, args.max_length), name)
            check_budget(dataset, self.collator, args.max_tokens_per_batch, name)
        return dataset

    def _call_prepare(self, dataset: Any, args: ContrastiveConfig, name: str) -> Data:
        """Calls :meth:`_prepare_dataset`; what an override of it returned is prepared further if need be."""
        dataset = self._prepare_dataset(dataset, self._processor, args, name)
        if not is_overridden(self, ContrastiveTrainer._prepare_dataset):
            return dataset
        is_plain = not isinstance(dataset, Dataset) or dataset.format["type"] is None
        if is_plain and {*FORM_COLUMNS[Form.GROUP]} <= {*read_columns(dataset)}:
            return dataset
        return ContrastiveTrainer._prepare_dataset(self, dataset, self._processor, args, name)

    def _prepare_new(self, dataset: Any, name: str) -> Data:
        """Prepares a dataset that the constructor has not seen, with its reference log-probs."""
        dataset = self._prepared(dataset, self.args, name)
        if self.reference is not None and isinstance(dataset, Dataset):
            passed(f"the preparation of the {name} data", watched=False)
            self.reference.fill(dataset, self.collator, self.args.max_tokens_per_batch, name)
        return dataset

    @property
    def datasets(self) -> dict[str, Data]:
        """The prepared datasets by name: "train", and "eval" or the names of the evaluation sets."""
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        return {name: data for name, data in {"train": self.train_dataset, **evals}.items() if data is not None}

    # --- Reference ---

    @property
    def precompute_ref_logps(self) -> bool:
        """Whether the reference scores all data before training; by default, unless there is a stream."""
        ahead = self.args.precompute_ref_log_probs
        if ahead is None:
            ahead = all(isinstance(data, Dataset) for data in self.datasets.values())
        return ahead and not self.args.sync_ref_model

    @property
    def _refreshes_reference(self) -> bool:
        return self.curriculum is not None and self.curriculum.refresh_reference

    def _make_reference(self, ref_model: nn.Module | None, new_adapter: bool) -> Reference | MovingReference:
        """Returns the reference, its cache filled for all stored datasets unless ``args`` ask for lazy scoring."""
        if self.args.sync_ref_model:
            moving = MovingReference(self.packed, ref_model, self.accelerator)
            self.add_callback(moving)
            return moving
        ahead = self.precompute_ref_logps
        # A collator that pads may truncate rows in its own way, which makes completions that were not scored ahead.
        keep = not ahead or isinstance(self.data_collator, UnpaddingCollator)
        cls = StagedReference if self._refreshes_reference else Reference
        reference = cls(
            self.packed,
            ref_model,
            new_adapter=new_adapter,
            keep=keep,
            loading=partial(engine_weights, self.args),
            accelerator=self.accelerator,
            cache_dir=self.args.ref_cache_dir or default_cache_dir(),
            head_memory_mb=self.args.head_memory_mb,
            progress=not self.args.disable_tqdm,
        )
        if isinstance(reference, StagedReference):
            self.add_callback(Stages(self, reference))
        if self.loss.needs_tails:
            reference.check_tokens()
        if ahead:
            self._fill(reference)
        return reference

    def _fill(self, reference: Reference) -> None:
        """Scores what the cache lacks of every stored dataset; ``cpt cache`` overrides it to do so later."""
        for name, data in self.datasets.items():
            if isinstance(data, Dataset):
                reference.fill(data, self.collator, self.args.max_tokens_per_batch, name)

    # --- Loaders ---

    def _loader(self, dataset: Data, training: bool) -> DataLoader:
        collator = packed_collator(self.data_collator, self.collator)  # users may have set data_collator since
        if self.reference is not None:
            collator = with_reference(collator, self.reference.lookup)
        draws = self.draws if training else None
        size = self._train_batch_size if training else self.args.per_device_eval_batch_size
        only = {"digest": self.stream_digest, "budget": self.budget} if training else {}
        return make_loader(dataset, collator, self.args, self.collator, training, draws, batch_size=size, **only)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise UserError("training needs data: give the trainer a train_dataset")
        loader = self._loader(self.train_dataset, training=True)
        log_on_main(report_trees(loader) if self.args.group_by_prefix else [])
        if isinstance(self.draws, Draws) and self.is_world_process_zero():
            log_on_main(report_draws(loader, self.draws, self.args))
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            raise UserError("evaluation needs data: give the trainer or evaluate() an eval_dataset")
        return self._loader(eval_dataset, training=False)

    def get_test_dataloader(self, test_dataset: Data) -> DataLoader:
        return self._loader(self._prepare_new(test_dataset, "test"), training=False)

    # --- Loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Returns the loss of a micro-batch, scaled so that a step's mean over micro-batches and ranks is right.

        transformers and DDP average over the micro-batches and ranks of a step. With this scale that average is the
        mean over the step's pairs, and a term that an override adds has the weight that it has in TRL. All ranks of a
        sequence group compute the same loss, and the average of their gradients is its gradient.

        Args:
            num_items_in_batch: (2,) pairs and chosen tokens of the step on all ranks; default this batch's own.

        Returns:
            The loss, (); with ``return_outputs`` the loss and :class:`Scores`.
        """
        if num_items_in_batch is None:
            pairs, tokens = (inputs[name] or 1 for name in ("num_pairs", "num_chosen_tokens"))
            tokens_per_pair = self.eval_tokens_per_pair or tokens / pairs
            batches = 1
        else:
            pairs, tokens = num_items_in_batch.where(num_items_in_batch > 0, 1)
            tokens_per_pair = tokens / pairs
            batches = self.args.data_ranks * self.current_gradient_accumulation_steps
        scores = self.score(model, inputs, tokens_per_pair)
        loss = scores.loss * (batches / pairs)
        if scores.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss * (inputs["num_pairs"] * batches / pairs)
        self.metrics["train" if model.training else "eval"].add(inputs, scores)
        passed(f"a forward after step {self.state.global_step}")
        same = self.reference is not None and not is_overridden(self, ContrastiveTrainer.compute_ref_log_probs)
        if model.training and same and self.state.global_step == self.reference.since:
            self.reference.check_start(inputs, scores.completion_logps)
        return (loss, scores) if return_outputs else loss

    def score(self, model: nn.Module, inputs: PackedBatch, tokens_per_pair: Tensor | float = 1.0) -> Scores:
        """Returns log-probs, statistics and the summed loss of a batch; missing reference log-probs are scored now."""
        if self.reference is not None:
            self._complete_reference(model, inputs)
        with self.maybe_activation_offload_context:
            return self.packed(
                inputs,
                self.loss,
                wrapped=model,
                general=self.args.head_mode == "general",
                statistics=True,
                tokens_per_pair=tokens_per_pair,
                aux_loss=self.aux_loss_enabled,
            )

    def compute_ref_log_probs(self, model: nn.Module, inputs: PackedBatch) -> tuple[Tensor, Tensor]:
        """Returns the reference log-probs of a batch's pairs, (P,) chosen and (P,) rejected, cached or scored now.

        Users may override it, as in TRL. An override is called for every batch, and its values are not cached.
        """
        self.reference.complete(inputs)
        sums = segment_sum(weighted_reference(inputs), inputs["cu_completions"])
        return sums[inputs["chosen"]], sums[inputs["rejected"]]

    def _complete_reference(self, model: nn.Module, inputs: PackedBatch) -> None:
        """Fills in the reference log-probs that a batch lacks."""
        if not is_overridden(self, ContrastiveTrainer.compute_ref_log_probs):
            self.reference.complete(inputs)
            return
        if self.loss.needs_tails or inputs["token_weights"] is not None:
            raise UserError(
                f"{'ld_alpha needs' if self.loss.needs_tails else 'weights of tokens need'} token log-probs, but the"
                " overridden compute_ref_log_probs returns sums: set only one of the two"
            )
        put_sums(inputs, *self.compute_ref_log_probs(model, inputs))

    # --- Names, model card and evaluation ---

    def _names(self) -> dict[str, str | list[str] | None]:
        """Returns the names of model and data. Without ``dataset_name``, data may know theirs."""
        data = self.dataset_name or getattr(getattr(self.train_dataset, "info", None), "dataset_name", None)
        return {
            "model_name_or_path": base_model(self.packed.model).config._name_or_path or None,
            "dataset_name": data if data is None or isinstance(data, str) else list(data),
        }

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] = ()
    ) -> None:
        """Writes the model card, README.md in ``output_dir``, over any earlier one; see :mod:`.training.model_card`."""
        if self.is_world_process_zero():
            base = base_model(self.packed.model)
            write_model_card(
                Path(self.args.output_dir) / "README.md",
                name=model_name or self.args.hub_model_id or Path(self.args.output_dir).name,
                base=self._names()["model_name_or_path"],
                dataset=dataset_name or self.dataset_name,
                tags=dict.fromkeys([*base.model_tags, *([tags] if isinstance(tags, str) else tags)]),
                args=self.args,
                chat=getattr(self._tokenizer, "chat_template", None) is not None,
                log_history=self.state.log_history,
            )

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """Evaluates as transformers' ``evaluate``; ``eval_dataset`` may have any form that the constructor takes."""
        # For a dictionary transformers calls this method again with each of its datasets.
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._prepare_new(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
