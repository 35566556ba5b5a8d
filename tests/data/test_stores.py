"""URLs of object stores: the local folders that stand for them, data and models that are read there, and messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from cpt_kernels import ContrastiveTrainer, cli
from cpt_kernels.data import stores
from cpt_kernels.data.sources import is_one_file, load_data
from cpt_kernels.errors import UserError
from cpt_kernels.model.pretrained import find_adapters, load_pretrained
from tests.helpers import toy
from tests.helpers.architectures import tiny_model

Memory: Any = type(fsspec.filesystem("memory"))


@pytest.fixture
def url(tmp_path, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("CPT_LOCAL", str(tmp_path / "local"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # else `datasets` reads no URL at all
    stores._copied.cache_clear()
    yield f"memory://{tmp_path.name}"
    Memory.store.clear()


def put(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            stores.upload(path, f"{url}/{path.relative_to(folder).as_posix()}")


def test_a_local_folder_tells_its_url(url):
    for name in ("s3://bucket/runs/a b", "gs://b/x", "abfs://container@account.dfs.core.windows.net/x"):
        assert stores.url_of(stores.local_path(f"{name}/")) == name
        assert stores.url_of(stores.local_path(name) / "checkpoint-1") == f"{name}/checkpoint-1"
    assert stores.local_path("file:///tmp/x") == Path("/tmp/x") and not stores.is_remote("file:///tmp/x")
    assert stores.url_of(Path("/tmp/x")) is None and stores.url_of(stores.local_root() / ".copies" / "x") is None
    for wrong in ("s3://", "s3://bucket/../x", "s3://a//b", "simplecache::s3://b/x"):
        with pytest.raises(UserError, match="give protocol://place/path"):
            stores.local_path(wrong)


def test_credentials_are_not_shown(url, monkeypatch):
    with pytest.raises(UserError, match="credentials by the environment") as raised:
        stores.local_path("ftp://me:secret@host/x")
    assert "secret" not in str(raised.value)

    def refuse(*_, **__):
        raise PermissionError("403 for https://host/x?X-Amz-Signature=secret&other=secret")

    monkeypatch.setattr(Memory, "cat_file", refuse)
    with pytest.raises(UserError, match="403 for https://host/x") as raised:
        stores.read_bytes(f"{url}/x?sig=secret")
    assert "secret" not in str(raised.value)
    with pytest.raises(UserError, match=r"host/x.jsonl: Protocol not known") as raised:
        load_data("nothing://host/x.jsonl?sig=secret")
    assert "secret" not in str(raised.value)


def test_a_store_whose_package_is_missing(url):
    with pytest.raises(UserError, match=r"pip install 'cpt-kernels\[gs\]'"):
        stores.list_files("gs://bucket/x")
    with pytest.raises(UserError, match=r"gs://b/x.jsonl .*pip install 'cpt-kernels\[gs\]'"):
        load_data("gs://b/x.jsonl")
    with pytest.raises(UserError, match="nothing://x"):
        stores.list_files("nothing://x/y")


def test_of_several_that_create_a_file_one_does(url):
    assert stores.create_bytes(f"{url}/x", b"1") and not stores.create_bytes(f"{url}/x", b"2")
    assert stores.read_bytes(f"{url}/x") == b"1" == stores.read_bytes(f"{url}/x", 0, 5)


# --- Data


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_data(url, tmp_path, streaming):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "2024-01-02"} for i in range(6)]
    for name, some in (("train-0", rows[:2]), ("train-1", rows[2:4]), ("test-0", rows[4:])):
        stores.write_bytes(f"{url}/files/{name}.jsonl", "\n".join(map(json.dumps, some)).encode())
    assert list(load_data(f"{url}/files", streaming=streaming)) == rows[:4]
    assert list(load_data(f"{url}/files", split="test", streaming=streaming)) == rows[4:]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    put(tmp_path / "saved", f"{url}/saved")
    assert list(load_data(f"{url}/saved", streaming=streaming)) == rows
    assert is_one_file(f"{url}/files/test-0.jsonl") and not is_one_file(f"{url}/files")
    stores.write_bytes(f"{url}/files/more.csv", b"prompt\nx\n")
    stores.write_bytes(f"{url}/none/x.txt", b"")
    for name, message in (("files", "mixes csv and json"), ("none", "holds no .json"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=message):
            load_data(f"{url}/{name}")


# --- Models


def test_a_model_keeps_its_url_as_its_name(url, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    toy.word_tokenizer().save_pretrained(tmp_path / "model")
    put(tmp_path / "model", f"{url}/model")
    stores.write_bytes(f"{url}/model/checkpoint-3/optimizer.pt", b"large")
    args = toy.config(tmp_path, loss_type="simpo")
    trainer = ContrastiveTrainer(f"{url}/model", args=args, train_dataset=toy.preference_data(4))
    assert trainer.model.config._name_or_path == f"{url}/model"
    copy = stores.folder_copy(f"{url}/model")
    assert copy.name == "model" and not (copy / "checkpoint-3").exists()
    # It is downloaded again when it has changed, and only then.
    stores._copied.cache_clear()
    assert stores.folder_copy(f"{url}/model") == copy
    stores.write_bytes(f"{url}/model/new.txt", b"x")
    assert stores.folder_copy(f"{url}/model") == copy, "a process sees one version"
    stores._copied.cache_clear()
    copy = stores.folder_copy(f"{url}/model")
    assert (copy / "new.txt").exists()
    shutil.rmtree(stores.local_root() / ".copies")
    assert stores.folder_copy(f"{url}/model") == copy and (copy / "new.txt").exists(), "downloaded again"
    with pytest.raises(UserError, match="there is no such folder"):
        load_pretrained(f"{url}/nowhere")


def test_an_adapter_on_a_store_names_its_base_by_url(url, tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny_model("llama").save_pretrained(tmp_path / "base")
    put(tmp_path / "base", f"{url}/base")
    model = get_peft_model(load_pretrained(f"{url}/base"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == f"{url}/base"
    )
    put(tmp_path / "adapter", f"{url}/adapter")
    assert find_adapters(f"{url}/adapter") is not None and find_adapters(f"{url}/base") is None
    loaded = load_pretrained(f"{url}/adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == f"{url}/base"


def test_a_run_with_everything_on_a_store(url, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    toy.word_tokenizer().save_pretrained(tmp_path / "model")
    put(tmp_path / "model", f"{url}/model")
    toy.preference_data(8).to_json(str(tmp_path / "rows.jsonl"))
    stores.upload(tmp_path / "rows.jsonl", f"{url}/data/rows.jsonl")
    options = {
        **{"model_name_or_path": f"{url}/model", "dataset_name": f"{url}/data/rows.jsonl", "output_dir": f"{url}/out"},
        **{
            "ref_cache_dir": f"{url}/cache",
            "max_steps": "2",
            "save_steps": "1",
            "use_cpu": "true",
            "report_to": "none",
        },
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    assert cli.train_main(flags) == 0
    there = stores.list_files(url)
    assert {"out/model.safetensors", "out/metrics.jsonl", "out/training_config.yaml", "out/curves.png"} <= there.keys()
    assert {"out/checkpoint-1/_complete.json", "out/checkpoint-2/_complete.json"} <= there.keys()
    assert len([name for name in there if name.startswith("cache/") and name.endswith(".arrow")]) == 1
    assert f"written to {url}/out" in capsys.readouterr().out
    assert f"{url}/model" in stores.read_bytes(f"{url}/out/training_config.yaml").decode()
    # The folder is taken, and the trained model is read from there.
    assert cli.train_main(flags) == 2 and f"output_dir={url}/out holds a finished run" in capsys.readouterr().err
    assert cli.main(["cache", "info", "--ref_cache_dir", f"{url}/cache"]) == 0
    assert "16 completions" in capsys.readouterr().out
    command = ["eval", "pairs", "--models", f"{url}/out", "--data", f"{url}/data/rows.jsonl"]
    assert cli.main([*command, "--output_dir", f"{url}/eval"]) == 2
    assert "this command uses local files here" in capsys.readouterr().err
    assert cli.main([*command, "--output_dir", str(tmp_path / "eval"), "--use_cpu"]) == 0
    assert json.loads((tmp_path / "eval/pairs.json").read_text())["settings"]["reference"] == f"{url}/model"
