"""`hf-gg inspect` on real models, from a hub on loopback, on damaged and odd checkpoints, and its memory."""

import json
import math
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hf_gg
from hf_gg import data
from hf_gg.cli import main
from hf_gg.cli.inspect import inspect
from hf_gg.integrations.reading import TensorSource, open_checkpoint


sys.path.insert(0, str(Path(__file__).parent.parent / "integrations"))
from hub_server import Hub


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def as_json(capsys, *arguments, code=0):
    assert main(["inspect", *map(str, arguments), "--json"]) == code
    return strict(capsys.readouterr().out)


@pytest.fixture(scope="module")
def mgm():
    """The report of MGM, made once."""
    run = subprocess.run(
        [sys.executable, "-m", "hf_gg", "inspect", str(data.mgm_gpt2()), "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stderr == "", run.stderr
    return strict(run.stdout)


def test_real_model(mgm):
    assert (mgm["schema"], mgm["format"], mgm["files"]) == (1, "PyTorch", ["pytorch_model.bin"])
    fitted = {tensor["name"]: tensor["fit"] for tensor in mgm["tensors"] if tensor["fit"]}
    assert len(mgm["tensors"]) == 101 and len(fitted) == 34
    assert all(0.1 <= fit["shape"] <= 8 and 0 < fit["ks_ggd"] < 0.2 for fit in fitted.values())
    reasons = {tensor["name"]: tensor["reason"] for tensor in mgm["tensors"] if not tensor["fit"]}
    assert "tied" in reasons["lm_head.weight"]
    assert reasons["transformer.ln_f.weight"] == "no matrix (--all fits it)"
    names = [tensor["name"] for tensor in mgm["tensors"]]
    assert names.index("transformer.h.2.mlp.c_fc.weight") < names.index("transformer.h.7.mlp.c_fc.weight")


def test_kinds_are_made_of_their_tensors(mgm):
    kinds = {kind["kind"]: kind for kind in mgm["kinds"]}
    assert list(kinds) == ["embedding", "position", "qkv", "o", "up", "down", "all"]
    for name, kind in kinds.items():
        rows = [t for t in mgm["tensors"] if t["fit"] and name in (t["kind"], "all")]
        weights = [math.prod(t["dims"]) for t in rows]
        assert (kind["tensors"], kind["weights"]) == (len(rows), sum(weights))
        for figure in ("bits", "bits_measured", "outliers", "entropy"):
            mean = sum(n * t["fit"][figure] for n, t in zip(weights, rows)) / sum(weights)
            assert kind[figure] == pytest.approx(mean, rel=1e-9)
        shapes = sorted(t["fit"]["shape"] for t in rows)
        assert (kind["shape"]["min"], kind["shape"]["max"]) == (shapes[0], shapes[-1])
        assert sum(kind["nearest"].values()) == len(rows)


def test_table(capsys):
    assert main(["inspect", str(data.mgm_gpt2())]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    header, row = lines[0], next(line for line in lines if line.startswith("transformer.h.3.mlp.c_fc.weight"))
    assert row.split()[1:4] == ["up", "256×1024", "float32"]
    assert header.index("bits 30 dB") + len("bits 30 dB") == row.index(row.split()[13]) + len(row.split()[13])
    assert "no fit: no matrix (--all fits it)" in out and "nan" not in out.lower()
    assert "34 tensors fitted" in out


def test_all_and_options(tmp_path, capsys):
    content = {"norm.weight": 1 + torch.randn(512) / 50, "fc.weight": torch.randn(64, 64)}
    save_file(content, tmp_path / "model.safetensors")
    found = as_json(capsys, tmp_path, "--all", "--snr", "20", "--outliers", "2")
    assert [t["kind"] for t in found["tensors"] if t["fit"]] == ["fc", "norm"]
    fit = found["tensors"][0]["fit"]
    assert fit["step"] == pytest.approx(fit["std"] * math.sqrt(0.12))
    assert fit["outliers"] == pytest.approx(0.0455, abs=0.01)
    assert (found["snr_db"], found["outlier_at"]) == (20, 2)


def test_every_bad_tensor_has_a_row_and_a_reason(tmp_path, capsys):
    good = torch.randn(32, 32)
    content = {
        "constant.weight": torch.full((8, 8), 0.5),
        "empty.weight": torch.empty(0, 8),
        "zero.weight": torch.zeros(8, 8),
        "single.weight": torch.ones(1, 1),
        "nan.weight": torch.where(good > 2, torch.nan, good),
        "inf.weight": torch.where(good > 2, torch.inf, good).half(),
        "integers.weight": torch.ones(8, 8, dtype=torch.int64),
        "few.weight": torch.randn(3, 3),
        "good.weight": good.bfloat16(),
    }
    save_file(content, tmp_path / "model.safetensors")
    found = as_json(capsys, tmp_path, "--all")
    reasons = {t["name"].split(".")[0]: t["reason"] for t in found["tensors"]}
    assert reasons.pop("good") is None
    assert reasons["constant"] == "constant, 0.5" and reasons["zero"] == "all zero" and reasons["empty"] == "empty"
    assert "NaN of 1,024" in reasons["nan"] and "infinite of 1,024" in reasons["inf"]
    assert reasons["integers"] == "integers (int64)" and reasons["single"] == "a single value, 1"
    assert reasons["few"] == "9 values, too few for a fit"
    assert main(["inspect", str(tmp_path), "--all"]) == 0
    assert "no fit: all zero" in capsys.readouterr().out


def test_nothing_to_fit(tmp_path, capsys):
    save_file({"a.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    found = as_json(capsys, tmp_path, "--html", tmp_path / "o.html")
    assert found["kinds"] == [] and (tmp_path / "o.html").stat().st_size > 1000
    assert main(["inspect", str(tmp_path)]) == 0
    assert "0 tensors fitted" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--plot", str(tmp_path / "o.png")]) == 1
    assert "nothing to plot" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


@pytest.fixture
def shards(tmp_path):
    files = {}
    for number in (1, 2, 3):
        name = f"model-0000{number}-of-00003.safetensors"
        save_file({f"layers.{number}.fc.weight": torch.randn(64, 64)}, tmp_path / name)
        files[f"layers.{number}.fc.weight"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


def test_damaged_shard(shards, capsys):
    path = shards / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert main(["inspect", str(shards)]) == 1
    printed = capsys.readouterr()
    assert "2 tensors fitted" in printed.out and "DAMAGED: 1 problem" in printed.out
    error = printed.err.strip()
    assert len(error.splitlines()) == 1
    assert "model-00002-of-00003.safetensors is truncated: layers.2.fc.weight ends at byte" in error
    found = as_json(capsys, shards, code=1)
    assert found["problems"][0]["tensor"] == "layers.2.fc.weight"
    assert [bool(t["fit"]) for t in found["tensors"]] == [True, False, True]
    assert found["tensors"][1]["dims"] is None and "truncated" in found["tensors"][1]["reason"]


def test_damaged_codes_do_not_hide_the_rest(tmp_path, capsys):
    content = {"a.weight": torch.full((8, 8, 1), 7, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 1)}
    save_file({**content, "b.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors", {"weight_format": "rf8"})
    found = as_json(capsys, tmp_path, code=1)
    assert "a.weight in model.safetensors" in found["problems"][0]["message"]
    assert [t["name"] for t in found["tensors"] if t["fit"]] == ["b.weight"]


def test_rf8_is_decoded_and_said(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        data.mgm_gpt2(), quantization_config=hf_gg.GGConfig(weight_format="rf8")
    )
    model.save_pretrained(tmp_path)
    found = as_json(capsys, tmp_path)
    assert found["weight_format"] == "rf8"
    row = next(t for t in found["tensors"] if t["name"] == "transformer.h.3.mlp.c_fc.weight")
    assert row["stored"] == "rf8" and 0.3 < row["fit"]["shape"] < 2.2
    assert main(["inspect", str(tmp_path)]) == 0
    assert "codes decoded from rf8" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sharp_gpt2(tmp_path_factory):
    """A small GPT-2 with some weights that a grid of 8 bits cannot hold."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.view(-1)[::500] = 60.0
    folder = tmp_path_factory.mktemp("sharp") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weight_format", ["rf8", "grid"])
def test_coded_checkpoints_give_the_table_of_plain_ones(sharp_gpt2, tmp_path, capsys, weight_format):
    from transformers import AutoModelForCausalLM

    found, step = [], 0.004 if weight_format == "grid" else None
    for coding in ("none", "rans", "eg0"):
        config = hf_gg.GGConfig(weight_format=weight_format, coding=coding, step=step)
        model = AutoModelForCausalLM.from_pretrained(sharp_gpt2, quantization_config=config)
        model.save_pretrained(tmp_path / coding)
        found.append(as_json(capsys, tmp_path / coding))
        assert found[-1].pop("model") == str(tmp_path / coding)
    assert found[0] == found[1] == found[2] and found[0]["weight_format"] == weight_format
    rows = {t["name"]: t for t in found[1]["tensors"]}
    assert rows["transformer.h.1.mlp.c_fc.weight"]["stored"] == weight_format
    assert "the scales of the codes" in rows["transformer.h.1.mlp.c_fc.weight_scale"]["reason"]
    outliers = [t for name, t in rows.items() if name.endswith(("_outlier_index", "_outlier_value"))]
    assert all("the outliers of the codes" in t["reason"] for t in outliers)
    # what is described is what the model computes with
    plain = model.dequantize()
    with open_checkpoint(str(tmp_path / "eg0")) as source:
        decoded = {e.name: e.load() for e in source if e.stored == weight_format}
    assert len(decoded) == 8
    for name, weight in decoded.items():
        own = plain.get_parameter(name).detach().float().T  # of a Conv1D, whose codes are stored [out, in]
        torch.testing.assert_close(weight, own, rtol=0, atol=0)
    if weight_format == "grid":
        assert outliers and float(decoded["transformer.h.0.mlp.c_fc.weight"].max()) == 60


def test_coded_floats_are_decoded(tmp_path, capsys):
    from hf_gg.coding.levels import encode_levels

    weight = (torch.randn(64, 48) * 20).round() / 64
    other = torch.randn(40, 40)
    save_file({"a.weight": weight, "b.weight": other}, tmp_path / "plain.safetensors")
    coded = {"a.weight": encode_levels(weight, 1 / 64), "b.weight": other}
    save_file(coded, tmp_path / "coded.safetensors")
    plain, found = (as_json(capsys, tmp_path / f"{name}.safetensors") for name in ("plain", "coded"))
    for one, two in zip(plain["tensors"], found["tensors"]):
        assert (one["name"], one["dims"], one["stored"], one["fit"]) == (
            two["name"], two["dims"], two["stored"], two["fit"],
        )  # fmt: skip


@pytest.mark.parametrize("damage", ["header", "body", "cut", "promise"])
def test_damaged_payloads_do_not_hide_the_rest(tmp_path, capsys, damage):
    payload = hf_gg.coding.encode(torch.randint(1, 90, (64, 64), dtype=torch.uint8), "rans")
    if damage == "header":
        payload[9] ^= 255
    elif damage == "body":
        payload[len(payload) // 2] ^= 255
    elif damage == "cut":
        payload = payload[:100].clone()
    else:  # a constant of terabytes in some bytes
        from hf_gg.coding.container import CONSTANT, NO_MODEL, Header, write_header

        header = Header(CONSTANT, NO_MODEL, (1 << 20, 1 << 24), checksum=0, symbol=7)
        payload = torch.tensor(list(write_header(header)) + [7] * 8, dtype=torch.uint8)
    content = {"a.weight": payload, "a.weight_scale": torch.ones(64, 1), "b.weight": torch.randn(8, 8)}
    save_file(content, tmp_path / "model.safetensors", {"weight_format": "rf8"})
    found = as_json(capsys, tmp_path, code=1)
    assert [t["name"] for t in found["tensors"] if t["fit"]] == ["b.weight"]
    assert found["tensors"][0]["reason"] == "damaged, see the errors"
    assert "a.weight in model.safetensors" in found["problems"][0]["message"]


def test_a_clamped_shape_is_said_in_its_row(tmp_path, capsys):
    pruned = torch.randn(64, 64)
    pruned[torch.rand(64, 64) < 0.5] = 0
    save_file({"pruned.weight": pruned, "plain.weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    plain, row = as_json(capsys, tmp_path)["tensors"]
    assert plain["fit"]["notes"] == [] and 0 < plain["fit"]["shape_stderr"] < 0.1
    assert row["fit"]["shape"] == pytest.approx(0.1) and row["fit"]["shape_stderr"] is None
    assert 0.3 < row["fit"]["shape_moments"] < 1.5
    assert "ν is clamped to 0.1" in row["fit"]["notes"][0] and "of the weights are 0" in row["fit"]["notes"][0]
    assert main(["inspect", str(tmp_path), "--html", str(tmp_path / "o.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("pruned.weight"))
    assert "! ν is clamped to 0.1" in line and "see ν mom" in line
    assert "!" not in next(line for line in lines if line.startswith("plain.weight"))
    assert '<div class="note">ν is clamped to 0.1' in (tmp_path / "o.html").read_text()


def test_ternary_weights_end_at_the_other_clamp(tmp_path, capsys):
    save_file({"a.weight": torch.randint(-1, 2, (64, 64)).float()}, tmp_path / "model.safetensors")
    notes = as_json(capsys, tmp_path)["tensors"][0]["fit"]["notes"]
    assert notes[0] == "ν is clamped to 8: the law fits badly"


@pytest.mark.parametrize("coder", ["none", "rans", "eg0"])
def test_codes_without_their_scale(tmp_path, capsys, coder):
    codes = torch.randint(1, 60, (64, 64), dtype=torch.uint8)
    stored = codes[..., None].clone() if coder == "none" else hf_gg.coding.encode(codes, coder)
    save_file({"a.weight": stored, "b.ids": codes}, tmp_path / "model.safetensors", {"weight_format": "rf8"})
    found = as_json(capsys, tmp_path, code=1)
    assert "a.weight_scale is missing" in found["problems"][0]["message"] and len(found["problems"]) == 1


def test_names_that_would_steer_the_terminal(tmp_path, capsys):
    save_file({"a\n\x1b[31mred.weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"a\n\x1b[31mred.weight" in out


@pytest.mark.parametrize("name", ["", " "])
def test_no_name(name, capsys):
    assert main(["inspect", name]) == 1
    assert "name of the model is empty" in capsys.readouterr().err


def test_a_truncated_file_shows_what_it_still_holds(tmp_path, capsys):
    content = {f"layers.{i}.fc.weight": torch.randn(64, 64) for i in range(4)}
    content["layers.0.ids"] = torch.arange(9)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(content, whole)
    cut.write_bytes(whole.read_bytes()[: -64 * 64 * 4 - 5])
    expected = as_json(capsys, whole)["tensors"]
    found = as_json(capsys, cut, code=1)
    damaged = [t for t in found["tensors"] if t["reason"] and "truncated" in t["reason"]]
    assert len(damaged) == 2 and all(t["dims"] is None and t["fit"] is None for t in damaged)
    for one, two in zip(expected, found["tensors"]):
        if two not in damaged:
            assert one["fit"] == two["fit"] and one["reason"] == two["reason"]
    assert len(found["problems"]) == 1 and "cut.safetensors is truncated" in found["problems"][0]["message"]
    assert main(["inspect", str(cut)]) == 1
    assert "no fit: damaged: the file is truncated" in capsys.readouterr().out


def test_a_bad_entry_of_the_index_does_not_hide_the_rest(shards, capsys):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"layers.4.fc.weight": "../secret.safetensors", "layers.5.fc.weight": 7}
    path.write_text(json.dumps(index))
    save_file({"layers.4.fc.weight": torch.randn(64, 64)}, shards.parent / "secret.safetensors")
    found = as_json(capsys, shards, code=1)
    assert [bool(t["fit"]) for t in found["tensors"]] == [True, True, True, False, False]
    assert "'../secret.safetensors', which is no file of its folder" in found["tensors"][3]["reason"]
    assert [p["tensor"] for p in found["problems"]] == ["layers.4.fc.weight", "layers.5.fc.weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some text\nof two lines, and more than there is room for in a header of eight bytes", "it is a text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(range(200, 256)), "zip archive"),
        (bytes(range(160, 256)), "which are no length of a header"),
    ],
)
def test_a_file_that_is_no_safetensors_says_what_it_is(tmp_path, capsys, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and "truncated" not in error


@pytest.mark.parametrize(("option", "endings"), [("--plot", ".png"), ("--html", ".html or .htm")])
@pytest.mark.parametrize("name", ["x.foo", "x"])
def test_other_endings_are_refused_before_the_work(tmp_path, capsys, monkeypatch, option, name, endings):
    monkeypatch.setattr("hf_gg.cli.inspect.open_checkpoint", None)  # would raise
    assert main(["inspect", str(data.mgm_gpt2()), option, str(tmp_path / name)]) == 2
    assert f"must end in {endings}" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smollm2(capsys):
    found = as_json(capsys, data.smollm2_gguf())
    assert sum(t["fit"] is not None for t in found["tensors"]) == 211
    total = found["kinds"][-1]
    assert total["weights"] == 134_479_872
    assert 1.4 < total["shape"]["median"] < 1.8 and total["nearest"]["ggd"] > 190


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nothing/there"], "There is no file or folder /nothing/there"),
        (["nobody/nothing"], "HF_HUB_OFFLINE"),
        (["a--b/..c"], "epo"),
        ([str(Path(__file__).parent)], "has no weights"),
        ([str(Path(__file__))], "is not a readable PyTorch file"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("option", [["--snr", "0"], ["--snr", "nan"], ["--outliers", "-1"], ["--snr", "x"], []])
def test_wrong_usage(option, capsys):
    assert main(["inspect", *([str(data.mgm_gpt2()), *option] if option else [])]) == 2


def test_outputs_need_a_folder(tmp_path, capsys):
    assert main(["inspect", str(data.mgm_gpt2()), "--html", str(tmp_path / "no" / "o.html")]) == 1
    assert "make it first" in capsys.readouterr().err


def test_picture(tmp_path, capsys):
    png = pytest.importorskip("PIL.Image")
    path = tmp_path / "o.png"
    assert main(["inspect", str(data.mgm_gpt2()), "--plot", str(path)]) == 0
    with png.open(path) as image:
        assert image.format == "PNG" and image.width > 700 and image.height > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert [p.name for p in tmp_path.iterdir()] == ["o.png"]


def test_without_matplotlib(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from hf_gg.cli import main; "
        f"sys.exit(main(['inspect', {str(data.mgm_gpt2())!r}, '--plot', {str(tmp_path / 'o.png')!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "pip install matplotlib" in run.stderr and run.stdout == ""


def test_hub_name(tmp_path):
    save_file({"layers.0.fc.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    shard = (tmp_path / "m.safetensors").read_bytes()
    save_file({"layers.1.fc.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {f"layers.{number}.fc.weight": name for number, name in enumerate(names)}}

    def command(hub, *arguments, **more):
        environment = {
            **os.environ,
            **hub.environment(str(tmp_path / "home")),
            "HF_HUB_DISABLE_PROGRESS_BARS": "0",
            **more,
        }
        return subprocess.run(
            [sys.executable, "-m", "hf_gg", "inspect", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    with Hub() as hub:
        hub.files["user/model"] = {
            "config.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            names[0]: shard,
            names[1]: (tmp_path / "m.safetensors").read_bytes(),
            "pytorch_model.bin": b"never asked for",
        }
        run = command(hub, "user/model", "--json", HF_HUB_OFFLINE="0")
        assert run.returncode == 0 and run.stderr == "", run.stderr
        found = strict(run.stdout)
        assert found["files"] == names and all(t["fit"] for t in found["tensors"])
        assert not any("pytorch_model" in path for _, path in hub.requests)
        missing = command(hub, "user/other", HF_HUB_OFFLINE="0")
        assert missing.returncode == 1 and "no model of that name on the hub" in missing.stderr
        assert len(missing.stderr.strip().splitlines()) == 1
    offline = command(hub, "user/model", "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and strict(offline.stdout)["tensors"] == found["tensors"]
    unreachable = command(hub, "user/other", HF_HUB_OFFLINE="0")
    assert unreachable.returncode == 1 and "does not answer" in unreachable.stderr


MEMORY = """
import sys, warnings
from pathlib import Path
import torch
from hf_gg.cli.inspect import inspect
from hf_gg.integrations.reading import open_checkpoint
from hf_gg import data

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

with open_checkpoint(sys.argv[2]) as source:
    inspect(source, "warm")  # imports, kernels, pools
import gc; gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = peak()
with open_checkpoint(sys.argv[1]) as source:
    report = inspect(source, "large")
assert len(report.kinds) == 2 and not report.problems, report
print(peak() - before, report.kinds[-1].tensors)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["safetensors", "bfloat16", "bin", "gguf"])
def test_two_tensors_in_memory(tmp_path, kind):
    """A checkpoint of eight tensors of 8 M weights: the peak is two of them in float32, the mapped pages included."""
    count, mib = 8, 1 << 20
    for name, size in (("large", 2048), ("warm", 64)):
        tensors = {f"layers.{i}.fc.weight": torch.randn(4096, size) for i in range(count)}
        (tmp_path / name).mkdir()
        if kind == "bin":
            torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        elif kind == "gguf":
            import gguf

            writer = gguf.GGUFWriter(tmp_path / name / "model.gguf", "llama")
            for key, tensor in tensors.items():
                writer.add_tensor(key, tensor.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        else:
            dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
            save_file({key: t.to(dtype) for key, t in tensors.items()}, tmp_path / name / "model.safetensors")
    del tensors
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path / "large"), str(tmp_path / "warm")],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    grown, fitted = map(int, run.stdout.split())
    assert fitted == count
    one = 32 * mib
    assert grown < 2 * one + 24 * mib, f"{grown / mib:.0f} MiB for tensors of {one / mib:.0f} MiB"


def test_a_tensor_is_let_go_before_the_next_is_read(tmp_path):
    """A source that counts: never is a second tensor alive when one is read."""
    import weakref

    save_file({f"layers.{i}.fc.weight": torch.randn(64, 64) for i in range(6)}, tmp_path / "model.safetensors")
    alive, reads = [], []

    class Counting(TensorSource):
        def __iter__(self):
            for entry in super().__iter__():
                read = entry.read

                def counted(read=read):
                    assert not [ref for ref in alive if ref() is not None]
                    tensor = read()
                    alive.append(weakref.ref(tensor))
                    reads.append(1)
                    return tensor

                object.__setattr__(entry, "read", counted)
                yield entry

    report = inspect(Counting(tmp_path, ["model.safetensors"]), "counted")
    assert len(reads) == 6 and report.kinds[-1].tensors == 6


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_only_on_a_terminal(tmp_path, terminal):
    save_file({"fc.weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-m", "hf_gg", "inspect", str(tmp_path)]
    if not terminal:
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0 and run.stderr == ""
        return
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(master, False)
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave)
    seen = os.read(master, 10_000)  # before the other end is closed, which may throw away what was not read
    os.close(slave)
    os.close(master)
    assert run.returncode == 0 and b"%" in seen
