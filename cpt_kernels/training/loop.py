"""transformers' training and evaluation loop on packed batches.

Four things differ from transformers' own loop. A step averages over its pairs, not over its micro-batches. No step
makes the CPU wait for the GPU, except those that log. A checkpoint records its run, and only that run continues from it
(:mod:`.resume`). A folder ``checkpoint-N`` is complete, and one run at a time writes to ``output_dir``
(:mod:`.checkpoints`, :mod:`.run_folder`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, EvalPrediction, PredictionOutput

from ..config import ContrastiveConfig
from ..data.collate import PackedBatch, PackedCollator
from ..data.curriculum import Curriculum, Draws
from ..data.digest import StreamDigest, digest_rows
from ..data.loader import report_stream
from ..data.preparation import PreparationReport
from ..data.stream_curriculum import StreamDraws
from ..errors import UserError, user_error
from ..files import replace_folder
from ..losses import Loss
from ..model.layers import offloaded_activations
from ..model.packed_model import PackedModel, Scores
from ..model.pretrained import reload_weights, save_adapter_names
from ..reference.moving import MovingReference
from ..reference.scorer import Reference
from .checkpoints import (
    UNFINISHED,
    check_usable,
    choose_checkpoint,
    complete_checkpoint,
    delete_checkpoints,
    find_damage,
    new_run,
    run_of,
    writing_failure,
)
from .metrics import Metrics, PlaceMetrics
from .resume import Run, rows_to_expect, write_record
from .run_folder import checkpoints_in, earlier_run, held, is_finished
from .speed import Speedometer, peak_memory

logger = logging.getLogger(__name__)


def _option(name: str) -> property:
    """A read-only attribute for an option that the loss is built with, so that a later change would have no effect."""
    return property(lambda self: getattr(self.args, name), doc=f"``args.{name}``, read-only.")


class PackedLoop(Trainer):
    """The part of :class:`ContrastiveTrainer` that runs steps, evaluations, logs and checkpoints."""

    # The constructor of ContrastiveTrainer sets these.
    args: ContrastiveConfig
    loss: Loss
    packed: PackedModel
    metrics: dict[str, Metrics]  # by mode, "train" and "eval"
    place_metrics: PlaceMetrics | None = None  # with a curriculum
    reference: Reference | MovingReference | None = None
    reports: dict[str, PreparationReport]  # by dataset name
    has_own_loss: bool  # a loss that the user passed in place of args.loss_type
    collator: PackedCollator
    base_sample: dict[str, list[float]]  # of the base weights of a model with adapters
    curriculum: Curriculum | None
    draws: Draws | StreamDraws | None = None  # with a curriculum

    loss_is_scaled_for_ga = False  # transformers divides by the step's micro-batches, as it does for TRL
    current_gradient_accumulation_steps = 1  # until transformers sets it in every step
    _trained_pairs = 0  # of this rank in this call of train()
    _evaluated_batches = 0  # of this rank in the last evaluation
    num_tokens = 0  # of this rank since count_tokens was called last
    eval_tokens_per_pair: float | None = None  # of the evaluation, for a loss that averages over tokens
    stream_digest: StreamDigest | None = None  # of the rows read from a stream in this call of train()
    _digested: tuple[Dataset | IterableDataset, str | None] | None = None  # training data and its digest
    _speed: Speedometer | None = None  # from the first step on
    _filters_losses = False
    _first_step: int | None = None  # global_step at the first micro-batch of an attempt to train
    _run_id: str | None = None  # in the records of this run's checkpoints
    _unfinished: Path | None = None  # the parent of the checkpoint that is being written

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as transformers' ``train`` does, with the reference model moved off the GPU where it is not needed.

        The run holds ``output_dir`` until this method returns.

        Raises:
            UserError: another live process holds ``output_dir``; the run cannot continue from the checkpoint, see
                :mod:`.resume`; or a checkpoint cannot be written, for example to a full disk.
            KeyboardInterrupt: the run was interrupted. The message says how to resume.
        """
        with held(self.args.output_dir):
            try:
                return self._train(resume_from_checkpoint, *args, **kwargs)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._how_to_resume()) from None

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        self._reset_counts()  # an earlier call may have ended between two logs
        checkpoint = self._check_checkpoint(resume_from_checkpoint)
        self._begin_run(checkpoint)
        # With this filter on, transformers reads the loss of every micro-batch, and each read waits for the GPU.
        # training_step does the same on the device.
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            with self.reference.training() if self.reference is not None else contextlib.nullcontext():
                output = super().train(checkpoint, *args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = self._filters_losses
        # A stream's drops are known only after reading. The report is missing if _prepare_dataset is overridden.
        if isinstance(self.train_dataset, IterableDataset) and "train" in self.reports:
            log_on_main(report_stream(self.reports["train"], self.draws, self.args, self.state.global_step))
        return output

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Returns a step's micro-batches, and (2,) its pairs and chosen tokens on all ranks, to average over."""
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
        if self.place_metrics is not None:
            self.place_metrics.add(inputs)
        self.num_tokens += inputs["num_sequence_tokens"]
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
        tokens = self.accelerator.reduce(torch.tensor(self.num_tokens, device=self.args.device), "sum")
        self.state.num_input_tokens_seen += int(tokens.item())
        self.num_tokens = 0
        return self.state.num_input_tokens_seen

    def floating_point_ops(self, inputs: PackedBatch) -> float:
        """Returns 6 x parameters x tokens of the packed row, the estimate that transformers uses."""
        return 6 * inputs["input_ids"].numel() * self.model.num_parameters(exclude_embeddings=True)

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
            pairs = self.accelerator.reduce(torch.tensor(self._trained_pairs, device=self.args.device), "sum")
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
                rewards.append(np.concatenate(gather_object([batch_rewards.cpu().numpy()])))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.eval_tokens_per_pair = None

        total = self.accelerator.reduce(torch.stack([losses, losses.new_tensor(pairs)]), "sum").tolist()
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
        pairs, tokens = counts.clamp(min=1).tolist()
        return batches, tokens / pairs

    def _counts(self, batches: Iterable[PackedBatch], device: torch.device) -> Tensor:
        """Returns the pairs and chosen tokens of batches on all ranks, (2,)."""
        counts = np.zeros(2)
        for batch in batches:
            counts += batch["num_pairs"], batch["num_chosen_tokens"]
        on_device = torch.tensor(counts, dtype=torch.float32).to(device, non_blocking=True)
        return self.accelerator.reduce(on_device, "sum")

    # --- Checkpoints ---

    def _begin_run(self, checkpoint: str | None) -> None:
        """Records this run in ``output_dir``, and deletes a checkpoint that an earlier run did not finish."""
        folder = Path(self.args.output_dir)
        if checkpoint is None and not is_finished(folder) and (earlier := earlier_run(folder)) is not None:
            log_on_main([f"output_dir={folder} holds {earlier}, and this run begins anew; its files will be replaced"])
        self._run_id = (checkpoint and run_of(Path(checkpoint))) or new_run()
        if self.is_world_process_zero():
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            with user_error(f"output_dir={folder} cannot be written to", types=(OSError,)):
                write_record(folder, self._run(), None, {"run": self._run_id})

    def _how_to_resume(self) -> str:
        found = checkpoints_in(self.args.output_dir)
        own = next((path for path in found if run_of(path) == self._run_id), None)
        if own is None:
            return f"stopped at step {self.state.global_step}, before the first checkpoint"
        return (
            f"stopped at step {self.state.global_step}; to continue from {own}, set resume_from_checkpoint=True in"
            " train(), or --resume_from_checkpoint last for cpt-train"
        )

    def _get_output_dir(self, trial: Any) -> str:
        """Returns where transformers writes ``checkpoint-N``: not in ``output_dir`` before all of it is written."""
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint with the record of its run, and the model card.

        The checkpoint gets its name when it is complete, and only then earlier ones are deleted.

        Raises:
            UserError: it cannot be written, for example because the disk is full. Earlier checkpoints stay.
        """
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = folder / UNFINISHED / checkpoint.name
        best = self.state.best_model_checkpoint
        self._unfinished = unfinished.parent
        try:
            self.create_model_card()
            self.count_tokens()
            super()._save_checkpoint(model, trial)
            self._finish_checkpoint(checkpoint, best)
        except (OSError, RuntimeError, SafetensorError) as error:
            if (refusal := self._disk_error(checkpoint, error)) is None:
                raise
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise refusal from error
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            kept = {checkpoint.name, Path(self.state.best_model_checkpoint or "").name}
            delete_checkpoints(folder, self.args.save_total_limit, kept, self._run_id)

    def _disk_error(self, path: Path, error: Exception) -> UserError | None:
        """Returns what to raise instead of an exception of a save, if a file could not be written."""
        if (reason := writing_failure(error)) is None:
            return None
        last = next((own for own in checkpoints_in(self.args.output_dir) if run_of(own) == self._run_id), None)
        mend = "make room" if last is None else f"make room, and resume from {last}, which is complete"
        return UserError(f"{path} cannot be written ({reason}): {mend}")

    def _finish_checkpoint(self, checkpoint: Path, best: str | None) -> None:
        """Adds to an unfinished checkpoint what transformers does not save, and moves it to its own name.

        Args:
            best: the best checkpoint before this one.
        """
        unfinished = checkpoint.parent / UNFINISHED / checkpoint.name
        # transformers looks for the best checkpoint beside the unfinished one.
        if (step := self.state.best_global_step) is not None:
            place = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{step}")
            best = str(place) if place == checkpoint or place.is_dir() else best
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        if isinstance(self.reference, MovingReference) and self.args.should_save and not self.args.save_only_model:
            self.reference.save(unfinished)
        self.accelerator.wait_for_everyone()  # all ranks have written their parts
        if self.args.should_save:
            read = None if self.stream_digest is None else self.stream_digest.rows
            complete_checkpoint(checkpoint, self._run(), read, self._run_id)
        self.accelerator.wait_for_everyone()
        # The disk of a node whose ranks save their random state only.
        if self.accelerator.is_local_main_process and unfinished.is_dir():
            replace_folder(unfinished, checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: :meth:`_save_checkpoint` pushes a checkpoint that is complete."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        try:
            super()._save(output_dir, state_dict)
        except (OSError, RuntimeError, SafetensorError) as error:
            refusal = self._disk_error(Path(output_dir or self.args.output_dir), error)
            if refusal is None or self._unfinished is not None:  # _save_checkpoint names the checkpoint
                raise
            raise refusal from error
        if self.args.should_save:
            save_adapter_names(self.packed.model, output_dir or self.args.output_dir, self.base_sample)

    def _check_checkpoint(self, given: str | bool | None) -> str | None:
        """Returns the checkpoint to resume from, checked, and loads its moving reference.

        It runs before transformers loads anything, as DeepSpeed loads weights without ``_load_from_checkpoint``.

        Raises:
            UserError: there is no checkpoint, or the run cannot continue from it.
        """
        self.stream_digest = None if isinstance(self.train_dataset, Dataset) else StreamDigest()
        if not given:
            return None
        if given is not True and not Path(given).is_dir():
            raise UserError(f"resume_from_checkpoint={given}: there is no such folder")
        run, steps = self._run(), self._total_steps()
        checkpoint = self._choose_checkpoint(run, steps) if given is True else str(given)
        log_on_main(check_usable(Path(checkpoint), run, steps))
        if self.stream_digest is not None:
            self.stream_digest.expected = rows_to_expect(run, checkpoint)
        if isinstance(self.reference, MovingReference):
            self.reference.load(checkpoint)
        return checkpoint

    def _choose_checkpoint(self, run: Run, steps: int) -> str:
        """Returns the last checkpoint in ``output_dir`` that can be resumed, as the main process sees it."""
        choice, refusal = None, None
        if self.is_world_process_zero():
            try:
                choice = choose_checkpoint(Path(self.args.output_dir), run, steps)
            except UserError as error:
                refusal = str(error)
        choice, refusal = gather_object([(choice, refusal)])[0]
        if refusal is not None:
            raise UserError(refusal)
        log_on_main(choice.lines)
        return choice.checkpoint

    def _total_steps(self) -> int:
        """Returns the optimizer steps after which the run ends."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _init_training_state(self, *args: Any) -> Any:
        """Finds the best checkpoint of a resumed run again, in a folder that was moved; else looks for a new best."""
        counts = super()._init_training_state(*args)
        state = self.state
        if state.best_model_checkpoint is None and state.best_global_step is not None:
            best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if best.is_dir():
                state.best_model_checkpoint = str(best)
            else:
                log_on_main(
                    [f"the best checkpoint so far, {best}, is missing: the best of the steps to come is chosen"]
                )
                state.best_metric = state.best_global_step = None
        return counts

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of a checkpoint, all of them; transformers' own would only warn about missing ones."""
        if self.is_fsdp_enabled:  # its files hold the shards of each rank
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            reload_weights(self.packed.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Loads the weights of the best checkpoint as those of a checkpoint to resume from.

        If the checkpoint is missing or damaged, the weights of the last step stay, which is logged.
        """
        best = Path(self.state.best_model_checkpoint)
        fault = find_damage(best) if best.is_dir() else f"{best} is missing"
        if fault is not None:
            log_on_main([f"the best checkpoint cannot be loaded: {fault}. The model of the last step is kept instead"])
            self.state.best_model_checkpoint = None
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            reload_weights(self.packed.model, self.state.best_model_checkpoint)

    def _run(self) -> Run:
        """Returns this run as a checkpoint records it. The digest of stored data is computed once for each dataset."""
        data = self.train_dataset
        if self._digested is None or self._digested[0] is not data:
            self._digested = (data, digest_rows(data) if isinstance(data, Dataset) else None)
        return Run(
            args=self.args,
            accelerator=self.accelerator,
            model=self.packed.model,
            reference=self.reference,
            loss_name=self.loss.name,
            has_own_loss=self.has_own_loss,
            data=data,
            data_digest=self._digested[1],
            layout=self.collator,
            curriculum=self.curriculum,
            batch_size=self._train_batch_size,
        )


def log_on_main(lines: Sequence[str]) -> None:
    """Logs lines as warnings on the main process, which is the level that is shown by default."""
    if PartialState().is_main_process:
        for line in lines:
            logger.warning(line)
