"""The study's plot and table, from its results.

    python recipes/init_study/report.py [--results FOLDER] [--plot FILE]

Prints the table of docs/initialization.md. An interval is Student's, of the differences to `own` of the same seed.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from study import HERE, read_rows


# Two-sided 95 % points of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Curves = dict[tuple[str, str], dict[int, dict[int, float]]]  # (model, arm) -> seed -> step -> held-out loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of curves.csv")
    parser.add_argument("--plot", type=Path, default=HERE.parents[1] / "docs/images/init_study.png")
    options = parser.parse_args(arguments)
    curves = read_curves(options.results / "curves.csv")
    print(table(curves))
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, options.plot)


def read_curves(path: Path) -> Curves:
    """The held-out losses of all runs.

    Raises:
        FileNotFoundError: no results.
    """
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(path):
        curves[row["model"], row["arm"]][int(row["seed"])][int(row["step"])] = float(row["eval_loss"])
    if not curves:
        raise FileNotFoundError(f"{path} holds no results: run study.py first.")
    return dict(curves)


def final(runs: dict[int, dict[int, float]]) -> dict[int, float]:
    """The last loss of each seed."""
    return {seed: losses[max(losses)] for seed, losses in sorted(runs.items())}


def interval(differences: list[float]) -> str:
    """Mean and 95 % interval of paired differences."""
    mean, n = statistics.mean(differences), len(differences)
    if n < 2 or not any(differences):
        return f"{mean:+.3f}"
    half = STUDENT[n - 1] * statistics.stdev(differences) / n**0.5
    return f"{mean:+.3f} ± {half:.3f}"


def table(curves: Curves) -> str:
    """Markdown: the final loss of each arm, and how far it is from `own` of the same seed."""
    models, arms = (list(dict.fromkeys(key[part] for key in curves)) for part in (0, 1))
    lines = ["| arm | " + " | ".join(f"{model} | against `own`" for model in models) + " | both against `own` |"]
    lines.append("|---" * (2 * len(models) + 2) + "|")
    for arm in arms:
        cells, everything = [], []
        for model in models:
            if (model, arm) not in curves:
                cells += ["–", "–"]
                continue
            losses, own = final(curves[model, arm]), final(curves.get((model, "own"), {}))
            both = [losses[seed] - own[seed] for seed in losses if seed in own]
            everything += both
            spread = f" ± {statistics.stdev(losses.values()):.3f}" if len(losses) > 1 else ""
            cells += [f"{statistics.mean(losses.values()):.3f}{spread}", interval(both) if both else "–"]
        lines.append(f"| `{arm}` | " + " | ".join(cells) + f" | {interval(everything) if everything else '–'} |")
    return "\n".join(lines)


def plot(curves: Curves, path: Path) -> None:
    """Above, the loss against the step: mean and range over the seeds; below, the same relative to `own`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(model for model, _ in curves))
    figure, axes = plt.subplots(2, len(models), figsize=(6 * len(models), 7.5), sharex="col", squeeze=False)
    arms = list(dict.fromkeys(arm for _, arm in curves))
    # the same curve twice would hide the first: dashes let it through
    dashes = {arm: "--" if arm in ("own", "normal-0.02") else "-" for arm in arms}
    for column, model in enumerate(models):
        own = curves.get((model, "own"), {})
        for number, arm in enumerate(arms):
            if (model, arm) not in curves:
                continue
            runs = curves[model, arm]
            steps = sorted(next(iter(runs.values())))
            for row, values in enumerate(
                (
                    [[runs[seed][step] for seed in runs] for step in steps],
                    [[runs[seed][step] - own[seed][step] for seed in runs if seed in own] for step in steps],
                )
            ):
                if not all(values):
                    continue
                axis, color = axes[row][column], f"C{number}"
                axis.plot(steps, list(map(statistics.mean, values)), dashes[arm], color=color, label=arm, lw=1.6)
                axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.12, lw=0)
        seeds = max(len(runs) for (name, _), runs in curves.items() if name == model)
        axes[0][column].set_title(f"{model}, {seeds} seeds: mean and range")
        axes[0][column].set_ylabel("held-out loss, nats a token")
        axes[1][column].set_ylabel("difference to `own` of the same seed")
        axes[1][column].set_xlabel("step")
        axes[1][column].axhline(0, color="grey", lw=0.8)
    axes[0][0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
