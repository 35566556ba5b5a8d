"""PTX text as data: a kernel's parameters, registers, labels and instructions."""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass, field

import numpy as np

# PTX type -> numpy type. A bf16 number is kept as its bits.
TYPES = {f"{kind}{8 * size}": np.dtype(f"{to}{size}") for kind, to in ("bu", "uu", "si") for size in (1, 2, 4, 8)}
TYPES |= dict(zip(("pred", "bf16", "f16", "f32", "f64"), map(np.dtype, ("?", "u2", "f2", "f4", "f8"))))

END = r"\n\}(?!\s*// end inline asm)"  # of a kernel; inline assembly may end with a brace, too


class PtxError(RuntimeError):
    """The program does what no correct program does, or uses an instruction that the interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate register that enables it, with "!" if negated; "" for none
    opcode: tuple[str, ...]  # "ld.global.v4.u32" in its parts
    operands: tuple[str, ...]
    text: str  # with its line in the PTX file


@dataclass
class Program:
    """One kernel of a PTX file.

    Attributes:
        parameters: name -> offset in the bytes of the kernel's arguments.
        shared: names of the dynamic shared memory; all stand for its first byte.
        registers: name -> numpy type of its bits.
        labels: name -> index of the instruction that follows it.
    """

    name: str
    max_threads: int = 1024
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: set[str] = field(default_factory=set)
    registers: dict[str, np.dtype] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str, suffix: str) -> Program:
    """Reads the kernel whose mangled name ends with ``suffix`` from a PTX file."""
    entry = re.search(rf"\.entry\s+(\w*{re.escape(suffix)})\((.*?)\)(.*?)\n\{{\n(.*?){END}", text, re.DOTALL)
    if entry is None:
        raise PtxError(f"there is no kernel *{suffix}")
    program = Program(entry[1])
    program.shared = set(re.findall(r"\.extern\s+\.shared[^;]*?(\w+)\[\]", text))
    if match := re.search(r"\.(?:max|req)ntid\s+(\d+)", entry[3]):
        program.max_threads = int(match[1])
    # Parameters lie one after another, each at a multiple of its alignment.
    for align, kind, name, count in re.findall(
        r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr .*?\.align \d+ )?(\w+)(?:\[(\d+)\])?", entry[2]
    ):
        size = TYPES[kind].itemsize
        start = -(-program.parameter_bytes // int(align or size)) * int(align or size)
        program.parameters[name] = start
        program.parameter_bytes = start + size * int(count or 1)

    newlines = [match.start() for match in re.finditer("\n", text)]
    body = re.sub(r"//[^\n]*|\n\s*\.loc[^\n]*", lambda comment: " " * len(comment[0]), entry[4])
    for statement in re.finditer(r"[^;]+;", body):
        position = entry.start(4) + statement.end()
        read_statement(program, statement[0][:-1].strip(), bisect(newlines, position - 1) + 1)
    return program


def read_statement(program: Program, text: str, line: int) -> None:
    """Adds a statement (without its semicolon) to the program: labels, a declaration or an instruction."""
    # Braces around statements are scopes. nvcc gives each name one type everywhere, so scopes need not be kept apart.
    while match := re.match(r"[{}]\s*|([$\w]+):\s*", text):
        if match[1]:
            program.labels[match[1]] = len(program.instructions)
        text = text[match.end() :]
    if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
        bits = TYPES["pred"] if match[1] == "pred" else np.dtype(f"u{TYPES[match[1]].itemsize}")
        for name, count in re.findall(r"(%?[a-zA-Z_]\w*)(?:<(\d+)>)?", match[2]):
            for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                if program.registers.setdefault(register, bits) != bits:
                    raise PtxError(f"line {line}: register {register} is declared with two widths")
    elif match := re.match(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL):
        operands = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", re.sub(r" *([][+]) *", r"\1", match[3])))
        text = f"line {line}: " + re.sub(r"\s+", " ", text)
        program.instructions.append(Instruction(match[1] or "", tuple(match[2].split(".")), operands, text))
    elif not text.startswith(".pragma"):
        raise PtxError(f"line {line}: unknown statement: {text}")
