"""What a model makes of samples: how it routes them, which it answers right, how busy its experts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .neighbourhood import manifold_terms, neighbourhood
from .routers import Router, capture, routing
from .samples import INDEX, LAST, PROMPT, Samples, batches, candidates, judge


TOKENS = ("last", "mean")


@dataclass
class Description:
    """How a model treats samples, on the CPU.

    Attributes:
        r: routing weights, float32 [samples, features].
        success: which it answers right, bool [samples].
        loss: mean negative log-likelihood of the answers' tokens, float32 [samples].
        load: share of the tokens' places that each expert gets, float64, one tensor [experts] for each layer.
    """

    r: torch.Tensor
    success: torch.Tensor
    loss: torch.Tensor
    load: dict[str, torch.Tensor]


@torch.no_grad()
def describe(
    model: nn.Module,
    samples: Samples,
    routers: Sequence[Router],
    batch_size: int = 8,
    tokens: str = "last",
    mask_top_k: bool = False,
    rows: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Description:
    """One forward pass over samples, batch by batch; what is kept is a row of r for each.

    Where several processes run, each takes its share and all get the whole; all must call it.

    Args:
        model: a causal language model with experts.
        samples: prompts and answers.
        routers: from `choose_routers`.
        batch_size: samples in a batch.
        tokens: `"last"` for r at the last prompt token, `"mean"` for the mean over the prompt.
        mask_top_k: see `routing`.
        rows: which samples; None for all.
        device: where the batches go; by default where the first parameter is.

    Raises:
        ValueError: the model gives logits that are not finite.
    """
    rows = range(len(samples)) if rows is None else list(rows)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    target = next(model.parameters()).device if device is None else torch.device(device)
    # the column is looked at for these rows alone
    choices, place = candidates(samples), {row: at for at, row in enumerate(rows)}
    r: torch.Tensor | None = None
    success, loss = torch.zeros(len(rows)), torch.zeros(len(rows))
    load: dict[str, torch.Tensor] = {}
    training = model.training
    model.eval()
    try:
        for batch, counts in batches(samples, rows, batch_size, rank, world, model):
            index = batch.pop(INDEX).tolist()
            inputs = {key: value.to(target) if hasattr(value, "to") else value for key, value in batch.items()}
            labels, last, prompt = inputs.pop("labels"), inputs.pop(LAST), inputs.pop(PROMPT)
            with capture(routers) as captured:
                logits = model(**inputs, use_cache=False).logits
            where = last if tokens == "last" else prompt
            found = routing(captured, routers, where, prompt.shape[1], mask_top_k).cpu()
            if r is None:
                r = torch.zeros(len(rows), found.shape[1])
            real = inputs["attention_mask"].flatten().bool()
            for router in routers:
                experts = captured.logits[router.name].shape[-1]
                own = load.setdefault(router.name, torch.zeros(experts, dtype=torch.float64))
                if counts:
                    chosen = captured.experts[router.name].reshape(len(real), -1)
                    chosen = chosen[real.to(chosen.device)]
                    own += torch.bincount(chosen.flatten(), minlength=experts)[:experts].cpu()
            if counts:
                at = torch.tensor([place[i] for i in index])
                r[at] = found
                loss[at] = _answer_loss(logits, labels).cpu()
                right = judge(logits, labels, [choices[i] for i in index])
                success[at] = right.float()
    finally:
        model.train(training)
    if r is None:
        raise ValueError("there is no sample to describe.")
    if world > 1:
        for tensor in (r, success, loss, *load.values()):
            shared = tensor.to(target)
            dist.all_reduce(shared)
            tensor.copy_(shared)
    for name, tensor in (("routing weights", r), ("logits", loss)):
        if not bool(tensor.isfinite().all()):
            row = rows[int((~tensor.isfinite().reshape(len(rows), -1).all(1)).nonzero()[0])]
            raise ValueError(f"the model's {name} for {samples.name}[{row}] are NaN or infinite: look at its weights.")
    shares = {name: own / own.sum().clamp(min=1) for name, own in load.items()}
    return Description(r, success.bool(), loss, shares)


def _answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each row's labels, [batch]."""
    labels = labels[:, 1:]
    row, column = (labels != -100).nonzero(as_tuple=True)
    terms = nn.functional.cross_entropy(logits[row, column].float(), labels[row, column], reduction="none")
    zeros = torch.zeros(len(labels), device=terms.device)
    return zeros.index_add(0, row, terms) / zeros.index_add(0, row, torch.ones_like(terms))


