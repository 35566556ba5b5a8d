"""Trains an adapter for ten steps, and compares it and its reference with the model's own forward of completions alone.

Many adapters start as zero, which hides how a head or a layout treats them; so the comparison is made after training,
in fp64, with the gradient of every trained parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.errors import UserError
from tests.helpers.adapters import INVOCATION, Case
from tests.helpers.architectures import VOCAB
from tests.helpers.toy import make_trainer

Row = tuple[tuple[int, ...], tuple[int, ...]]  # prompt, completion


def sequences() -> list[Row]:
    """Other tokens and lengths than those of the proof; aLoRA's invocation in a prompt, in completions, and nowhere."""
    random = torch.Generator().manual_seed(7)
    draw = lambda n: tuple(torch.randint(9, VOCAB, (n,), generator=random).tolist())  # noqa: E731
    invocation = tuple(INVOCATION)
    first, second = draw(4) + invocation + draw(5), draw(3)
    return [
        (first, draw(7)),
        (first, draw(2) + invocation + draw(2)),
        (second, draw(3) + invocation + draw(4)),
        (second, draw(4)),
    ]


def alone(model: nn.Module, rows: Sequence[Row] = ()) -> Tensor:
    """Returns the log-probs of all tokens, each completion in a forward of its own."""
    logps = []
    for prompt, completion in rows or sequences():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logps)


def outcome(build: Callable[[], Case], folder: Path) -> str:
    """Returns what becomes of an adapter.

    Raises:
        AssertionError: it is run, and log-probs, gradients or reference are wrong.
    """
    torch.manual_seed(0)
    try:
        given = build()
        with torch.no_grad():
            base = alone(given.model.eval())
    except Exception as error:  # whatever PEFT raises, and whatever the model's own forward raises
        return f"not buildable: {_line(error)}"
    notes = ""
    try:
        trainer = _trainer(given, folder, gradient_checkpointing=True)
    except UserError as error:
        if "gradient_checkpointing=false" not in str(error):
            return f"refused: {_line(error)}"
        notes = ", no checkpointing"
        trainer = _trainer(build(), folder, gradient_checkpointing=False)
    reference = _true_reference(trainer, given, base)
    _compare_reference(trainer, reference)
    trainer.train()
    packed = trainer.packed
    if trainer.reference.live:
        _compare_reference(trainer, reference)
    _compare(trainer)
    notes += ", noise" if packed.noisy else ""
    assert not (packed.noisy and trainer.collator.share_prompts), "completions would share the noise of their prompt"
    way = "padded rows" if packed.padded else "packed"
    return f"{way}{', own logits' if packed.options is None else ''}{notes}"


def _trainer(given: Case, folder: Path, **options) -> ContrastiveTrainer:
    return make_trainer(
        folder, model=given.model, peft_config=given.config, rows=8, max_steps=10, learning_rate=5e-3, **options
    )


def _line(error: Exception) -> str:
    """Returns the first line of a message, without the numbers that were measured."""
    line = re.sub(r"\s+", " ", str(error).strip().split("\n")[0])
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "_", line).split(";")[0][:200]


@torch.no_grad()
def _true_reference(trainer: ContrastiveTrainer, given: Case, base: Tensor) -> Tensor:
    """Returns the log-probs of the given model; those of the policy at its start if the adapter changes the model."""
    model = trainer.model.eval()
    if given.config is None:
        return base
    with model.disable_adapter():
        is_given = torch.allclose(alone(model), base, atol=1e-4)
    return base if is_given else alone(model)


def _compare_reference(trainer: ContrastiveTrainer, expected: Tensor) -> None:
    found = torch.cat([torch.from_numpy(each) for each in trainer.reference.score(sequences(), trainer.collator)])
    assert (found - expected).abs().max() < 2e-4, "the reference differs"


def _compare(trainer: ContrastiveTrainer) -> None:
    """Compares log-probs and gradients of the trained model in fp64, in training mode unless that is random."""
    model, packed = trainer.model.double(), trainer.packed
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    expected = alone(model.train())
    if not torch.equal(alone(model), expected):  # the adapter samples
        expected = alone(model.eval())
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    grads = torch.autograd.grad(expected.double() @ weights, [*parameters.values()], allow_unused=True)
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    found = packed(trainer.collator.pack(sequences(), [], [], [])).tokens.logps
    (found.double() @ weights).backward()
    assert (found - expected).abs().max() < 1e-6 * max(1, expected.abs().max()), "log-probs differ"
    scale = max((grad.abs().max().item() for grad in grads if grad is not None), default=0.0)
    assert scale > 0, "nothing is trained"
    for (name, parameter), grad in zip(parameters.items(), grads):
        grad, own = (torch.zeros(()) if g is None else g for g in (grad, parameter.grad))
        assert (own - grad).abs().max() < 1e-5 * scale, f"gradients of {name} differ"
