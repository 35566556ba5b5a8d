"""Checks of what a user passes to the trainer: arguments, models and data.

Every check raises a :class:`UserError` whose message says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..config import ContrastiveConfig
from ..data.curriculum import Curriculum
from ..data.forms import FORM_COLUMNS, Form, detect_form
from ..data.images import ImageReader
from ..data.loader import kept_columns
from ..data.other_options import REMOVED_OPTIONS
from ..data.preparation import ReadingOptions, examine
from ..data.rows import read_columns, visible_rows
from ..errors import UserError
from ..losses import Loss
from ..model.conditions import is_sharded
from ..model.images import image_encoder
from ..model.loading import zero_stage
from ..model.packed_model import PackedModel, base_model
from ..model.pretrained import unsaved_parameters
from ..model.sharding import check_fsdp, check_optimizer
from ..model.trials import auxiliary_loss, can_run, checkpointing_error, disable_config_dropout, dropout, is_random
from ..ops.attention.select import describe_backend
from .metrics import METRIC_NAMES, PREFERENCE_METRICS

logger = logging.getLogger(__name__)

# Methods of TRL's trainer, now or in an older version, that this trainer never calls, and the hook to use instead.
NEVER_CALLED = {
    **dict.fromkeys(("_compute_loss", "get_batch_loss_metrics", "concatenated_forward"), "override compute_loss"),
    "dpo_loss": "pass a function of PairLogps as loss, or override compute_loss",
    "tokenize_row": "override _prepare_dataset",
    "_precompute_ref_logps": "override compute_ref_log_probs",
    "_get_train_sampler": "set train_sampling_strategy=sequential or a curriculum, or override get_train_dataloader",
    "_get_eval_sampler": "override get_eval_dataloader",
}
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")  # what transformers adds to the metrics
# Options of a generation_config that have no effect without sampling, and with one beam.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty")
_NO_PAIRS = (
    "loss '{loss}' needs pairs, and the {name} data has none: give rows with chosen and rejected, or set loss_type=sft"
)
# Keywords of gradient_checkpointing_kwargs that do not reach torch.
_OWN_KEYWORDS = ("every_n_layers", "offload")


# --- The constructor's arguments ---


def check_removed_arguments(names: Iterable[str]) -> None:
    """Explains arguments that older versions of TRL's constructor took.

    Raises:
        UserError: TRL had the argument; the message names its replacement.
        TypeError: TRL never had it.
    """
    options = ContrastiveConfig.__dataclass_fields__
    for name in names:
        if name == "tokenizer":
            raise UserError("the argument tokenizer was removed: pass it as processing_class")
        if name in REMOVED_OPTIONS:
            raise UserError(f"the argument {name} was removed: {REMOVED_OPTIONS[name]}")
        if name in options:
            raise UserError(f"the argument {name} was removed: set it in args=DPOConfig({name}=...)")
        raise TypeError(f"the trainer has no argument {name}")


def check_overrides(given: type, base: type) -> None:
    """Raises UserError if ``given``, a subclass of the trainer ``base``, overrides a method of ``NEVER_CALLED``."""
    for name, mend in NEVER_CALLED.items():
        if getattr(given, name, None) is not getattr(base, name, None):
            raise UserError(
                f"this trainer never calls {given.__name__}.{name}: {mend}; if your own code calls it, rename it"
            )


def is_overridden(trainer: Trainer, method: Callable) -> bool:
    """Whether the class or the instance of ``trainer`` replaces ``method``, a function of a base class."""
    return getattr(getattr(trainer, method.__name__), "__func__", None) is not method


def checked_config(
    model: str | nn.Module, args: ContrastiveConfig | None, train_dataset: Any, eval_dataset: Any
) -> ContrastiveConfig:
    """Returns ``args``, by default a configuration whose ``output_dir`` is named after the model.

    Raises:
        UserError: there is no data, ``args`` is a configuration of another package, or names something that is not
            installed.
    """
    if train_dataset is None and eval_dataset is None:
        raise UserError("there is no data: `train_dataset` is required, or `eval_dataset` to evaluate only")
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return ContrastiveConfig(f"{Path(name).name or 'model'}-CPT")
    if not isinstance(args, ContrastiveConfig):
        kind = type(args)
        raise UserError(f"args is a {kind.__name__} of {kind.__module__}: import its class from cpt_kernels instead")
    check_machine(args)
    return args


def check_machine(args: ContrastiveConfig) -> None:
    """Raises UserError if FSDP is asked for what it cannot do, something is not installed, or does not run here."""
    check_fsdp(args)
    if mismatches := getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", None):
        found = "; ".join(text.removeprefix("- ") for text in mismatches)
        raise UserError(f"deepspeed: its values contradict the run's options ({found}): set them to auto")
    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UserError(f"report_to={name}: {name} is not supported; choose one of {known}, all, none")
        # transformers never lists flyte as installed, and azure_ml only without mlflow.
        if name not in (*installed, "azure_ml", "flyte"):
            raise UserError(f"report_to={name}: this tracker is not installed; install its package or leave it out")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "pass a model" not in str(error):  # GaLore, APOLLO and LOMO are made for a model, which is not there yet
            optimizer = getattr(args.optim, "value", args.optim)
            raise UserError(f"optim={optimizer}: {str(error).splitlines()[0]}") from error
    describe_backend(args.attention_backend, args.device.type)
    backend = args.torch_compile_backend
    if args.torch_compile and backend not in (backends := torch._dynamo.list_backends(None)):
        raise UserError(f"torch_compile_backend={backend} is unknown: choose one of {', '.join(backends)}")


def check_metric(
    metric: str | None, eval_dataset: Any = None, adds_own: bool = False, has_rejected: bool = True
) -> None:
    """Checks ``metric_for_best_model``, which transformers looks up after the first evaluation only.

    Args:
        eval_dataset: a dictionary for several evaluation sets, whose metrics have the names of their sets.
        adds_own: the user computes metrics, whose names are not known.
        has_rejected: the loss reads rejected sides; without them their metrics are not logged.

    Raises:
        UserError: the metric is of no evaluation set, or of a name that no evaluation logs.
    """
    if metric is None:
        return
    name, sets = metric.removeprefix("eval_"), [*eval_dataset] if isinstance(eval_dataset, dict) else []
    if sets:
        if (found := next((each for each in sets if name.startswith(f"{each}_")), None)) is None:
            raise UserError(
                f"metric_for_best_model={metric} names no evaluation set, and there are several: set {sets[0]}_{name}"
            )
        name = name.removeprefix(f"{found}_")
    names = METRIC_NAMES if has_rejected else [each for each in METRIC_NAMES if each not in PREFERENCE_METRICS]
    known = ("loss", *names, "num_tokens", *_SPEEDS)
    if name not in known and not adds_own:
        raise UserError(f"metric_for_best_model={metric}: there is no such metric; choose one of {', '.join(known)}")


def checked_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that a user passed, or the tokenizer inside a multimodal processor."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"processing_class is {type(processing_class).__name__}, expected a tokenizer")
    return tokenizer


def check_engine(args: ContrastiveConfig, accelerator: Accelerator) -> None:
    """Raises UserError for several GPUs in one process (DataParallel), or an optimizer that the engine cannot use."""
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs, and DataParallel is not supported: start with accelerate launch or"
            " torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    plugin = accelerator.state.deepspeed_plugin
    if own := plugin and plugin.deepspeed_config.get("optimizer"):  # used in place of optim
        kind: Any = getattr(torch.optim, own["type"], None)
        if kind is not None:  # else an optimizer of DeepSpeed, which refuses those that ZeRO cannot use
            check_optimizer(kind, {k: v for k, v in own.get("params", {}).items() if v != "auto"}, accelerator)
        return
    try:
        optimizer = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError:  # of those that are made for a model, see check_machine
        return
    check_optimizer(*optimizer, accelerator)


# --- Models ---


def check_reference_model(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Raises UserError if policy and reference share weights or have different vocabularies."""
    if ref_model is None:
        return
    policy, reference = (base_model(m).config.get_text_config().vocab_size for m in (model, ref_model))
    if policy != reference:
        raise UserError(
            f"the reference has a vocabulary of {reference} tokens, the policy of {policy}: use a reference of the"
            " policy's family and tokenizer"
        )
    ours = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in ours for parameter in ref_model.parameters()):
        raise UserError(
            "model and ref_model are the same weights: leave ref_model out, then the start weights are the reference"
        )


