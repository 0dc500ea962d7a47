"""Exp-Golomb codes of frequency ranks: the most frequent symbol has rank 0 and the shortest code.

The code of rank r in order k is the number r + 2^k in binary, behind as many zeros as it has digits more than k + 1.
"""

from __future__ import annotations

import numpy as np

from .reference import MAX_ORDER


def rank(counts: np.ndarray) -> np.ndarray:
    """The symbols that occur, the most frequent one first, the smaller of equally frequent ones first; uint8."""
    return np.argsort(-counts, kind="stable")[: int((counts > 0).sum())].astype(np.uint8)


def best_order(counts: np.ndarray) -> int:
    """The order with the shortest codes; the smallest of equally short ones."""
    ranked = np.sort(counts)[::-1]
    return min(range(MAX_ORDER + 1), key=lambda order: int((ranked * _lengths(order)).sum()))


def codes(ranked: np.ndarray, order: int) -> np.ndarray:
    """Code | length << 16 of each symbol, uint32 [256]; 0 for symbols that are not ranked."""
    ranks = np.arange(len(ranked))
    out = np.zeros(256, np.uint32)
    out[ranked] = ranks + (1 << order) | _lengths(order)[: len(ranked)] << 16
    return out


def read_book(parameters: bytes) -> np.ndarray:
    """The symbol of each rank, uint16 [512], 256 where there is none.

    Raises:
        ValueError: saying what is wrong; the caller names the tensor.
    """
    if not 2 <= len(parameters) <= 256 or len(set(parameters)) < len(parameters):
        raise ValueError(f"the code book has {len(parameters)} symbols, {len(set(parameters))} of them different")
    book = np.full(512, 256, np.uint16)
    book[: len(parameters)] = list(parameters)
    return book


def _lengths(order: int) -> np.ndarray:
    """Bits of the code of each rank, int64 [256]."""
    digits = np.frexp(np.arange(256) + (1 << order))[1].astype(np.int64)
    return 2 * digits - 1 - order
