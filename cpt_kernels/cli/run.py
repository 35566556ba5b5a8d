"""One run of ``cpt-train``: from its options to a trained model, its metrics and its curves."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from transformers import PrinterCallback, ProgressCallback

from ..config import ContrastiveConfig
from ..data.images import holds_images, is_processor
from ..data.mixture import load_mixture, split_rows
from ..data.sources import is_one_file, load_data, parse_columns
from ..data.stores import display_name, is_remote, local_path
from ..errors import UserError
from ..files import check_writable
from ..trainer import ContrastiveTrainer
from ..training.checks import check_columns, check_machine, check_metric
from ..training.failures import checkpoint_of_restart
from ..training.loop import log_on_main
from ..training.report import ProgressLines, RunReport, eval_records, metrics_table
from ..training.run_folder import checkpoints_in, earlier_run, held, remove_weights
from .console import print_results
from .models import describe_adapter, load_policy, load_policy_tokenizer, load_ref_tokenizer, load_reference
from .options import ModelArguments, Options, ScriptArguments
from .parsing import CONFIG_FILE

TrainerClass = TypeVar("TrainerClass", bound=ContrastiveTrainer)


def train(options: Options) -> ContrastiveTrainer:
    """Trains a model, and writes model, tokenizer, options, metrics and curves to ``output_dir``.

    Nearly everything that cannot be trained with is found before a long computation starts.
    """
    quieten(options.training)
    check_options(options)
    with held(options.training.output_dir):
        return _train(options)


def _train(options: Options) -> ContrastiveTrainer:
    args = options.training
    output = Path(args.output_dir)

    # The output folder, which is checked before data and model are loaded.
    checkpoint = _find_checkpoint(args)
    overwrites = options.script.overwrite_output_dir
    if checkpoint_of_restart(output) is None:
        _check_earlier_run(output, checkpoint is not None, overwrites)

    # Data, model and trainer.
    report = RunReport(output, f"{output.name}: {args.build_loss().name}")
    trainer = make_trainer(options, callbacks=[report])
    trainer.is_loaded_here = True
    if options.script.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [name for name, b in buffers if b.dtype == torch.bool]
    trainer.dataset_name = options.script.dataset_name or [part["path"] for part in options.script.datasets]
    use_progress_lines(trainer)
    if trainer.is_world_process_zero():
        # What the data decided is saved, so that other commands render prompts alike.
        decided = {"prompt_format": trainer.reports["train"].prompt_format}
        settings = replace(options, values=options.values | decided)
        (output / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")

    # Training and the last evaluation.
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is not None and not _is_evaluated(trainer, report):
        trainer.evaluate()
        report.on_train_end(args, trainer.state, trainer.control)  # writes the records of this evaluation, too
    if overwrites and trainer.is_world_process_zero():  # the model of the earlier run may have other files
        remove_weights(output)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        _print_summary(trainer, report)
    return trainer


def make_trainer(
    options: Options,
    cls: type[TrainerClass] = ContrastiveTrainer,
    callbacks: Sequence[Any] = (),
    policy: Callable[[ModelArguments, ContrastiveConfig], Any] = load_policy,
    reference: Callable[[ModelArguments, ContrastiveConfig], Any] = load_reference,
    data: tuple[Any, Any] | None = None,
) -> TrainerClass:
    """Loads data, models and tokenizer, and makes a trainer of them.

    Args:
        policy, reference: load the models.
        data: training and evaluation data; default those that the options name.
    """
    args = options.training
    if (line := describe_adapter(options.model)) is not None:
        log_on_main([line])
    # The tokenizers first: a wrong model name is then said before the data is read.
    tokenizer = load_policy_tokenizer(options.model, args)
    ref_tokenizer = load_ref_tokenizer(options.model, args)
    train_data, eval_data = _load_data(options.script, args) if data is None else data
    if holds_images(train_data, eval_data):
        tokenizer = load_policy_tokenizer(options.model, args, images=True)
    check_columns(args, args.build_loss(), tokenizer, train_data, eval_data)
    model, ref_model = policy(options.model, args), reference(options.model, args)
    args.model_init_kwargs = None  # already applied; the trainer refuses them for a loaded model
    return cls(
        model,
        ref_model,
        args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=_lora(options.model) if options.model.use_peft else None,
        ref_tokenizer=ref_tokenizer,
    )


def use_progress_lines(trainer: ContrastiveTrainer) -> None:
    """Replaces transformers' printed dictionaries by one short line per log."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLines())


def quieten(args: ContrastiveConfig) -> None:
    """Silences messages of all ranks but the first, and progress bars there and with ``disable_tqdm``."""
    if args.process_index > 0:
        logging.getLogger("cpt_kernels").setLevel(logging.ERROR)
    if args.disable_tqdm or args.process_index > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


# --- Checks ---


def check_options(options: Options) -> None:
    """Raises UserError if output folder, trackers, optimizer, attention or metric cannot be used; needs no data."""
    args = options.training
    _check_output_folder(Path(args.output_dir), options.model)
    cache = local_path(args.ref_cache_dir or ".")
    if (file := next((folder for folder in (cache, *cache.parents) if folder.is_file()), None)) is not None:
        raise UserError(f"ref_cache_dir={cache}: {file} is a file; choose a folder")
    check_machine(args)
    if args.eval_strategy != "no":
        check_metric(args.metric_for_best_model, has_rejected=args.build_loss().needs_rejected)


