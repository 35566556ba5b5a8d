"""Judges that compare two outputs: a Python function, or a model behind an OpenAI-compatible endpoint.

A judge sees ``output_1`` and ``output_2`` and returns its preference for the first: 1 if the first is better, 0 if the
second is better, 1/2 for a tie, or any value between. If a judge is asked in both orders, a bias towards the output in
the first position cancels out.
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

from ..errors import UserError, describe_failure
from ..generation.endpoint import Endpoint, EndpointOptions
from ..generation.prompts import Answer, Failure, Prompt, Request, Sampling
from ..generation.response_file import ResponseFile, prompt_of
from .outputs import Comparisons

Judge = Callable[[str, str, str], "float | str"]  # (prompt, output_1, output_2) -> preference, or one of _WINNERS

TEMPLATE = Path(__file__).with_name("judge.jinja")
NO_VERDICT = "no verdict in the reply"  # a reason in `Verdicts.failures`
_WINNERS = {"output_1": 1.0, "output_2": 0.0, "tie": 0.5}
_VARIABLES = {"prompt", "output_1", "output_2"}
_VERDICT = re.compile(r"\[\[(1|2|tie)\]\]", re.IGNORECASE)
_PREFERENCES = {"1": 1.0, "2": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Verdicts:
    """Preferences for a model's output over the baseline's, for n comparisons."""

    # (n, 1) or (n, 2) preference in each order that was asked. In column 0 the model's output stands first, in
    # column 1 second. NaN means that there is no verdict.
    orders: NDArray[np.float64]
    # reason -> number of verdicts that are missing for this reason
    failures: Mapping[str, int] = field(default_factory=dict)
    identical: int = 0  # number of comparisons of equal outputs. They count as ties, and no judge is asked.

    @property
    def preferences(self) -> NDArray[np.float64]:
        """(n,) mean over the orders; NaN if the verdict in one order is missing."""
        return self.orders.mean(axis=1)

    def first_rate(self) -> float | None:
        """Returns the mean preference for the output in the first position: 1/2 means no position bias.

        None if no comparison has verdicts in both orders.
        """
        if (both := self._in_both_orders()) is None:
            return None
        return float((both[:, 0] + 1 - both[:, 1]).mean() / 2)

    def consistency(self) -> float | None:
        """Returns the share of comparisons with the same verdict in both orders, or None if there are none."""
        if (both := self._in_both_orders()) is None:
            return None
        return float((np.sign(both[:, 0] - 0.5) == np.sign(both[:, 1] - 0.5)).mean())

    def _in_both_orders(self) -> NDArray[np.float64] | None:
        complete = self.orders[~np.isnan(self.orders).any(axis=1)]
        return complete if self.orders.shape[1] == 2 and len(complete) else None


# --- A Python function ---


def load_judge(name: str) -> Judge:
    """Imports the function that ``module:function`` names, also from the working directory.

    Raises:
        UserError: the module or the function does not exist.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"judge={name}: expected module:function, for example my_package.judges:prefer")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the console script `cpt` does not add the working directory
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            # the module exists, but one of its own imports is missing
            raise UserError(f"judge={name}: {module} cannot be imported: {describe_failure(error)}") from error
        raise UserError(f"judge={name}: the module {error.name} does not exist") from error
    except Exception as error:
        raise UserError(f"judge={name}: {module} cannot be imported: {describe_failure(error)}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise UserError(f"judge={name}: the module {module} has no {function}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"judge={name}: {function} is of type {type(found).__name__}, not a function")
    return found


def ask_function(judge: Judge, comparisons: Comparisons, both_orders: bool = False) -> Verdicts:
    """Calls a judge for every comparison.

    Args:
        both_orders: call the judge a second time with the outputs swapped.

    Raises:
        UserError: the judge raised an exception, or returned neither a preference in [0, 1] nor "output_1", "output_2"
            or "tie".
    """
    orders = np.empty((len(comparisons), 1 + both_orders))
    rows = zip(comparisons.prompts, comparisons.outputs, comparisons.baseline_outputs)
    for i, (prompt, output, baseline) in enumerate(tqdm(rows, "Judging", len(comparisons), disable=None)):
        orders[i, 0] = _ask(judge, prompt, output, baseline, comparison=i)
        if both_orders:
            orders[i, 1] = 1 - _ask(judge, prompt, baseline, output, comparison=i)
    return Verdicts(orders)


def _ask(judge: Judge, *texts: str, comparison: int) -> float:
    try:
        value = judge(*texts)
    except Exception as error:
        raise UserError(f"the judge failed at comparison {comparison}: {describe_failure(error)}") from error
    return _as_preference(value, comparison)


def _as_preference(value: Any, comparison: int) -> float:
    found = value.item() if getattr(value, "ndim", None) == 0 else value  # an array or a tensor of one value
    if isinstance(found, str) and found in _WINNERS:
        return _WINNERS[found]
    if isinstance(found, Real) and 0 <= found <= 1:
        return float(found)
    raise UserError(
        f"the judge returned {value!r} for comparison {comparison}: expected a preference for output_1 between 0"
        f" and 1, or one of {', '.join(map(repr, _WINNERS))}"
    )


# --- A model behind an endpoint ---


class JudgePrompt:
    """Writes the question for a judging model, from a jinja template of ``prompt``, ``output_1`` and ``output_2``.

    The last line of the reply must hold one verdict: ``[[1]]``, ``[[2]]`` or ``[[tie]]``.

    Raises:
        UserError: the file cannot be read, is not a jinja template, or does not use exactly these three variables.
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
                f"judge_template={path} uses the variables {sorted(variables)}, expected {sorted(_VARIABLES)}"
            )

    def __call__(self, prompt: str, output_1: str, output_2: str) -> str:
        return self._template.render(prompt=prompt, output_1=output_1, output_2=output_2)

    @staticmethod
    def read(reply: str) -> float | None:
        """Returns the preference for output 1, or None if the last line does not hold exactly one verdict."""
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
    """Asks a model about every comparison, in both orders.

    Every reply is appended with its question to a JSONL file as soon as it arrives. A question whose reply is in the
    file is not asked again, neither after a killed run nor by another evaluation. A reply without a verdict stays in
    the file and counts as a failure.

    Args:
        sampling: how replies are sampled.
        file: the JSONL file, with rows of ``prompt, model, response``.
        prompt: writes the questions; default the template that comes with the package.

    Raises:
        UserError: the endpoint refuses the requests, or ``file`` holds something other than such replies.
    """
    prompt = prompt or JudgePrompt()

    # The questions, two for each comparison of different outputs. Equal questions are asked once.
    rows = list(zip(comparisons.prompts, comparisons.outputs, comparisons.baseline_outputs))
    different = [i for i, (_, output, baseline) in enumerate(rows) if output != baseline]
    questions = [
        [Prompt(prompt(text, first, second)) for first, second in ((output, baseline), (baseline, output))]
        for text, output, baseline in (rows[i] for i in different)
    ]
    requests = list({question.key: Request(question) for both in questions for question in both}.values())
    replies, failures = _collect_replies(requests, options, sampling, file)

    # The verdicts: 1/2 for equal outputs, NaN for a missing verdict, else the preference for the model's output.
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
    """Asks the endpoint for the replies that the file lacks.

    Returns:
        The reply to each question by the question's key, and the number of failures by reason.
    """
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
