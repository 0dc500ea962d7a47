"""The compiled CPU kernels against float64 arithmetic on values written out here, and against hf_gg.formats."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hf_gg.formats import get_format, scaling
from hf_gg.ops import cpu
from hf_gg.ops.cpu import build, runtime


# name: exponent bits, residual bits, bias, sixteenths by residual (None: reserved)
LAYOUTS = {
    "rf8": (4, 3, 15, (16, 17, 18, 20, 24, 28, 30, None)),
    "rf8x": (4, 3, 15, (16, 17, 18, 20, 22, 24, 28, 30)),
    "rf8-e5": (5, 2, 31, (24, 20, 18, 17)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative error of one rounding to nearest.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUMMATION = 1e-6
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

formats = pytest.mark.parametrize("name", LAYOUTS)
# the kernels round to floats only
formats_and_grid = pytest.mark.parametrize("name", [*LAYOUTS, "grid"])


@pytest.fixture
def isa(request):
    """An instruction set; the test is skipped where the processor or the compiler lacks it."""
    if not cpu.available():
        pytest.skip(f"no kernels: {cpu.why_not()}")
    if request.param not in cpu.isas():
        pytest.skip(f"this processor lacks {request.param}")
    return request.param


every_isa = pytest.mark.parametrize("isa", cpu.ISAS, indirect=True)


@pytest.fixture(autouse=True)
def uninitialized_is_nan():
    """Every torch.empty holds NaN (or the largest integer), so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def values(name: str) -> torch.Tensor:
    """The 256 values, float64."""
    if name == "grid":
        levels = list(map(float, range(128)))
        return torch.tensor(levels + [0.0] + [-v for v in levels[1:]], dtype=torch.float64)
    exponent_bits, _, bias, sixteenths = LAYOUTS[name]
    positive = [
        math.nan if m is None else 2.0 ** (e - bias) * m / 16 for e in range(1 << exponent_bits) for m in sixteenths
    ]
    positive[0] = 0.0
    return torch.tensor(positive + [0.0] + [-v for v in positive[1:]], dtype=torch.float64)


def random_codes(name: str, *shape: int) -> torch.Tensor:
    usable = torch.nonzero(~values(name).isnan())[:, 0].to(torch.uint8)
    return usable[torch.randint(len(usable), shape)]


def check_linear(name, x, codes, scale, bias, isa, format=None):
    weight = values(name)[codes.long()] * scale.double()
    expected = x.double() @ weight.T + (0.0 if bias is None else bias.double())
    size = x.double().abs() @ weight.abs().T + (0.0 if bias is None else bias.double().abs())
    y = cpu.linear(x, codes, scale, bias, format or name, isa=isa)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    tolerance = SUMMATION * size + 1.01 * ROUNDING[x.dtype] * expected.abs()
    if x[..., 0].numel() > 16 and x.dtype == torch.bfloat16:
        tolerance += ROUNDING[x.dtype] * size  # the decoded weight is rounded too
    error = (y.double() - expected).abs()
    assert (error <= tolerance).all(), f"{tuple(x.shape)} {x.dtype}: {(error / tolerance).max():.3g} of the tolerance"


# --- linear ---


@formats_and_grid
@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_1_to_16_rows_and_more(name, isa, dtype):
    for n, k in ((37, 63), (8, 64), (5, 1000), (1, 1), (3, 33)):
        codes, scale = random_codes(name, n, k), torch.rand(n, 1) + 0.5
        for m in (*range(1, 17), 17, 40):
            bias = (None, torch.randn(n), torch.randn(n).to(dtype))[m % 3]
            check_linear(name, torch.randn(m, k).to(dtype), codes, scale, bias, isa)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_wide_layer(isa, dtype):
    codes, scale = random_codes("rf8", 130, 11008), torch.rand(130, 1)
    for m in (1, 2, 11):
        check_linear("rf8", torch.randn(m, 11008).to(dtype), codes, scale, torch.randn(130), isa)


@every_isa
def test_linear_of_many_rows_decodes_in_blocks(isa, monkeypatch):
    monkeypatch.setattr("hf_gg.ops.cpu.decode.BLOCK_BYTES", 1)
    codes, scale = random_codes("rf8x", 150, 40), torch.rand(150, 1)
    for dtype in DTYPES:
        check_linear("rf8x", torch.randn(20, 40).to(dtype), codes, scale, torch.randn(150, dtype=torch.float64), isa)


