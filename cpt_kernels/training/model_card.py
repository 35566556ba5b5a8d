"""Writes the model card, the README.md that the Hugging Face hub shows for a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from ..version import __version__

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ base_text }} after contrastive post-training with the loss `{{ options.loss_type }}`{{ dataset_text }}, \
{% if options.curriculum %}on a curriculum, {% endif %}by cpt_kernels {{ versions.cpt_kernels }}.

## Use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{{ name }}")
prompt = {% if chat %}[{"role": "user", "content": "Why is the sky blue?"}]{% else %}"Why is the sky blue?"{% endif %}
print(generate(prompt, max_new_tokens=128, return_full_text=False)[0])
```

## Training

| option | value |
|---|---|
{% for option, value in options.items() %}| {{ option }} | {{ value }} |
{% endfor %}
{% if metrics %}## Last evaluation

| metric | value |
|---|---|
{% for metric, value in metrics.items() %}| {{ metric }} | {{ "%.4g" % value }} |
{% endfor %}
{% endif %}## Versions

{% for package, version in versions.items() %}- {{ package }}: {{ version }}
{% endfor %}"""

_OPTIONS = (
    *("loss_type", "beta", "max_length", "learning_rate", "lr_scheduler_type", "max_tokens_per_batch"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "curriculum"),
)


def write_model_card(
    file: Path,
    *,
    name: str,
    base: str | None,
    dataset: str | Sequence[str] | None,
    tags: Iterable[str],
    args: Any,
    chat: bool,
    log_history: Sequence[Mapping[str, Any]],
) -> None:
    """Writes a model card with the run's options, last evaluation and package versions.

    Args:
        base: hub name or folder of the model that training started from; of a folder the card has the last part.
        dataset: hub names or files of the training data; of a file the card has the last part.
        args: the run's ``ContrastiveConfig``.
        chat: whether the tokenizer has a chat template.
        log_history: all logs of the trainer; the card shows the last evaluation.
    """
    base_text = "A model" if not base else _named(base, "https://huggingface.co/")
    sources = [dataset] if isinstance(dataset, str) else list(dataset or ())
    named = [_named(source, "https://huggingface.co/datasets/") for source in dict.fromkeys(sources)]
    dataset_text = f" on {' and '.join(named)}" if named else ""
    on_hub = [source for source in dict.fromkeys(sources) if not _is_local(source)]
    evaluations = [record for record in log_history if "eval_loss" in record]
    metrics = evaluations[-1] if evaluations else {}
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "datasets": datasets}
    values = {option: getattr(args, option) for option in _OPTIONS} | {"loss_type": " + ".join(args.loss_type)}
    card = ModelCard.from_template(
        ModelCardData(
            base_model=None if base is None or _is_local(base) else base,
            datasets=on_hub or None,
            library_name="transformers",
            model_name=name,
            pipeline_tag="text-generation",
            tags=list(tags),
        ),
        template_str=_TEMPLATE,
        name=name,
        base_text=base_text,
        dataset_text=dataset_text,
        chat=chat,
        options={option: getattr(value, "value", value) for option, value in values.items() if value is not None},
        metrics={key: value for key, value in metrics.items() if isinstance(value, float)},
        versions={"cpt_kernels": __version__} | {package: module.__version__ for package, module in modules.items()},
    )
    card.save(file)


def _is_local(source: str) -> bool:
    """Whether a name is that of a file or an address, not of a repository on the hub."""
    return Path(source).exists() or "://" in source


def _named(source: str, hub: str) -> str:
    """Returns a hub name as a link, and the last part of a local path or an address."""
    return f"`{Path(source).resolve().name}`" if _is_local(source) else f"[{source}]({hub}{source})"
