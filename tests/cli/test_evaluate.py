"""`hf-gg eval`: JSON, table, files, tasks of lm_eval, and errors in one line."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from hf_gg import GGConfig, quantize_
from hf_gg.cli import main


sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # where the small model is
from toy import TEXTS, model, save, tokenizer


@pytest.fixture(autouse=True)
def _restore_logging():
    levels = transformers_logging.get_verbosity(), logging.getLogger("lm_eval").level
    yield
    transformers_logging.set_verbosity(levels[0])
    transformers_logging.enable_progress_bar()
    logging.getLogger("lm_eval").setLevel(levels[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Folders `base` and `rf8`, texts, and a task of lm_eval made of real questions."""
    folder = tmp_path_factory.mktemp("eval")
    save(folder / "base")
    save(folder / "rf8", quantize_(model(), GGConfig()))
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def test_json_and_file(place, tmp_path, capsys):
    words = [place / "rf8", "--against", place / "base", "--text", place / "texts.jsonl", "--tokens", 60, "--json"]
    assert main(["eval", *map(str, words), "--output", str(tmp_path / "eval.json")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert json.loads((tmp_path / "eval.json").read_text()) == found and not err
    texts = found["texts"]
    assert set(texts["metrics"]) == {"perplexity", "base_perplexity", "perplexity_ratio", "kl", "flips"}
    assert texts["documents"] == 5 and texts["window"] == 64 and "sums" not in texts
    assert 8 < found["bits_per_weight"] < 10 and found["dtype"] == "float32" and found["versions"]["torch"]
    # the command says how to get these figures again
    command = found["evaluated_with"].split()
    assert command[:2] == ["hf-gg", "eval"] and "--json" not in command
    assert main([*command[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["texts"] == texts and again["evaluated_with"] == found["evaluated_with"]


def test_table(place, capsys):
    words = [place / "rf8", "--against", place / "base", "--text", place / "texts.jsonl", "--documents", 2]
    assert main(["eval", *map(str, words), "--metrics", "kl", "flips", "--window", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "of 2 documents, windows of 32, stride 16" in lines[2]
    assert lines[-2].startswith("KL from the base, nats") and lines[-1].startswith("flips of the top token")


def test_tasks_are_those_of_the_lm_eval_command(place, tmp_path, capsys):
    """Same numbers as `lm_eval --model hf` on the folder, which has never heard of us."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    from hf_gg.evaluation import write_mmlu_dev

    task = write_mmlu_dev(tmp_path / "tasks")
    words = [place / "rf8", "--against", place / "base", "--tasks", task, "--include-path", tmp_path / "tasks"]
    assert main(["eval", *map(str, words), "--limit", "12", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["tasks"]
    assert "Running loglikelihood" not in err, "a progress bar where there is no terminal"
    assert found["samples"] == {task: 12} and found["lm_eval"] == lm_eval.__version__
    for folder, ours in (("rf8", found["results"]), ("base", found["base_results"])):
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={place / folder},dtype=float32",
            tasks=[task],
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
            limit=12,
            device="cpu",
            batch_size=1,
        )["results"][task]
        assert ours[task]["acc"]["value"] == theirs["acc,none"]
        assert ours[task]["acc"]["stderr"] == theirs["acc_stderr,none"]
        assert ours[task]["acc"]["higher_is_better"] is True
    assert found["evaluated_with"].startswith("lm_eval --model hf --model_args pretrained=")
    main(["eval", *map(str, words), "--limit", "4"])
    assert "mmlu_dev_local" in capsys.readouterr().out


@pytest.mark.slow
def test_the_lm_eval_command_itself(place, tmp_path, capsys):
    """In a process of its own, as `evaluated_with` says."""
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    from hf_gg.evaluation import write_mmlu_dev

    task = write_mmlu_dev(tmp_path / "tasks")
    words = [place / "rf8", "--tasks", task, "--include-path", tmp_path / "tasks", "--limit", 20]
    assert main(["eval", *map(str, words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    command = [sys.executable, "-m", *shlex.split(found["evaluated_with"]), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"][task]
    assert theirs["acc,none"] == found["results"][task]["acc"]["value"]


def test_figures_are_printed_though_the_file_cannot_be_written(place, tmp_path, capsys, monkeypatch):
    """A disk that is full after hours of measuring."""

    def no_space(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf_gg.cli.evaluate.write_whole", no_space)
    words = [place / "rf8", "--text", place / "texts.jsonl", "--json", "--output", tmp_path / "eval.json"]
    assert main(["eval", *map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["texts"]["metrics"]["perplexity"]["value"] > 1 and "No space left" in err


@pytest.mark.parametrize("limit", [1, 2])
def test_one_question(place, tmp_path, capsys, limit):
    """Which has no standard error."""
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    from hf_gg.evaluation import write_mmlu_dev

    task = write_mmlu_dev(tmp_path / "tasks")
    words = ["--tasks", task, "--include-path", tmp_path / "tasks", "--limit", limit]
    assert main(["eval", *map(str, [place / "rf8", *words]), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["tasks"]["results"][task]["acc"]
    assert (entry["stderr"] is None) == (limit == 1) and entry["value"] in (0, 0.5, 1)


def test_what_is_drawn_is_what_the_lm_eval_command_draws(place, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    import lm_eval

    from hf_gg.evaluation import evaluate_tasks, write_mmlu_dev

    task, given = write_mmlu_dev(tmp_path / "tasks"), []
    run = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: given.append(options) or run(**options))
    for seed in (None, 5):
        evaluate_tasks(model(), tokenizer(), [task], tmp_path / "tasks", limit=2, progress=False, seed=seed)
    assert not any("seed" in name for name in given[0]), "its own: 0 for random, 1234 for the others"
    assert {value for name, value in given[1].items() if "seed" in name} == {5}


def refused(capsys, *words) -> str:
    assert main(["eval", *map(str, words)]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("hf-gg eval: error: ")]
    assert len(lines) == 1 and not out, (out, err)
    return lines[0]


def test_refused_before_a_model_is_loaded(place, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    texts = place / "texts.jsonl"
    assert "is empty" in refused(capsys, place / "rf8", "--text", tmp_path / "empty.txt")
    assert "does not exist" in refused(capsys, place / "rf8", "--text", tmp_path / "missing")
    assert "make it first" in refused(capsys, place / "rf8", "--text", texts, "--output", tmp_path / "a" / "b.json")
    assert "is a folder" in refused(capsys, place / "rf8", "--text", texts, "--output", tmp_path)
    assert "at least 1" in refused(capsys, place / "rf8", "--text", texts, "--documents", 0)
    assert "name some with --text" in refused(capsys, place / "rf8", "--tasks", "x", "--metrics", "kl")
    assert "does not exist" in refused(capsys, tmp_path / "no" / "model", "--text", texts)
    assert "no config.json" in refused(capsys, tmp_path, "--text", texts, "--tokenizer", place / "base")
    assert "has no tokenizer" in refused(capsys, tmp_path, "--text", texts)
    assert "dtype must be" in refused(capsys, place / "rf8", "--text", texts, "--dtype", "int8")
    assert "name some with --tasks" in refused(capsys, place / "rf8", "--text", texts, "--limit", 3)


def test_refused_names_of_metrics_and_tasks(place, tmp_path, capsys):
    texts = place / "texts.jsonl"
    assert "'bleu' is no metric" in refused(capsys, place / "rf8", "--text", texts, "--metrics", "bleu")
    assert "--against" in refused(capsys, place / "rf8", "--text", texts, "--metrics", "kl")
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    assert "is no folder" in refused(capsys, place / "rf8", "--tasks", "x", "--include-path", tmp_path / "none")


def test_names_are_looked_at_before_anything_is_measured(place, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    monkeypatch.setattr("hf_gg.evaluation.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    given = [place / "rf8", "--text", place / "texts.jsonl"]
    own = ["--include-path", tmp_path]
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n")
    assert "is no metric" in refused(capsys, *given, "--metrics", "bleu")
    assert "cannot be had" in refused(capsys, *given, "--tasks", "far", *own)
    assert "at least 1 question" in refused(capsys, *given, "--tasks", "far", *own, "--limit", 0)
    monkeypatch.setattr("lm_eval.tasks.TaskManager.all_tasks", ["hellaswag"])
    assert "near it: hellaswag" in refused(capsys, *given, "--tasks", "helaswag", *own)


@pytest.mark.slow
def test_unknown_task(place, capsys):
    """lm_eval reads its thousands of files first."""
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    error = refused(capsys, place / "rf8", "--tasks", "helaswag")
    assert "'helaswag' is no task of lm_eval; near it: hellaswag" in error


def test_no_network(place, tmp_path, capsys):
    """The hub is switched off in these tests."""
    assert "cannot be had from the hub" in refused(capsys, "user/model", "--text", place / "texts.jsonl")
    pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install hf-gg[eval]")
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["a"]\ndoc_to_target: 0\n'
    )
    assert "The data of far cannot be had" in refused(
        capsys, place / "rf8", "--tasks", "far", "--include-path", tmp_path
    )


def test_other_models(place, tmp_path, capsys):
    texts = place / "texts.jsonl"
    save(tmp_path / "other", model(), tokenizer("abcdefgh"))
    assert "have other tokens" in refused(capsys, place / "rf8", "--against", tmp_path / "other", "--text", texts)
    save(tmp_path / "larger", model(vocab_size=80))
    assert "other vocabularies" in refused(capsys, place / "rf8", "--against", tmp_path / "larger", "--text", texts)
    broken = model()
    broken.lm_head.weight.data[0] = torch.nan
    save(tmp_path / "nan", broken)
    assert "gives NaN" in refused(capsys, tmp_path / "nan", "--text", texts)
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    assert "causal language model" in refused(capsys, tmp_path / "encoder", "--text", texts)
