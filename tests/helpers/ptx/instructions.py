"""The instructions of PTX that the interpreter knows.

``bind`` makes a function of an instruction, once per launch. Called with the position of the instruction, it runs the
instruction for the threads of ``machine.at``. It returns None, or where these threads continue. An opcode that is in
neither table, with all its modifiers, raises PtxError: nothing is ignored.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic as a
from .memory import SHARED, SHARED_STRIDE
from .program import TYPES, Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[[int], "np.ndarray | int | None"]

# Instructions that compute each thread's result from its operands: opcode -> (function, types of operands, of result).
ELEMENTWISE: dict[str, tuple[Callable, list[str], str]] = {}
INTEGER, FLOAT, BITS = "s16 s32 s64 u16 u32 u64", "f32 f64", "b16 b32 b64"


def define(names: str, kinds: str, function: Callable, operands: str = "* *", result: str = "*") -> None:
    """Adds ``name.kind`` for every name and kind; ``*`` stands for the kind."""
    for name in names.split():
        for kind in kinds.split():
            types = [kind if x == "*" else x for x in operands.split()]
            ELEMENTWISE[f"{name}.{kind}"] = (function, types, kind if result == "*" else result)


define("add", f"{INTEGER} {FLOAT}", np.add)
define("sub", f"{INTEGER} {FLOAT}", np.subtract)
define("add.rn", FLOAT, np.add)
define("sub.rn", FLOAT, np.subtract)
define("add.rz", "f32", a.add_toward_zero)
define("mul mul.rn", FLOAT, np.multiply)
define("mul.lo", INTEGER, np.multiply)
define("mul.wide", "s32", lambda x, y: np.int64(x) * np.int64(y), result="s64")
define("mul.wide", "u32", lambda x, y: np.uint64(x) * np.uint64(y), result="u64")
define("mad.wide", "s32", lambda x, y, z: np.int64(x) * np.int64(y) + z, "* * s64", "s64")
define("mad.wide", "u32", lambda x, y, z: np.uint64(x) * np.uint64(y) + z, "* * u64", "u64")
define("mad.lo", INTEGER, lambda x, y, z: x * y + z, "* * *")
define("fma.rn", FLOAT, a.fma, "* * *")
define("div", INTEGER, a.divide)
define("div.rn", FLOAT, np.divide)
define("rem", "u32", np.remainder)
define("min", f"{INTEGER} {FLOAT}", np.fmin)  # of a number and a NaN the number
define("max", f"{INTEGER} {FLOAT}", np.fmax)
define("max", "bf16x2", a.by_halves(a.from_bf16, a.to_bf16), "b32 b32", "b32")
define("max", "f16x2", a.by_halves(a.from_f16, a.to_f16), "b32 b32", "b32")
define("copysign", FLOAT, lambda sign, magnitude: np.copysign(magnitude, sign))
define("abs", FLOAT, np.abs, "*")
define("neg", f"s32 s64 {FLOAT}", np.negative, "*")
define("rcp.rn", FLOAT, np.reciprocal, "*")
define("rcp.approx.ftz", "f32", a.flushed(a.rcp), "*")
define("rcp.approx.ftz", "f64", a.reciprocal_of_high_word, "*")
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
define("bfi", "b32 b64", a.insert_bits, "* * u32 u32")
define("bfe", "u32", a.extract_bits, "* u32 u32")
define("mov", f"{BITS} u16 u32 u64 {FLOAT} pred", lambda x: x, "*")
define("cvta.to.global cvta.global", "u64", lambda x: x, "*")  # global addresses are generic addresses
define("selp", f"{BITS} {INTEGER} {FLOAT}", lambda x, y, p: np.where(p, x, y), "* * pred")

# Comparisons. The ordered ones are false if an operand is NaN, those with a "u" (equ, ltu, ...) are true.
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    compare = getattr(operator, name)
    define(f"setp.{name}", f"{INTEGER} {BITS}", compare, result="pred")
    define(f"setp.{name}", FLOAT, lambda x, y, f=compare: f(x, y) & ~a.unordered(x, y), result="pred")
    define(f"setp.{name}u", FLOAT, lambda x, y, f=compare: f(x, y) | a.unordered(x, y), result="pred")
define("setp.nan", FLOAT, a.unordered, result="pred")
define("setp.num", FLOAT, lambda x, y: ~a.unordered(x, y), result="pred")

# Conversions, cvt.to.from. The first operand of a packed one becomes the upper half.
for to in INTEGER.split():
    define(f"cvt.{to}", f"{INTEGER} u8 s8", lambda x, to=to: x.astype(TYPES[to]), "*", to)
for to in FLOAT.split():
    define(f"cvt.rn.{to}", "s32 s64 u32 u64", lambda x, to=to: x.astype(TYPES[to]), "*", to)
define("cvt.f32", "f16", lambda x: x.astype("f4"), "*", "f32")
define("cvt.f64", "f32", lambda x: x.astype("f8"), "*", "f64")
define("cvt.rn.f32", "f64", lambda x: x.astype("f4"), "*", "f32")
define("cvt.f32", "bf16", a.from_bf16, "*", "f32")
define("cvt.rn.bf16", "f32", a.to_bf16, "*", "bf16")
define("cvt.rn.f16", "f32", lambda x: x.astype("f2"), "*", "f16")
define("cvt.rn.bf16x2", "f32", lambda x, y: np.uint32(a.to_bf16(x)) << np.uint32(16) | a.to_bf16(y), result="b32")
define("cvt.rn.f16x2", "f32", lambda x, y: np.uint32(a.to_f16(x)) << np.uint32(16) | a.to_f16(y), result="b32")


def bind(machine: Machine, instruction: Instruction) -> Run:
    """Returns a function that runs the instruction."""
    opcode, operands = ".".join(instruction.opcode), instruction.operands
    if opcode in ("mov.b32", "mov.b64") and "{" in "".join(operands):
        return bind_pack(machine, instruction)
    if opcode in ELEMENTWISE:
        function, kinds, result = ELEMENTWISE[opcode]
        return bind_elementwise(machine, operands, function, kinds, result)
    for pattern, family in FAMILIES.items():
        if re.fullmatch(pattern, opcode):
            return family(machine, instruction)
    raise unknown(instruction)


def unknown(instruction: Instruction) -> PtxError:
    return PtxError(f"the interpreter does not know the instruction {'.'.join(instruction.opcode)}")


def source(machine: Machine, operand: str, kind: str) -> Callable[[], np.ndarray]:
    """Returns a function that reads an operand as numbers of a PTX type, one per thread."""
    dtype = TYPES[kind]
    if operand in machine.special:
        values = machine.special[operand]
        return lambda: values[machine.at].astype(dtype)
    if machine.program.register_type(operand) is None:
        value = constant(machine, operand, dtype)
        return lambda: np.full(machine.at.shape, value)

    def read():
        bits = machine.get(operand)
        if bits.dtype.itemsize != dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")  # an instruction may read the lower part of a register
        return bits.view(dtype)

    return read


def constant(machine: Machine, operand: str, dtype: np.dtype):
    """Reads a literal or the address of a symbol as a number of type ``dtype``."""
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
        return np.array(int(match[1], 16), f"u{len(match[1]) // 2}").view(dtype)[()]
    if operand in machine.program.shared:
        return dtype.type(0)  # an address within the block's shared memory
    if operand in machine.program.parameters:
        return dtype.type(machine.arguments.ctypes.data + machine.program.parameters[operand])
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand) and dtype.kind in "uib":
        return np.array(int(operand, 0) & (1 << 64) - 1, np.uint64).astype(dtype)[()]
    raise PtxError(f"the interpreter does not know the operand {operand}")


def address(machine: Machine, operand: str, space: str) -> Callable[[], np.ndarray]:
    """Returns a function that computes ``[base + offset]`` as generic addresses, one per thread."""
    match = re.fullmatch(r"\[([$%\w]+)(?:\+(-?\d+))?\]", operand)
    if match is None:
        raise PtxError(f"the interpreter does not know the address {operand}")
    bits = machine.program.register_type(match[1])
    width = "u64" if bits is None or bits.itemsize == 8 else "u32"
    base = source(machine, match[1], width)
    offset = np.int64(int(match[2] or 0)).astype(TYPES[width])

    def read():
        generic = (base() + offset).astype(np.uint64)  # the sum of a 32-bit address wraps around
        return generic + shared_window(machine) if space == "shared" else generic

    return read


def shared_window(machine: Machine) -> np.ndarray:
    """Returns the generic address at which the shared memory of each thread's block starts."""
    return np.uint64(SHARED + machine.block[machine.at] * SHARED_STRIDE)


