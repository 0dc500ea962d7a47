"""The roofline: operations a second by operations a byte, with the two lines that bound them."""

from __future__ import annotations

from pathlib import Path


SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raise before anything is measured for it.

    Raises:
        ValueError: another kind of file. RuntimeError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a plot must be {', '.join(SUFFIXES)}, got {path.name!r}.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'hf-gg[plots]', or leave --plot out.") from error


def draw(rows: list[dict], copy_rate: float, peak_rate: float, path: Path, title: str) -> None:
    """A picture of the rows of `linear.measure` that were timed.

    Args:
        rows: of the table.
        copy_rate: bytes a second of a large copy.
        peak_rate: operations a second of a large product.
        path: of the picture, png, svg or pdf; it appears whole.
        title: of the picture.

    Raises:
        As `check`.
    """
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    timed = [row for row in rows if "ms" in row]
    for place, name in enumerate(dict.fromkeys(row["contender"] for row in timed)):
        own = [row for row in timed if row["contender"] == name]
        flops = [row["gflop_s"] for row in own]
        intensity = [row["gflop_s"] / row["gb_s"] for row in own]
        axes.scatter(intensity, flops, s=18, label=name, marker="ox^s"[place // 10 % 4])  # there are ten colours
    low, high = axes.get_xlim()[0], max(axes.get_xlim()[1], 2 * peak_rate / copy_rate)
    low = max(low, 0.5)
    corner = peak_rate / copy_rate
    axes.plot(
        [low, corner, high],
        [low * copy_rate / 1e9, peak_rate / 1e9, peak_rate / 1e9],
        color="black",
        label=f"roofline: a copy of {copy_rate / 1e9:.1f} GB/s, a product of {peak_rate / 1e9:.0f} Gflop/s",
    )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="Gflop/s", title=title)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(part, dpi=150)
    part.replace(path)
