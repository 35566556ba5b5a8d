"""Tests ``cpt pairs``: input files, output files, printed lines and errors."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpt_kernels import cli
from cpt_kernels.cli.pairs import main
from cpt_kernels.data.sources import load_data
from tests.helpers import ROOT
from tests.helpers.command import bpe_tokenizer, write_rows
from tests.helpers.rows import assistant, make_tokenizer, prepared, real_rows, user

MODELS = ["gpt4", "chatgpt", "td003"]
ORDER = "gpt4 > chatgpt > td003"
REAL_ORDER = ["gpt4", "gpt-3.5-turbo-0301", "text_davinci_003", "text_davinci_001"]
PAIR_COLUMNS = ["prompt", "chosen", "rejected", "chosen_model", "rejected_model", "gap"]


def long_rows(prompts=40):
    """Returns responses of three models; for every fifth prompt those of the weaker two are equal."""
    return [
        {"prompt": f"prompt {p}", "model": model, "response": f"{'same' if p % 5 == 0 and m else model} answer to {p}"}
        for p in range(prompts)
        for m, model in enumerate(MODELS)
    ]


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Replaces drawing, which takes most of the time, except in the test that checks the pictures."""
    if "test_one_file" not in request.node.name:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.write_bytes(b""))


@pytest.fixture
def source(tmp_path) -> Path:
    return write_rows(tmp_path / "responses.jsonl", long_rows())


def build(*argv) -> list[dict]:
    """Runs the command and returns the rows that it writes."""
    main([str(arg) for arg in argv])
    return read(Path(argv[list(argv).index("--output") + 1]))


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report_of(output: Path) -> dict:
    return json.loads(output.with_suffix(".report.json").read_text(encoding="utf-8"))


def count(rows) -> Counter:
    return Counter(tuple(row[name] for name in PAIR_COLUMNS) for row in rows)


# --- Forms of input and output ---


def expected(order=MODELS, gaps=None):
    answers = defaultdict(dict)
    for row in long_rows():
        answers[row["prompt"]][row["model"]] = row["response"]
    gap = lambda x, y: order.index(y) - order.index(x) if gaps is None else gaps[x] - gaps[y]  # noqa: E731
    return Counter(
        (prompt, given[x], given[y], x, y, gap(x, y))
        for prompt, given in answers.items()
        for x, y in itertools.combinations(order, 2)
        if given[x] != given[y]
    )


@pytest.mark.parametrize("output", ["pairs.jsonl", "pairs.parquet"])
def test_one_file(source, tmp_path, output, capsys):
    rows = build(source, "--order", ORDER, "--output", tmp_path / output)
    assert count(rows) == expected() and list(rows[0]) == PAIR_COLUMNS
    out = capsys.readouterr().out
    assert "written as text: training uses the text as it is; for a chat model" in out
    assert "120 of 120 responses are in pairs" in out and f"written: {tmp_path / output}" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        *("responses.jsonl", output, "pairs.report.json", "pairs.report.png", "pairs.report.svg")
    }
    assert (tmp_path / "pairs.report.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "pairs.report.svg").read_text()
    assert load_data(tmp_path / output).column_names == PAIR_COLUMNS


def test_files_of_each_model_in_any_form(tmp_path):
    """Responses are joined by the text of their prompts, in files with different orders of rows."""
    by_model = {model: [row for row in long_rows() if row["model"] == model] for model in MODELS}
    write_rows(tmp_path / "a.jsonl", by_model["gpt4"])
    chats = [{**r, "prompt": user(r["prompt"]), "response": assistant(r["response"])} for r in by_model["chatgpt"]]
    pq.write_table(pa.Table.from_pylist(chats[::-1]), tmp_path / "b.parquet")
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("question", "td003"), *((row["prompt"], row["response"]) for row in by_model["td003"][::3])])
    files = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.csv")]
    output = tmp_path / "out" / "pairs.jsonl"
    rows = build(*files, "--order", ORDER, "--columns", "question=prompt", "--output", output)
    asked = {prompt_row["prompt"] for prompt_row in by_model["td003"][::3]}
    wanted = {k: v for k, v in expected().items() if k[4] != "td003" or k[0] in asked}
    assert {tuple(message["content"] for message in row["chosen"]) for row in rows} == {(k[1],) for k in wanted}
    plain = [{**row, **{n: row[n][-1]["content"] for n in ("prompt", "chosen", "rejected")}} for row in rows]
    assert count(plain) == wanted and rows[0]["prompt"] == user("prompt 0")


