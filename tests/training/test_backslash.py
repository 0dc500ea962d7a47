"""The penalty on its own: its steps against loops in numpy, ν against scipy, hooks, state, and what it refuses."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import gennorm
from torch import nn

from hf_gg import BackSlash, RF8Linear
from hf_gg.coding.levels import encode_levels, nearest_levels
from hf_gg.training import kernels
from hf_gg.training.backslash import Fit
from hf_gg.training.optimizers import innermost
from hf_gg.training.parts import BLOCK, blocks, part_of
from hf_gg.training.penalty import fill_zeros_, pack_zeros
from hf_gg.training.rate import Rate, levels_of
from hf_gg.training.selection import kind_of, select_matrices


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(16, 24), nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 16))
    for layer, shape in ((1, 0.7), (3, 1.6)):
        draw = gennorm.rvs(shape, scale=0.05, size=tuple(model[layer].weight.shape), random_state=layer)
        model[layer].weight.data.copy_(torch.from_numpy(draw))
    return model


def train(model: nn.Module, optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 16, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(x).float(), (x * 7 + 3) % 16)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(w: np.ndarray, lr: float, lam: float, nu: float, scale: float, eps: float) -> np.ndarray:
    """The decoupled step, weight by weight, in float64."""
    out = np.empty_like(w)
    for index, x in np.ndenumerate(w):
        t = lr * lam * nu * (abs(x) / scale + eps) ** (nu - 1)
        out[index] = math.copysign(max(abs(x) - t, 0.0), x)
    return out


@pytest.mark.parametrize("shape", ["tensor", "global", 1.0, 2.0, 0.5])
def test_decoupled_step_is_the_formula(shape):
    model = small_model()
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    penalty = BackSlash(model, 0.7, shape=shape, eps=0.05)
    penalty.step(0.01)
    chosen = [before["1.weight"], before["3.weight"]]
    for name, p in model.named_parameters():
        if name not in penalty.fits:
            assert np.array_equal(p.detach().numpy(), before[name].astype(np.float32))
            continue
        w = np.concatenate([x.ravel() for x in chosen]) if shape == "global" else before[name]
        scale = np.abs(w).mean()
        if isinstance(shape, float):
            nu = shape
        else:  # the ratio of moments that scipy's distribution of this ν has
            nu = penalty.fits[name].shape
            ratio = gennorm.moment(2, nu) / gennorm.expect(abs, (nu,)) ** 2
            assert ratio == pytest.approx((w**2).mean() / scale**2, rel=1e-6)
        expected = by_hand(before[name], 0.01, 0.7, nu, scale, 0.05)
        off = np.abs(p.detach().numpy() - expected)
        assert (off < 2e-8 + 1e-7 * np.abs(expected) + 1e-5 * np.abs(before[name] - expected)).all()
        assert ((p.detach().numpy() == 0) == (expected == 0)).mean() > 0.999
        assert (p == 0).any()


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
@pytest.mark.parametrize("form", ["decoupled", "reference"])
@pytest.mark.parametrize("shape", [0.3, 0.9, 1.4, 2.0])
def test_kernel_is_the_step_in_torch(monkeypatch, form, shape):
    w = {
        name: torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.05
        for name, n in (("a", 70_001), ("b", 5))
    }
    w["a"][:9] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-41, 1e4, -1e4, 1e30, -1e-6])
    settings = {"form": form, "shape": shape, "lambda_": 0.5 if form == "decoupled" else 100.0}
    steps = []
    for compiled in (True, False):
        monkeypatch.setattr(kernels, "available", lambda compiled=compiled: compiled)
        mine = {name: x.clone() for name, x in w.items()}
        penalty = BackSlash(mine, **settings)
        penalty.fits = {name: Fit(shape, 0.04) for name in mine}
        penalty.steps = 1
        penalty.step(0.01)
        steps.append({name: x - w[name] for name, x in mine.items()})
        assert not any((x.signbit() & (x == 0)).any() for x in mine.values()) or form == "reference"
    for name in w:
        a, b = steps[0][name], steps[1][name]
        assert torch.allclose(a, b, rtol=2e-5, atol=1e-8), (a - b).abs().max()
        assert ((a == 0) == (b == 0)).float().mean() > 0.999 and (a != 0).float().mean() > 0.9


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
def test_kernel_does_not_depend_on_the_place():
    """Nor on threads: parts of a tensor in two processes get what the whole gets in one."""
    w = torch.randn(100_003) * 0.05
    whole, cut = w.clone(), w.clone()
    kernels.shrink_(whole, 1e-3, 0.8, 0.04, 0.1)
    for part in cut.split([1, 7, 12_345, 40_000, 47_650]):
        kernels.shrink_(part, 1e-3, 0.8, 0.04, 0.1)
    assert torch.equal(whole, cut)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = w.clone()
        kernels.shrink_(again, 1e-3, 0.8, 0.04, 0.1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 99_999):
            broken = w.clone()
            broken[place] = bad
            assert not kernels.shrink_(broken, 1e-3, 0.8, 0.04, 0.1) and not broken[place].isfinite()


def test_reference_step_is_the_papers():
    model = small_model()
    w = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    n = sum(x.size for x in w.values())
    penalty = BackSlash(dict(model.named_parameters()), form="reference")
    penalty.step(lr=123.0)
    nu = penalty.fits["1.weight"].shape
    assert len({fit.shape for fit in penalty.fits.values()}) == 1 and len(penalty.fits) == len(w)
    step = 2000 * nu / n
    assert penalty.step_size(123.0) == pytest.approx(step)
    for name, p in model.named_parameters():
        expected = w[name] - step * np.sign(w[name]) * (np.abs(w[name]) + 1) ** (nu - 1)
        assert np.abs(p.detach().numpy() - expected).max() < 1e-6 * max(1, np.abs(expected).max())
    assert BackSlash(model, form="reference").count == n  # N counts what is left alone too


def test_reference_rate_in_the_papers_unit():
    model = small_model()
    penalty = BackSlash(dict(model.named_parameters()), form="reference")
    penalty.estimate()
    nu = penalty.fits["1.weight"].shape
    w = np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])
    assert penalty.penalty() == pytest.approx(((np.abs(w) + 1) ** nu).mean(), rel=1e-9)


def test_decoupled_step_falls_along_its_own_rate():
    """The step is the gradient of R as `penalty` gives it, times λ, η and N."""
    weight = torch.randn(40, 30, dtype=torch.float64) * 0.1
    penalty = BackSlash({"w": weight}, 1.0, shape=1.3)
    penalty.estimate()
    before = penalty.penalty()
    penalty.step(1e-9)
    fit = penalty.fits["w"]
    slope = 1.3 * (weight.abs() / fit.scale + 0.1) ** 0.3
    assert (penalty.penalty() - before) == pytest.approx(-1e-9 * float(slope.square().mean()), rel=1e-4)


def test_shape_is_scipys_and_is_estimated_every_n_steps():
    draws = {
        nu: torch.from_numpy(gennorm.rvs(nu, scale=0.02, size=200_000, random_state=5)) for nu in (0.6, 1.0, 1.7, 4.0)
    }
    penalty = BackSlash({f"{nu}": w.float() for nu, w in draws.items()}, 1e-6, every=3)
    for step in range(7):
        penalty.step(1e-3)
        assert penalty.steps == step + 1
        if step in (0, 3, 6):
            for part in penalty.parts:  # cleared, so that the next estimate shows
                assert penalty.fits[part.name].shape == pytest.approx(min(float(part.name), 2.0), rel=0.03)
                penalty.fits[part.name].shape = 1.234
        else:
            assert {fit.shape for fit in penalty.fits.values()} == {1.234}


@pytest.mark.parametrize("shape", ["tensor", "global"])
def test_zeros_can_be_left_out_of_the_estimates(shape):
    draws = {nu: torch.from_numpy(gennorm.rvs(nu, size=100_000, random_state=5)).float() for nu in (0.6, 0.8, 1.7)}
    sparse = {f"{nu}": torch.cat([torch.zeros(300_000), w]).view(1000, 400) for nu, w in draws.items()}
    penalties = [BackSlash(sparse, shape=shape, skip_zeros=skip) for skip in (True, False)]
    for penalty in penalties:
        penalty.estimate()
    found, counted = (penalty.fits for penalty in penalties)
    if shape == "global":
        alone = BackSlash({"w": torch.cat(list(draws.values()))}, shape=shape)
        alone.estimate()
        wanted = dict.fromkeys(found, alone.fits["w"].shape)
        scales = dict.fromkeys(found, alone.fits["w"].scale)
    else:
        wanted = {"0.6": 0.6, "0.8": 0.8, "1.7": 1.0}
        scales = {f"{nu}": float(w.abs().mean()) for nu, w in draws.items()}
    for name, fit in found.items():
        assert fit.shape == pytest.approx(wanted[name], rel=0.02) and counted[name].shape < 0.4
        assert fit.scale == pytest.approx(scales[name], rel=1e-5)
        assert counted[name].scale == pytest.approx(fit.scale / 4, rel=1e-5)
    empty = BackSlash({"w": torch.zeros(4, 4)}, skip_zeros=True)
    empty.estimate()
    assert (empty.fits["w"].shape, empty.fits["w"].scale) == (pytest.approx(1.0), 1.0)


def test_more_zeros_from_a_larger_lambda_where_all_start_at_zero():
    """Counting the zeros, λ = 0.8 left 0.5 % of them, and 0.4 left 49 %."""
    shares = []
    for lambda_ in (0.1, 0.2, 0.4, 0.6, 0.8, 1.2):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(40, 60, generator=generator) * 0.02 * (torch.rand(40, 60, generator=generator) < 0.1)
        delta = nn.Parameter(torch.zeros(40, 60))
        optimizer = torch.optim.AdamW([delta], lr=5e-4, weight_decay=0.0)
        BackSlash({"delta": delta}, lambda_, skip_zeros=True).attach(optimizer)
        for _ in range(80):
            x = torch.randn(8, 60, generator=generator)
            y = x @ target.T + 0.1 * torch.randn(8, 40, generator=generator)
            (x @ delta.T - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        shares.append(float((delta == 0).float().mean()))
    assert shares == sorted(shares) and shares[0] < 0.2 and shares[2] > 0.8 and shares[4] > 0.95


def test_lambda_means_the_same_for_other_scales():
    """A model ten times larger in its weights, trained with ten times the learning rate, shrinks alike."""
    w = torch.randn(300, 200) * 0.02
    a, b = w.clone(), w * 10
    BackSlash({"w": a}, 0.5).step(1e-2)
    BackSlash({"w": b}, 0.5).step(1e-1)
    assert torch.allclose(a * 10, b, atol=1e-6) and (a == 0).float().mean() > 0.05


def test_layouts():
    """Transposed, strided, empty, three-dimensional and larger than a block."""
    base = torch.randn(500, 300)
    tensors = {
        "transposed": base.clone().T,
        "strided": torch.randn(60, 80)[::2, ::3],
        "experts": torch.randn(3, 20, 30),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(0.5),
        "double": torch.randn(20, 20, dtype=torch.float64),
    }
    expected = {}
    for name, w in tensors.items():
        x = w.double().numpy()
        expected[name] = np.sign(x) * np.maximum(np.abs(x) - 0.02, 0)
    assert base.numel() > BLOCK
    BackSlash(tensors, 2.0, shape=1.0).step(0.01)
    for name, w in tensors.items():
        assert np.allclose(w.numpy(), expected[name], atol=1e-7), name
    assert sum(block.numel() for block in blocks(tensors["strided"])) == tensors["strided"].numel()


def test_zero_tensor_and_no_negative_zero():
    w = {"zero": torch.zeros(4, 4), "tiny": torch.full((4, 4), -1e-9)}
    penalty = BackSlash(w, 1.0)
    penalty.step(0.1)
    assert all(torch.equal(x, torch.zeros(4, 4)) and not x.signbit().any() for x in w.values())
    assert penalty.measure()["zero"].zeros == 1.0


def test_attached_equals_by_hand():
    torch.manual_seed(1)
    a, b = small_model(), small_model()
    b.load_state_dict(a.state_dict())
    first, second = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (a, b))
    attached, loose = BackSlash(a, 0.3, every=4), BackSlash(b, 0.3, every=10**9)
    attached.attach(first)
    loose.steps = 1  # its own estimates would be of the weights after the optimizer's step
    for step in range(10):
        train(a, first, 1, step)
        if step % 4 == 0:
            loose.estimate()
        train(b, second, 1, step)
        loose.step(0.01)
    for x, y in zip(a.parameters(), b.parameters()):
        assert torch.equal(x, y)
    assert attached.fits == loose.fits and attached.state_dict()["steps"] == 10
    attached.detach()
    kept = a[1].weight.clone()
    for group in first.param_groups:
        group["lr"] = 0.0
    train(a, first, 1, 10)
    assert torch.equal(a[1].weight, kept)


def test_learning_rates_of_groups_and_schedules():
    model = small_model()
    optimizer = torch.optim.SGD(
        [{"params": model[1].parameters(), "lr": 0.0}, {"params": model[3].parameters()}], lr=0.5
    )
    BackSlash(select_matrices(model), 0.1, shape=1.0).attach(optimizer)
    before = [model[i].weight.detach().clone() for i in (1, 3)]
    optimizer.step()  # no gradients: only the penalty moves anything
    assert torch.equal(model[1].weight, before[0])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)  # as torchao's optimizers keep it
    optimizer.step()
    shrink = nn.functional.softshrink
    assert torch.allclose(model[1].weight, shrink(before[0], 0.02))
    assert torch.allclose(model[3].weight, shrink(before[1], 0.1), atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_a_scaler_skips_is_skipped(fused):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    penalty = BackSlash(model, 1.0)
    penalty.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate((1.0, math.inf, 1.0)):
        before = model[1].weight.detach().clone()
        scaler.scale(model(torch.arange(16)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model[1].weight, before) == (step == 1)
    assert penalty.state_dict()["steps"] == 2


def test_resumed_equals_uninterrupted():
    def start():
        torch.manual_seed(3)
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        penalty = BackSlash(model, 0.5, every=4)
        penalty.attach(optimizer)
        return model, optimizer, penalty

    whole, optimizer, penalty = start()
    train(whole, optimizer, 11)
    model, optimizer, penalty = start()
    train(model, optimizer, 6)  # between two estimates
    saved = json.loads(json.dumps(penalty.state_dict())), model.state_dict(), optimizer.state_dict()
    other, optimizer, penalty = start()
    other.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    penalty.load_state_dict(saved[0])
    train(other, optimizer, 5, 6)
    for x, y in zip(whole.parameters(), other.parameters()):
        assert torch.equal(x, y)
    other, optimizer, penalty = start()  # without the state the two differ: the test can fail
    other.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(other, optimizer, 5, 6)
    assert not torch.equal(whole[1].weight, other[1].weight)


def test_held_zeros():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    penalty = BackSlash(model, 3.0)
    penalty.attach(optimizer)
    train(model, optimizer, 5)
    zero = {part.name: part.tensor == 0 for part in penalty.parts}
    assert 0.05 < zero["1.weight"].float().mean() < 0.95
    penalty.strength, penalty.hold_support = 0.0, True
    moved = model[1].weight.detach().clone()
    train(model, optimizer, 5, 5)
    assert all((part.tensor[zero[part.name]] == 0).all() for part in penalty.parts)
    assert not torch.equal(moved, model[1].weight)
    penalty.hold_support = False
    train(model, optimizer, 1, 10)
    assert not (model[1].weight[zero["1.weight"]] == 0).all()


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_packed_zeros(n):
    w = torch.randn(n).masked_fill_(torch.rand(n) < 0.5, 0)
    packed, other = pack_zeros(w), torch.ones(n)
    assert packed.dtype == torch.uint8 and len(packed) == -(-n // 8)
    fill_zeros_(other, packed)
    assert torch.equal(other == 0, w == 0)


def test_bfloat16_steps_do_not_vanish():
    """λ η of a thousandth of a unit of the last place: on average the weights move as in float32, the zeros stay."""
    w = (torch.randn(400, 400) * 0.02).bfloat16()
    w[0] = 0
    exact, start = w.double(), w.double()
    penalty = BackSlash({"w": w}, 1.0, shape=1.0)
    for _ in range(100):
        penalty.step(1e-6)
        exact = exact.sign() * (exact.abs() - 1e-6).clamp_min(0)
    assert (w[0] == 0).all()
    moved = (start.abs() - w.double().abs()).mean()
    assert moved == pytest.approx(float((start.abs() - exact.abs()).mean()), rel=0.05)
    again = start.bfloat16()
    penalty = BackSlash({"w": again}, 1.0, shape=1.0)
    for _ in range(100):
        penalty.step(1e-6)
    assert torch.equal(w, again)  # the same on every process
    third = start.bfloat16()
    BackSlash({"w": third}, 1.0, shape=1.0, seed=1).step(1e-6)
    assert not torch.equal(third, start.bfloat16())


@pytest.mark.parametrize(("deviation", "grid"), [(0.02, 2**-7), (0.02, 2**-14), (0.02, 2**-5), (0.3, 2**-12)])
def test_measure_is_the_coded_size(deviation, grid):
    w = torch.randn(370, 410, generator=torch.Generator().manual_seed(0)) * deviation
    w[:50] = 0
    rate = BackSlash({"w": w}).measure(grid)["w"]
    levels = [round(float(x) / grid) for x in w.flatten()]
    counts = Counter(levels)
    entropy = -sum(c / len(levels) * math.log2(c / len(levels)) for c in counts.values())
    coded = encode_levels(nearest_levels(w, grid)[0], grid)
    assert rate.bits == pytest.approx(8 * coded.numel() / w.numel(), rel=0.01)
    assert rate.codebook_bits == pytest.approx(rate.bits - entropy) and 0 < rate.codebook_bits < 0.5
    assert rate.sparsity == pytest.approx(counts[0] / len(levels))
    assert rate.zeros == pytest.approx(float((w == 0).float().mean()))
    both = Rate.of([rate, Rate(3 * rate.numel, 1.0, 0.1, 0.5, 0.5)])
    assert both.bits == pytest.approx((rate.bits + 3) / 4) and both.numel == 4 * rate.numel


def test_measure_of_few_weights():
    """Zeros alone take a header, an empty tensor nothing."""
    rates = BackSlash({"zero": torch.zeros(300, 300), "empty": torch.zeros(0, 3), "one": torch.ones(1, 1)}).measure()
    size = encode_levels(torch.zeros(300, 300), 2**-9).numel()
    assert rates["zero"].bits * 90_000 / 8 == pytest.approx(size, abs=8)
    assert rates["empty"].bits == 0 and rates["one"].sparsity == 0


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_measure_without_a_level_zero(shift):
    part = part_of("w", torch.full((10, 10), shift) + torch.rand(10, 10))
    assert levels_of(part, 0.25).rate().sparsity == 0


def test_selection():
    model = small_model()
    assert list(select_matrices(model)) == ["1.weight", "3.weight"]
    assert list(select_matrices(model, embeddings=True)) == ["0.weight", "1.weight", "3.weight"]
    assert list(select_matrices(model, "3")) == ["3.weight"]
    assert list(select_matrices(model, ["[12]", "3"])) == ["1.weight", "3.weight"]
    model[3].weight = nn.Parameter(torch.randn(16, 32))
    nested = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "ab": nn.Linear(4, 4)})
    assert list(select_matrices(nested, "a")) == ["a.0.weight", "a.1.weight"]
    assert list(select_matrices(nested, "a.1")) == list(select_matrices(nested, "1")) == ["a.1.weight"]
    tied = nn.ModuleDict({"embed": nn.Embedding(16, 24), "head": nn.Linear(24, 16), "body": nn.Linear(24, 24)})
    tied["head"].weight = tied["embed"].weight
    assert list(select_matrices(tied)) == ["body.weight"]
    assert list(select_matrices(tied, embeddings=True)) == ["embed.weight", "body.weight"]
    kinds = [kind_of(f"model.layers.3.{name}.weight") for name in ("mlp.up_proj", "attention.output.dense")]
    assert kinds == ["up_proj", "output.dense"]


def test_selection_refuses():
    model = small_model()
    with pytest.raises(ValueError, match="'q_proj' matches no module of Sequential"):
        select_matrices(model, "q_proj")
    with pytest.raises(ValueError, match="neither a name nor a regular expression"):
        select_matrices(model, "(")
    with pytest.raises(ValueError, match="'2' matches '2'.*none holds a trainable matrix"):
        select_matrices(model, "2")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no matrix of Sequential is selected: 2 are frozen"):
        BackSlash(model)
    with pytest.raises(ValueError, match="frozen"):
        select_matrices(model, "1")
    quantized = nn.ModuleDict({"a": RF8Linear.from_linear(nn.Linear(8, 8)), "b": nn.Linear(8, 8)})
    assert list(select_matrices(quantized)) == ["b.weight"]
    with pytest.raises(TypeError, match="'a' selects a.weight, which is torch.uint8"):
        select_matrices(quantized, "a")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lambda_": -1.0}, ValueError, "lambda_ must be finite, at least 0, got -1"),
        ({"lambda_": math.nan}, ValueError, "lambda_ .* got nan"),
        ({"lambda_": math.inf}, ValueError, "lambda_ .* got inf"),
        ({"lambda_": "1"}, TypeError, "lambda_ must be a number, got '1'"),
        ({"form": "coupled"}, ValueError, "form must be one of 'decoupled', 'reference', got 'coupled'"),
        ({"shape": "row"}, ValueError, "shape must be 'tensor', 'global' or a number, got 'row'"),
        ({"shape": 0.0}, ValueError, "shape must be finite, at least 0.1 and at most 8, got 0"),
        ({"eps": -0.1}, ValueError, "eps must be finite"),
        ({"every": 0}, ValueError, "every must be a number of steps, at least 1, got 0"),
        ({"count": -5}, ValueError, "count must be finite, at least 0, got -5"),
        ({"count": 0}, ValueError, "count must be positive, got 0"),
        ({"count": math.nan}, ValueError, "count must be finite"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        BackSlash(small_model(), **settings)


@pytest.mark.parametrize("unit", [1e-30, 1e-22, 1e25])
def test_weights_whose_squares_leave_float32(unit):
    torch.manual_seed(0)
    w = torch.randn(300, 300)
    plain, scaled = BackSlash({"w": w}), BackSlash({"w": w * unit})
    for penalty in (plain, scaled):
        penalty.estimate()
    assert scaled.fits["w"].shape == pytest.approx(plain.fits["w"].shape, rel=1e-5)
    assert scaled.fits["w"].scale == pytest.approx(plain.fits["w"].scale * unit, rel=1e-5)
    scaled.check_finite()


def test_an_empty_matrix_beside_others():
    w = torch.ones(4, 4)
    penalty = BackSlash({"none": torch.ones(0, 4), "w": w}, lambda_=1.0)
    penalty.step(0.1)
    assert (w < 1).all()


def test_bad_parameters():
    with pytest.raises(TypeError, match="w is torch.uint8: quantized codes cannot be trained"):
        BackSlash({"w": torch.zeros(3, 3, dtype=torch.uint8)})
    with pytest.raises(TypeError, match="w is torch.float16: train in float32"):
        BackSlash({"w": torch.zeros(3, 3, dtype=torch.float16)})
    with pytest.raises(TypeError, match=r"\(name, parameter\) pairs, got Parameter"):
        BackSlash(small_model().parameters())
    with pytest.raises(TypeError, match="w must be a tensor, got list"):
        BackSlash({"w": [1.0]})
    with pytest.raises(ValueError, match="no parameter"):
        BackSlash({})
    with pytest.raises(ValueError, match="'w' twice"):
        BackSlash([("w", torch.ones(2)), ("w", torch.ones(2))])
    with pytest.raises(ValueError, match="meta device"):
        BackSlash({"w": torch.ones(2, device="meta")})


def test_weights_that_are_not_finite_stop_the_training():
    for bad in (math.nan, math.inf):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        BackSlash(model).attach(optimizer)
        train(model, optimizer, 2)
        model[3].weight.grad = torch.full_like(model[3].weight, bad)
        with pytest.raises(ValueError, match=r"3\.weight has weights that are NaN or infinite after step 2"):
            optimizer.step()
    w = torch.ones(3, 3)
    penalty = BackSlash({"w": w}, 1.0)
    for lr in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="lr must be finite"):
            penalty.step(lr)
    assert torch.equal(w, torch.ones(3, 3))
    w[0, 0] = math.nan
    with pytest.raises(ValueError, match="w has weights"):
        penalty.estimate()
    with pytest.raises(ValueError, match="w has weights"):
        penalty.check_finite()
    with pytest.raises(ValueError, match="not finite"):
        penalty.measure()
    with pytest.raises(ValueError, match="grid must be positive"):
        penalty.measure(0.0)


def test_optimizers_that_cannot_be_followed():
    model = small_model()
    penalty = BackSlash(model)
    with pytest.raises(ValueError, match="does not step 3.weight"):
        penalty.attach(torch.optim.SGD(model[1].parameters(), lr=0.1))
    with pytest.raises(TypeError, match="got Linear"):
        innermost(model[1])

    class LayerWiseDummyOptimizer(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    with pytest.raises(TypeError, match="LayerWiseDummyOptimizer calls no step hooks"):
        penalty.attach(LayerWiseDummyOptimizer(model.parameters(), {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="no learning rate of its own"):
        penalty._after_step(optimizer, (), {})


@pytest.mark.parametrize("state", [None, {}, (-1, {}), (1, {"w": [1.0]}), (1, {"w": [math.nan, 1.0]})])
def test_damaged_state(state):
    penalty = BackSlash({"w": torch.ones(2, 2)})
    state = {"steps": state[0], "fits": state[1]} if isinstance(state, tuple) else state
    with pytest.raises(ValueError, match="damaged"):
        penalty.load_state_dict(state)


def test_state_of_another_model():
    state = BackSlash({"v": torch.ones(2, 2)}, 1.0)
    state.estimate()
    with pytest.raises(ValueError, match="of other parameters: 'v'"):
        BackSlash({"w": torch.ones(2, 2)}).load_state_dict(state.state_dict())


def test_a_step_of_zero_keeps_no_large_temporaries():
    """As the first of a linear warm-up is: the kernel does not take it, and the blocks are small."""
    from hf_gg.training import penalty

    p = torch.nn.Parameter(torch.randn(2**22))
    backslash = BackSlash([("w", p)], lambda_=1.0)
    penalty._thread.__dict__.clear()
    before = p.detach().clone()
    backslash.step(0.0)
    assert torch.equal(p, before)
    assert sum(part.numel() for kept in vars(penalty._thread).values() for part in kept) <= 4 * 2**16
