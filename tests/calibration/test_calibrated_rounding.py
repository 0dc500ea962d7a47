"""Rounding for the least error of outputs, against brute force in float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_gg.calibration import SecondMoments, metric_of, round_weight
from hf_gg.formats import StepRule, get_format
from hf_gg.formats.steps import bits_a_weight


def problem(rows=8, columns=24, tokens=64, seed=0):
    """A weight, and correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = draw(tokens, columns) @ draw(columns, columns) * torch.rand(columns, generator=generator).mul(3).exp()
    return 0.05 * draw(rows, columns), inputs


def moments_of(inputs):
    moments = SecondMoments(inputs.shape[-1])
    for part in inputs.split(10):
        moments.add(part)
    return moments.matrix


def decoded(found, format):
    weight = get_format(format).decode(found.codes).double() * found.scale
    if found.outliers is not None:
        weight.view(-1)[found.outliers[0].long()] = found.outliers[1].double()
    return weight


def output_error(weight, rounded, inputs):
    """||(W - Ŵ) X||² of each row."""
    return ((weight.double() - rounded) @ inputs.double().T).square().sum(1)


def plainly(weight, format, scale="row"):
    codes, steps = get_format(format).quantize(weight, scale)
    return get_format(format).decode(codes).double() * steps


def column_loop(weight, hessian, format, scale):
    """Optimal brain quantization in a fixed order, by the inverse of what is left at every step, float64."""
    fmt, weight, hessian = get_format(format), weight.double().clone(), hessian.double()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    left = torch.argsort(hessian.diagonal(), stable=True).flip(0).tolist()
    while left:
        column = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        codes[:, column] = fmt.encode(weight[:, column] / scale[:, 0].double())
        error = (weight[:, column] - fmt.decode(codes[:, column]).double() * scale[:, 0]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("format", ["rf8", "rf8x", "rf8-e5", "grid"])
@pytest.mark.parametrize("columns", [5, 32, 75])
def test_feedback_against_the_column_loop(format, columns):
    weight, inputs = problem(columns=columns, tokens=4 * columns)
    moments = moments_of(inputs)
    steps = torch.full((8, 1), 0.006) if format == "grid" else None
    scale = "row" if format == "grid" else "absmax"
    found = round_weight(weight, metric_of(moments, 0.01), get_format(format), scale, steps=steps, passes=0)
    if format == "grid":  # whose steps are fitted at last: the codes stay
        given = steps
    else:
        given = get_format(format).quantize(weight, "absmax")[1]
        assert torch.equal(found.scale, given)
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(columns)
    expected = column_loop(weight, damped, format, given)
    by_loop = get_format(format).decode(expected).double() * given
    by_plain = plainly(weight, format, given if format == "grid" else "absmax")
    worse = output_error(weight, by_loop, inputs) > output_error(weight, by_plain, inputs)
    assert int(worse.sum()) <= 2
    expected[worse] = get_format(format).quantize(weight, given if format == "grid" else "absmax")[0][worse]
    assert torch.equal(found.codes, expected)


def test_second_moments():
    _, inputs = problem(tokens=37)
    moments = SecondMoments(24)
    for part in inputs[None].split(10, 1):
        moments.add(part)
    exact = inputs.double().T @ inputs.double()
    assert moments.count == 37
    torch.testing.assert_close(moments.matrix.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    with pytest.raises(ValueError, match="NaN"):
        moments.add(torch.tensor([[float("nan")] * 24]))


def test_metric_holds_the_moments():
    """The factors give back what was factored."""
    _, inputs = problem()
    moments = moments_of(inputs)
    metric = metric_of(moments, damping=0.05)
    lower = metric.feedback.double() * metric.costs.double().sqrt()
    back = (lower @ lower.T) * moments.diagonal().double().mean()
    expected = (moments.double() + 0.05 * moments.double().diagonal().mean() * torch.eye(24))[metric.order][
        :, metric.order
    ]
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))
    assert bool((metric.moments.diagonal().diff() >= 0).all())


@pytest.mark.parametrize("format", ["rf8", "rf8x", "grid"])
def test_independent_inputs_are_rounded_plainly(format):
    weight, _ = problem()
    steps = torch.full((8, 1), 0.006) if format == "grid" else None
    scale = StepRule(step=0.006) if format == "grid" else "absmax"
    found = round_weight(weight, metric_of(torch.eye(24)), get_format(format), scale)
    codes, plain_scale = get_format(format).quantize(weight, scale if steps is None else steps)
    assert torch.equal(found.codes, codes) and torch.equal(found.scale, plain_scale)


@pytest.mark.parametrize("scale", ["row", "absmax", "pow2", "tensor", "tensor-pow2", "unit"])
def test_scale_modes(scale):
    weight, inputs = problem()
    found = round_weight(weight, metric_of(moments_of(inputs)), get_format("rf8"), scale)
    plain = get_format("rf8").quantize(weight, scale)[1]
    assert found.scale.shape == (8, 1)
    if scale in ("tensor", "tensor-pow2", "unit"):
        assert found.scale.unique().numel() == 1
    if scale not in ("row", "tensor"):
        assert torch.equal(found.scale, plain.expand(8, 1))
    better = output_error(weight, decoded(found, "rf8"), inputs).sum()
    assert better < 0.6 * output_error(weight, plainly(weight, "rf8", scale), inputs).sum()