@every_isa
def test_linear_of_views(isa):
    name, k, n = "rf8", 70, 12
    codes, scale = random_codes(name, n, k), torch.rand(n, 1)
    bias = torch.randn(2 * n)[::2]
    x = torch.randn(3, k)
    expected = cpu.linear(x, codes, scale, bias, name, isa=isa)
    wide = torch.full((3, 2 * k), math.nan)
    wide[:, :k] = x
    spread = torch.full((3, 2 * k), math.nan)
    spread[:, ::2] = x
    for view in (wide[:, :k], spread[:, ::2], x.t().contiguous().t(), x.clone().requires_grad_()):
        assert torch.equal(cpu.linear(view, codes, scale, bias, name, isa=isa), expected)
    assert torch.equal(cpu.linear(x, codes.t().contiguous().t(), scale, bias, name, isa=isa), expected)
    padded = torch.full((n, 80), 0x7F, dtype=torch.uint8)
    padded[:, 5:75] = codes
    assert torch.equal(cpu.linear(x, padded[:, 5:75], scale, bias, name, isa=isa), expected)
    assert torch.equal(cpu.linear(x.view(1, 3, 1, k), codes, scale, bias, name, isa=isa), expected.view(1, 3, 1, n))
    # the order of a sum depends on how many rows there are
    alone = cpu.linear(x[:1], codes, scale, bias, name, isa=isa)
    assert torch.equal(cpu.linear(x[0], codes, scale, bias, name, isa=isa)[None], alone)
    assert torch.equal(cpu.linear(x, codes, scale.double(), bias, get_format(name), isa=isa), expected)
    spread_scale = torch.full((n, 3), math.nan)
    spread_scale[:, 1:2] = scale
    assert torch.equal(cpu.linear(x, codes, spread_scale[:, 1:2], bias, name, isa=isa), expected)


@formats_and_grid
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_few_rows_and_of_many(name, dtype):
    if not cpu.available():
        pytest.skip(f"no kernels: {cpu.why_not()}")
    for n, k, ends in ((37, 63, [0, 2, 2, 5]), (130, 64, [16, 17, 30, 30]), (5, 40, [1, 40, 41, 42]), (4, 8, [0] * 4)):
        codes, scale, x = (
            random_codes(name, 4, n, k),
            torch.rand(4, n, 1) + 0.5,
            torch.randn(ends[-1] + 2, k).to(dtype),
        )
        found = cpu.grouped_linear(x, codes, scale, ends, name)
        assert found.dtype == dtype and not found[ends[-1] :].any()
        start = 0
        for group, end in enumerate(ends):
            if end > start:
                alone = cpu.linear(x[start:end], codes[group], scale[group], None, name)
                assert torch.equal(found[start:end], alone)
                check_linear(name, x[start:end], codes[group], scale[group], None, None)
            start = max(start, end)
        one = cpu.grouped_linear(x, codes, scale[:, :1].contiguous(), ends, name)
        assert torch.equal(one, cpu.grouped_linear(x, codes, scale[:, :1].expand(-1, n, -1).contiguous(), ends, name))


@every_isa
def test_one_scale_a_matrix(isa):
    codes, x = random_codes("rf8", 9, 20), torch.randn(2, 20)
    one = torch.tensor([[0.3]])
    expected = cpu.linear(x, codes, torch.full((9, 1), 0.3), None, "rf8", isa=isa)
    assert torch.equal(cpu.linear(x, codes, one, None, "rf8", isa=isa), expected)
    assert torch.equal(cpu.linear(x, codes, one.expand(9, 1), None, "rf8", isa=isa), expected)


@every_isa
def test_linear_of_nothing(isa):
    scale, bias = torch.ones(4, 1), torch.arange(4.0)
    none = torch.zeros(4, 0, dtype=torch.uint8)
    assert torch.equal(cpu.linear(torch.zeros(2, 0), none, scale, bias, isa=isa), bias.expand(2, 4))
    assert torch.equal(cpu.linear(torch.zeros(20, 0), none, scale, None, isa=isa), torch.zeros(20, 4))
    codes = torch.zeros(4, 6, dtype=torch.uint8)
    assert cpu.linear(torch.zeros(0, 6), codes, scale, bias, isa=isa).shape == (0, 4)
    assert cpu.linear(torch.zeros(2, 0, 6), codes, scale, bias, isa=isa).shape == (2, 0, 4)
    assert cpu.linear(torch.zeros(2, 6), codes[:0], scale[:0], bias[:0], isa=isa).shape == (2, 0)
    assert cpu.linear(torch.zeros(20, 6), codes[:0], scale[:0], bias[:0], isa=isa).shape == (20, 0)


