"""Kullback-Leibler divergence of two generalized Gaussians.

KL(p‖q) = ln(ν_p α_q Γ(1/ν_q)) - ln(ν_q α_p Γ(1/ν_p)) - 1/ν_p + E_p[(|X - μ_q| / α_q)^ν_q]. At equal locations the
last term is (α_p/α_q)^ν_q Γ((ν_q + 1)/ν_p) / Γ(1/ν_p). Otherwise it is integrated by the double exponential rule
(tanh-sinh, Takahasi & Mori 1974), which keeps its accuracy at the cusps of density and power, in two parts: from p's
location to q's, and from there on.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.distributions import register_kl

from .distribution import GeneralizedGaussian, _wide
from .tail import power


# Points of a part below and above its middle, and their spacing; heavy tails need points very near the lower end.
_BELOW, _ABOVE = 150, 110
_SPACING = 1 / 32
# density beyond (this)^(1/ν) is below 1e-300, powers up to 8 included
_REACH = 760.0


@register_kl(GeneralizedGaussian, GeneralizedGaussian)
def kl_generalized_gaussian(p: GeneralizedGaussian, q: GeneralizedGaussian) -> torch.Tensor:
    """KL(p‖q) in nats, of the broadcast batch shape; gradients in every parameter."""
    dtype = torch.promote_types(p.loc.dtype, q.loc.dtype)
    p_loc, p_scale, p_shape, q_loc, q_scale, q_shape = torch.broadcast_tensors(
        *(_wide(t) for t in (p.loc, p.scale, p.shape, q.loc, q.scale, q.shape))
    )
    a, b = p_shape.reciprocal(), q_shape.reciprocal()
    norms = p_shape.log() - q_shape.log() + q_scale.log() - p_scale.log() + torch.lgamma(b) - torch.lgamma(a) - a
    ratio = (p_scale.log() - q_scale.log()) * q_shape
    same = p_loc == q_loc
    delta = torch.where(same, 1.0, (q_loc - p_loc).abs() / p_scale)
    centered = (torch.lgamma((q_shape + 1) * a) - torch.lgamma(a) + ratio).exp()
    shifted = _shifted_moment(delta, p_shape, q_shape) * ratio.exp()
    return (norms + torch.where(same, centered, shifted)).to(dtype)


def _shifted_moment(delta: torch.Tensor, shape: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """E|Z - δ|^order of a standard generalized Gaussian Z of `shape`, δ > 0."""
    w, rest, weight = (t.to(delta.device, delta.dtype) for t in _double_exponential())
    shape, order, delta = shape[..., None], order[..., None], delta[..., None]
    reach = math.log(_REACH) / shape
    reach = reach.exp()
    density_front = (shape.log() - torch.lgamma(shape.reciprocal()) - math.log(2)).exp()

    def density(x: torch.Tensor) -> torch.Tensor:
        return density_front * (-power(x, shape)).exp()

    inner = torch.minimum(delta, reach)
    x = inner * w
    # δ - x without the digits that cancel near δ
    gap = (delta - inner) + inner * rest
    left = inner * (weight * density(x) * (power(gap, order) + power(delta + x, order))).sum(-1, keepdim=True)
    width = (reach - delta).clamp_min(0)
    gap = width * w
    x = delta + gap
    right = width * (weight * density(x) * (power(gap, order) + power(delta + x, order))).sum(-1, keepdim=True)
    return (left + right)[..., 0]


@functools.cache
def _double_exponential() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points w in (0, 1), 1 - w to full precision, and weights; float64 [261]."""
    step = torch.arange(-_BELOW, _ABOVE + 1, dtype=torch.float64) * _SPACING
    s = math.pi / 2 * torch.sinh(step)
    w, rest = torch.sigmoid(2 * s), torch.sigmoid(-2 * s)
    return w, rest, _SPACING * math.pi * torch.cosh(step) * w * rest
