"""What the next-token distributions of a model say: how well they predict, how far they are from a reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


# Positions at a time, in float64: 0.2 GB for two vocabularies of 50,000.
_CHUNK = 64


@dataclass(frozen=True)
class Figures:
    """Figures of each position, float64 `[positions]` on the CPU; the last three only beside a reference.

    Attributes:
        loss: negative log-likelihood of the token that came, nats.
        reference_loss: the reference's.
        kl: divergence KL(reference ‖ model) of the next-token distributions over the whole vocabulary, nats.
        flipped: 1 where the most likely token is another one than the reference's, else 0.
    """

    loss: torch.Tensor
    reference_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    flipped: torch.Tensor | None = None


@torch.no_grad()
def token_figures(logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None = None) -> Figures:
    """Figures of each position, computed in float64.

    Args:
        logits: `[positions, vocabulary]`.
        labels: the tokens that came, `[positions]`.
        reference: the reference's logits, of the same shape.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [positions, vocabulary] and labels [positions] are wanted, got {list(logits.shape)} and "
            f"{list(labels.shape)}."
        )
    if reference is not None and reference.shape != logits.shape:
        raise ValueError(
            f"The reference's logits have the shape {list(reference.shape)}, the model's {list(logits.shape)}: "
            "distributions over other vocabularies cannot be compared."
        )
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for begin in range(0, len(labels), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        q, label = F.log_softmax(logits[part].double(), -1), labels[part, None].to(logits.device)
        columns[0].append(-q.gather(1, label)[:, 0])
        if reference is None:
            continue
        p = F.log_softmax(reference[part].to(logits.device).double(), -1)
        columns[1].append(-p.gather(1, label)[:, 0])
        probability = p.exp()
        # what has no probability costs nothing, though 0 · (-inf - x) is no number
        columns[2].append(torch.where(probability > 0, probability * (p - q), 0).sum(-1))
        columns[3].append((q.argmax(-1) != p.argmax(-1)).double())
    return Figures(*(torch.cat(column).cpu() if column else None for column in columns))  # type: ignore[arg-type]