def bind_elementwise(machine: Machine, operands, function, kinds: list[str], kind: str) -> Run:
    out, *inputs = operands
    if len(inputs) != len(kinds):
        raise PtxError(f"expected {len(kinds)} operands, found {inputs}")
    readers = [source(machine, operand, k) for operand, k in zip(inputs, kinds)]

    def run(position: int) -> None:
        result = function(*[read() for read in readers])
        assert result.dtype == TYPES[kind], f"{function} returns {result.dtype}"
        machine.put(out, result)

    return run


def bind_pack(machine: Machine, instruction: Instruction) -> Run:
    """``mov.b64 {%r1, %r2}, %rd1`` and its inverse: the first element holds the lowest bits."""
    out, value = instruction.operands
    kind = instruction.opcode[1]
    parts = re.findall(r"[^\s{},]+", out if "{" in out else value)
    part = f"b{int(kind[1:]) // len(parts)}"
    if "{" not in out:
        readers = [source(machine, name, part) for name in parts]
        return lambda position: machine.put(out, np.stack([read() for read in readers], 1).view(TYPES[kind])[:, 0])
    read = source(machine, value, kind)

    def unpack(position: int) -> None:
        bits = np.ascontiguousarray(read()).view(TYPES[part]).reshape(-1, len(parts))
        for i, name in enumerate(parts):
            machine.put(name, bits[:, i])

    return unpack


