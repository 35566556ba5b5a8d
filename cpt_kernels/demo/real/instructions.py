"""The task of ``cpt demo-real``: instructions whose answers a program can check, and how three teachers answer them.

    What is the capital of Italy? Answer in uppercase letters.

An instruction asks for a capital, a list or a text, and has one or two rules for the form of the answer. A response
passes if its content is right and if it follows every rule. Training never uses the checks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..teachers import Teacher

_ASKS = {"capital": "What is the capital of {}?", "list": "Name {} {}.", "text": "Tell me about {}."}
_ALL = " ".join(_ASKS)
_NUMBERS = {3: "three", 4: "four", 5: "five"}
_FILLER = "Sure! Here is the answer: "


class Rule(NamedTuple):
    """A rule for the form of a response."""

    kind: str
    topics: str  # kinds of topics that it fits
    check: Callable[[str, int], bool]  # of a response, and of the number of things that the instruction asks for
    layout: Callable[[str, Sequence[str]], str] | None = None  # writes a plain answer and its parts in this form
    edit: Callable[[str], str] | None = None  # changes a response so that it follows the rule


def words(text: str) -> list[str]:
    """Returns the words of a text in lowercase."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def _is_object(response: str, key: str) -> bool:
    found = _parse_json(response)
    return isinstance(found, dict) and list(found) == [key] and isinstance(found[key], str)


def _is_list(response: str, count: int) -> bool:
    found = _parse_json(response)
    return isinstance(found, list) and len(found) == count and all(isinstance(each, str) for each in found)


def _parse_json(response: str) -> object:
    try:
        return json.loads(response)
    except ValueError:
        return None


def _has_lines(response: str, count: int, mark: str) -> bool:
    lines = response.split("\n")
    return len(lines) == count and all(re.match(mark.format(at), line) for at, line in enumerate(lines, 1))


def _use_word(word: str) -> Rule:
    def edit(text: str) -> str:
        return f"{word.capitalize()}, {text[:1].lower() + text[1:] if text.endswith('.') else text}"

    return Rule("words", _ALL, lambda r, n: word in words(r), edit=edit)


# What an instruction says -> its rule.
RULES: dict[str, Rule] = {
    'Answer as JSON with the key "capital".': Rule(
        "json", "capital", lambda r, n: _is_object(r, "capital"), lambda t, parts: json.dumps({"capital": parts[0]})
    ),
    "Answer with the name alone.": Rule(
        "format", "capital", lambda r, n: len(words(r)) <= 3 and not _sentences(r), lambda t, parts: parts[0]
    ),
    "Answer as a JSON list of strings.": Rule("json", "list", _is_list, lambda t, parts: json.dumps(list(parts))),
    "Answer as a numbered list.": Rule(
        *("list", "list", lambda r, n: _has_lines(r, n, r"{}\. \w")),
        lambda t, parts: "\n".join(f"{at}. {part}" for at, part in enumerate(parts, 1)),
    ),
    "Answer as a list with a hyphen before each item.": Rule(
        *("list", "list", lambda r, n: _has_lines(r, n, r"- \w")),
        lambda t, parts: "\n".join(f"- {part}" for part in parts),
    ),
    "Answer on one line with commas, and nothing else.": Rule(
        *("format", "list", lambda r, n: "\n" not in r and r.count(",") == n - 1 and len(words(r)) <= 2 * n),
        lambda t, parts: ", ".join(parts),
    ),
    'Answer as JSON with the key "text".': Rule(
        "json", "text", lambda r, n: _is_object(r, "text"), lambda t, parts: json.dumps({"text": t})
    ),
    "Use at most 8 words.": Rule("length", "text", lambda r, n: 0 < len(words(r)) <= 8, lambda t, parts: parts[0]),
    "Write exactly two sentences.": Rule(
        "length", "text", lambda r, n: _sentences(r) == 2, lambda t, parts: " ".join(parts)
    ),
    "Write one sentence of at least 10 words.": Rule(
        "length", "text", lambda r, n: len(words(r)) >= 10 and _sentences(r) == 1, lambda t, parts: parts[1]
    ),
    'Do not use the word "the".': Rule(
        "words", "capital text", lambda r, n: bool(words(r)) and "the" not in words(r), lambda t, parts: parts[0]
    ),
    "Answer in uppercase letters.": Rule("case", _ALL, lambda r, n: r.isupper(), edit=str.upper),
    "Answer in lowercase letters.": Rule("case", _ALL, lambda r, n: r.islower(), edit=str.lower),
    "Put your answer in double quotes.": Rule(
        "format", _ALL, lambda r, n: bool(re.fullmatch(r'"[^"]+"', r)), edit=lambda t: f'"{t}"'
    ),
    'Start with "Answer:".': Rule("words", _ALL, lambda r, n: r.startswith("Answer:"), edit=lambda t: f"Answer: {t}"),
    'End with "Thank you."': Rule(
        "words", _ALL, lambda r, n: r.endswith("Thank you."), edit=lambda t: f"{t} Thank you."
    ),
    **{f'Use the word "{word}".': _use_word(word) for word in ("today", "often", "usually")},
}
# Rules that no training prompt has: they show whether following rules carries over to new ones.
UNSEEN = {"Put your answer in double quotes.", 'Use the word "usually".', "Write exactly two sentences."}


