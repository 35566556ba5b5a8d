"""The forms of datasets, ours and those of other trainers: which columns hold a row's prompt and its responses.

Pure Python: this module knows names of columns only. :mod:`.formats` reads the rows.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from enum import Enum

from ..errors import UserError


class Form(str, Enum):
    """The form of a dataset's rows, known from its columns."""

    GROUP = "prompt groups"  # written by `preparation.prepare`
    TOKENS = "tokenised pairs"  # written by TRL
    PREFERENCE = "preference"
    RANKED = "ranked"
    SUPERVISED = "prompt and completion"
    MESSAGES = "messages"


# What a form needs beside the prompt: its roles, which are also the names of our own columns.
FORM_COLUMNS = {
    Form.GROUP: ("prompt_ids", "completion_ids", "chosen", "rejected", "targets"),
    Form.TOKENS: ("prompt_ids", "chosen_ids", "rejected_ids"),
    Form.PREFERENCE: ("chosen", "rejected"),
    Form.RANKED: ("completions", "scores"),
    Form.SUPERVISED: ("completion",),
    Form.MESSAGES: ("messages",),
}

# The columns that may have these roles, in their order. The first line whose columns are all present counts: prompt
# groups also have `chosen` and `rejected`, and a preference dataset often has a `messages` column.
_FORMS: tuple[tuple[Form, tuple[str, ...]], ...] = (
    (Form.GROUP, FORM_COLUMNS[Form.GROUP]),
    (Form.TOKENS, FORM_COLUMNS[Form.TOKENS]),
    (Form.PREFERENCE, ("chosen", "rejected")),  # TRL, LLaMA-Factory, HH, UltraFeedback binarized, Orca pairs
    (Form.PREFERENCE, ("chosen_step", "rejected_step")),  # Step-DPO
    (Form.PREFERENCE, ("chosen_response", "rejected_response")),  # Argilla, NeMo
    (Form.PREFERENCE, ("preferred_output", "non_preferred_output")),  # OpenAI
    (Form.PREFERENCE, ("chosen_conversations", "rejected_conversations")),  # torchtune
    (Form.PREFERENCE, ("messages", "rejected_response")),  # ms-swift
    (Form.PREFERENCE, ("response", "rejected_response")),  # ms-swift, older
    (Form.PREFERENCE, ("response_j", "response_k")),  # StackExchange
    (Form.RANKED, ("completions", "scores")),
    (Form.RANKED, ("completions",)),  # best first, or objects with ratings as in UltraFeedback
    (Form.RANKED, ("generations", "ratings")),  # distilabel
    (Form.SUPERVISED, ("completion",)),
    (Form.MESSAGES, ("messages",)),  # OpenAI
    (Form.MESSAGES, ("conversations",)),  # ShareGPT
    (Form.SUPERVISED, ("output",)),  # Alpaca
    (Form.SUPERVISED, ("answer",)),
)

# The columns that may hold the prompt, the preferred one first. `input` adds to `instruction`.
PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input")
_CONVERSATIONS = ("conversations", "messages")
_BEFORE_PROMPT = {"system": ("system", "system_prompt"), "history": ("history",)}  # role -> columns
_AROUND_STEP = {  # role -> columns, of rows that compare two steps of an answer
    "initial": ("initial_steps", "initial_reason_steps"),  # with which the answer begins
    "chosen_rest": ("chosen_rest",),  # what follows the step
    "rejected_rest": ("rejected_rest",),
}

IMAGE_COLUMNS = ("images", "image")  # TRL's: a list of images, or one
# Columns that are read under these names.
_READ = ("pairs", "tools", "chat_template_kwargs", "row", "image_ids", "completion_mask", "token_weights", "train_on")
REFERENCE_SUMS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's, which `cpt cache import` reads
_UNPAIRED = ("label", "kto_tag")
_SIDES = {name for form, names in _FORMS if form is Form.PREFERENCE for name in names} - {"messages", "response"}
# A column whose name has one of the first words and none of the second looks like a prompt.
_PROMPT_WORDS = {*PROMPT_NAMES, "system", "history", "context", "problem", "task", "trajectory", "user"}
_OTHER_WORDS = {"id", "ids", "idx", "hash", "len", "length", "tokens", "count", "model", "source", "type", "name"}

# Role -> column; the roles are prompt, input, system, history, images, initial, and those of FORM_COLUMNS.
Roles = Mapping[str, str]


def detect_form(columns: Iterable[str]) -> Form:
    """Returns the form of a dataset with these columns; see :func:`find_roles`."""
    return find_roles(columns)[0]


def find_roles(columns: Iterable[str]) -> tuple[Form, Roles]:
    """Returns the form of a dataset with these columns, and the column of each role.

    Raises:
        UserError: the columns hold unpaired preferences, or have no known form; the message names the columns found
            and expected.
    """
    columns = set(columns)
    found = match_roles(columns)
    if found is None:
        expected = "; ".join(in_backticks(_our_columns(form)) for form in Form)
        there = in_backticks(sorted(columns))
        raise UserError(f"the dataset has the columns {there}; expected one of: {expected}; {_mend(columns)}")
    form, roles = found
    if form in (Form.SUPERVISED, Form.MESSAGES) and (tags := columns & {*_UNPAIRED}):
        raise UserError(
            f"the dataset has the columns {in_backticks([*_our_columns(form), *tags])}: unpaired preferences are not"
            f" supported, and training on all completions would ignore {in_backticks(tags)}; build pairs (`chosen`,"
            f" `rejected`), or remove {in_backticks(tags)}"
        )
    images = None if form is Form.GROUP else image_column(columns)
    return form, roles if images is None else {**roles, "images": images}


