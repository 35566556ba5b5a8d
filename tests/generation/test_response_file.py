"""Tests of generation/response_file.py: appending, truncated lines, the lock, and the check of settings."""

from __future__ import annotations

import json
import os

import pytest

from cpt_kernels.generation.prompts import Answer, Prompt, Request, Sampling
from cpt_kernels.generation.response_file import ResponseFile

SAMPLING = Sampling(temperature=0.7)


def request(number: int, sample: int = 0) -> Request:
    return Request(Prompt(f"prompt {number} – é"), sample)


def opened(path, model="m", sampling=SAMPLING, **origin) -> ResponseFile:
    return ResponseFile(path, model, sampling, origin)


def write(path, numbers, **options) -> None:
    with opened(path, **options) as file:
        for number in numbers:
            file.add([(request(number), Answer(f"response\n{number} – é", "stop", 3, 4))])


def test_rows(tmp_path):
    path = tmp_path / "new" / "responses.jsonl"
    asked = Request(Prompt([{"role": "user", "content": "hi"}], tools=[{"name": "f"}]), 2)
    with opened(path, weights="abc") as file:
        file.add([(asked, Answer("yes\ud83d", "length", 5, 6)), (request(1), Answer("", None))])
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {
        "prompt": [{"role": "user", "content": "hi"}],
        "tools": [{"name": "f"}],
        **{"model": "m", "response": "yes?", "sample": 2, "seed": asked.seed(SAMPLING), "finish_reason": "length"},
        **{"prompt_tokens": 5, "response_tokens": 6, "settings": first["settings"]},
    }
    assert first["settings"]["temperature"] == 0.7 and first["settings"]["weights"] == "abc"
    assert second["response"] == "" and "tools" not in second
    with opened(path, weights="abc") as file:
        assert file.answered == {(asked.prompt.key, 2), (request(1).prompt.key, 0)}
        assert [row["response"] for row in file.rows()] == ["yes?", ""]


def test_a_line_cut_off_anywhere_is_removed(tmp_path, caplog):
    path = tmp_path / "responses.jsonl"
    write(path, range(3))
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    ends = [*range(last, last + 14), *range(last + 14, len(whole) - 3, 17), *range(len(whole) - 3, len(whole) + 1)]
    for end in ends:
        for rest in (b"", b"\0" * 7):  # a power cut may leave zeros
            path.write_bytes(whole[:end] + (rest if end < len(whole) - 1 else b""))
            caplog.clear()
            with opened(path) as file:
                done = len(file.answered)
            if end >= len(whole) - 1:  # only the newline is missing
                assert path.read_bytes() == whole and done == 3 and not caplog.text
            elif end == last and not rest:
                assert path.read_bytes() == whole[:last] and done == 2 and not caplog.text
            else:
                assert path.read_bytes() == whole[:last] and done == 2 and "cut off" in caplog.text
    path.write_bytes(whole[:-5])
    write(path, [2])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"prompt": "a", "model": "m", "response": "b"}\nnotes\n', 2),
        (b'{"prompt": "a", "model": "m"}\n', 1),
        (b'[{"prompt": "a", "model": "m", "response": "b"}]', 1),
        (b'{"prompt": "a", "mod\n{"prompt": "a", "model": "m", "response": "b"}\n', 1),
        (b"a thesis without a line end", 1),
        (b'{"name": "a"', 1),
        (b'{"prompt": "a", "model": "m", "response": "\xff"}\n', 1),
    ],
)
def test_other_files_are_left_alone(tmp_path, content, line):
    path = tmp_path / "responses.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"line {line}: not a response"), opened(path):
        pass
    assert path.read_bytes() == content


def test_responses_from_elsewhere_count(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text(
        '\n{"prompt": "a", "model": "m", "response": "b"}\n\n{"prompt": "c", "model": "n", "response": "b"}'
    )
    with opened(path) as file:
        assert file.answered == {(Prompt("a").key, 0)}
        file.add([(request(1), Answer("x", "stop"))])
    assert len([json.loads(line) for line in path.read_text().splitlines() if line]) == 3


def test_text_and_its_one_user_turn_answer_each_other(tmp_path):
    """Files of earlier versions had two keys for them."""
    path = tmp_path / "responses.jsonl"
    prompts = ["a", [{"role": "user", "content": "b"}]]
    path.write_text("".join(json.dumps({"prompt": p, "model": "m", "response": "r"}) + "\n" for p in prompts))
    with opened(path) as file:
        for text in "ab":
            for prompt in (Prompt(text), Prompt([{"role": "user", "content": text}])):
                assert (prompt.key, 0) in file.answered
        assert len(file.answered) == 2


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "responses.jsonl"
    with opened(path) as file:
        with pytest.raises(ValueError, match="being written by another process"), opened(path):
            pass
        file.add([(request(1), Answer("x", "stop"))])
    with opened(path) as file:
        assert len(file.answered) == 1


def test_changed_settings_are_refused(tmp_path):
    path = tmp_path / "responses.jsonl"
    write(path, range(2), weights="abc")
    with pytest.raises(ValueError, match=r"temperature was 0\.7 and is 0\.5; top_k was 0 and is 3"):
        write(path, [3], sampling=Sampling(temperature=0.5, top_k=3), weights="abc")
    with pytest.raises(ValueError, match=r"weights was 'abc' and is 'def'.*--model_label"):
        write(path, [3], weights="def")
    before = path.read_bytes()
    write(path, [3], model="other", sampling=Sampling(temperature=0.5), weights="def")
    assert path.read_bytes().startswith(before)
    write(path, [3], extra_body="{}")  # a setting that the rows do not have


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "responses.jsonl"
    write(path, range(2))
    before = path.read_bytes()
    with opened(path) as file:

        class Full:
            """Accepts ten bytes, and then fails."""

            def __init__(self, inner):
                self.inner, self.written = inner, 0

            def __getattr__(self, name):
                return getattr(self.inner, name)

            def write(self, data):
                if self.written:
                    raise OSError(28, os.strerror(28))
                self.written = self.inner.write(data[:10])
                return self.written

        file._file = Full(file._file)
        with pytest.raises(ValueError, match="No space left"):
            file.add([(request(5), Answer("x", "stop"))])
        assert len(file.answered) == 2
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"), opened(tmp_path / "file" / "responses.jsonl"):
        pass