def test_wide_rows(tmp_path):
    answers = defaultdict(dict)
    for row in long_rows():
        answers[row["prompt"]][row["model"]] = row["response"]
    source = write_rows(tmp_path / "wide.jsonl", [{"prompt": p, **given, "id": "x"} for p, given in answers.items()])
    assert count(build(source, "--order", ORDER, "--output", tmp_path / "pairs.jsonl")) == expected()


def test_ultrafeedback(tmp_path):
    completions = [
        {"model": m, "response": m * 2, "overall_score": s, "annotations": {"honesty": {"Rating": a}}}
        for m, s, a in (("x", 7.5, "2"), ("y", 3.0, "5"), ("z", 7.5, "N/A"))
    ]
    source = write_rows(tmp_path / "uf.jsonl", [{"instruction": "p", "models": ["x"], "completions": completions}])
    rows = build(source, "--ratings", "overall_score", "--output", tmp_path / "pairs.jsonl")
    assert [(r["chosen"], r["rejected_model"], r["gap"]) for r in rows] == [("xx", "y", 4.5), ("zz", "y", 4.5)]
    assert report_of(tmp_path / "pairs.jsonl")["pairs"]["tied"] == 1
    rows = build(source, "--ratings", "annotations", "--output", tmp_path / "pairs.jsonl")
    assert [(r["chosen"], r["rejected"], r["gap"]) for r in rows] == [("yy", "xx", 3.0)]
    assert report_of(tmp_path / "pairs.jsonl")["responses"]["dropped"]["no rating"]["first"] == ["z: row 0"]
    rows = build(source, "--order", "x > z", "--output", tmp_path / "pairs.jsonl")
    assert [(r["chosen"], r["rejected"], r["gap"]) for r in rows] == [("xx", "zz", 1.0)]


def test_win_rates(source, tmp_path):
    table = tmp_path / "leaderboard.csv"
    table.write_text(
        ",win_rate,avg_length,length_controlled_winrate\ngpt4,95.3,1365,\nother,1,2,3\nchatgpt,89.4,827,50\ntd003,50.0,307,40\n"
    )
    options = ("--win_rates", table, "--output", tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="no win rate of gpt4: choose another column with --win_rate_column"):
        build(source, *options)
    rows = build(source, *options, "--win_rate_column", "win_rate")
    assert count(rows) == expected(gaps={"gpt4": 95.3, "chatgpt": 89.4, "td003": 50.0})
    assert report_of(tmp_path / "pairs.jsonl")["gap"] == "difference in win_rate"
    table.write_text("model_name,win_rate\ngpt4,95.3\n")
    with pytest.raises(ValueError, match="win rates of gpt4 of the models gpt4, chatgpt, td003, but two are needed"):
        build(source, *options)
    for content, message in (
        ("who,win_rate\nx,1\n", "no column that names the models"),
        ("model,rate\nx,1\n", "no column length_controlled_winrate or win_rate"),
        ("model,win_rate\ngpt4,1\ngpt4,2\n", "row 1: the model gpt4 occurs twice"),
        ("model,win_rate\ngpt4,high\n", "row 0: win_rate of gpt4 is 'high'; expected a number"),
    ):
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            build(source, *options)


@pytest.mark.parametrize(
    ("options", "models"),
    [
        (("--pairs", "adjacent"), {("gpt4", "chatgpt"), ("chatgpt", "td003")}),
        (("--pairs", "gpt4>td003"), {("gpt4", "td003")}),
        (("--base", "td003"), {("gpt4", "td003"), ("chatgpt", "td003")}),
    ],
)
def test_which_pairs(source, tmp_path, options, models):
    rows = build(source, "--order", ORDER, *options, "--output", tmp_path / "pairs.jsonl")
    assert count(rows) == {key: number for key, number in expected().items() if key[3:5] in models}


