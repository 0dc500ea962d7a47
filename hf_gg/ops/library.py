"""The operators as PyTorch knows them: schemas, fakes, autograd. Namespace `hf_gg`.

An operator is opaque to `torch.compile`: a graph calls it as it is, and the backend is chosen when it runs. Autograd
saves the codes and never a decoded weight; there is no gradient with respect to codes and scales.
"""

from __future__ import annotations

import torch

from ..formats import get_format
from . import backends, few_rows


_library = torch.library.Library("hf_gg", "DEF")
for _schema in (
    "dequantize(Tensor codes, Tensor scale, str format, ScalarType dtype, str backend='auto') -> Tensor",
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, str format, str backend='auto') -> Tensor",
    "linear_grad_input(Tensor grad, Tensor codes, Tensor scale, str format, str backend='auto') -> Tensor",
    "grouped_linear(Tensor x, Tensor codes, Tensor scale, Tensor offsets, str format, bool transposed=False, "
    "str backend='auto') -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _check_codes(name: str, codes: torch.Tensor, scale: torch.Tensor, ndim: int | None = None) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"hf_gg::{name}: codes must be uint8, got {codes.dtype}.")
    if scale.dtype != torch.float32:
        raise TypeError(f"hf_gg::{name}: scale must be float32, got {scale.dtype}.")
    if codes.ndim < 2 or (ndim is not None and codes.ndim != ndim):
        raise ValueError(
            f"hf_gg::{name}: codes must have {ndim or 'at least 2'} dimensions, got {tuple(codes.shape)}."
        )
    if codes.device != scale.device:
        raise ValueError(f"hf_gg::{name}: codes are on {codes.device}, scale on {scale.device}: move them together.")
    rows, columns = codes.shape[-2:]
    lead = tuple(codes.shape[:-2])
    if tuple(scale.shape) not in ((*lead, rows, 1), (*lead, 1, columns), (*lead, 1, 1)):
        raise ValueError(
            f"hf_gg::{name}: scale of shape {tuple(scale.shape)} does not fit codes of shape {tuple(codes.shape)}: it "
            "must have the same shape with 1 in the last dimension (one scale a row) or in the last but one."
        )


def _check_input(name: str, x: torch.Tensor, codes: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"hf_gg::{name}: the input must be floating point, got {x.dtype}.")
    if x.element_size() == 1:  # the decoded weight would be rounded to so few bits, without a scale
        raise TypeError(
            f"hf_gg::{name}: the input must be float64, float32, bfloat16 or float16, got {x.dtype}: convert it first."
        )
    if x.device != codes.device:
        raise ValueError(
            f"hf_gg::{name}: the input is on {x.device}, the codes on {codes.device}: move them together."
        )


def _check_linear(name: str, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, output: bool) -> None:
    _check_codes(name, codes, scale, ndim=2)
    width = codes.shape[0 if output else 1]
    if scale.shape[-1] != 1:
        raise ValueError(f"hf_gg::{name}: scale must be [{codes.shape[0]}, 1] or [1, 1], got {tuple(scale.shape)}.")
    _check_input(name, x, codes)
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(
            f"hf_gg::{name}: the input's last dimension must be {width} for codes of shape {tuple(codes.shape)}, got "
            f"shape {tuple(x.shape)}."
        )


def _check_dequantize(codes, scale, dtype) -> None:
    _check_codes("dequantize", codes, scale)
    if not dtype.is_floating_point:
        raise TypeError(f"hf_gg::dequantize: dtype must be floating point, got {dtype}.")


def _check_forward(x, codes, scale, bias) -> None:
    _check_linear("linear", x, codes, scale, output=False)
    if bias is not None and tuple(bias.shape) != (codes.shape[0],):
        raise ValueError(f"hf_gg::linear: bias must have shape ({codes.shape[0]},), got {tuple(bias.shape)}.")
    if bias is not None and (not bias.is_floating_point() or bias.device != codes.device):
        raise TypeError(
            f"hf_gg::linear: bias must be floating point and on {codes.device}, got {bias.dtype} on {bias.device}."
        )


