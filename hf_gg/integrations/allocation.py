"""How wide the steps of each weight of a model are, when the whole model is at hand.

A model that is quantized while it is read gets its steps weight by weight (`hf_gg.formats.steps`): each meets the
target alone. With all weights in memory the target is the model's, and bits go where they buy most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..formats import StepRule
from ..formats.allocation import allocate as _allocate
from ..formats.steps import steps_of
from ..nn import RF8Experts
from ..nn.linear import is_conv1d
from .selection import Selection
from .sensitivity import row_sensitivity


SENSITIVITIES = ("self", "weights")


def allocate(
    model: nn.Module,
    target_bits: float | None = None,
    target_snr: float | None = None,
    target_error: float | None = None,
    sensitivity: str | Mapping[str, torch.Tensor] = "self",
    chosen: Selection | None = None,
) -> dict[str, torch.Tensor]:
    """Steps for the weights of a model that are to become codes of a grid.

    Args:
        model: a Transformers model in full precision, in memory.
        target_bits: wanted mean of bits a weight, steps and outliers counted.
        target_snr: wanted signal-to-noise ratio of each weight, dB. It says nothing of the model, so no sensitivity
            counts.
        target_error: wanted share of the squared error in the squared weights, both weighed by the sensitivity.
        sensitivity: `"self"` (texts that the model writes itself tell where errors cost most; the model runs, for
            which it needs the memory of its activations and of the largest weight), `"weights"` (the same signal to
            noise everywhere; also where `"self"` cannot be had), or what a squared error in the rows of each weight
            costs, [..., rows, 1] by parameter name.
        chosen: the modules; those that `GGConfig()` takes by default.

    Returns:
        By parameter name, float32 steps [..., rows, 1]. A weight that several modules share is there once.

    Raises:
        ValueError: not one target, one that cannot be met, an unknown sensitivity, NaN or infinity in a weight.
    """
    given = [value for value in (target_bits, target_snr, target_error) if value is not None]
    if len(given) != 1:
        raise ValueError(
            "give one of target_bits, target_snr and target_error, got "
            f"{target_bits!r}, {target_snr!r} and {target_error!r}."
        )
    if isinstance(sensitivity, str):
        check_sensitivity(sensitivity)
    if chosen is None:
        from .config import GGConfig
        from .selection import select

        chosen = select(model, GGConfig(), from_checkpoint=False)
    parameters, turned, _ = _parameters(model, chosen)
    weights = {name: p.detach().mT if name in turned else p.detach() for name, p in parameters.items()}
    if target_snr is not None:
        return _each_alone(weights, StepRule(snr=target_snr))
    costs: Mapping[str, torch.Tensor] | None = None
    if not isinstance(sensitivity, str):
        costs = sensitivity
    elif sensitivity == "self" and parameters:
        costs = row_sensitivity(model, parameters, turned)
    return _allocate(weights, target_bits, target_error, costs).steps


def check_sensitivity(sensitivity: str) -> None:
    """Raise a `ValueError` for an unknown source of sensitivities."""
    if sensitivity not in SENSITIVITIES:
        known = ", ".join(map(repr, SENSITIVITIES))
        raise ValueError(f"Unknown sensitivity {sensitivity!r}: use one of {known}.")


def steps_of_model(model: nn.Module, chosen: Selection, config) -> dict[str, Any]:
    """The steps that a `GGConfig` of a grid asks for, for the modules of a model that were selected.

    Returns:
        By module name, its steps; of experts, the steps of each weight by its name.
    """
    parameters, turned, places = _parameters(model, chosen)
    if config.target_bits is None and config.target_error is None:
        weights = {name: p.detach().mT if name in turned else p.detach() for name, p in parameters.items()}
        steps = _each_alone(weights, config.scale_rule())
    else:
        steps = allocate(
            model,
            target_bits=config.target_bits,
            target_error=config.target_error,
            sensitivity=config.sensitivity,
            chosen=chosen,
        )
    result: dict[str, Any] = {}
    for key, name, weight in places:
        if weight:
            result.setdefault(name, {})[weight] = steps[key]
        else:
            result[name] = steps[key]
    return result


def _each_alone(weights: Mapping[str, torch.Tensor], rule: StepRule) -> dict[str, torch.Tensor]:
    """The steps of weights that meet a target one by one."""
    steps = {}
    for name, weight in weights.items():
        try:
            steps[name] = steps_of(weight, rule)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return steps


def _parameters(
    model: nn.Module, chosen: Selection
) -> tuple[dict[str, nn.Parameter], set[str], list[tuple[str, str, str]]]:
    """The weights of selected modules by name, shared ones once; the names of those that are stored [columns, rows];
    and for each place the name of its weight, its module, and of experts the weight's name in it."""
    parameters: dict[str, nn.Parameter] = {}
    turned: set[str] = set()
    places: list[tuple[str, str, str]] = []
    first: dict[int, str] = {}
    for name in (*chosen.linears, *chosen.embeddings, *chosen.experts):
        module = model.get_submodule(name)
        experts = RF8Experts.weight_names(module)
        for weight in experts or ("weight",):
            parameter = module._parameters[weight]
            key = first.setdefault(id(parameter), f"{name}.{weight}")
            parameters[key] = parameter  # type: ignore[assignment]  # selected modules have weights
            if module.is_transposed if experts else is_conv1d(module):
                turned.add(key)
            places.append((key, name, weight if experts else ""))
    return parameters, turned, places