def test_grouped_rows_train_as_the_pairs_do(tmp_path):
    """Grouped rows give the same pairs of tokens, with each response tokenized once."""
    rows = long_rows()
    source = write_rows(tmp_path / "responses.jsonl", rows)
    options = ("--order", ORDER, "--pairs", "gpt4 > td003, chatgpt > td003")
    flat = build(source, *options, "--output", tmp_path / "pairs.jsonl")
    for name in ("grouped.jsonl", "grouped.parquet"):
        grouped = build(source, *options, "--grouped", "--output", tmp_path / name)
        assert len(grouped) == 40 and grouped[1]["scores"] == [2, 1, 0] and grouped[1]["models"] == MODELS
        assert grouped[1]["pairs"] == [[0, 2], [1, 2]] and grouped[0]["pairs"] == [[0, 1]]
        tokenizer = make_tokenizer()
        results = []
        for given in (flat, load_data(tmp_path / name).to_list()):
            kept, report = prepared(given, tokenizer)
            results.append(Counter())
            for row in kept:
                sides = zip(row["chosen"], row["rejected"])
                texts = [tokenizer.decode(ids) for ids in row["completion_ids"]]
                results[-1].update((tokenizer.decode(row["prompt_ids"]), texts[i], texts[j]) for i, j in sides)
            assert report.pairs == len(flat)
        assert results[0] == results[1]


def test_conversational(source, tmp_path, capsys):
    rows = build(source, "--order", ORDER, "--conversational", "--output", tmp_path / "pairs.parquet")
    assert rows[0]["prompt"] == user("prompt 0") and rows[0]["chosen"] == assistant("gpt4 answer to 0")
    assert "written as messages: training applies the chat template" in capsys.readouterr().out
    rows = build(source, "--order", ORDER, "--conversational", "--grouped", "--output", tmp_path / "groups.parquet")
    assert rows[1]["completions"] == [assistant(f"{model} answer to 1") for model in MODELS]
    kept, _ = prepared(load_data(tmp_path / "groups.parquet").to_list(), make_tokenizer())
    assert len(kept) == 40


def test_validation(source, tmp_path):
    output = tmp_path / "pairs.jsonl"
    for extra in ((), ("--grouped",)):
        train = build(source, "--order", ORDER, "--validation", 0.2, *extra, "--output", output)
        held = read(tmp_path / "pairs.validation.jsonl")
        prompts = [f"prompt {p}" for p in range(40)]
        out = {row["prompt"] for row in held}
        assert {row["prompt"] for row in train} == set(prompts) - out
        if not extra:
            assert abs(len(held) - 0.2 * len(train + held)) <= 3  # half of the pairs of one prompt
    assert report_of(output)["prompts"] == {"in": 40, "in_pairs": 40, "validation": len(out)}
    build(source, "--order", ORDER, "--validation", 0.0001, "--output", output)
    assert report_of(output)["prompts"]["validation"] == 1