@every_isa
def test_reserved_codes_and_infinities_give_nan_where_they_belong(isa):
    codes, scale = random_codes("rf8", 6, 100), torch.ones(6, 1)
    codes[2, 99], codes[4, 3] = 0x87, 0x3F
    codes[:, 50] = 0
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 100).to(dtype)
        x[1, 50] = math.inf  # times zero
        bad = cpu.linear(x, codes, scale, None, "rf8", isa=isa).isnan()
        expected = torch.zeros(3, 6, dtype=torch.bool)
        expected[1], expected[:, 2], expected[:, 4] = True, True, True
        assert torch.equal(bad, expected)


@every_isa
def test_threads_do_not_change_a_result(isa):
    name, before = "rf8", torch.get_num_threads()
    codes, scale, x = random_codes(name, 259, 600), torch.rand(259, 1), torch.randn(7, 600)
    weight = torch.randn(259, 600)
    try:
        torch.set_num_threads(1)
        alone = (
            cpu.linear(x, codes, scale, isa=isa),
            cpu.dequantize(codes, scale, isa=isa),
            *cpu.quantize(weight, isa=isa),
        )
        torch.set_num_threads(4)
        together = []

        def work():
            for _ in range(5):
                y, decoded = cpu.linear(x, codes, scale, isa=isa), cpu.dequantize(codes, scale, isa=isa)
                together.append((y, decoded, *cpu.quantize(weight, isa=isa)))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(together) == 15
    assert all(torch.equal(a, b) for result in together for a, b in zip(result, alone, strict=True))


