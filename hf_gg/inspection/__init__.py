"""What the weights of a model look like: the statistics of one tensor, its kind of layer, and both put together."""

from .describe import BINS, Statistics, describe, why_no_fit
from .kinds import Kind, classify
from .summary import KindSummary, Row, summarize


__all__ = ["BINS", "Kind", "KindSummary", "Row", "Statistics", "classify", "describe", "summarize", "why_no_fit"]
