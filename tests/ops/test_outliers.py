"""Outliers beside the codes: products and look-ups against the dense matrix, what PyTorch demands, damaged lists."""

import pytest
import torch
from torch.library import opcheck

from hf_gg import ops
from hf_gg.ops import outliers as module


def make(*shape, count=7, seed=0):
    """A sparse tensor as a list and dense."""
    torch.manual_seed(seed)
    dense = torch.zeros(shape)
    index = torch.randperm(dense.numel())[:count].sort().values.to(torch.int32)
    value = torch.randn(count) * 10
    dense.view(-1)[index.long()] = value
    return index, value, dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40), (0, 40)])
def test_linear(dtype, shape):
    index, value, dense = make(24, 40)
    x = torch.randn(shape).to(dtype)
    y = ops.outlier_linear(x, index, value, 24, 40)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(y.double(), x.double() @ dense.double().T, rtol=1e-6, atol=1e-5)
    back = torch.randn(*shape[:-1], 24).to(dtype)
    assert torch.allclose(
        ops.outlier_linear(back, index, value, 24, 40, transposed=True).double(),
        back.double() @ dense.double(),
        rtol=1e-6,
        atol=1e-5,
    )


def test_many_outliers_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    index, value, dense = make(24, 40, count=500)
    x = torch.randn(9, 40)
    assert torch.allclose(ops.outlier_linear(x, index, value, 24, 40), x @ dense.T, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped(transposed):
    index, value, dense = make(4, 24, 40, count=20)
    offsets = torch.tensor([3, 3, 8, 10], dtype=torch.int32)  # an empty group, and a row past the last one
    x = torch.randn(11, 24 if transposed else 40, requires_grad=True)
    y = ops.grouped_outlier_linear(x, index, value, offsets, 24, 40, transposed)
    expected = torch.zeros(11, 40 if transposed else 24)
    for group, (start, end) in enumerate([(0, 3), (3, 3), (3, 8), (8, 10)]):
        expected[start:end] = x[start:end].detach() @ (dense[group] if transposed else dense[group].T)
    assert torch.allclose(y, expected, atol=1e-4)
    [grad] = torch.autograd.grad(y, x, torch.ones_like(y))
    wanted = torch.zeros_like(grad)
    for group, (start, end) in enumerate([(0, 3), (3, 3), (3, 8), (8, 10)]):
        wanted[start:end] = dense[group].sum(1 if transposed else 0)
    assert torch.allclose(grad, wanted, atol=1e-4)


def test_derivatives():
    index, value, _ = make(6, 5)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for transposed, size in ((False, 5), (True, 6)):
        x = torch.randn(3, size, dtype=torch.float64, requires_grad=True)
        function = lambda x, t=transposed: ops.outlier_linear(x, index, value, 6, 5, t)  # noqa: E731
        assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


def test_rows():
    index, value, dense = make(50, 24, count=30)
    rows = torch.tensor([7, 0, 49, 7, 12])
    weight = torch.randn(5, 24)
    before = weight.clone()
    got = ops.put_outlier_rows(weight, rows, index, value)
    assert torch.equal(weight, before)
    assert torch.equal(got, torch.where(dense[rows] != 0, dense[rows], weight))
    assert ops.put_outlier_rows(weight[:0], rows[:0], index, value).shape == (0, 24)
    assert torch.equal(ops.put_outliers(torch.zeros(50, 24), index, value), dense)


def test_what_pytorch_demands_of_an_operator():
    index, value, _ = make(24, 40)
    x = torch.randn(3, 40, requires_grad=True)
    opcheck(torch.ops.hf_gg.outlier_linear, (x, index, value, 24, 40))
    opcheck(torch.ops.hf_gg.outlier_linear, (torch.randn(3, 24), index, value, 24, 40, True))
    index, value, _ = make(2, 24, 40)
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    opcheck(torch.ops.hf_gg.grouped_outlier_linear, (x, index, value, offsets, 24, 40))
    opcheck(torch.ops.hf_gg.put_outlier_rows, (torch.randn(2, 40), torch.tensor([3, 3]), index, value))


def test_damaged_lists():
    index, value, dense = make(24, 40)
    codes = torch.where(dense != 0, 0, 5).to(torch.uint8)
    ops.check_outliers("up.weight", codes, index, value)
    ops.check_outliers("up.weight", codes, index[:0], value[:0])

    def refused(match, index=index, value=value, codes=codes):
        with pytest.raises(ValueError, match=rf"up\.weight_outlier_\w+.*{match}"):
            ops.check_outliers("up.weight", codes, index, value)

    refused("not int32 and float32", value=value.bfloat16())
    refused("not int32 and float32", index=index.to(torch.int16))
    refused("differ in length", value=value[1:])
    refused("differ in length", index=index.view(1, -1))
    refused("ascending", index=index.flip(0))
    refused("ascending", index=index[[0, 0, 2, 3, 4, 5, 6]])
    refused("960 codes", index=torch.cat([index[:-1], torch.tensor([960])]).int())
    refused("960 codes", index=torch.cat([torch.tensor([-1]), index[1:]]).int())
    refused("NaN or infinity", value=torch.cat([value[1:], torch.tensor([torch.nan])]))
    refused("a code other than 0", codes=torch.full_like(codes, 5))
