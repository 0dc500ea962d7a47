"""Modules over a grid, with and without outliers."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_modules import experts, routing
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_gg.formats import StepRule
from hf_gg.nn import RF8Embedding, RF8Experts, RF8Linear


STEP = StepRule("tensor", step=2.0**-7)  # a weight of 1 and more is an outlier


def spiky_linear(rows=48, columns=64):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        for place, value in (((3, 5), 9.0), ((3, 6), -1.5), ((rows - 1, columns - 1), -7.3)):
            linear.weight[place] = value
    return linear


def test_linear_with_outliers_equals_the_dense_one():
    linear = spiky_linear()
    module = RF8Linear.from_linear(linear, format="grid", scale=STEP)
    assert module.weight_outlier_index.tolist() == [3 * 64 + 5, 3 * 64 + 6, 47 * 64 + 63]
    assert not any(p.requires_grad for p in (module.weight_outlier_index, module.weight_outlier_value))
    weight = module.dequantize()
    beyond = linear.weight.abs() > 1
    assert torch.equal(weight[beyond], linear.weight[beyond])
    assert float((weight - linear.weight.detach()).abs().max()) <= 2.0**-8
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
        y, expected = module(x), F.linear(x.double(), weight.double(), linear.bias.double())
        assert y.dtype == dtype and torch.allclose(y.double(), expected, rtol=tolerance, atol=10 * tolerance)
        grad = torch.randn_like(y)
        [got], [wanted] = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad.double())
        assert got.dtype == dtype and torch.allclose(got, wanted, rtol=tolerance, atol=10 * tolerance)
    y = module(torch.randn(3, 64))
    y += 1  # no view that autograd would guard
    assert torch.allclose(module.to_linear()(x.float()), module(x.float()), atol=1e-5)


def test_no_outliers_no_list():
    module = RF8Linear.from_linear(nn.Linear(64, 48), format="grid")
    assert module.weight_outlier_index is None and module.weight_outlier_value is None
    assert set(module.state_dict()) == {"weight", "weight_scale", "bias"}


def test_conv1d():
    torch.manual_seed(0)
    conv = Conv1D(12, 12)
    with torch.no_grad():
        conv.weight[2, 7] = 50.0
    module = RF8Linear.from_linear(conv, format="grid", scale=STEP)
    assert module.weight_outlier_index.tolist() == [7 * 12 + 2]
    x = torch.randn(3, 12)
    assert (module(x) - conv(x)).norm() / conv(x).norm() < 0.05
    assert module.dequantize()[7, 2] == 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_break():
    module = RF8Linear.from_linear(spiky_linear(), format="grid", scale=STEP)
    embedding = RF8Embedding.from_embedding(nn.Embedding(50, 24), format="grid", scale=StepRule(step=0.02))
    stack = RF8Experts.convert_(experts("mixtral"), format="grid", scale=StepRule(step=0.002))
    assert stack.gate_up_proj_outlier_index is not None and embedding.weight_outlier_index is not None
    hidden, top, weight = routing()
    for f, args in ((module, (torch.randn(5, 64),)), (embedding, (torch.tensor([[7, 0], [7, 49]]),))):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args), f(*args))
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(hidden, top, weight), stack(hidden, top, weight), atol=1e-6)


def test_embedding_with_outliers():
    torch.manual_seed(0)
    table = nn.Embedding(50, 24)
    with torch.no_grad():
        table.weight[7, 3], table.weight[7, 20], table.weight[49, 0] = 400, -500, 300
    module = RF8Embedding.from_embedding(table, format="grid", scale=StepRule("tensor", step=0.05))
    assert module.weight_outlier_index.tolist() == [7 * 24 + 3, 7 * 24 + 20, 49 * 24]
    index = torch.tensor([[7, 0, 49], [7, 7, 3]])
    assert torch.equal(module(index), module.dequantize()[index])
    assert module(index)[0, 0, 20] == -500
    assert module(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 24)
    half = copy.deepcopy(module).bfloat16()
    assert half(index).dtype == torch.bfloat16 and half.weight_outlier_value.dtype == torch.float32


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_with_outliers_equal_the_dense_ones(kind):
    dense, module = experts(kind), experts(kind)
    with torch.no_grad():
        for one in (dense, module):
            one.gate_up_proj[1, 3, 5], one.gate_up_proj[3, -1, -1], one.down_proj[0, 2, 9] = 5.0, -4.0, 3.0
    RF8Experts.convert_(module, format="grid", scale=StepRule(step=2.0**-6))
    for name in module.quantized_names:
        weight = module.dequantize(name)
        assert float((weight - dense._parameters[name].detach()).abs().max()) <= 2.0**-7
        with torch.no_grad():
            dense._parameters[name].copy_(weight)
    assert module.dequantize("gate_up_proj")[3, -1, -1] == -4 and module.dequantize("down_proj")[0, 2, 9] == 3
    index = module.gate_up_proj_outlier_index
    assert bool((index[1:] > index[:-1]).all())
    hidden, top, weight = routing(tokens=30)
    expected, got = dense(hidden, top, weight), module(hidden, top, weight)
    assert torch.allclose(got, expected, atol=1e-4)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (hidden, weight), grad)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight), grad), wanted):
        assert torch.allclose(a, b, atol=1e-4)
    # again, with the steps that it has: the same codes and the same list
    before = {name: p.clone() for name, p in module.named_parameters()}
    for name in module.quantized_names:
        module.requantize_(name, module.dequantize(name))
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    restored = copy.deepcopy(module).restore_()
    assert not any("outlier" in name for name, _ in restored.named_parameters())
    assert torch.allclose(restored(hidden, top, weight), got, atol=1e-4)


def test_steps_that_are_given():
    linear, steps = spiky_linear(), torch.rand(48, 1) * 0.01 + 0.001
    module = RF8Linear.from_linear(linear, format="grid", scale=steps)
    assert torch.equal(module.weight_scale, steps)
    stack = experts("gpt_oss")
    given = {name: torch.full((4, size, 1), 0.01) for name, size in (("gate_up_proj", 48), ("down_proj", 32))}
    RF8Experts.convert_(stack, format="grid", scale=given)
    assert (stack.gate_up_proj_scale == 0.01).all() and stack.gate_up_proj_scale.shape == (4, 1, 48)


def test_requantizing_keeps_steps_and_replaces_outliers():
    module = RF8Linear.from_linear(spiky_linear(), format="grid", scale=STEP)
    steps, before = module.weight_scale.clone(), copy.deepcopy(module.state_dict())
    weight = module.dequantize()
    module.requantize_(weight)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    weight[3, 5], weight[0, 0] = 0.5, 3.0
    module.requantize_(weight)
    # row 3 has lost what was most of it, so its step is finer now
    assert module.weight_outlier_index.tolist() == [0, 3 * 64 + 5, 3 * 64 + 6, 47 * 64 + 63]
    assert module.weight_scale[3] < steps[3] / 2
    assert torch.equal(module.weight_scale[:3], steps[:3])
    assert float((module.dequantize() - weight).abs().max()) <= float(module.weight_scale.max()) / 2 * 1.001
    module.requantize_(weight.clamp(-0.1, 0.1))
    assert module.weight_outlier_index is None
    kept = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        module.requantize_(torch.full((48, 64), math.nan))
    assert all(torch.equal(kept[key], value) for key, value in module.state_dict().items())
    empty = RF8Linear(64, 48, format="grid", scale=StepRule(snr=30.0))
    empty.requantize_(weight.clamp(-0.1, 0.1))
    assert 1e-4 < float(empty.weight_scale.median()) < 0.01


def test_copies_pickles_casts_and_state_dicts():
    module = RF8Linear.from_linear(spiky_linear(), format="grid", scale=STEP)
    x = torch.randn(2, 64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    fresh = RF8Linear(64, 48, format="grid")
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))
    plain = RF8Linear.from_linear(nn.Linear(64, 48), format="grid")
    fresh.load_state_dict(plain.state_dict())  # and back to none
    assert fresh.weight_outlier_index is None and torch.equal(fresh(x), plain(x))
    value = module.weight_outlier_value.clone()
    for cast in ("half", "bfloat16", "double"):
        getattr(module, cast)()
        assert module.weight_outlier_value.dtype == torch.float32 and torch.equal(module.weight_outlier_value, value)
        assert module.weight_outlier_index.dtype == torch.int32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.float()(x).dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(ValueError, match="Unknown scale 'pow2' for a grid"):
        RF8Linear.from_linear(nn.Linear(4, 4), format="grid", scale="pow2")
    with pytest.raises(ValueError, match=r"layers\.3\.up\.weight: 5.0 bits a weight cannot be reached"):
        RF8Linear.from_linear(nn.Linear(4, 4), format="grid", scale=StepRule(bits=5.0), name="layers.3.up")
