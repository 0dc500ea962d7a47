"""Allocation: the steps of the grids of a whole model, for a wanted number of bits, signal to noise, or error.

Rounding to a fine grid of step Δ adds noise of variance Δ²/12 and halving Δ costs one bit, so the steps that lose least
at a rate are those at which every row's last bit buys the same: Δ² ∝ 1 / sensitivity, where the sensitivity of a row
is what a squared error in it costs (half the mean of the Fisher information's diagonal, if the cost is a KL
divergence). Without sensitivities every weight counts the same and all have one step. This is reverse water-filling
(Cover and Thomas, section 10.3.3), with two corrections where grids are coarse or weights do not fit: the bits and
errors of a tensor are not formulas but curves, measured on a sample of its weights at many steps, outliers included;
and on those the tensors' steps are chosen by a Lagrange multiplier (Shoham and Gersho, 1988), which on the lower
convex hulls is the optimum. One common factor then puts the mean of the real entropies on the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


LEVELS = 127
STEP_BITS, OUTLIER_BITS = 32, 64

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max / 256
# A curve's steps: 2^(k / 4) times the root mean square of the tensor, from -11 to +3 octaves.
_OCTAVES = torch.arange(-44, 13, dtype=torch.float64) / 4
_SAMPLE = 1 << 15
_CHUNK = 1 << 20
_CORRECTIONS = 12
_BITS_TOLERANCE, _DB_TOLERANCE = 0.002, 0.01


@dataclass(frozen=True)
class Curve:
    """What a tensor costs at a number of steps, from the finest to the coarsest.

    Attributes:
        count: weights of the tensor.
        steps: [K], ascending; relative to the tensor's row profile.
        bits: [K], bits a weight, descending.
        errors: [K], mean squared error a weight, each row's times its sensitivity.
    """

    count: int
    steps: torch.Tensor
    bits: torch.Tensor
    errors: torch.Tensor


@dataclass(frozen=True)
class Allocation:
    """Steps, and what they give on all weights together.

    Attributes:
        steps: float32 [..., rows, 1] by name.
        bits: mean bits a weight: order-0 entropies of the levels of each tensor, steps and outliers.
        snr: signal to noise, dB.
        error: sum of squared errors, each row's times its sensitivity. With half the Fisher information as sensitivity
            this is the expected KL divergence, nats.
        error_share: that sum over the same sum of the squared weights.
        tensor_bits: bits a weight by name.
    """

    steps: dict[str, torch.Tensor]
    bits: float
    snr: float
    error: float
    error_share: float
    tensor_bits: dict[str, float]
