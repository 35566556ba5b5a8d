"""Tests of ``ContrastiveConfig``: TRL's options and defaults, and options that are ignored, removed or excluded."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import MISSING, fields, replace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from cpt_kernels import ContrastiveConfig, DPOConfig
from cpt_kernels.data.other_options import IGNORED_OPTIONS, REMOVED_OPTIONS
from cpt_kernels.errors import UserError
from cpt_kernels.losses import LOSSES

# Options whose default differs from TRL's on purpose: (TRL's, ours).
DIFFERENT_DEFAULTS = {
    # Reference log-probs are cached, so a second run does not score again. A stream is scored while it is read.
    "precompute_ref_log_probs": (False, None),
}

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def default(field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def config(tmp_path, **options) -> ContrastiveConfig:
    return ContrastiveConfig(str(tmp_path), use_cpu=True, report_to="none", **options)


def test_every_option_of_trl_is_there_with_its_default():
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
    ours = {field.name: default(field) for field in fields(ContrastiveConfig)}
    theirs = {field.name: default(field) for field in fields(trl.DPOConfig)}
    assert theirs.keys() <= ours.keys()
    found = {name: (value, ours[name]) for name, value in theirs.items() if ours[name] != value}
    assert found == DIFFERENT_DEFAULTS


def test_defaults_after_construction_are_trls_except_for_the_precision(tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
    arguments = {"use_cpu": True, "report_to": "none"}
    ours, theirs = ContrastiveConfig(str(tmp_path), **arguments), trl.DPOConfig(str(tmp_path), **arguments)
    found = {}
    for name in (field.name for field in fields(trl.DPOConfig)):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b and "runs" not in str(a):  # logging_dir contains the time
            found[name] = (b, a)
    # TRL turns bf16 on wherever fp16 is off, we only where an accelerator supports it. Neither pads by default.
    expected = {"bf16": (True, False), "pad_to_multiple_of": (None, "auto"), **DIFFERENT_DEFAULTS}
    assert found == expected


@pytest.mark.parametrize(("major", "options", "bf16"), [(8, {}, True), (7, {}, False), (8, {"fp16": True}, False)])
def test_bf16_is_the_default_of_gpus_that_compute_in_it(major, options, bf16, tmp_path, monkeypatch):
    """A GPU of compute capability 7 emulates bf16, so it is off there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    supported = lambda including_emulation=True: including_emulation or major >= 8  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would use the GPU
    monkeypatch.setattr(ContrastiveConfig, "device", torch.device("cuda"))
    assert ContrastiveConfig(str(tmp_path), accelerator_config=AcceleratorConfig(), **options).bf16 is bf16


def test_fields_of_transformers_are_redefined_for_their_default_only():
    """The fields of transformers that we declare again are those whose default we change."""
    redefined = {f.name for f in fields(TrainingArguments)} & ContrastiveConfig.__annotations__.keys()
    assert redefined == {"learning_rate", "logging_steps", "gradient_checkpointing", "bf16"}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_both_names_of_checkpointing_mean_the_same(tmp_path, name):
    """transformers 5.24 renamed the options; its Trainer reads the new names."""
    names = [name for name in CHECKPOINTING if hasattr(TrainingArguments, name)]
    if name not in names:
        pytest.skip("needs transformers 5.24 or newer")

    def assert_all(args, on, kwargs):
        assert [getattr(args, name) for name in names] == [on] * len(names)
        assert [getattr(args, f"{name}_kwargs") for name in names] == [kwargs] * len(names)

    kwargs = {"use_reentrant": True}
    assert_all(config(tmp_path), True, None)
    assert_all(config(tmp_path, **{name: False}), False, None)
    args = config(tmp_path, **{f"{name}_kwargs": kwargs})
    assert_all(args, True, kwargs)
    for copied in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), replace(args)):
        assert_all(copied, True, kwargs)
        setattr(copied, name, False)  # scripts change options after construction, too
        setattr(copied, f"{name}_kwargs", None)
        assert_all(copied, False, None)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTING if hasattr(TrainingArguments, name)])
def test_auto_is_the_default_of_checkpointing_on_a_gpu(tmp_path, monkeypatch, name):
    assert not config(tmp_path).chooses_checkpointing and not config(tmp_path, **{name: True}).chooses_checkpointing
    assert config(tmp_path, **{name: "auto"}).chooses_checkpointing
    with pytest.raises(UserError, match=f"{name}=sometimes: must be true, false or auto"):
        config(tmp_path, **{name: "sometimes"})

    monkeypatch.setattr(ContrastiveConfig, "device", torch.device("cuda"))
    args = config(tmp_path)
    assert args.chooses_checkpointing and config(tmp_path, **{name: None}).chooses_checkpointing
    assert args.gradient_checkpointing is True  # what models and adapters are prepared for
    assert not any(config(tmp_path, **{name: value}).chooses_checkpointing for value in (True, False))
    for copied in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert copied.chooses_checkpointing
        setattr(copied, name, True)
        assert not copied.chooses_checkpointing


