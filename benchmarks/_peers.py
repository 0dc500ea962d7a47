"""Other quantizers as functions from a weight [out, in] to (the weight they would compute with, bits they store).

Each runs its package's own code for quantizing and dequantizing; the matrix product is ours, in float32, since most of
their kernels need a GPU. What a package stores is counted from its tensors: codes as they are packed, scales, zero
points. Scales in the weight's own type count as 16 bits, as if the model had come in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


Peer = Callable[[torch.Tensor], tuple[torch.Tensor, float]]


def bits_of(*tensors: torch.Tensor | None) -> float:
    """Bits behind tensors, subclasses taken apart; float32 counts as 16 bits."""
    total = 0.0
    for tensor in tensors:
        if tensor is None:
            continue
        if hasattr(tensor, "__tensor_flatten__"):
            total += bits_of(*(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]))
        else:
            size = 2 if tensor.dtype == torch.float32 else tensor.element_size()
            total += 8 * size * tensor.numel()
    return total


def bitsandbytes_int8() -> Peer:
    import bitsandbytes.functional as bnb

    def run(weight):
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.clone())
        return bnb.int8_vectorwise_dequant(codes, scale).float(), bits_of(codes) + 32 * scale.numel()

    return run


def bitsandbytes_nf4() -> Peer:
    import bitsandbytes.functional as bnb

    def run(weight):
        codes, state = bnb.quantize_4bit(weight.clone(), blocksize=64, quant_type="nf4", compress_statistics=False)
        # the scales of the blocks are float32 whatever the weight is
        return bnb.dequantize_4bit(codes, state).float(), bits_of(codes) + 32 * state.absmax.numel()

    return run


def torchao(bits: int) -> Peer:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    if bits == 8:
        config = Int8WeightOnlyConfig()
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))

    def run(weight):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(linear, config)
        codes = linear.weight
        if bits == 8:
            return codes.dequantize().float(), bits_of(codes)
        groups = codes.scale.numel()
        # a symmetric int4: the zero points are all 0 and are dropped when it is packed
        return codes.dequantize().float(), 4 * weight.numel() + 16 * groups

    return run


def quanto(name: str) -> Peer:
    from optimum import quanto as package

    def run(weight):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        codes = package.QLinear.from_module(linear, weights=getattr(package, name)).qweight
        return codes.dequantize().float(), bits_of(codes)

    return run


def hqq(bits: int) -> Peer:
    from hqq.core.quantize import Quantizer

    def run(weight):
        codes, meta = Quantizer.quantize(
            weight.clone(), nbits=bits, axis=1, group_size=64, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(codes, meta).float(), bits_of(codes, meta["scale"], meta["zero"])

    return run


PEERS: dict[str, Callable[[], Peer]] = {
    "bitsandbytes int8": bitsandbytes_int8,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "torchao int8": lambda: torchao(8),
    "torchao int4": lambda: torchao(4),
    "quanto qint8": lambda: quanto("qint8"),
    "quanto qfloat8": lambda: quanto("qfloat8"),
    "quanto qint4": lambda: quanto("qint4"),
    "HQQ 8": lambda: hqq(8),
    "HQQ 4": lambda: hqq(4),
    "HQQ 3": lambda: hqq(3),
}
