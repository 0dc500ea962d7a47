"""The rate–accuracy studies in tiny: they run, go on where they stopped, count bytes, refuse bad values."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parents[2] / "recipes"
TRAINING = ("--max_steps", "4", "--per_device_train_batch_size", "2", "--warmup_steps", "1", "--learning_rate", "5e-3")
STUDY = ("--methods", "backslash", "l1", "l2", "decay", "--backslash", "0.5", "3", "--l1", "1", "--l2", "1")
STUDY += ("--decay", "1", "--grids", "0.015625", "0.0625", "--prunes", "0.8", "--warmup", "0", "--every", "2")
LANGUAGE = ("--hidden_size", "16", "--layers", "1", "--heads", "2", "--vocabulary", "300", "--window", "32")
LANGUAGE += ("--since", "2022", "--eval_windows", "4")
CLASSIFIER = ("--layers", "1", "--tokens", "8", "--held_out", "32")


@pytest.fixture(scope="module")
def recipes():
    pytest.importorskip("accelerate")
    sys.path.insert(0, str(FOLDER))
    try:
        import backslash_adapter
        import backslash_classifier
        import backslash_lm
        import deepshape
        import rate_study

        found = {"classifier": backslash_classifier, "lm": backslash_lm, "deepshape": deepshape, "study": rate_study}
        yield found | {"adapter": backslash_adapter}
    finally:
        sys.path.remove(str(FOLDER))


def run(module, folder: Path, *arguments: str) -> list[dict[str, str]]:
    places = ("--output_dir", str(folder), "--results", str(folder / "r.csv"), "--image", str(folder / "plot.png"))
    with module.main([*places, *arguments]).open(newline="") as file:
        return list(csv.DictReader(file))


def test_language_model(recipes, tmp_path, capsys):
    arguments = (*LANGUAGE, *TRAINING, *STUDY)
    first = run(recipes["lm"], tmp_path, *arguments, "--seeds", "0", "--runs", "2")
    assert {(row["method"], row["value"]) for row in first if row["method"] != "prune"} == {
        ("plain", "0"),
        ("backslash", "0.5"),
    }
    rows = run(recipes["lm"], tmp_path, *arguments, "--seeds", "0", "1")
    assert rows[: len(first)] == first
    # as it is, two grids, one share pruned; the plain model is also pruned, then rounded to each grid
    assert len(rows) == 2 * (6 * 4 + 2)
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert all(0 < float(row["bits"]) < 16 for row in rows if row["grid"] != "0")
    assert all(float(row["entropy"]) < float(row["bits"]) for row in rows if row["grid"] != "0")
    zeros = {row["value"]: float(row["zeros"]) for row in rows if row["method"] == "backslash" and row["grid"] == "0"}
    assert zeros["3"] > zeros["0.5"] > 0
    plain = [row for row in rows if row["pruned"] == "0" and row["grid"] == "0"]
    own = {(row["method"], row["value"], row["seed"]): float(row["zeros"]) for row in plain}
    pruned = [row for row in rows if row["pruned"] == "0.8"]
    for row in pruned:  # what has more zeros by itself keeps them
        wanted = max(0.8, own[row["method"], row["value"], row["seed"]])
        assert float(row["zeros"]) == pytest.approx(wanted, abs=2e-3), row
    assert pruned
    said = capsys.readouterr().out
    assert "plain training:" in said and "| backslash | 0.5 |" in said
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"holds runs of other settings \(max_steps\)"):
        run(recipes["lm"], tmp_path, *arguments, "--max_steps", "5")


def test_classifier(recipes, tmp_path):
    methods = ("--methods", "backslash", "reference", "straight", "loose", "--reference", "2000")
    phases = ("--straight", "3", "--loose", "3", "--cooldown", "0.5", "--backslash", "3", "--seeds", "0")
    rows = run(recipes["classifier"], tmp_path, *CLASSIFIER, *TRAINING, *STUDY, *methods, *phases)
    found = {row["method"]: row for row in rows if row["grid"] == "0" and row["pruned"] == "0"}
    assert found.keys() == {"plain", "backslash", "reference", "straight", "loose"}
    zeros = {method: float(row["zeros"]) for method, row in found.items()}
    assert zeros["plain"] == 0 < zeros["loose"] < zeros["backslash"] <= zeros["straight"]
    assert float(found["reference"]["c"]) < 0.001 < float(found["backslash"]["c"])
    assert all(0 <= float(row["metric"]) <= 1 for row in rows)


def test_adapter(recipes, tmp_path):
    pytest.importorskip("peft")
    grids = ("--grids", "0.0001220703125", "--methods", "backslash", "--seeds", "0", "--modules", "backslash_delta")
    rows = run(recipes["adapter"], tmp_path, *CLASSIFIER, *TRAINING, *STUDY, *grids)
    zeros = {row["value"]: float(row["zeros"]) for row in rows if row["grid"] == "0" and row["pruned"] == "0"}
    assert zeros["0"] < zeros["0.5"] < zeros["3"] == 1
    bits = {row["value"]: float(row["bits"]) for row in rows if row["grid"] != "0" and row["method"] != "prune"}
    assert bits["0"] > bits["0.5"] > bits["3"]
    assert {row["c"] != "" for row in rows if row["method"] == "backslash"} == {True}


def test_deepshape(recipes, tmp_path, capsys):
    scales = ("--shape", "0.8", "1.25", "--std", "0.6", "--both", "0.8", "--both_std", "0.5", "--seeds", "0")
    training = (*TRAINING, "--learning_rate", "1e-6", "--grids", "0.03125", "--prunes", "0.8", "--modules", "encoder")
    rows = run(recipes["deepshape"], tmp_path, *CLASSIFIER, *training, *scales)
    found = {(row["method"], row["value"]): row for row in rows if row["pruned"] == "0" and row["grid"] == "0"}
    assert found.keys() == {("plain", "0"), ("shape", "0.8"), ("shape", "1.25"), ("std", "0.6"), ("both", "0.8")}
    shapes = {key: float(row["shape"]) for key, row in found.items()}
    plain = shapes["plain", "0"]  # the fit of what came out is not quite what was asked for, see docs/deepshape.md
    assert shapes["shape", "0.8"] == pytest.approx(0.8 * plain, rel=0.15)
    assert shapes["shape", "1.25"] == pytest.approx(1.25 * plain, rel=0.15)
    assert shapes["std", "0.6"] == pytest.approx(plain, rel=0.01)
    assert shapes["both", "0.8"] == pytest.approx(shapes["shape", "0.8"], rel=0.01)
    bits = {(row["method"], row["value"]): float(row["bits"]) for row in rows if row["grid"] != "0"}
    saved = bits["plain", "0"] - bits["std", "0.6"]
    assert saved == pytest.approx(0.737, abs=0.1)  # log2(1 / 0.6)
    assert bits["both", "0.8"] < bits["std", "0.6"]
    assert "| shape | 0.8 |" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for arguments, message in (
        (("--shape", "0"), "shape must be positive, got 0"),
        (("--both_std", "nan"), "both_std must be finite"),
        (("--map", "linear"), "map must be one of parametric, empirical, got 'linear'"),
        (("--shape", "100"), "shape_scale=100 makes it"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipes["deepshape"], tmp_path / "new", *CLASSIFIER, *training, *scales, *arguments)


def test_bits_are_bytes(recipes):
    """What is reported is what `encode_levels` writes, and what it writes can be read back."""
    from hf_gg.coding.levels import decode_levels, encode_levels

    study, w = recipes["study"], torch.nn.Parameter(torch.randn(100, 120) * 0.05)
    kept = w.detach().clone()
    arguments = study.StudyArguments(grids=[2**-6], prunes=[0.8])
    rows = list(study.measured(_Holder(w), arguments, lambda model: 0.5))
    rounded = (kept / 2**-6).round() * 2**-6 + 0.0
    payload = encode_levels(rounded, 2**-6)
    assert torch.equal(decode_levels(payload), rounded)
    assert [row["grid"] for row in rows] == ["0", "0.015625", "0"]
    assert float(rows[1]["bits"]) == pytest.approx(8 * payload.numel() / w.numel(), abs=1e-4)
    assert torch.equal(w, kept)


class _Holder(torch.nn.Module):
    def __init__(self, weight: torch.nn.Parameter):
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "dropout"), "methods: 'dropout' is none of backslash, l1"),
        (("--backslash", "-1"), "backslash must be finite, at least 0, got -1"),
        (("--l1", "nan"), "l1 must be finite"),
        (("--grids", "0"), "grids must hold positive numbers"),
        (("--prunes", "1.5"), "prunes are shares between 0 and 1, got 1.5"),
        (("--max_steps", "-1"), "max_steps must be given"),
        (("--cooldown", "-0.1"), "cooldown must be finite"),
        (("--every", "0"), "every must be a number of steps"),
        (("--layers", "7"), "layers must be 1 to 6, got 7"),
        (("--held_out", "2000"), "held_out must be 1 to 725, got 2000"),
    ],
)
def test_bad_arguments(recipes, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(recipes["classifier"], tmp_path, *CLASSIFIER, *TRAINING, *arguments)
    assert not list(tmp_path.iterdir())


def test_bad_config(recipes, tmp_path):
    file = tmp_path / "my.yaml"
    for text, message in (
        ("backslash: [1]\nlambda: 3\n", "my.yaml: unknown key lambda"),
        ("backslash: [high]\n", "my.yaml: backslash must be a list of numbers, got \\['high'\\]"),
        ("backslash: 0.3\n", "my.yaml: backslash must be a list of numbers, got 0.3"),
        ("max_steps: many\n", "my.yaml: max_steps must be a whole number, got 'many'"),
        ("- backslash\n", "my.yaml must hold keys and values"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(recipes["lm"], tmp_path, "--config", str(file))
    file.write_text("backslash: [1]\nmax_steps: 9\nlearning_rate: 2.0e-3\noutput_dir: x\n")
    study = recipes["study"]
    kind = recipes["lm"].LanguageArguments
    arguments, training = study.read_arguments(kind, file, ["--layers", "4", "--backslash", "2", "3"])
    assert (arguments.backslash, arguments.layers, training.max_steps) == ([2.0, 3.0], 4, 9)
