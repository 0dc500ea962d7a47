"""Size against the order-0 entropy, and speed, of the entropy coders: on generalized Gaussian levels of known rate,
and on RF8 codes and grid levels of real models; beside zstd, constriction, numba and the numpy fallback.

    python benchmarks/coding.py [--rounds 7] [--count 4000000]

Speeds are in million weights a second, the median of the rounds, measured in turns: of one thread's processor time
(which other processes on the machine disturb less than the clock), and for two threads by the clock, best round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import constriction
import numba
import numpy as np
import torch
import zstandard
from _common import write_csv
from snr import linear_weights

from hf_gg import coding, data
from hf_gg.coding import codec, reference
from hf_gg.coding.container import read_header
from hf_gg.formats import get_format


RATES = (0.2, 0.5, 1, 2, 3, 4, 5, 6, 7)
SLOW = 400_000  # weights for the coders that are slow


def gaussian_levels(rate: float, shape: float, count: int) -> np.ndarray:
    """Sign-magnitude codes of levels whose order-0 entropy is `rate`."""
    generator = np.random.Generator(np.random.PCG64(1))
    drawn = generator.gamma(1 / shape, size=count) ** (1 / shape) * generator.choice([-1, 1], count)
    low, high = -8.0, 6.0
    for _ in range(20):
        middle = (low + high) / 2
        codes = sign_magnitude(torch.from_numpy(2.0**middle * drawn[:200_000])).numpy()
        low, high = (middle, high) if coding.entropy(torch.from_numpy(codes)) < rate else (low, middle)
    return sign_magnitude(torch.from_numpy(2.0**middle * drawn)).numpy()


def sign_magnitude(steps: torch.Tensor) -> torch.Tensor:
    """Nearest levels, at most ±127, as codes."""
    levels = steps.round().clamp(-127, 127).to(torch.int16)
    return torch.where(levels < 0, 128 - levels, levels).to(torch.uint8)


def models() -> Iterator[tuple[str, list[torch.Tensor]]]:
    from transformers import AutoModel, AutoModelForCausalLM, GgufConfig, GPT2LMHeadModel

    gguf = data.smollm2_gguf()
    yield "all-MiniLM-L6-v2", linear_weights(AutoModel.from_pretrained(data.minilm(), dtype=torch.float32))
    yield "MGM GPT-2", linear_weights(GPT2LMHeadModel.from_pretrained(data.mgm_gpt2(), dtype=torch.float32))
    smollm2 = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    yield "SmolLM2-135M", linear_weights(smollm2)


def sources(count: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """A name and the symbols, tensor by tensor."""
    for shape in (0.7, 1.0, 2.0):
        for rate in RATES:
            yield f"GGD shape {shape}, {rate} bits", [gaussian_levels(rate, shape, count)]
    for size in (1_000, 10_000, 100_000):
        for rate in (0.5, 2, 5):
            yield f"GGD shape 1.5, {rate} bits, {size} weights", [gaussian_levels(rate, 1.5, 200_000)[:size].copy()]
    for name, weights in models():
        rf8 = get_format("rf8")
        yield f"{name}, rf8", [rf8.quantize(weight)[0].numpy().reshape(-1) for weight in weights]
        for part in (4, 8, 16):
            steps = (sign_magnitude(weight / (weight.std(dim=1, keepdim=True) / part)) for weight in weights)
            yield f"{name}, grid std/{part}", [codes.numpy().reshape(-1) for codes in steps]


@numba.njit(nogil=True, cache=True)
def numba_rans(slots, table, bits, states, words, ends, out, chunk):
    """`rows_portable` of coder.c, without its hashes."""
    lanes, mask, at = states.shape[1], np.uint32((1 << bits) - 1), 0
    for index in range(len(ends)):
        state = states[index].copy()
        for i in range(index * chunk, min(len(out), (index + 1) * chunk)):
            lane = (i - index * chunk) % lanes
            x = state[lane]
            slot = x & mask
            symbol = slots[slot]
            entry = table[symbol]
            x = np.uint32((entry & np.uint32(0xFFFF)) * (x >> np.uint32(bits)) + slot - (entry >> np.uint32(16)))
            if x < np.uint32(65536):
                x = np.uint32(x << np.uint32(16)) | np.uint32(words[at])
                at += 1
            state[lane] = x
            out[i] = symbol


def with_numba(payload: torch.Tensor, out: np.ndarray) -> Callable[[], object]:
    """A decoder of a rANS payload."""
    raw = payload.numpy()
    header = read_header(raw, len(raw), "payload")
    frequencies = codec.frequencies_of(header)
    middle = header.size + 4 * header.lanes * len(header.lengths)
    states = np.frombuffer(raw[header.size : middle].tobytes(), np.uint32).reshape(-1, header.lanes)
    words = np.frombuffer(raw[middle:].tobytes(), np.uint16)
    slots = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
    table = codec.kernels.packed_table(frequencies)
    ends = np.cumsum(header.lengths)
    return lambda: numba_rans(slots, table, header.bits, states, words, ends, out, header.chunk)


def with_reference(function: Callable, *arguments) -> Callable[[], object]:
    """A call without the compiled coder."""

    def run():
        kept, codec._backend = codec._backend, lambda: reference
        try:
            return function(*arguments)
        finally:
            codec._backend = kept

    return run


class Constriction:
    """constriction's ANS coder with the counted probabilities."""

    def __init__(self, symbols: np.ndarray):
        counts = np.bincount(symbols, minlength=256).astype(np.float64)
        self.model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
        self.symbols, self.count = symbols.astype(np.int32), len(symbols)
        self.words = self.encode()

    def encode(self) -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(self.symbols, self.model)
        return coder.get_compressed()

    def decode(self) -> np.ndarray:
        return constriction.stream.stack.AnsCoder(self.words).decode(self.model, self.count)


