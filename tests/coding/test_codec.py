"""Encoding and decoding: every shape and kind of symbols, sizes, the two backends, arguments."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
import torch
from make_vectors import levels

from hf_gg import coding
from hf_gg.coding import codec, kernels, reference


needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no compiled coder")
SHAPES = [(), (0,), (0, 7), (1,), (2,), (31, 33), (4096,), (7, 11, 13), (65, 1024), (150_001,), (3, 1, 70_000)]


def symbols_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape))
    generator = torch.Generator().manual_seed(count)
    if kind == "levels":
        return torch.from_numpy(levels(count, 5, 1.2)).view(shape)
    if kind == "rare":
        return (torch.rand(shape, generator=generator) < 0.001).to(torch.uint8) * 255
    if kind == "constant":
        return torch.full(shape, 17, dtype=torch.uint8)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("coder", coding.CODERS)
@pytest.mark.parametrize("kind", ["levels", "rare", "constant", "uniform"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_comes_back(shape, kind, coder):
    symbols = symbols_of(kind, shape)
    payload = coding.encode(symbols, coder)
    assert payload.dtype == torch.uint8 and payload.ndim == 1 and payload.is_contiguous()
    assert coding.is_coded(payload)
    decoded = coding.decode(payload, threads=2, expected_shape=shape)
    assert decoded.shape == symbols.shape and torch.equal(decoded, symbols)
    about = coding.info(payload)
    assert about.shape == shape and about.nbytes == payload.numel()
    assert about.coder == ("constant" if len(symbols.unique()) < 2 else coder)


@needs_kernels
@pytest.mark.parametrize("coder", coding.CODERS)
@pytest.mark.parametrize("kind", ["levels", "rare", "uniform"])
@pytest.mark.parametrize("shape", [(2,), (31, 33), (4096,), (65, 1024), (150_001,)], ids=str)
def test_without_a_compiler_the_same_bytes(shape, kind, coder, monkeypatch):
    symbols = symbols_of(kind, shape)
    one, two = coding.encode(symbols, coder, threads=1), coding.encode(symbols, coder, threads=3)
    monkeypatch.setattr(codec, "_backend", lambda: reference)
    assert torch.equal(coding.encode(symbols, coder), one) and torch.equal(one, two)
    assert torch.equal(coding.decode(one), symbols)


@needs_kernels
@pytest.mark.parametrize("isa", [0, 1])
@pytest.mark.parametrize("bits", [8, 12, 14, 16])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 5000, 40_000])
def test_instruction_sets_agree(isa, bits, count):
    if isa > kernels.isa():
        pytest.skip("the processor has no AVX2")
    symbols = np.append(levels(count, 4, 1.0), np.uint8(3)).astype(np.uint8)
    frequencies = codec.models.normalize(reference.count_symbols(symbols) + (np.arange(256) < 5), bits)
    encoded = reference.rans_encode(symbols, 16384, 32, frequencies, bits)
    out = np.zeros_like(symbols)
    arguments = (encoded[0].view(np.uint8).reshape(-1), encoded[2], encoded[1])
    hashes = kernels.rans_decode(*arguments, out, 16384, 32, frequencies, bits, isa_code=isa)
    assert (out == symbols).all()
    assert (hashes == reference.lane_hashes(symbols, 16384, 32)).all()


def test_turned_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("HF_GG_CPU_KERNELS", "0")
    kernels._LAZY.forget()
    try:
        assert not kernels.available() and kernels.why_not() == "turned off by HF_GG_CPU_KERNELS"
        symbols = symbols_of("levels", (33, 100))
        assert torch.equal(coding.decode(coding.encode(symbols)), symbols)
        with pytest.raises(RuntimeError, match="the compiled coder is not available: turned off"):
            kernels.isa()
    finally:
        kernels._LAZY.forget()


@pytest.mark.parametrize("count", [100_000, 884_736])
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.2, 0.5, 1, 2, 3, 4, 5, 6, 7])
def test_size_against_the_entropy(rate, shape, count):
    """Everything counted, within 1% and 0.02 bits of the entropy, and never below it."""
    drawn = gaussian(count, shape)
    low, high = -8.0, 5.4  # beyond it, clipping takes more than the spread gives
    for _ in range(12):
        middle = (low + high) / 2
        symbols = codes_of(drawn[:100_000], 2**middle)
        low, high = (middle, high) if coding.entropy(torch.from_numpy(symbols)) < rate else (low, middle)
    symbols = codes_of(drawn, 2**middle)
    entropy = entropy_by_hand(symbols)
    assert abs(entropy - rate) < 0.7
    size = 8 * coding.encode(torch.from_numpy(symbols)).numel() / count
    assert entropy <= size <= 1.01 * entropy + 0.02
    # exp-Golomb is a code of whole bits: no less, and within a bit and a half of its order's best
    size = 8 * coding.encode(torch.from_numpy(symbols), "eg0").numel() / count
    assert entropy <= size <= entropy + 1.5


@functools.cache
def gaussian(count: int, shape: float) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(count))
    drawn = generator.gamma(1 / shape, size=count) ** (1 / shape) * generator.choice([-1, 1], count)
    return drawn / drawn.std()


def codes_of(drawn: np.ndarray, spread: float) -> np.ndarray:
    value = np.rint(spread * drawn).clip(-127, 127).astype(np.int64)
    return np.where(value < 0, 128 - value, value).astype(np.uint8)


def entropy_by_hand(symbols: np.ndarray) -> float:
    from scipy.stats import entropy

    return float(entropy(np.unique(symbols, return_counts=True)[1], base=2))


def test_entropy():
    for kind in ("levels", "rare", "uniform"):
        symbols = symbols_of(kind, (300, 50))
        assert coding.entropy(symbols) == pytest.approx(entropy_by_hand(symbols.numpy()), abs=1e-12)
    assert coding.entropy(symbols_of("constant", (5,))) == coding.entropy(symbols_of("levels", (0,))) == 0


def test_the_smaller_model_is_taken():
    few, many = torch.from_numpy(levels(5_000, 8, 1.5)), torch.from_numpy(levels(1_000_000, 60, 1.0))
    assert coding.info(coding.encode(few)).model == "ggd"
    assert coding.info(coding.encode(many)).model == "table"
    # no levels: nothing is symmetric, or there is a minus zero
    for codes in (few & 0x7F, few | 0x80, few ^ 0x55):
        assert coding.info(coding.encode(codes)).model == "table"


def test_a_better_model_never_costs():
    """A table for the same symbols is not smaller than what was chosen."""
    for count in (1000, 10_000, 200_000):
        symbols = torch.from_numpy(levels(count, 10, 0.7))
        chosen = coding.encode(symbols).numel()
        shifted = coding.encode(symbols ^ 0x55).numel()  # the model does not apply
        assert chosen <= shifted + 1


def test_out_and_expected_shape():
    symbols = symbols_of("levels", (100, 700))
    payload = coding.encode(symbols)
    out = torch.zeros(100, 700, dtype=torch.uint8)
    assert coding.decode(payload, out=out) is out and torch.equal(out, symbols)
    for wrong in (
        torch.zeros(700, 100, dtype=torch.uint8),
        torch.zeros(700, 100, dtype=torch.uint8).T,
        torch.zeros(100, 700, dtype=torch.int8),
        torch.zeros(100, 700, dtype=torch.uint8, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"layer\.7"):
            coding.decode(payload, "layer.7", out=wrong)
        assert not wrong.is_contiguous() or wrong.is_meta or not wrong.any()
    with pytest.raises(ValueError, match=r"layer\.7: the payload has the shape \[100, 700\], expected \[70000\]"):
        coding.decode(payload, "layer.7", expected_shape=(70_000,))


def test_views_and_offsets():
    symbols = symbols_of("levels", (300, 300))
    views = [symbols.T, symbols[::2, 1::3], symbols[5:, 7:]]
    for view in views:
        payload = coding.encode(view)
        assert torch.equal(coding.decode(payload), view)
        for offset in (1, 2, 3):  # a tensor may begin anywhere in a file
            buffer = torch.zeros(payload.numel() + 8, dtype=torch.uint8)
            buffer[offset : offset + payload.numel()] = payload
            assert torch.equal(coding.decode(buffer[offset : offset + payload.numel()]), view)
        strided = torch.zeros(payload.numel(), 2, dtype=torch.uint8)
        strided[:, 0] = payload
        assert torch.equal(coding.decode(strided[:, 0]), view)


def test_arguments():
    with pytest.raises(ValueError, match="coder must be one of rans, eg0, got 'zip'"):
        coding.encode(torch.zeros(1, dtype=torch.uint8), "zip")
    with pytest.raises(TypeError, match="w: symbols must be uint8, got torch.int8"):
        coding.encode(torch.zeros(1, dtype=torch.int8), name="w")
    with pytest.raises(ValueError, match="w: at most 16 dimensions"):
        coding.encode(torch.zeros([1] * 17, dtype=torch.uint8), name="w")
    with pytest.raises(TypeError, match="symbols must be uint8"):
        coding.entropy(torch.zeros(1))
    for wrong in (torch.zeros(30), torch.zeros(3, 10, dtype=torch.uint8)):
        assert not coding.is_coded(wrong)
        with pytest.raises(ValueError, match="w: a payload is 1-D uint8"):
            coding.decode(wrong, "w")
    assert not coding.is_coded(torch.zeros(100, dtype=torch.uint8))
    assert not coding.is_coded(torch.zeros(100, dtype=torch.uint8, device="meta"))
    assert not coding.is_coded(torch.zeros(3, dtype=torch.uint8))


def test_tensors_decode_in_threads():
    payloads = [coding.encode(symbols_of("levels", (count,))) for count in range(60_000, 400_000, 40_000)]
    expected = [coding.decode(payload) for payload in payloads]
    found: list[torch.Tensor | None] = [None] * len(payloads)

    def work(index: int) -> None:
        found[index] = coding.decode(payloads[index], threads=2)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(payloads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.slow
def test_a_large_tensor():
    symbols = torch.from_numpy(levels(40_000_000, 8, 2.0)).view(5000, 8000)
    payload = coding.encode(symbols)
    assert torch.equal(coding.decode(payload), symbols)
    assert 8 * payload.numel() / symbols.numel() < 1.01 * coding.entropy(symbols)


@pytest.mark.parametrize("coder", coding.CODERS)
@pytest.mark.parametrize("kind", ["levels", "rare", "constant", "uniform"])
def test_reserved_symbols(kind, coder):
    """An error exactly where one of them occurs, also where the model leaves room for what does not occur."""
    symbols = symbols_of(kind, (65, 1024))
    present = set(symbols.unique().tolist())
    payload = coding.encode(symbols, coder)
    absent = tuple(set(range(256)) - present)
    torch.testing.assert_close(coding.decode(payload, reserved=absent), symbols, rtol=0, atol=0)
    wanted = max(present)
    with pytest.raises(
        ValueError,
        match=f"layer: code 0x{wanted:02x} at flat index {int((symbols == wanted).view(-1).int().argmax())} ",
    ):
        coding.decode(payload, "layer", reserved=(*absent, wanted))


def test_reserved_symbols_that_a_fitted_model_allows():
    symbols = symbols_of("levels", (4000,))
    largest = int(symbols.where(symbols < 128, 0).max())
    symbols[symbols == largest - 1] = largest - 2  # hardly any
    payload = coding.encode(symbols)
    assert coding.info(payload).model == "ggd"
    assert torch.equal(coding.decode(payload, reserved=(largest - 1,)), symbols)
    assert torch.equal(coding.decode(coding.encode(symbols[:0]), reserved=(0,)), symbols[:0])


@pytest.mark.parametrize("spread", [1, 3, 6])
@pytest.mark.parametrize("shape", [0.7, 1.2, 2.0])
def test_small_tensors_of_levels_take_the_fitted_model(spread, shape):
    symbols = torch.from_numpy(levels(10_000, spread, shape))
    info = coding.info(coding.encode(symbols))
    assert info.model == "ggd" and info.bits_per_symbol <= coding.entropy(symbols) + 0.06
