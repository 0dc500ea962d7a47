"""Numbers and names as a reader wants them."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text of a file without what would steer a terminal or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def significant(value: float, digits: int = 3) -> str:
    """`0.0123`, `12.3`, `1.2e+05`: so many digits, no exponent where a plain number is short."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 10 ** (digits + 2):
        text = f"{value:#.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
        return text.rstrip(".")
    return f"{value:.{digits - 1}e}"


def per_million(share: float) -> str:
    """A share in parts per million; `<0.01` for less than that."""
    value = share * 1e6
    if value == 0:
        return "0"
    return "<0.01" if value < 0.01 else significant(value)


def dims(shape: tuple[int, ...]) -> str:
    """`576×1536`; `scalar` without dimensions."""
    return "×".join(map(str, shape)) or "scalar"


def size(count: int) -> str:
    """`134.5 M`."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)
