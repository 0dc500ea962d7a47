"""A rate–accuracy study: arguments, the list of runs, measurements at a rate, the CSV file.

A run is a method with one strength and one seed. Finished runs stand in the CSV file and are not made again. Beside
the methods that a study has of its own there are

- `plain`: AdamW without weight decay, at a learning rate of its own if `plain_learning_rate` is given; and
- `prune`: the plain model of the seed with its smallest weights set to zero, for each share of `prunes`.

Each trained model is measured as it is, on uniform grids (its matrices rounded, one step for all), and with its
smallest weights set to zero. Bits a weight are the bytes that `hf_gg.coding.levels.encode_levels` makes of each
matrix, tables and headers counted; the order-0 entropy of the levels stands beside them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import transformers as tf
import yaml
from rate_report import plot, table

from hf_gg import BackSlash
from hf_gg.coding.levels import encode_levels
from hf_gg.training.parts import part_of
from hf_gg.training.rate import Rate, measure
from hf_gg.training.selection import check_number, select_matrices


COLUMNS = ("method", "value", "seed", "grid", "pruned", "bits", "entropy", "zeros", "metric", "shape", "c", "seconds")


@dataclass
class StudyArguments:
    """What all studies have. A study's own methods are fields that hold their strengths.

    Attributes:
        colors: the study's methods beside `plain` and `prune`, and their colors in the plot.
        main: the method whose models are shown pruned.
    """

    colors: ClassVar[dict[str, str]] = {}
    main: ClassVar[str] = ""

    methods: list[str] = field(default_factory=list, metadata={"help": "those beside plain to run; none for all"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "of data order and new weights"})
    grids: list[float] = field(default_factory=lambda: [2**-5], metadata={"help": "steps of the uniform grids"})
    prunes: list[float] = field(default_factory=lambda: [0.5, 0.8], metadata={"help": "shares of smallest weights"})
    modules: list[str] = field(default_factory=list, metadata={"help": "what is changed and measured; none for all"})
    plain_learning_rate: float = field(default=0.0, metadata={"help": "of the plain runs, where another one is best"})
    tolerance: float = field(default=0.01, metadata={"help": "what may be lost: points of accuracy, or a share"})
    runs: int = field(default=0, metadata={"help": "stop after so many new runs; 0 for all"})
    results: str = field(default="results.csv", metadata={"help": "CSV file"})
    image: str = field(default="", metadata={"help": "PNG file"})

    def callbacks(self, method: str, value: float) -> list[tf.TrainerCallback]:
        """What makes a training one of this method."""
        raise NotImplementedError

    def step_size(self, callbacks: list, model: torch.nn.Module, lr: float) -> str:
        """The column `c` of a run."""
        return ""

    def check(self) -> None:
        """Raise a `ValueError` if an argument of the study's own makes no sense."""