def image_column(columns: Iterable[str]) -> str | None:
    """Returns the column of a dataset that holds the images of its prompts, or None."""
    found = [name for name in IMAGE_COLUMNS if name in {*columns}]
    if len(found) > 1:
        raise UserError("the dataset has the columns `images` and `image`: remove one of the two")
    return found[0] if found else None


def _mend(columns: Collection[str]) -> str:
    """Returns how columns without a known form may get one."""
    (first, *others) = sorted(columns)
    if not others and (mark := next((mark for mark in ";\t|" if mark in first), None)):
        return f"separate the columns by commas, not by {mark!r}, or by tabs in a .tsv file"
    plain = {name.strip().lower(): name for name in columns}
    if match_roles(plain) is not None:
        names = " ".join(shlex.quote(f"{name}={new}") for new, name in sorted(plain.items()))
        return f"rename columns with --columns {names}"
    return "rename columns with --columns, for instance --columns question=prompt better=chosen worse=rejected"


def match_roles(columns: Collection[str]) -> tuple[Form, Roles] | None:
    """Returns the form of a dataset with these columns and the column of each role, or None without a known form."""
    for form, names in _FORMS:
        if not {*names} <= {*columns}:
            continue
        roles = {} if form in (Form.GROUP, Form.TOKENS) else find_prompt({*columns} - {*names}, form)
        if form not in (Form.RANKED, Form.SUPERVISED) or "prompt" in roles:
            return form, {**roles, **dict(zip(FORM_COLUMNS[form], names))}
    return None


def find_prompt(columns: Collection[str], form: Form | None = None) -> dict[str, str]:
    """Returns the columns that make the prompt of a row, by role: `prompt`, `input`, `system`, `history` and `initial`.

    Rows of MESSAGES have their prompt in the messages. Rows of other forms may have it as a conversation.
    """
    roles = {role: name for role, names in _BEFORE_PROMPT.items() if (name := _first_name(names, columns))}
    if form is Form.MESSAGES:
        return roles
    prompt = _first_name((*PROMPT_NAMES[:-1], *(() if form is Form.SUPERVISED else _CONVERSATIONS), "input"), columns)
    if form is not None:
        roles |= {role: name for role, names in _AROUND_STEP.items() if (name := _first_name(names, columns))}
    if prompt is not None:
        roles["prompt"] = prompt
    if prompt == "instruction" and "input" in columns:
        roles["input"] = "input"
    return roles


def read_by(form: Form, roles: Roles) -> set[str]:
    """Returns the columns that are read of rows with these roles; without roles, columns have our names."""
    named = [*roles.values()] if form not in (Form.GROUP, Form.TOKENS) else []
    return {
        *(named or ("prompt", *FORM_COLUMNS[form])),
        *_READ,
        *(("scored", "weights", "tree") if form is Form.GROUP else ()),
    }


def unused_columns(
    columns: Collection[str], form: Form, roles: Roles, others: Collection[str], whole: bool
) -> list[str]:
    """Returns the columns that nothing reads.

    Args:
        others: columns that options name.
        whole: the responses are whole conversations, so they begin with their prompts.

    Raises:
        UserError: one of the columns looks like a prompt, or like one side of a pair; the message has the mend.
    """
    used = {*read_by(form, roles), *others, *REFERENCE_SUMS}
    unused = [name for name in columns if name not in used]
    whole = whole or form is Form.MESSAGES
    suspects = [name for name in unused if name in _SIDES] if form in (Form.SUPERVISED, Form.MESSAGES) else []
    if form not in (Form.GROUP, Form.TOKENS) and not whole:
        suspects += [name for name in unused if _looks_like_prompt(name, is_known="prompt" in roles)]
    if not suspects:
        return unused
    keep = [*dict.fromkeys(name for name in (*roles.values(), *_READ, *others) if name in columns)]
    one, role, kind = suspects[0], "prompt", "a prompt"
    renamed = [f"{one}=prompt", *(name for name in keep if name not in (roles.get("prompt"), roles.get("input")))]
    if one in _SIDES:
        role, kind = ("rejected" if re.search("reject|non_|_k$", one) else "chosen"), "a side of a pair"
        other = "rejected chosen".replace(role, "").strip()
        side = roles[FORM_COLUMNS[form][0]]
        renamed = [f"{side}={other}", f"{one}={role}", *(name for name in keep if name != side)]
    own = f" (the prompt is `{roles['prompt']}`)" if "prompt" in roles and kind == "a prompt" else ""
    renamed, keep = [shlex.quote(name) for name in renamed], [shlex.quote(name) for name in keep]
    raise UserError(
        f"the column{'s' * (len(suspects) > 1)} {in_backticks(suspects)} look{'s' * (len(suspects) == 1)} like {kind}"
        f" and would not be used{own}: give --columns {' '.join(renamed)} to use `{one}`, or --columns"
        f" {' '.join(keep)} to leave it out (in Python: dataset.rename_column, dataset.remove_columns)"
    )


def _looks_like_prompt(name: str, is_known: bool) -> bool:
    """Returns whether a column looks like a part of the prompt; any word of its name counts if there is no prompt."""
    if is_known:
        return name in {
            *PROMPT_NAMES,
            "conversations",
            "context",
            *_BEFORE_PROMPT["system"],
            *_BEFORE_PROMPT["history"],
        }
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    return bool(words & _PROMPT_WORDS) and not words & _OTHER_WORDS


def _our_columns(form: Form) -> tuple[str, ...]:
    if form is Form.RANKED:
        return ("prompt", "completions")
    return ("prompt", "completion") if form is Form.SUPERVISED else FORM_COLUMNS[form]


def _first_name(names: Iterable[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def in_backticks(names: Iterable[str]) -> str:
    """Returns names of columns for a message."""
    return ", ".join(f"`{name}`" for name in names)