def test_a_fork_of_a_process_that_used_threads():
    if not cpu.available():
        pytest.skip(f"no kernels: {cpu.why_not()}")
    program = """
import os, signal, torch
from hf_gg.ops import cpu
torch.set_num_threads(2)
x, codes, scale = torch.randn(1, 1024), torch.randint(0, 7, (1024, 1024), dtype=torch.uint8), torch.ones(1024, 1)
y = cpu.linear(x, codes, scale)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(cpu.linear(x, codes, scale), y) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=100, text=True)
    assert done.stdout == "0\n", done.stderr


# --- dequantize ---


def check_dequantize(name, codes, scale, dtype, isa):
    expected = (values(name).float()[codes.long()] * scale).to(dtype)
    got = cpu.dequantize(codes, scale, name, dtype, isa=isa)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    ok = ~expected.isnan()
    assert torch.equal(got[ok].view(BITS[dtype]), expected[ok].view(BITS[dtype]))  # signs of zero too


@formats_and_grid
@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_exact(name, isa, dtype):
    every = torch.arange(256, dtype=torch.uint8)
    # from subnormal results to infinite ones
    scale = torch.tensor([1.0, 0.3, -2.7, 1e-3, 1e-7, 3e-39, 1.4e-45, 3e5, 1e38, 3.4e38, 0.0]).view(-1, 1)
    check_dequantize(name, every.repeat(11, 3), scale, dtype, isa)
    check_dequantize(name, every.repeat(11, 1)[:, :64], scale, dtype, isa)
    for rows, columns in ((3, 63), (2, 1000), (1, 1), (5, 515), (2, 11008)):
        check_dequantize(name, random_codes(name, rows, columns), torch.rand(rows, 1), dtype, isa)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_with_any_scale(isa, dtype):
    for columns in (40, 600):
        codes = random_codes("rf8", 2, 3, 5, columns)
        for shape in ((2, 3, 5, 1), (2, 3, 1, columns), (2, 3, 1, 1), (5, 1), (columns,), (3, 1, 1), (2, 1, 5, 1), ()):
            check_dequantize("rf8", codes, torch.rand(shape), dtype, isa)
        check_dequantize("rf8", codes, torch.rand(2, 3, 5, columns), dtype, isa)
        check_dequantize("rf8", codes.transpose(2, 3), torch.rand(2, 3, columns, 1), dtype, isa)
        check_dequantize("rf8", codes[1, 2, 1:4, 3:33], torch.rand(3, 1), dtype, isa)
        check_dequantize("rf8", codes[0, 0], torch.rand(5, 7)[:, 3:4], dtype, isa)
    assert cpu.dequantize(codes[:0], torch.ones(0, 3, 5, 1), isa=isa).shape == (0, 3, 5, 600)


# --- quantize ---


def weights(dtype: torch.dtype, columns: int) -> torch.Tensor:
    """Rows that are heavy-tailed, tiny, huge, subnormal, zero, constant, and with one weight."""
    rows = [torch.randn(columns) * torch.randn(columns).exp() * 0.02 for _ in range(12)]
    rows += [torch.randn(columns), torch.rand(columns) - 0.5, torch.zeros(columns), torch.zeros(columns).neg()]
    rows += [torch.full((columns,), 0.37), torch.randint(-3, 4, (columns,)).float()]
    rows += [torch.randn(columns) ** 9, (torch.randn(columns) * 12).exp2()]
    one = torch.zeros(columns)
    one[columns // 2] = -0.77
    rows += [one]
    limits = torch.finfo(dtype)
    for size in (limits.max, limits.max / 3, limits.tiny * 40, limits.tiny, limits.tiny / 5, limits.smallest_normal):
        row = torch.randn(columns).double()
        rows += [(row / row.abs().max() * size).float()]
    smallest = limits.tiny * limits.eps  # the smallest subnormal
    rows += [torch.randint(-4, 5, (columns,)).double().mul(smallest).float()]
    return torch.stack(rows).clamp(-limits.max, limits.max).to(dtype)


def same(got, expected):
    assert torch.equal(got[1], expected[1]), "scales differ"
    assert got[0].shape == expected[0].shape
    assert torch.equal(got[0], expected[0]), f"{int((got[0] != expected[0]).sum())} codes differ"


@formats
@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_the_one_of_the_formats(name, isa, dtype):
    for columns in (1, 63, 1000):
        weight = weights(dtype, columns)
        for scale in cpu.QUANTIZE_SCALES:
            expected = get_format(name).quantize(weight, scale=scale)
            same(cpu.quantize(weight, name, scale, isa=isa), expected)
            same(cpu.quantize(weight, name, expected[1], isa=isa), expected)


@every_isa
def test_quantize_of_views_and_stacks(isa):
    fmt, weight = get_format("rf8"), torch.randn(3, 10, 100)
    for view in (weight, weight[1], weight[:, 2:5], weight.transpose(1, 2), weight[0, :, 7:60], weight[..., ::3]):
        for scale in ("row", "tensor", "absmax"):
            same(cpu.quantize(view, "rf8", scale, isa=isa), fmt.quantize(view, scale))
    for shape in ((0, 5), (5, 0), (2, 0, 3), (0, 4, 4)):
        for scale in cpu.QUANTIZE_SCALES:
            same(cpu.quantize(torch.zeros(shape), "rf8", scale, isa=isa), fmt.quantize(torch.zeros(shape), scale))
    same(cpu.quantize(torch.nn.Parameter(weight), "rf8", isa=isa), fmt.quantize(weight))


@every_isa
def test_quantize_of_wide_rows(isa):
    weight = (torch.randn(20, 11008) * torch.randn(20, 11008).exp()).bfloat16()
    same(cpu.quantize(weight, "rf8", isa=isa), get_format("rf8").quantize(weight))


@every_isa
@pytest.mark.parametrize("scale", cpu.QUANTIZE_SCALES)
def test_quantize_of_columns_that_are_split_over_processes(isa, scale):
    weight = torch.randn(2, 6, 90)
    rows = 1 if scale.startswith("tensor") or scale == "unit" else 6
    steps = len(scaling.search_factors(get_format("rf8")))
    other = {"max": torch.rand(2, rows, 1) * 6, "sum": torch.rand(2, rows, 1, steps)}

    def reduce(x, operation):
        return torch.maximum(x, other["max"]) if operation == "max" else x + other["sum"]

    expected = get_format("rf8").quantize(weight, scale=scale, reduce=reduce)
    same(cpu.quantize(weight, "rf8", scale, reduce=reduce, isa=isa), expected)
    weight[1, 2, 3] = math.nan
    calls = []
    with pytest.raises(ValueError, match="NaN or infinity"):
        cpu.quantize(weight, "rf8", scale, reduce=lambda x, _: calls.append(x) or x, isa=isa)
    assert len(calls) == 1  # no process is left waiting in the first reduction


@formats
@every_isa
def test_nearest_code_at_and_beside_every_midpoint(name, isa):
    table = values(name)[:128].nan_to_num(nan=0.0).unique()  # sorted
    midpoints = (table[1:] + table[:-1]) / 2
    points = torch.cat([table, midpoints]).float()
    assert torch.equal(points.double(), torch.cat([table, midpoints]))
    bits = points.view(torch.int32)
    x = torch.cat([bits - 1, bits, bits + 1]).clamp(min=0).view(torch.float32)
    x = torch.cat([x, torch.tensor([1e-45, 1e-38, 2.0, 1e5, 3.4e38])])
    # the first that is nearest is the smaller one
    nearest = table[(x.double().clamp(max=2.0)[:, None] - table).abs().argmin(1)]
    one = torch.ones(1, 1)
    codes, _ = cpu.quantize(torch.stack([x, -x]), name, one, isa=isa)
    assert torch.equal(values(name)[codes.long()], torch.stack([nearest, -nearest]))
    assert not (codes == 0x80).any()
    assert torch.equal(codes, get_format(name).encode(torch.stack([x, -x])))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_in_a_weight_are_errors(isa, dtype):
    for bad in (math.nan, math.inf, -math.inf, -math.nan):
        for row, column in ((0, 0), (2, 64), (4, 66)):
            weight = torch.randn(2, 5, 67).to(dtype)
            weight[1, row, column] = bad
            for scale in (*cpu.QUANTIZE_SCALES, torch.ones(2, 5, 1)):
                with pytest.raises(ValueError, match=rf"NaN or infinity \(first in row {row}\)"):
                    cpu.quantize(weight, "rf8", scale, isa=isa)


# --- bad arguments ---


def test_arguments_that_do_not_fit():
    x, codes, scale = torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1)
    for arguments, error, message in (
        ((x.double(), codes, scale), TypeError, "x must be float32 or"),
        ((x.int(), codes, scale), TypeError, "x must be"),
        ((x, codes.int(), scale), TypeError, "codes must be uint8"),
        ((x, codes, scale.int()), TypeError, "scale must be floating"),
        ((x[:, :7], codes, scale), ValueError, r"codes \[out, in\], got \[2, 7\] and \[4, 8\]"),
        ((x, codes[None], scale), ValueError, r"codes \[out, in\]"),
        ((torch.tensor(1.0), codes, scale), ValueError, "linear needs x"),
        ((x, codes, scale[:3]), ValueError, r"scale must have shape \[4, 1\]"),
        ((x, codes, scale[:, 0]), ValueError, "scale must have shape"),
        ((x, codes, scale, torch.zeros(5)), ValueError, r"bias must have shape \[4\]"),
        ((x, codes, scale, torch.zeros(4, dtype=torch.int64)), TypeError, "bias must be floating"),
        ((x.to("meta"), codes, scale), ValueError, "x must be on the CPU"),
        ((x, codes.to("meta"), scale), ValueError, "codes must be on the CPU"),
        ((x, codes, scale.to("meta")), ValueError, "scale must be on the CPU"),
        ((x, codes, scale, None, "rf9"), ValueError, "rf9"),
    ):
        with pytest.raises(error, match=message):
            cpu.linear(*arguments)
    stack, stack_scale = codes[None].repeat(2, 1, 1), scale[None].repeat(2, 1, 1)
    for arguments, error, message in (
        ((x.double(), stack, stack_scale, [1, 2]), TypeError, "x must be float32 or"),
        ((x, stack.int(), stack_scale, [1, 2]), TypeError, "codes must be uint8"),
        ((x, stack, stack_scale.double(), [1, 2]), TypeError, "scale must be float32"),
        ((x[:, :7], stack, stack_scale, [1, 2]), ValueError, "grouped_linear needs x"),
        ((x, stack, stack_scale, [1]), ValueError, "and 1 ends"),
        ((x, stack, stack_scale[:, :3], [1, 2]), ValueError, r"scale must have shape \[2, 4, 1\]"),
        ((x, stack, stack_scale, [1, 3]), ValueError, "ends must lie in 0 to 2"),
    ):
        with pytest.raises(error, match=message):
            cpu.grouped_linear(*arguments)
    for arguments, error, message in (
        ((codes, scale[:3]), ValueError, "broadcasts"),
        ((codes, torch.ones(2, 4, 1)), ValueError, "broadcasts"),
        ((codes[0], scale), ValueError, "broadcasts"),
        ((codes, scale, "rf8", torch.float64), TypeError, "dtype must be"),
        ((x, scale), TypeError, "codes must be uint8"),
    ):
        with pytest.raises(error, match=message):
            cpu.dequantize(*arguments)
    for arguments, error, message in (
        ((x.double(),), TypeError, "weight must be"),
        ((x[0],), ValueError, "matrix"),
        ((x, "rf8", "column"), ValueError, "Unknown scale 'column'"),
        ((x, "rf8", torch.ones(3, 1)), ValueError, "must have shape"),
        ((x, "rf8", torch.zeros(2, 1)), ValueError, "positive"),
        ((x, "rf8", torch.full((2, 1), math.inf)), ValueError, "positive"),
        ((x, "rf8", torch.ones(2, 1).double()), TypeError, "scale_mode must be float32"),
    ):
        with pytest.raises(error, match=message):
            cpu.quantize(*arguments)


def test_unknown_instruction_set(monkeypatch):
    with pytest.raises(ValueError, match="'sse2' is not supported here: use one of portable"):
        cpu.quantize(torch.ones(1, 1), isa="sse2")
    runtime.isa_code.cache_clear()
    monkeypatch.setenv("HF_GG_CPU_ISA", "portable")
    try:
        assert runtime.isa_code(None) == 0
    finally:
        runtime.isa_code.cache_clear()


# --- build ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a quick compilation."""
    monkeypatch.setenv("HF_GG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS))
    build.find_compiler()
    return tmp_path / "cache" / "cpu"


@pytest.fixture
def switched(monkeypatch):
    """Makes the next call load the kernels anew."""

    def clear():
        runtime._LAZY.forget()

    clear()
    yield
    monkeypatch.undo()
    clear()


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_two_processes_build_at_once(cache):
    program = f"from hf_gg.ops.cpu import build\nbuild.FLAGS = {build.FLAGS!r}\nprint(build.load().hf_gg_rf8_isa())\n"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].decode().strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    (library,) = cache.iterdir()  # no remains
    assert library.name == build.library_name(build.find_compiler())
    assert cache.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o077 == 0
    before = library.stat().st_mtime_ns

    build.load()
    assert library.stat().st_mtime_ns == before, "the cached library was not used"

    library.chmod(0o666)
    with pytest.raises(build.BuildError, match="can be written by others: remove it"):
        build.load()
    assert library.stat().st_mtime_ns == before

    library.unlink()
    library.write_bytes(b"\x7fELF, cut short")
    library.chmod(0o600)
    assert build.load().hf_gg_rf8_isa() == int(outputs[0])


