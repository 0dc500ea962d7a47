"""Payloads damaged by chance or on purpose: a `ValueError` that names the tensor, and never wrong symbols."""

from __future__ import annotations

import functools
import os
import re
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_vectors import levels, payload
from test_vectors import BACKENDS, to_bytes, to_tensor

from hf_gg import coding
from hf_gg.coding import codec, kernels, models
from hf_gg.coding.container import CONSTANT, GGD, GOLOMB, NO_MODEL, RANS, TABLE, Header, write_header


KINDS = ("table", "ggd", "lanes", "eg0", "constant", "rare")
# of each kind; HF_GG_FUZZ=10000 looks longer
FUZZ = settings(max_examples=int(os.environ.get("HF_GG_FUZZ", "250")), deadline=None, database=None, derandomize=True)
BACKEND = "kernels" if kernels.available() else "reference"


@functools.cache
def sound(kind: str) -> tuple[bytes, bytes]:
    """A payload and its symbols."""
    if kind == "constant":
        symbols = np.full(1000, 9, np.uint8)
        return to_bytes(coding.encode(torch.from_numpy(symbols))), symbols.tobytes()
    if kind == "rare":
        symbols = (np.arange(3000) % 1001 == 7).astype(np.uint8)
        return payload(symbols, (3000,), RANS, TABLE, 16, 1, 3000), symbols.tobytes()
    symbols = levels(720, 7, 1.4)
    choice = {
        "table": (RANS, TABLE, 14, 1, 720),
        "ggd": (RANS, GGD, 16, 2, 400),
        "lanes": (RANS, TABLE, 12, 32, 320),
        "eg0": (GOLOMB, NO_MODEL, 1, 4, 256),
    }[kind]
    return payload(symbols, (18, 40), *choice), symbols.tobytes()


