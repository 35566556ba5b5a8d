"""Decides from the first row of a dataset how all rows are read, and says so once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError

from ..errors import UserError
from .formats import Example, PromptFormat, are_whole, parse_row
from .forms import FORM_COLUMNS, Form, Roles, in_backticks
from .messages import RowError, read_text_or_messages
from .rows import NullPlaces, drop_nulls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIED_ROWS = 100  # rows among which the first usable one is sought


@dataclass(frozen=True)
class FirstRow:
    """What the first usable row tells."""

    # the format in which all rows are read: "auto" became "chat" if a column makes rows conversations
    prompt_format: PromptFormat
    is_chat: bool | None  # the row is a conversation; None if no row is usable, or rows are tokenized already
    is_whole: bool  # the responses are whole conversations, which begin with their prompt
    remarks: Sequence[str]  # sentences for the user

    def notes(self, name: str, unused: Sequence[str]) -> list[str]:
        """Returns the sentences about a dataset called ``name`` with these unused columns."""
        rest = [f"the columns {in_backticks(unused)} are not used"] if len(unused) > 1 else []
        rest += [f"the column {in_backticks(unused)} is not used"] if len(unused) == 1 else []
        return [f"{name} data: {remark}" for remark in (*self.remarks, *rest)]


def read_first_row(
    dataset: Dataset | IterableDataset,
    form: Form,
    roles: Roles,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    nulls: Mapping[str, NullPlaces],
) -> FirstRow:
    """Reads the first usable row of a dataset.

    Raises:
        UserError: ``prompt_format`` needs a chat template, and the tokenizer has none.
    """
    if form in (Form.GROUP, Form.TOKENS):
        return FirstRow(prompt_format, None, False, [])
    template = getattr(tokenizer, "chat_template", None)
    if prompt_format == "chat" and template is None:
        raise UserError("prompt_format=chat needs a chat template: set tokenizer.chat_template, or prompt_format=text")
    if prompt_format == "auto" and roles.keys() & {"system", "history"} and template is not None:
        prompt_format = "chat"  # also the rows whose system prompt is empty, so that all rows have one format
    remarks = _say_roles(form, roles)
    side_columns = [roles[role] for role in FORM_COLUMNS[form]] if form is Form.PREFERENCE else []
    for given in islice(dataset, _TRIED_ROWS):
        row = {name: drop_nulls(value, nulls.get(name)) for name, value in given.items()}
        try:
            example = parse_row(row, form, roles=roles, prompt_format=prompt_format)
            sides = [read_text_or_messages(name, row.get(name), "images" in roles) for name in side_columns]
        except RowError:
            continue  # counted by the filter
        if not example.is_chat and template is not None and prompt_format == "auto":
            remarks.append(
                "rows are text, which is continued as it is, although the tokenizer has a chat template: set"
                " prompt_format=chat to make turns of prompts and responses, or prompt_format=text to keep the text"
            )
        if example.is_chat and (dates := _printed_dates(tokenizer, example)):
            remarks.append(
                f"the chat template prints today's date ({dates[0]}), so tokens change daily, and the reference is"
                " scored anew: fix the date in the template"
                + (", or give rows chat_template_kwargs with a date_string" if "date_string" in str(template) else "")
            )
        return FirstRow(prompt_format, example.is_chat, are_whole([side or "" for side in sides]), remarks)
    return FirstRow(prompt_format, None, False, remarks)


def _say_roles(form: Form, roles: Roles) -> list[str]:
    """Returns a sentence that says which columns are read, unless they have our names."""
    parts = [f"{role} from `{name}`" for role, name in roles.items() if name != role or role in ("system", "history")]
    if "input" in roles:
        parts = [part for part in parts if not part.startswith(("prompt", "input"))]
        parts = [f"prompt from `{roles['prompt']}` and, on a line of its own, `{roles['input']}`", *parts]
    return [f"read as {form.value} rows: {', '.join(parts)}"] if parts else []


def _printed_dates(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """Returns the dates of today that the chat template prints into a conversation."""
    formats = re.findall(r"strftime_now\(\s*['\"](.+?)['\"]", str(tokenizer.chat_template))
    if not formats:
        return []
    turns: Any = [*example.prompt, *(example.completions[0] if example.completions else ())]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, tools=example.tools, **example.template_kwargs)
    except (TemplateError, TypeError):
        return []  # the row is dropped, with this error as the reason
    return [date for date in map(datetime.now().strftime, formats) if date in text]
