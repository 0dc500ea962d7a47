"""What a fit returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .distribution import GeneralizedGaussian


@dataclass(frozen=True)
class GGDFit:
    """A fitted generalized Gaussian, or a batch of them; tensors of one shape on the CPU, 0-d for one fit.

    Attributes:
        loc: location μ, float64.
        scale: scale α, float64; the density is ν / (2 α Γ(1/ν)) exp(-(|w - μ| / α)^ν).
        shape: shape ν, float64, within 0.1 … 8.
        loc_stderr: standard error of `loc`; 0 where the caller gave the location. The errors suppose that the law is
            right and the values independent, and are infinite where the shape is clamped.
        scale_stderr: standard error of `scale`.
        shape_stderr: standard error of `shape`.
        n: number of values, int64.
        method: `"moments"` or `"mle"`.
        clamped: bool, where the data's shape lies outside 0.1 … 8 and the nearer end was taken.
        problems: flat index and reason of each item without a fit; its numbers are NaN. Empty unless asked for by
            `errors="nan"`.
    """

    loc: torch.Tensor
    scale: torch.Tensor
    shape: torch.Tensor
    loc_stderr: torch.Tensor
    scale_stderr: torch.Tensor
    shape_stderr: torch.Tensor
    n: torch.Tensor
    method: str
    clamped: torch.Tensor
    problems: Mapping[int, str] = field(default_factory=dict)

    def distribution(self) -> GeneralizedGaussian:
        """The fitted distribution, float64 on the CPU.

        Raises:
            ValueError: an item has no fit (see `problems`).
        """
        from .distribution import GeneralizedGaussian

        if self.problems:
            index, reason = next(iter(self.problems.items()))
            raise ValueError(f"item {index} has no fit: {reason}")
        return GeneralizedGaussian(self.loc, self.scale, self.shape)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> GGDFit:
        """The same with `function` of each tensor."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def __len__(self) -> int:
        return len(self.loc)

    def __getitem__(self, index: int) -> GGDFit:
        """One item of a batch along its first dimension."""
        rows = len(self.loc)
        if not -rows <= index < rows:
            raise IndexError(f"index {index} is out of range for {rows} fits")
        index %= rows
        size = self.loc[index].numel()
        own = {i - index * size: why for i, why in self.problems.items() if index * size <= i < (index + 1) * size}
        return replace(self.map(lambda t: t[index]), problems=own)


_TENSORS = tuple(f.name for f in fields(GGDFit) if f.name not in ("method", "problems"))