def check_image_counts(packed: PackedModel, dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises UserError if ranks that shard a model with images by rows would not run the same modules."""
    if packed.images is None or not packed.images.by_rows or not any(map(is_sharded, packed.model.parameters())):
        return
    base = base_model(packed.model)
    words = dataset["image_ids"] if "image_ids" in read_columns(dataset) and isinstance(dataset, Dataset) else [[]]
    counts = {len(each) for each in words}
    # A model with this method runs by rows because its inputs differ with the sizes of images.
    if len(counts) > 1 or 0 in counts or hasattr(image_encoder(base), "get_image_features"):
        raise UserError(
            f"{type(base).__name__} takes images by rows, so under FSDP2 and ZeRO-3 all rows need equally many images,"
            f" at least one and of one shape, and no stream; the {name} data has others: use DDP, or keep rows with one"
            " number of images"
        )


def check_trainable(packed: PackedModel) -> None:
    """Raises UserError if nothing is trained, or something that the adapter does not save, or an adapter is merged."""
    model = packed.model
    if any(getattr(layer, "merged", False) is True for layer in model.modules()):
        raise UserError(
            "the model's adapter is merged into its weights, so training would not change it: call"
            " model.unmerge_adapter(), or merge_and_unload() to train the weights"
        )
    if hasattr(model, "peft_config") and not packed.has_gradient:
        raise UserError("the model's adapter has nothing to train: no parameter that requires a gradient has one")
    for config in getattr(model, "peft_config", {}).values():
        for name in getattr(config, "modules_to_save", None) or ():
            if not any(f".{found}".endswith(f".{name}") for found, _ in model.named_modules()):
                raise UserError(f"modules_to_save names {name}, and the model has no such module: leave it out")
    if any(parameter.requires_grad for parameter in model.parameters()):
        if hasattr(model, "peft_config") and (unsaved := unsaved_parameters(model)):
            raise UserError(
                f"{unsaved[0]} requires a gradient, but PEFT does not save it with the adapter: name its module in"
                " modules_to_save of the adapter's configuration, or set its requires_grad=False"
            )
        return
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "the model's adapter is frozen: load it by peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable="
            "True) and pass that, or merge it into its model and train a new one"
        )
    raise UserError("all parameters of the model have requires_grad=False: set it to True for those to train")


def mend_generation_config(model: nn.Module) -> None:
    """Resets options of ``generation_config`` that have no effect and with which transformers would not save the model.

    Those are options of sampling with ``do_sample=False``, as Llama 2 and Vicuna have them, and options of beam search
    with one beam.

    Raises:
        UserError: another option of it is invalid.
    """
    base = base_model(model)
    config = getattr(base, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
        return
    except ValueError:  # the options without effect are reset below, and then it is validated again
        default = type(config)()
    unused = () if config.do_sample else _OF_SAMPLING
    unused += _OF_BEAMS if config.num_beams in (None, 1) else ()
    changed = [name for name in unused if getattr(config, name, None) != getattr(default, name, None)]
    old = [f"{name}={getattr(config, name)}" for name in changed]
    for name in changed:
        setattr(config, name, getattr(default, name, None))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"the generation_config of {type(base).__name__} is invalid, so the model could not be saved: {error};"
            " correct it in the model's generation_config.json"
        ) from error
    logger.warning(
        f"the generation_config of {type(base).__name__} has {', '.join(old)}, which have no effect with"
        f" do_sample={config.do_sample} and num_beams={config.num_beams}, and with which transformers would not save"
        " the model: they are left out"
    )


def check_checkpointing(model: nn.Module, args: ContrastiveConfig, images: ImageReader | None = None) -> None:
    """Raises UserError if the model does not support activation checkpointing, or has wrong gradients with it.

    Gradients are wrong if it is re-entrant and layers share more than hidden states, such as keys and values, or what a
    vision tower gives to all of them.
    """
    base = base_model(model)
    if args.chooses_checkpointing and not base.supports_gradient_checkpointing:
        args.gradient_checkpointing = False
    if args.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise UserError(
            f"{type(base).__name__} does not support activation checkpointing: set gradient_checkpointing=false"
        )
    options = _checkpointing_options(base, args)
    if options is None or not options.get("use_reentrant", True):
        return
    if images is not None and not hasattr(image_encoder(base), "get_image_features"):
        wrong, reason = True, "the features of images"
    elif can_run(model):
        error = checkpointing_error(model, options)
        wrong = not error <= math.sqrt(torch.finfo(base.dtype).eps)
        reason = f"the gradient by its embeddings is off by {error:.2g}"
    else:
        wrong = bool(getattr(base.config.get_text_config(), "num_kv_shared_layers", 0))
        reason = "its layers share keys and values"
    if wrong:
        mend = "set use_reentrant=false in gradient_checkpointing_kwargs"
        if zero_stage(args) == 3 and hasattr(model, "peft_config"):
            mend = "ZeRO-3 needs it for adapters, so set gradient_checkpointing=false, or use ZeRO-2 or FSDP"
        raise UserError(
            f"re-entrant activation checkpointing gives {type(base).__name__} wrong gradients, because its layers pass"
            f" on more than hidden states ({reason}): {mend}"
        )


def _checkpointing_options(base: PreTrainedModel, args: ContrastiveConfig) -> dict[str, Any] | None:
    """Returns the keywords of torch's ``checkpoint`` in this run; None without activation checkpointing."""
    if args.gradient_checkpointing:
        # transformers keeps these two keywords to itself; without any other, it sets use_reentrant=False.
        given = {k: v for k, v in (args.gradient_checkpointing_kwargs or {}).items() if k not in _OWN_KEYWORDS}
        return given or {"use_reentrant": False}
    for module in base.modules():  # a user may have enabled it on the model
        if getattr(module, "gradient_checkpointing", False):
            return dict(getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}))
    return None


