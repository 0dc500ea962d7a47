"""Initialization of weight matrices with generalized Gaussian draws.

The reference draws every parameter with standard deviation sqrt(ξ / n), ξ = 1 for linear layers and sigmoid, 2 for
ReLU, 2 / (1 + k²) for leaky ReLU of slope k, and n the first dimension, which for `nn.Linear` is the fan-out. Here
ξ = gain², n is the fan-in or the fan-out of the layer at hand, or the standard deviation is the one that the
architecture's own initializer gives and only the shape changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..ggd.sampling import check_shape, gg_


FANS = ("fan_in", "fan_out")
_GAINS = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu")
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class GGInit:
    """How weight matrices are drawn.

    Args:
        shape: of the generalized Gaussian, 0.1 to 8; 2 is Gaussian, 1 Laplace.
        std: `"model"`, the standard deviation that the architecture's own initializer gives the parameter; `"fan_in"`
            or `"fan_out"`, 1 / sqrt(n); or a number, the same for all matrices.
        gain: a factor on it: a number, or the name of the non-linearity behind the layer, as in
            `torch.nn.init.calculate_gain`. `"relu"` is sqrt(2), `"leaky_relu"` is for a slope of 0.01; for a slope k
            give sqrt(2 / (1 + k²)).

    Raises:
        ValueError: an unknown or impossible value.
    """

    shape: float = 2.0
    std: str | float = "model"
    gain: str | float = "linear"

    def __post_init__(self):
        check_shape(self.shape)
        if isinstance(self.std, str):
            if self.std not in ("model", *FANS):
                raise ValueError(f"std must be 'model', 'fan_in', 'fan_out' or a positive number, got {self.std!r}.")
        else:
            _check_positive("std", self.std, "'model', 'fan_in', 'fan_out'")
        if isinstance(self.gain, str):
            if self.gain not in _GAINS:
                raise ValueError(f"gain must be a positive number or one of {', '.join(_GAINS)}, got {self.gain!r}.")
        else:
            _check_positive("gain", self.gain, "the name of a non-linearity")

    @property
    def factor(self) -> float:
        """The gain as a number."""
        return nn.init.calculate_gain(self.gain) if isinstance(self.gain, str) else float(self.gain)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GGInit:
        """From the keys of a JSON file.

        Raises:
            ValueError: an unknown key, or what the constructor refuses.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = ", ".join(map(repr, sorted(map(str, values.keys() - set(known)))))
        if unknown:
            raise ValueError(f"Unknown GGInit key {unknown}: the keys are {', '.join(known)}.")
        return cls(**values)


