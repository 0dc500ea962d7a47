"""The stored payloads: read by the package, by its numpy reference and by a decoder that knows only the document."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import plain_decoder
import pytest
import torch
from make_vectors import levels, vectors

from hf_gg import coding
from hf_gg.coding import codec, ggd_model, kernels, models, reference


PATH = Path(__file__).parents[1] / "data" / "coded" / "vectors.json"
VECTORS = json.loads(PATH.read_text())["vectors"]
BACKENDS = {"kernels": kernels, "reference": reference}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "kernels" and not kernels.available():
        pytest.skip(f"no compiled coder: {kernels.why_not()}")
    monkeypatch.setattr(codec, "_backend", lambda: BACKENDS[request.param])


def to_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_stored_payloads_decode(vector, backend):
    decoded = coding.decode(to_tensor(bytes.fromhex(vector["payload"])))
    assert list(decoded.shape) == vector["shape"]
    assert to_bytes(decoded).hex() == vector["symbols"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_document_says_enough(vector):
    shape, symbols = plain_decoder.decode(bytes.fromhex(vector["payload"]))
    assert list(shape) == vector["shape"]
    assert symbols.hex() == vector["symbols"]


def test_the_vectors_can_be_made_again():
    assert vectors() == VECTORS


@pytest.mark.parametrize("coder", coding.CODERS)
@pytest.mark.parametrize(("count", "spread"), [(3, 40), (1000, 0.3), (20_001, 6), (70_000, 15)])
def test_the_second_decoder_reads_what_encode_writes(coder, count, spread):
    symbols = levels(count, spread, 1.3)
    payload = coding.encode(torch.from_numpy(symbols), coder)
    assert plain_decoder.decode(to_bytes(payload)) == ((count,), symbols.tobytes())


def test_gaussian_frequencies_do_not_depend_on_the_program():
    """numpy's vectors and Python's numbers give the same integers, for any parameters."""
    generator = np.random.Generator(np.random.PCG64(5))
    agreed = 0
    for _ in range(300):
        largest, bits = int(generator.integers(1, 128)), int(generator.integers(8, 17))
        parameters = bytes((largest,)) + generator.integers([24000, 1], [50000, 5000]).astype("<u2").tobytes()
        try:
            expected = plain_decoder.gaussian(parameters, bits)
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="nothing to any level"):
                ggd_model.read_frequencies(parameters, bits)
            continue
        if sum(frequency > 0 for frequency in expected) > 1:
            assert ggd_model.read_frequencies(parameters, bits).tolist() == expected
            agreed += 1
    assert agreed > 200


@pytest.mark.parametrize("shape", [0.6, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
def test_gaussian_frequencies_are_those_of_the_distribution(scale, shape):
    """Against scipy's integral of each cell; α is 2^-t where scipy has e^-t."""
    from scipy.stats import gennorm

    a = 32768 + round(1024 * (np.log2(scale) + np.log2(np.log(2)) / shape))
    parameters = bytes((127,)) + a.to_bytes(2, "little") + round(1024 * shape).to_bytes(2, "little")
    share = ggd_model.read_frequencies(parameters, 16)[:128] / 65536
    exact = gennorm(shape, scale=2 ** ((a - 32768) / 1024) / np.log(2) ** (1 / shape))
    edges = exact.cdf(np.arange(129) - 0.5)
    probability = np.diff(edges) / (2 * exact.cdf(127.5) - 1)
    # each of the 255 symbols has one share more; a cusp at zero is integrated in few steps
    error = np.abs(share - probability * (1 - 255 / 65536))
    assert error[1:].max() < 3 / 65536 + (0.002 if shape < 1 else 0.0002)
    assert error[0] < 0.004 + (0.03 if shape < 1 else 0.003)


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_tables_come_back(bits):
    generator = np.random.Generator(np.random.PCG64(bits))
    for used in (2, 3, 17, 200, 256):
        counts = np.zeros(256, np.int64)
        counts[generator.permutation(256)[:used]] = np.rint(10 ** generator.uniform(0, 7, used)).astype(np.int64)
        frequencies = models.normalize(counts, bits)
        assert frequencies.sum() == 1 << bits
        assert ((frequencies > 0) == (counts > 0)).all()
        stored = models.write_table(frequencies, bits)
        assert (models.read_table(stored, bits) == frequencies).all()
        assert plain_decoder.stored_table(stored, bits) == frequencies.tolist()


def test_frequencies_are_the_cheapest():
    """No exchange of one share between two symbols makes the code shorter."""
    counts = np.zeros(256, np.int64)
    counts[:40] = np.rint(1e6 * np.exp(-np.arange(40) / 4)).astype(np.int64)
    frequencies = models.normalize(counts, 12)
    best = models.cost(counts, frequencies, 12)
    for a in range(40):
        for b in range(40):
            if a != b and frequencies[b] > 1:
                other = frequencies.copy()
                other[a], other[b] = other[a] + 1, other[b] - 1
                assert models.cost(counts, other, 12) >= best - 1e-6