def position_limit(model: nn.Module) -> tuple[int | None, bool]:
    """Returns the positions that a model was made for, and whether it has no more: a table of learned positions.

    The first is None for a model whose config does not say.
    """
    base = base_model(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None, False
    sizes = [(name, module.num_embeddings) for name, module in base.named_modules() if isinstance(module, nn.Embedding)]
    sizes += [(name, len(buffer)) for name, buffer in base.named_buffers() if name.endswith("embed_positions")]
    # GPT-2 calls its table wpe; OPT's has two entries more than positions.
    tables = [size for name, size in sizes if "wpe" in name or "position" in name]
    return limit, any(limit <= size <= limit + 2 for size in tables)


def check_max_length(model: nn.Module, max_length: int | None) -> None:
    """Raises UserError if an explicit ``max_length`` exceeds the model's table of positions.

    The default is checked on the data.
    """
    limit, is_table = position_limit(model)
    default = ContrastiveConfig.__dataclass_fields__["max_length"].default
    if limit is None or max_length in (None, default) or max_length <= limit:
        return
    has = f"{type(base_model(model)).__name__} has {limit} positions (max_position_embeddings)"
    if is_table:
        raise UserError(f"max_length={max_length}: {has}: set max_length={limit} or less")
    logger.warning(f"max_length={max_length}: {has}, and was not trained on longer sequences")


def check_positions(model: nn.Module, longest: int, row: int, name: str) -> None:
    """Raises UserError if the longest sequence of a dataset exceeds the model's table of positions.

    Args:
        longest: its tokens, after truncation.
        row: the number of its row in the source.
        name: of the dataset, for the message.
    """
    limit, is_table = position_limit(model)
    if limit is None or longest <= limit:
        return
    has = f"{type(base_model(model)).__name__} has {limit} positions (max_position_embeddings)"
    text = f"row {row} of the {name} data has {longest} tokens, and {has}"
    if is_table:
        raise UserError(f"{text}: set max_length={limit} or less")
    logger.warning(f"{text}, and was not trained on longer sequences; max_length={limit} would cut them")


def is_noisy(model: nn.Module, args: ContrastiveConfig) -> bool:
    """Whether the model adds noise to itself in training mode on any rank: dropout, a random router or adapter."""
    random = is_random(model)
    if random and args.disable_dropout:
        disable_config_dropout(model)
        random = is_random(model)
    return any(gather_object([random or dropout(model) > 0]))


def aux_loss_coef(model: nn.Module, option: float | None) -> float:
    """Returns the weight of the load-balancing loss: ``option``, else the model's own; 0 for a model without one.

    Raises:
        UserError: the option is set for a model that computes no load-balancing loss.
    """
    base = base_model(model)
    config, name = base.config.get_text_config(), type(base).__name__
    if not hasattr(config, "output_router_logits"):
        if option:
            raise UserError(f"router_aux_loss_coef={option}: {name} is not a mixture of experts; leave the option out")
        return 0.0
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if option is None else option
    if not coefficient or not can_run(model):
        return coefficient
    value = auxiliary_loss(model)
    if value is None and option:
        raise UserError(f"router_aux_loss_coef={option}: {name} computes no load-balancing loss; leave the option out")
    if not isinstance(value, Tensor):
        logger.warning(
            f"{name} computes no load-balancing loss (aux_loss={value}), so router_aux_loss_coef={coefficient} changes"
            " no gradient"
        )
    return 0.0 if value is None else coefficient


# --- Data ---


def reading_options(args: ContrastiveConfig, dataset: Any, is_training: bool) -> dict[str, Any]:
    """Returns the options by which the rows of a dataset without transform are read, for ``data.preparation``.

    Raises:
        UserError: an option of training does not apply to the columns of the dataset.
    """
    curriculum = None
    if is_training:
        check_ranked_pairs_apply(dataset, args.ranked_pairs)
        curriculum = None if args.curriculum is None else Curriculum.parse(args.curriculum)
    names = ("max_length", "truncation_mode", "target_column", "gap_column", "prompt_format", "weight_column")
    names += ("assistant_only_loss",)
    options = {name: getattr(args, name) for name in names}
    is_data = isinstance(dataset, (Dataset, IterableDataset))  # `prepare` says what is wrong with it
    if is_data and not is_training and {*FORM_COLUMNS[Form.GROUP]} <= {*read_columns(dataset)}:
        # Prepared rows, such as trainer.train_dataset, hold what these options say already.
        options |= {"target_column": None, "gap_column": None, "weight_column": None, "assistant_only_loss": False}
    return {**options, "ranked_pairs": args.ranked_pairs or "all", "keep_columns": kept_columns(curriculum, dataset)}


def check_columns(
    args: ContrastiveConfig, loss: Loss, tokenizer: PreTrainedTokenizerBase, train_dataset: Any, eval_dataset: Any
) -> None:
    """Raises UserError if stored data cannot be trained on with these options, by its columns and first usable row.

    Nearly all such mistakes are found here, before a model is loaded. Streams are left out.
    """
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **evaluation}.items():
        if isinstance(dataset, Dataset):
            dataset = visible_rows(dataset)
            options = reading_options(args, dataset, is_training=name == "train")
            form = examine(dataset, tokenizer, ReadingOptions(**options), name).form
            if loss.needs_rejected and form in (Form.SUPERVISED, Form.MESSAGES):
                raise UserError(_NO_PAIRS.format(loss=loss.name, name=name))


