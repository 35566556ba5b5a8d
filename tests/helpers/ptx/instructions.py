"""The instructions of PTX that the interpreter knows.

``find`` returns the function that runs an instruction, given the machine, the instruction and its position, for the
threads of ``machine.at``. It returns None, or where these threads continue. An opcode that is in neither table, with
all its modifiers, raises PtxError: nothing is ignored.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic as a
from .memory import SHARED_STRIDE
from .program import TYPES, Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[["Machine", Instruction, int], "np.ndarray | int | None"]
UNKNOWN = "the interpreter does not know this instruction"

# Instructions that compute each thread's result from its operands: opcode -> (function, types of operands, of result).
ELEMENTWISE: dict[str, tuple[Callable, list[str], str]] = {}
INTEGER, FLOAT, BITS = "s16 s32 s64 u16 u32 u64", "f32 f64", "b16 b32 b64"
NUMBER = f"{INTEGER} {FLOAT}"


def define(names: str, kinds: str, function: Callable, operands: str = "* *", result: str = "*") -> None:
    """Adds ``name.kind`` for every name and kind; ``*`` stands for the kind."""
    for name in names.split():
        for kind in kinds.split():
            types = [kind if x == "*" else x for x in operands.split()]
            ELEMENTWISE[f"{name}.{kind}"] = (function, types, kind if result == "*" else result)


define("add add.rn", NUMBER, np.add)
define("sub sub.rn", NUMBER, np.subtract)
define("add.rz", "f32", a.add_toward_zero)
define("mul mul.rn", FLOAT, np.multiply)
define("mul.lo", INTEGER, np.multiply)
for kind, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
    define("mul.wide", kind, lambda x, y, t=TYPES[wide]: np.multiply(x, y, dtype=t), result=wide)
    define("mad.wide", kind, lambda x, y, z: np.multiply(x, y, dtype=z.dtype) + z, f"* * {wide}", wide)
define("mad.lo", INTEGER, lambda x, y, z: x * y + z, "* * *")
define("fma.rn", FLOAT, a.fma, "* * *")
define("div", INTEGER, a.divide)
define("div.rn", FLOAT, np.divide)
define("rem", "u32", np.remainder)
define("min", NUMBER, np.fmin)  # of a number and a NaN the number
define("max", NUMBER, np.fmax)
define("copysign", FLOAT, lambda sign, magnitude: np.copysign(magnitude, sign))
define("neg", "f16x2 bf16x2", lambda x: x ^ np.uint32(0x8000_8000), "b32", "b32")
define("abs", FLOAT, np.abs, "*")
define("neg", f"s32 s64 {FLOAT}", np.negative, "*")
define("rcp.rn", FLOAT, np.reciprocal, "*")
define("rcp.approx.ftz", "f32", a.flushed(a.rcp), "*")
define("rcp.approx.ftz", "f64", a.flushed(a.reciprocal_of_high_word), "*")
define("ex2.approx", "f32", a.ex2, "*")
define("ex2.approx.ftz", "f32", a.flushed(a.ex2), "*")
define("div.full", "f32", a.div_full)
define("fma.rn.ftz", "f32", a.flushed(a.fma), "* * *")
define("abs.ftz", "f32", a.flushed(np.abs), "*")
define("and", f"{BITS} pred", np.bitwise_and)
define("or", f"{BITS} pred", np.bitwise_or)
define("xor", f"{BITS} pred", np.bitwise_xor)
define("not", f"{BITS} pred", np.invert, "*")
define("shl", BITS, lambda x, n: x << n.astype(x.dtype), "* u32")  # by the width or more: zeros, or copies of the sign
define("shr", f"{INTEGER} {BITS}", lambda x, n: x >> n.astype(x.dtype), "* u32")
define("bfi", "b32 b64", lambda x, y, at, n: y ^ (y ^ x << at.astype(x.dtype)) & a.mask(y, at, n), "* * u32 u32")
define("bfe", "u32", lambda x, at, n: (x & a.mask(x, at, n)) >> at, "* u32 u32")
define("bfe", "s32", lambda x, at, n: (np.int64(x) >> at << 64 - n >> 64 - n).astype(np.int32), "* u32 u32")  # n <= 64
define("mov", f"{BITS} u16 u32 u64 {FLOAT} pred", lambda x: x, "*")
define("cvta.to.global cvta.global", "u64", lambda x: x, "*")  # global addresses are generic addresses
define("selp", f"{BITS} {NUMBER}", lambda x, y, p: np.where(p, x, y), "* * pred")

# Comparisons. The ordered ones are false if an operand is NaN, those with a "u" (equ, ltu, ...) are true.
for compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
    name = f"setp.{compare.__name__}"
    define(name, f"{INTEGER} {BITS}", compare, result="pred")
    define(name, FLOAT, lambda x, y, f=compare: f(x, y) & ~a.unordered(x, y), result="pred")
    define(f"{name}u", FLOAT, lambda x, y, f=compare: f(x, y) | a.unordered(x, y), result="pred")
define("setp.nan", FLOAT, a.unordered, result="pred")
define("setp.num", FLOAT, lambda x, y: ~a.unordered(x, y), result="pred")

# Conversions, cvt.to.from. The first operand of a packed one becomes the upper half.
CASTS = {f"{INTEGER} u8 s8": INTEGER, INTEGER: "rn.f32 rn.f64", "f16": "f32", "f32": "f64 rn.f16", "f64": "rn.f32"}
for kinds, to in [(kinds, to) for kinds, results in CASTS.items() for to in results.split()]:
    kind = to.removeprefix("rn.")
    define(f"cvt.{to}", kinds, lambda x, kind=kind: x.astype(TYPES[kind]), "*", kind)
define("cvt.f32", "bf16", a.from_bf16, "*", "f32")
define("cvt.rn.bf16", "f32", a.to_bf16, "*", "bf16")
for kind, bits in (("bf16x2", a.to_bf16), ("f16x2", lambda x: x.astype("f2").view("u2"))):
    define(f"cvt.rn.{kind}", "f32", lambda x, y, bits=bits: bits(x) * np.uint32(1 << 16) | bits(y), result="b32")
define("max", "bf16x2", a.by_halves(a.from_bf16, a.to_bf16), "b32 b32", "b32")
define("max", "f16x2", a.by_halves(lambda x: x.view("f2"), lambda x: x), "b32 b32", "b32")


def find(instruction: Instruction) -> Run:
    opcode = ".".join(instruction.opcode)
    if opcode in ELEMENTWISE and "{" not in instruction.text:
        return run_elementwise
    for pattern, family in FAMILIES.items():
        if re.fullmatch(pattern, opcode):
            return family
    raise PtxError(UNKNOWN)


def run_elementwise(machine: Machine, instruction: Instruction, position: int) -> None:
    function, kinds, kind = ELEMENTWISE[".".join(instruction.opcode)]
    out, *inputs = instruction.operands
    result = function(*[machine.read(*operand) for operand in zip(inputs, kinds, strict=True)])
    assert result.dtype == TYPES[kind], f"{function} returns {result.dtype}"
    machine.put(out, result)


def names_of(operand: str) -> list[str]:
    """Returns the registers of ``{%r1, %r2}``, or the one register."""
    return re.findall(r"[^\s{},]+", operand)


def address(machine: Machine, operand: str, space: str) -> np.ndarray:
    """Computes ``[base + offset]`` as generic addresses, one per thread."""
    match = re.fullmatch(r"\[([$%\w]+)(?:\+(-?\d+))?\]", operand)
    if match is None:
        raise PtxError(f"the interpreter does not know the address {operand}")
    bits = machine.program.registers.get(match[1])
    base = machine.read(match[1], "u64" if bits is None or bits.itemsize == 8 else "u32")
    generic = (base + np.int64(match[2] or 0).astype(base.dtype)).astype(np.uint64)  # a 32-bit sum wraps around
    return generic + machine.window[machine.at] if space == "shared" else generic


def run_pack(machine: Machine, instruction: Instruction, position: int) -> None:
    """``mov.b64 {%r1, %r2}, %rd1`` and its inverse: the first element holds the lowest bits."""
    out, value = map(names_of, instruction.operands)
    to, kind = (f"b{int(instruction.opcode[1][1:]) // len(names)}" for names in (out, value))
    machine.put_vector(out, machine.read_vector(value, kind).view(TYPES[to]))


def run_mapa(machine: Machine, instruction: Instruction, position: int) -> None:
    """The generic address of the same byte of shared memory in another block of the cluster."""
    mine, rank = (machine.read(name, "u64") for name in instruction.operands[1:])
    if (rank >= machine.launch.cluster).any():
        raise PtxError(f"mapa: a cluster of {machine.launch.cluster} has no block {rank.max()}")
    distance = (rank - machine.read("%cluster_ctarank", "u64")) * np.uint64(SHARED_STRIDE)  # wraps around below 0
    machine.put(instruction.operands[0], mine + distance)


def run_access(machine: Machine, instruction: Instruction, position: int) -> None:
    """A load or a store of one, two or four elements by each thread."""
    opcode, memory = instruction.opcode, machine.memory
    registers, where = instruction.operands if opcode[0] == "ld" else reversed(instruction.operands)
    kind, names = opcode[-1], names_of(registers)
    if len(names) > 1 and f"v{len(names)}" not in opcode:
        raise PtxError(UNKNOWN)
    space = next((part for part in opcode if part in ("global", "shared", "param")), "generic")
    size = TYPES[kind].itemsize * len(names)
    accesses = memory.locate(address(machine, where, space), size, space, machine.at)
    if opcode[0] == "ld":
        machine.put_vector(names, memory.load(accesses).view(TYPES[kind]))
    else:
        memory.store(accesses, machine.read_vector(names, kind).view(np.uint8))


def run_atomic(machine: Machine, instruction: Instruction, position: int) -> None:
    """An atomic sum that releases, or a load that acquires, of one 4-byte word at GPU scope."""
    out, where, *value = instruction.operands
    at = address(machine, where, "generic")
    if (at != at[0]).any():
        raise PtxError("the interpreter does not know an atomic access to several addresses at once")
    machine.order.atomic(machine.at, int(at[0]), release=bool(value))
    word = machine.memory.locate(at[:1], 4, "generic", machine.at[:1])
    old = np.repeat(machine.memory.load(word, atomic=True).view(np.uint32), len(at))
    for operand in value:  # one thread after another
        sums = old + np.cumsum(machine.read(operand, "u32"), dtype=np.uint32)
        machine.memory.store(word, sums[-1:].view(np.uint8), atomic=True)
        old[1:] = sums[:-1]
    machine.put(out, old)


def run_cp_async(machine: Machine, instruction: Instruction, position: int) -> None:
    """Asynchronous copies to shared memory: they arrive when the thread waits for their commit group."""
    operands, kind = instruction.operands, instruction.opcode[2]
    if kind == "commit_group":
        machine.commit_group[machine.at] += 1
    elif kind == "wait_group":
        machine.finish_copies(int(operands[0]))
    elif operands[3:] in ((), operands[2:3]):
        target, origin = address(machine, operands[0], "shared"), address(machine, operands[1], "global")
        machine.start_copies(target, origin, int(operands[2]))
    else:  # a copy that fills up with zeros
        raise PtxError(UNKNOWN)


def run_barrier(machine: Machine, instruction: Instruction, position: int) -> np.ndarray | None:
    """Barriers of a warp and of a block, and the two halves of a cluster's barrier."""
    opcode, order, warp = instruction.opcode, machine.order, "warp" in instruction.opcode
    if "arrive" in opcode:
        machine.parked[order.arrive(machine.at, "relaxed" not in opcode)] = False  # threads that wait look again
        return None
    if "wait" in opcode:
        return machine.park(position, order.wait(machine.at))
    if instruction.operands != ("-1" if warp else "0",):
        raise PtxError(UNKNOWN)
    size = 32 if warp else machine.launch.threads
    complete = machine.all_here(size)
    for group in machine.at[complete].reshape(-1, size):
        order.acquire(group, order.release(group))
    return machine.park(position, complete)