def refused(data: bytes, backend: str = BACKEND, **arguments) -> str:
    """The message of the refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_backend", lambda: BACKENDS[backend])
        with pytest.raises(ValueError, match=r"^model\.layers\.3\.weight: ") as error:
            coding.decode(to_tensor(data), "model.layers.3.weight", **arguments)
    return str(error.value)


def sealed(data: bytes | bytearray) -> bytes:
    """The payload with the checksum of its header put right: damage on purpose."""
    size = int.from_bytes(data[12:16], "little")
    return bytes(data[:8]) + zlib.crc32(bytes(data[:8] + data[12:size])).to_bytes(4, "little") + bytes(data[12:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_matters(kind):
    data, symbols = sound(kind)
    assert to_bytes(coding.decode(to_tensor(data))) == symbols
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        refused(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation(kind):
    data, _ = sound(kind)
    for size in range(1, len(data)):
        refused(data[:size])
        refused(data[size:])
    for more in (b"\0", b"\0\0", b"\0" * 4, data):
        refused(data + more)


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(draw=st.data())
def test_random_damage(kind, draw):
    data, _ = sound(kind)
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 8))):
        at = draw.draw(st.integers(0, len(changed) - 1))
        action = draw.draw(st.integers(0, 3))
        if action == 0:
            changed[at] = draw.draw(st.integers(0, 255))
        elif action == 1:
            changed.insert(at, draw.draw(st.integers(0, 255)))
        elif action == 2 and len(changed) > 1:
            del changed[at]
        else:
            other = draw.draw(st.integers(0, len(changed) - 1))
            changed[at], changed[other] = changed[other], changed[at]
    if changed != data:
        refused(changed, draw.draw(st.sampled_from(sorted({BACKEND, "reference"}))))


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(draw=st.data())
def test_damage_behind_a_right_checksum(kind, draw):
    """Whoever can compute a CRC gets past the header's. Even so: no crash, no hang, no other error.

    And no other symbols, as long as the checksum of the symbols was not forged to fit.
    """
    data, symbols = sound(kind)
    changed, size = bytearray(data), int.from_bytes(data[12:16], "little")
    for _ in range(draw.draw(st.integers(1, 4))):
        changed[draw.draw(st.integers(0, size - 1))] = draw.draw(st.integers(0, 255))
    if changed[12:16] != data[12:16]:
        changed[12:16] = data[12:16]
    start = time.monotonic()
    message, decoded = "w: ", None
    try:
        decoded = coding.decode(to_tensor(sealed(changed)), "w")
    except ValueError as error:
        message = str(error)
    assert message.startswith("w: ")
    if decoded is not None and kind != "constant":  # another shape with as many symbols
        assert to_bytes(decoded) == symbols
    assert time.monotonic() - start < 20


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_bytes_without_a_plan(data, magic):
    refused((b"\x89GGC\x01" + data) if magic else data)


def forged(**fields) -> bytes:
    """A header of chosen fields with a right checksum."""
    header = Header(RANS, TABLE, (64,), bits=12, log2_lanes=0, chunk=64, parameters=sound_parameters())
    header.lengths = np.array([10])
    count = fields.pop("count", None)
    for name, value in fields.items():
        setattr(header, name, value)
    if count is not None:
        header = type("Forged", (Header,), {"count": count})(**vars(header))
    return write_header(header)


def sound_parameters() -> bytes:
    counts = np.zeros(256, np.int64)
    counts[:4] = 10, 5, 3, 1
    return codec.models.write_table(codec.models.normalize(counts, 12), 12)


def test_counts_that_would_take_terabytes():
    start = time.monotonic()
    for shape, chunk, lanes in [((1 << 45,), 4096, 0), ((1 << 20, 1 << 25), 131072, 5), ((1 << 47,), 1 << 46, 5)]:
        assert "damaged" in refused(forged(shape=shape, chunk=chunk, log2_lanes=lanes))
    for coder in (RANS, GOLOMB):
        model = TABLE if coder == RANS else NO_MODEL
        header = forged(coder=coder, model=model, bits=8, shape=(1 << 30,), chunk=131072, log2_lanes=5)
        assert "index of 8192 chunks is cut short" in refused(header)
    many = forged(
        coder=GOLOMB,
        model=NO_MODEL,
        bits=0,
        shape=(1 << 26,),
        chunk=1 << 17,
        log2_lanes=5,
        lengths=np.zeros(512, np.int64),
    )
    assert "67108864 symbols in 0 words" in refused(many)
    constant = write_header(Header(CONSTANT, NO_MODEL, (1 << 44,)))
    assert "give expected_shape" in refused(constant)
    assert "expected [5]" in refused(constant, expected_shape=(5,))
    assert "out [5]" in refused(constant, out=torch.zeros(5, dtype=torch.uint8))
    for shape in [(1 << 49,), (1 << 40, 1 << 40), (0, 1 << 40, 1 << 40), (1 << 31, 1 << 31)]:
        message = refused(write_header(Header(CONSTANT, NO_MODEL, shape)))
        assert "do not fit the shape" in message or "longer than nine bytes" in message
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 65}, "65 symbols do not fit the shape [64]"),
        ({"bits": 7}, "a precision or order of 7, allowed are 8 to 16"),
        ({"bits": 17}, "a precision or order of 17"),
        ({"log2_lanes": 6}, "2^6 lanes, at most 2^5"),
        ({"log2_lanes": 200}, "2^200 lanes"),
        ({"chunk": 0}, "chunks of 0 symbols on 1 lanes"),
        ({"chunk": 66, "log2_lanes": 2}, "chunks of 66 symbols on 4 lanes"),
        ({"chunk": 5000}, "chunks of 5000 symbols on 1 lanes"),
        ({"shape": (0,)}, "the index of 0 chunks"),
        ({"lengths": np.array([1000])}, "a chunk of 1000 words for 64 symbols"),
        ({"lengths": np.array([2**62])}, "a chunk of 4611686018427387904 words"),
        ({"lengths": np.array([10, 10])}, "ends with something else than its padding|bytes, and the header says"),
        ({"coder": 3}, "unknown coder 3"),
        ({"coder": CONSTANT, "model": NO_MODEL, "checksum": 1}, "64 symbols holds what it does not need"),
        (
            {"coder": CONSTANT, "model": NO_MODEL, "shape": (0,), "symbol": 1},
            "of 0 symbols holds what it does not need",
        ),
        ({"model": 0}, "unknown model 0 of coder 1"),
        ({"model": 3}, "unknown model 3 of coder 1"),
        ({"coder": GOLOMB, "model": TABLE}, "unknown model 1 of coder 2"),
        ({"coder": GOLOMB, "model": NO_MODEL, "bits": 9}, "a precision or order of 9, allowed are 0 to 8"),
    ],
)
def test_fields_out_of_range(fields, message):
    found = refused(forged(**fields) + bytes(4 + 20))
    assert re.search(message.replace("[", r"\[").replace("^", r"\^"), found), found


@pytest.mark.parametrize(
    ("parameters", "bits", "model", "message"),
    [
        (b"", 12, TABLE, "the table of frequencies is cut short"),
        (b"\xff" * 200, 12, TABLE, "cut short|bits in a table"),
        (sound_parameters() + b"\0", 12, TABLE, "longer than its symbols"),
        (sound_parameters(), 13, TABLE, "the sum|table"),
        (codec.models.write_table(np.bincount([5], [4096], 256).astype(np.int64), 13), 12, TABLE, "sum|table"),
        (b"\x05\0\x80\0", 12, GGD, "4 bytes of GGD parameters, not 5"),
        (b"\0\0\x80\0\4", 12, GGD, "largest level 0"),
        (b"\x80\0\x80\0\4", 12, GGD, "largest level 128"),
        (b"\x05\0\x80\0\0", 12, GGD, "shape 0"),
        (b"\x05\0\0\xff\xff", 12, GGD, "nothing to any level"),
    ],
)
def test_models_out_of_range(parameters, bits, model, message):
    data = forged(parameters=parameters, bits=bits, model=model) + bytes(4 + 20)
    assert re.search(message, refused(data)), refused(data)


@pytest.mark.parametrize("book", [b"", b"\x05", b"\x05\x06\x05", bytes(range(256)) + b"\0"])
def test_code_books_out_of_range(book):
    data = forged(coder=GOLOMB, model=NO_MODEL, bits=0, parameters=book, lengths=np.array([64])) + bytes(128)
    assert "the code book has" in refused(data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stream", [b"\0" * 20, b"\xff" * 20, b"\x40" * 20, b"\x00\x80" * 10, b"\xff" * 19 + b"\1"])
def test_exp_golomb_streams_out_of_range(stream, backend):
    if backend == "kernels" and not kernels.available():
        pytest.skip("no compiled coder")
    for order in (0, 1):
        data = forged(coder=GOLOMB, model=NO_MODEL, bits=order, parameters=b"\1\2\3", lengths=np.array([10]))
        assert "damaged" in refused(data + stream, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_version(backend):
    data = bytearray(sound("table")[0])
    data[4] = 2
    assert "coded in version 2, this program reads version 1: update hf_gg" in refused(sealed(data), backend)


def test_another_program_s_bytes():
    assert "not a coded tensor (its first bytes are 89 50 4e 47)" in refused(b"\x89PNG" + bytes(50))
    assert "not a coded tensor (its first bytes are missing)" in refused(b"")


@pytest.mark.parametrize("kind", ["table", "ggd", "lanes", "eg0", "rare"])
def test_wrong_checksum_of_the_symbols(kind):
    """A stream that ends as it should with another checksum is refused, too."""
    data = bytearray(sound(kind)[0])
    symbols = np.frombuffer(sound(kind)[1], np.uint8)
    reader = coding.container._Reader(bytes(data[16:]), "")
    for _ in range(data[7] + 1):
        reader.varint()
    data[16 + reader._at] ^= 1
    assert len(symbols) and "the checksum of the decoded symbols does not fit" in refused(sealed(data))


@pytest.mark.skipif(not kernels.available(), reason="no compiled coder")
@FUZZ
@given(bits=st.integers(8, 16), data=st.data())
def test_tables_are_read_alike(bits, data):
    """In C and in Python, and what is wrong with a damaged one is said alike."""
    if data.draw(st.booleans()):
        counts = np.zeros(256, np.int64)
        counts[data.draw(st.lists(st.integers(0, 255), min_size=2, max_size=200, unique=True))] = 1
        counts *= np.random.default_rng(data.draw(st.integers(0, 99))).integers(1, 10**4, 256)
        stored = bytearray(models.write_table(models.normalize(counts, bits), bits))
        for place in data.draw(st.lists(st.integers(0, 8 * len(stored) - 1), max_size=3)):
            stored[place // 8] ^= 1 << place % 8
        stored = bytes(stored[: data.draw(st.integers(0, len(stored)))]) if data.draw(st.booleans()) else bytes(stored)
    else:
        stored = data.draw(st.binary(max_size=40))

    def outcome(read):
        try:
            return read(stored, bits).tolist()
        except ValueError as error:
            return str(error)

    assert outcome(kernels.read_table) == outcome(models.read_table)
