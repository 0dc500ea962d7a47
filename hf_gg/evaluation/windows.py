"""Windows over a text that is longer than what a model reads at once."""

from __future__ import annotations

from collections.abc import Iterator


def strided(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows that score every token but the first once, with as much context as windows of this stride give.

    Args:
        length: tokens of the text.
        window: tokens that the model reads at once, at least 2.
        stride: tokens from one window to the next, 1 to `window - 1`; later tokens have `window - stride` before them.

    Yields:
        (begin, end, first): the model reads the tokens `begin:end`, and those of `first:end` are scored.

    Raises:
        ValueError: a window or a stride that makes no sense.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, one to predict and one before it, got {window}.")
    if not 1 <= stride < window:
        raise ValueError(f"stride must be from 1 to window - 1 = {window - 1}, got {stride}.")
    done = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if done < end:
            yield begin, end, done
        done = end
        if end == length:
            return
