"""The Triton decoder against the one on the CPU, on a CUDA device, or on the CPU with TRITON_INTERPRET=1.

One process has one of the two modes, so `test_triton_coder.py` runs this file in processes of their own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "coding"))
from make_vectors import levels, payload, vectors

from hf_gg import coding
from hf_gg.coding.container import GGD, GOLOMB, NO_MODEL, RANS, TABLE, read_header
from hf_gg.ops.coded import decode_symbols
from hf_gg.ops.triton import coder


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAME = "model.layers.3.weight"


def to_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def decode(data: torch.Tensor) -> torch.Tensor:
    return coder.decode(data.to(DEVICE), read_header(data.contiguous().numpy(), data.numel(), NAME), NAME)


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
@pytest.mark.parametrize(("count", "lanes", "chunk"), [(1, 32, 32), (100, 32, 64), (331, 32, 160), (97, 8, 40)])
def test_as_on_the_cpu(count, lanes, chunk, bits):
    symbols = np.append(levels(count, 5, 1.3), np.uint8(0x82))
    for model in (TABLE, GGD):
        if model == GGD and count == 1:
            continue
        data = to_tensor(payload(symbols, (len(symbols),), RANS, model, bits, lanes, chunk))
        decoded = decode(data)
        assert decoded.device.type == DEVICE
        assert decoded.cpu().numpy().tobytes() == symbols.tobytes()
        assert torch.equal(decoded.cpu(), coding.decode(data))


def test_any_offset():
    symbols = levels(200, 5, 1.3)
    data = to_tensor(payload(symbols, (10, 20), RANS, TABLE, 12, 32, 96))
    for offset in (1, 2, 4):
        buffer = torch.zeros(data.numel() + 8, dtype=torch.uint8, device=DEVICE)
        buffer[offset : offset + data.numel()] = data.to(DEVICE)
        header = read_header(data.numpy(), data.numel(), NAME)
        decoded = coder.decode(buffer[offset : offset + data.numel()], header, NAME)
        assert decoded.cpu().numpy().tobytes() == symbols.tobytes()


def test_damage():
    """Every part of the data: states, words, the end of a chunk; a bit in each of their bytes."""
    symbols = levels(150, 5, 1.3)
    data = payload(symbols, (150,), RANS, TABLE, 12, 16, 80)
    size = int.from_bytes(data[12:16], "little")
    found = set()
    for at in range(size, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match=NAME) as error:
            decode(to_tensor(changed))
        found.add(str(error.value).split(" of ")[0])
    assert found <= {f"{NAME}: damaged: the stream", f"{NAME}: damaged: the checksum"}


def test_only_rans():
    data = to_tensor(payload(levels(50, 5, 1.0), (50,), GOLOMB, NO_MODEL, 1, 1, 50))
    with pytest.raises(ValueError, match=f"{NAME}: the Triton decoder reads rANS payloads only"):
        decode(data)


def test_any_payload_on_the_device(monkeypatch):
    """`decode_symbols` takes each payload to where it can be decoded."""
    used = []
    real = coder.decode
    monkeypatch.setattr(coder, "decode", lambda *arguments: used.append(1) or real(*arguments))
    for vector in vectors():
        if INTERPRETED and len(vector["symbols"]) > 600:
            continue
        data = to_tensor(bytes.fromhex(vector["payload"]))
        for place in ("cpu", DEVICE):
            decoded = decode_symbols(data.to(place), NAME, DEVICE, expected_shape=vector["shape"])
            assert decoded.device.type == DEVICE
            assert decoded.cpu().numpy().tobytes().hex() == vector["symbols"]
            with pytest.raises(ValueError, match=NAME):
                decode_symbols(data.to(place), NAME, DEVICE, expected_shape=[99])
        with pytest.raises(ValueError, match=NAME):
            decode_symbols(data[:-1], NAME, DEVICE)
    assert bool(used) == (not INTERPRETED)