def in_warps(function: Callable[[Machine, Instruction], None]) -> Run:
    """Returns a function that runs ``function`` for threads whose whole warp is here; the others wait."""

    def run(machine: Machine, instruction: Instruction, position: int) -> np.ndarray:
        everyone, complete = machine.at, machine.all_here(32)
        machine.at = everyone[complete]
        if machine.at.size:
            function(machine, instruction)
        machine.at = everyone
        return machine.park(position, complete)

    return run


@in_warps
def run_shfl(machine: Machine, instruction: Instruction) -> None:
    out, *inputs = instruction.operands
    values, lanes, clamp, members = (machine.read(x, "u32").reshape(-1, 32) for x in inputs)
    if np.any(clamp != 31) or np.any(members != 0xFFFFFFFF):
        raise PtxError("the interpreter does not know a shuffle of a part of a warp")
    origin = np.arange(32) ^ lanes if "bfly" in instruction.opcode else lanes
    result, *valid = out.split("|")
    machine.put(result, np.take_along_axis(values, origin % 32, 1).ravel())
    machine.put_vector(valid, np.ones((machine.at.size, 1), bool))


@in_warps
def run_matrix(machine: Machine, instruction: Instruction) -> None:
    """Loads or stores matrices of 8 rows of 16 bytes of shared memory.

    Lanes 8k to 8k + 7 of a warp hold the addresses of the rows of matrix k, and each lane 4 bytes of each matrix.
    """
    load, memory = instruction.opcode[0] == "ldmatrix", machine.memory
    registers, where = instruction.operands if load else reversed(instruction.operands)
    names = names_of(registers)
    row = machine.at % 32 < 8 * len(names)
    accesses = memory.locate(address(machine, where, "shared")[row], 16, "shared", machine.at[row])
    if load:
        matrices = memory.load(accesses).view(np.uint16).reshape(-1, 8, 8)
        matrices = matrices.swapaxes(1, 2).copy() if "trans" in instruction.opcode else matrices
        words = matrices.view(np.uint32).reshape(-1, len(names), 32).swapaxes(1, 2)
        machine.put_vector(names, words.reshape(-1, len(names)))
    else:
        words = machine.read_vector(names, "b32").reshape(-1, 32, len(names)).swapaxes(1, 2)
        memory.store(accesses, words.reshape(-1, 4).view(np.uint8))


