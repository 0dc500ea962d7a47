"""Decoding of four codes at once in a 32-bit register, as PTX, for bfloat16 on NVIDIA devices.

The instruction `prmt` picks four bytes out of eight by the low three bits of four nibbles: a table of eight mantissas
in two registers, without a look-up in memory. Its fourth bit gives the sign of the byte, here always zero, which is
what codes of zero need. 15 integer instructions make 4 weights of `rf8`, 16 of `rf8x`, 8 of `grid`.
"""

from __future__ import annotations

import torch

from ...formats import ResidualFloat, WeightFormat


# $0 and $1 are two bfloat16 each, $2 is four codes. lop3 with 0xea is (a & b) | c.
_SPARE = """
{{
    .reg .b32 magnitude, zero, select, low, high, word, part;
    and.b32 magnitude, $2, 0x7f7f7f7f;
    sub.u32 zero, 0x80808080, magnitude;
    lop3.b32 select, $2, 0x07070707, 0x70707070, 0xea;
    lop3.b32 select, zero, 0x80808080, select, 0xea;
    prmt.b32 low, {first}, {second}, select;
    shr.u32 select, select, 16;
    prmt.b32 high, {first}, {second}, select;
    prmt.b32 word, $2, 0, 0x1404;
    shr.u32 part, word, 4;
    lop3.b32 part, part, 0x07800780, low, 0xea;
    lop3.b32 $0, word, 0x80008000, part, 0xea;
    prmt.b32 word, $2, 0, 0x3424;
    shr.u32 part, word, 4;
    lop3.b32 part, part, 0x07800780, high, 0xea;
    lop3.b32 $1, word, 0x80008000, part, 0xea;
}}
"""
_FULL = """
{{
    .reg .b32 magnitude, bias, select, low, high, part;
    and.b32 magnitude, $2, 0x7f7f7f7f;
    add.u32 magnitude, magnitude, 0x7f7f7f7f;
    prmt.b32 bias, magnitude, 0, 0xba98;
    and.b32 bias, bias, {bias};
    shr.u32 part, $2, 4;
    lop3.b32 high, part, 0x07070707, bias, 0xea;
    lop3.b32 high, $2, 0x80808080, high, 0xea;
    and.b32 select, $2, 0x07070707;
    shr.u32 part, select, 4;
    or.b32 select, select, part;
    prmt.b32 select, select, 0, 0x4420;
    prmt.b32 low, {first}, {second}, select;
    shl.b32 part, $2, 4;
    lop3.b32 low, part, 0x80808080, low, 0xea;
    prmt.b32 $0, low, high, 0x5140;
    prmt.b32 $1, low, high, 0x7362;
}}
"""
# 0x4300 is 128, and the seven bits of its mantissa are whole numbers.
_INTEGERS = """
{
    .reg .b32 word, part, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc300c300;
    prmt.b32 word, $2, 0, 0x4140;
    lop3.b32 part, word, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 part, part, one, offset;
    shl.b32 word, word, 8;
    lop3.b32 $0, word, 0x80008000, part, 0xea;
    prmt.b32 word, $2, 0, 0x4342;
    lop3.b32 part, word, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 part, part, one, offset;
    shl.b32 word, word, 8;
    lop3.b32 $1, word, 0x80008000, part, 0xea;
}
"""


def packed_decoding(fmt: WeightFormat, dtype: torch.dtype) -> str:
    """PTX that decodes four codes to `dtype`, or `""`: this format and dtype are decoded one by one."""
    if dtype != torch.bfloat16:
        return ""
    if not isinstance(fmt, ResidualFloat):
        return _INTEGERS
    bias = 127 - fmt.exponent_bias
    if fmt.residual_bits != 3 or fmt.exponent_bits != 4 or bias % 16 or fmt.mantissas[0] != 16:
        return ""
    # mantissas in the four upper of bfloat16's seven bits; of a reserved state, which no checkpoint holds, any
    table = [8 * (max(sixteenths, 16) - 16) for sixteenths in fmt.mantissas]
    upper = bias >> 1  # what the exponent's bias puts into a bfloat16's upper byte
    spare = fmt.mantissas[7] == 0
    if spare:
        table[7] = upper
    first, second = (hex(int.from_bytes(bytes(table[at : at + 4]), "little")) for at in (0, 4))
    return (_SPARE if spare else _FULL).format(first=first, second=second, bias=hex(upper * 0x01010101))
