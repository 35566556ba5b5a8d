"""Compile ``csrc/`` with g++ against the emulation of CUDA in ``include/``; load it in place of ``cpt_kernels._C``."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pybind11

from tests.helpers import ROOT

_HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-unused-function", "-Werror")
_KERNEL_FLAGS = ("-std=c++17", "-O1", "-fPIC", *WARNINGS, f"-I{_HERE / 'include'}")
_BINDING_FLAGS = (
    *("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden"),
    *(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))),
)


def sources(patches: tuple[tuple[str, str, str], ...] = ()) -> dict[str, str]:
    """Returns name -> text of the files in ``csrc``, with ``patches`` (file, old, new) applied, each exactly once."""
    texts = {path.name: path.read_text() for path in sorted(CSRC.iterdir())}
    for name, old, new in patches:
        assert texts[name].count(old) == 1, f"found {texts[name].count(old)} times in {name}: {old}"
        texts[name] = texts[name].replace(old, new)
    return texts


def build(name: str, command: tuple[str, ...], files: dict[str, str], depends: str = "") -> Path:
    """Runs a compiler ``command`` among ``files``; returns its output ``name`` from a cache keyed by all its inputs."""
    key = hashlib.sha256(repr((name, command, files, depends)).encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"cpt_emulation_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    target = cache / f"{key}_{name}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            for file, text in files.items():
                Path(scratch, file).write_text(text)
            run = subprocess.run([*command, "-o", name], cwd=scratch, capture_output=True, text=True)
            assert run.returncode == 0, f"{' '.join(command)}\n{run.stderr}"
            Path(scratch, name).replace(target)  # atomic, because several test processes may build the same file
    return target


@functools.cache
def load(patches: tuple[tuple[str, str, str], ...] = ()):
    """Returns the emulated extension module, optionally with planted bugs; see :func:`sources`."""
    texts = sources(patches)
    emulation = "".join(path.read_text() for path in sorted((_HERE / "include").iterdir()))
    headers = {name: text for name, text in texts.items() if name.endswith("h")}
    objects = []
    for name, text in texts.items():
        if name.endswith(".cu"):
            command = ("g++", *_KERNEL_FLAGS, "-c", "-x", "c++", name)
            objects.append(build(f"{name}.o", command, {**headers, name: text}, emulation))
    name = "emulation.cpp"
    files = {name: (_HERE / name).read_text()}
    objects.append(build("emulation.o", ("g++", *_KERNEL_FLAGS, "-c", name), files, emulation))
    files = {name: texts[name] for name in ("bindings.cpp", "kernels.h")}
    objects.append(build("bindings.o", ("g++", *_BINDING_FLAGS, "-c", "bindings.cpp"), files))

    library = build("_C.so", ("g++", "-shared", *map(str, objects)), {})
    name = f"{library.stem}._C"  # a unique name: pybind11 returns an earlier module of the same name
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(monkeypatch, patches=(), *, descending=False, major=9, shared_kib=228, multiprocessors=4):
    """Makes backend ``cuda`` run CPU tensors on an emulated device, its threads in the given order.

    Yields the library; its ``last_cluster()`` and ``last_shared_bytes()`` describe the last launch.
    """
    from cpt_kernels.ops import backends, pair_loss, vocab_score

    module = load(tuple(patches))
    library = ctypes.CDLL(module.__file__)
    library.configure(int(descending), major, shared_kib << 10, multiprocessors)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "load_extension", lambda: module)
        for table in (vocab_score.BACKENDS, pair_loss.BACKENDS):  # CPU tensors are let through
            patch.setitem(table, "cuda", dataclasses.replace(table["cuda"], check=None))
        yield library
