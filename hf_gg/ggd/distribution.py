"""The generalized Gaussian as a `torch.distributions.Distribution`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from .special import log_moment
from .tail import implicit_sample, log_tail, power, quantile


class GeneralizedGaussian(Distribution):
    """Density ν / (2 α Γ(1/ν)) · exp(-(|x - μ| / α)^ν); Gaussian at ν = 2 (α = σ √2), Laplace at ν = 1.

        GeneralizedGaussian(loc=0.0, scale=0.02, shape=1.2).log_prob(weights)

    Values and gradients in every parameter are accurate for shapes from 0.05 to 8 and beyond. Incomplete gamma
    functions are computed in float64 whatever the dtype of the parameters; bfloat16 and float16 in float32.

    Args:
        loc: μ, number or tensor.
        scale: α > 0; not the standard deviation, see `stddev`.
        shape: ν > 0.
        validate_args: check parameters and values, as in any `Distribution`.

    Raises:
        ValueError: a parameter outside of its range (with `validate_args`), or not finite.
        TypeError: a parameter that is an integer, boolean or complex tensor.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "shape": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: torch.Tensor | float,
        scale: torch.Tensor | float,
        shape: torch.Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        for name, value in (("loc", loc), ("scale", scale), ("shape", shape)):
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                raise TypeError(
                    f"{name} must be a floating point tensor, got {value.dtype}: convert it with .float()."
                )
        self.loc, self.scale, self.shape = broadcast_all(loc, scale, shape)
        if validate_args is None:
            # torch's own default is off for the whole process once something was compiled
            validate_args = not torch.compiler.is_compiling()
        super().__init__(self.loc.shape, validate_args=validate_args)
        if self._validate_args:
            for name in self.arg_constraints:
                value = getattr(self, name)
                if not bool(value.isfinite().all()):
                    raise ValueError(f"{name} must be finite, got {value[~value.isfinite()].flatten()[:3].tolist()}.")

    def expand(self, batch_shape, _instance=None) -> GeneralizedGaussian:
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(GeneralizedGaussian, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale, new.shape = (p.expand(batch_shape) for p in (self.loc, self.scale, self.shape))
        super(GeneralizedGaussian, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> torch.Tensor:
        """μ."""
        return self.loc

    @property
    def mode(self) -> torch.Tensor:
        """μ."""
        return self.loc

    @property
    def variance(self) -> torch.Tensor:
        """α² Γ(3/ν) / Γ(1/ν)."""
        return self._result(_wide(self.scale).square() * log_moment(self.shape, 2).exp())

    @property
    def stddev(self) -> torch.Tensor:
        """Square root of the variance."""
        return self._result(_wide(self.scale) * (log_moment(self.shape, 2) / 2).exp())

    @property
    def kurtosis(self) -> torch.Tensor:
        """E[(x - μ)⁴] / variance², not the excess: Γ(5/ν) Γ(1/ν) / Γ(3/ν)²; 3 at ν = 2 and 6 at ν = 1."""
        return self._result((log_moment(self.shape, 4) - 2 * log_moment(self.shape, 2)).exp())

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density. Its gradient at `value` = μ is given as 0, also where a shape ≤ 1 has none."""
        z = self._distance(value)
        shape = _half_up(self.shape)
        log_density = shape.log() - math.log(2) - _half_up(self.scale).log() - torch.lgamma(shape.reciprocal())
        return self._result(log_density - power(z, shape), value)

    def log_sf(self, value: torch.Tensor) -> torch.Tensor:
        """Logarithm of P(X > value), exact also where that is below the smallest float."""
        return self._log_side(value, upper=True)

    def log_cdf(self, value: torch.Tensor) -> torch.Tensor:
        """Logarithm of P(X ≤ value), exact also where that is below the smallest float."""
        return self._log_side(value, upper=False)

    def cdf(self, value: torch.Tensor) -> torch.Tensor:
        """P(X ≤ value)."""
        below, tail = self._sided(value)
        return self._result(torch.where(below, tail.exp() / 2, 1 - tail.exp() / 2), value)

    def icdf(self, value: torch.Tensor) -> torch.Tensor:
        """The quantile of the probability `value`; infinite at 0 and 1."""
        if self._validate_args:
            _check_probability(value)
        z = quantile(_wide(value), _wide(self.shape).expand(self._extended(value)))
        return self._result(_wide(self.loc) + _wide(self.scale) * z, value)

    def isf(self, value: torch.Tensor) -> torch.Tensor:
        """The x with P(X > x) = `value`; for small probabilities, which 1 - `value` would round away."""
        return 2 * self.loc - self.icdf(value)

    def rsample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        """Draws, with implicit gradients in the parameters.

        A uniform number in (-T, T), T^ν drawn from a gamma distribution of shape 1 + 1/ν, has the density wanted.
        """
        size = self._extended_shape(torch.Size(sample_shape))
        shape = _wide(self.shape).expand(size)
        with torch.no_grad():
            reach = torch._standard_gamma(1 + shape.reciprocal()).pow(shape.reciprocal())
            signed = reach * (2 * torch.rand(size, dtype=shape.dtype, device=shape.device) - 1)
        z = torch.sign(signed) * implicit_sample(signed.abs(), shape)
        return self._result(_wide(self.loc) + _wide(self.scale) * z)

    def entropy(self) -> torch.Tensor:
        """Differential entropy in nats: 1/ν + ln(2 α Γ(1/ν) / ν)."""
        shape = _half_up(self.shape)
        a = shape.reciprocal()
        return self._result(a + math.log(2) + _half_up(self.scale).log() + torch.lgamma(a) - shape.log())

    def _distance(self, value: torch.Tensor) -> torch.Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (_half_up(value) - _half_up(self.loc)).abs() / _half_up(self.scale)

    def _sided(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether `value` < μ, and ln P(|X - μ| > |value - μ|), float64."""
        if self._validate_args:
            self._validate_sample(value)
        d = _wide(value) - _wide(self.loc)
        below = d < 0
        # not abs(), whose gradient at 0 is 0: the probabilities have none of its kink there
        z, shape = torch.broadcast_tensors(torch.where(below, -d, d) / _wide(self.scale), _wide(self.shape))
        infinite = z.isinf()
        return below, log_tail(z.masked_fill(infinite, 1.0), shape).masked_fill(infinite, -math.inf)

    def _log_side(self, value: torch.Tensor, upper: bool) -> torch.Tensor:
        below, tail = self._sided(value)
        small = below ^ upper  # on the side where the probability is at most a half
        far = tail - math.log(2)
        return self._result(torch.where(small, far, torch.log1p(-far.exp())), value)

    def _extended(self, value: torch.Tensor) -> torch.Size:
        return torch.broadcast_shapes(value.shape, self.batch_shape)

    def _result(self, x: torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
        """`x` in the dtype of the parameters, or the wider one of a value."""
        dtype = self.loc.dtype if value is None else torch.promote_types(self.loc.dtype, value.dtype)
        return x.to(dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 or x.device.type == "mps" else x.double()


def _half_up(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _check_probability(value: torch.Tensor) -> None:
    if not bool(((value >= 0) & (value <= 1)).all()):
        bad = value[~((value >= 0) & (value <= 1))].flatten()[:3].tolist()
        raise ValueError(f"value must hold probabilities, 0 to 1, got {bad}.")
