"""The grid against arithmetic written out here in exact fractions and in float64 numpy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gg.formats import FORMATS, Grid, StepRule, get_format
from hf_gg.formats import steps as module
from hf_gg.formats.steps import bits_a_weight, entropy, kept_steps, steps_for_bits, steps_for_snr


GRID = get_format("grid")


def exact_level(x: float) -> int:
    """The nearest whole number in exact arithmetic, a tie to the smaller magnitude, at most 127."""
    magnitude = abs(Fraction(x))
    level = math.ceil(magnitude - Fraction(1, 2))
    return min(max(level, 0), 127) * (-1 if x < 0 else 1)


def code_of(level: int) -> int:
    return abs(level) | (0x80 if level < 0 else 0)


def decoded(codes, steps, outliers=None):
    """The weight in float64, by numpy."""
    codes = codes.numpy()
    levels = (codes & 127).astype(np.float64) * np.where(codes >= 128, -1, 1)
    weight = levels * steps.double().numpy()
    if outliers is not None:
        weight.reshape(-1)[outliers[0].numpy()] = outliers[1].double().numpy()
    return torch.from_numpy(weight)


def order_0(codes) -> float:
    counts = np.unique(codes.numpy(), return_counts=True)[1]
    return float(scipy.stats.entropy(counts, base=2))


def test_a_format_like_the_others():
    assert FORMATS["grid"] is GRID and isinstance(GRID, Grid)
    assert (GRID.bits, GRID.max, GRID.smallest, GRID.reserved) == (8, 127.0, 1.0, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_is_exact_in_every_dtype(dtype):
    values = GRID.decode(torch.arange(256, dtype=torch.uint8), dtype)
    expected = [float(c & 127) * (-1 if c & 128 else 1) for c in range(256)]
    assert values.dtype == dtype
    assert values.double().tolist() == expected
    assert math.copysign(1, values[128].item()) == 1
    codes = torch.tensor([c for c in range(256) if c != 128], dtype=torch.uint8)
    assert torch.equal(GRID.encode(GRID.decode(codes)), codes)


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_encode_any_float(x):
    assert GRID.encode(torch.tensor([x], dtype=torch.float32)).item() == code_of(exact_level(x))


def test_encode_around_every_midpoint():
    middle = np.arange(128, dtype=np.float32) + np.float32(0.5)
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))
    numbers = np.concatenate([middle, below, above, [0.0, -0.0, 127.0, 1e38, 1e-45]]).astype(np.float32)
    numbers = np.concatenate([numbers, -numbers])
    codes = GRID.encode(torch.from_numpy(numbers))
    assert codes.tolist() == [code_of(exact_level(float(x))) for x in numbers]
    assert 0x80 not in codes


def test_default_steps_by_row_and_by_tensor():
    weight = torch.randn(20, 300) * torch.logspace(-3, 1, 20).unsqueeze(1)
    rms = weight.double().square().mean(1, keepdim=True).sqrt()
    codes, steps = GRID.quantize(weight)
    assert codes.dtype == torch.uint8 and steps.dtype == torch.float32 and steps.shape == (20, 1)
    assert torch.allclose(steps.double(), rms / 8, rtol=1e-6)
    levels = torch.round(weight.double() / steps.double())
    assert torch.equal(decoded(codes, torch.ones(1)), levels)
    together = GRID.quantize(weight, "tensor")[1]
    assert together.shape == (20, 1) and len(together.unique()) == 1
    assert math.isclose(float(together[0]), float(rms.square().mean().sqrt()) / 8, rel_tol=1e-6)
    stacked = GRID.quantize(weight.view(4, 5, 300))
    assert torch.equal(stacked[0].view(20, 300), codes) and torch.equal(stacked[1].view(20, 1), steps)


def test_zero_rows_and_no_rows():
    weight = torch.randn(4, 8)
    weight[2] = 0
    codes, steps = GRID.quantize(weight)
    assert steps[2] == 1 and not codes[2].any()
    for rule in (StepRule(bits=5.0), StepRule(snr=30.0), StepRule("tensor")):
        codes, steps = GRID.quantize(torch.zeros(4, 8), rule)
        assert (steps == 1).all() and not codes.any()
    codes, steps = GRID.quantize(torch.empty(0, 8))
    assert codes.shape == (0, 8) and steps.shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outliers_are_exact(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(64, 256) * 0.02).to(dtype)
    for place, value in (((0, 0), 9.0), ((63, 255), -3.0), ((5, 7), 0.02 * 127.4), ((5, 8), -2.75)):
        weight[place] = value
    codes, steps = GRID.quantize(weight, StepRule(step=0.02))
    assert decoded(codes, steps)[0, 0] == float(torch.tensor(0.02)) * 127  # saturated
    index, values = GRID.take_outliers_(codes, steps, weight)
    beyond = weight.double().abs() / steps.double() > 127.5
    assert index.dtype == torch.int32 and values.dtype == torch.float32
    assert index.tolist() == torch.nonzero(beyond.reshape(-1)).squeeze(1).tolist()
    assert torch.equal(values.double(), weight.double()[beyond])
    assert not codes[beyond].any() and (codes[5, 7] & 127) == 127
    error = (decoded(codes, steps, (index, values)) - weight.double()).abs()
    assert not error[beyond].any()
    assert (error <= steps.double() / 2 * (1 + 1e-5)).all()


def test_a_tie_at_the_end_of_the_range_is_no_outlier():
    weight = torch.tensor([[127.5, -127.5, 127.50001, 1.0]])
    codes, steps = GRID.quantize(weight, torch.ones(1, 1))
    index, values = GRID.take_outliers_(codes, steps, weight)
    assert index.tolist() == [2] and values.tolist() == [weight[0, 2].item()]
    assert codes.tolist() == [[127, 255, 0, 1]]
    assert GRID.take_outliers_(codes, steps, weight[:, [0, 1, 3, 3]]) is None


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(64, 512), (600, 512), (3, 100, 512)])
@pytest.mark.parametrize("bits", [0.7, 2.0, 5.0, 6.5])
def test_steps_meet_the_bits(per, shape, bits):
    torch.manual_seed(1)
    weight = torch.randn(shape) * (torch.rand(shape[:-1]) * 2 + 0.1).unsqueeze(-1)
    steps = steps_for_bits(weight, bits, per)
    assert steps.shape == (*shape[:-1], 1)
    codes = GRID.quantize(weight, steps)[0]
    outliers = GRID.take_outliers_(codes, steps, weight)
    count = 0 if outliers is None else len(outliers[0])
    got = order_0(codes) + (32 * steps.numel() + 64 * count) / codes.numel()
    assert math.isclose(bits_a_weight(codes, steps.numel(), count), got, rel_tol=1e-9)
    assert abs(got - bits) < 0.01
    assert len(steps.unique()) == 1 or per == "row"


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(64, 512), (600, 512)])
@pytest.mark.parametrize("snr", [3.0, 20.0, 35.0])
def test_steps_meet_the_signal_to_noise(per, shape, snr):
    torch.manual_seed(1)
    weight = torch.distributions.StudentT(4.0).sample(shape) * (torch.rand(shape[0], 1) * 2 + 0.1)
    steps = steps_for_snr(weight, snr, per)
    codes = GRID.quantize(weight, steps)[0]
    outliers = GRID.take_outliers_(codes, steps, weight)
    noise = (decoded(codes, steps, outliers) - weight.double()).square().sum()
    assert abs(10 * math.log10(weight.double().square().sum() / noise) - snr) < 0.1


def test_a_target_counts_outliers():
    """A row of large weights costs less as outliers than it would cost all others as finer levels."""
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    weight.view(-1)[::5000] *= 300
    codes, steps = GRID.quantize(weight, StepRule("tensor", bits=4.0))
    outliers = GRID.take_outliers_(codes, steps, weight)
    count = len(outliers[0])
    assert count > 10
    assert abs(order_0(codes) + (32 * 256 + 64 * count) / codes.numel() - 4) < 0.01


def test_the_high_rate_figures():
    """At high rate a uniform grid has step²/12 of noise, and the entropy of the density less log2 of the step."""
    torch.manual_seed(0)
    weight = torch.randn(512, 2048)
    for part, snr, bits in ((8, 28.85, 5.047), (16, 34.87, 6.047)):
        step = torch.tensor(1.0 / part)
        codes, steps = GRID.quantize(weight, step)
        noise = (decoded(codes, steps) - weight.double()).square().mean()
        assert abs(10 * math.log10(1 / noise) - snr) < 0.05
        assert abs(entropy(codes) - bits) < 0.01


def test_quantizing_again_changes_nothing():
    torch.manual_seed(0)
    weight = torch.randn(40, 300) * 0.02
    weight[3] = 0
    weight[1, 5] = 7.0
    codes, steps = GRID.quantize(weight, StepRule(step=0.002))
    outliers = GRID.take_outliers_(codes, steps, weight)
    old = decoded(codes, steps, outliers).float()
    assert torch.equal(kept_steps(steps, old, old), steps)
    new = old + 0.0001
    new[0] *= 100  # a row of another size needs other steps, one of zeros needs one at all
    new[3] = torch.randn(300) * 0.02
    kept = kept_steps(steps, old, new)
    assert torch.equal(kept[[1, 2, *range(4, 40)]], steps[[1, 2, *range(4, 40)]])
    assert math.isclose(float(kept[0] / steps[0]), float(new[0].abs().mean() / old[0].abs().mean()), rel_tol=1e-5)
    assert 0.0005 < kept[3] < 0.01
    assert kept_steps(steps, torch.zeros(40, 300), new) is None
    with pytest.raises(ValueError, match="NaN or infinity"):
        kept_steps(steps, old, new / 0)


def test_extreme_sizes():
    for size in (1e-38, 1e-30, 1e30, 1e37):
        weight = torch.randn(8, 64) * size
        codes, steps = GRID.quantize(weight)
        outliers = GRID.take_outliers_(codes, steps, weight)
        assert outliers is None and torch.isfinite(steps).all()
        error = (decoded(codes, steps) - weight.double()).abs()
        assert (error <= steps.double() * 0.5001).all()


def test_a_constant_matrix_has_no_bits_to_spend():
    codes, steps = GRID.quantize(torch.full((16, 64), 0.3), StepRule(bits=5.0))
    assert GRID.take_outliers_(codes, steps, torch.full((16, 64), 0.3)) is None
    assert entropy(codes) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["row", StepRule("tensor", bits=5.0), StepRule(snr=30.0), torch.ones(4, 1)])
def test_nan_and_infinity(bad, rule):
    weight = torch.randn(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        GRID.quantize(weight, rule)


def test_bad_arguments():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="Unknown scale 'absmax' for a grid: use one of 'row', 'tensor'"):
        GRID.quantize(weight, "absmax")
    with pytest.raises(ValueError, match="Unknown rounding 'reference' for a grid"):
        GRID.quantize(weight, rounding="reference")
    with pytest.raises(ValueError, match="one target, got bits and snr"):
        StepRule(bits=5.0, snr=30.0)
    for name, value in (("bits", 0), ("bits", -1.0), ("snr", math.inf), ("step", math.nan), ("bits", True)):
        with pytest.raises(ValueError, match=f"{name} must be a positive number"):
            StepRule(**{name: value})
    with pytest.raises(ValueError, match="bits must be at most 8"):
        StepRule(bits=8.5)
    with pytest.raises(ValueError, match="4 bits alone"):
        steps_for_bits(weight, 3.0)
    with pytest.raises(TypeError, match="floating point weight"):
        GRID.quantize(weight.int())
    with pytest.raises(ValueError, match="a matrix or a stack"):
        GRID.quantize(weight[0])
    with pytest.raises(ValueError, match=r"steps of shape \(3, 1\) do not fit"):
        GRID.quantize(weight, torch.ones(3, 1))
    with pytest.raises(ValueError, match="a step must be positive"):
        GRID.quantize(weight, torch.zeros(4, 1))
    with pytest.raises(ValueError, match="split over processes"):
        GRID.quantize(weight, reduce=lambda x, how: x)
    with pytest.raises(TypeError, match="encode needs a floating point"):
        GRID.encode(torch.tensor([1]))
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    codes[1, 1] = 0x80
    with pytest.raises(ValueError, match=r"up\.weight: code 0x80 at flat index 5 is a negative zero"):
        GRID.validate(codes, "up.weight")
    GRID.validate(torch.tensor([c for c in range(256) if c != 0x80], dtype=torch.uint8))


def test_a_sample_is_mended_on_the_whole(monkeypatch):
    """A sample that misses the tail gives a wrong first guess; the check on all weights corrects it."""
    torch.manual_seed(0)
    weight = torch.randn(400, 1024)
    weight[::2] *= 1.15
    monkeypatch.setattr(module, "_SAMPLE", 512)
    codes = GRID.quantize(weight, StepRule("tensor", bits=5.0))[0]
    assert abs(bits_a_weight(codes, 400, 0) - 5) < 0.02
