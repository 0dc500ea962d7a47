"""Matrices in adapter files: rounded to a grid and entropy-coded, each under its own name."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from ...coding.levels import decode_levels, encode_levels, nearest_levels, read_levels_header
from .methods import other_model


def encoded(
    tensors: dict[str, torch.Tensor], names: Iterable[str], step: float, coding: str
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, with some of them on a grid and coded where that is shorter.

    Raises:
        ValueError: NaN or infinity; the tensor is named.
    """

    def code(name: str) -> torch.Tensor:
        value = tensors[name].detach().cpu()
        rounded = nearest_levels(value, step, name)[0]
        if coding == "none" or value.numel() == 0:
            return rounded
        payload = encode_levels(rounded, step, coding, name)
        return payload if payload.numel() < rounded.numel() * rounded.element_size() else rounded

    wanted = set(names)
    chosen = [name for name in tensors if name in wanted]
    with ThreadPoolExecutor(4) as pool:
        return {**tensors, **dict(zip(chosen, pool.map(code, chosen)))}


def check_finite(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    """Raise a `ValueError` that names a tensor that holds NaN or infinity."""
    for name in names:
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity, and no such adapter is saved: repair the model.")


def decoded(value: torch.Tensor, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix from an adapter's file.

    Raises:
        ValueError: a damaged payload, or another shape; the tensor is named.
    """
    coded = value.dtype == torch.uint8
    found = read_levels_header(value.cpu(), name)[1] if coded else tuple(value.shape)
    if tuple(found) != shape:
        raise other_model(f"{name} has the shape {list(found)}, and the model wants {list(shape)}")
    if not coded and not value.is_floating_point():
        raise ValueError(f"{name} is damaged: it holds {value.dtype}. Download or save the adapter again.")
    result = decode_levels(value.cpu(), name).to(value.device) if coded else value
    if not bool(result.isfinite().all()):
        raise ValueError(f"{name} is damaged: it holds NaN or infinity. Download or save the adapter again.")
    return result