@torch.no_grad()
def gg_init_(
    model: nn.Module,
    shape: float = 2.0,
    std: str | float = "model",
    gain: str | float = "linear",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Redraw the weight matrices of a model of plain torch modules, in place.

    Biases, norms and everything else of one dimension stay as they are, and so do buffers. The row of an embedding's
    `padding_idx` becomes zero. Tied weights are one parameter and are drawn once. A model that is wholly on the meta
    device is left alone: call this again when it has memory (`to_empty` gives it, with whatever was there in the
    biases: call `reset_parameters` of the modules first).

    Args:
        model: any module; for Transformers models use `hf_gg.gg_init_`, which knows their own initializers.
        shape, std, gain: see `GGInit`. With `std="model"`, the standard deviation of the modules' `reset_parameters`.
        generator: instead of the device's default one.

    Returns:
        The model.

    Raises:
        ValueError: a value out of range; a matrix whose own standard deviation or whose fans are not known (it is
            named); a model that is partly on the meta device.
        TypeError: `model` is no module; a matrix that is not floating point, as codes are. Nothing is drawn then.
    """
    init = GGInit(shape, std, gain)
    check_module(model)
    if any(hasattr(module, "_init_weights") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has an initializer of its own (`_init_weights`): use hf_gg.gg_init_."
        )
    targets = check_matrices(model)
    deviations = [deviation(init, *target) for target in targets]
    for (_, module, parameter), value in zip(targets, deviations):
        gg_(parameter, value, init.shape, generator)
        zero_padding_(module)
    return model


def check_module(model: nn.Module) -> None:
    """Raise a `TypeError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: give the model to initialize.")


def check_matrices(model: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter]]:
    """The weight matrices of a model that can be drawn: name, module, parameter; empty for a model on the meta device.

    Raises:
        ValueError: some of them are on the meta device, as with disk offload, and others are not.
        TypeError: one is not floating point.
    """
    targets = list(matrices(model))
    for name, _, parameter in targets:
        if not parameter.is_floating_point() or parameter.element_size() == 1:
            raise TypeError(
                f"{name} is {parameter.dtype}: only weights of 16 bits or more can be drawn. Call "
                "`model.dequantize()` on a quantized model, or initialize the modules that you mean."
            )
    absent = [name for name, _, parameter in targets if parameter.is_meta]
    if absent and len(absent) < len(targets):
        raise ValueError(f"{absent[0]} is on the meta device and other weights are not: load the model as a whole.")
    return [] if absent else targets


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield name, module and parameter of every weight matrix or stack of them, a tied one once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            continue  # their gains may have two dimensions
        for name, parameter in module._parameters.items():
            if parameter is not None and is_matrix(parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, module, parameter


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix: no vector, also none with dimensions of size 1 in front, as a class token."""
    return parameter.ndim == 2 or sum(size > 1 for size in parameter.shape) >= 2


def fans(module: nn.Module | None, parameter: torch.Tensor, name: str = "") -> tuple[int, int] | None:
    """Fan-in and fan-out of a weight matrix: terms in an output, and outputs that an input goes into.

    An embedding [rows, width] counts as the output layer that it may be tied to: fan-in is its width. Convolutions
    count the taps of their kernel and the channels of one group, a stride is not taken into account. Experts are
    [experts, out, in], or [experts, in, out] where the module says `is_transposed`; other parameters are [out, in],
    also with dimensions of size 1 in front.

    Args:
        module: that owns the parameter; None if it is not known.
        parameter: the weight.
        name: of the parameter in the module.

    Returns:
        None where the layout is not known.
    """
    shape = tuple(parameter.shape)
    if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
        taps = math.prod(shape[2:])
        if module.transposed:
            return shape[0] // module.groups * taps, shape[1] * taps
        return shape[1] * taps, shape[0] // module.groups * taps
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return shape[0], shape[1]
    transposed = getattr(module, "is_transposed", None)
    if len(shape) == 3 and name in _EXPERTS and transposed is not None:
        return (shape[1], shape[2]) if transposed else (shape[2], shape[1])
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return (shape[1], shape[0]) if len(shape) == 2 else None


def zero_padding_(module: nn.Module) -> None:
    """Zero the row of an embedding's `padding_idx`, as its own initializer does."""
    row, weight = getattr(module, "padding_idx", None), cast("Any", getattr(module, "weight", None))
    if row is None or not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or weight.is_meta:
        return
    if not hasattr(weight, "placements"):
        weight[row].zero_()
        return
    # a row of a DTensor is a copy
    keep = torch.ones(weight.shape[0], 1, dtype=weight.dtype, device=weight.to_local().device)
    keep[row] = 0
    from torch.distributed.tensor import Replicate, distribute_tensor

    rows = [placement if getattr(placement, "dim", None) == 0 else Replicate() for placement in weight.placements]
    weight.to_local().mul_(distribute_tensor(keep, weight.device_mesh, rows, src_data_rank=None).to_local())


def deviation(init: GGInit, name: str, module: nn.Module, parameter: torch.Tensor) -> float:
    """The standard deviation that a weight of a plain module gets."""
    if init.std == "model":
        base = own_deviation(module, name.rpartition(".")[2], parameter)
        if base is None:
            raise ValueError(
                f"The standard deviation that {type(module).__name__} gives {name} is not known: give std='fan_in', "
                "'fan_out' or a number."
            )
        return init.factor * base
    return fan_deviation(init, fans(module, parameter, name.rpartition(".")[2]), name, parameter)


def fan_deviation(init: GGInit, known: tuple[int, int] | None, name: str, parameter: torch.Tensor) -> float:
    """The standard deviation by the fans, or the number that was asked for.

    Raises:
        ValueError: the fans are needed and not known.
    """
    if not isinstance(init.std, str):
        return init.factor * float(init.std)
    if known is None:
        raise ValueError(
            f"Which dimensions of {name}, {tuple(parameter.shape)}, are inputs is not known: give std='model' or a "
            "number."
        )
    return init.factor / math.sqrt(max(known[FANS.index(init.std)], 1))


def own_deviation(module: nn.Module, name: str, parameter: torch.Tensor) -> float | None:
    """Of the draws of torch's own `reset_parameters`, which are uniform but for embeddings; None if another one's."""
    for base, method in _INITIALIZERS.items():
        if isinstance(module, base):
            if getattr(type(module), method) is not getattr(base, method):
                return None
            break
    else:
        return None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1.0
    if isinstance(module, nn.RNNBase):
        return 1 / math.sqrt(3 * module.hidden_size)
    if isinstance(module, nn.MultiheadAttention):
        return math.sqrt(2 / sum(parameter.shape)) if name.endswith("_weight") else None
    if name != "weight":
        return None
    # `kaiming_uniform_` with slope sqrt(5) is uniform within 1 / sqrt(fan-in), the second dimension with its taps
    taps = 1 if isinstance(module, nn.Bilinear) else math.prod(parameter.shape[2:])
    return 1 / math.sqrt(max(3 * parameter.shape[1] * taps, 1))


# The modules of torch that hold matrices, with the method that initializes them.
_INITIALIZERS: dict[type[nn.Module], str] = {
    nn.Linear: "reset_parameters",
    nn.Bilinear: "reset_parameters",
    nn.Embedding: "reset_parameters",
    nn.EmbeddingBag: "reset_parameters",
    nn.modules.conv._ConvNd: "reset_parameters",
    nn.RNNBase: "reset_parameters",
    nn.MultiheadAttention: "_reset_parameters",
}


def _check_positive(name: str, value: object, others: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be a positive, finite number, or {others}, got {value!r}.")
