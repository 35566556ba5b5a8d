"""How many registers, how much shared memory and how many spills does each kernel have? Needs no GPU.

    python -m bench compile_report [--quick] [--only triton|cuda]

Triton kernels are compiled ahead of time through their own launchers, with the tile sizes and specializations used in
production, at several vocabulary sizes. CUDA sources are compiled by nvcc for the GPUs that the extension has machine
code for, and, from the PTX that it carries, for those that came later. Machine code (SASS) is read. CUDA kernels must
use no local memory. The loops of ``vocab_score`` over whole vectors must load and store 16 bytes at a time and have few
instructions per element, and in CUDA its registers must allow the blocks per multiprocessor that its launch plans. The
exit code is 1 if any kernel breaks a rule or spills registers or has a stack frame.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .timing import add_output_options, finish

CSRC = Path(__file__).parents[1] / "csrc"
TRITON_ARCHITECTURES = (80, 90, 100)
# GPU -> what its machine code is compiled from, as setup.py builds it. Drivers compile compute_90's PTX for Blackwell.
CUDA_ARCHITECTURES = {
    "sm_90a": "compute_90a",
    "sm_80": "compute_80",
    "sm_100a": "compute_90",
    "sm_120a": "compute_90",
}
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# The most instructions per element in the loops of vocab_score over whole vectors. CUDA's last two have bias and cap in
# one loop, so a launch runs a part of them.
BUDGETS = {"": 14, "statistics": 18, "bias and cap": 60, "statistics, bias and cap": 64}
TRITON_BUDGETS = {"": 14, "statistics": 18, "statistics, bias, softcap": 80}
_REGISTERS = 65536  # of a multiprocessor
VOCABULARIES = (32000, 128256, 256000)


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel. Sizes are in bytes.

    ``shared`` is the shared memory known at compile time; CUDA kernels get more at launch. A Triton kernel that spills
    registers has a stack frame. ``wide`` counts the instructions that load or store 16 bytes of device memory.
    """

    compiler: str
    architecture: str
    kernel: str
    case: str
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int | None = None
    wide: int | None = None
    blocks: int | None = None  # of the most threads, on a multiprocessor, as far as registers go
    per_element: float | None = None  # instructions in the loops over a row; see :func:`instructions_per_element`
    broken: tuple[str, ...] = ()  # what breaks the rules for machine code; see :func:`broken_rules`

    @property
    def clean(self) -> bool:
        """True if nothing spills, there is no stack frame and the machine code follows the rules."""
        return self.stack == 0 and self.spills == 0 and not self.broken