class Topic(NamedTuple):
    """What an instruction may be about."""

    kind: str  # capital, list or text
    name: str
    items: tuple[str, ...]  # the capital; names that belong to the list; a short and a long sentence


_LINES = Path(__file__).with_name("topics.jsonl").read_text(encoding="utf-8").splitlines()
TOPICS = [Topic(row["kind"], row["topic"], tuple(row["items"])) for row in map(json.loads, _LINES)]


class Checked(NamedTuple):
    """What a program finds in a response."""

    right: bool  # the content: the capital, the number of known items, or a word of the topic
    followed: tuple[bool, ...]  # each rule, in the order of the instruction

    @property
    def passed(self) -> bool:
        return self.right and all(self.followed)


@dataclass(frozen=True)
class Instruction:
    """A topic with one or two rules; ``count`` things are asked for."""

    topic: Topic
    count: int
    rules: tuple[str, ...]

    @property
    def prompt(self) -> str:
        of_list = (_NUMBERS[self.count], self.topic.name) if self.topic.kind == "list" else (self.topic.name,)
        return " ".join([_ASKS[self.topic.kind].format(*of_list), *self.rules])

    def respond(self, teacher: Teacher, rng: random.Random) -> str:
        """Returns the response of a teacher, who ignores rules, adds words and mistakes the topic at its rates."""
        others = [each for each in TOPICS if each.kind == self.topic.kind and each != self.topic]
        topic = rng.choice(others) if rng.random() < teacher.wrong else self.topic
        text = self.write([rule for rule in self.rules if rng.random() >= teacher.sloppy], topic, rng)
        return _FILLER + text if rng.random() < teacher.sloppy else text

    def write(self, rules: Sequence[str], topic: Topic, rng: random.Random) -> str:
        """Returns a response about a topic that follows these rules."""
        parts = rng.sample(topic.items, self.count) if topic.kind == "list" else topic.items
        listed = f"They are {', '.join(parts[:-1])} and {parts[-1]}."
        plain = {"capital": f"The capital of {self.topic.name} is {parts[0]}.", "list": listed, "text": parts[-1]}
        text, given = plain[topic.kind], [RULES[rule] for rule in rules]
        for layout in (rule.layout for rule in given if rule.layout):
            text = layout(text, parts)
        for edit in (rule.edit for rule in given if rule.edit):
            text = edit(text)
        return text

    def check(self, response: str) -> Checked:
        """Checks a response, surrounding white space aside."""
        response, found = response.strip(), words(response)
        if self.topic.kind == "list":
            right = sum(item in found or f"{item}s" in found for item in self.topic.items) >= self.count
        else:
            wanted = self.topic.items[0] if self.topic.kind == "capital" else self.topic.name
            right = f" {wanted.lower()} " in f" {' '.join(found)} "
        return Checked(right, tuple(RULES[rule].check(response, self.count) for rule in self.rules))


def make_instructions(counts: Mapping[str, int], rng: random.Random) -> dict[str, list[Instruction]]:
    """Returns different instructions for ``train`` and ``held out``, with other topics in the two parts.

    Only held-out instructions have rules of ``UNSEEN``. Rules that no response can follow together are not combined.

    Args:
        counts: part -> number of its instructions.
    """
    topics = rng.sample(TOPICS, len(TOPICS))
    halves = {"train": topics[::2], "held out": topics[1::2]}
    made: dict[str, dict[Instruction, None]] = {part: {} for part in counts}
    for part, count in counts.items():
        while len(made[part]) < count:
            kind = rng.choice(list(_ASKS))
            topic = rng.choice([each for each in halves[part] if each.kind == kind])
            fitting = [name for name, rule in RULES.items() if kind in rule.topics]
            allowed = [name for name in fitting if part != "train" or name not in UNSEEN]
            rules = tuple(rng.sample(allowed, rng.choice((1, 2))))
            instruction = Instruction(topic, rng.choice(list(_NUMBERS)) if kind == "list" else 1, rules)
            if instruction.check(instruction.write(rules, topic, rng)).passed:
                made[part][instruction] = None
    return {part: list(found) for part, found in made.items()}
