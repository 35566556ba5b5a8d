"""Who compares two outputs: a Python function, or a model behind an OpenAI-compatible endpoint.

A judge sees ``output_1`` and ``output_2`` and says how much it prefers the first: 1 where it is better, 0 where the
second is, 1/2 for a tie, or anything between. Asked in both orders, what it has for whichever stands first cancels out.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, TemplateError
from jinja2.meta import find_undeclared_variables
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..errors import UserError
from ..generation.endpoint import Endpoint, EndpointOptions
from ..generation.prompts import Answer, Failure, Prompt, Request, Sampling
from ..generation.response_file import ResponseFile, prompt_of
from .outputs import Comparisons

Judge = Callable[[str, str, str], "float | str"]  # (prompt, output_1, output_2) -> preference, or one of _WINNERS

TEMPLATE = Path(__file__).with_name("judge.jinja")
NO_VERDICT = "no verdict in the reply"  # one of the reasons in `Verdicts.failures`
_WINNERS = {"output_1": 1.0, "output_2": 0.0, "tie": 0.5}
_VARIABLES = {"prompt", "output_1", "output_2"}
_VERDICT = re.compile(r"\[\[(1|2|tie)\]\]", re.IGNORECASE)
_PREFERENCES = {"1": 1.0, "2": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Verdicts:
    """Preferences for a model's output over the baseline's, for n comparisons.

    Attributes:
        orders: (n, 1) or (n, 2) preference in each order that was asked, the model's output first and then second; NaN
            where the judge gave none.
        failures: reason -> how many answers are missing for it.
        identical: comparisons of equal outputs, which are ties and were not asked.
    """

    orders: NDArray[np.float64]
    failures: Mapping[str, int] = field(default_factory=dict)
    identical: int = 0

    @property
    def preferences(self) -> NDArray[np.float64]:
        """(n,) means over the orders; NaN where one is missing."""
        return self.orders.mean(axis=1)

    def first_rate(self) -> float | None:
        """How much the output that stood first was preferred, whoever's it was: 1/2 without a position bias."""
        if (both := self._in_both_orders()) is None:
            return None
        return float((both[:, 0] + 1 - both[:, 1]).mean() / 2)

    def consistency(self) -> float | None:
        """Share of comparisons in which both orders had the same winner, or both a tie."""
        if (both := self._in_both_orders()) is None:
            return None
        return float((np.sign(both[:, 0] - 0.5) == np.sign(both[:, 1] - 0.5)).mean())

    def _in_both_orders(self) -> NDArray[np.float64] | None:
        complete = self.orders[~np.isnan(self.orders).any(axis=1)]
        return complete if self.orders.shape[1] == 2 and len(complete) else None


# --- A Python function ---