@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 30),
    format=st.sampled_from(["rf8", "rf8x", "rf8-e5", "grid"]),
    dead=st.integers(0, 20),
)
def test_never_worse_than_plain(seed, rank, format, dead):
    """Also on singular second moments and inputs that are always zero; and the error told is the error there is."""
    weight, inputs = problem(tokens=rank, seed=seed)
    inputs[:, :dead] = 0
    moments = moments_of(inputs)
    found = round_weight(weight, metric_of(moments), get_format(format))
    plain = output_error(weight, plainly(weight, format), inputs)
    ours = output_error(weight, decoded(found, format), inputs)
    assert bool((ours <= plain * (1 + 1e-3) + 1e-6 * plain.max()).all())
    unit = float(moments.diagonal().double().mean())
    assert found.plain_error * unit == pytest.approx(float(plain.sum()), rel=1e-2)
    assert found.error * unit == pytest.approx(float(ours.sum()), rel=1e-2, abs=1e-3 * float(plain.sum()))
    get_format(format).validate(found.codes)


def test_dead_inputs_keep_their_nearest_codes():
    weight, inputs = problem()
    inputs[:, 3] = 0
    found = round_weight(weight, metric_of(moments_of(inputs)), get_format("rf8"), "absmax")
    assert torch.equal(found.codes[:, 3], get_format("rf8").quantize(weight, "absmax")[0][:, 3])


def test_moments_that_say_nothing():
    assert metric_of(torch.zeros(4, 4)) is None
    assert metric_of(torch.full((4, 4), float("inf"))) is None


def test_against_exhaustive_search():
    """2 × 4 weights on a coarse grid: all levels from -8 to 8 are tried."""
    levels = torch.tensor(list(itertools.product(range(-8, 9), repeat=4)), dtype=torch.float64)
    ratios, plain_ratios = [], []
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        weight = 0.05 * torch.randn(2, 4, generator=generator)
        inputs = torch.randn(30, 4, generator=generator) + 1.5 * torch.randn(30, 1, generator=generator)
        step = float(weight.abs().max()) / 2
        found = round_weight(weight, metric_of(moments_of(inputs), 1e-4), get_format("grid"), StepRule(step=step))
        assert int((found.codes & 0x7F).max()) <= 8
        ours = output_error(weight, decoded(found, "grid"), inputs)
        plain = output_error(weight, plainly(weight, "grid", StepRule(step=step)), inputs)
        for row in range(2):
            best = ((weight[row].double() - levels * step) @ inputs.double().T).square().sum(1).min()
            assert best <= ours[row] * (1 + 1e-6) and ours[row] <= plain[row] * (1 + 1e-6)
            ratios.append(float(ours[row] / best))
            plain_ratios.append(float(plain[row] / best))
    ratios, plain_ratios = torch.tensor(ratios), torch.tensor(plain_ratios)
    assert (ratios < 1.001).float().mean() > 0.7
    assert ratios.log().mean().exp() < 1.15 < 1.5 < plain_ratios.log().mean().exp()


def test_descent_and_fit_lower_the_error():
    weight, inputs = problem(rows=32, columns=60, tokens=300)
    metric = metric_of(moments_of(inputs))
    errors = [round_weight(weight, metric, get_format("rf8"), passes=passes).error for passes in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("format", ["rf8", "rf8x", "grid"])
def test_what_lies_on_codes_stays(format):
    weight, inputs = problem()
    fmt = get_format(format)
    codes, scale = fmt.quantize(weight)
    steps = scale if format == "grid" else None
    again = round_weight(fmt.decode(codes) * scale, metric_of(moments_of(inputs)), fmt, steps=steps)
    assert torch.equal(again.codes, codes)
    torch.testing.assert_close(again.scale, scale, rtol=1e-6, atol=0)


def test_bits_of_a_grid_are_kept():
    weight, inputs = problem(rows=64, columns=96, tokens=400)
    metric, fmt = metric_of(moments_of(inputs)), get_format("grid")
    for bits in (2.5, 4.0, 6.0):
        steps = fmt.quantize(weight, StepRule(bits=bits))[1]
        plain = bits_a_weight(fmt.quantize(weight, steps)[0], 64, 0)
        free = round_weight(weight, metric, fmt, steps=steps)
        kept = round_weight(weight, metric, fmt, steps=steps, keep_bits=True)
        assert bits_a_weight(free.codes, 64, 0) > plain
        assert plain - 0.02 < bits_a_weight(kept.codes, 64, 0) <= plain + 1e-6
        assert kept.error < 0.5 * kept.plain_error


def test_outliers_of_a_grid_stay_exact():
    weight, inputs = problem()
    weight[2, 5] = 40.0
    steps = torch.full((8, 1), 0.01)
    found = round_weight(weight, metric_of(moments_of(inputs)), get_format("grid"), steps=steps)
    index, value = found.outliers
    assert index.tolist() == [2 * 24 + 5] and value.tolist() == [40.0]
    assert found.codes[2, 5] == 0
    plain = plainly(weight, "grid", steps)
    plain[2, 5] = 40.0
    ours = output_error(weight, decoded(found, "grid"), inputs)
    assert bool((ours <= output_error(weight, plain, inputs) * 1.001).all())


def test_same_codes_every_time():
    weight, inputs = problem(rows=40, columns=70)
    metric = metric_of(moments_of(inputs))
    a, b = (round_weight(weight, metric, get_format("rf8")) for _ in range(2))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    weight, inputs = problem()
    found = round_weight(weight.to(dtype), metric_of(moments_of(inputs)), get_format("rf8"))
    assert found.error < found.plain_error


def test_not_finite():
    weight, inputs = problem()
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_weight(weight, metric_of(moments_of(inputs)), get_format("rf8"))
