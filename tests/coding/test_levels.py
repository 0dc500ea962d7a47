"""Floats on a grid come back bit for bit; what is off the grid, and what is damaged, is refused by name."""

import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gg.coding.container import CONSTANT, NO_MODEL, Header, write_header
from hf_gg.coding.levels import decode_levels, encode_levels, is_levels, nearest_levels, read_levels_header


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("coder", ["rans", "eg0"])
@pytest.mark.parametrize("largest", [0, 1, 127, 128, 40_000, 9_000_000])
@pytest.mark.parametrize("step", [2**-13, 0.01, 3.0])
def test_float32(step, largest, coder):
    levels = torch.randint(-largest, largest + 1, (37, 53))
    levels[0, :2] = torch.tensor([largest, -largest])
    values = (levels.double() * step).float()
    payload = encode_levels(values, step, coder)
    assert is_levels(payload) and payload.ndim == 1 and payload.dtype == torch.uint8
    assert read_levels_header(payload) == (torch.float32, (37, 53))
    assert same_bits(decode_levels(payload), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    values = (torch.randint(-99, 100, (5, 7, 3)) * 2**-6).to(dtype)
    assert same_bits(decode_levels(encode_levels(values, 2**-6)), values)


def test_bfloat16():
    values = (torch.randint(-99, 100, (50, 70)) * 2**-6).bfloat16()
    assert torch.equal(decode_levels(encode_levels(values, 2**-6)).view(torch.int16), values.view(torch.int16))


def test_signs_of_zeros_stay():
    values = torch.tensor([[0.0, -0.0, 0.5, -0.5]])
    assert same_bits(decode_levels(encode_levels(values, 0.5)), values)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (), (1, 1), (2**20 + 3,), (3, 2**19)])
def test_shapes(shape):
    values = torch.randint(-200, 201, shape).float() / 8
    assert same_bits(decode_levels(encode_levels(values, 1 / 8)), values)


def test_size_is_near_the_entropy():
    """Also where levels need two planes."""
    for deviation in (0.5, 10, 100, 1000):
        levels = (torch.randn(400_000) * deviation).round()
        # a negative zero is a level of its own
        counts = np.unique(levels.numpy().view(np.int32), return_counts=True)[1] / levels.numel()
        entropy = -(counts * np.log2(counts)).sum()
        bits = 8 * encode_levels(levels / 8, 1 / 8).numel() / levels.numel()
        # above: the entropy of a sample is a little below that of its source
        assert entropy <= bits <= 1.01 * entropy + 0.02, (deviation, bits, entropy)


def test_off_the_grid():
    values = torch.arange(6).float()
    values[3] += 0.125
    with pytest.raises(ValueError, match=r"w is not on the grid of 1: a number lies 0\.125 beside it"):
        encode_levels(values, 1.0, name="w")
    # also a single bit
    values[3] = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0))
    with pytest.raises(ValueError, match="w is not on the grid"):
        encode_levels(values, 1.0, name="w")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value):
    for function in (encode_levels, nearest_levels):
        with pytest.raises(ValueError, match="w holds NaN or infinity"):
            function(torch.tensor([1.0, value]), 1.0, name="w")


def test_too_many_steps():
    with pytest.raises(ValueError, match="more than 2\\^31 steps"):
        encode_levels(torch.tensor([2.0**40]), 1.0)
    values = torch.tensor([2.0**31 - 1, -(2.0**31) + 1], dtype=torch.float64)
    assert same_bits(decode_levels(encode_levels(values, 1.0)), values)


def test_no_floats():
    with pytest.raises(TypeError, match="w: numbers on a grid are floating point"):
        encode_levels(torch.ones(3, dtype=torch.int32), 1.0, name="w")


def test_nearest():
    values = torch.randn(100, 100)
    rounded, distance = nearest_levels(values, 0.1)
    assert distance == pytest.approx(float((rounded.double() - values.double()).abs().max()))
    assert 0.049 < distance <= 0.0501
    wanted = (np.round(values.double().numpy() / 0.1) * 0.1).astype(np.float32) + 0.0
    assert same_bits(rounded, torch.from_numpy(wanted))
    assert same_bits(decode_levels(encode_levels(rounded, 0.1)), rounded)


VALUES = (torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * 300).round() / 8
PAYLOAD = encode_levels(VALUES, 1 / 8)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_found(data):
    kind = data.draw(st.sampled_from(["flip", "truncate", "extend"]))
    payload = PAYLOAD.clone()
    if kind == "flip":
        place = data.draw(st.integers(0, data.draw(st.sampled_from([80, payload.numel() - 1]))))
        payload[place] ^= data.draw(st.integers(1, 255))
    elif kind == "truncate":
        payload = payload[: data.draw(st.integers(0, payload.numel() - 1))]
    else:
        more = data.draw(st.binary(min_size=1, max_size=9))
        payload = torch.cat([payload, torch.frombuffer(bytearray(more), dtype=torch.uint8)])
    with pytest.raises(ValueError, match="the.name"):
        decode_levels(payload, "the.name")


def forged(step: float, *planes: bytes) -> torch.Tensor:
    """A payload of any planes, with a right checksum."""
    head = struct.pack("<8sBBHd", b"GGLEVEL1", 0, len(planes), 0, step)
    head += struct.pack(f"<{len(planes)}Q", *map(len, planes))
    content = head + struct.pack("<I", zlib.crc32(head)) + b"".join(planes)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_terabytes_of_nothing():
    plane = write_header(Header(CONSTANT, NO_MODEL, (1 << 20, 1 << 20), symbol=1))
    with pytest.raises(ValueError, match=r"w claims 1099511627776 numbers without any data"):
        decode_levels(forged(1.0, plane, plane), "w")
    with pytest.raises(ValueError, match=r"w is coded with shape \[1048576, 1048576\], expected \[3, 4\]"):
        decode_levels(forged(1.0, plane), "w", expected_shape=(3, 4))


def test_a_step_beyond_the_dtype():
    plane = write_header(Header(CONSTANT, NO_MODEL, (3,), symbol=2))
    assert decode_levels(forged(0.5, plane)).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match=r"w is damaged: levels of 2e\+38 go beyond torch.float32"):
        decode_levels(forged(2e38, plane), "w")
