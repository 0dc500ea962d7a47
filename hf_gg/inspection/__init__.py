"""What the weights of a model look like: the statistics of one tensor, its kind of layer, and both put together."""

from .describe import BINS, Statistics, describe, why_no_fit
from .kinds import Kind, classify
from .summary import KindSummary, Row, by_kind, summarize


__all__ = [
    "BINS",
    "Kind",
    "KindSummary",
    "Row",
    "Statistics",
    "by_kind",
    "classify",
    "describe",
    "summarize",
    "why_no_fit",
]