def _check_output_folder(output: Path, model: ModelArguments) -> None:
    for name in ("model_name_or_path", "adapter_name_or_path", "ref_model_name_or_path", "tokenizer_name"):
        source = getattr(model, name)
        if source is not None and output.resolve() == Path(source).resolve():
            raise UserError(f"output_dir={output} is also {name}, which would be overwritten: choose another folder")
    check_writable(output, f"output_dir={output}")


def _check_earlier_run(output: Path, resumes: bool, overwrites: bool) -> None:
    """Raises UserError if a new run would replace an earlier one in its folder without being told to."""
    if resumes and overwrites:
        raise UserError("overwrite_output_dir begins anew, and resume_from_checkpoint continues a run: leave one out")
    if not resumes and not overwrites and (earlier := earlier_run(output)) is not None:
        raise UserError(
            f"output_dir={display_name(output)} holds {earlier}: set resume_from_checkpoint=last to continue it,"
            " overwrite_output_dir=true to replace it, or choose another folder"
        )


def _find_checkpoint(args: ContrastiveConfig) -> str | bool | None:
    """Returns ``True`` for the last checkpoint in ``output_dir``, or the folder of another one, or ``None``."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() in ("true", "last"):
        if not checkpoints_in(args.output_dir):
            folder = display_name(Path(args.output_dir))
            raise UserError(f"resume_from_checkpoint={wanted}: there is no checkpoint in {folder}")
        return True
    if not is_remote(wanted) and not Path(wanted).is_dir():
        raise UserError(f"resume_from_checkpoint={wanted}: there is no such folder")
    return wanted


def _is_evaluated(trainer: ContrastiveTrainer, report: RunReport) -> bool:
    """Returns whether the final model has been evaluated. The best checkpoint was, in order to choose it."""
    chosen = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    return chosen or any(record["step"] == trainer.state.global_step for record in eval_records(report.records))


# --- Data ---


def _load_data(script: ScriptArguments, args: ContrastiveConfig):
    name, config = script.dataset_name, script.dataset_config
    options: dict[str, Any] = {"streaming": script.dataset_streaming, "columns": parse_columns(script.columns)}
    if script.datasets is not None:
        train_data = load_mixture(script.datasets, streaming=script.dataset_streaming)
    else:
        train_data = load_data(name, config=config, split=script.dataset_train_split, **options)
    if script.test_split_size is not None:
        return split_rows(train_data, script.test_split_size, args.seed)
    if script.eval_dataset_name is not None:
        # A file has one split only, so dataset_test_split does not apply.
        split = None if is_one_file(script.eval_dataset_name) else script.dataset_test_split
        return train_data, load_data(script.eval_dataset_name, split=split, **options)
    asked = args.eval_strategy != "no" or args.eval_on_start or args.load_best_model_at_end
    names_split = script.dataset_test_split != ScriptArguments.dataset_test_split
    if script.datasets is not None or not (asked or names_split):
        return train_data, None
    try:
        return train_data, load_data(name, config=config, split=script.dataset_test_split, **options)
    except UserError as error:
        raise UserError(f"{error}; to evaluate, set dataset_test_split or eval_dataset_name") from error


# --- The adapter ---


def _lora(model: ModelArguments) -> Any:
    if find_spec("peft") is None:
        raise UserError("use_peft needs the peft package: pip install peft")
    from peft import LoraConfig

    modules: Any = model.lora_target_modules
    # PEFT reads text as a pattern for the whole path of a module, so the name of a module stays in a list.
    if modules is not None and len(modules) == 1 and not re.fullmatch(r"[\w.]+", modules[0]):
        modules = modules[0]  # a pattern, or all-linear
    return LoraConfig(
        task_type=model.lora_task_type,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=modules,
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )


# --- Results ---


def _print_summary(trainer: ContrastiveTrainer, report: RunReport) -> None:
    table = metrics_table(report.records, report.title)
    lines = []
    if not any("rewards/margins" in key for record in report.records for key in record):
        pass  # no rewards are shown
    elif not trainer.loss.needs_reference:
        logp = "log-prob per token" if trainer.loss.per_token else "log-prob"
        lines.append(f"Without a reference, a reward is beta times the {logp}.")
    elif (note := report.note()) is not None:
        lines.append(note)
    if (speed := report.tokens_per_second()) is not None:
        lines.append(f"{report.tokens:,} tokens, {speed:,.0f} a second")
    for preparation in trainer.reports.values():
        lines += preparation.summary()
    output = Path(trainer.args.output_dir)
    if trainer.args.load_best_model_at_end and (best := trainer.state.best_model_checkpoint):
        lines.append(f"the saved model is {Path(best).name}, the best so far")
    weights = "adapter" if hasattr(trainer.model, "peft_config") else "model"
    files = ", ".join([CONFIG_FILE, *(file.name for file in [report.metrics_file, *report.files])])
    tokenizer = "processor" if is_processor(trainer.processing_class) else "tokenizer"
    lines.append(f"written to {display_name(output)}: {weights}, {tokenizer}, {files}")
    print_results([table] if table.row_count else [], lines)
