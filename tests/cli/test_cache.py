"""Tests of all commands of ``cpt cache`` on a small model and dataset."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cpt_kernels import cli
from cpt_kernels.cli.cache import main
from cpt_kernels.errors import UserError
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.shards import Rows
from tests.helpers import ROOT
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import preference_rows, word_tokenizer
from tests.reference.test_cache import FINGERPRINT, OTHER, fill, found, make_row


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("cache")
    tiny_model("llama").save_pretrained(home / "model")
    word_tokenizer().save_pretrained(home / "model")
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in preference_rows(12)]
    (home / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return home


def options(home: Path, cache: Path, data: str = "data.jsonl") -> list[str]:
    given = {"model_name_or_path": home / "model", "dataset_name": home / data, "ref_cache_dir": cache}
    return [
        *(text for name, value in given.items() for text in (f"--{name}", str(value))),
        "--use_cpu",
        "--disable_tqdm",
    ]


def test_build_info_verify(home, tmp_path, capsys, caplog):
    cache = tmp_path / "cache"
    main(["info", *options(home, cache)])
    assert "0 of 24 completions are stored (0.0%)" in capsys.readouterr().out
    main(["build", *options(home, cache)])
    assert "0 of 24 reference log-probs were cached; 24 were scored" in caplog.text
    main(["info", *options(home, cache)])
    assert "24 of 24 completions are stored (100.0%)" in capsys.readouterr().out
    main(["info", "--ref_cache_dir", str(cache)])
    assert re.search(r"[0-9a-f]{32}  .*model, .*float32: 24 completions, \d+ tokens", capsys.readouterr().out)
    main(["verify", "--sample", "10", *options(home, cache)])
    assert "10 completions scored again" in capsys.readouterr().out
    main(["verify", "--ref_cache_dir", str(cache)])
    assert "every checksum is right" in capsys.readouterr().out


def test_two_ranks_resume_a_build_of_one(home, tmp_path, capsys):
    """Runs `torchrun --nproc_per_node 2 -m cpt_kernels.cli cache build ...` after one process has scored half."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in preference_rows(40, seed=1)]
    for name, count in (("some", 20), ("all", 40)):
        (home / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:count]))
    cache = tmp_path / "cache"
    main(["build", *options(home, cache, "some.jsonl")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cpt_kernels.cli"]
    built = subprocess.run(
        [sys.executable, *launcher, "cache", "build", *options(home, cache, "all.jsonl")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("40 of 80 reference log-probs were cached; 40 were scored") == 1
    (folder,) = cache.glob("?" * 32)
    assert len(list(folder.glob("*.arrow"))) == 3, "each rank writes a shard"
    main(["verify", *options(home, cache, "all.jsonl")])
    assert "64 completions scored again" in capsys.readouterr().out


def test_only_rank_0_prints(home, tmp_path, capsys, monkeypatch):
    main(["build", *options(home, tmp_path)])
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    for command in ("info", "verify"):
        main([command, *options(home, tmp_path)])
    assert not capsys.readouterr().out


def test_nothing_to_verify(home, tmp_path):
    with pytest.raises(ValueError, match="nothing to verify"):
        main(["verify", *options(home, tmp_path)])


@pytest.mark.parametrize("option", ["sample", "seed", "tolerance"])
def test_options_of_the_sample_need_a_dataset(tmp_path, option):
    with pytest.raises(ValueError, match=f"--{option} applies only when a dataset is given: give the options of"):
        main(["verify", f"--{option}", "1", "--ref_cache_dir", str(tmp_path)])


def test_a_moving_reference_is_not_cached(home, tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model moves the reference, so its log-probs are not cached"):
        main(["build", *options(home, tmp_path), "--sync_ref_model", "true"])


def test_verify_detects_values_of_another_model(home, tmp_path):
    cache = tmp_path / "cache"
    main(["build", *options(home, cache)])
    (folder,) = cache.glob("?" * 32)
    (shard,) = ReferenceCache(cache, folder.name).shards
    forged = ReferenceCache(cache, folder.name)
    shard.path.unlink()
    rows = Rows()
    for key, values in shard.rows().items():
        rows.add([key], [values - 1])
    forged._write(rows, "tokens")
    with pytest.raises(ValueError, match=r"differ by up to 1\.?\d* nats per token"):
        main(["verify", *options(home, cache)])


def test_verify_names_damaged_shards(tmp_path, capsys):
    fill(tmp_path, range(5))
    (path,) = (tmp_path / FINGERPRINT).glob("*.arrow")
    content = path.read_bytes()
    at = content.index(make_row(2)[2].tobytes())
    path.write_bytes(content[:at] + b"\xa5\xa5" + content[at + 2 :])
    with pytest.raises(ValueError, match="1 shards are damaged"):
        main(["verify", "--ref_cache_dir", str(tmp_path)])
    assert str(path) in capsys.readouterr().err


def test_export(tmp_path):
    cache = fill(tmp_path, range(20))
    main(["export", "--ref_cache_dir", str(tmp_path), "--to", str(tmp_path / "rows.parquet")])
    table = pq.read_table(tmp_path / "rows.parquet")
    rows = dict(zip(table["key"].to_pylist(), table["logps"].to_pylist()))
    for prompt, completion, logps in map(make_row, range(20)):
        assert rows[cache.key(prompt, completion)] == logps.tolist()
    assert set(table["kind"].to_pylist()) == {"tokens"}
    assert table.schema.metadata[b"fingerprint"] == FINGERPRINT.encode()


def test_a_damaged_shard_is_not_exported(tmp_path):
    fill(tmp_path, range(5))
    (path,) = (tmp_path / FINGERPRINT).glob("*.arrow")
    content = path.read_bytes()
    at = content.index(make_row(2)[2].tobytes())
    path.write_bytes(content[:at] + b"\xa5\xa5" + content[at + 2 :])
    with pytest.raises(ValueError, match=f"{path}: its values do not match"):
        main(["export", "--ref_cache_dir", str(tmp_path), "--to", str(tmp_path / "rows.parquet")])


def test_merge(tmp_path):
    for start in range(0, 60, 10):
        fill(tmp_path, range(start, start + 10))
    reader = ReferenceCache(tmp_path, FINGERPRINT)
    main(["merge", "--ref_cache_dir", str(tmp_path)])
    assert len(list((tmp_path / FINGERPRINT).glob("*.arrow"))) == 1
    assert found(reader, range(60)) == found(ReferenceCache(tmp_path, FINGERPRINT), range(60)) == list(range(60))


def test_prune(tmp_path, capsys):
    fill(tmp_path, range(10))
    (old,) = (tmp_path / FINGERPRINT).glob("*.arrow")
    os.utime(old, times=(time.time() - 10 * 86400,) * 2)
    fill(tmp_path, range(10, 20))
    left = tmp_path / FINGERPRINT / ".abc.tmp"
    left.write_bytes(b"x")
    with ReferenceCache(tmp_path, OTHER) as other:
        other.add(*make_row(0))

    def prune(*flags: str) -> None:
        main(["prune", "--ref_cache_dir", str(tmp_path), "--yes", *flags])

    prune()
    assert left.exists(), "a recent file may belong to a running writer"
    os.utime(left, times=(0, 0))
    prune("--older_than", "5", "--dry_run")
    assert left.exists() and old.exists() and "2 files" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing was deleted: answer y, or give --yes"):  # there is no terminal to ask
        main(["prune", "--ref_cache_dir", str(tmp_path), "--older_than", "5"])
    for name, value in (("--max_gb", "-1"), ("--max_gb", "nan"), ("--older_than", "-1"), ("--older_than", "inf")):
        with pytest.raises(UserError, match=f"^{name} {value}: must not be negative"):
            prune(name, value)
    assert left.exists() and old.exists() and str(old) in capsys.readouterr().out
    prune("--older_than", "5")
    assert not left.exists() and not old.exists()
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(20)) == list(range(10, 20))
    prune("--reference", OTHER[:4])
    assert not (tmp_path / OTHER).exists()
    prune("--max_gb", "1")
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(20)) == list(range(10, 20))
    prune("--max_gb", "0")
    assert not (tmp_path / FINGERPRINT).exists()


def test_import_of_sums(home, tmp_path, capsys, caplog):
    """TRL's sums of the same model are imported, those of another model are refused."""
    scored = tmp_path / "scored"
    main(["build", *options(home, scored)])
    (folder,) = scored.glob("?" * 32)
    from cpt_kernels.cli.cache_dataset import open_dataset
    from cpt_kernels.reference.missing import iter_sequences

    with open_dataset(options(home, scored), "test") as data:
        (dataset,) = data.stored.values()
        sums = {}
        for sequences in iter_sequences(dataset, 1024, "keep_start"):
            for each in sequences:
                sums[each.row, each.position] = float(data.reference.cache.get(*each.ids).sum())
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    for shift, name in ((0.0, "right"), (5.0, "wrong")):
        with_sums = [
            row | {"ref_chosen_logps": sums[i, 0] + shift, "ref_rejected_logps": sums[i, 1]}
            for i, row in enumerate(rows)
        ]
        (home / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in with_sums))
    with pytest.raises(ValueError, match="another model, precision or truncation"):
        main(["import", *options(home, tmp_path / "cache", "wrong.jsonl")])
    main(["import", *options(home, tmp_path / "cache", "right.jsonl")])
    assert "24 completions imported" in capsys.readouterr().out
    imported = ReferenceCache(tmp_path / "cache", folder.name)
    assert {shard.kind for shard in imported.shards} == {"sums"} and imported.num_rows == 24
    main(["verify", *options(home, tmp_path / "cache")])
    caplog.clear()
    main(["build", *options(home, tmp_path / "cache")])
    assert "all 24 reference log-probs were cached" in caplog.text


@pytest.mark.parametrize("name", ["completion_mask", "token_weights"])
def test_sums_of_completions_with_masks_are_not_imported(home, tmp_path, name):
    row = {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8], name: [[0, 1], [1]]}
    row |= {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    (home / "masked.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="row 0 has masks or weights of tokens"):
        main(["import", *options(home, tmp_path / "cache", "masked.jsonl")])


def test_mistakes_are_one_line(tmp_path, capsys):
    for argv, message in (
        (["build"], "needs a model and a dataset"),
        (["prune", "--older", "3"], "unknown option --older"),
        (["forget"], "invalid choice"),
        (["info", "--ref_cache_dir", str(tmp_path / "none")], "there is no cache"),
        (["verify", "--sample", "0"], "0 is not a number of completions"),
        (["info", "--reference", "ab", "--beta", "1"], "--reference selects a stored reference: leave it out"),
        (["export", "--ref_cache_dir", str(tmp_path), "--to", "x.parquet"], "--reference must name one of the 0"),
    ):
        assert cli.main(["cache", *argv]) == 2
        assert message in capsys.readouterr().err