def _check_grouped(x, codes, scale, offsets, transposed) -> None:
    _check_codes("grouped_linear", codes, scale, ndim=3)
    width = codes.shape[1 if transposed else 2]
    _check_input("grouped_linear", x, codes)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(
            f"hf_gg::grouped_linear: the input must be floating point of shape [rows, {width}], got {tuple(x.shape)} "
            f"in {x.dtype}."
        )
    if offsets.device != codes.device:
        raise ValueError(
            f"hf_gg::grouped_linear: the offsets are on {offsets.device}, the codes on {codes.device}: move them "
            "together."
        )
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"hf_gg::grouped_linear: offsets must be int32 or int64, got {offsets.dtype}.")
    if offsets.shape != codes.shape[:1]:
        raise ValueError(
            f"hf_gg::grouped_linear: offsets must hold one end a group, {codes.shape[0]}, got {tuple(offsets.shape)}."
        )


def _dequantize(codes, scale, format, dtype, backend="auto"):
    _check_dequantize(codes, scale, dtype)
    return backends.dequantize(codes, scale, get_format(format), dtype, backend)


def _linear(x, codes, scale, bias, format, backend="auto"):
    # a compiled graph comes here at once, and so does a layer that learns
    y = few_rows.linear(x, codes, scale, bias, format, backend)
    if y is not None:
        return y
    _check_forward(x, codes, scale, bias)
    return backends.linear(x, codes, scale, bias, get_format(format), backend)


def _linear_grad_input(grad, codes, scale, format, backend="auto"):
    _check_linear("linear_grad_input", grad, codes, scale, output=True)
    return backends.linear_grad_input(grad, codes, scale, get_format(format), backend)


def _grouped_linear(x, codes, scale, offsets, format, transposed=False, backend="auto"):
    _check_grouped(x, codes, scale, offsets, transposed)
    return backends.grouped_linear(x, codes, scale, offsets, get_format(format), transposed, backend)


for _name, _function in (
    ("dequantize", _dequantize),
    ("linear", _linear),
    ("linear_grad_input", _linear_grad_input),
    ("grouped_linear", _grouped_linear),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


# The fakes check, too: they run wherever one tensor has no memory (a weight that was never loaded), and would hand out
# memory that nobody wrote if another one has.
@torch.library.register_fake("hf_gg::dequantize")
def _(codes, scale, format, dtype, backend="auto"):
    _check_dequantize(codes, scale, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.register_fake("hf_gg::linear")
def _(x, codes, scale, bias, format, backend="auto"):
    _check_forward(x, codes, scale, bias)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("hf_gg::linear_grad_input")
def _(grad, codes, scale, format, backend="auto"):
    _check_linear("linear_grad_input", grad, codes, scale, output=True)
    return grad.new_empty(*grad.shape[:-1], codes.shape[1])


@torch.library.register_fake("hf_gg::grouped_linear")
def _(x, codes, scale, offsets, format, transposed=False, backend="auto"):
    _check_grouped(x, codes, scale, offsets, transposed)
    return x.new_empty(x.shape[0], codes.shape[2 if transposed else 1])


def _linear_setup(ctx, inputs, output):
    _, codes, scale, bias, ctx.format, ctx.backend = inputs
    ctx.save_for_backward(codes, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    codes, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_gg.linear_grad_input(grad, codes, scale, ctx.format, ctx.backend)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


def _grad_input_setup(ctx, inputs, output):
    _, codes, scale, ctx.format, ctx.backend = inputs
    ctx.save_for_backward(codes, scale)


def _grad_input_backward(ctx, grad):
    # g ↦ g W has the adjoint v ↦ v Wᵀ: a forward product, so second derivatives work too
    codes, scale = ctx.saved_tensors
    return torch.ops.hf_gg.linear(grad, codes, scale, None, ctx.format, ctx.backend), None, None, None, None


def _grouped_setup(ctx, inputs, output):
    _, codes, scale, offsets, ctx.format, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(codes, scale, offsets)


def _grouped_backward(ctx, grad):
    codes, scale, offsets = ctx.saved_tensors
    # the transposed product of every group: the same operator in the other orientation
    grad_x = torch.ops.hf_gg.grouped_linear(
        grad.contiguous(), codes, scale, offsets, ctx.format, not ctx.transposed, ctx.backend
    )
    return grad_x, None, None, None, None, None, None


torch.library.register_autograd("hf_gg::linear", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("hf_gg::linear_grad_input", _grad_input_backward, setup_context=_grad_input_setup)
torch.library.register_autograd("hf_gg::grouped_linear", _grouped_backward, setup_context=_grouped_setup)
