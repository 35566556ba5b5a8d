"""Trial runs of a model's own forward on a few tokens: noise in training mode, checkpointing, the auxiliary loss.

Names in a config do not tell what a model does in training: dropout has many names, and layers may share more than
hidden states. So the trainer lets the model run when it is made, and measures.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, set_seed

from ..errors import UserError
from .conditions import is_of_machine, undisturbed
from .packed_model import base_model

# Names of probabilities of dropout, and of the widths of routers' noise. Routers use the latter in training mode only.
_NOISE = re.compile(r".*drop.*|(input_)?jitter_noise|moe_jitter_eps")
_SEEDS = 8  # a module that is left out with a probability of 0.3 is left out in one of so many runs, most likely


# --- Noise ---


def disable_dropout(model: nn.Module, ref_model: nn.Module | None = None) -> None:
    """Sets every probability of dropout that modules hold to 0, under any name, and the width of a router's noise."""
    for module in [*model.modules(), *(ref_model.modules() if ref_model is not None else ())]:
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    _silence(model, model.modules())
    if not can_run(model):
        disable_config_dropout(model)


def disable_config_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout in the configs of a model to 0: some models read them in every forward.

    The config that is saved has 0, too.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    _silence(model, [config for config in configs.values() if isinstance(config, PretrainedConfig)])


def dropout(model: nn.Module) -> float:
    """Returns the largest probability of dropout that the modules of a model hold, or width of a router's noise."""
    return max((values[key] for module in model.modules() for _, values, key in _settings(module)), default=0.0)


@torch.no_grad()
def is_random(model: nn.Module) -> bool:
    """Whether the model's own forward is random in training mode; False if it cannot run now.

    Numbers that are drawn for every token count, whatever their effect: a new adapter, which is 0, hides the dropout
    before it, and a router may draw only between experts that are nearly equal.

    Raises:
        UserError: the model needs more than token ids in training mode.
    """
    if not can_run(model):
        return False
    with _trial(model) as ids:
        model.train()

        def run(ids: Tensor, seed: int = 0) -> tuple[Tensor, list[Any]]:
            set_seed(seed)
            return model(input_ids=ids, use_cache=False).logits, _random_states(ids.device)

        set_seed(0)
        start = _random_states(ids.device)
        try:
            logits, end = run(ids)
        except Exception as error:  # whatever a model raises that needs more inputs to train
            if is_of_machine(error):
                raise
            kind = type(base_model(model)).__name__
            raise UserError(f"{kind} does not train on token ids alone: {type(error).__name__}: {error}") from error
        if end == start:
            return False
        # Numbers for tokens: drawn on the device, or more of them for more tokens.
        if (ids.device.type != "cpu" and end[-1] != start[-1]) or run(torch.cat([ids, ids], 1))[1] != end:
            return True
        # Numbers for layers or modules, which may be left out.
        return not all(torch.equal(run(ids, seed)[0], logits) for seed in range(1, _SEEDS + 1))


def _settings(owner: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields (name, dictionary, key) of every number above 0 that a module or config holds under a name of noise."""
    is_dropout = isinstance(owner, _DropoutNd) or "drop" in type(owner).__name__.lower()
    for name, value in vars(owner).items():
        if not (_NOISE.fullmatch(name) or (is_dropout and name == "p")):
            continue
        if _is_positive(value):
            yield name, vars(owner), name
        elif isinstance(value, dict):  # of PEFT, by adapter
            yield from ((name, value, key) for key, number in value.items() if _is_positive(number))


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _silence(model: nn.Module, owners: Iterable[Any]) -> None:
    """Sets numbers of noise to 0, except those that would change the model's numbers in eval mode."""
    by_name: dict[str, list[tuple[dict[str, Any], str, float]]] = {}
    for name, values, key in itertools.chain.from_iterable(map(_settings, owners)):
        by_name.setdefault(name, []).append((values, key, values[key]))
    before = _eval_logits(model) if by_name and can_run(model) else None
    for places in by_name.values():
        for values, key, _ in places:
            values[key] = 0.0
        now = None if before is None else _eval_logits(model)
        close = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}
        if before is not None and (now is None or not torch.allclose(now, before, **close)):
            for values, key, old in places:
                values[key] = old


