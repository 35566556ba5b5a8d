"""Builds the CUDA kernels in ``csrc`` into ``cpt_kernels._C`` where nvcc is found; the rest is in pyproject.toml.

``CPT_BUILD_CUDA=1`` makes it an error if they cannot be built, ``CPT_BUILD_CUDA=0`` skips them.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Machine code for Ampere (and what runs it: sm_86, sm_89) and Hopper; PTX for whatever comes after.
CODE = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


def find_nvcc():
    """The nvcc to build with, or None; says which in one line."""
    wanted = os.environ.get("CPT_BUILD_CUDA", "")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if wanted == "0":
        print("cpt_kernels: CUDA kernels skipped (CPT_BUILD_CUDA=0)")
        return None
    if missing := what_is_missing(nvcc):
        if wanted == "1":
            raise SystemExit(f"cpt_kernels: CPT_BUILD_CUDA=1, but {missing}")
        print(f"cpt_kernels: {missing}, CUDA kernels skipped; the Triton kernels are used")
        return None
    print(f"cpt_kernels: building the CUDA kernels with {nvcc}")
    return nvcc


def what_is_missing(nvcc):
    """What the kernels cannot be built without, or None."""
    if nvcc is None:
        return "there is no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None or int(release[1]) < 12:  # no sm_90a
        return f"{nvcc} is older than CUDA 12"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is not in {sysconfig.get_path('include')} (install python3-dev)"
    return None


class BuildKernels(build_ext):
    """Kernels and bindings in one nvcc command. No torch: tensors cross the boundary as pointers."""

    def build_extension(self, extension):
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = (pybind11.get_include(), sysconfig.get_path("include"))
        flags = [
            "-std=c++17",
            "-O3",
            "--threads=0",
            "-shared",
            "-cudart=static",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ]
        flags += [f"-gencode={code}" for code in CODE] + [f"-I{path}" for path in includes]
        subprocess.run([NVCC, *flags, *extension.sources, "-o", str(target)], check=True)


class CopySources(build_py):
    """Wheels carry the kernels' sources too, so that what was compiled can be read."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc", Path(self.build_lib, "cpt_kernels", "csrc"), dirs_exist_ok=True)


NVCC = find_nvcc()
SOURCES = [str(path) for pattern in ("*.cu", "bindings.cpp") for path in sorted(Path("csrc").glob(pattern))]
setup(
    ext_modules=[Extension("cpt_kernels._C", SOURCES)] if NVCC else [],
    cmdclass={"build_ext": BuildKernels, "build_py": CopySources},
)
