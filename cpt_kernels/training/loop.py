"""transformers' training loop on packed batches: a step counts its pairs, and waits for the device only to log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from ..data.collate import PackedBatch
from ..data.loader import order_seed
from ..errors import UserError
from ..model.packed_model import Scores
from ..reference.moving import MovingReference
from ..reference.scorer import Reference
from .evaluation import run_evaluation
from .metrics import Metrics, PlaceMetrics, pair_rewards

_ORDER = "order.json"  # of a checkpoint: what the order of pairs in steps depends on


def is_overridden(trainer: Trainer, method: Callable) -> bool:
    """Whether a trainer has another method in the place of ``method``, by its class or by itself."""
    return getattr(getattr(trainer, method.__name__), "__func__", None) is not method


class PackedLoop(Trainer):
    """What :class:`ContrastiveTrainer` changes in the loop itself."""

    metrics: dict[str, Metrics]
    place_metrics: PlaceMetrics | None = None
    reference: Reference | MovingReference | None = None
    loss_is_scaled_for_ga = False  # transformers divides by the micro-batches of a step, as it does for TRL
    current_gradient_accumulation_steps = 1  # until transformers counts a step's
    num_tokens = 0  # of this rank, since they were last counted
    _filters_losses = False

    @property
    def beta(self) -> float:
        """``args.beta``. TRL's trainer lets it be set; here the loss has it bound, and to set it is an error."""
        return self.args.beta

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model in memory. As in TRL there is none where log-probs are known ahead or adapters are off,
        unless one was given.
        """
        return None if self.reference is None else self.reference.model

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """An optimizer step's micro-batches, and what it averages over: pairs and chosen tokens of all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [sum(batch[name] for batch in batches) for name in ("num_pairs", "num_chosen_tokens")]
        counts = torch.tensor(counts, dtype=torch.float32).to(device, non_blocking=True)
        return batches, self.accelerator.reduce(counts, "sum")

    def _prepare_input(self, data: Any) -> Any:
        """To the device, without waiting. Under DeepSpeed transformers would round reference log-probs to its dtype."""
        return (
            data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else super()._prepare_input(data)
        )

    def training_step(self, model: nn.Module, inputs: PackedBatch, num_items_in_batch: Tensor | None = None) -> Tensor:
        self.num_tokens += inputs["num_sequence_tokens"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._filters_losses:
            return loss
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, self._tr_loss / steps)

    def train(self, *args, **kwargs):
        self._count_anew()  # an earlier call may have ended between two logs
        # transformers looks at every micro-batch's loss for what logging_nan_inf_filter replaces, and waits for it.
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = self._filters_losses

    def _track_num_input_tokens(self, inputs: PackedBatch) -> None:
        """Nothing: transformers would look at the device in every step; `count_tokens` does when they are asked for."""

    def _update_auto_batch_size(self, batch_size: int) -> None:
        super()._update_auto_batch_size(batch_size)
        self._count_anew()  # without the try that did not fit

    def _count_anew(self) -> None:
        self.num_tokens = 0
        self.metrics["train"].reset()
        if self.place_metrics is not None:
            self.place_metrics.reset()

    def prediction_step(
        self, model: nn.Module, inputs: PackedBatch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """The loss of a batch, a mean over its pairs, and, where more than that is asked for, its rewards, (P, 2)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        if not isinstance(scores, Scores):
            raise UserError(
                f"compute_loss returned {type(scores).__name__} beside the loss, of which compute_metrics and predict"
                " cannot make rewards: return what super().compute_loss(..., return_outputs=True) does"
            )
        return loss, pair_rewards(self.metrics["eval"].numbers(scores), self.args.beta), None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics as means over pairs and tokens; transformers' loop weighs every packed row alike."""
        return run_evaluation(self, dataloader, metric_key_prefix, keep_rewards=not prediction_loss_only)

    def floating_point_ops(self, inputs: PackedBatch) -> float:
        """6 x parameters x tokens of the row, as transformers estimates it."""
        return 6 * inputs["input_ids"].shape[1] * self.model.num_parameters(exclude_embeddings=True)

    def count_tokens(self) -> int:
        """Tokens of all ranks, those before the checkpoint that the run was resumed from included."""
        tokens = self.accelerator.reduce(torch.tensor(self.num_tokens, device=self.args.device), "sum")
        self.state.num_input_tokens_seen += int(tokens.item())
        self.num_tokens = 0
        return self.state.num_input_tokens_seen

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _ORDER).write_text(json.dumps(self._order(), indent=1))
        self.count_tokens()
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint, _ORDER)
        if file.is_file() and not self.args.ignore_data_skip:
            saved, ours = json.loads(file.read_text()), self._order()
            if changed := [name for name in {**saved, **ours} if saved.get(name) != ours.get(name)]:
                differences = ", ".join(f"{name} {saved.get(name)}, now {ours.get(name)}" for name in changed)
                raise UserError(
                    f"{resume_from_checkpoint} cannot be resumed with the same order of pairs: it was saved with"
                    f" {differences}. On another number of processes keep processes x gradient_accumulation_steps"
                    " (x per_device_train_batch_size) as it was; ignore_data_skip=true begins the epoch again instead"
                )
        if isinstance(self.reference, MovingReference):
            self.reference.load(resume_from_checkpoint)
        elif self.reference is not None and Path(resume_from_checkpoint, MovingReference.FILE).is_file():
            raise UserError(
                f"{resume_from_checkpoint} was saved by a run with sync_ref_model, whose reference is not the start"
                " weights any more: resume it with sync_ref_model=true, or begin a new run from its model"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _order(self) -> dict[str, int | str | None]:
        """What must be equal, on however many ranks, for steps to have the same pairs."""
        args = self.args
        micro_batches = args.world_size * args.gradient_accumulation_steps
        size = {"rows a step": micro_batches * self._train_batch_size}
        if args.max_tokens_per_batch:
            size = {"micro-batches a step": micro_batches, "max_tokens_per_batch": args.max_tokens_per_batch}
        elif args.dataloader_drop_last:
            size["rows a micro-batch of all ranks"] = args.world_size * self._train_batch_size
        return {**size, "seed": order_seed(args), "train_sampling_strategy": args.train_sampling_strategy}