def neighbour_overlap(r: torch.Tensor, index: torch.Tensor, success: torch.Tensor) -> float:
    """Mean share of a sample's neighbours that are its neighbours in the space of routing weights too.

    By chance it is about k over the number of successes.

    Args:
        r: routing weights, [samples, features].
        index: from `neighbourhood` of the embeddings, [samples, k].
        success: the same as there.

    Returns:
        From 0 to 1; NaN if no sample has a neighbour.
    """
    k = max(index.shape[1], 1)
    nearest, _ = neighbourhood(r, success.to(r.device), k=min(k, int(success.sum())), sigma=1.0)
    shared = ((index[:, :, None] == nearest.cpu()[:, None]) & (index >= 0)[:, :, None]).any(2).sum(1)
    counts = (index >= 0).sum(1)
    return float((shared[counts > 0] / counts[counts > 0]).mean())


def mean_manifold_loss(r: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, block: int = 4096) -> float:
    """The manifold loss of all samples, with all routing weights as they are, block by block."""
    total = 0.0
    for start in range(0, len(r), block):
        part = slice(start, start + block)
        total += float(manifold_terms(r[part], r[index[part].clamp(min=0)], weight[part]).double().sum())
    return total / max(len(r), 1)


def load_balance(load: dict[str, torch.Tensor]) -> float:
    """Mean over the layers of the entropy of the load, as a share of that of an even one: 1 is even, 0 one expert."""
    found = []
    for share in load.values():
        if len(share) > 1:
            p = share[share > 0]
            found.append(float(-(p * p.log()).sum() / torch.tensor(float(len(share))).log()))
    return sum(found) / len(found) if found else 1.0


def diagnose(
    description: Description, index: torch.Tensor, weight: torch.Tensor, success: torch.Tensor
) -> dict[str, float]:
    """The figures of a description.

    Args:
        index, weight: from `neighbourhood` of the embeddings.
        success: the samples that neighbours were taken from.

    Returns:
        `accuracy`, `loss` (mean over the samples), `overlap` (see `neighbour_overlap`), `manifold`
        (`mean_manifold_loss`) and `balance` (`load_balance`).
    """
    return {
        "accuracy": float(description.success.float().mean()),
        "loss": float(description.loss.mean()),
        "overlap": neighbour_overlap(description.r, index, success),
        "manifold": mean_manifold_loss(description.r, index, weight),
        "balance": load_balance(description.load),
    }


def principal_plane(r: torch.Tensor, basis: tuple[torch.Tensor, torch.Tensor] | None = None):
    """Points in the plane of the two largest principal components.

    Args:
        r: [samples, features].
        basis: mean and directions of an earlier call, so that two pictures have the same axes.

    Returns:
        Coordinates [samples, 2], and the basis.
    """
    if basis is None:
        mean = r.double().mean(0)
        centred = r.double() - mean
        # features are few; the sign is fixed so that a picture does not depend on the solver
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, [-1, -2]] if r.shape[1] > 1 else None
        if directions is None:
            directions = torch.ones(1, 1, dtype=torch.float64).expand(1, 2)
        top = directions.abs().argmax(0)
        basis = mean, directions * directions[top, torch.arange(2)].sign()
    mean, directions = basis
    return ((r.double() - mean) @ directions).float(), basis


def picture(
    path: str | Path, parts: dict[str, torch.Tensor], labels: Sequence[str] | None = None, method: str = "pca"
) -> None:
    """Draw the routing weights of some models, such as before and after, side by side in two dimensions.

    Args:
        path: the PNG file.
        parts: title and routing weights, [samples, features].
        labels: the class of each sample, for the colours.
        method: `"pca"`, with the axes of the first part in all of them, or `"umap"` (package umap-learn).

    Raises:
        ValueError: another method, nothing to draw.
        ImportError: matplotlib or umap-learn is missing.
    """
    import matplotlib

    if method not in ("pca", "umap"):
        raise ValueError(f"method must be 'pca' or 'umap', got {method!r}.")
    if not parts:
        raise ValueError("parts is empty: give at least one set of routing weights.")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    basis: Any = None
    if method == "umap":
        try:
            import umap
        except ImportError as error:
            raise ImportError("method='umap' needs umap-learn: pip install umap-learn, or take 'pca'.") from error
        basis = umap.UMAP(random_state=0).fit(next(iter(parts.values())).numpy())
    figure, axes = plt.subplots(1, len(parts), figsize=(4.6 * len(parts), 4.2), dpi=110, squeeze=False)
    for axis, (title, r) in zip(axes[0], parts.items()):
        if method == "umap":
            points = torch.as_tensor(basis.transform(r.numpy()))
        else:
            points, basis = principal_plane(r, basis)
        kinds = sorted(set(labels)) if labels is not None else [""]
        for kind in kinds:
            mine = torch.tensor([labels is None or label == kind for label in (labels or [""] * len(r))])
            axis.scatter(*points[mine].T, s=6, alpha=0.6, label=kind)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, lw=0.5)
    if labels is not None:
        axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
