"""The packed decoding of four codes: its PTX, run by an interpreter of the few instructions that it uses.

There need be no GPU. What each instruction does is from the PTX manual, not from the code under test.
"""

from __future__ import annotations

import re

import pytest
import torch

from hf_gg.formats import get_format
from hf_gg.ops.triton.packed import packed_decoding


WORD = 0xFFFFFFFF
MANTISSAS = {"rf8": (16, 17, 18, 20, 24, 28, 30, None), "rf8x": (16, 17, 18, 20, 22, 24, 28, 30)}


def value_of(name: str, code: int) -> float | None:
    low, sign = code & 0x7F, -1.0 if code & 0x80 else 1.0
    if name == "grid":
        return sign * low
    sixteenths = MANTISSAS[name][low & 7]
    if low == 0:
        return 0.0
    return None if sixteenths is None else sign * 2.0 ** ((low >> 3) - 15) * sixteenths / 16


def bfloat16(bits: int) -> float:
    return float(torch.tensor([bits << 16], dtype=torch.int64).to(torch.int32).view(torch.float32))


def bits_of(value: float) -> int:
    return (int(torch.tensor([value]).view(torch.int32)) & WORD) >> 16


def prmt(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    out = []
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source[nibble & 7]
        out.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def fma_bf16x2(a: int, b: int, c: int) -> int:
    lanes = []
    for shift in (0, 16):
        x, y, z = (bfloat16(operand >> shift & 0xFFFF) for operand in (a, b, c))
        exact = x * y + z
        assert bfloat16(bits_of(exact)) == exact  # so that rounding does not matter
        lanes.append(bits_of(exact))
    return lanes[0] | lanes[1] << 16


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b & WORD,
    "sub.u32": lambda a, b: a - b & WORD,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & WORD,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: _lop3(a, b, c, table),
    "fma.rn.bf16x2": fma_bf16x2,
}


def _lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        out |= (table >> index & 1) << bit
    return out


def run(ptx: str, word: int) -> list[int]:
    registers = {"$2": word}
    for statement in ptx.strip().strip("{}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, operands = statement.split(maxsplit=1)
        target, *sources = re.split(r"\s*,\s*", operands)
        registers[target] = OPERATIONS[name](*(registers[s] if s in registers else int(s, 0) for s in sources))
    return [registers[f"${pair}"] >> shift & 0xFFFF for pair in (0, 1) for shift in (0, 16)]


@pytest.mark.parametrize("name", ["rf8", "rf8x", "grid"])
def test_every_code_in_every_place_beside_any_other(name):
    ptx = packed_decoding(get_format(name), torch.bfloat16)
    codes = [code for code in range(256) if value_of(name, code) is not None]
    generator = torch.Generator().manual_seed(0)
    for code in codes:
        for place in range(4):
            others = torch.randint(256, (4,), generator=generator).tolist()
            others[place] = code
            found = run(ptx, int.from_bytes(bytes(others), "little"))
            for other, bits in zip(others, found, strict=True):
                expected = value_of(name, other)
                assert expected is None or bfloat16(bits) == expected, (hex(other), hex(bits))


def test_the_instructions_are_as_few_as_they_are_said_to_be():
    count = {}
    for name in ("rf8", "rf8x", "grid"):
        statements = packed_decoding(get_format(name), torch.bfloat16).split(";")
        names = [s.split()[0] for s in statements if s.split() and s.strip("{} \n")]
        count[name] = sum(n.startswith(("and", "or", "add", "sub", "sh", "prmt", "lop3")) for n in names if n != "{")
    # the first statement of each stands behind a brace and is .reg
    assert count == {"rf8": 15, "rf8x": 16, "grid": 8}


def test_what_is_decoded_one_by_one():
    assert packed_decoding(get_format("rf8-e5"), torch.bfloat16) == ""
    for dtype in (torch.float16, torch.float32):
        assert packed_decoding(get_format("rf8"), dtype) == ""
