"""``ContrastiveTrainer``: transformers' Trainer on packed preference batches; its constructor is TRL's DPOTrainer's."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from .config import ContrastiveConfig
from .data.collate import PackedBatch, PackedCollator
from .data.curriculum import Curriculum, Draws
from .data.loader import kept_columns, make_draws, make_loader, order_seed, report_draws
from .data.preparation import PreparationReport, prepare
from .data.tokenize import check_same_tokenizer, check_tokenizer
from .evaluation import run_evaluation
from .layers import offloaded_activations, prepare_layers
from .loading import (
    aux_loss_coef,
    check_checkpoint,
    check_data,
    check_vocabularies,
    disable_dropout,
    dropout,
    load_model,
    wrap_in_adapter,
)
from .losses import Loss, user_loss
from .metrics import Metrics, PlaceMetrics
from .model import PackedModel, Scores, base_model
from .model_card import write_model_card
from .moving_reference import MovingReference
from .ops.attention_backends import describe
from .reference import Reference
from .reference_cache import default_cache_dir

logger = logging.getLogger(__name__)


class ContrastiveTrainer(Trainer):
    """Trains a causal language model on preference pairs (DPO, SLiC, RSO, IPO) or on their chosen side (SFT).

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        ref_model: the reference. Default: adapters off for an adapter made by ``peft_config``, else the start weights.
        args: default ``ContrastiveConfig("<model>-CPT")``.
        data_collator: rows -> :class:`PackedBatch`; default :class:`PackedCollator`.
        train_dataset: any form of ``data.preparation.prepare``, map-style or a stream (then ``max_steps`` is needed).
        eval_dataset: one or a dictionary of several.
        processing_class: the tokenizer; default the model's own.
        compute_metrics: gets an ``EvalPrediction`` with ``predictions`` (pairs, 2), the rewards of chosen and rejected.
        callbacks, optimizers: as transformers' Trainer takes them.
        quantization_config: for a model given by name.
        peft_config: makes an adapter around the model.
        loss: a loss of your own instead of ``args.loss_type``: a :class:`Loss` or a function of :class:`PairLogps`.
        ref_tokenizer: the reference's tokenizer, to be compared with the policy's.

    Raises:
        ValueError: data, model or options that cannot be trained with; the message says what and the mend.
    """

    loss_is_scaled_for_ga = True  # over the pairs of the whole optimizer step, see compute_loss

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
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ContrastiveConfig(f"{Path(name).name or 'model'}-CPT")
        if train_dataset is None and eval_dataset is None:
            raise ValueError("there is no data: give train_dataset or eval_dataset")
        set_seed(args.seed)  # a new adapter's weights are random
        tokenizer = processing_class or AutoTokenizer.from_pretrained(
            model if isinstance(model, str) else model.config._name_or_path, trust_remote_code=args.trust_remote_code
        )
        model = load_model(model, args, quantization_config)
        if ref_model is model:
            raise ValueError("model and ref_model are the same object: leave ref_model out to take the start weights")
        ref_model = None if ref_model is None else load_model(ref_model, args, quantization_config)
        if ref_tokenizer is not None:
            check_same_tokenizer(tokenizer, ref_tokenizer)
        check_vocabularies(model, ref_model)
        if peft_config is not None:
            model = wrap_in_adapter(model, peft_config)
        if args.gradient_checkpointing and hasattr(model, "peft_config"):
            model.enable_input_require_grads()

        self.loss = loss if isinstance(loss, Loss) else args.build_loss() if loss is None else user_loss(loss)
        if args.disable_dropout:
            disable_dropout(model)
            disable_dropout(ref_model)
        elif dropout(model) and args.share_prompts == "true":
            raise ValueError(
                "share_prompts=true with dropout would give all completions of a prompt the same mask: set"
                " disable_dropout=true, or share_prompts=false"
            )
        share = args.share_prompts == "true" or (args.share_prompts == "auto" and not dropout(model))
        self.packed = PackedModel(model, args.head_memory_mb, args.attention_backend)
        self.reports: dict[str, PreparationReport] = {}
        self.collator = PackedCollator(args.max_length, args.truncation_mode, share, self.packed.share_limit)
        self._tokenizer = tokenizer
        self._aux_loss_coef = aux_loss_coef(base_model(model), args.router_aux_loss_coef)

        self.curriculum = None if args.curriculum is None else Curriculum.parse(args.curriculum)
        if train_dataset is not None:
            keep = kept_columns(self.curriculum, train_dataset)
            train_dataset = self._prepare_dataset(train_dataset, tokenizer, args, "train", keep)
            self.draws = make_draws(self.curriculum, train_dataset, order_seed(args))
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._prepare_dataset(v, tokenizer, args, k) for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, tokenizer, args, "eval")

        prepare_layers(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and DataParallel is not supported: start with"
                " accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        attention = describe(args.attention_backend, args.device.type)
        if PartialState().is_main_process:
            logger.warning(attention)
        self.model_accepts_loss_kwargs = True  # our loss is over the whole step; transformers need not divide it
        ld_alpha = args.ld_alpha if loss is None else None
        self.metrics = {mode: Metrics(self.accelerator, args.beta, ld_alpha) for mode in ("train", "eval")}
        self.place_metrics = None if self.curriculum is None else PlaceMetrics(self.accelerator, self.curriculum)
        self.num_tokens = 0
        base_model(model).add_model_tags(["cpt-kernels", *args.loss_type])
        self.reference = self._make_reference(ref_model, peft_config is not None) if self.loss.needs_reference else None

    # --- Data ---

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        args: ContrastiveConfig,
        name: str,
        keep_columns: Sequence[str] = (),
    ) -> Dataset | IterableDataset:
        with args.main_process_first(desc=f"tokenising the {name} data"):  # the others find it in datasets' cache
            dataset, report = prepare(
                dataset,
                tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                target_column=args.target_column,
                gap_column=args.gap_column,
                ranked_pairs=args.ranked_pairs,
                keep_columns=keep_columns,
                num_proc=args.dataset_num_proc,
                name=name,
            )
        self.reports[name] = report
        vocab_size = base_model(self.packed.model).get_input_embeddings().weight.shape[0]
        if isinstance(dataset, Dataset):
            _say(report.summary())
            check_tokenizer(tokenizer, vocab_size, report.max_token_id)
            check_data(self.loss, dataset, report.pairs, name)
        else:
            check_tokenizer(tokenizer, vocab_size)
        return dataset

    def _make_reference(self, ref_model: nn.Module | None, new_adapter: bool) -> Reference | MovingReference:
        if self.args.sync_ref_model:
            reference = MovingReference(self.packed, ref_model, self.accelerator, self.args)
            self.add_callback(reference)
            return reference
        datasets = {"train": self.train_dataset} if self.train_dataset is not None else {}
        datasets |= self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        stored = {k: v for k, v in datasets.items() if isinstance(v, Dataset)}
        ahead = self.args.precompute_ref_log_probs
        if ahead is None:
            ahead = len(stored) == sum(v is not None for v in datasets.values())
        reference = Reference(
            self.packed,
            ref_model,
            new_adapter=new_adapter,
            keep=not ahead,
            accelerator=self.accelerator,
            cache_dir=self.args.ref_cache_dir or default_cache_dir(),
            head_memory_mb=self.args.head_memory_mb,
            progress=not self.args.disable_tqdm,
        )
        if self.loss.needs_tails:
            reference.check_tokens()
        for name, dataset in stored.items() if ahead else ():
            reference.fill(dataset, self.collator, self.args.max_tokens_per_batch, name)
        return reference

    def _loader(self, dataset: Dataset | IterableDataset, training: bool) -> DataLoader:
        collator = self.data_collator
        if collator is self.collator and self.reference is not None:
            collator = dataclasses.replace(self.collator, reference=self.reference.lookup)
        draws = self.draws if training else None
        return make_loader(dataset, collator, self.args, self.collator.share_prompts, training, draws)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        loader = self._loader(self.train_dataset, training=True)
        if isinstance(self.draws, Draws) and self.is_world_process_zero():
            _say(report_draws(loader, self.draws, self.args))
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._loader(eval_dataset, training=False)

    # --- Loss ---

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """An optimizer step's micro-batches, and what it averages over: pairs and chosen tokens of all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [sum(batch[name] for batch in batches) for name in ("num_pairs", "num_chosen_tokens")]
        return batches, self.accelerator.reduce(torch.tensor(counts, dtype=torch.float32, device=device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Loss of a micro-batch, its share of the mean over the pairs of the optimizer step.

        Args:
            num_items_in_batch: (2,) pairs and chosen tokens of the step on all ranks; default this batch's own.

        Returns:
            The loss, with ``return_outputs`` also :class:`Scores`.
        """
        if num_items_in_batch is None:
            pairs, tokens = (max(inputs[name], 1) for name in ("num_pairs", "num_chosen_tokens"))
            world = 1
        else:
            pairs, tokens = num_items_in_batch.clamp(min=1)
            world = self.args.world_size  # DDP and FSDP average gradients over ranks; the mean is over all pairs
        scores = self.score(model, inputs, tokens / pairs)
        loss = scores.loss * (world / pairs)
        if scores.aux_loss is not None:
            loss = loss + self._aux_loss_coef * scores.aux_loss * (inputs["num_pairs"] * world / pairs)
        self.metrics["train" if model.training else "eval"].add(inputs, scores)
        if model.training and self.reference is not None and self.state.global_step == 0:
            self.reference.check_start(inputs, scores.completion_logps)
        return (loss, scores) if return_outputs else loss

    def score(self, model: nn.Module, inputs: PackedBatch, tokens_per_pair: Tensor | float = 1.0) -> Scores:
        """Log-probs, statistics and the summed loss of a batch; reference log-probs that it lacks are scored now."""
        if self.reference is not None:
            inputs["ref_token_logps"] = self.compute_ref_log_probs(inputs)
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

    def compute_ref_log_probs(self, inputs: PackedBatch) -> Tensor:
        """Reference log-probs of a batch's tokens, (N,) fp32: the cache's, or scored now. Users may override it."""
        self.reference.complete(inputs)
        return inputs["ref_token_logps"]

    def training_step(self, model: nn.Module, inputs: PackedBatch, num_items_in_batch: Tensor | None = None) -> Tensor:
        self.num_tokens += inputs["num_sequence_tokens"]
        if self.place_metrics is not None:
            self.place_metrics.add(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    # --- Logging and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self.metrics["train"].compute()
            del means["loss"]  # transformers' own, of the same value
            logs |= means | {"num_tokens": self.count_tokens()}
            if self.place_metrics is not None:
                logs |= self.place_metrics.compute()
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            if self.reference is not None:
                stack.enter_context(self.reference.training())
            output = super().train(*args, **kwargs)
        if isinstance(self.train_dataset, IterableDataset):  # counted while it was read
            report = self.reports["train"]
            if not self.state.global_step:
                raise ValueError("\n  ".join(["no row of the stream can be trained on", *report.summary()]))
            if self.args.dataloader_num_workers:
                _say(["what was read and dropped of the stream was counted in a worker: set dataloader_num_workers=0"])
            else:
                _say([*report.summary(), *(self.draws.report() if self.draws is not None else [])])
        return output

    def count_tokens(self) -> int:
        """Tokens of all ranks, those before the checkpoint that the run was resumed from included."""
        tokens = self.accelerator.reduce(torch.tensor(self.num_tokens, device=self.args.device), "sum")
        return self.state.num_input_tokens_seen + int(tokens.item())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        before = self.state.num_input_tokens_seen
        self.state.num_input_tokens_seen = self.count_tokens()
        super()._save_checkpoint(model, trial)
        self.state.num_input_tokens_seen = before
        self.create_model_card()

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
                dataset=dataset_name,
                tags=dict.fromkeys([*base.model_tags, *([tags] if isinstance(tags, str) else tags)]),
                args=self.args,
                log_history=self.state.log_history,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(resume_from_checkpoint, self.packed.model)
        if isinstance(self.reference, MovingReference):
            self.reference.load(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """As transformers' ``evaluate``; a dataset given here may have any form that the constructor takes."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset = self._prepare_dataset(eval_dataset, self._tokenizer, self.args, metric_key_prefix)
            if self.reference is not None and isinstance(eval_dataset, Dataset):
                self.reference.fill(eval_dataset, self.collator, self.args.max_tokens_per_batch, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics as means over pairs and tokens; transformers' loop weighs every packed row alike."""
        return run_evaluation(self, dataloader, metric_key_prefix)

    def floating_point_ops(self, inputs: PackedBatch) -> float:
        """6 x parameters x tokens of the row, as transformers estimates it."""
        return 6 * inputs["input_ids"].shape[1] * self.model.num_parameters(exclude_embeddings=True)


def _say(lines: Sequence[str]) -> None:
    if PartialState().is_main_process:
        for line in lines:
            logger.warning(line)