def nvidia_tool(name: str) -> str:
    """Returns the path of a CUDA binary tool that ships with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: Path) -> dict[str, list[str]]:
    """Returns mangled name -> machine code of each kernel in a cubin: labels (``.L_x_1:``) and instructions."""
    listing = subprocess.run([nvidia_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    kernels: dict[str, list[str]] = {}
    for line in listing.stdout.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            code = kernels.setdefault(match[1], [])
        elif match := re.match(r"(\.L_x_\d+:)|\s+/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;", line):
            code.append(match[1] or match[2])
    return kernels


def count(pattern: str, code: list[str]) -> int:
    """Returns the number of instructions whose opcode starts with the regular expression ``pattern``."""
    return sum(re.match(rf"(?:@!?U?P\w+ )?{pattern}", re.sub(r"\s+", " ", line)) is not None for line in code)


def innermost_loops(code: list[str]) -> list[list[str]]:
    """Returns the instructions of each loop that contains no other loop. A loop ends with a branch backwards."""
    labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    spans = []
    for i, line in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target[1]] < i:
            spans.append((labels[target[1]], i))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[line for line in code[a : b + 1] if not line.endswith(":")] for a, b in inner]


_WIDE_LOAD = r"(LDG|LDS)\.(?!\S*CONSTANT)(\w+\.)*128"  # of the row; a bias is loaded as a constant


def hot_loops(code: list[str]) -> list[tuple[list[str], int]]:
    """Returns the loops over whole vectors, and how many vectors an iteration reads.

    These are the loops that read the most vectors per iteration; others treat the ends of the row.
    """
    loops = [(loop, count(_WIDE_LOAD, loop)) for loop in innermost_loops(code)]
    most = max((vectors for _, vectors in loops), default=0)
    return [(loop, vectors) for loop, vectors in loops if vectors and vectors == most]


def unmasked_loops(code: list[str], biased: bool) -> list[tuple[list[str], int]]:
    """Returns Triton's loops over whole vectors, and how many vectors of the row an iteration reads.

    In its loops over the end of a row each load depends on a predicate. A bias of the row's dtype is read like the row.
    """
    loops = [(loop, count(_WIDE_LOAD, loop) // (2 if biased else 1)) for loop in innermost_loops(code)]
    masked = re.compile(r"@!?U?P\w+ LDG")
    return [(loop, vectors) for loop, vectors in loops if vectors and not any(map(masked.match, loop))]


def instructions_per_element(loops: list[tuple[list[str], int]], element_bytes: int) -> float:
    """Returns the instructions per element of a row, summed over the loops over whole vectors.

    Code that an iteration jumps over counts too (bias or cap, where only the other is there). The loop that only copies
    a row to shared memory does not.
    """
    return round(sum(len(loop) * element_bytes / (16 * vectors) for loop, vectors in loops), 1)


def broken_triton_rules(options: str, loops: list[tuple[list[str], int]], per_element: float) -> tuple[str, ...]:
    """Returns what the machine code of Triton's ``vocab_score`` with aligned rows breaks."""
    broken = []
    writes = [count(r"STG\.(\w+\.)*128", loop) for loop, _ in loops]
    if len(loops) != 2 or writes != [0, loops[1][1]] or any(count(r"(LDG|STG)\.(?!\S*128)", loop) for loop, _ in loops):
        broken.append(f"loops over whole vectors read {[n for _, n in loops]} and write {writes} vectors of 16 bytes")
    if per_element > TRITON_BUDGETS[options]:
        broken.append(f"{per_element} instructions per element are more than {TRITON_BUDGETS[options]}")
    return tuple(broken)


def broken_rules(case: str, code: list[str], per_element: float, blocks: int, planned: int) -> tuple[str, ...]:
    """Returns what the machine code of a ``vocab_score`` kernel breaks."""
    broken = []
    # 16 bytes at a time: the copy to shared memory, and a store for each vector that a loop reads.
    copies = [loop for loop in innermost_loops(code) if count(r"LDGSTS\.(\w+\.)*128", loop) >= 4]
    if "resident" in case and not copies:
        broken.append("no loop copies 16 bytes to shared memory at a time")
    stored = [loop for loop in innermost_loops(code) if count(r"STG\b", loop)]
    reads, writes = ([count(kind, loop) for loop in stored] for kind in (_WIDE_LOAD, r"STG\.(\w+\.)*128"))
    if not stored or 0 in reads or reads != writes:
        broken.append(f"loops that store a row read {reads} and write {writes} vectors of 16 bytes")
    if any(count(r"(LDG|STG)\.(?!\S*(128|CONSTANT))", loop) for loop, _ in hot_loops(code)):
        broken.append("a loop over whole vectors loads or stores less than 16 bytes at a time")
    # Instructions and registers.
    budget = BUDGETS[", ".join(part for part in case.split(", ")[2:])]
    if per_element > budget:
        broken.append(f"{per_element} instructions per element are more than {budget}")
    if blocks < planned:
        broken.append(f"registers allow {blocks} blocks per multiprocessor, and the launch plans {planned}")
    return tuple(broken)


