"""Looks for registers that machine code reads though nothing has written them: mistakes of the assembler itself.

ptxas 12.8.93, which triton 3.6 brings, drops the copy of a base address where the operands of two products in one loop lie
in the same shared memory: the descriptors of the second product's later steps are then computed from a register that
nothing wrote, its sums are wrong and its reads leave shared memory. The PTX is right, 12.9.86 and 13.0.88 assemble it
rightly, an interpreter of Triton never sees it; it shows as `UIADD3 UR46, UP0, UR46, 0x20, URZ` with no UR46 before it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P(\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_REGISTER = re.compile(r"\bUR(\d+)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)")
#: What writes its first operand, if that is a uniform register: all of the uniform datapath but these, and five others.
_WRITES = re.compile(r"(?!U\w*SETP|UPLOP3|UTMA|UBLK|UCGABAR|USETMAXREG)U|R2UR|S2UR|CS2UR|VOTEU|C?REDUX|LDCU")
_JUMPS = re.compile(r"BRA|BRX|JMP|CALL|BSSY|BREAK|WARPSYNC")
_ENDS = re.compile(r"BRA|BRX|JMP|EXIT|RET")


class Instruction(NamedTuple):
    """One line of a disassembly, as far as uniform registers are concerned."""

    address: int
    text: str
    reads: frozenset[int]
    writes: frozenset[int]
    target: int | None  # where it may jump to
    falls_through: bool


def undefined_reads(sass: str) -> list[str]:
    """The instructions of one kernel that read a uniform register which no path to them has written.

    Uniform registers hold what is the same in a warp: addresses, counters, and the descriptors of wgmma operands, which are
    named nowhere else. General registers are left out: ptxas reads them unwritten on purpose (halves of a PRMT).

    Args:
        sass: what `cuobjdump -sass` or `nvdisasm` print of a kernel.

    Returns:
        The text of each such instruction; empty for code that is right.

    Example:
        >>> undefined_reads("/*0010*/ UIADD3 UR46, UP0, UR46, 0x20, URZ ; /* 0x0 */\\n/*0020*/ EXIT ; /* 0x0 */")
        ['UIADD3 UR46, UP0, UR46, 0x20, URZ']
    """
    code = [_instruction(*found.groups()) for found in _LINE.finditer(sass)]
    position = {instruction.address: i for i, instruction in enumerate(code)}
    written: list[frozenset[int] | None] = [None] * len(code)  # by some path to the instruction; None: not reached
    waiting = [(0, frozenset[int]())] if code else []
    while waiting:
        i, reaching = waiting.pop()
        known = written[i]
        if known is not None and reaching <= known:
            continue
        written[i] = reaching if known is None else known | reaching
        after = written[i] | code[i].writes  # type: ignore[operator]
        if code[i].falls_through and i + 1 < len(code):
            waiting.append((i + 1, after))
        if code[i].target in position:
            waiting.append((position[code[i].target], after))  # type: ignore[index]
    return [code[i].text for i, known in enumerate(written) if known is not None and code[i].reads - known]


def _instruction(address: str, predicate: str | None, opcode: str, operands: str) -> Instruction:
    width = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
    registers = [(int(found[1]), found.start()) for found in _REGISTER.finditer(operands)]
    writes: set[int] = set()
    if registers and registers[0][1] == 0 and _WRITES.match(opcode):
        first = registers.pop(0)[0]
        writes = set(range(first, first + width))
    reads = {register for first, start in registers for register in _read_at(first, operands, start)}
    target = _TARGET.search(operands) if _JUMPS.match(opcode) else None
    return Instruction(
        int(address, 16),
        f"{opcode} {operands}",
        frozenset(reads),
        frozenset(writes),
        int(target[1], 16) if target else None,
        predicate is not None or not _ENDS.match(opcode),
    )


def _read_at(first: int, operands: str, start: int) -> range:
    """The registers behind a name: gdesc[…] is two descriptors of two each, of which the first is unused if A is in registers."""
    if operands[:start].endswith("gdesc["):
        return range(first + 2 * bool(re.match(r"U?R\d+, R\d+", operands)), first + 4)
    return range(first, first + 1)