def test_a_library_behind_a_link_is_refused(cache, tmp_path):
    cache.mkdir(parents=True, mode=0o700)
    (cache / build.library_name(build.find_compiler())).symlink_to(tmp_path / "elsewhere.so")
    (tmp_path / "elsewhere.so").write_bytes(b"")
    with pytest.raises(build.BuildError, match="remove it"):
        build.load()


def test_compiler_without_openmp(cache, tmp_path, monkeypatch):
    real = build.find_compiler()[0]
    fake = script(
        tmp_path / "old cc",
        f'#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; esac\nexec {real} "$@"\n',
    )
    monkeypatch.setenv("CC", f"'{fake}' -g0")
    assert build.load().hf_gg_rf8_isa() == len(cpu.isas()) - 1


def test_no_compiler(cache, switched, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not cpu.available()
    assert cpu.why_not() == "no C compiler on the path, looked for cc, gcc and clang"
    with pytest.raises(RuntimeError, match=r"the CPU kernels are not available: no C compiler on the path.*\.$"):
        cpu.linear(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1))


def test_broken_compiler(cache, switched, monkeypatch, tmp_path):
    text = '#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\necho no space left >&2\nexit 1\n'
    monkeypatch.setenv("CC", script(tmp_path / "cc", text))
    assert not cpu.available()
    assert cpu.why_not().endswith("cannot compile the kernels: no space left")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("command", ["cc 'unbalanced", "no-such-compiler", '""'])
def test_a_compiler_that_is_no_command(cache, switched, monkeypatch, command):
    monkeypatch.setenv("CC", command)
    assert not cpu.available()
    assert command in cpu.why_not()


def test_turned_off(switched, monkeypatch):
    monkeypatch.setenv("HF_GG_CPU_KERNELS", "0")
    assert not cpu.available()
    assert cpu.why_not() == "turned off by HF_GG_CPU_KERNELS"


def test_cache_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_GG_CACHE", str(tmp_path / "file"))
    directory = build.cache_directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert directory.stat().st_uid == os.getuid()
    shared = tmp_path / "shared" / "cpu"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("HF_GG_CACHE", str(tmp_path / "shared"))
    assert build.cache_directory() != shared
    monkeypatch.delenv("HF_GG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_directory() == tmp_path / "xdg" / "hf_gg" / "cpu"
