"""The rANS decoder as a Triton kernel. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rans_decode_kernel(
    states_ptr,
    words_ptr,
    ends_ptr,
    slots_ptr,
    table_ptr,
    out_ptr,
    found_ptr,
    count,
    chunk,
    lanes,
    BITS: tl.constexpr,
    MOST_LANES: tl.constexpr,
):
    """One chunk a program, one symbol of each lane a step; see `docs/coded-checkpoints.md`.

    states int32 [chunks, lanes], words int16, ends int64 [chunks + 1] in words, slots uint8 [2^BITS], table int32
    [256] of frequency | start << 16, out uint8 [count]. found int32 [chunks, MOST_LANES + 1] gets the lanes' hashes
    and, last, whether the stream ended where it should. Damaged data read nothing out of bounds and end in time.
    """
    index = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, MOST_LANES)
    used = lane < lanes
    begin = index * chunk
    size = tl.minimum(count - begin, chunk).to(tl.int32)
    at = tl.load(ends_ptr + index)
    end = tl.load(ends_ptr + index + 1)
    # lanes that there are not stay at the state of an empty one
    x = tl.load(states_ptr + index * lanes + lane, mask=used, other=65536).to(tl.uint32, bitcast=True)
    sound = tl.min((x >= 65536).to(tl.int32), 0)
    h = tl.full([MOST_LANES], 2166136261, tl.uint32)
    for row in range(tl.cdiv(size, lanes)):
        place = row * lanes + lane
        active = used & (place < size)
        slot = x & ((1 << BITS) - 1)
        symbol = tl.load(slots_ptr + slot.to(tl.int32))
        entry = tl.load(table_ptr + symbol.to(tl.int32)).to(tl.uint32, bitcast=True)
        new = (entry & 0xFFFF) * (x >> BITS) + slot - (entry >> 16)
        low = active & (new < 65536)
        takes = low.to(tl.int32)
        position = at + tl.cumsum(takes, 0) - takes
        word = tl.load(words_ptr + position, mask=low & (position < end), other=0)
        new = tl.where(low, (new << 16) | (word.to(tl.uint32) & 0xFFFF), new)
        x = tl.where(active, new, x)
        h = tl.where(active, (h ^ symbol.to(tl.uint32)) * 16777619, h)
        tl.store(out_ptr + begin + place, symbol, mask=active)
        at += tl.sum(takes, 0)
    sound = sound & (at == end).to(tl.int32) & tl.min((x == 65536).to(tl.int32), 0)
    target = found_ptr + index * (MOST_LANES + 1)
    tl.store(target + lane, h.to(tl.int32, bitcast=True))
    tl.store(target + MOST_LANES, sound)
