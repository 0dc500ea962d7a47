"""Instructions of the AVX2 kernel's inner loops, counted in the compiled library."""

import platform
import re
import shutil
import subprocess

import pytest

from hf_gg.ops import cpu
from hf_gg.ops.cpu import build


pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or shutil.which("objdump") is None or not cpu.available(),
    reason="needs the compiled kernels on x86, and objdump",
)


def loops(function: str) -> list[list[str]]:
    """The innermost loops of a function, from the target of a backward jump to the jump."""
    path = build.cache_directory() / build.library_name(build.find_compiler())
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    body = re.search(rf"<{function}>:\n(.*?)\n\n", text, re.DOTALL).group(1)
    lines = [line.split("\t") for line in body.splitlines()]
    lines = [(int(line[0].strip(" :"), 16), line[-1]) for line in lines if len(line) > 1]
    index = {address: i for i, (address, _) in enumerate(lines)}
    found = []
    for i, (_, instruction) in enumerate(lines):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", instruction)
        start = index.get(int(jump.group(1), 16)) if jump else None
        if start is not None and start < i:
            inner = [t for _, t in lines[start : i + 1]]
            if not any(re.match(r"j|call", t) for t in inner[:-1]):
                found.append(inner)
    return found


def test_one_row_takes_less_than_an_instruction_a_weight():
    sizes = {}
    for loop in loops("linear_halves"):
        shuffles, products = (sum(name in line for line in loop) for name in ("vpshufb", "vfmadd"))
        if products == 4:  # one row of x, one output: 32 weights
            sizes[shuffles] = len(loop)
    # two tables, and a third one where a format has reserved codes
    assert set(sizes) == {2, 3}
    assert sizes[2] <= 25 and sizes[3] <= 27, sizes
