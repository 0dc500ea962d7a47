"""LoRA on fused experts (`target_parameters`) whose weights are codes.

PEFT adds `B @ A` to the stack of weights while the layer runs. On codes that would be garbage, and decoding the stack
would cost the memory that the codes save, so here the product is added in the experts' own projections, to the rows of
each expert: the same numbers in another order of operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ...nn import RF8Experts
from ...nn.base import OUTLIERS
from .layers import Adapted, merging, unmerging, warn_merge


class RF8ParamWrapper(Adapted):
    """Mixed into `peft.tuners.lora.ParamWrapper` around RF8Experts."""

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        added = [_factors(self, name) for name in active_adapters if name in self.lora_A]
        if not added:
            yield
            return
        with _projection_with(self.get_base_layer(), self.parameter_name, added):
            yield

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        experts, parameter = self.get_base_layer(), self.parameter_name
        with (
            merging(self, experts, tuple(f"{parameter}{suffix}" for suffix in ("", "_scale", *OUTLIERS))),
            torch.no_grad(),
        ):
            weight = experts.dequantize(parameter)
            for name in names:
                a, b, scaling = _factors(self, name)
                delta = (b.float() @ a.float()) * scaling
                weight += delta.transpose(1, 2) if experts.is_transposed else delta
            experts.requantize_(parameter, weight)
            self.merged_adapters.extend(names)
        warn_merge(experts.format)

    def unmerge(self) -> None:
        if not self.merged_adapters:
            super().unmerge()
            return
        with unmerging(self):
            self.merged_adapters.clear()


def _factors(wrapper: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`(a, b, scaling)` of an adapter: a [experts, rank, in], b [experts, out, rank]."""
    a, b, experts = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return a, b, wrapper.scaling[name]


@contextlib.contextmanager
def _projection_with(experts: RF8Experts, parameter: str, added: list) -> Iterator[None]:
    """Let one projection of a module of experts add low-rank products, for the time of a forward pass."""
    outer = experts.__dict__.get("project")
    project = experts.project

    def project_and_add(name: str, x: torch.Tensor, offsets: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        y = project(name, x, offsets, expert)
        if name == parameter:
            for a, b, scaling in added:
                y = y + _low_rank(x, a, b, offsets) * scaling
        return y

    experts.__dict__["project"] = project_and_add
    try:
        yield
    finally:
        if outer is None:
            del experts.__dict__["project"]
        else:
            experts.__dict__["project"] = outer


def _low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x @ a.T @ b.T` for the rows of each expert; rows past the last offset give zeros.

    Args:
        x: [rows, in], sorted by expert.
        a: [experts, rank, in].
        b: [experts, out, rank].
        offsets: int32 [experts], the row at which each expert's rows end.
    """
    parts, start = [], 0
    for end, a_one, b_one in zip(offsets.tolist(), a.to(x.dtype).unbind(), b.to(x.dtype).unbind(), strict=True):
        if end > start:
            parts.append(x[start:end] @ a_one.T @ b_one.T)
        start = max(start, end)
    if start < x.shape[0] or not parts:
        parts.append(x.new_zeros(x.shape[0] - start, b.shape[1]))
    return torch.cat(parts)