def check_ranked_pairs_apply(dataset: Dataset | IterableDataset, ranked_pairs: str | None) -> None:
    """Raises UserError if ``ranked_pairs`` is set and the rows have no ranking, or pairs of their own."""
    first = None if ranked_pairs is None else next(iter(dataset), None)
    if first is None:
        return
    form = detect_form(read_columns(dataset))
    if form is not Form.RANKED:
        raise UserError(
            f"ranked_pairs={ranked_pairs} has no effect on {form.value} rows, only on ranked ones: leave it out"
        )
    if first.get("pairs") is not None:
        raise UserError(
            f"ranked_pairs={ranked_pairs} has no effect on rows that have `pairs` of their own: leave it out, or leave"
            " the column `pairs` out by --columns"
        )


def check_data(loss: Loss, dataset: Dataset, pairs: int, name: str) -> None:
    """Raises UserError if a prepared dataset of so many pairs lacks what a loss needs, or has weights without use."""
    if loss.needs_rejected and not pairs:
        raise UserError(_NO_PAIRS.format(loss=loss.name, name=name))
    if not loss.separable and any(dataset["weights"]):
        loss.check_weights()
    if loss.needs_gap and not all(dataset["scores"]):
        row = next(row["row"] for row in dataset if not row["scores"])
        raise UserError(
            f"loss '{loss.name}' needs by how much chosen is better, and row {row} of the {name} data has no positive"
            " gap: name a column by gap_column, or give ranked rows with scores"
        )
