"""How wide the steps of each weight of a model are, when the whole model is at hand.

A model that is quantized while it is read gets its steps weight by weight (`hf_gg.formats.steps`): each meets the
target alone. With all weights in memory the target is the model's, and bits can go where they buy most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..formats import StepRule
from ..formats.steps import steps_of
from ..nn import RF8Experts
from ..nn.linear import is_conv1d
from .selection import Selection


def allocate(weights: Mapping[str, torch.Tensor], rule: StepRule) -> dict[str, torch.Tensor]:
    """Steps for the weights of a model that are to become codes.

    Each weight meets the target alone, as it would while it is read.

    Args:
        weights: by parameter name, [..., rows, columns], rows being outputs. A weight that several modules share is
            there once.
        rule: with the target of the model.

    Returns:
        For each name its steps, float32 [..., rows, 1].

    Raises:
        ValueError: NaN or infinity in a weight, or a target that it cannot meet; the weight is named.
    """
    steps = {}
    for name, weight in weights.items():
        try:
            steps[name] = steps_of(weight, rule)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return steps


def steps_of_model(model: nn.Module, chosen: Selection, rule: StepRule) -> dict[str, Any]:
    """`allocate` for the modules of a model that were selected.

    Returns:
        By module name, its steps; of experts, the steps of each weight by its name.
    """
    weights: dict[str, torch.Tensor] = {}
    places: dict[str, tuple[str, ...]] = {}  # of a weight, under the name of the first that shares it
    first: dict[int, str] = {}
    for name in (*chosen.linears, *chosen.embeddings, *chosen.experts):
        module = model.get_submodule(name)
        experts = RF8Experts.weight_names(module)
        for weight in experts or ("weight",):
            parameter = module._parameters[weight]
            key = first.setdefault(id(parameter), f"{name}.{weight}")
            turned = module.is_transposed if experts else is_conv1d(module)
            weights[key] = parameter.detach().mT if turned else parameter.detach()
            places[f"{name}.{weight}"] = key, name, weight if experts else ""
    steps = allocate(weights, rule)
    result: dict[str, Any] = {}
    for key, name, weight in places.values():
        if weight:
            result.setdefault(name, {})[weight] = steps[key]
        else:
            result[name] = steps[key]
    return result
