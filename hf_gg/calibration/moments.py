"""Second moments of a layer's inputs, and the form in which rounding uses them.

The error of a layer's outputs over all inputs X is ||(W - Ŵ) X||² = tr((W - Ŵ) H (W - Ŵ)ᵀ) with H = X Xᵀ. Rounding
takes the columns of W one after the other, those of the most active inputs first. With the Cholesky factor L of H, the
least active input first, the error is a sum over columns k of

    L_kk² (e_k + Σ_{j>k} e_j L_jk / L_kk)²

so that column k, rounded after all j > k, should make up for Σ e_j L_jk / L_kk. This is the feedback of GPTQ
(arXiv 2210.17323) in the form of LDLQ (arXiv 2307.13304), which needs no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


# Rows of inputs that are taken as float32 at once.
_CHUNK = 1 << 24


class SecondMoments:
    """The sum of x xᵀ over inputs x of a layer.

    Attributes:
        matrix: float32 [width, width].
        count: inputs so far.
    """

    def __init__(self, width: int, device: torch.device | str | None = None):
        self.matrix = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs, floating point [..., width].

        Raises:
            ValueError: NaN or infinity among them.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        size = max(1, _CHUNK // rows.shape[-1])
        for start in range(0, rows.shape[0], size):
            part = rows[start : start + size].float()
            self.matrix.addmm_(part.T, part)
        self.count += rows.shape[0]
        if not bool(torch.isfinite(self.matrix.diagonal()).all()):
            raise ValueError("its inputs hold NaN or infinity")


@dataclass(frozen=True)
class Metric:
    """Second moments prepared for rounding, all in the order of activity, the least active input first.

    Attributes:
        order: int64 [n], the column of each place.
        moments: float32 [n, n], damped, relative to the mean of the diagonal.
        damping: float32 [n], what was added to the diagonal.
        feedback: float32 [n, n], unit lower triangular: L_jk / L_kk.
        costs: float32 [n]: L_kk².
    """

    order: torch.Tensor
    moments: torch.Tensor
    damping: torch.Tensor
    feedback: torch.Tensor
    costs: torch.Tensor


def metric_of(moments: torch.Tensor, damping: float = 0.2) -> Metric | None:
    """Second moments in the form that `round_weight` takes.

    Args:
        moments: float32 [n, n], symmetric and positive semidefinite.
        damping: added to the diagonal, relative to its mean. Ten times and a hundred times as much is tried where the
            factorization fails all the same.

    Returns:
        None where the moments say nothing, all inputs being zero, or cannot be factored.
    """
    diagonal = moments.diagonal()
    mean = float(diagonal.mean(dtype=torch.float64))
    if not 0 < mean < float("inf"):
        return None
    order = torch.argsort(diagonal, stable=True)
    sorted_ = (moments / mean)[order][:, order]
    for factor in (1, 10, 100):
        added = torch.full_like(diagonal, damping * factor)
        damped = sorted_ + torch.diag(added)
        lower, failed = torch.linalg.cholesky_ex(damped.double())
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            roots = lower.diagonal()
            return Metric(order, damped, added, (lower / roots).float(), roots.square().float())
    return None
