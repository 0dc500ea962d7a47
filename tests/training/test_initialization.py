"""`gg_init_` on plain torch modules: which parameters are drawn, with which standard deviation, from which law."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from hf_gg.training.initialization import GGInit, fans, gg_init_, matrices


class Conv1D(nn.Module):
    """The layout of GPT-2's layer: [in, out]."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))


class Experts(nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        up, down = (2, 50, 100), (2, 70, 50)
        self.gate_up_proj = nn.Parameter(torch.empty(up if transposed else (up[0], up[2], up[1])))
        self.down_proj = nn.Parameter(torch.empty(down if transposed else (down[0], down[2], down[1])))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, 600))


# module, parameter, fan-in, fan-out
LAYERS = {
    "linear": (lambda: nn.Linear(200, 100), "weight", 200, 100),
    "embedding": (lambda: nn.Embedding(500, 40), "weight", 40, 500),
    "conv1d": (lambda: nn.Conv1d(30, 60, 5), "weight", 150, 300),
    "conv2d": (lambda: nn.Conv2d(20, 30, (3, 5)), "weight", 300, 450),
    "conv3d": (lambda: nn.Conv3d(8, 16, 3), "weight", 216, 432),
    "grouped": (lambda: nn.Conv1d(60, 90, 5, groups=3), "weight", 100, 150),
    "depthwise": (lambda: nn.Conv1d(4000, 4000, 4, groups=4000), "weight", 4, 4),
    "transposed 1d": (lambda: nn.ConvTranspose1d(30, 60, 5), "weight", 150, 300),
    "transposed 2d": (lambda: nn.ConvTranspose2d(20, 30, (3, 5), groups=2), "weight", 150, 225),
    "Conv1D": (lambda: Conv1D(300, 100), "weight", 100, 300),
    "experts": (lambda: Experts(False), "gate_up_proj", 50, 100),
    "experts, down": (lambda: Experts(False), "down_proj", 70, 50),
    "transposed experts": (lambda: Experts(True), "gate_up_proj", 50, 100),
    "transposed experts, down": (lambda: Experts(True), "down_proj", 70, 50),
    "router": (Router, "weight", 600, 16),
}


def check_law(weight: torch.Tensor, std: float, shape: float) -> None:
    """The weights have the law and the standard deviation, as far as their number can tell."""
    values = weight.detach().double().flatten().numpy()
    unit = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    assert stats.kstest(values, stats.gennorm(shape, scale=std * unit).cdf).statistic < 1.95 / math.sqrt(values.size)
    kurtosis = stats.gennorm(shape).stats("k") + 3
    assert values.std() == pytest.approx(std, rel=5 * math.sqrt((kurtosis - 1) / 4 / values.size))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [0.5, 1.0, 8.0])
def test_fans(name, shape):
    make, parameter, fan_in, fan_out = LAYERS[name]
    module = make()
    weight = getattr(module, parameter)
    assert fans(module, weight, parameter) == (fan_in, fan_out)
    for std, n in (("fan_in", fan_in), ("fan_out", fan_out)):
        gg_init_(module, shape=shape, std=std)
        check_law(weight, 1 / math.sqrt(n), shape)
    gg_init_(module, shape=shape, std=0.03, gain=2.0)
    check_law(weight, 0.06, shape)


def test_fan_in_keeps_the_variance_of_a_signal():
    """What the fan is for: outputs of unit variance for inputs of unit variance, also where torch's own fan is off."""
    x = {1: torch.randn(64, 40, 50), 2: torch.randn(16, 40, 20, 20)}
    for module, inputs in (
        (nn.Conv1d(40, 80, 5, groups=4, bias=False), x[1]),
        (nn.ConvTranspose1d(40, 80, 5, bias=False), x[1]),
        (nn.ConvTranspose2d(40, 20, 3, groups=2, bias=False), x[2]),
    ):
        y = gg_init_(module, shape=1.0, std="fan_in")(inputs).detach()
        inner = y[..., 6:-6, 6:-6] if y.ndim == 4 else y[..., 6:-6]
        assert float(inner.var()) == pytest.approx(1, rel=0.1), module


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(300, 200),
        nn.Bilinear(30, 20, 60),
        nn.Embedding(500, 40),
        nn.EmbeddingBag(500, 40),
        nn.Conv2d(20, 30, (3, 5)),
        nn.Conv1d(60, 90, 5, groups=3),
        nn.ConvTranspose1d(30, 90, 5),
        nn.LSTM(60, 70, num_layers=2),
        nn.GRU(60, 70),
        nn.MultiheadAttention(80, 4),
        nn.MultiheadAttention(80, 4, kdim=60, vdim=40),
    ],
    ids=lambda module: type(module).__name__,
)
def test_own_deviations_of_torch(module):
    """`std="model"` against what `reset_parameters` really draws."""
    own: dict[str, list[float]] = {}
    for _ in range(10):
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if reset is not None:
                reset()
        for name, _, parameter in matrices(module):
            own.setdefault(name, []).append(float(parameter.detach().double().square().mean()))
    assert own
    gg_init_(module, shape=0.5)
    for name, _, parameter in matrices(module):
        expected = math.sqrt(sum(own[name]) / len(own[name]))
        size = parameter.numel()
        unit = math.sqrt(math.gamma(2) / math.gamma(6))
        values = parameter.detach().double().flatten().numpy()
        statistic = stats.kstest(values, stats.gennorm(0.5, scale=expected * unit).cdf).statistic
        assert statistic < 1.95 / math.sqrt(size) + 0.01, name


