"""Prepares what ``gpu_check`` needs on a GPU machine that has another Python and no package index.

    python -m bench.gpu.carry --python python3.12

Installs the packages below for the other Python into a folder, without the packages that they need: that machine must
have PyTorch, Triton, transformers, accelerate and PEFT. Builds the CUDA kernels for the other Python if that Python's
headers and nvcc are here; else ``gpu_check`` compiles them there, which takes its time. Prints what to copy and what to
run there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..timing import MIB, ROOT
from .parts import find_nvcc

# The versions of constraints.txt, and those named here.
PACKAGES = ("datasets", "dill", "multiprocess", "trl", "liger-kernel", "cut-cross-entropy==25.1.1")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_ABOUT = (
    "import json, sys, sysconfig; print(json.dumps({"
    "'version': '%d.%d' % sys.version_info[:2], 'include': sysconfig.get_path('include'),"
    "'suffix': sysconfig.get_config_var('EXT_SUFFIX')}))"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu.carry", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default="python3.12", help="the GPU machine's Python, as it is installed here")
    parser.add_argument("--python-version", help="its version; needed only if it is not installed here, e.g. 3.12")
    parser.add_argument("--site", type=Path, default=ROOT / ".gpu", help="folder for the packages; default .gpu")
    parser.add_argument("--limit", type=float, default=64, help="most MiB that may be copied")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    about = about_python(options.python)
    version = options.python_version or (about and about["version"])
    if version is None:
        print(f"{options.python} does not run here: name an installed Python, or its --python-version")
        return 2
    if about and about["version"] != version:
        print(f"{options.python} is Python {about['version']}, not {version}: change --python or --python-version")
        return 2
    install(options.site, version)
    paths = [options.site]
    if reason := cannot_build(about):
        print(f"the CUDA kernels are not built: {reason}; gpu_check compiles them there")
    else:
        paths.append(build(options.python, about["suffix"]))
    # What to copy, and what to run.
    size = sum(map(size_of, paths)) / MIB
    site, *_ = names = [str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in paths]
    print(f"copy the working tree and {', '.join(names)} ({size:.1f} MiB); run there:")
    print(f"PYTHONPATH={site} python -m bench gpu_check --json check.json")
    if size > options.limit:
        print(f"error: {size:.1f} MiB are more than --limit {options.limit:g}")
        return 1
    return 0


def about_python(python: str) -> dict[str, str] | None:
    """Returns version, folder of headers and file suffix of extensions of a Python, or None if it does not run."""
    try:
        done = subprocess.run([python, "-c", _ABOUT], capture_output=True, text=True)
    except OSError:
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def requirements() -> list[str]:
    """Returns ``PACKAGES`` with the versions of ``constraints.txt``."""
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    return [name if "==" in name else f"{name}=={pinned[name]}" for name in PACKAGES]


def install(site: Path, version: str) -> None:
    """Installs the packages for another Python into a folder, which replaces what it held."""
    shutil.rmtree(site, ignore_errors=True)
    platforms = [f"--platform={platform}" for platform in _PLATFORMS]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    subprocess.run([*command, *platforms, f"--target={site}", *requirements()], check=True)


def cannot_build(about: dict[str, str] | None) -> str | None:
    """Returns why the kernels cannot be built for this Python, or None if they can."""
    if about is None:
        return "that Python is not installed here"
    if not Path(about["include"], "Python.h").exists():
        return f"Python.h is not in {about['include']}"
    return None if find_nvcc() else "nvcc is not found"


def build(python: str, suffix: str) -> Path:
    """Builds the kernels with ``setup.py`` under the other Python, and returns the extension's path."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--target", folder, "--constraint", str(ROOT / "constraints.txt"), "setuptools", "pybind11"]
        subprocess.run(command, check=True)
        environment = os.environ | {"PYTHONPATH": folder, "CPT_BUILD_CUDA": "1"}
        command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return ROOT / "cpt_kernels" / f"_C{suffix}"


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


if __name__ == "__main__":
    sys.exit(main())
