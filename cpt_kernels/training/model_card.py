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

{% if base %}[{{ base }}](https://huggingface.co/{{ base }}){% else %}A model{% endif %} after contrastive post-training
with the loss `{{ options.loss_type }}`{% if dataset %} on \
[{{ dataset }}](https://huggingface.co/datasets/{{ dataset }}){% endif %}, by
cpt_kernels {{ versions.cpt_kernels }}.

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
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)


def write_model_card(
    file: Path,
    *,
    name: str,
    base: str | None,
    dataset: str | None,
    tags: Iterable[str],
    args: Any,
    chat: bool,
    log_history: Sequence[Mapping[str, Any]],
) -> None:
    """Writes a model card with the run's options, last evaluation and package versions.

    Args:
        file: path to write to.
        name: name of the model.
        base: hub name of the model that training started from; a local folder is not shown.
        dataset: hub name of the training data; a local file is not shown.
        tags: of the model on the hub.
        args: the run's ``ContrastiveConfig``.
        chat: whether the tokenizer has a chat template.
        log_history: all logs of the trainer; the card shows the last evaluation.
    """
    base, dataset = (None if value is None or Path(value).exists() else value for value in (base, dataset))
    evaluations = [record for record in log_history if "eval_loss" in record]
    metrics = evaluations[-1] if evaluations else {}
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "datasets": datasets}
    values = {option: getattr(args, option) for option in _OPTIONS} | {"loss_type": " + ".join(args.loss_type)}
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base,
            datasets=None if dataset is None else [dataset],
            library_name="transformers",
            model_name=name,
            pipeline_tag="text-generation",
            tags=list(tags),
        ),
        template_str=_TEMPLATE,
        name=name,
        base=base,
        dataset=dataset,
        chat=chat,
        options={option: getattr(value, "value", value) for option, value in values.items() if value is not None},
        metrics={key: value for key, value in metrics.items() if isinstance(value, float)},
        versions={"cpt_kernels": __version__} | {package: module.__version__ for package, module in modules.items()},
    )
    card.save(file)