def resource_usage(cubin: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields (mangled name, resources) of each kernel in a cubin."""
    report = subprocess.run(
        [nvidia_tool("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", report.stdout + report.stderr):
        yield name, {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}


def triton_usages(quick: bool) -> Iterator[Usage]:
    """Compiles every Triton kernel for each architecture, as its launcher specializes it."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """Replaces the GPU driver: names a target architecture to compile for; nothing can be launched."""

        def __init__(self, architecture: int):
            self.architecture = architecture

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.architecture, 32)

        def get_current_device(self) -> int:
            return self.architecture  # the cache of compiled kernels is keyed by device

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled = []
    # Replace the launch `kernel[grid](...)` by a compilation with the same arguments.
    JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **kwargs: compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))
    )
    # Compile every case for every architecture, and read the resources from the cubins.
    for architecture in TRITON_ARCHITECTURES:
        driver.set_active(NoDevice(architecture))
        for case, launch in triton_cases(torch, quick):
            launch()
            for name, kernel in compiled:
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(kernel.asm["cubin"])
                    file.flush()
                    ((_, used),) = resource_usage(Path(file.name))
                    (code,) = disassemble(Path(file.name)).values()
                per_element, broken = None, ()
                if name == "_vocab_score_kernel" and "unaligned" not in case:
                    size, _, options = case.split(" ", 1)[1].partition(", ")
                    loops = unmasked_loops(code, "bias" in options)
                    per_element = instructions_per_element(loops, ELEMENT_BYTES[size])
                    broken = broken_triton_rules(options.removesuffix(", rows of the head's tile"), loops, per_element)
                yield Usage(
                    compiler="triton",
                    architecture=f"sm_{architecture}",
                    kernel=name.strip("_"),
                    case=case,
                    registers=used["REG"],
                    shared=kernel.metadata.shared,
                    stack=used["STACK"],
                    spills=used["LOCAL"],
                    threads=32 * kernel.metadata.num_warps,
                    wide=len(re.findall(r"(?:ld|st)\.global[.\w]*\.v4\.b32", kernel.asm["ptx"])),
                    per_element=per_element,
                    broken=broken,
                )
            compiled.clear()


def triton_cases(torch, quick: bool):
    """Yields (description, launching function) for every case to compile."""
    from cpt_kernels.losses import build_loss
    from cpt_kernels.ops.head.tiles import row_stride
    from cpt_kernels.ops.head.units.triton import rescale_triton
    from cpt_kernels.ops.pair_loss import KERNEL_LOSSES, PairLossInput, kernel_loss
    from cpt_kernels.ops.pair_loss.triton import pair_loss_triton
    from cpt_kernels.ops.vocab_score import TileOptions
    from cpt_kernels.ops.vocab_score.triton import vocab_score_triton

    def vocab_score(vocab, dtype, softcap=None, bias=False, statistics=True, stride=None):
        logits = torch.empty(2, stride or vocab, dtype=dtype)[:, :vocab]
        targets = torch.zeros(2, dtype=torch.int64)
        bias = torch.empty(vocab, dtype=dtype) if bias else None
        options = TileOptions(bias, softcap=softcap, statistics=statistics, score=True)
        return lambda: vocab_score_triton(logits, targets, options)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for vocab in VOCABULARIES:
        yield f"V={vocab} bf16, statistics", vocab_score(vocab, bf16)
    yield "V=256000 bf16, statistics, bias, softcap", vocab_score(256000, bf16, 30.0, True)
    stride = row_stride(50257, torch.device("cuda"))
    yield "V=50257 bf16, statistics, rows of the head's tile", vocab_score(50257, bf16, stride=stride)
    yield "V=128256 bf16", vocab_score(128256, bf16, statistics=False)
    yield "V=128256 fp16, statistics", vocab_score(128256, fp16)
    if not quick:
        yield "V=128256 fp32, statistics", vocab_score(128256, fp32)
        yield "V=50257 bf16, statistics, unaligned rows", vocab_score(50257, bf16)

    def pair_loss(loss, completions):
        index = torch.zeros(4, dtype=torch.int64)
        offsets = torch.zeros(completions + 1, dtype=torch.int64)
        tokens, reference = torch.empty(64), torch.empty(completions)
        inputs = PairLossInput(tokens, offsets, index, index, index, reference)
        return lambda: pair_loss_triton(inputs, kernel_loss(build_loss(loss)))

    for loss in ("sigmoid",) if quick else KERNEL_LOSSES:
        yield f"{loss}, one launch", pair_loss(loss, 8)
        yield f"{loss}, two launches", pair_loss(loss, 4096)

    yield "fp16 sums of gradients", lambda: rescale_triton(torch.empty(4096), torch.empty(()))


def cuda_usages(quick: bool, folder_of_sources: Path = CSRC) -> Iterator[Usage]:
    """Compiles every kernel in ``csrc`` (or in another folder) with nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not on the PATH: install it, or leave CUDA sources out with --only triton")
    launch = (folder_of_sources / "vocab_score.cu").read_text()
    threads, planned = (
        int(re.search(rf"constexpr int {name} = (\d+)", launch)[1]) for name in ("kMaxThreads", "kBlocks")
    )
    for architecture in list(CUDA_ARCHITECTURES)[: 1 if quick else None]:
        for source in sorted(folder_of_sources.glob("*.cu")):
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernels.cubin")
                code = f"arch={CUDA_ARCHITECTURES[architecture]},code={architecture}"
                flags = ["-std=c++17", "-O3", "-cubin", f"-gencode={code}", "-Xptxas", "-v"]
                build = subprocess.run(
                    [nvcc, *flags, str(source), "-o", str(cubin)], capture_output=True, text=True, check=True
                )
                spills = spilled_bytes(build.stdout + build.stderr)
                machine_code = disassemble(cubin)
                for name, used in resource_usage(cubin):
                    code, case = machine_code[name], template_arguments(name)
                    broken = ("it uses local memory",) if count(r"(LDL|STL)\b", code) else ()
                    blocks = _REGISTERS // (threads * -(-used["REG"] // 8) * 8)
                    per_element = instructions_per_element(hot_loops(code), ELEMENT_BYTES[case[:4]]) if case else None
                    if case:
                        broken += broken_rules(case, code, per_element, blocks, planned)
                    yield Usage(
                        compiler="nvcc",
                        architecture=architecture,
                        kernel=source.stem,
                        case=case,
                        registers=used["REG"],
                        shared=used["SHARED"],
                        stack=used["STACK"],
                        spills=used["LOCAL"] + spills[name],
                        threads=threads,
                        wide=count(r"(LDG|STG|LDGSTS)\.(\w+\.)*128", code),
                        blocks=blocks,
                        per_element=per_element,
                        broken=broken,
                    )


def spilled_bytes(ptxas: str) -> dict[str, int]:
    """Returns the bytes of spill stores and loads of each kernel, from the output of ``ptxas -v``."""
    found = re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    return {name: int(stores) + int(loads) for name, stores, loads in found}


def template_arguments(mangled: str) -> str:
    """Decodes dtype and template flags from a mangled kernel name; '' if the name has none."""
    match = re.search(r"_kernelI(f|6__half|13__nv_bfloat16)Lb([01])ELb([01])ELb([01])E", mangled)
    if not match:
        return ""
    dtype = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}[match[1]]
    flags = (("streaming", "resident"), ("", "statistics"), ("", "bias and cap"))
    return ", ".join(filter(None, [dtype, *(names[int(match[i + 2])] for i, names in enumerate(flags))]))


def usage_table(usages: list[Usage]) -> str:
    names = ("compiler", "architecture", "kernel", "case", "threads", "registers", "shared", "stack", "spills", "wide")
    names += ("blocks", "per_element")
    rows = [names, *(["" if getattr(u, name) is None else getattr(u, name) for name in names] for u in usages)]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(str(x).rjust(w) if i > 3 else str(x).ljust(w) for i, (x, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench compile_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, and CUDA sources for one architecture")
    parser.add_argument("--only", choices=("triton", "cuda"), help="report on one of the two compilers")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, so kernels would be interpreted and not compiled: unset it")

    usages = []
    if options.only != "cuda":
        usages += triton_usages(options.quick)
    if options.only != "triton":
        usages += cuda_usages(options.quick)
    dirty = [usage for usage in usages if not usage.clean]
    print(usage_table(usages))
    print(f"\n{len(usages)} kernels, {len(dirty)} with spilled registers, a stack frame or a broken rule")
    for usage in dirty:
        print(f"NOT CLEAN: {usage}", file=sys.stderr)
    finish("compile_report", {}, {"ok": not dirty, "kernels": [asdict(usage) for usage in usages]}, options)
    return 1 if dirty or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