# The other instructions: regular expression of the opcode -> function.
_VECTOR = r"(\.v[24])?\.[bufs](8|16|32|64)"
FAMILIES: dict[str, Run] = {
    rf"ld(\.global|\.shared|\.param)?(\.nc|\.c[agsv]|\.lu)?{_VECTOR}": run_access,
    rf"st(\.global|\.shared)?(\.wb|\.c[gs]|\.wt)?{_VECTOR}": run_access,
    r"mov\.b(32|64)": run_pack,
    r"atom\.add\.release\.gpu\.u32|ld\.acquire\.gpu\.u32": run_atomic,
    r"cvta\.shared\.u64": lambda m, it, at: m.put(it.operands[0], m.read(it.operands[1], "u64") + m.window[m.at]),
    r"mapa\.u64": run_mapa,
    r"cp\.async\.(commit_group|wait_group|c[ag]\.shared\.global)": run_cp_async,
    r"bra(\.uni)?": lambda m, it, at: m.program.labels[it.operands[0]],
    r"ret": lambda m, it, at: m.leave(),
    r"trap": lambda m, it, at: m.memory.require(np.zeros(1, bool), m.at, lambda i: "traps"),
    r"bar(\.warp)?\.sync|barrier\.sync|barrier\.cluster\.(arrive(\.release|\.relaxed)?|wait(\.acquire)?)": run_barrier,
    r"shfl\.sync\.(bfly|idx)\.b32": run_shfl,
    r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": run_matrix,
    r"stmatrix\.sync\.aligned\.m8n8\.x[124]\.shared\.b16": run_matrix,
}