def bind_cvta_shared(machine: Machine, instruction: Instruction) -> Run:
    return bind_elementwise(machine, instruction.operands, lambda x: x + shared_window(machine), ["u64"], "u64")


def bind_mapa(machine: Machine, instruction: Instruction) -> Run:
    """The generic address of the same byte of shared memory in another block of the cluster."""

    def map_address(mine, rank):
        if (rank >= machine.launch.cluster).any():
            raise PtxError(f"mapa: a cluster of {machine.launch.cluster} has no block {rank.max()}")
        distance = np.int64(rank) - np.int64(machine.special["%cluster_ctarank"][machine.at])
        return mine + np.uint64(distance * SHARED_STRIDE)

    return bind_elementwise(machine, instruction.operands, map_address, ["u64", "u32"], "u64")


def bind_access(machine: Machine, instruction: Instruction) -> Run:
    """A load or a store of one, two or four elements by each thread."""
    opcode, memory = instruction.opcode, machine.memory
    kind, load = opcode[-1], opcode[0] == "ld"
    registers, where = instruction.operands if load else reversed(instruction.operands)
    names = re.findall(r"[^\s{},]+", registers)
    space = next((part for part in opcode if part in ("global", "shared", "param")), "generic")
    find, size = address(machine, where, space), TYPES[kind].itemsize * len(names)
    readers = [] if load else [source(machine, name, kind) for name in names]
    if f"v{len(names)}" not in opcode and len(names) > 1:
        raise unknown(instruction)

    def run(position: int) -> None:
        accesses = memory.locate(find(), size, space, machine.at)
        if load:
            values = memory.load(accesses).view(TYPES[kind])
            for i, name in enumerate(names):
                machine.put(name, values[:, i])
        else:
            memory.check_write(accesses)
            memory.store(accesses, np.stack([read() for read in readers], 1).view(np.uint8))

    return run


def bind_atomic(machine: Machine, instruction: Instruction) -> Run:
    """An atomic sum that releases, or a load that acquires, of one 4-byte word at GPU scope."""
    out, where, *value = instruction.operands
    find, readers = address(machine, where, "generic"), [source(machine, x, "u32") for x in value]

    def run(position: int) -> None:
        at = find()
        if (at != at[0]).any():
            raise PtxError("the interpreter does not know an atomic access to several addresses at once")
        machine.order.atomic(machine.at, int(at[0]), release=bool(readers))
        word = machine.memory.locate(at[:1], 4, "generic", machine.at[:1])
        old = np.repeat(machine.memory.load(word, atomic=True).view(np.uint32), len(at))
        for read in readers:  # one thread after another
            sums = old + np.cumsum(read(), dtype=np.uint32)
            machine.memory.store(word, sums[-1:].view(np.uint8))
            old[1:] = sums[:-1]
        machine.put(out, old)

    return run


def bind_cp_async(machine: Machine, instruction: Instruction) -> Run:
    """Asynchronous copies to shared memory: they arrive when the thread waits for their commit group."""
    operands, kind = instruction.operands, instruction.opcode[2]
    if kind == "commit_group":
        return lambda position: np.add.at(machine.commit_group, machine.at, 1)
    if kind == "wait_group":
        return lambda position: machine.finish_copies(int(operands[0]))
    if operands[3:] not in ((), operands[2:3]):  # a copy that fills up with zeros
        raise unknown(instruction)
    target, origin = address(machine, operands[0], "shared"), address(machine, operands[1], "global")
    return lambda position: machine.start_copies(target(), origin(), int(operands[2]))


def bind_trap(machine: Machine, instruction: Instruction) -> Run:
    return lambda position: machine.memory.require(np.zeros(1, bool), machine.at, lambda i: "traps")


