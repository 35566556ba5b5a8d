"""transformers' training and evaluation loop on packed batches.

Four things differ from transformers' own loop. A step averages over its pairs, not over its micro-batches. No step
makes the CPU wait for the GPU, except those that log. A checkpoint records its run, and only that run continues from it
(:mod:`.resume`). A folder ``checkpoint-N`` is complete, and one run at a time writes to ``output_dir``
(:mod:`.saving`, :mod:`.run_folder`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from ..data.collate import PackedBatch
from ..data.curriculum import Draws
from ..data.loader import report_stream
from ..data.preparation import PreparationReport
from ..data.stores import local_path
from ..data.stream_curriculum import StreamDraws
from ..errors import UserError
from ..model.frozen import rounded_weights
from ..model.layers import offloaded_activations
from ..model.packed_model import Scores
from ..model.sharding import meshes_on_cpu, settle_engine
from .failures import named_hanging_ranks, passed
from .metrics import Metrics, PlaceMetrics
from .output_store import OutputStore
from .recomputation import chosen_checkpointing
from .run_folder import held
from .saving import CheckpointLoop, log_on_main
from .speed import Speedometer, peak_memory
from .token_budget import chosen_budget

logger = logging.getLogger(__name__)


def _option(name: str) -> property:
    """A read-only attribute for an option that the loss is built with, so that a later change would have no effect."""
    return property(lambda self: getattr(self.args, name), doc=f"``args.{name}``, read-only.")


class PackedLoop(CheckpointLoop):
    """The part of :class:`ContrastiveTrainer` that runs steps and evaluations, and logs them."""

    # The constructor of ContrastiveTrainer sets these.
    is_loaded_here: bool  # the model was given by name, so nobody else holds it
    metrics: dict[str, Metrics]  # by mode, "train" and "eval"
    place_metrics: PlaceMetrics | None = None  # with a curriculum
    reports: dict[str, PreparationReport]  # by dataset name
    draws: Draws | StreamDraws | None = None  # with a curriculum

    loss_is_scaled_for_ga = False  # transformers divides by the step's micro-batches, as it does for TRL
    current_gradient_accumulation_steps = 1  # until transformers sets it in every step
    _trained_pairs = 0  # of this rank in this call of train()
    _run_tokens, _pair_tokens = 0, 0  # likewise: that ran, and of the sides of all pairs
    _evaluated_batches = 0  # of this rank in the last evaluation
    num_tokens = 0  # of this rank since count_tokens was called last
    eval_tokens_per_pair: float | None = None  # of the evaluation, for a loss that averages over tokens
    _speed: Speedometer | None = None  # from the first step on
    _filters_losses = False
    _first_step: int | None = None  # global_step at the first micro-batch of an attempt to train

    # TRL's attributes.
    beta = _option("beta")
    label_smoothing = _option("label_smoothing")
    ld_alpha = _option("ld_alpha")
    loss_types = _option("loss_type")
    f_divergence_type = _option("f_divergence_type")
    f_alpha_divergence_coef = _option("f_alpha_divergence_coef")
    use_weighting = _option("use_weighting")
    padding_free = _option("padding_free")
    router_aux_loss_coef: float  # weight of the load-balancing loss of a mixture of experts; 0 for other models

    @property
    def loss_weights(self) -> list[float]:
        """The weight of each of ``loss_types``."""
        return self.args.loss_weights or [1.0] * len(self.args.loss_type)

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the loss of a mixture of experts contains its load-balancing loss."""
        return self.router_aux_loss_coef != 0.0

    @property
    def maybe_activation_offload_context(self) -> contextlib.AbstractContextManager:
        """The context of a forward: it moves activations to the host's memory with ``activation_offloading``."""
        return offloaded_activations(self.args.activation_offloading)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model in memory, or ``None``, as in TRL.

        It is ``None`` if all reference log-probs are known ahead or the reference is the policy with its adapters off,
        unless the user passed a ``ref_model``.
        """
        return None if self.reference is None else self.reference.model

    def _start_metrics(self, ld_alpha: float | None) -> None:
        options = self.args.beta, ld_alpha, self.loss.per_token
        self.metrics = {mode: Metrics(self.accelerator, *options) for mode in ("train", "eval")}
        if self.curriculum is not None:
            self.place_metrics = PlaceMetrics(self.accelerator, self.curriculum)

    # --- Steps ---

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator once: ContrastiveTrainer needs it before transformers' constructor does."""
        if "accelerator" not in vars(self):
            with meshes_on_cpu(self.args):
                super().create_accelerator_and_postprocess()
            settle_engine(self.accelerator, self.args)
            self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as transformers' ``train`` does, with the reference model moved off the GPU where it is not needed.

        The run holds ``output_dir`` until this method returns.

        Raises:
            UserError: another live process holds ``output_dir``; the run cannot continue from the checkpoint, see
                :mod:`.resume`; or a checkpoint cannot be written, for example to a full disk.
            KeyboardInterrupt: the run was interrupted. The message says how to resume.
        """
        with held(self.args.output_dir), named_hanging_ranks(self.args):
            try:
                return self._train(resume_from_checkpoint, *args, **kwargs)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._how_to_resume()) from None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model, or its adapter, to a folder or URL, by default ``output_dir``."""
        folder = local_path(output_dir or self.args.output_dir)
        super().save_model(str(folder), _internal_call)
        if not _internal_call and (store := OutputStore.of(folder)) is not None:
            with self._on_all_ranks(folder):
                if self.args.should_save:
                    store.push()

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        self._reset_counts()  # an earlier call may have ended between two logs
        self.args.names = self._names()  # users may have set dataset_name
        checkpoint = self._check_checkpoint(resume_from_checkpoint)
        # With this filter on, transformers reads the loss of every micro-batch, and each read waits for the GPU.
        # training_step does the same on the device.
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            with (
                self.reference.training() if self.reference is not None else contextlib.nullcontext(),
                self._rounded_weights() as rounded,
                chosen_checkpointing(self, checkpoint),
                chosen_budget(self, checkpoint),
            ):
                log_on_main([] if rounded is None else [rounded])
                self._begin_run(checkpoint)
                output = super().train(checkpoint, *args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = self._filters_losses
        tokens = torch.tensor([self._run_tokens, self._pair_tokens], device=self.args.device)
        run, whole = self._sum(tokens).tolist()
        if 0 < run < whole:
            log_on_main([f"{run:,} tokens ran for the {whole:,} of the sides of all pairs ({run / whole:.0%})"])
        # A stream's drops are known only after reading. The report is missing if _prepare_dataset is overridden.
        if isinstance(self.train_dataset, IterableDataset) and "train" in self.reports:
            log_on_main(report_stream(self.reports["train"], self.draws, self.args, self.state.global_step))
        return output

    def _rounded_weights(self) -> contextlib.AbstractContextManager:
        """Returns the context of a run: it holds frozen weights of a model that was loaded here in autocast's dtype."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        is_sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        has_frozen = not all(parameter.requires_grad for parameter in self.packed.model.parameters())
        if dtype is None or is_sharded or not (self.is_loaded_here and has_frozen):
            return contextlib.nullcontext()
        return rounded_weights(self.packed, dtype)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Returns a step's micro-batches, and (2,) its pairs and chosen tokens on all ranks, to average over."""
        passed(f"step {self.state.global_step}")
        if self.state.global_step >= self.state.max_steps:  # restarted after its last step
            return [], self._counts([], device)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._counts(batches, device)

    def _prepare_input(self, data: Any) -> Any:
        """Copies a batch to the device without waiting and without a change of dtype.

        Under DeepSpeed transformers' own method would round the reference log-probs to DeepSpeed's dtype.
        """
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: PackedBatch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Runs forward and backward of a micro-batch; returns the loss to log, with NaN and inf filtered as asked."""
        passed(f"the data of step {self.state.global_step + 1}")
        if self.place_metrics is not None:
            self.place_metrics.add(inputs)
        self.num_tokens += inputs["num_sequence_tokens"]
        self._run_tokens += inputs["input_ids"].numel()
        self._pair_tokens += inputs["num_sequence_tokens"]
        self._trained_pairs += inputs["num_pairs"]
        if self._first_step is None:
            self._first_step = self.state.global_step
            self._speed = Speedometer(self.state.num_input_tokens_seen)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._filters_losses:
            return loss
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, self._tr_loss / steps)

    def _track_num_input_tokens(self, inputs: PackedBatch) -> None:
        """Does nothing: transformers' own would wait for the GPU in every step; see :meth:`count_tokens`."""

    def _finalize_training(self, *args: Any) -> Any:
        # transformers averages the losses that it logs over the ranks, but not those of the steps after the last log.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(*args)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Prepares an attempt with ``auto_find_batch_size``.

        Raises:
            UserError: the attempt before it has trained the weights, from which this one would begin.
        """
        if self._first_step is not None and self.state.global_step > self._first_step:
            raise UserError(
                f"auto_find_batch_size: memory was enough for {self.state.global_step - self._first_step} steps of"
                f" {self._train_batch_size} rows on each device, and the weights are trained already: start again with"
                f" per_device_train_batch_size={batch_size}, or set max_tokens_per_batch"
            )
        super()._update_auto_batch_size(batch_size)
        self._reset_counts()  # drop the counts of the attempt that ran out of memory

    def _reset_counts(self) -> None:
        self.num_tokens, self._trained_pairs, self._first_step = 0, 0, None
        self._run_tokens, self._pair_tokens = 0, 0
        self.metrics["train"].reset()
        if self.place_metrics is not None:
            self.place_metrics.reset()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._speed is None:  # training_step is overridden, or there was no step
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        self._speed.pause()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._speed.resume()

    def count_tokens(self) -> int:
        """Returns the tokens of all ranks so far, including those before the checkpoint that the run resumed from."""
        tokens = self._sum(torch.tensor(self.num_tokens, device=self.args.device))
        self.state.num_input_tokens_seen += int(tokens.item())
        self.num_tokens = 0
        return self.state.num_input_tokens_seen

    def floating_point_ops(self, inputs: PackedBatch) -> float:
        """Returns 6 x parameters x this rank's tokens of the packed row, the estimate that transformers uses."""
        tokens = inputs["input_ids"].numel() / self.args.sp_size
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Returns the rows of a step on all ranks, as transformers does, with a sequence group as one rank."""
        return super().get_total_train_batch_size(args) // args.sp_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds TRL's metrics to the logs of training; this is where a step waits for the GPU.

        The closing log, which has ``train_loss``, gets the metrics of the steps after the last log, if there are any,
        and in ``train_samples_per_second`` the pairs that were trained on.
        ``tokens_per_second`` is of the steps since the last log. ``peak_memory_gib`` is of this process so far: on its
        accelerator, or on a CPU its resident memory.
        """
        metrics = self.metrics["train"].compute() if "loss" in logs or "train_loss" in logs else {}
        if metrics or "loss" in logs:
            logs |= metrics | {"num_tokens": self.count_tokens()}
            if self._speed is not None:
                logs["tokens_per_second"] = self._speed.rate(logs["num_tokens"])
            logs["peak_memory_gib"] = peak_memory(self.args.device) / 2**30
            if self.place_metrics is not None:
                logs |= self.place_metrics.compute()
        elif self.args.include_num_input_tokens_seen != "no":  # transformers adds the last count to these logs
            self.count_tokens()
        if "train_runtime" in logs:
            # transformers derives these numbers from per_device_train_batch_size and per_device_eval_batch_size.
            pairs = self._sum(torch.tensor(self._trained_pairs, device=self.args.device))
            logs["train_samples_per_second"] = round(pairs.item() / max(logs["train_runtime"], 1e-9), 3)
        self._correct_steps(logs)
        super().log(logs, start_time)

    def _correct_steps(self, metrics: dict[str, float]) -> None:
        """Sets the steps per second of an evaluation to the micro-batches that this rank ran."""
        for name in [name for name in metrics if name.endswith("_steps_per_second") and not name.startswith("train_")]:
            runtime = metrics[f"{name.removesuffix('_steps_per_second')}_runtime"]
            metrics[name] = round(self._evaluated_batches / max(runtime, 1e-9), 3)

    # --- Evaluation ---

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predicts as transformers' ``predict``; ``test_dataset`` may have any form that the constructor takes."""
        output = super().predict(*args, **kwargs)
        self._correct_steps(output.metrics)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: PackedBatch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """Returns the mean loss of a batch's pairs and, unless ``prediction_loss_only``, their rewards, (P, 2)."""
        passed(f"evaluation after step {self.state.global_step}")
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        if not isinstance(scores, Scores):
            raise UserError(
                f"compute_loss returned {type(scores).__name__} beside the loss, and compute_metrics and predict cannot"
                " make rewards of that: return what super().compute_loss(..., return_outputs=True) returns"
            )
        return loss, self.metrics["eval"].rewards(scores), None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Scores all batches; metrics are TRL's, each a mean over the pairs or tokens of all ranks.

        transformers' own loop would give every packed row the same weight, however many pairs it holds.

        Returns:
            Metrics with names that start with ``metric_key_prefix`` and, unless ``prediction_loss_only``, predictions:
            (pairs, 2) rewards of chosen and rejected, which ``compute_metrics`` gets.
        """
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader  # for callbacks
        self.metrics["eval"].reset()
        batches, self.eval_tokens_per_pair = self._evaluation_batches(dataloader)
        rewards, pairs, self._evaluated_batches = [], 0, 0
        losses = torch.zeros((), device=self.args.device)  # sum over this rank's pairs
        for inputs in batches:
            loss, batch_rewards, _ = self.prediction_step(model, inputs, bool(prediction_loss_only))
            if inputs["num_pairs"]:
                losses += loss.detach() * inputs["num_pairs"]
            pairs += inputs["num_pairs"]
            self._evaluated_batches += 1
            if not prediction_loss_only:
                # As objects, because ranks have different numbers of pairs.
                every = gather_object([batch_rewards.cpu().numpy()])
                rewards.append(np.concatenate(every[:: self.args.sp_size]))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.eval_tokens_per_pair = None

        total = self._sum(torch.stack([losses, losses.new_tensor(pairs)])).tolist()
        means = self.metrics["eval"].compute() | {"loss": total[0] / max(total[1], 1.0)}
        predictions = np.concatenate(rewards) if rewards else None
        if self.compute_metrics is not None and predictions is not None:
            # With batch_eval_metrics such a function accumulates batches; here it gets all of them in one call.
            last = {"compute_result": True} if self.args.batch_eval_metrics else {}
            labels = np.zeros(len(predictions), dtype=np.int64)
            means |= self.compute_metrics(EvalPrediction(predictions, labels), **last)
        means["num_tokens"] = self.count_tokens()
        prefix = f"{metric_key_prefix}_"
        means = {prefix + name.removeprefix(prefix): value for name, value in means.items()}
        return EvalLoopOutput(predictions, None, means, num_samples=int(total[1]))

    def _evaluation_batches(self, dataloader: DataLoader) -> tuple[Iterable[PackedBatch], float | None]:
        """Returns the batches of an evaluation and, for a loss that averages over tokens, its chosen tokens per pair.

        They are counted before the first forward, so that a token counts the same in a large and in a small batch.
        """
        if not self.loss.averages_over_tokens():
            return dataloader, None
        is_stream = isinstance(dataloader.dataset, TorchIterableDataset)
        batches = list(dataloader) if is_stream else dataloader  # a stream may not come twice
        counts = self._counts(batches, self.args.device)
        pairs, tokens = (count or 1 for count in counts.tolist())
        return batches, tokens / pairs

    def _counts(self, batches: Iterable[PackedBatch], device: torch.device) -> Tensor:
        """Returns the pairs and chosen tokens of batches on all ranks, (2,)."""
        counts = np.zeros(2)
        for batch in batches:
            counts += batch["num_pairs"], batch["num_chosen_tokens"]
        on_device = torch.tensor(counts, dtype=torch.float32).to(device, non_blocking=True)
        return self._sum(on_device)

    def _sum(self, values: Tensor) -> Tensor:
        """Returns the sum over all ranks, where the ranks of a sequence group, whose values are equal, count as one."""
        total, size = self.accelerator.reduce(values, "sum"), self.args.sp_size
        return total / size if total.is_floating_point() else total // size
