"""Perplexity, divergence and flips of a causal language model on documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .bootstrap import Estimate, interval
from .documents import Document
from .measures import token_figures
from .windows import strided


# Name: whether a reference is needed.
TEXT_METRICS = {"perplexity": False, "base_perplexity": True, "perplexity_ratio": True, "kl": True, "flips": True}


@dataclass(frozen=True)
class TextResult:
    """What was measured on texts.

    Attributes:
        metrics: perplexity; beside a base also the base's, their ratio, `kl` (nats, mean over tokens) and `flips`
            (share of tokens).
        documents: that were measured.
        skipped: names of documents of fewer than two tokens, which have nothing to score.
        tokens: that were scored.
        window: tokens that the model read at once.
        stride: tokens from one window to the next.
        confidence: of the intervals.
        draws: of the bootstrap.
        seed: of the bootstrap.
        sums: per document, the sums over its tokens of `loss` and, beside a base, `reference_loss`, `kl`, `flipped`.
        counts: per document, the tokens scored.
    """

    metrics: dict[str, Estimate]
    documents: int
    skipped: list[str]
    tokens: int
    window: int
    stride: int
    confidence: float
    draws: int
    seed: int
    sums: dict[str, list[float]] = field(repr=False, default_factory=dict)
    counts: list[int] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the figures of each document."""
        kept = {key: value for key, value in vars(self).items() if key not in ("sums", "counts")}
        return kept | {"metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()}}


def evaluate_texts(
    model: nn.Module,
    tokenizer,
    documents: Sequence[Document],
    base: nn.Module | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    metrics: Sequence[str] | None = None,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> TextResult:
    """Measure a model on documents, each on its own, by strided windows; beside a base, how far it is from it.

    Both models are in memory, and of each the logits of one stride (float32, stride × vocabulary). Intervals are of a
    bootstrap over documents.

    Args:
        model: a causal language model of Transformers.
        tokenizer: of both models; it adds what it adds by default, such as a token at the beginning.
        documents: the texts.
        base: what the model is compared with: the same vocabulary.
        window: tokens that a model reads at once; 1,024 by default, or fewer where the model has fewer positions.
        stride: tokens from one window to the next; half a window by default.
        max_tokens: of each document only the first are measured; None for all.
        metrics: names in `TEXT_METRICS`; None for all that can be had.
        confidence: of the intervals.
        draws: of the bootstrap.
        seed: of the bootstrap.
        progress: called with the number of tokens that are done, window after window.

    Raises:
        ValueError: an unknown metric, or one that needs a base; a window that the model or the texts are too short
            for; another vocabulary; logits with NaN. The document is named.
    """
    wanted = check_metrics(metrics, base is not None)
    window, stride = _check_window(model, base, window, stride)
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, one to predict and one before it, got {max_tokens}.")
    tokens, skipped = [], []
    for document in documents:
        ids = torch.tensor(tokenizer(document.text, verbose=False)["input_ids"][:max_tokens], dtype=torch.long)
        if len(ids) < 2:
            skipped.append(document.name)
        else:
            tokens.append((document.name, ids))
    total = sum(len(ids) for _, ids in tokens)
    if total < window:
        raise ValueError(
            f"The texts have {total:,} tokens and a window has {window:,}: give more text, or a shorter window."
        )
    largest = max(int(ids.max()) for _, ids in tokens)
    for which, each in (("model", model), ("base", base)):
        size = each.get_input_embeddings().num_embeddings if each is not None else largest + 1  # type: ignore
        if largest >= size:
            raise ValueError(
                f"The tokenizer gives token {largest} and the {which} knows {size} tokens: it is of another model."
            )
    names = ("loss", "reference_loss", "kl", "flipped") if base is not None else ("loss",)
    sums: dict[str, list[float]] = {name: [] for name in names}
    for name_of_document, ids in tokens:
        found = _measure(model, base, name_of_document, ids, window, stride, progress)
        for name in names:
            sums[name].append(found[name])
    counts = [len(ids) - 1 for _, ids in tokens]
    estimates = _estimates(sums, counts, wanted, confidence, draws, seed)
    return TextResult(
        estimates, len(counts), skipped, sum(counts), window, stride, confidence, draws, seed, sums, counts
    )


def check_metrics(metrics: Sequence[str] | None, has_base: bool) -> list[str]:
    """The names of the metrics that are wanted, all that can be had if `metrics` is None.

    Raises:
        ValueError: an unknown one, one that needs a base, or none.
    """
    if metrics is None:
        return [name for name, needs_base in TEXT_METRICS.items() if has_base or not needs_base]
    for name in metrics:
        if name not in TEXT_METRICS:
            raise ValueError(f"{name!r} is no metric: the metrics are {', '.join(TEXT_METRICS)}.")
        if TEXT_METRICS[name] and not has_base:
            raise ValueError(f"{name!r} compares with another model: name it with --against (`base=`).")
    if not metrics:
        raise ValueError("No metric is asked for: leave metrics out for all.")
    return list(metrics)


def _check_window(model: nn.Module, base: nn.Module | None, window: int | None, stride: int | None) -> tuple[int, int]:
    limits = [_positions(each) for each in (model, base) if each is not None]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if window is None:
        window = min(1024, limit or 1024)
    elif limit is not None and window > limit:
        raise ValueError(f"window is {window} tokens, and the model has {limit} positions: give a shorter window.")
    stride = max(1, window // 2) if stride is None else stride
    next(strided(2, window, stride))  # raises what is wrong with them
    return window, stride


def _positions(model: Any) -> int | None:
    """Tokens that a model can read at once; None if it has no limit, as recurrent models."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _measure(model, base, document: str, ids: torch.Tensor, window: int, stride: int, progress) -> dict[str, float]:
    """Sums over a document's tokens."""
    sums: dict[str, float] = {}
    for begin, end, first in strided(len(ids), window, stride):
        labels = ids[first:end]
        logits = _logits(model, ids[begin:end], len(labels), "model", document)
        reference = None if base is None else _logits(base, ids[begin:end], len(labels), "base", document)
        figures = token_figures(logits, labels, reference)
        for name, values in vars(figures).items():
            if values is None:
                continue
            if not bool(values.isfinite().all()):
                place = first + int((~values.isfinite()).nonzero()[0])
                raise ValueError(
                    f"{name} of token {place} of {document} is not finite: the model gives it no probability at all."
                )
            sums[name] = sums.get(name, 0.0) + float(values.sum())
        if progress is not None:
            progress(len(labels))
    return sums


@torch.no_grad()
def _logits(model, ids: torch.Tensor, count: int, which: str, document: str) -> torch.Tensor:
    """Logits that predict the last `count` of the tokens, `[count, vocabulary]`."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count + 1
    logits = model(input_ids=ids[None].to(model.device), **options).logits[0, -count - 1 : -1]
    if bool(logits.isnan().any()):
        raise ValueError(
            f"The {which} gives NaN on {document}: its weights are damaged, or overflow in {logits.dtype}."
        )
    return logits


def _estimates(
    sums: dict[str, list[float]], counts: list[int], wanted: list[str], confidence: float, draws: int, seed: int
) -> dict[str, Estimate]:
    loss, base = np.asarray(sums["loss"]), np.asarray(sums.get("reference_loss", ()))
    values: dict[str, Callable[[], tuple[np.ndarray, Callable]]] = {
        "perplexity": lambda: (loss, np.exp),
        "base_perplexity": lambda: (base, np.exp),
        "perplexity_ratio": lambda: (loss - base, np.exp),
        "kl": lambda: (np.asarray(sums["kl"]), np.asarray),
        "flips": lambda: (np.asarray(sums["flipped"]), np.asarray),
    }
    result = {}
    for name in wanted:
        figures, transform = values[name]()
        result[name] = interval(figures, np.asarray(counts), confidence, draws, seed, transform)
    return result
