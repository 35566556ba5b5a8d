"""``ContrastiveTrainer``: transformers' Trainer on packed preference batches; its constructor is TRL's DPOTrainer's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import EvalPrediction

from .config import ContrastiveConfig
from .data.collate import PackedBatch, PackedCollator
from .data.curriculum import Curriculum, Draws
from .data.formats import Form, detect_form
from .data.loader import kept_columns, make_draws, make_loader, order_seed, report_draws, report_stream
from .data.padded import UnpaddingCollator, packed_collator, with_reference
from .data.preparation import PreparationReport, prepare
from .data.tokenize import check_same_tokenizer, check_tokenizer
from .errors import UserError
from .losses import Loss, user_loss
from .model.layers import offloaded_activations, prepare_layers
from .model.loading import (
    aux_loss_coef,
    cast_adapter,
    check_checkpoint,
    check_data,
    check_engine,
    check_moved,
    check_overrides,
    check_trainable,
    checked_config,
    checked_tokenizer,
    load_models,
    load_tokenizer,
    may_share_prompts,
    prepare_adapter,
    wrap_in_adapter,
)
from .model.packed_model import PackedModel, Scores, base_model
from .ops.attention.select import describe_backend
from .ops.gather import segment_sum
from .reference.cache import default_cache_dir
from .reference.moving import MovingReference
from .reference.scorer import Reference, put_sums
from .training.loop import PackedLoop, is_overridden
from .training.metrics import Metrics, PlaceMetrics
from .training.model_card import write_model_card

logger = logging.getLogger(__name__)


class ContrastiveTrainer(PackedLoop):
    """Trains a causal language model on preference pairs (DPO, SLiC, RSO, IPO) or on their chosen side (SFT).

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        ref_model: the reference. Default: adapters off for an adapter made by ``peft_config``, else the start weights.
        args: default ``ContrastiveConfig("<model>-CPT")``.
        data_collator: a :class:`PackedCollator`, the default; or one for padded batches, such as TRL's.
        train_dataset: any form of ``data.preparation.prepare``, map-style or a stream (then ``max_steps`` is needed).
        eval_dataset: one or a dictionary of several.
        processing_class: the tokenizer; default the model's own.
        compute_metrics: gets an ``EvalPrediction`` with ``predictions`` (pairs, 2), the rewards of chosen and rejected.
        callbacks, optimizers: as transformers' Trainer takes them.
        quantization_config: for a model given by name.
        peft_config: makes an adapter around the model.
        loss: a loss of your own instead of ``args.loss_type``: a :class:`Loss` or a function of :class:`PairLogps`.
        ref_tokenizer: the reference's tokenizer, to be compared with the policy's.
        moved: arguments of old, to be refused with where they have gone.

    Raises:
        UserError: data, model or options that cannot be trained with; the message says what and the mend.
    """

    dataset_name: str | None = None  # of the training data, for the model card

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: ContrastiveConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        loss: Loss | Callable | None = None,
        ref_tokenizer: PreTrainedTokenizerBase | None = None,
        **moved: Any,
    ) -> None:
        check_moved(moved)
        check_overrides(type(self), ContrastiveTrainer)
        args = checked_config(model, args, eval_dataset)
        if train_dataset is None and eval_dataset is None:
            raise UserError("there is no data: give train_dataset or eval_dataset")
        set_seed(args.seed)  # a new adapter's weights are random
        tokenizer = load_tokenizer(model, args) if processing_class is None else checked_tokenizer(processing_class)
        model, ref_model = load_models(model, ref_model, args, quantization_config)
        if ref_tokenizer is not None:
            check_same_tokenizer(tokenizer, ref_tokenizer)
        if peft_config is not None:
            model = wrap_in_adapter(model, peft_config, args)
        if hasattr(model, "peft_config"):
            prepare_adapter(model, args)

        self.loss = loss if isinstance(loss, Loss) else args.build_loss() if loss is None else user_loss(loss)
        share = may_share_prompts(model, ref_model, args)
        self.packed = PackedModel(model, args.head_memory_mb, args.attention_backend)
        self.reports: dict[str, PreparationReport] = {}
        collator = PackedCollator(args.max_length, args.truncation_mode, share, self.packed.share_limit)
        data_collator = packed_collator(data_collator, collator)
        self.collator = getattr(data_collator, "packing", data_collator)
        self._tokenizer = tokenizer
        self._aux_loss_coef = aux_loss_coef(base_model(model), args.router_aux_loss_coef)

        self.curriculum = None if args.curriculum is None else Curriculum.parse(args.curriculum)
        if train_dataset is not None:
            check_trainable(model)
            train_dataset = self._prepared(train_dataset, args, "train")
            self.draws = make_draws(self.curriculum, train_dataset, order_seed(args))
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._prepared(v, args, k) for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, args, "eval")

        prepare_layers(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine(args, self.accelerator)
        _say([describe_backend(args.attention_backend, args.device.type)])
        self.model_accepts_loss_kwargs = False  # what loss_is_scaled_for_ga says, before transformers 5.19
        ld_alpha = args.ld_alpha if loss is None else None
        self.metrics = {mode: Metrics(self.accelerator, args.beta, ld_alpha) for mode in ("train", "eval")}
        self.place_metrics = None if self.curriculum is None else PlaceMetrics(self.accelerator, self.curriculum)
        base_model(model).add_model_tags(["cpt-kernels", *args.loss_type])
        self.reference = self._make_reference(ref_model, peft_config is not None) if self.loss.needs_reference else None
        if ref_model is not None and self.reference is None:
            _say([f"ref_model is not used: the loss '{self.loss.name}' has no reference"])

    # --- Data ---

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: ContrastiveConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Rows as ``data.preparation.prepare`` makes them. An override may return any form that it takes."""
        name, keep = dataset_name, kept_columns(self.curriculum, dataset) if dataset_name == "train" else ()
        with args.main_process_first(desc=f"tokenising the {name} data"):  # the others find it in datasets' cache
            dataset, report = prepare(
                dataset,
                processing_class,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                target_column=args.target_column,
                gap_column=args.gap_column,
                ranked_pairs=args.ranked_pairs,
                keep_columns=keep,
                num_proc=args.dataset_num_proc,
                name=name,
            )
        self.reports[name] = report
        vocab_size = base_model(self.packed.model).get_input_embeddings().weight.shape[0]
        if isinstance(dataset, Dataset):
            _say(report.summary())
            check_tokenizer(processing_class, vocab_size, report.max_token_id)
            check_data(self.loss, dataset, report.pairs, name)
        else:
            check_tokenizer(processing_class, vocab_size)
        return dataset

    def _prepared(self, dataset: Any, args: ContrastiveConfig, name: str) -> Dataset | IterableDataset:
        dataset = self._prepare_dataset(dataset, self._tokenizer, args, name)
        if not is_overridden(self, ContrastiveTrainer._prepare_dataset):
            return dataset
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if detect_form(columns) is Form.GROUP:
            return dataset
        return ContrastiveTrainer._prepare_dataset(self, dataset, self._tokenizer, args, name)

    def _new_data(self, dataset: Any, name: str) -> Dataset | IterableDataset:
        """A dataset that the constructor has not seen, ready to be evaluated."""
        dataset = self._prepared(dataset, self.args, name)
        if self.reference is not None and isinstance(dataset, Dataset):
            self.reference.fill(dataset, self.collator, self.args.max_tokens_per_batch, name)
        return dataset

    @property
    def datasets(self) -> dict[str, Dataset | IterableDataset]:
        """The prepared datasets by name."""
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        return {name: data for name, data in {"train": self.train_dataset, **evals}.items() if data is not None}

    def _make_reference(self, ref_model: nn.Module | None, new_adapter: bool) -> Reference | MovingReference:
        if self.args.sync_ref_model:
            reference = MovingReference(self.packed, ref_model, self.accelerator)
            self.add_callback(reference)
            return reference
        ahead = self.args.precompute_ref_log_probs
        if ahead is None:
            ahead = all(isinstance(data, Dataset) for data in self.datasets.values())
        reference = Reference(
            self.packed,
            ref_model,
            new_adapter=new_adapter,
            keep=not ahead or isinstance(self.data_collator, UnpaddingCollator),  # which may cut in its own way
            accelerator=self.accelerator,
            cache_dir=self.args.ref_cache_dir or default_cache_dir(),
            head_memory_mb=self.args.head_memory_mb,
            progress=not self.args.disable_tqdm,
        )
        if self.loss.needs_tails:
            reference.check_tokens()
        if ahead:
            self._fill(reference)
        return reference

    def _fill(self, reference: Reference) -> None:
        for name, data in self.datasets.items():
            if isinstance(data, Dataset):
                reference.fill(data, self.collator, self.args.max_tokens_per_batch, name)

    def _loader(self, dataset: Dataset | IterableDataset, training: bool) -> DataLoader:
        collator = packed_collator(self.data_collator, self.collator)  # which users may set, too
        if self.reference is not None:
            collator = with_reference(collator, self.reference.lookup)
        draws = self.draws if training else None
        size = self._train_batch_size if training else self.args.per_device_eval_batch_size
        return make_loader(dataset, collator, self.args, self.collator.share_prompts, training, draws, batch_size=size)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise UserError("training needs a train_dataset")
        loader = self._loader(self.train_dataset, training=True)
        if isinstance(self.draws, Draws) and self.is_world_process_zero():
            _say(report_draws(loader, self.draws, self.args))
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            raise UserError("evaluation needs an eval_dataset")
        return self._loader(eval_dataset, training=False)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        return self._loader(self._new_data(test_dataset, "test"), training=False)

    # --- Loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Loss of a micro-batch; its mean over the micro-batches and ranks of a step is the mean over the step's pairs.

        transformers and DDP take that mean, so that what an override adds counts as it does in TRL.

        Args:
            num_items_in_batch: (2,) pairs and chosen tokens of the step on all ranks; default this batch's own.

        Returns:
            The loss, with ``return_outputs`` also :class:`Scores`.
        """
        if num_items_in_batch is None:
            pairs, tokens = (max(inputs[name], 1) for name in ("num_pairs", "num_chosen_tokens"))
            batches = 1
        else:
            pairs, tokens = num_items_in_batch.clamp(min=1)
            batches = self.args.world_size * self.current_gradient_accumulation_steps
        scores = self.score(model, inputs, tokens / pairs)
        loss = scores.loss * (batches / pairs)
        if scores.aux_loss is not None:
            loss = loss + self._aux_loss_coef * scores.aux_loss * (inputs["num_pairs"] * batches / pairs)
        self.metrics["train" if model.training else "eval"].add(inputs, scores)
        same = self.reference is not None and not is_overridden(self, ContrastiveTrainer.compute_ref_log_probs)
        if model.training and same and self.state.global_step == 0:
            self.reference.check_start(inputs, scores.completion_logps)
        return (loss, scores) if return_outputs else loss

    def score(self, model: nn.Module, inputs: PackedBatch, tokens_per_pair: Tensor | float = 1.0) -> Scores:
        """Log-probs, statistics and the summed loss of a batch; reference log-probs that it lacks are scored now."""
        if self.reference is not None:
            self._complete(model, inputs)
        with offloaded_activations(self.args.activation_offloading):
            return self.packed(
                inputs,
                self.loss,
                wrapped=model,
                general=self.args.head_mode == "general",
                statistics=True,
                tokens_per_pair=tokens_per_pair,
                aux_loss=self._aux_loss_coef > 0,
            )

    def compute_ref_log_probs(self, model: nn.Module, inputs: PackedBatch) -> tuple[Tensor, Tensor]:
        """Reference log-probs of a batch's pairs, (P,) of chosen and of rejected, from the cache or scored now.

        Users may override it, as in TRL. Then it is called for every batch, and its values are not cached.
        """
        self.reference.complete(inputs)
        sums = segment_sum(inputs["ref_token_logps"], inputs["cu_completions"])
        return sums[inputs["chosen"]], sums[inputs["rejected"]]

    def _complete(self, model: nn.Module, inputs: PackedBatch) -> None:
        """Fill in the reference log-probs that a batch lacks."""
        if not is_overridden(self, ContrastiveTrainer.compute_ref_log_probs):
            self.reference.complete(inputs)
            return
        if self.loss.needs_tails:
            raise UserError("ld_alpha looks at tokens, and the overridden compute_ref_log_probs gives sums")
        put_sums(inputs, *self.compute_ref_log_probs(model, inputs))

    def training_step(self, model: nn.Module, inputs: PackedBatch, num_items_in_batch: Tensor | None = None) -> Tensor:
        if self.place_metrics is not None:
            self.place_metrics.add(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    # --- Logging and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.metrics["train"].compute() | {"num_tokens": self.count_tokens()}
            if self.place_metrics is not None:
                logs |= self.place_metrics.compute()
        elif self.args.include_num_input_tokens_seen != "no":  # transformers logs what was counted last
            self.count_tokens()
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        with self.reference.training() if self.reference is not None else contextlib.nullcontext():
            output = super().train(*args, **kwargs)
        if isinstance(self.train_dataset, IterableDataset) and "train" in self.reports:  # else prepared by an override
            _say(report_stream(self.reports["train"], self.draws, self.args, self.state.global_step))
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] = ()
    ) -> None:
        """Write README.md of the model to ``output_dir``, in place of any that is there; see :mod:`model_card`."""
        if self.is_world_process_zero():
            base = base_model(self.packed.model)
            write_model_card(
                Path(self.args.output_dir) / "README.md",
                name=model_name or self.args.hub_model_id or Path(self.args.output_dir).name,
                base=base.config._name_or_path or None,
                dataset=dataset_name or self.dataset_name,
                tags=dict.fromkeys([*base.model_tags, *([tags] if isinstance(tags, str) else tags)]),
                args=self.args,
                log_history=self.state.log_history,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(resume_from_checkpoint, self.packed.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        cast_adapter(self.packed.model)

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """As transformers' ``evaluate``; a dataset given here may have any form that the constructor takes."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):  # transformers asks for each in turn
            eval_dataset = self._new_data(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _say(lines: Sequence[str]) -> None:
    if PartialState().is_main_process:
        for line in lines:
            logger.warning(line)
