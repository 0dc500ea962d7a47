"""The convergence study in tiny: it runs, goes on where it stopped, knows twins, and reports its results."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "recipes/init_study"
TINY = [
    *("--hidden_size", "16", "--layers", "1", "--heads", "2", "--vocabulary", "300", "--window", "32"),
    *("--since", "2022", "--eval_windows", "4", "--max_steps", "3", "--eval_steps", "2", "--warmup_steps", "1"),
    *("--per_device_train_batch_size", "2", "--seeds", "0", "1"),
]


@pytest.fixture(scope="module")
def study():
    pytest.importorskip("accelerate")
    sys.path.insert(0, str(FOLDER))
    try:
        import study

        yield study
    finally:
        sys.path.remove(str(FOLDER))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_and_goes_on(study, tmp_path, capsys):
    def run(*arguments: str) -> list[dict[str, str]]:
        return read(study.main([*TINY, "--output_dir", str(tmp_path / "a"), *arguments]))

    first = run("--arms", "own", "gg-2", "--models", "gpt2")
    rows = run("--arms", "own", "gg-2", "gg-1", "--models", "gpt2")
    assert rows[: len(first)] == first and len(rows) == 2 * 3 * 3  # seeds, arms; losses before, at step 2, at the end
    rows = run("--arms", "own", "normal-0.02", "gg-1", "--models", "llama", "--seeds", "0")
    assert {row["step"] for row in rows} == {"0", "2", "3"}
    runs: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for row in rows:
        runs.setdefault((row["model"], row["arm"], row["seed"]), []).append((row["init"], row["eval_loss"]))
    assert runs["gpt2", "own", "0"] == runs["gpt2", "gg-2", "0"] != runs["gpt2", "own", "1"]
    assert runs["llama", "own", "0"] == runs["llama", "normal-0.02", "0"] != runs["llama", "gg-1", "0"]
    # the same arm again: a twin may stand for a run because runs are reproducible
    again = read(study.main([*TINY, "--output_dir", str(tmp_path / "b"), "--arms", "gg-2", "--models", "gpt2"]))
    assert [(row["init"], row["eval_loss"]) for row in again[:3]] == runs["gpt2", "own", "0"]
    with pytest.raises(ValueError, match=r"results of other settings \(layers\): give another output_dir"):
        run("--layers", "2")

    command = [sys.executable, FOLDER / "report.py", "--results", tmp_path / "a", "--plot", tmp_path / "plot.png"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    cells = {line.split("`")[1]: line.split("|")[2:] for line in table.splitlines()[2:]}
    assert cells.keys() == {"own", "gg-2", "gg-1", "normal-0.02"}
    last = [float(runs["gpt2", "own", seed][-1][1]) for seed in "01"]
    assert cells["own"][0].strip().startswith(f"{sum(last) / 2:.3f} ± ")
    assert cells["gg-2"][1].strip() == "+0.000" != cells["gg-1"][1].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "bert"], "models: 'bert' is neither gpt2 nor llama"),
        (["--arms", "laplace"], "arms: 'laplace' is not own, normal-STD or gg-SHAPE"),
        (["--arms", "gg-9"], "shape must be a number from 0.1 to 8"),
        (["--max_steps", "-1"], "max_steps must be given"),
    ],
)
def test_bad_arguments(study, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        study.main([*TINY, "--output_dir", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())


def test_bad_config(study, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("arms: [own]\nlayer: 3\n")
    with pytest.raises(ValueError, match=r"my.yaml: unknown key layer"):
        study.read_arguments(["--config", str(file)])
    file.write_text("arms: [own]\nlayers: 3\nmax_steps: 9\noutput_dir: x\n")
    arguments, training = study.read_arguments(["--config", str(file), "--layers", "4"])
    assert (arguments.arms, arguments.layers, training.max_steps) == (["own"], 4, 9)


def test_interval(study):
    from report import STUDENT, interval
    from scipy import stats

    assert all(value == pytest.approx(stats.t.ppf(0.975, n), abs=6e-4) for n, value in STUDENT.items())
    low, high = stats.t.interval(0.95, 2, 0.2, stats.sem([0.1, 0.2, 0.3]))
    assert interval([0.1, 0.2, 0.3]) == f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}"