def speeds(functions: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Million weights a second of processor time, the median of rounds in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, (_, function) in functions.items():
            start = time.thread_time()
            function()
            if index:  # the first one warms up
                seconds[name].append(time.thread_time() - start)
    return {name: functions[name][0] / 1e6 / statistics.median(times) for name, times in seconds.items()}


def measure(source: str, tensors: list[np.ndarray], rounds: int) -> list[dict]:
    count = sum(map(len, tensors))
    entropy = sum(len(part) * coding.entropy(torch.from_numpy(part)) for part in tensors) / count
    largest = max(tensors, key=len)
    few = largest[:SLOW]
    whole, short = torch.from_numpy(largest), torch.from_numpy(few)
    sizes: dict[str, int] = {}
    encode: dict[str, tuple[int, Callable]] = {}
    decode: dict[str, tuple[int, Callable]] = {}
    models: dict[str, str] = {}
    for coder in coding.CODERS:
        payloads = [coding.encode(torch.from_numpy(part), coder, threads=1) for part in tensors]
        sizes[coder] = sum(payload.numel() for payload in payloads)
        models[coder] = "/".join(sorted({coding.info(payload).model for payload in payloads}))
        own, out = coding.encode(whole, coder), torch.empty_like(whole)
        assert torch.equal(coding.decode(own), whole)
        encode[coder] = len(largest), lambda coder=coder: coding.encode(whole, coder, threads=1)
        decode[coder] = len(largest), lambda own=own, out=out: coding.decode(own, threads=1, out=out)
    rans, small = coding.encode(whole), coding.encode(short)
    target = np.empty_like(largest)
    decode["rans, numba"] = len(largest), with_numba(rans, target)
    decode["rans, numba"][1]()
    assert (target == largest).all()
    encode["rans, numpy"] = len(few), with_reference(coding.encode, short)
    decode["rans, numpy"] = len(few), with_reference(coding.decode, small)
    for level in (1, 3):
        name, packer = f"zstd-{level}", zstandard.ZstdCompressor(level=level)
        sizes[name] = sum(len(packer.compress(part.tobytes())) for part in tensors)
        raw = largest.tobytes()
        packed, unpacker = packer.compress(raw), zstandard.ZstdDecompressor()
        encode[name] = len(largest), lambda packer=packer, raw=raw: packer.compress(raw)
        decode[name] = len(largest), lambda unpacker=unpacker, packed=packed: unpacker.decompress(packed)
    # its model takes a byte or more a symbol to store; here it is counted as free
    sizes["constriction"] = sum(Constriction(part).words.nbytes for part in tensors)
    peer = Constriction(few)
    assert (peer.decode() == few).all()
    encode["constriction"], decode["constriction"] = (len(few), peer.encode), (len(few), peer.decode)
    encoded, decoded = speeds(encode, rounds), speeds(decode, rounds)
    two = {coder: two_threads(coder, whole, rounds) for coder in coding.CODERS}
    rows = []
    for name in dict.fromkeys((*sizes, *decode)):
        size = sizes.get(name, sizes["rans"])
        rows.append(
            {
                "source": source,
                "weights": count,
                "coder": name,
                "model": models.get(name, ""),
                "entropy": f"{entropy:.4f}",
                "bits": f"{8 * size / count:.4f}",
                "over_entropy": f"{8 * size / count - entropy:.4f}",
                "within": 8 * size / count <= 1.01 * entropy + 0.02,
                "encode_mws": f"{encoded[name]:.1f}" if name in encoded else "",
                "decode_mws": f"{decoded[name]:.1f}",
                "decode_2_threads_mws": f"{two[name]:.1f}" if name in two else "",
            }
        )
    return rows


def two_threads(coder: str, symbols: torch.Tensor, rounds: int) -> float:
    """Million weights a second by the clock, the best of the rounds."""
    payload, out, best = coding.encode(symbols, coder), torch.empty_like(symbols), float("inf")
    for _ in range(2 * rounds):
        start = time.perf_counter()
        coding.decode(payload, threads=2, out=out)
        best = min(best, time.perf_counter() - start)
    return symbols.numel() / 1e6 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=4_000_000, help="weights of a synthetic source")
    arguments = parser.parse_args()
    rows = []
    for source, tensors in sources(arguments.count):
        found = measure(source, tensors, arguments.rounds)
        for row in found:
            print(*(f"{value}" for value in row.values()), sep=", ", flush=True)
        rows += found
    print(write_csv("coding", rows))


if __name__ == "__main__":
    main()
