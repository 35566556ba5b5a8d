"""Saving and resuming: the part of the training loop that writes checkpoints and continues from them."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import ContrastiveConfig
from ..data.collate import PackedCollator
from ..data.curriculum import Curriculum
from ..data.digest import StreamDigest, digest_rows
from ..data.loader import StepBudget
from ..data.stores import folder_copy, is_remote
from ..errors import UserError
from ..files import replace_folder
from ..losses import Loss
from ..model.loading import zero_stage
from ..model.packed_model import PackedModel, base_model
from ..model.pretrained import reload_weights, save_adapter_names
from ..reference.moving import MovingReference, StagedReference
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
from .failures import checkpoint_of_restart, launchers
from .resume import Run, read_object, read_record, rows_to_expect, write_record
from .run_folder import OutputStore, checkpoints_in, earlier_run, is_finished
from .stages import check_stage, stage_starts
from .universal import make_universal, mend_optimizer

logger = logging.getLogger(__name__)


class CheckpointLoop(Trainer):
    """The part of :class:`ContrastiveTrainer` that saves checkpoints and resumes from them."""

    # The constructor of ContrastiveTrainer sets these.
    args: ContrastiveConfig
    loss: Loss
    packed: PackedModel
    reference: Reference | MovingReference | None = None
    has_own_loss: bool  # a loss that the user passed in place of args.loss_type
    collator: PackedCollator
    base_sample: dict[str, list[float]]  # of the base weights of a model with adapters
    curriculum: Curriculum | None

    stream_digest: StreamDigest | None = None  # of the rows read from a stream in this call of train()
    _digested: tuple[Dataset | IterableDataset, str | None] | None = None  # training data and its digest
    budget: StepBudget | None = None  # while a run trains that max_tokens_per_batch=auto has chosen it for
    _run_id: str | None = None  # in the records of this run's checkpoints
    _unfinished: Path | None = None  # the parent of the checkpoint that is being written

    def _begin_run(self, checkpoint: str | None) -> None:
        """Records this run in ``output_dir``, and deletes a checkpoint that an earlier run did not finish."""
        folder = Path(self.args.output_dir)
        if checkpoint is None and not is_finished(folder) and (earlier := earlier_run(folder)) is not None:
            log_on_main([f"output_dir={folder} holds {earlier}, and this run begins anew; its files will be replaced"])
        self._run_id = gather_object([(checkpoint and run_of(Path(checkpoint))) or new_run()])[0]
        started = launchers()
        if self.is_world_process_zero():
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        with self._on_all_ranks(folder):
            if self.is_world_process_zero():
                write_record(folder, self._run(), None, {"run": self._run_id, "launchers": started})

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
            with self._on_all_ranks(checkpoint):
                self.create_model_card()
            self.count_tokens()  # of PackedLoop; the checkpoint's state holds the count
            with self._on_all_ranks(checkpoint):
                super()._save_checkpoint(model, trial)
            self._finish_checkpoint(checkpoint, best)
        except UserError:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            kept = {checkpoint.name, Path(self.state.best_model_checkpoint or "").name}
            delete_checkpoints(folder, self.args.save_total_limit, kept, self._run_id)

    @contextmanager
    def _on_all_ranks(self, path: Path) -> Iterator[None]:
        """Runs a part of a save of ``path``. If it fails on one rank it fails on all, so no rank waits for another.

        Raises:
            UserError: a file could not be written on some rank, for example because its disk is full.
            RuntimeError: the part failed for another reason on another rank. The rank itself raises its own exception.
        """
        failure: BaseException | None = None
        try:
            yield
        except (Exception, CheckpointException) as error:  # the latter is FSDP's, of all ranks, and no Exception
            failure = error
        reason = None if failure is None or isinstance(failure, UserError) else writing_failure(failure)
        text = None if failure is None else reason or f"{type(failure).__name__}: {failure}"
        found = [(rank, *each) for rank, each in enumerate(gather_object([(text, reason)])) if each[0] is not None]
        if failure is not None and reason is None:
            raise failure
        if not found:
            return
        rank, text, reason = found[0]
        if reason is None:
            raise RuntimeError(f"rank {rank} could not save {path}: {text}")
        last = next((own for own in checkpoints_in(self.args.output_dir) if run_of(own) == self._run_id), None)
        mend = "make room" if last is None else f"make room, and resume from {last}, which is complete"
        raise UserError(f"{path} cannot be written ({reason}): {mend}") from failure

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
        with self._on_all_ranks(checkpoint):
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                if isinstance(self.reference, MovingReference) and not self.args.save_only_model:
                    self.reference.save(unfinished)
        # All ranks have written their parts.
        with self._on_all_ranks(checkpoint):
            if self.args.should_save:
                read = None if self.stream_digest is None else self.stream_digest.rows
                complete_checkpoint(checkpoint, self._run(), read, self._run_id)
        # The disk of a node whose ranks save their random state only.
        if self.accelerator.is_local_main_process and unfinished.is_dir():
            replace_folder(unfinished, checkpoint)
        if (store := OutputStore.of(self.args.output_dir)) is not None:
            self._upload_checkpoint(store, checkpoint)

    def _upload_checkpoint(self, store: OutputStore, checkpoint: Path) -> None:
        """Uploads a checkpoint that is complete on the disks of all nodes, and what else the run has written."""
        is_local_main = self.accelerator.is_local_main_process
        with self._on_all_ranks(checkpoint):
            if self.args.should_save:
                store.begin_checkpoint(checkpoint)
        sizes: dict[str, tuple[int, str]] = {}
        with self._on_all_ranks(checkpoint):
            if is_local_main and checkpoint.is_dir():
                sizes = dict(store.upload_files(checkpoint))
        for others in gather_object([sizes]):
            sizes = {**sizes, **others}
        with self._on_all_ranks(checkpoint):
            if self.args.should_save:
                store.complete_checkpoint(checkpoint, sizes)
                store.push()
            elif is_local_main:
                store.mark(checkpoint, sizes)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: :meth:`_save_checkpoint` pushes a checkpoint that is complete."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model, or its adapter, as transformers' ``save_model``.

        FSDP with sharded state dicts, its default in version 2, would write nothing there outside of checkpoints. A
        checkpoint gets the configuration and tokenizer beside its sharded weights, from which ``cpt export`` makes a
        model.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        kind = None if plugin is None else plugin.state_dict_type
        if kind is None or "FULL" in str(kind):
            return super().save_model(output_dir, _internal_call)
        if _internal_call:
            if self.args.should_save:
                model, configs = base_model(self.packed.model), getattr(self.packed.model, "peft_config", {})
                saved = [*configs.values()] if configs else [model.config, getattr(model, "generation_config", None)]
                for part in (*saved, self.processing_class):
                    if part is not None:
                        part.save_pretrained(output_dir)
                save_adapter_names(self.packed.model, str(output_dir), self.base_sample)
            return None
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(kind)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        unfinished = self._unfinished is not None
        with self._on_all_ranks(Path(self.args.output_dir, folder.name) if unfinished else folder):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_adapter_names(self.packed.model, str(folder), self.base_sample)

    def _check_checkpoint(self, given: str | bool | None) -> str | None:
        """Returns the checkpoint to resume from, checked, and loads its moving reference.

        A run that its launcher has restarted continues from its own last checkpoint, whatever ``given`` says.

        This runs before transformers loads anything, as DeepSpeed loads weights without ``_load_from_checkpoint``.

        Raises:
            UserError: there is no checkpoint, or the run cannot continue from it.
        """
        self.stream_digest = None if isinstance(self.train_dataset, Dataset) else StreamDigest()
        restarted = checkpoint_of_restart(Path(self.args.output_dir))
        if restarted is not None:
            log_on_main([f"restarted after a process failed: the run goes on from {restarted}"])
            given = True
        if not given:
            return None
        if given is not True and is_remote(given):
            given = str(folder_copy(str(given)))
        if given is not True and not Path(given).is_dir():
            raise UserError(f"resume_from_checkpoint={given}: there is no such folder")
        run, steps = self._run(), self._total_steps()
        # A restarted run may have taken its last step, and what comes after training is left to do.
        most = steps if restarted is None else sys.maxsize
        checkpoint = self._choose_checkpoint(run, most) if given is True else str(given)
        log_on_main(check_usable(Path(checkpoint), run, most))
        if self.stream_digest is not None:
            self.stream_digest.expected = rows_to_expect(run, checkpoint)
        if isinstance(self.reference, MovingReference):
            self.reference.load(checkpoint)
        if isinstance(self.reference, StagedReference):
            self._reopen_stage(checkpoint, steps)
        if (plugin := self.accelerator.state.deepspeed_plugin) is not None:
            options = plugin.deepspeed_config.setdefault("checkpoint", {})
            options["load_universal"] = self._is_of_other_ranks(Path(checkpoint))
        return checkpoint

    def _is_of_other_ranks(self, checkpoint: Path) -> bool:
        """Whether a checkpoint of ZeRO is of another number of processes; its universal form is then made."""
        number = (read_record(checkpoint) or {}).get("processes", {}).get("number", self.args.world_size)
        is_other = number != self.args.world_size and bool(zero_stage(self.accelerator.state))
        with self._on_all_ranks(checkpoint):
            if is_other and self.is_world_process_zero():
                make_universal(checkpoint)
        return is_other

    def _reopen_stage(self, checkpoint: str, steps: int) -> None:
        """Opens the reference log-probs of the stage in which a checkpoint lies."""
        stage = (read_record(Path(checkpoint)) or {}).get("stage")
        step = read_object(Path(checkpoint, TRAINER_STATE_NAME), "global_step")["global_step"]
        check_stage(stage, stage_starts(self.curriculum.stages, steps), step, checkpoint)
        self.reference.reopen(stage)

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
        return str(Path(self.args.output_dir, Path(choice.checkpoint).name))  # nodes may have other local folders

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
                line = f"the best checkpoint so far, {best}, is missing: the best of the steps to come is chosen"
                log_on_main([line])
                state.best_metric = state.best_global_step = None
        return counts

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of a checkpoint, all of them; transformers' own would only warn about missing ones."""
        if self.is_fsdp_enabled:  # its files hold the shards of each rank
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            reload_weights(self.packed.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and zero_stage(self.accelerator.state) == 3 and self.model_wrapped.load_universal_checkpoint():
            mend_optimizer(self.model_wrapped.optimizer.optimizer, Path(checkpoint))

    def _load_best_model(self) -> None:
        """Loads the weights of the best checkpoint as those of a checkpoint to resume from.

        If the checkpoint is missing or damaged, the weights of the last step stay, which is logged.
        """
        best = Path(self.state.best_model_checkpoint)
        if (store := OutputStore.of(best.parent)) is not None and best.is_dir():
            store.fetch(best)
        fault = find_damage(best) if best.is_dir() else f"{best} is missing"
        if fault is not None:
            log_on_main([f"the best checkpoint cannot be loaded: {fault}. The model of the last step is kept instead"])
            self.state.best_model_checkpoint = None
            return
        if self.is_deepspeed_enabled:
            self.model_wrapped._config.load_universal_checkpoint = self._is_of_other_ranks(best)
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
            budget=self.budget,
        )


def log_on_main(lines: Sequence[str]) -> None:
    """Logs lines as warnings on the main process, which is the level that is shown by default."""
    if PartialState().is_main_process:
        for line in lines:
            logger.warning(line)
