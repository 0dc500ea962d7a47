"""RF8Linear, RF8Embedding and RF8Experts on their own."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from hf_gg.formats import FORMATS, get_format
from hf_gg.nn import RF8Embedding, RF8Experts, RF8Linear


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(name, bias):
    torch.manual_seed(0)
    linear = nn.Linear(37, 21, bias=bias)
    module = RF8Linear.from_linear(linear, format=name)
    codes, scale = get_format(name).quantize(linear.weight.detach())
    assert isinstance(module, nn.Linear)
    assert torch.equal(module.weight, codes) and torch.equal(module.weight_scale, scale)
    assert not module.weight.requires_grad and not module.weight_scale.requires_grad
    assert module.bias is linear.bias
    weight = module.dequantize()
    assert weight.shape == (21, 37) and weight.dtype == torch.float32
    x = torch.randn(2, 5, 37)
    assert torch.allclose(module(x), F.linear(x, weight, linear.bias), atol=1e-6)
    assert torch.allclose(module.to_linear()(x), module(x), atol=1e-6)
    assert f"format={name}" in repr(module) and "in_features=37" in repr(module)
    assert module.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_conv1d_is_turned_round():
    torch.manual_seed(0)
    conv = Conv1D(12, 12)  # square: a wrong orientation would go unnoticed by its shape
    module = RF8Linear.from_linear(conv)
    assert module.fan_in_fan_out and (module.nf, module.nx) == (12, 12)
    x = torch.randn(3, 12)
    noise = (module(x) - conv(x)).norm() / conv(x).norm()
    assert noise < 0.05
    assert torch.allclose(module(x), x @ module.dequantize().T + conv.bias, atol=1e-6)


def test_scale_modes_and_requantize():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    for scale in ("row", "absmax", "pow2", "tensor", "tensor-pow2", "unit"):
        module = RF8Linear.from_linear(linear, scale=scale)
        assert module.weight_scale.shape == (8, 1)
        other = RF8Linear.from_linear(nn.Linear(16, 8), scale=scale)
        assert other.requantize_(linear.weight.detach()) is other
        assert torch.equal(other.weight, module.weight) and torch.equal(other.weight_scale, module.weight_scale)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"shape \(8, 16\), got \(16, 8\)"):
        module.requantize_(linear.weight.detach().T)
    with pytest.raises(ValueError, match="NaN"):
        module.requantize_(torch.full((8, 16), math.nan))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_leave_codes_and_scales(cast):
    module = RF8Linear.from_linear(nn.Linear(16, 8))
    codes, scale = module.weight.clone(), module.weight_scale.clone()
    getattr(module, cast)()
    assert torch.equal(module.weight, codes) and torch.equal(module.weight_scale, scale)
    assert module.weight_scale.dtype == torch.float32 and module.bias.dtype != torch.float32
    assert module(torch.randn(2, 16, dtype=module.bias.dtype)).dtype == module.bias.dtype
    assert module.to("meta").weight.is_meta


def test_autocast():
    module = RF8Linear.from_linear(nn.Linear(16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 16)).dtype == torch.bfloat16


def test_copies_pickles_and_state_dicts():
    module = RF8Linear.from_linear(nn.Linear(16, 8), format="rf8x")
    x = torch.randn(2, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    fresh = RF8Linear(16, 8, format="rf8x")
    assert torch.equal(fresh(x), torch.zeros(2, 8))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))


def test_trains_only_what_is_not_codes():
    module = RF8Linear.from_linear(nn.Linear(16, 8))
    x = torch.randn(3, 16, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and module.bias.grad.abs().sum() > 0
    assert module.weight.grad is None and module.weight_scale.grad is None


def test_embedding():
    torch.manual_seed(0)
    table = nn.Embedding(50, 24, padding_idx=0)
    module = RF8Embedding.from_embedding(table, format="rf8x")
    index = torch.tensor([[0, 3, 3], [49, 7, 1]])
    assert torch.equal(module(index), module.dequantize()[index])
    assert (module(index) - table(index)).norm() / table(index).norm() < 0.04
    assert module(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 24)
    assert module.bfloat16()(index).dtype == torch.bfloat16 and module.weight_scale.dtype == torch.float32
    assert torch.equal(module.to_embedding(torch.float32).weight, module.dequantize())
    assert "format=rf8x" in repr(module)


def experts(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=4)
        module = MixtralExperts(config)
    else:
        config = GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=4)
        module = GptOssExperts(config)
    config._experts_implementation = "eager"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def routing(tokens=9, k=2, seed=1):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 32, requires_grad=True)
    weight, index = torch.randn(tokens, 4).softmax(-1).topk(k)
    return hidden, index, weight.detach().requires_grad_()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_equal_the_dense_ones(kind):
    dense, module = experts(kind), experts(kind)
    assert RF8Experts.convert_(module) is module
    assert isinstance(module, RF8Experts) and isinstance(module, type(dense))
    with torch.no_grad():
        for name in module.quantized_names:
            dense._parameters[name].copy_(module.dequantize(name))
    for index in range(2):
        hidden, top, weight = routing(tokens=(9, 1)[index])
        expected, got = dense(hidden, top, weight), module(hidden, top, weight)
        assert torch.allclose(got, expected, atol=1e-5)
        grad = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (hidden, weight), grad, retain_graph=True)
        found = torch.autograd.grad(got, (hidden, weight), grad)
        for a, b in zip(found, wanted):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_runs_the_same(implementation):
    module = RF8Experts.convert_(experts("mixtral"))
    hidden, top, weight = routing()
    expected = module(hidden, top, weight)
    module.config._experts_implementation = implementation
    assert torch.equal(module(hidden, top, weight), expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_of_another_process_add_nothing(kind):
    module = RF8Experts.convert_(experts(kind))
    hidden, top, weight = routing()
    away = top == 3
    expected = module(hidden, top, weight.masked_fill(away, 0))
    module.num_experts = 3
    for name in list(module._parameters):
        module._parameters[name] = nn.Parameter(module._parameters[name][:3].clone(), requires_grad=False)
    got = module(hidden, top, weight)
    assert torch.isfinite(got).all() and torch.allclose(got, expected, atol=1e-6)


def test_experts_restore_pickle_and_cast():
    module = RF8Experts.convert_(experts("gpt_oss"))
    hidden, top, weight = routing()
    expected = module(hidden, top, weight)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module) and torch.equal(other(hidden, top, weight), expected)
    half = copy.deepcopy(module).bfloat16()
    assert half.gate_up_proj_scale.dtype == torch.float32
    assert torch.equal(half.gate_up_proj_scale, module.gate_up_proj_scale)
    assert tuple(module.gate_up_proj_scale.shape) == (4, 1, 48)
    restored = copy.deepcopy(module).restore_()
    assert type(restored) is GptOssExperts and not hasattr(restored, "format")
    assert torch.allclose(restored(hidden, top, weight), expected, atol=1e-5)
    again = copy.deepcopy(module)
    again.requantize_("down_proj", module.dequantize("down_proj"))
    assert torch.allclose(again.dequantize("down_proj"), module.dequantize("down_proj"), atol=1e-6)


def test_bad_input():
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Unknown weight format"):
        RF8Linear.from_linear(linear, format="int8")
    with pytest.raises(ValueError, match="Unknown backend 'gpu'"):
        RF8Linear.from_linear(linear, backend="gpu")
    with pytest.raises(ValueError, match="Unknown scale"):
        RF8Linear.from_linear(linear, scale="col")
    with pytest.raises(TypeError, match="nn.Linear or Conv1D, got Conv2d"):
        RF8Linear.from_linear(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"up\.weight is quantized already"):
        RF8Linear.from_linear(RF8Linear.from_linear(linear), name="up")
    with torch.no_grad():
        linear.weight[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"layers\.3\.up\.weight: the weight holds NaN or infinity"):
        RF8Linear.from_linear(linear, name="layers.3.up")
    with pytest.raises(TypeError, match="float8"):
        RF8Linear.from_linear(nn.Linear(4, 4).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="Linear is not a module of fused experts"):
        RF8Experts.convert_(nn.Linear(2, 2))
    module = experts("mixtral")
    with torch.no_grad():
        module.down_proj[0, 0, 0] = math.nan
    before = type(module)
    with pytest.raises(ValueError, match="down_proj: the weight holds NaN"):
        RF8Experts.convert_(module)
    assert type(module) is before and module.gate_up_proj.dtype == torch.float32
    with pytest.raises(ValueError, match="quantized already"):
        RF8Experts.convert_(RF8Experts.convert_(experts("mixtral")))