@pytest.mark.parametrize("name", IGNORED_OPTIONS)
def test_ignored_options_are_accepted_and_the_reason_is_logged(tmp_path, caplog, name):
    values = {"pad_to_multiple_of": 8, "pad_token": "</s>", "length_column_name": "tokens", "local_rank": 1}
    values |= {"label_smoothing_factor": 0.1, "label_names": ["x"], "include_for_metrics": ["loss"]}
    usual = ContrastiveConfig.__dataclass_fields__[name].default
    value = values.get(name, 4 if usual is None else usual is not True)
    with caplog.at_level(logging.WARNING, logger="cpt_kernels"):
        config(tmp_path, **{name: value})
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{name}=") and message.endswith(f" has no effect here: {IGNORED_OPTIONS[name]}")


def test_options_of_accelerates_loaders(tmp_path, caplog):
    with pytest.raises(ValueError, match="split_batches would cut packed batches"):
        config(tmp_path, accelerator_config={"split_batches": True})
    with caplog.at_level(logging.WARNING, logger="cpt_kernels"):
        config(tmp_path, accelerator_config={"dispatch_batches": False, "even_batches": False})
        assert not caplog.records
        config(tmp_path, accelerator_config={"dispatch_batches": True, "use_seedable_sampler": False})
    assert [record.getMessage().split(" of ")[0] for record in caplog.records] == [
        "dispatch_batches=True",
        "use_seedable_sampler=False",
    ]


def test_defaults_log_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="cpt_kernels"):
        config(tmp_path)
        config(tmp_path, pad_to_multiple_of=None)
    assert not caplog.records


@pytest.mark.parametrize("name", REMOVED_OPTIONS)
def test_removed_options_are_explained(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name} was removed: \\w"):
        DPOConfig(str(tmp_path), **{name: 1})
    assert name not in {field.name for field in fields(ContrastiveConfig)}


def test_replacements_of_removed_options(tmp_path):
    assert (
        config(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5]).build_loss().name == "sigmoid + 0.5 sft"
    )
    assert not config(tmp_path, loss_type="cpo", cpo_alpha=0.0).build_loss().needs_reference


def test_copies(tmp_path):
    made = config(tmp_path, loss_type=["ipo", "sft"], loss_weights=[1.0, 0.1])
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied.loss_type == ["ipo", "sft"] and copied.build_loss().name == "ipo + 0.1 sft"
    assert config(tmp_path).loss_type is not config(tmp_path).loss_type