def bind_barrier(machine: Machine, instruction: Instruction) -> Run:
    """Barriers of a warp and of a block, and the two halves of a cluster's barrier."""
    if "arrive" in instruction.opcode:
        return lambda position: machine.arrive_at_cluster(release="relaxed" not in instruction.opcode)
    if "wait" in instruction.opcode:
        return machine.wait_for_cluster
    warp = "warp" in instruction.opcode
    if instruction.operands != ("-1" if warp else "0",):
        raise unknown(instruction)
    return lambda position: machine.synchronise(position, 32 if warp else machine.launch.threads)


def in_warps(machine: Machine, function: Callable[[], None]) -> Run:
    """Returns a function that runs ``function`` for threads whose whole warp is here; the others wait."""

    def run(position: int) -> np.ndarray:
        everyone, complete = machine.at, machine.all_here(32)
        machine.select(everyone[complete])
        if machine.at.size:
            function()
        machine.select(everyone)
        return machine.park(position, complete)

    return run


def bind_shfl(machine: Machine, instruction: Instruction) -> Run:
    out, *inputs = instruction.operands
    value, lane, clamp, members = (source(machine, x, "u32") for x in inputs)

    def shuffle() -> None:
        if np.any(clamp() != 31) or np.any(members() != 0xFFFFFFFF):
            raise PtxError("the interpreter does not know a shuffle of a part of a warp")
        values, lanes = value().reshape(-1, 32), lane().reshape(-1, 32)
        origin = np.arange(32) ^ lanes if "bfly" in instruction.opcode else lanes
        result, *valid = out.split("|")
        machine.put(result, np.take_along_axis(values, origin % 32, 1).ravel())
        for predicate in valid:
            machine.put(predicate, np.ones(machine.at.shape, bool))

    return in_warps(machine, shuffle)


def bind_matrix(machine: Machine, instruction: Instruction) -> Run:
    """Loads or stores matrices of 8 rows of 16 bytes of shared memory.

    Lanes 8k to 8k + 7 of a warp hold the addresses of the rows of matrix k, and each lane 4 bytes of each matrix.
    """
    load, memory = instruction.opcode[0] == "ldmatrix", machine.memory
    registers, where = instruction.operands if load else reversed(instruction.operands)
    names, find = re.findall(r"%\w+", registers), address(machine, where, "shared")
    readers = [] if load else [source(machine, name, "b32") for name in names]

    def move() -> None:
        row = machine.at % 32 < 8 * len(names)
        accesses = memory.locate(find()[row], 16, "shared", machine.at[row])
        if load:
            matrices = memory.load(accesses).view(np.uint16).reshape(-1, 8, 8)
            matrices = matrices.swapaxes(1, 2).copy() if "trans" in instruction.opcode else matrices
            words = matrices.view(np.uint32).reshape(-1, len(names), 32)
            for k, name in enumerate(names):
                machine.put(name, words[:, k].ravel())
        else:
            words = np.stack([read().reshape(-1, 32) for read in readers], 1)
            memory.check_write(accesses)
            memory.store(accesses, words.reshape(-1, 4).view(np.uint8))

    return in_warps(machine, move)


# The other instructions: regular expression of the opcode -> function of the machine and the instruction.
_VECTOR = r"(\.v[24])?\.[bufs](8|16|32|64)"
FAMILIES = {
    rf"ld(\.global|\.shared|\.param)?(\.nc|\.c[agsv]|\.lu)?{_VECTOR}": bind_access,
    rf"st(\.global|\.shared)?(\.wb|\.c[gs]|\.wt)?{_VECTOR}": bind_access,
    r"atom\.add\.release\.gpu\.u32|ld\.acquire\.gpu\.u32": bind_atomic,
    r"cvta\.shared\.u64": bind_cvta_shared,
    r"mapa\.u64": bind_mapa,
    r"cp\.async\.(commit_group|wait_group|c[ag]\.shared\.global)": bind_cp_async,
    r"bra(\.uni)?": lambda m, it: lambda position: m.program.labels[it.operands[0]],
    r"ret": lambda m, it: lambda position: m.leave(),
    r"trap": bind_trap,
    r"bar(\.warp)?\.sync|barrier\.sync|barrier\.cluster\.(arrive(\.release|\.relaxed)?|wait(\.acquire)?)": bind_barrier,
    r"shfl\.sync\.(bfly|idx)\.b32": bind_shfl,
    r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": bind_matrix,
    r"stmatrix\.sync\.aligned\.m8n8\.x[124]\.shared\.b16": bind_matrix,
}
