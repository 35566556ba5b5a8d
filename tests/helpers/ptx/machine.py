"""Executes a PTX kernel: all threads of a launch at once, each instruction by numpy over the threads that are at it."""

from __future__ import annotations

import re

import numpy as np

from .instructions import find
from .memory import SHARED, SHARED_STRIDE, Accesses, Memory, Range
from .order import Launch, Order
from .program import TYPES, Program, PtxError

MAX_STEPS = 2_000_000


class Machine:
    """Registers and memory of one launch, and where its threads are.

    Threads run by the rule "lowest instruction first": the threads at the lowest instruction of all run together until
    they branch, wait, or come to the instruction at which other threads are. So threads that a branch has parted meet
    again where their paths join. An instruction that needs other threads (a barrier, a shuffle) parks its threads until
    all of them are there.

    Attributes:
        at: indices of the threads that the current instruction runs for.
        window: the generic address at which the shared memory of each thread's block starts.
    """

    def __init__(self, program: Program, launch: Launch, ranges: list[Range], arguments: bytes):
        if launch.threads > program.max_threads or launch.threads % 32:
            raise PtxError(f"{program.name} cannot run with {launch.threads} threads a block")
        self.program, self.launch, self.order = program, launch, Order(launch)
        self.count = launch.blocks * launch.threads
        self.at = np.arange(self.count)
        self.block = self.at // launch.threads
        self.window = np.uint64(SHARED) + self.block.astype(np.uint64) * np.uint64(SHARED_STRIDE)

        # The kernel's memory, that of its blocks, its arguments, and the word that a grid-wide barrier uses.
        self.arguments, self.word = np.frombuffer(arguments, np.uint8), np.zeros(2, np.uint64)
        own = [
            Range("the arguments", self.arguments.ctypes.data, len(arguments), "param"),
            Range("the grid's barrier", self.word.ctypes.data, 16, writable=True),
        ]
        for b in range(launch.blocks if launch.shared_bytes else 0):
            start = SHARED + b * SHARED_STRIDE
            own.append(Range(f"block {b}'s shared memory", start, launch.shared_bytes, "shared", False, True))
        self.memory = Memory([*ranges, *own], self.order)
        self.registers = self.special_registers()
        program.registers.update(dict.fromkeys(self.registers, np.dtype("u4")))

        # Asynchronous copies on their way: (targets, sources, commit group of each thread).
        self.copies: list[tuple[Accesses, Accesses, np.ndarray]] = []
        self.commit_group = np.zeros(self.count, np.int64)

        # The next instruction of each thread, and whether the thread waits there or has left.
        self.next = np.zeros(self.count, np.int64)
        self.parked, self.exited = np.zeros((2, self.count), bool)
        self.code = [self.located(i, find, instruction) for i, instruction in enumerate(program.instructions)]

    def special_registers(self) -> dict[str, np.ndarray]:
        launch, word = self.launch, self.word.ctypes.data * self.launch.cooperative
        values = {
            **{f"%{name}.{axis}": name[0] == "n" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "yz"},
            **{"%tid.x": self.at % launch.threads, "%ntid.x": launch.threads, "%laneid": self.at % 32},
            **{"%ctaid.x": self.block, "%nctaid.x": launch.blocks},
            **{"%cluster_ctarank": self.block % launch.cluster, "%cluster_nctarank": launch.cluster},
            **{"%envreg1": word >> 32, "%envreg2": word & 0xFFFFFFFF},
        }
        return {name: np.broadcast_to(np.uint32(value), self.count) for name, value in values.items()}

    def located(self, position: int, function, *arguments):
        """Calls a function; an error gets the place in the program."""
        try:
            return function(*arguments)
        except PtxError as error:
            raise PtxError(f"{self.program.name}, {self.program.instructions[position].text}: {error}") from None

    # ---- Control flow ----

    def run(self) -> None:
        """Runs all threads to their end, and writes the results to the host's memory; raises PtxError for any fault."""
        steps = 0
        with np.errstate(all="ignore"):
            while not self.exited.all():
                staying = self.next[~self.exited]
                ready = self.next[~(self.parked | self.exited)]
                if not ready.size:
                    places = {self.program.instructions[i].text for i in self.next[self.parked]}
                    raise PtxError(f"deadlock: {self.parked.sum()} of {self.count} threads wait for others at {places}")
                start = int(ready.min())
                if start == len(self.code):
                    raise PtxError(f"{self.program.name}: threads run past the last instruction")
                steps += self.run_from(start, int(min(staying[staying > start], default=len(self.code))))
                if steps > MAX_STEPS:
                    raise PtxError(f"{self.program.name}: not done after {steps} instructions")
        self.order.check_lifetimes()
        self.memory.copy_back()

    def run_from(self, start: int, stop: int) -> int:
        """Runs the threads at instruction ``start`` until they part, wait or reach ``stop``; returns the steps."""
        threads = np.flatnonzero((self.next == start) & ~self.exited)
        self.parked[threads] = False
        for position in range(start, stop):
            instruction = self.program.instructions[position]
            self.at = threads
            if guard := instruction.guard:
                self.at = threads[self.read(guard.lstrip("!"), "pred") != guard.startswith("!")]
                if not self.at.size:
                    continue
            following = self.located(position, self.code[position], self, instruction, position)
            if following is not None:
                self.next[threads] = position + 1
                self.next[self.at] = following
                return position + 1 - start
        self.next[threads] = stop
        return stop - start

    def park(self, position: int, complete: np.ndarray) -> np.ndarray:
        """Parks the threads that are not ``complete``; returns the next instruction of each thread."""
        self.parked[self.at[~complete]] = True
        return np.where(complete, position + 1, position)

    def all_here(self, size: int) -> np.ndarray:
        """Returns of which threads all ``size`` consecutive fellows (a warp, a block) are at this instruction."""
        return np.bincount(self.at // size, minlength=self.count // size)[self.at // size] == size

    def leave(self) -> int:
        self.exited[self.at] = True
        return len(self.code)

    # ---- Operands ----

    def read(self, operand: str, kind: str) -> np.ndarray:
        """Returns an operand as numbers of a PTX type, one per thread."""
        dtype = TYPES[kind]
        if operand not in self.program.registers:
            return np.full(self.at.shape, self.constant(operand, dtype))
        if operand not in self.registers:
            raise PtxError(f"{operand} is read before it is written")
        # An instruction may read the lower part of a register.
        return self.registers[operand][self.at].astype(f"u{dtype.itemsize}", copy=False).view(dtype)

    def read_vector(self, names: list[str], kind: str) -> np.ndarray:
        return np.stack([self.read(name, kind) for name in names], 1)

    def constant(self, operand: str, dtype: np.dtype):
        """Reads a literal or the address of a symbol as a number of type ``dtype``."""
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
            return np.array(int(match[1], 16), f"u{len(match[1]) // 2}").view(dtype)[()]
        if operand in self.program.shared:
            return dtype.type(0)  # an address within the block's shared memory
        if operand in self.program.parameters:
            return dtype.type(self.arguments.ctypes.data + self.program.parameters[operand])
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand) and dtype.kind in "uib":
            return np.array(int(operand, 0) & (1 << 64) - 1, np.uint64).astype(dtype)[()]
        raise PtxError(f"the interpreter does not know the operand {operand}")

    def put_vector(self, names: list[str], values: np.ndarray) -> None:
        """Writes the columns of ``values``, (threads, elements), to one register each."""
        for i, name in enumerate(names):
            self.put(name, values[:, i])

    def put(self, name: str, value: np.ndarray) -> None:
        """Writes a register; ``_`` stands for none. An integer of another width is cut, or extended by its sign."""
        if name == "_":
            return
        bits = self.program.registers.get(name)
        if bits is None:
            raise PtxError(f"{name} is not declared")
        if value.dtype.itemsize != bits.itemsize:
            value = value.astype(bits.str.replace("u", "i") if value.dtype.kind == "i" else bits)
        self.registers.setdefault(name, np.zeros(self.count, bits))[self.at] = value.view(bits)

    # ---- Asynchronous copies to shared memory ----

    def start_copies(self, target: np.ndarray, source: np.ndarray, size: int) -> None:
        """Starts copies. Until they arrive, their targets hold nothing."""
        targets = self.memory.locate(target, size, "shared", self.at)
        self.memory.check_write(targets)
        self.memory.initialised[targets.bytes] = False
        sources = self.memory.locate(source, size, "global", self.at)
        self.copies.append((targets, sources, self.commit_group[self.at]))

    def finish_copies(self, pending: int) -> None:
        """Lets all copies of these threads arrive but those of the last ``pending`` commit groups."""
        waiting = np.isin(np.arange(self.count), self.at)
        for targets, sources, group in self.copies:
            arrives = waiting[targets.threads] & (group < self.commit_group[targets.threads] - pending)
            target, source = (Accesses(*(x[arrives] for x in both)) for both in (targets, sources))
            self.memory.store(target, self.memory.load(source))
            group[arrives] = MAX_STEPS  # no thread commits more groups
        self.copies = [copy for copy in self.copies if (copy[2] < MAX_STEPS).any()]