def test_hf_argument_parser_reads_the_configuration(tmp_path):
    """A script may parse the configuration by HfArgumentParser, as TRL's scripts do."""
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2"]
    argv += ["--report_to", "none", "--no_gradient_checkpointing"]
    (made,) = HfArgumentParser(ContrastiveConfig).parse_args_into_dataclasses(argv)
    assert made.build_loss().name == "sigmoid + 0.2 sft" and not made.gradient_checkpointing


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_built_from_its_options(tmp_path, name):
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    loss = config(tmp_path, loss_type=name, **options).build_loss()
    assert loss.name == name and config(tmp_path, loss_type=[name], **options).loss_type == [name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "loss_type='sigmod' is unknown: choose one of sigmoid"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for the 2 losses"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect on loss_type 'ipo'"),
        ({"label_smoothing": 0.5}, r"a flip probability must lie in \[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing above 0: its paper has 1e-3"),
        ({"slic_delta": 2.0}, "slic_delta has no effect on loss_type 'sigmoid'"),
        (
            {"loss_type": ["hinge", "sft"], "simpo_gamma": 1.0},
            r"simpo_gamma has no effect on loss_type 'hinge \+ sft'",
        ),
        ({"discopop_tau": 0.1}, "discopop_tau has no effect"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau=0.0: must be positive"),
        ({"beta": 0.0}, "beta=0.0: must be positive"),
        ({"beta": -1.0}, "beta=-1.0: must be positive"),
        ({"loss_type": "slic", "slic_delta": -1.0}, "slic_delta=-1.0: must not be negative"),
        ({"loss_type": "simpo", "simpo_gamma": -0.5}, "simpo_gamma=-0.5: must not be negative"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: must not be negative"),
        ({"seed": -1}, "seed=-1: must not be negative"),
        ({"dataloader_num_workers": -2}, "dataloader_num_workers=-2: must not be negative"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be positive"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be positive"),
        ({"optim_args": "x"}, "optim_args=x: expected name=value, .* got 'x'"),
        ({"ddp_backend": "foo"}, "ddp_backend='foo' is unknown: choose one of .*gloo"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs={'a': 1}: .*unexpected keyword argument 'a'"),
        ({"ld_alpha": 1.5}, r"ld_alpha=1.5: must lie in \[0, 1\]"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha has no effect on loss 'sft'"),
        ({"loss_type": "slic", "use_weighting": True, "ld_alpha": 0.5}, "ld_alpha has no effect on loss 'slic'"),
        ({"loss_type": "aot", "use_weighting": True}, "sorts the two sides"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' is unknown"),
        ({"loss_type": "nca_pair", "f_divergence_type": "js_divergence"}, "not defined for loss 'nca_pair'"),
        ({"f_alpha_divergence_coef": 0.3}, "no effect without f_divergence_type=alpha_divergence"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "leave out one of"),
        ({"sync_ref_model": True, "loss_type": "simpo"}, "sync_ref_model has no effect on loss_type 'simpo'"),
        ({"ref_model_sync_steps": 10}, "ref_model_sync_steps has no effect without sync_ref_model=true"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha has no effect without sync_ref_model=true"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps=0: must be positive"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.2}, r"must lie in \[0, 1\]"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle' is unknown: choose one of keep_start, keep_end"),
        ({"train_sampling_strategy": "group_by_length"}, "max_tokens_per_batch"),
        ({"auto_find_batch_size": True, "max_tokens_per_batch": 64}, "auto_find_batch_size halves"),
        ({"dataloader_drop_last": True, "max_tokens_per_batch": 64}, "dataloader_drop_last has no effect"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tp_size=2 is not supported"),
        ({"parallelism_config": {"sp_sizes": 2}}, "parallelism_config: .*sp_sizes"),
        ({"parallelism_config": ParallelismConfig(sp_size=2), "sp_size": 4}, "sp_size=4 contradicts sp_size=2"),
        ({"parallelism_config": {"sp_size": 2}}, "sp_size=2 needs a multiple of 2 processes, and there are 1"),
        ({"sp_size": 2, "packing": "false"}, "sp_size=2 cuts packed rows: leave out packing=false"),
        ({"sp_size": 2, "max_tokens_per_batch": "auto"}, "max_tokens_per_batch=auto does not know the memory"),
        ({"fp16": True}, "fp16=true needs a GPU"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("sizes", "from_launcher", "left"),
    [
        ({"sp_size": 2}, False, None),  # the engine averages over all ranks
        ({"sp_size": 2, "dp_shard_size": 4}, False, (1, 8)),
        ({"sp_size": 4, "dp_shard_size": 1, "dp_replicate_size": 2}, True, (2, 4)),
        ({"sp_size": 1, "dp_shard_size": 8}, False, (1, 8)),
    ],
)
def test_sequence_groups_are_asked_for_by_the_fields_of_accelerate(tmp_path, monkeypatch, sizes, from_launcher, left):
    """Weights are sharded, and gradients averaged, over the ranks of sequence groups as well."""
    monkeypatch.setattr(ContrastiveConfig, "world_size", property(lambda self: 8))
    given = {"parallelism_config": ParallelismConfig(**sizes)}
    if from_launcher:
        given = {}
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        for name, size in sizes.items():
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(size))
    made = config(tmp_path, **given)
    assert made.sp_size == sizes["sp_size"] and made.data_ranks == 8 // made.sp_size
    found = made.parallelism_config
    assert (found and (found.dp_replicate_size, found.dp_shard_size, found.sp_size)) == (left and (*left, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "use_weighting": True, "f_divergence_type": "js_divergence"},
        {"loss_type": ["hinge", "slic"], "slic_delta": 2.0, "loss_weights": [1, 2]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"sync_ref_model": True, "ref_model_sync_steps": 8, "ref_model_mixup_alpha": 0.1},
        {"sync_ref_model": True, "precompute_ref_log_probs": False},
        {"loss_type": ["robust"], "label_smoothing": 0.4},
    ],
)
def test_options_that_can_be_combined(tmp_path, options):
    made = config(tmp_path, **options)
    assert all(getattr(made, name) == value for name, value in options.items())