def test_only_matrices_are_drawn():
    model = nn.Sequential(
        nn.Embedding(20, 8, padding_idx=3),
        nn.Linear(8, 6),
        nn.LayerNorm((4, 6)),
        nn.BatchNorm1d(6),
        nn.Linear(6, 1),
    )
    with torch.no_grad():
        model[2].weight.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert gg_init_(model, shape=1.0, std="fan_in") is model
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "1.weight", "4.weight"}
    assert not model[0].weight[3].any() and model[0].weight[2].all()


def test_tied_weights_are_drawn_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embedding"].weight
    torch.manual_seed(0)
    gg_init_(model, std=0.1)
    assert model["head"].weight is model["embedding"].weight
    alone = nn.Embedding(50, 8)
    torch.manual_seed(0)
    assert torch.equal(gg_init_(alone, std=0.1).weight, model["head"].weight)


def test_gain():
    for gain, xi in (("linear", 1), ("sigmoid", 1), ("relu", 2), (math.sqrt(2 / (1 + 0.3**2)), 2 / (1 + 0.3**2))):
        assert GGInit(gain=gain).factor ** 2 == pytest.approx(xi)
    layer = gg_init_(nn.Linear(400, 300), shape=1.0, std="fan_in", gain="relu")
    check_law(layer.weight, math.sqrt(2 / 400), 1.0)
    layer = gg_init_(nn.Linear(400, 300), shape=1.0, gain="relu")
    check_law(layer.weight, math.sqrt(2 / 3 / 400), 1.0)


def test_seeds_and_generators_reproduce():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    torch.manual_seed(4)
    first = [p.clone() for p in gg_init_(model, shape=1.0).parameters()]
    torch.manual_seed(4)
    assert all(map(torch.equal, first, gg_init_(model, shape=1.0).parameters()))
    gg_init_(model, shape=1.0, generator=torch.Generator().manual_seed(4))
    assert all(map(torch.equal, first, model.parameters()))


def test_meta_device():
    with torch.device("meta"):
        model = nn.Linear(300, 200)
    assert gg_init_(model, std="fan_in").weight.is_meta
    model.to_empty(device="cpu")
    check_law(gg_init_(model, shape=1.0, std="fan_in").weight, 1 / math.sqrt(300), 1.0)
    with torch.device("meta"):
        half = nn.Sequential(nn.Linear(3, 3, device="cpu"), nn.Linear(3, 3))
    before = half[0].weight.clone()
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device"):
        gg_init_(half)
    assert torch.equal(half[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    layer = gg_init_(nn.Linear(300, 200, dtype=dtype), shape=1.0, std="fan_in")
    assert layer.weight.dtype == dtype
    assert float(layer.weight.detach().double().std()) == pytest.approx(1 / math.sqrt(300), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": 0}, "shape must be a number from 0.1 to 8"),
        ({"shape": math.nan}, "shape must be a number"),
        ({"shape": 8.5}, "got 8.5"),
        ({"shape": "laplace"}, "got 'laplace'"),
        ({"std": "xavier"}, "std must be 'model', 'fan_in', 'fan_out' or a positive number, got 'xavier'"),
        ({"std": 0.0}, "std must be a positive"),
        ({"std": -1}, "std must be a positive"),
        ({"std": math.nan}, "std must be a positive"),
        ({"std": None}, "std must be a positive"),
        ({"std": True}, "std must be a positive"),
        ({"gain": "swish"}, "gain must be a positive number or one of linear, sigmoid"),
        ({"gain": math.inf}, "gain must be a positive"),
        ({"gain": 0}, "gain must be a positive"),
        ({"gain": None}, "gain must be a positive"),
    ],
)
def test_bad_values(arguments, message):
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        GGInit(**arguments)
    with pytest.raises(ValueError, match=message):
        gg_init_(model, **arguments)
    assert torch.equal(model.weight, before)


def test_bad_models():
    class Own(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.table = nn.Parameter(torch.zeros(shape))

    class Other(nn.Linear):
        def reset_parameters(self):
            nn.init.zeros_(self.weight)

    for model, arguments, message in (
        (Own(3, 4), {}, "The standard deviation that Own gives table is not known: give std='fan_in'"),
        (Own(2, 3, 4), {"std": "fan_in"}, r"Which dimensions of table, \(2, 3, 4\), are inputs is not known"),
        (nn.Sequential(nn.Linear(3, 3), Other(3, 3)), {}, "that Other gives 1.weight is not known"),
    ):
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            gg_init_(model, **arguments)
        assert all(map(torch.equal, before, model.parameters()))  # nothing was drawn
    gg_init_(Own(3, 4), std="fan_in")
    gg_init_(Own(1, 3, 4), std="fan_in")  # a table with a leading dimension of size 1, as position embeddings
    gg_init_(Own(1, 1, 4), std="model")  # a class token is no matrix

    codes = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    codes[1].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    before = codes[0].weight.clone()
    with pytest.raises(TypeError, match=r"1\.weight is torch.uint8: .*dequantize"):
        gg_init_(codes, std="fan_in")
    assert torch.equal(codes[0].weight, before)


def test_from_dict():
    assert GGInit.from_dict({"shape": 1.0, "std": "fan_in"}) == GGInit(1.0, "fan_in")
    with pytest.raises(ValueError, match="Unknown GGInit key 'nu': the keys are shape, std, gain"):
        GGInit.from_dict({"nu": 1.0})