def load_judge(name: str) -> Judge:
    """The function that ``module:function`` names; modules of the working directory are found, too.

    Raises:
        UserError: there is none.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"judge={name}: expected module:function, such as my_package.judges:prefer")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the command `cpt` does not have it there
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself needs
        raise UserError(f"judge={name}: there is no module {error.name}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise UserError(f"judge={name}: {module} has no {function}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"judge={name}: {function} is {type(found).__name__}, not a function")
    return found


def ask_function(judge: Judge, comparisons: Comparisons, both_orders: bool = False) -> Verdicts:
    """Call a judge for every comparison.

    Args:
        both_orders: call it with the outputs swapped, too.

    Raises:
        UserError: it returned neither a preference in [0, 1] nor "output_1", "output_2" or "tie".
    """
    orders = np.empty((len(comparisons), 1 + both_orders))
    rows = zip(comparisons.prompts, comparisons.outputs, comparisons.baseline_outputs)
    for i, (prompt, output, baseline) in enumerate(tqdm(rows, "Judging", len(comparisons), disable=None)):
        orders[i, 0] = _preference(judge(prompt, output, baseline), i)
        if both_orders:
            orders[i, 1] = 1 - _preference(judge(prompt, baseline, output), i)
    return Verdicts(orders)


def _preference(value: Any, number: int) -> float:
    found = value.item() if getattr(value, "ndim", None) == 0 else value  # of an array or a tensor
    if isinstance(found, str) and found in _WINNERS:
        return _WINNERS[found]
    if isinstance(found, Real) and 0 <= found <= 1:
        return float(found)
    raise UserError(
        f"the judge returned {value!r} for comparison {number}: expected a preference for output_1 between 0 and 1, or"
        f" one of {', '.join(map(repr, _WINNERS))}"
    )


# --- A model behind an endpoint ---


class JudgePrompt:
    """The text that a judging model is asked, from a jinja template of ``prompt``, ``output_1`` and ``output_2``.

    The reply's last line must hold one verdict: ``[[1]]``, ``[[2]]`` or ``[[tie]]``.

    Raises:
        UserError: no such file, no jinja, or other variables than these three.
    """

    def __init__(self, path: str | Path = TEMPLATE) -> None:
        environment = Environment(undefined=StrictUndefined)
        try:
            source = Path(path).expanduser().read_text(encoding="utf-8")
            variables = find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise UserError(f"judge_template={path} cannot be used: {error}") from error
        if variables != _VARIABLES:
            raise UserError(
                f"judge_template={path} has the variables {sorted(variables)}, expected {sorted(_VARIABLES)}"
            )

    def __call__(self, prompt: str, output_1: str, output_2: str) -> str:
        return self._template.render(prompt=prompt, output_1=output_1, output_2=output_2)

    @staticmethod
    def read(reply: str) -> float | None:
        """Preference for output 1, or None where the last line does not hold exactly one verdict."""
        lines = reply.strip().splitlines()
        found = _VERDICT.findall(lines[-1]) if lines else []
        return _PREFERENCES[found[0].lower()] if len(found) == 1 else None


def ask_endpoint(
    comparisons: Comparisons,
    options: EndpointOptions,
    sampling: Sampling,
    file: Path,
    prompt: JudgePrompt | None = None,
) -> Verdicts:
    """Ask a model about every comparison, in both orders.

    Replies are kept in a JSONL file as they come, each with the question: what was answered is never asked again,
    whether this run was killed or another one asks the same. A reply without a verdict stays there, and counts as a
    failure.

    Args:
        sampling: of the reply.
        file: rows of ``prompt, model, response``.

    Raises:
        UserError: the endpoint refuses, or ``file`` holds something else.
    """
    prompt = prompt or JudgePrompt()
    rows = list(zip(comparisons.prompts, comparisons.outputs, comparisons.baseline_outputs))
    different = [i for i, (_, output, baseline) in enumerate(rows) if output != baseline]
    questions = [
        [Prompt(prompt(text, first, second)) for first, second in ((output, baseline), (baseline, output))]
        for text, output, baseline in (rows[i] for i in different)
    ]
    requests = list({question.key: Request(question) for both in questions for question in both}.values())
    replies, failures = _collect_replies(requests, options, sampling, file)
    verdicts = {key: prompt.read(reply) for key, reply in replies.items()}
    orders = np.full((len(rows), 2), 0.5)
    for i, (forward, backward) in zip(different, questions):
        first, second = (verdicts.get(question.key) for question in (forward, backward))
        orders[i] = (np.nan if first is None else first, np.nan if second is None else 1 - second)
    if unread := sum(verdicts.get(request.prompt.key, 0.0) is None for request in requests):
        failures[NO_VERDICT] += unread
    return Verdicts(orders, dict(failures), len(rows) - len(different))


def _collect_replies(
    requests: Sequence[Request], options: EndpointOptions, sampling: Sampling, file: Path
) -> tuple[dict[str, str], Counter[str]]:
    """Key of a question -> the reply, once the endpoint was asked what the file lacks; and reason -> failures."""
    failures: Counter[str] = Counter()
    origin = {"extra_body": json.dumps(dict(options.extra_body), sort_keys=True)}
    with ResponseFile(file, options.model, sampling, origin) as replies:
        answered = {i for i, request in enumerate(requests) if (request.prompt.key, 0) in replies.answered}
        if len(answered) < len(requests):
            with tqdm(total=len(requests), initial=len(answered), desc="Judging", disable=None) as bar:

                def record(results: Sequence[tuple[int, Answer | Failure]]) -> None:
                    replies.add([(requests[i], result) for i, result in results if isinstance(result, Answer)])
                    failures.update(result.reason for _, result in results if isinstance(result, Failure))
                    bar.update(len(results))

                Endpoint(options, sampling).answer(requests, record, answered)
        return {prompt_of(row).key: row["response"] for row in replies.rows()}, failures
