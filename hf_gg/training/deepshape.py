"""DeepShape: trained weights are mapped, in their order, to a generalized Gaussian of another shape and scale."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..ggd import SHAPE_MAX, SHAPE_MIN, FitError, fit_stream
from ..ggd.checks import check_method
from .parts import blocks
from .selection import check_number, select_matrices
from .shapemap import PIECE, Ranks, ShapeMap, largest_rank, scale_of, std_of


MODES = ("tensor", "global")
MAPS = ("parametric", "empirical")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """A generalized Gaussian about zero: its shape ν, scale α and standard deviation.

    `clamped` says that a fit lies outside of 0.1 … 8, and the nearer end was taken. NaN where there is no fit.
    """

    shape: float
    scale: float
    std: float
    clamped: bool = False


@dataclass(frozen=True)
class Reshaped:
    """What became of one tensor.

    Attributes:
        numel: number of weights.
        before: the fit of the weights as they were (in mode `"global"` of all tensors together).
        target: what they were mapped to.
        after: the fit of the tensor as it is now.
    """

    numel: int
    before: Shape
    target: Shape
    after: Shape


@torch.no_grad()
def deepshape_(
    model: nn.Module | Mapping[str, torch.Tensor],
    shape_scale: float = 0.8,
    std_scale: float = 1.0,
    mode: str = "tensor",
    map: str = "parametric",
    modules: str | Iterable[str] | None = None,
    embeddings: bool = False,
    method: str = "moments",
) -> dict[str, Reshaped]:
    """Map the matrices of a model to a generalized Gaussian of `shape_scale` times their shape, in place.

        report = hf_gg.deepshape_(model, shape_scale=0.8)
        report["model.layers.0.mlp.up_proj.weight"].after.shape

    The map is odd and monotone: signs and zeros stay, larger magnitudes stay larger, equal ones equal. Norms, biases
    and, unless asked for, embeddings are left alone. Nothing is changed if an error is raised. Fine-tune afterwards.

    Args:
        model: a model, whose matrices are taken (`select_matrices`, frozen ones too); or tensors by name, all taken.
        shape_scale: factor on the shape ν. Below 1 the peak becomes sharper and the tails longer, and weights cost
            fewer bits on a grid; above 1 the reverse.
        std_scale: factor on the standard deviation about zero.
        mode: `"tensor"`: a fit and a map of each tensor; `"global"`: one of all together.
        map: `"parametric"`: the quantile of the fitted distribution's probability, a map of four numbers that can be
            inverted, and moves trained models little; the result has the wanted shape as far as the fit is right.
            `"empirical"`: the weight of rank r gets the quantile of (r − ½) / n, so that the result has the wanted
            shape and deviation whatever the weights were, and loses outliers.
        modules: names of modules, see `select_matrices`; None for all.
        embeddings: take `nn.Embedding` too.
        method: of the fit, `"moments"` or `"mle"`.

    Returns:
        What became of each tensor, by name.

    Raises:
        TypeError: quantized weights, or another dtype than float of 16 bits or more.
        ValueError: a factor that is not positive, a shape outside of 0.1 … 8, an unknown mode, map, method or module,
            nothing selected; a tensor that is empty, constant, not finite, on the meta device, or split over
            processes, or would leave the range of its dtype.
    """
    check_factor("shape_scale", shape_scale)
    check_factor("std_scale", std_scale)
    for name, value, allowed in (("mode", mode, MODES), ("map", map, MAPS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(repr(x) for x in allowed)}, got {value!r}.")
    check_method(method)
    tensors = _selected(model, modules, embeddings)
    groups = [tensors] if mode == "global" else [{name: tensor} for name, tensor in tensors.items()]
    plans = []
    for group in groups:
        what = next(iter(group)) if len(group) == 1 else "the model"
        before = fitted(group, method, what)
        target = target_of(before, shape_scale, std_scale, what)
        build = _empirical(group, target) if map == "empirical" else _parametric(group, before, target)
        plans.append((group, before, target, build))
    warn_clamped({name: before for group, before, *_ in plans for name in group})
    report = {}
    for group, before, target, build in plans:
        function = build()
        for name, tensor in group.items():
            write_(tensor.detach(), function)
            try:
                after = fitted({name: tensor}, method, name)
            except FitError:  # a constant one among others, in mode "global"
                after = Shape(math.nan, math.nan, float(tensor.double().square().mean().sqrt()))
            report[name] = Reshaped(tensor.numel(), before, target, after)
    return report


def fitted(tensors: Mapping[str, torch.Tensor], method: str, what: str) -> Shape:
    """The generalized Gaussian about zero that fits tensors taken together.

    Args:
        tensors: by name.
        method: `"moments"` or `"mle"`.
        what: the name of all of them, for errors.

    Raises:
        FitError: there is none, and why; a tensor with NaN or infinity is named.
    """
    low, high = math.inf, -math.inf
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise FitError(f"{name} is empty: leave it out.")
        extremes = [torch.stack(torch.aminmax(block)) for block in blocks(tensor.detach())]
        found = torch.stack(extremes).double()
        if not bool(found.isfinite().all()):
            raise FitError(f"{name} has weights that are NaN or infinite: repair the model, or leave it out.")
        low, high = min(low, float(found.min())), max(high, float(found.max()))
    if low == high:
        raise FitError(f"{what} is constant, {low:g}: there is no shape to change. Leave it out with modules=….")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clamped fits, which do not name the tensor
        fit = fit_stream(lambda: (tensor.detach() for tensor in tensors.values()), method, loc=0.0)
    shape, scale = float(fit.shape), float(fit.scale)
    return Shape(shape, scale, std_of(scale, shape), bool(fit.clamped))


def warn_clamped(fits: Mapping[str, Shape]) -> None:
    """Say which tensors are no generalized Gaussians of a shape within 0.1 … 8."""
    names = [name for name, fit in fits.items() if fit.clamped]
    if names:
        others = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        warnings.warn(
            f"{names[0]}{others} no generalized Gaussian of a shape from {SHAPE_MIN:g} to {SHAPE_MAX:g}: "
            f"{fits[names[0]].shape:g} was taken for its shape. Weights from a uniform initializer are like that: map "
            "trained weights.",
            stacklevel=4,
        )


def target_of(before: Shape, shape_scale: float, std_scale: float, what: str) -> Shape:
    """The distribution that weights with the fit `before` are to have.

    Raises:
        ValueError: its shape lies outside of 0.1 … 8.
    """
    shape, std = before.shape * shape_scale, before.std * std_scale
    if not SHAPE_MIN <= shape <= SHAPE_MAX:
        raise ValueError(
            f"{what} has shape {before.shape:.3g}, and shape_scale={shape_scale:g} makes it {shape:.3g}: shapes are "
            f"{SHAPE_MIN:g} to {SHAPE_MAX:g}. Choose shape_scale between {SHAPE_MIN / before.shape:.3g} and "
            f"{SHAPE_MAX / before.shape:.3g}, or leave it out."
        )
    return Shape(shape, scale_of(std, shape), std)


def write_(tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `function` of each flat block in its place, rounded to the tensor's dtype."""
    for block in blocks(tensor):
        block.copy_(function(block))