def test_lengths(source, tmp_path):
    bpe_tokenizer(row["response"] for row in long_rows()).save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "pairs.jsonl"
    rows = build(source, "--order", ORDER, "--max_characters", 26, "--output", output)
    long = [r for r in long_rows() if len(r["prompt"] + r["response"]) > 26]
    assert 0 < len(long) < 60 and report_of(output)["responses"]["dropped"]["too long"]["count"] == len(long)
    assert not {r["response"] for r in long} & {text for row in rows for text in (row["chosen"], row["rejected"])}
    options = ("--tokenizer", tmp_path / "tokenizer", "--max_tokens", 1000, "--output", output)
    build(source, "--order", ORDER, *options)
    report = report_of(output)
    assert report["unit"] == "tokens" and 1 < report["pairs"]["chosen_length"] < 10
    with pytest.raises(ValueError, match=r"no response of .* can be used: 40 too long"):
        build(source, "--order", ORDER, "--max_characters", 5, "--output", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


# --- Real data ---


def test_real_responses(tmp_path):
    given = real_rows("responses.jsonl")
    source = write_rows(tmp_path / "responses.jsonl", given)
    options = ("--order", " > ".join(REAL_ORDER), "--validation", 0.1, "--output", tmp_path / "pairs.jsonl")
    rows = [*build(source, *options), *read(tmp_path / "pairs.validation.jsonl")]
    answers = defaultdict(dict)
    for row in given:
        answers[row["prompt"]][row["model"]] = row["response"]
    pairs, identical = Counter(), Counter()
    for prompt, texts in answers.items():
        for better, worse in itertools.combinations(REAL_ORDER, 2):
            if texts[better] == texts[worse]:
                identical[better, worse] += 1
            else:
                gap = REAL_ORDER.index(worse) - REAL_ORDER.index(better)
                pairs[prompt, texts[better], texts[worse], better, worse, gap] += 1
    assert count(rows) == pairs and pairs.total() == 1747
    report = report_of(tmp_path / "pairs.jsonl")
    assert {(e["chosen"], e["rejected"]): e["identical"] for e in report["by_models"]} == identical
    assert sorted(identical.values()) == [2, 3, 4, 9, 10, 25]
    assert {(e["chosen"], e["rejected"]): e["pairs"] for e in report["by_models"]} == Counter(
        k[3:5] for k in pairs.elements()
    )
    responses = report["responses"]
    assert responses["in"] == 1200 == responses["kept"] + sum(drop["count"] for drop in responses["dropped"].values())


def test_nasty_rows(tmp_path):
    """Every row is in a pair or is counted as dropped."""
    rows = [item["row"] for item in real_rows("nasty.jsonl")]
    source = write_rows(tmp_path / "nasty.jsonl", [*rows, {"prompt": rows[0]["prompt"], "model": "x", "response": "y"}])
    order = ("--order", f"{rows[0]['model']} > x")
    (row,) = build(source, *order, "--output", tmp_path / "pairs.parquet")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (rows[0]["prompt"], rows[0]["response"], "y")
    responses = report_of(tmp_path / "pairs.parquet")["responses"]
    assert responses["in"] == sum(2 if "chosen" in row else 1 for row in rows) + 1
    assert responses["in"] == responses["kept"] + sum(drop["count"] for drop in responses["dropped"].values())
    # Each text is paired with a plain response, and no character of it changes.
    texts = [row[key] for row in rows for key in ("chosen", "response") if row.get(key, "").strip()]
    lines = [
        {"prompt": f"{i} {row['prompt']}", "a": text, "b": "plain"} for i, (row, text) in enumerate(zip(rows, texts))
    ]
    source = write_rows(tmp_path / "texts.jsonl", lines)
    for name in ("texts.out.jsonl", "texts.out.parquet"):
        pairs = build(source, "--order", "a > b", "--output", tmp_path / name)
        assert [(row["prompt"], row["chosen"]) for row in pairs] == [(line["prompt"], line["a"]) for line in lines]


def test_help_imports_no_data_library():
    code = (
        "import sys; from cpt_kernels import cli; cli.main(['pairs', '--help']);"
        "assert not {'torch', 'datasets', 'pyarrow', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60)


# --- Errors of users ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--order", "gpt4 > gtp3"), "the order names the model gtp3, but there are gpt4, chatgpt, td003"),
        (("--order", "gpt4 > chatgtp"), "did you mean chatgpt?"),
        (("--order", "gpt4 > td003 > gpt4"), "has a cycle: gpt4 > td003 > gpt4"),
        ((), "say once which responses are better: give one of --order"),
        (("--order", ORDER, "--ratings", "score"), "say once which responses are better"),
        (("--ratings", "score"), "there is no rating `score` of responses; the columns are `prompt`, `model`"),
        (("--order", ORDER, "--pairs", "best"), "best is not a pair of two models"),
        (("--order", ORDER, "--pairs", "td003>gpt4"), "but td003 is weaker in the order"),
        (("--order", ORDER, "--base", "gpt5"), "the choice of pairs names the model gpt5"),
        (("--order", ORDER, "--validation", "1"), "--validation 1.0: expected a share of the pairs"),
        (("--order", ORDER, "--max_tokens", "9"), "--max_tokens needs --tokenizer"),
        (("--order", ORDER, "--win_rate_column", "x"), "--win_rate_column needs --win_rates"),
        (("--order", ORDER, "--base", "td003", "--pairs", "all"), "--base and --pairs both choose the pairs"),
        (("--order", ORDER, "--max_characters", "0"), "--max_characters 0: expected at least 1"),
        (("--order", ORDER, "--tokenizer", "/no/such"), "tokenizer=/no/such: there is no such folder"),
        (("--order", ORDER, "--columns", "response"), "'response' is not OLD=NEW"),
        (("--order", ORDER, "--columns", "model=prompt"), "has a column `prompt` already"),
        (("--order", ORDER, "--columns", "modle=model"), "columns names `modle`, which no source has; "),
        (("--order", ORDER, "--ordr", "x"), "unknown option --ordr; did you mean --order?"),
        (("--win_rates", "no.csv"), "no.csv does not exist"),
        (("--order", ORDER, "--steps", "--grouped"), "--steps writes a row for each pair, and --grouped one for each"),
        (("--order", ORDER, "--steps"), "no two answers to a prompt have a first step in common"),
    ],
)
def test_mistakes_are_one_line_errors(source, tmp_path, capsys, options, message):
    code = cli.main(["pairs", str(source), *options, "--output", str(tmp_path / "pairs.jsonl")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt pairs: ")]
    assert code == 2 and len(said) == 1 and message in said[0]
    assert not list(tmp_path.glob("*pairs.*")), "a failed command left a file"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], ("--order", ORDER), "is an empty file"),
        (
            [{"text": "p", "model": "gpt4", "response": "x"}],
            ("--order", ORDER),
            "no column `prompt` or `instruction`",
        ),
        ([{"prompt": "p", "answer": "x"}], ("--order", ORDER), "columns for the models gpt4, chatgpt, td003"),
        (
            [{"prompt": str(i), "model": model, "response": "x"} for i, model in enumerate(MODELS)],
            ("--order", ORDER),
            "no prompt has two responses to compare: gpt4 answers 1, chatgpt answers 1, td003 answers 1 prompts",
        ),
        (
            [{"prompt": "p", "model": m, "response": "" if m == "td003" else "x" + m} for m in MODELS],
            ("--order", ORDER),
            "no response of td003 can be used: 1 empty response",
        ),
        (
            [{"prompt": "p", "response": "x", "score": s} for s in ("1", "2", "good")],
            ("--ratings", "score"),
            "data.jsonl row 2: the rating of `response` is 'good'; expected a number",
        ),
        (
            [{"prompt": "p", "model": m, "response": "same"} for m in MODELS],
            ("--order", ORDER),
            "no pair can be built of 3 responses: 3 no pair left; 3 pairs are identical, 0 tied",
        ),
    ],
)
def test_data_without_pairs(tmp_path, capsys, rows, options, message):
    source = write_rows(tmp_path / "data.jsonl", rows)
    code = cli.main(["pairs", str(source), *options, "--output", str(tmp_path / "pairs.jsonl")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt pairs: ")]
    assert code == 2 and len(said) == 1 and message in said[0]


def test_invalid_outputs(source, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "pairs.report.png").mkdir()
    for output, message in (
        (tmp_path / "pairs.csv", r"must end in .jsonl or .parquet"),
        (tmp_path / "folder.jsonl", "folder.jsonl is a folder"),
        (tmp_path / "pairs.jsonl", "pairs.report.png is a folder"),
        (source, "would replace a file that is read: .*responses.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(source), "--order", ORDER, "--output", str(output)])


@pytest.mark.parametrize("name", ["x.jsonl", "x.validation.jsonl", "x.report.json"])
def test_no_output_replaces_what_is_read(source, tmp_path, name):
    """Including files in a folder that is read."""
    (tmp_path / "data").mkdir()
    file = write_rows(tmp_path / "data" / name, long_rows())
    before, order = file.read_bytes(), ("--order", ORDER)
    for given in ((file, *order), (file.parent, *order), (source, "--win_rates", file)):
        with pytest.raises(ValueError, match=f"would replace a file that is read: .*{name}; choose another name"):
            build(*given, "--validation", 0.2, "--output", file.with_name("x.jsonl"))
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_prompts_that_an_earlier_run_held_out(source, tmp_path):
    output = tmp_path / "pairs.jsonl"
    build(source, "--order", ORDER, "--validation", 0.2, "--output", output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"pairs.validation.jsonl is left from an earlier run"):
        build(source, "--order", ORDER, "--output", output)
    assert output.read_bytes() == before


@pytest.mark.parametrize("output", ["pairs.jsonl", "pairs.parquet"])
def test_chosen_responses_for_sft(source, tmp_path, output):
    """Each chosen response is written once, and none of a prompt that is held out."""
    path = tmp_path / output
    options = ("--order", ORDER, "--validation", "0.25", "--sft", "--output")
    pairs, sft = build(source, *options, path), read(path.with_suffix(f".sft{path.suffix}"))
    assert {(row["prompt"], row["chosen"]) for row in pairs} == {(row["prompt"], row["completion"]) for row in sft}
    assert len(sft) < len(pairs) and len({(row["prompt"], row["completion"]) for row in sft}) == len(sft)
    assert set(sft[0]) == {"prompt", "completion", "model"}
    build(source, *options[:2], "--sft", "--conversational", "--grouped", "--output", tmp_path / f"chat_{output}")
    assert read(tmp_path / f"chat_pairs.sft{path.suffix}")[0]["completion"][0]["role"] == "assistant"


@pytest.mark.parametrize("options", [(), ("--conversational",)])
def test_steps(tmp_path, options):
    """Every answer of the better model meets the answer of the other that shares its longest beginning, in lines."""
    better, worse = ["a\nb\nc", "d\ne", "x\ny"], ["a\nz", "a\nb\nz\nw", "d\ne\nf", "q"]
    answers = [*(("gpt4", text) for text in better), *(("td003", text) for text in worse)]
    rows = [{"prompt": "p", "model": model, "response": text} for model, text in answers]
    source = write_rows(tmp_path / "answers.jsonl", rows)
    (row,) = build(source, "--order", "gpt4 > td003", "--steps", "--output", tmp_path / "steps.jsonl", *options)
    steps = {
        "initial_steps": "a\nb\n",
        "chosen_step": "c",
        "chosen_rest": "",
        "rejected_step": "z\n",
        "rejected_rest": "w",
    }
    prompt = [{"role": "user", "content": "p"}] if options else "p"
    assert row == {"prompt": prompt, **steps, "chosen_model": "gpt4", "rejected_model": "td003", "gap": 1.0}
    assert report_of(tmp_path / "steps.jsonl")["common_characters"] == 4.0
    spaced = build(source, "--order", "gpt4 > td003", "--steps", "\\n", "--output", tmp_path / "same.parquet", *options)
    assert spaced == [row]


def test_prompts_in_parts(tmp_path):
    """`input` adds to `instruction`, so two rows with one instruction and different inputs are two prompts."""
    rows = [
        {"instruction": "add", "input": numbers, "model": model, "output": f"{numbers} {model}"}
        for numbers in ("1 2", "3 4")
        for model in ("a", "b")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = build(tmp_path / "rows.jsonl", "--order", "a > b", "--output", tmp_path / "pairs.jsonl")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in made] == [
        ("add\n1 2", "1 2 a", "1 2 b"),
        ("add\n3 4", "3 4 a", "3 4 b"),
    ]
