import itertools
import math

import pytest
import torch

from hf_gg.formats.allocation import Curve, allocate, choose, curve, fill_sensitivity


def order0(levels: torch.Tensor) -> float:
    counts = torch.unique(levels, return_counts=True)[1].double()
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum())


def audit(weights, steps, sensitivity):
    """Bits and error of steps, with nothing of the package: int64 levels, outliers at 64 bits, 32 bits a step."""
    bits = error = energy = 0.0
    for name, weight in weights.items():
        w, s = weight.double(), steps[name].double()
        level = torch.sign(w) * torch.ceil(w.abs() / s - 0.5)
        beyond = w.abs() / s > 127.5
        level[beyond] = 0
        noise = torch.where(beyond, 0, w - level * s)
        cost = sensitivity[name].double()
        bits += order0(level.long()) * w.numel() + 64 * int(beyond.sum()) + 32 * s.numel()
        error += float((noise**2 * cost).sum())
        energy += float((w**2 * cost).sum())
    return bits / sum(w.numel() for w in weights.values()), error, error / energy


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(64, 200, generator=generator).clamp(1e-6, 1 - 1e-6)
    return {
        "a": torch.randn(48, 300, generator=generator) * 0.02,
        "b": torch.randn(2, 20, 256, generator=generator) * torch.rand(2, 20, 1, generator=generator),
        "c": torch.distributions.Laplace(0.0, 0.1).icdf(uniform),
    }


@pytest.fixture
def costs():
    generator = torch.Generator().manual_seed(1)
    return {
        "a": torch.rand(48, 1, generator=generator).mul(4).exp() * 100,
        "b": torch.full((2, 20, 1), 0.5),
        "c": torch.rand(64, 1, generator=generator) + 0.1,
    }


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.5, 5.0, 6.5])
def test_meets_bits_and_reports_what_an_audit_finds(weights, costs, bits):
    found = allocate(weights, target_bits=bits, sensitivity=costs)
    for name, weight in weights.items():
        assert found.steps[name].shape == (*weight.shape[:-1], 1) and found.steps[name].dtype == torch.float32
    real_bits, error, share = audit(weights, found.steps, costs)
    assert real_bits == pytest.approx(found.bits, abs=1e-6)
    assert bits - 0.01 <= real_bits <= bits
    assert error == pytest.approx(found.error, rel=1e-4)
    assert share == pytest.approx(found.error_share, rel=1e-4)
    mean = sum(found.tensor_bits[name] * weight.numel() for name, weight in weights.items())
    assert mean / sum(weight.numel() for weight in weights.values()) == pytest.approx(found.bits)


@pytest.mark.parametrize("share", [0.2, 1e-2, 1e-3])
def test_meets_error(weights, costs, share):
    found = allocate(weights, target_error=share, sensitivity=costs)
    assert 0.98 * share <= audit(weights, found.steps, costs)[2] <= share * 1.0001


def test_steps_follow_sensitivity_where_grids_are_fine(weights, costs):
    found = allocate(weights, target_bits=6.0, sensitivity=costs)
    water = [found.steps[name].double().square() * costs[name].double() for name in ("a", "b", "c")]
    for level in water:  # within a tensor exactly, between tensors up to two of the curves' quarter octaves
        assert float(level.max() / level.min()) == pytest.approx(1.0, rel=1e-4)
    levels = [float(level.mean()) for level in water]
    assert max(levels) / min(levels) < 2**1.01


def test_without_sensitivity_every_tensor_has_the_same_signal_to_noise(weights):
    found = allocate(weights, target_bits=6.0)
    ratios = [float(found.steps[name].mean() / weights[name].square().mean().sqrt()) for name in weights]
    assert max(ratios) / min(ratios) < 2**0.26


@pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
def test_no_choice_of_tensor_steps_is_better(weights, costs, bits):
    """Brute force over all combinations of steps around the found ones, an eighth of an octave apart."""
    found = allocate(weights, target_bits=bits, sensitivity=costs)
    grid = [k / 8 for k in range(-10, 11)]
    points = {
        name: [audit({name: w}, {name: found.steps[name] * 2.0**k}, costs)[:2] for k in grid]
        for name, w in weights.items()
    }
    counts = {name: w.numel() for name, w in weights.items()}
    total = sum(counts.values())
    best = math.inf
    for combination in itertools.product(range(len(grid)), repeat=3):
        chosen = [(counts[n], *points[n][k]) for n, k in zip(points, combination)]
        if sum(c * b for c, b, _ in chosen) / total <= found.bits + 1e-9:
            best = min(best, sum(error for _, _, error in chosen))
    # the curves are a quarter of an octave apart, and three tensors cannot make up for one another
    assert found.error <= best * 1.04
    equal = allocate(weights, target_bits=bits)
    assert found.error < 0.7 * audit(weights, equal.steps, costs)[1]


