"""Counts of instructions in the inner loop of a compiled kernel, from NVIDIA's disassembler, which Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


# Integer arithmetic: what the units for whole numbers run.
_INTEGER = {
    *("BMSK", "FLO", "IABS", "IADD", "IADD3", "IMAD", "IMNMX", "ISETP", "LEA", "LOP", "LOP3", "POPC", "PRMT", "SEL"),
    *("SGXT", "SHF", "SHL", "SHR", "VIADD", "VIMNMX"),
}
_MATRIX = {"HMMA", "HGMMA", "IMMA", "QGMMA"}


def dump(tool: str, cubin: bytes, *options: str) -> str:
    """What one of NVIDIA's tools, which Triton brings, prints about machine code; `""` where there is no such tool."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            from triton import knobs

            command = [getattr(knobs.nvidia, tool).path, *options, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (AttributeError, OSError, RuntimeError, subprocess.CalledProcessError):
            return ""


def inner_loop(cubin: bytes) -> dict[str, int]:
    """What the largest loop around a matrix instruction holds, for each thread, of one turn.

    Returns:
        `loop` instructions, of them `integer` (arithmetic on whole numbers, moves left out) and `moves` (of a constant
        or a register into another one, which the compiler writes as a multiplication by zero). Empty where there is
        no disassembler or no such loop.
    """
    loop = _largest_loop(dump("nvdisasm", cubin, "-c"))
    if not loop:
        return {}
    moves = [line for line in loop if re.match(r"MOV |IMAD(\.MOV)?(\.U32)? \w+(\.reuse)?, RZ, RZ, ", line)]
    integer = sum(_name(line) in _INTEGER for line in loop) - sum(_name(line) == "IMAD" for line in moves)
    return {"loop": len(loop), "integer": integer, "moves": len(moves)}


def _name(line: str) -> str:
    return re.split(r"[. ]", line, maxsplit=1)[0]


def _largest_loop(text: str) -> list[str]:
    """Instructions from the target of a backward branch to the branch, predicates taken off."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label.group(1)] = len(lines)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line)
        if not found:
            continue
        lines.append(found.group(1))
        branch = re.match(r"BRA\b.*?(\.L\w+)", found.group(1))
        if branch and branch.group(1) in labels:
            body = lines[labels[branch.group(1)] :]
            if len(body) > len(best) and any(_name(each) in _MATRIX for each in body):
                best = body
    return best
