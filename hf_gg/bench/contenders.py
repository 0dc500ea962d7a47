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
from ..formats import FORMATS
from ..nn import RF8Linear


Layer = Callable[[torch.Tensor], torch.Tensor]
OURS = ("rf8", "rf8x", "grid")


class CannotRun(RuntimeError):
    """A contender does not run here; the message says why."""


@dataclass(frozen=True)
class Made:
    """A contender for one weight.

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
        # the function, as of the others, and not the module around it
        layer = lambda x: ops.linear(x, codes, scale, None, name)  # noqa: E731
        return Made(layer, module.dequantize(), module.weight.nbytes + module.weight_scale.nbytes)

    return make


def _int8pack(linear: nn.Linear) -> Made:
    if linear.weight.device.type != "cpu":
        raise CannotRun("torch._weight_int8pack_mm: measured on a CPU only")
    weight = linear.weight.detach().float()
    scale = (weight.abs().amax(1) / 127).bfloat16()
    codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    decoded = codes.float() * scale.float()[:, None]
    return Made(lambda x: torch._weight_int8pack_mm(x, codes, scale), decoded, codes.nbytes + scale.nbytes)


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
        return Made(module, None, linear.weight.numel() * bits // 8)

    return make


def _torchao(name: str) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        from torchao import quantization

        module = nn.Sequential(_copy(linear))
        quantization.quantize_(module, getattr(quantization, name)())
        return Made(module, None, linear.weight.numel())

    return make


def _quanto(name: str) -> Callable[[nn.Linear], Made]:
    def make(linear: nn.Linear) -> Made:
        from optimum import quanto

        module = quanto.QLinear.from_module(_copy(linear), weights=getattr(quanto, name))
        module.freeze()
        return Made(module, None, linear.weight.numel())

    return make


def _hqq(linear: nn.Linear) -> Made:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=8, group_size=64)
    device = str(linear.weight.device)
    module = HQQLinear(_copy(linear), config, compute_dtype=torch.bfloat16, device=device)
    return Made(module, None, linear.weight.numel())


def _gemlite(linear: nn.Linear) -> Made:
    if linear.weight.device.type != "cuda":
        raise CannotRun("gemlite: its kernels need a GPU")
    from gemlite.helper import A16W8

    return Made(A16W8(device=str(linear.weight.device)).from_linear(_copy(linear)), None, linear.weight.numel())


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
TOLERANCE = {"bitsandbytes nf4": 0.15, "torchao float8": 0.06, "quanto qfloat8": 0.06}
ROUGH = 0.03
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
        RuntimeError: its result is wrong.
    """
    try:
        with torch.no_grad():
            y = made.layer(x)[:: max(1, x.shape[0] // _CHECKED_ROWS)].float()
    except Exception as error:
        raise CannotRun(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    weight = linear.weight.float() if made.weight is None else made.weight
    expected = x[:: max(1, x.shape[0] // _CHECKED_ROWS)].float() @ weight.T
    relative = float((y - expected).norm() / expected.norm())
    most = TOLERANCE.get(name, ROUGH) if made.weight is None else EXACT
    if not relative <= most:  # NaN is not
        raise RuntimeError(
            f"{name} is wrong for x {[*x.shape]}: relative error {relative:.3g}, at most {most} is right."
        )
    return relative