def magnitudes(tensors: Iterable[torch.Tensor]) -> tuple[float, float]:
    """The smallest magnitude that is not zero, and the largest."""
    low, high = math.inf, 0.0
    for tensor in tensors:
        for block in blocks(tensor.detach()):
            a = block.abs()
            low = min(low, float(torch.where(a > 0, a, torch.inf).min()))
            high = max(high, float(a.max()))
    return low, high


def check_factor(name: str, value: float) -> float:
    """`value` if it is a finite number above zero.

    Raises:
        TypeError: not a number. ValueError: not positive, or not finite.
    """
    if not check_number(name, value) > 0:
        raise ValueError(f"{name} must be positive, got {value}: 1 leaves it as it is.")
    return float(value)


def check_range(name: str, dtype: torch.dtype, largest: float) -> None:
    """Raise a `ValueError` if a magnitude has no place in a dtype."""
    if not largest <= torch.finfo(dtype).max:
        raise ValueError(
            f"{name} would get weights of up to {largest:.3g}, which {dtype} cannot hold: its largest weights lie far "
            'outside of the fit. Use map="empirical", a shape_scale nearer to 1, or leave it out.'
        )


def _empirical(group: Mapping[str, torch.Tensor], target: Shape) -> Callable:
    def build() -> Callable[[torch.Tensor], torch.Tensor]:
        ranks = Ranks()
        for tensor in group.values():
            for piece in blocks(tensor.detach(), PIECE):
                ranks.update(piece)
        return ranks.to(target.scale, target.shape)

    largest = largest_rank(sum(tensor.numel() for tensor in group.values()), target.shape) * target.scale
    for name, tensor in group.items():
        check_range(name, tensor.dtype, largest)
    return build


def _parametric(group: Mapping[str, torch.Tensor], before: Shape, target: Shape) -> Callable:
    low, high = magnitudes(group.values())
    shape_map = ShapeMap(before.scale, before.shape, target.scale, target.shape)
    largest = shape_map.magnitude(high)
    for name, tensor in group.items():
        check_range(name, tensor.dtype, largest)
    return lambda: shape_map.table(low, high)


def _place(tensor: object) -> tuple | None:
    """What tensors that share their memory have in common; None of what is no plain tensor."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:  # type: ignore[attr-defined]
        return None
    assert isinstance(tensor, torch.Tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _selected(
    model: nn.Module | Mapping[str, torch.Tensor], modules: str | Iterable[str] | None, embeddings: bool
) -> dict[str, torch.Tensor]:
    if isinstance(model, nn.Module):
        names = modules if modules is None or isinstance(modules, str) else list(modules)
        tensors: dict[str, torch.Tensor] = dict(select_matrices(model, names, embeddings, trainable=False))
    elif isinstance(model, Mapping):
        if modules is not None:
            raise ValueError("modules is for models: give only the tensors that are to be mapped.")
        places = {name: _place(tensor) or name for name, tensor in model.items()}
        first = {place: name for name, place in reversed(places.items())}  # tied ones are mapped once
        tensors = {name: t for name, t in model.items() if first[places[name]] == name}
        if not tensors:
            raise ValueError("model holds no tensor: there is nothing to map.")
    else:
        raise TypeError(f"model must be a torch module or tensors by name, got {type(model).__name__}.")
    for name, tensor in tensors.items():
        check_weights(name, tensor)
    return tensors


def check_weights(name: str, tensor: torch.Tensor) -> None:
    """Raise a `TypeError` or `ValueError` unless a tensor's weights can be mapped."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} is {tensor.dtype}: quantized codes cannot be mapped. Call model.dequantize(), map, and quantize "
            "again; or name other modules."
        )
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: convert it to a float of 16 bits or more.")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: load the weights first.")
    if hasattr(tensor, "placements"):
        raise ValueError(f"{name} is split over processes: map the model in one process, before it is split.")