@torch.no_grad()
def _eval_logits(model: nn.Module) -> Tensor | None:
    """Returns the logits of a few tokens; None for a model that needs more, which :class:`PackedModel` refuses."""
    try:
        with _trial(model) as ids:
            return model(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # whatever a model raises that needs more inputs
        if is_of_machine(error):
            raise
        return None


def _random_states(device: torch.device) -> list[Any]:
    """Returns the states of all random number generators that a forward may draw from, to compare them."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (the generator that models draw from)
    states = [torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), rest)]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device).tolist())
    return states


# --- Gradients under checkpointing ---


def checkpointing_error(model: nn.Module, options: Mapping[str, Any]) -> float:
    """Returns the relative error of the gradient by the token embeddings under activation checkpointing.

    Re-entrant checkpointing loses the gradients of tensors that layers share beside the hidden states.

    Args:
        options: keyword arguments of ``torch.utils.checkpoint.checkpoint``.
    """
    checkpointing = partial(checkpoint, **options)
    modules: list[Any] = [m for m in base_model(model).modules() if hasattr(m, "gradient_checkpointing")]
    before = [(m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None)) for m in modules]
    trained = [p for p in model.parameters() if p.requires_grad]
    with _trial(model) as ids:
        model.train()
        try:
            for parameter in trained:  # their gradients would need memory, and are not compared
                parameter.requires_grad_(False)
            gradients = []
            for is_on in (False, True):
                for module in modules:
                    module.gradient_checkpointing, module._gradient_checkpointing_func = is_on, checkpointing
                gradients.append(_embedding_gradient(model, ids))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, (was_on, function) in zip(modules, before):
                module.gradient_checkpointing, module._gradient_checkpointing_func = was_on, function
    expected, found = gradients
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _embedding_gradient(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the gradient, (1, L, H), of a fixed weighted sum of the log-probs, by the rows of the embedding."""
    leaves: list[Tensor] = []

    def as_leaf(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    set_seed(0)  # dropout, if it is on
    hook = base_model(model).get_input_embeddings().register_forward_hook(as_leaf)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    finally:
        hook.remove()
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits).cos()
    (logits.log_softmax(-1) * weights).sum().backward()  # re-entrant checkpointing does not support autograd.grad
    gradient = leaves[0].grad
    assert gradient is not None, "logits depend on the embeddings"
    return gradient


# --- The auxiliary loss ---


@torch.no_grad()
def auxiliary_loss(model: nn.Module) -> Tensor | float | None:
    """Returns the load-balancing loss of the model's own forward; None, or a number, from a model without one."""
    with _trial(model) as ids:
        try:
            return getattr(model(input_ids=ids, use_cache=False, output_router_logits=True), "aux_loss", None)
        except IndexError as error:
            # transformers reads the first of no router logits if all layers are dense.
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_name != "load_balancing_loss_func":
                raise
            return None


# --- A forward that leaves no trace ---


@contextlib.contextmanager
def _trial(model: nn.Module) -> Iterator[Tensor]:
    """Context in which a model runs in eval mode; gives it token ids, (1, L). Afterwards all is as before."""
    base: Any = base_model(model)
    attention = base.config._attn_implementation
    # Flash attention does not run on a CPU, where the model may be until training moves it.
    replaced = base.device.type == "cpu" and re.search("flash|over_fa", attention)
    size = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, size // 2), size, (1, 12), generator=generator).to(base.device)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    if replaced:
        base.set_attn_implementation("sdpa")
    try:
        with undisturbed(model):
            yield ids
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if replaced:
            base.set_attn_implementation(attention)


def can_run(model: nn.Module) -> bool:
    """Whether the model is a decoder whose weights are all on this process, so that no engine has to prepare it."""
    whole = not any(p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") for p in model.parameters())
    return whole and not base_model(model).config.is_encoder_decoder
