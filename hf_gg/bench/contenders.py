"""Linear layers that are measured: ours, PyTorch's, and those of other packages, each as it comes.

A contender is made from a layer and answers with a function from x to y. One that cannot run says why: it is listed,
not left out. Its result is held to the weight that it computes with, or roughly to the full one where that is hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .. import ops
from ..formats import FORMATS, get_format
from ..nn import RF8Linear


Layer = Callable[[torch.Tensor], torch.Tensor]
OURS = ("rf8", "rf8x", "grid")


class CannotRun(RuntimeError):
    """A contender does not run here; the message says why."""


class WrongResult(RuntimeError):
    """A contender's result is not what its weight gives."""


@dataclass(frozen=True)
class Made:
    """A contender for one weight: bare functions, so that nobody pays for the call of a module.

    Attributes:
        layer: from x [rows, in] to y [rows, out].
        weight: what it computes with, float32 [out, in], or None: only roughly the full weight.
        bytes: of the weight as it is stored.
    """

    layer: Layer
    weight: torch.Tensor | None
    bytes: int


def _dense(dtype: torch.dtype) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        weight = linear.weight.detach().to(dtype)
        return Made(lambda x: functional.linear(x.to(dtype), weight), weight.float(), weight.nbytes)

    return make


def _ours(name: str) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        module = RF8Linear.from_linear(linear, format=name)
        codes, scale = module.weight, module.weight_scale
        if module.weight_outlier_index is not None:
            raise RuntimeError(f"{name}: a random layer has no outliers.")
        layer = lambda x: ops.linear(x, codes, scale, None, name)  # noqa: E731
        # decoded by the format's own table: a kernel is not held to another kernel
        return Made(layer, get_format(name).decode(codes) * scale, _bytes(codes, scale))

    return make


def _int8pack(linear: nn.Linear) -> Made:
    if linear.weight.device.type != "cpu":
        raise CannotRun("torch._weight_int8pack_mm: measured on a CPU only")
    weight = linear.weight.detach().float()
    scale = (weight.abs().amax(1) / 127).bfloat16()
    codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    decoded = codes.float() * scale.float()[:, None]
    return Made(lambda x: torch._weight_int8pack_mm(x, codes, scale), decoded, _bytes(codes, scale))


def _bitsandbytes(bits: int) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        import bitsandbytes as package

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line a call on what it casts
        out_features, in_features = linear.weight.shape
        if bits == 8:
            module = package.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
            module.weight = package.nn.Int8Params(
                linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
            )
        else:
            module = package.nn.Linear4bit(
                in_features, out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
            )
            module.weight = package.nn.Params4bit(linear.weight.detach().clone(), quant_type="nf4")
        module = module.to(linear.weight.device).eval()
        if bits == 8:  # a float32 scale a row
            return Made(module.forward, None, linear.weight.numel() + 4 * out_features)
        state = module.weight.quant_state  # whose scales are quantized themselves
        inner = _bytes(state.offset, state.state2.absmax, state.state2.code) if state.nested else 0
        return Made(module.forward, None, _bytes(module.weight.data, state.absmax, state.code) + inner)

    return make


def _torchao(name: str) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        from torchao import quantization

        module = _copy(linear)
        quantization.quantize_(module, getattr(quantization, name)())
        return Made(module.forward, None, _bytes(module.weight))

    return make


def _quanto(name: str) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        from optimum import quanto

        module = quanto.QLinear.from_module(_copy(linear), weights=getattr(quanto, name))
        module.freeze()
        return Made(module.forward, None, _bytes(module.weight))

    return make


def _hqq(linear: nn.Linear) -> Made:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=8, group_size=64)
    device = str(linear.weight.device)
    module = HQQLinear(_copy(linear), config, compute_dtype=torch.bfloat16, device=device)
    return Made(module.forward, None, _bytes(module.W_q, module.meta["scale"], module.meta["zero"]))


def _gemlite(linear: nn.Linear) -> Made:
    if linear.weight.device.type != "cuda":
        raise CannotRun("gemlite: its kernels need a GPU")
    from gemlite.helper import A16W8

    module = A16W8(device=str(linear.weight.device)).from_linear(_copy(linear))
    return Made(module.forward, None, linear.weight.numel())


def _bytes(*tensors: torch.Tensor) -> int:
    """Bytes of tensors, subclasses of other packages taken apart."""
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            total += _bytes(*(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]))
        else:
            total += tensor.nbytes
    return total


def _copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    return copy


# By name; the first one is what the others are compared with.
CONTENDERS: dict[str, Callable[[nn.Linear], Made]] = {
    "bfloat16": _dense(torch.bfloat16),
    "float32": _dense(torch.float32),
    **{name: _ours(name) for name in OURS if name in FORMATS},
    "torch int8pack": _int8pack,
    "bitsandbytes int8": _bitsandbytes(8),
    "bitsandbytes nf4": _bitsandbytes(4),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "quanto qint8": _quanto("qint8"),
    "quanto qfloat8": _quanto("qfloat8"),
    "HQQ 8": _hqq,
    "gemlite": _gemlite,
}
# Largest relative error, in the norm, against the product with `Made.weight` or else with the full weight.
EXACT = 0.006  # bfloat16 rounds the result, and where many rows are decoded the weight
TOLERANCE = {
    "bitsandbytes nf4": 0.15,
    "torchao float8": 0.06,
    "quanto qfloat8": 0.06,
    **dict.fromkeys(OURS, 0.06),
}
ROUGH = 0.03
# Largest error of any one number against an exact reference, in units of their root mean square.
EXACT_EACH = 0.05
# About so many rows of a large result are compared.
_CHECKED_ROWS = 32


def make(name: str, linear: nn.Linear) -> Made:
    """A contender for a layer without bias in bfloat16; `CannotRun` if it does not import or quantize here."""
    try:
        return CONTENDERS[name](linear)
    except CannotRun:
        raise
    except Exception as error:
        raise CannotRun(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def check(name: str, made: Made, linear: nn.Linear, x: torch.Tensor) -> float:
    """Relative error of a contender's product, before it is timed.

    Raises:
        CannotRun: it does not run on this x.
        WrongResult: what it gives is not the product with `Made.weight` or, in any case, roughly with the full one.
    """
    step = max(1, x.shape[0] // _CHECKED_ROWS)
    try:
        with torch.no_grad():
            y = made.layer(x)[::step].float()
    except Exception as error:
        raise CannotRun(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    full = x[::step].float() @ linear.weight.float().T
    rough = _distance(name, x, y, full, TOLERANCE.get(name, ROUGH))
    if made.weight is None:
        return rough
    return _distance(name, x, y, x[::step].float() @ made.weight.T, EXACT, EXACT_EACH)


def _distance(
    name: str, x: torch.Tensor, y: torch.Tensor, expected: torch.Tensor, most: float, most_each: float = float("inf")
) -> float:
    error = y - expected
    relative = float(error.norm() / expected.norm())
    each = float(error.abs().max() / expected.square().mean().sqrt())
    if not (relative <= most and each <= most_each):  # NaN is not
        raise WrongResult(
            f"{name} is wrong for x {[*x.shape]}: relative error {relative:.3g}, at most {most} is right; of one "
            f"number {each:.3g}, at most {most_each}."
        )
    return relative