def read_arguments(
    kind: type[StudyArguments], config: Path, arguments: list[str]
) -> tuple[StudyArguments, tf.TrainingArguments]:
    """The flat YAML file (`--config` names another one), and over it the command line.

    Raises:
        ValueError: an unknown key or a value of a wrong type in the file, or a value that makes no sense.
    """
    parser = tf.HfArgumentParser((kind, tf.TrainingArguments))  # type: ignore[arg-type]
    parser.add_argument("--config", type=Path, default=config, help="flat YAML file of all arguments")
    file = parser.parse_known_args(arguments)[0].config
    values = yaml.safe_load(file.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold keys and values, such as `max_steps: 300`.")
    known = {action.dest: action for action in parser._actions}
    unknown = values.keys() - known.keys()
    if unknown:
        raise ValueError(f"{file}: unknown key {', '.join(map(str, unknown))}.")
    parser.set_defaults(**{key: _value(f"{file}: {key}", value, known[key]) for key, value in values.items()})
    study, training, _ = parser.parse_args_into_dataclasses(arguments)
    check_arguments(study, training)
    training.report_to, training.dataloader_pin_memory, training.disable_tqdm = [], False, True
    training.save_strategy, training.use_cpu = tf.trainer_utils.SaveStrategy.NO, not torch.cuda.is_available()
    return study, training


def _value(name: str, value: object, action: argparse.Action) -> object:
    """A value of the file in the type that the option has."""
    if action.type not in (int, float, str):
        return value
    what = {int: "whole number", float: "number", str: "text"}[action.type]
    if action.nargs is not None:
        if not isinstance(value, list) or any(_converted(x, action.type) is None for x in value):
            raise ValueError(f"{name} must be a list of {what}s, got {value!r}.")
        return [_converted(x, action.type) for x in value]
    if value is None:
        return None
    if _converted(value, action.type) is None:
        raise ValueError(f"{name} must be a {what}, got {value!r}.")
    return _converted(value, action.type)


def _converted(value: object, kind: type) -> object:
    """None if it is no such value: YAML takes `5e-4` for text, and `yes` for a truth."""
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        return None


def check_arguments(study: StudyArguments, training: tf.TrainingArguments) -> None:
    """Refuse what would fail, or be wrong, in the middle of a study.

    Raises:
        ValueError: the argument is named.
    """
    for method in study.methods:
        if method not in study.colors:
            raise ValueError(f"methods: {method!r} is none of {', '.join(study.colors)}.")
    for method in study.colors:
        for value in getattr(study, method):
            check_number(method, value)
    for name, values in (("grids", study.grids), ("seeds", study.seeds)):
        if not values or (name == "grids" and not all(0 < value < float("inf") for value in values)):
            raise ValueError(f"{name} must hold {'positive numbers' if name == 'grids' else 'numbers'}, got {values}.")
    for share in study.prunes:
        if not 0 < share < 1:
            raise ValueError(f"prunes are shares between 0 and 1, got {share}.")
    if training.max_steps < 1:
        raise ValueError("max_steps must be given: methods are compared after as many steps.")
    check_number("plain_learning_rate", study.plain_learning_rate)
    study.check()


def check_settings(path: Path, study: StudyArguments, training: tf.TrainingArguments) -> None:
    """Write what all runs in a CSV file have in common beside it, or compare with what stands there.

    Raises:
        ValueError: the file holds runs of other settings.
    """
    free = {*study.colors, "methods", "seeds", "runs", "results", "image", "tolerance"}
    common = {key: value for key, value in asdict(study).items() if key not in free}
    for key in ("max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps"):
        common[key] = getattr(training, key)
    for key in ("max_grad_norm", "gradient_accumulation_steps", "optim"):
        common[key] = getattr(training, key)
    common = json.loads(json.dumps(common))
    if not path.exists():
        path.with_suffix(".json").write_text(json.dumps(common, indent=2) + "\n")
        return
    settings = path.with_suffix(".json")
    found = json.loads(settings.read_text()) if settings.exists() else {}
    if found != common:
        other = [key for key in common if found.get(key) != common[key]]
        raise ValueError(f"{path} holds runs of other settings ({', '.join(other)}): give another --results.")


def plan(study: StudyArguments) -> Iterator[tuple[int, str, float]]:
    """Seed, method and strength of every run; the plain one first."""
    for seed in study.seeds:
        yield seed, "plain", 0.0
        for method in study.methods or study.colors:
            for value in getattr(study, method):
                yield seed, method, value


def run(
    study: StudyArguments,
    training: tf.TrainingArguments,
    train: Callable[[int, tf.TrainingArguments, list], torch.nn.Module],
    evaluate: Callable[[torch.nn.Module], float],
    better: str,
) -> Path:
    """Make the runs that are not in the CSV file yet, then print the table and plot.

    Args:
        train: trains a fresh model with a seed, arguments and callbacks, and returns it.
        evaluate: the metric of a model on held-out data.
        better: `"higher"` or `"lower"`.

    Returns:
        The CSV file.
    """
    tf.utils.logging.set_verbosity_error()
    path = Path(study.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_settings(path, study, training)
    left = study.runs or -1
    for seed, method, value in plan(study):
        key = {"method": method, "value": f"{value:g}", "seed": str(seed)}
        if any(key.items() <= row.items() for row in read_rows(path)):
            continue
        if left == 0:
            break
        left -= 1
        start = time.perf_counter()
        callbacks = [] if method == "plain" else study.callbacks(method, value)
        model = train(seed, _with(training, method, value, seed, study.plain_learning_rate), callbacks)
        seconds = time.perf_counter() - start
        c = study.step_size(callbacks, model, training.learning_rate)
        rows = [{**key, **row, "c": c, "seconds": f"{seconds:.1f}"} for row in measured(model, study, evaluate)]
        if method == "plain":
            rows += [{**row, "seconds": "0"} for row in pruned(model, study, evaluate, str(seed))]
        append_rows(path, rows)
        print(f"seed {seed} {method} {value:g}: metric {rows[0]['metric']}, zeros {rows[0]['zeros']}, {seconds:.0f} s")
    rows = read_rows(path)
    if not any(row["method"] == "plain" for row in rows):
        return path
    print(table(rows, study, better))
    if study.image:
        plot(rows, study, better)
    return path


def measured(model: torch.nn.Module, study: StudyArguments, evaluate: Callable) -> Iterator[dict[str, str]]:
    """A trained model as it is, on each grid, and pruned."""
    matrices = select_matrices(model, study.modules or None)
    for grid in (0.0, *study.grids):
        with changed(matrices, lambda w, grid=grid: w.div_(grid).round_().mul_(grid) if grid else w):
            yield _row(matrices, grid, 0.0, evaluate(model))
    for share in study.prunes:
        threshold = _threshold(matrices, share)
        with changed(matrices, lambda w, threshold=threshold: w.masked_fill_(w.abs() <= threshold, 0)):
            yield _row(matrices, 0.0, share, evaluate(model))


def pruned(model: torch.nn.Module, study: StudyArguments, evaluate: Callable, seed: str) -> Iterator[dict[str, str]]:
    """The plain model with its smallest weights at zero, on each grid."""
    matrices = select_matrices(model, study.modules or None)
    for share in study.prunes:
        threshold = _threshold(matrices, share)
        for grid in study.grids:

            def prune(w: torch.Tensor, threshold: float = threshold, grid: float = grid) -> None:
                w.masked_fill_(w.abs() <= threshold, 0).div_(grid).round_().mul_(grid)

            with changed(matrices, prune):
                row = _row(matrices, grid, 0.0, evaluate(model))
                yield {"method": "prune", "value": f"{share:g}", "seed": seed, **row}


@contextmanager
def changed(matrices: dict[str, torch.nn.Parameter], change: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """The matrices with `change` made to each, and as they were afterwards."""
    kept = {name: p.detach().clone() for name, p in matrices.items()}
    try:
        with torch.no_grad():
            for p in matrices.values():
                change(p)
        yield
    finally:
        with torch.no_grad():
            for name, p in matrices.items():
                p.copy_(kept[name])


def _threshold(matrices: dict[str, torch.nn.Parameter], share: float) -> float:
    """The magnitude below which a share of all weights lies."""
    magnitudes = torch.cat([p.detach().abs().flatten() for p in matrices.values()])
    return float(magnitudes.kthvalue(max(1, round(share * len(magnitudes)))).values)


def _row(matrices: dict[str, torch.nn.Parameter], grid: float, share: float, metric: float) -> dict[str, str]:
    count = sum(p.numel() for p in matrices.values())
    zeros = sum(int((p == 0).sum()) for p in matrices.values()) / count
    row = {
        "grid": f"{grid:g}",
        "pruned": f"{share:g}",
        "bits": "32",
        "zeros": f"{zeros:.4f}",
        "metric": f"{metric:.4f}",
    }
    if grid:
        rate = Rate.of(measure([part_of(name, p) for name, p in matrices.items()], grid).values())
        # + 0 takes the sign from zeros
        coded = sum(encode_levels(p.detach().float() + 0.0, grid, name=name).numel() for name, p in matrices.items())
        row |= {"bits": f"{8 * coded / count:.4f}", "entropy": f"{rate.bits - rate.codebook_bits:.4f}"}
    elif not share:
        penalty = BackSlash(matrices, form="reference", shape="tensor")  # which takes all estimates as they are
        penalty.estimate()
        shapes = [found.shape for found in penalty.fits.values()]
        row["shape"] = f"{sum(shapes) / len(shapes):.3f}"
    return row


def _with(
    training: tf.TrainingArguments, method: str, value: float, seed: int, plain_learning_rate: float
) -> tf.TrainingArguments:
    result = copy.deepcopy(training)
    result.seed = result.data_seed = seed
    result.weight_decay = value if method == "decay" else 0.0
    if method == "plain" and plain_learning_rate:
        result.learning_rate = plain_learning_rate
    return result


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file, none if there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Add the rows of one run."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def arguments_or(arguments: list[str] | None) -> list[str]:
    """The command line, unless a caller gives another."""
    return sys.argv[1:] if arguments is None else arguments