def test_choose_against_brute_force():
    generator = torch.Generator().manual_seed(2)
    curves = {}
    for name in "abcd":
        rate = torch.cumsum(torch.rand(6, generator=generator), 0).flip(0)
        error = 4.0 ** -(rate + torch.rand(1, generator=generator) * 3)
        curves[name] = Curve(int(torch.randint(10, 99, (1,), generator=generator)), rate, error.double())
    total = sum(c.count for c in curves.values())

    def cost(combination):
        pairs = list(zip(curves.values(), combination))
        bits = sum(float(c.bits[k]) * c.count for c, k in pairs) / total
        return bits, sum(float(c.errors[k]) * c.count for c, k in pairs)

    points = [cost(c) for c in itertools.product(range(6), repeat=4)]
    for target in (1.0, 1.5, 2.0, 2.5):
        found = choose(curves, lambda bits, _, target=target: bits - target)
        bits, error = cost([found[name] for name in curves])
        assert error == pytest.approx(min(e for b, e in points if b <= bits + 1e-9))


def test_curve_of_a_sample_is_that_of_all():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    ones = torch.ones(256, 1)
    found = curve(weight, ones, ones)
    rms = weight.square().mean().sqrt()
    for octave in (-4, -3, -2, -1, 0, 1):
        k = 36 + 4 * octave
        bits, error, _ = audit({"w": weight}, {"w": ones * rms * 2.0**octave}, {"w": ones})
        assert float(found.bits[k]) == pytest.approx(bits, abs=0.03)
        assert float(found.errors[k]) == pytest.approx(error / weight.numel(), rel=0.06)


def test_outliers_are_paid_for():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    weight[::7, ::31] *= 500
    found = allocate({"w": weight}, target_bits=6.0)
    assert audit({"w": weight}, found.steps, {"w": torch.ones(64, 1)})[0] == pytest.approx(6.0, abs=0.01)


def test_zeros_and_missing_sensitivities(weights):
    weights["zero"] = torch.zeros(4, 100)
    sensitivity = {"a": torch.zeros(48, 1), "c": torch.ones(64, 1)}
    found = allocate(weights, target_bits=4.0, sensitivity=sensitivity)
    assert torch.equal(found.steps["zero"], torch.ones(4, 1))
    ones = {name: torch.ones(*w.shape[:-1], 1) for name, w in weights.items()}
    assert audit(weights, found.steps, ones)[0] == pytest.approx(4.0, abs=0.01)
    # what nothing is known of has the signal to noise of the rest
    ratios = [float(found.steps[name].mean() / weights[name].square().mean().sqrt()) for name in "abc"]
    assert max(ratios) / min(ratios) < 2**0.26


def test_far_sensitivities_are_bounded(weights):
    filled = fill_sensitivity(
        weights, {"a": torch.ones(48, 1), "c": torch.cat([torch.zeros(63, 1), torch.ones(1, 1)])}
    )
    assert all(bool((cost > 0).all() & torch.isfinite(cost).all()) for cost in filled.values())


def test_all_zeros():
    found = allocate({"w": torch.zeros(3, 100)}, target_bits=3.0)
    assert torch.equal(found.steps["w"], torch.ones(3, 1)) and found.error == 0
    assert allocate({}, target_error=0.1).steps == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of target_bits and target_error"),
        ({"target_bits": 4.0, "target_error": 0.1}, "one of target_bits and target_error"),
        ({"target_bits": 0.0}, "target_bits must be"),
        ({"target_bits": 9.0}, "target_bits must be"),
        ({"target_bits": math.nan}, "target_bits must be"),
        ({"target_bits": 0.1}, "cannot be reached"),
        ({"target_error": 1.0}, "target_error must be"),
        ({"target_bits": 4.0, "sensitivity": {"w": torch.ones(7, 1)}}, "sensitivity of w has shape"),
        ({"target_bits": 4.0, "sensitivity": {"w": torch.full((8, 1), -1.0)}}, "sensitivity of w holds"),
        ({"target_bits": 4.0, "sensitivity": {"w": torch.full((8, 1), math.nan)}}, "sensitivity of w holds"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate({"w": torch.randn(8, 64)}, **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_what_is_no_number(bad):
    weight = torch.randn(8, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="layer.weight holds NaN or infinity"):
        allocate({"layer.weight": weight}, target_bits=4.0)
