"""The RoMA recipe, as small as it goes, and its upcycled model against the whole Mixtral."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        spec = importlib.util.spec_from_file_location("roma_recipe", ROOT / "recipes" / "roma.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["roma_recipe"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "recipes"))


def small(folder: Path, *more: str) -> list[str]:
    sizes = {"train_samples": 12, "test_samples": 8, "scratch_steps": 2, "max_steps": 2, "k": 1}
    config = folder / "roma.yaml"
    text = (ROOT / "recipes" / "roma.yaml").read_text()
    config.write_text(text + "k: 1\n" if "\nk:" not in text else text)
    arguments = [f"--{key}={value}" for key, value in sizes.items()]
    places = {"config": config, "results": folder / "roma.csv", "work": folder / "work", "output_dir": folder / "runs"}
    return [*arguments, *(f"--{key}={value}" for key, value in places.items()), "--model=olmoe", "--seeds", "0", *more]


def test_runs_and_goes_on(recipe, tmp_path, capsys):
    path = recipe.main(small(tmp_path, "--runs=1"))
    first = path.read_text()
    assert len(first.splitlines()) == 2
    recipe.main(small(tmp_path, f"--image={tmp_path / 'roma.png'}"))
    assert path.read_text().startswith(first)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["base", "routers", "random", "l2", "roma"]
    for row in rows:
        assert all(math.isfinite(float(row[name])) for name in recipe.FIGURES if name != "mmlu")
    assert len({row["loss"] for row in rows}) > 1 and len({row["successes"] for row in rows}) == 1
    assert (tmp_path / "roma.png").exists()
    assert "| olmoe | roma | 1 |" in capsys.readouterr().out


def test_bad_arguments(recipe, tmp_path):
    with pytest.raises(ValueError, match="methods: 'other' is none of"):
        recipe.main(small(tmp_path, "--methods", "other"))
    (tmp_path / "bad.yaml").write_text("unknown: 1\n")
    with pytest.raises(ValueError, match="unknown key unknown"):
        recipe.main(["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(ValueError, match="model must be upcycled or olmoe"):
        recipe.main(small(tmp_path, "--model=dense"))


@pytest.mark.slow
def test_upcycled_model_is_the_whole_mixtral(recipe, tmp_path):
    """Thirty layers of experts, and the last five over kept hidden states: the same logits."""
    pytest.importorskip("gguf")
    models = sys.modules["roma_models"]
    models.build_experts(tmp_path, 5, 32, 16, 5e-4)
    assert models.check(tmp_path, 5, 0.1, ["The minister said", "A goal in the last minute of the match"]) < 1e-3
