"""Builds the CUDA kernels in ``csrc`` into ``cpt_kernels._C`` where nvcc is found; the rest is in pyproject.toml.

``CPT_BUILD_CUDA=1`` makes a missing nvcc an error, ``CPT_BUILD_CUDA=0`` skips the kernels.
"""

import os
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
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if wanted == "0":
        nvcc = None
        print("cpt_kernels: CUDA kernels skipped (CPT_BUILD_CUDA=0)")
    elif nvcc is None and wanted == "1":
        raise SystemExit("cpt_kernels: CPT_BUILD_CUDA=1, but there is no nvcc on the PATH or in CUDA_HOME")
    elif nvcc is None:
        print("cpt_kernels: no nvcc found, CUDA kernels skipped; the Triton kernels are used")
    else:
        print(f"cpt_kernels: building the CUDA kernels with {nvcc}")
    return nvcc


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
