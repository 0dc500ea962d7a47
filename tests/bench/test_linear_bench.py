"""The measurements: what is checked before it is timed, what is listed, and the files that come out."""

import csv
import json
import sys

import pytest
import torch
from torch import nn

from hf_gg.bench import contenders, linear, loading, plot, timing
from hf_gg.cli.main import main


CPU = torch.device("cpu")
SMALL = {"small": (24, 64)}


@pytest.fixture
def layer():
    layer = nn.Linear(64, 24, bias=False, dtype=torch.bfloat16)
    return layer.requires_grad_(False)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(linear, "SHAPES", SMALL)


@pytest.mark.parametrize(
    "name", [name for name in contenders.CONTENDERS if name in ("bfloat16", "float32", "torch int8pack")]
)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_contenders_of_torch_are_right(name, rows, layer):
    made = contenders.make(name, layer)
    assert contenders.check(name, made, layer, torch.randn(rows, 64).bfloat16()) < 0.005


@pytest.mark.parametrize("name", contenders.OURS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_ours_are_right_and_small(name, rows, layer):
    made = contenders.make(name, layer)
    assert contenders.check(name, made, layer, torch.randn(rows, 64).bfloat16()) < 0.005
    assert made.bytes == 24 * 64 + 24 * 4


def test_a_wrong_result_is_not_timed(layer):
    made = contenders.make("rf8", layer)
    x = torch.randn(3, 64).bfloat16()
    for wrong in (lambda x: made.layer(x) * 1.02, lambda x: made.layer(x) * torch.nan):
        with pytest.raises(contenders.WrongResult, match=r"rf8 is wrong for x \[3, 64\]: relative error"):
            contenders.check("rf8", contenders.Made(wrong, made.weight, 1), layer, x)

    def one_number(x):
        y = made.layer(x)
        y[2, 17] += 0.1 * y.float().square().mean().sqrt()
        return y

    layer = nn.Linear(64, 2048, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    made = contenders.make("rf8", layer)
    contenders.check("rf8", made, layer, x)
    with pytest.raises(contenders.WrongResult, match=r"of one number 0\.\d+, at most 0.05"):
        contenders.check("rf8", contenders.Made(one_number, made.weight, 1), layer, x)


@pytest.mark.parametrize("name", contenders.OURS)
def test_ours_are_also_held_to_the_full_weight(name, layer):
    made = contenders.make(name, layer)
    other = contenders.Made(lambda x: 1.1 * made.layer(x), 1.1 * made.weight, 1)  # right about a wrong weight
    with pytest.raises(contenders.WrongResult, match=f"{name} is wrong"):
        contenders.check(name, other, layer, torch.randn(3, 64).bfloat16())


def test_a_kernel_is_not_held_to_another_kernel(layer, monkeypatch):
    real = contenders.ops.dequantize
    monkeypatch.setattr(contenders.ops, "dequantize", lambda *arguments: 2 * real(*arguments))
    made = contenders.make("rf8", layer)
    assert contenders.check("rf8", made, layer, torch.randn(3, 64).bfloat16()) < 0.005


def test_a_peer_that_is_wrong_is_listed_and_ours_end_the_run(layer, monkeypatch):
    wrong = lambda layer: contenders.Made(lambda x: 2 * x @ layer.weight.T, None, 1)  # noqa: E731
    monkeypatch.setitem(contenders.CONTENDERS, "peer", wrong)
    rows = list(linear.measure(["small"], [1], ["peer", "rf8"], CPU, 3, 1.0, 1e9, lambda text: None))
    reasons = {row["contender"]: row.get("reason") for row in rows}
    assert "peer is wrong for x [1, 64]" in reasons["peer"] and reasons["rf8"] is None
    monkeypatch.setitem(contenders.CONTENDERS, "rf8", wrong)
    with pytest.raises(contenders.WrongResult, match="rf8 is wrong"):
        list(linear.measure(["small"], [1], ["rf8"], CPU, 3, 1.0, 1e9, lambda text: None))


@pytest.mark.parametrize(
    ("name", "module", "size"),
    [
        ("bitsandbytes int8", "bitsandbytes", 24 * 64 + 24 * 4),
        ("bitsandbytes nf4", "bitsandbytes", None),
        ("torchao int8", "torchao", None),
        ("torchao float8", "torchao", 24 * 64 + 24 * 4),
        ("quanto qint8", "optimum.quanto", 24 * 64 + 24 * 2),
        ("HQQ 8", "hqq", 24 * 64 + 2 * 24 * 2),
    ],
)
def test_bytes_of_peers_count_their_scales(name, module, size, layer):
    pytest.importorskip(module)
    try:
        made = contenders.make(name, layer)
    except contenders.CannotRun as error:
        pytest.skip(str(error))
    if size is None:  # more than codes: scales a row with zero points, a byte a block of 64 with tables
        codes = 24 * 64 // (2 if name.endswith("nf4") else 1)
        assert codes + 24 < made.bytes < 2 * codes + 2048
    else:
        assert made.bytes == size
    assert contenders.check(name, made, layer, torch.randn(3, 64).bfloat16()) < 0.15


def test_what_cannot_run_is_listed_with_its_reason(monkeypatch):
    def breaks(layer):
        raise ImportError("No module named 'nothing'")

    def refuses(layer):
        def run(x):
            raise NotImplementedError("no such product")

        return contenders.Made(run, None, 1)

    for name, make in (("breaks", breaks), ("refuses", refuses)):
        monkeypatch.setitem(contenders.CONTENDERS, name, make)
    names = ["rf8", "breaks", "refuses", "gemlite"]
    rows = list(linear.measure(["small"], [1, 5], names, CPU, 3, 1.0, 1e9, lambda text: None))
    found = {(row["rows"], row["contender"]): row for row in rows}
    assert len(rows) == len(found) == 2 * 5  # bfloat16 is always there
    for count in (1, 5):
        assert found[count, "breaks"]["reason"] == "ImportError: No module named 'nothing'"
        assert found[count, "refuses"]["reason"] == "NotImplementedError: no such product"
        assert "gemlite" in found[count, "gemlite"]["reason"]
        timed = found[count, "rf8"]
        assert timed["ms"] > 0 and timed["ratio_to_bfloat16"] > 0 and timed["turns"] == 3 and timed["error"] < 0.006
        moved = 24 * 64 + 24 * 4 + 2 * count * (64 + 24)
        assert timed["gb_s"] == pytest.approx(moved / timed["ms"] / 1e6, rel=0.05, abs=0.01)
        assert timed["roofline_share"] == pytest.approx(timed["gb_s"], abs=0.02)  # of a rate of 1 GB/s


def test_a_contender_that_takes_too_long_is_listed():
    rows = list(linear.measure(["small"], [1], ["rf8"], CPU, 3, 1e-12, 1e9, lambda text: None))
    assert all("over the 1e-12 s given" in row["reason"] for row in rows)


def test_turns_and_ratios():
    calls = []
    seconds = timing.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4 and [len(times) for times in seconds.values()] == [3, 3]
    assert timing.median_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == 2.0


def test_what_comes_before_a_turn_and_when_turns_end(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        calls.append(name)
        clock[0] += seconds

    def before(name):
        work(f"before {name}", 100.0)  # is not timed

    functions = {"a": lambda: work("a", 1.0), "b": lambda: work("b", 3.0)}
    seconds = timing.in_turns(functions, 6, warmup=0, before=before, most_seconds=4.0)
    assert seconds == {"a": [1.0] * 5, "b": [3.0] * 3}  # the sum is over 4 after five turns; three are the least
    assert calls[:4] == ["before a", "a", "before b", "b"] and len(calls) == 16


def test_every_turn_finds_its_weight_out_of_the_caches(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "evictor", lambda device: lambda: calls.append("evict"))

    def make(layer):
        own = len([name for name in calls if name == "made"])
        calls.append("made")
        return contenders.Made(lambda x: calls.append(own) or x @ layer.weight.T, layer.weight.float(), 1)

    monkeypatch.setattr(contenders, "CONTENDERS", {"bfloat16": make})
    list(linear.measure(["small"], [1], [], CPU, 3, 60.0, 1e9, lambda text: None))
    # made twice, checked, tried, then three turns: the other layer, and the timed one
    assert calls == ["made", "made", 0, 0, *["evict", 1, 0] * 3]


def test_the_command_writes_csv_plot_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(timing, "peak_rate", lambda device, dtype: 1e11)
    pytest.importorskip("matplotlib")
    arguments = ["bench", "linear", "--shapes", "small", "--rows", "1", "--contenders", "rf8", "gemlite"]
    files = ["--csv", str(tmp_path / "out" / "layers.csv"), "--plot", str(tmp_path / "roofline.png")]
    assert main([*arguments, *files, "--seconds", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in result["linear"]] == ["bfloat16", "rf8", "gemlite"]
    assert result["machine"]["torch"] == torch.__version__ and result["copy_gb_s"] == 1.0
    with open(tmp_path / "out" / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == ["bfloat16", "rf8", "gemlite"]
    assert rows[2]["ms"] == "" and "GPU" in rows[2]["reason"] and rows[0]["cpu"]
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"hf-gg\[plots\]"):
        plot.draw([], 1.0, 1.0, tmp_path / "x.png", "")


def test_wrong_arguments(capsys):
    assert main(["bench", "layers"]) == 1
    assert "PART must be of linear, model, load, got 'layers'" in capsys.readouterr().err
    assert main(["bench", "linear", "--rows", "0"]) == 2
    if not torch.cuda.is_available():
        assert main(["bench", "linear", "--device", "cuda"]) == 1
        assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["linear", "--seconds", "-1"], 2, "-1 is not a positive number of seconds"),
        (["linear", "--seconds", "nan"], 2, "nan is not a positive number"),
        (["linear", "--threads", "0"], 2, "0 is not a positive number"),
        (["linear", "--shapes", "5x5"], 2, "invalid choice: '5x5'"),
        (["linear", "--contenders", "nobody"], 2, "invalid choice: 'nobody'"),
        (["linear", "--device", "meta"], 1, "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["linear", "--device", "gpu"], 1, "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["linear", "--plot", "roofline.doc"], 1, "a plot must be .png, .svg, .pdf, got 'roofline.doc'"),
        (["linear", "--csv", "."], 1, "is a folder"),
        (["linear", "--csv", "/dev/null/layers.csv"], 1, "/dev/null"),
        (["linear", "--plot", "/dev/null/roofline.png"], 1, "/dev/null"),
        (["model", "--plot", "roofline.png"], 1, "--plot draws layers"),
        (["linear", "model", "--model", "./no-such-model"], 1, "no-such-model"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_measured(arguments, code, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(timing, "copy_rate", lambda device: pytest.fail("measured"))
    assert main(["bench", *arguments]) == code
    assert message in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_file(monkeypatch, tmp_path, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(timing, "peak_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(linear, "in_turns", interrupted)
    files = ["--csv", str(tmp_path / "layers.csv")]
    assert main(["bench", "linear", "--shapes", "small", "--rows", "1", "--contenders", "rf8", *files]) == 130
    assert capsys.readouterr().err == "hf-gg: interrupted\n" and not list(tmp_path.iterdir())


def test_a_plot_of_what_takes_for_ever(tmp_path):
    pytest.importorskip("matplotlib")
    slow = {"shape": "small", "out": 24, "in": 64, "rows": 1, "contender": "rf8"}
    (timed,) = [row for row in linear_rows_of_a_slow_layer() if row["contender"] == "rf8"]
    assert timed["gb_s"] > 0 and timed["gflop_s"] > 0
    plot.draw([{**slow, **timed}], 1e9, 1e11, tmp_path / "x.png", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def linear_rows_of_a_slow_layer() -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "in_turns", lambda functions, turns, *rest: dict.fromkeys(functions, [60.0] * turns))
        return list(linear.measure(["small"], [1], ["rf8"], CPU, 3, 1.0, 1e9, lambda text: None))


def test_a_load_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="the load 'plain' failed"):
        loading.measure(tmp_path, 1, ("plain",))
