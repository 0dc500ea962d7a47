"""The operators: values, gradients, what PyTorch demands of an operator, and errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from hf_gg import ops
from hf_gg.formats import FORMATS, get_format
from hf_gg.ops import backends


BACKENDS = ["torch", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu" and not backends.cpu.available():
        pytest.skip(f"no compiled kernels: {backends.cpu.why_not()}")
    return request.param


def make(rows=24, columns=40, name="rf8", stack=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*stack, rows, columns, generator=generator) * 0.05
    codes, scale = get_format(name).quantize(weight)
    dense = get_format(name).decode(codes).double() * scale.double()
    return codes, scale, dense


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(backend, name, dtype):
    for stack in ((), (3,), (2, 3)):
        codes, scale, dense = make(name=name, stack=stack)
        assert torch.equal(ops.dequantize(codes, scale, name, dtype, backend), dense.float().to(dtype))
        # one scale a column, as in transposed experts
        transposed = ops.dequantize(codes.mT.contiguous(), scale.mT.contiguous(), name, dtype, backend)
        assert torch.equal(transposed, dense.float().to(dtype).mT)
        one = scale[..., :1, :].contiguous()
        assert torch.equal(
            ops.dequantize(codes, one, name, dtype, backend), (get_format(name).decode(codes) * one).to(dtype)
        )


@pytest.mark.parametrize("shape", [(40,), (1, 40), (5, 40), (2, 3, 40), (33, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(backend, shape, dtype):
    codes, scale, dense = make()
    torch.manual_seed(1)
    x, bias = torch.randn(shape).to(dtype), torch.randn(24).to(dtype)
    y = ops.linear(x, codes, scale, bias, "rf8", backend)
    expected = F.linear(x.double(), dense, bias.double())
    assert y.dtype == dtype and y.shape == (*shape[:-1], 24)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert torch.allclose(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(
        ops.linear(x, codes, scale, None, "rf8", backend).double(),
        expected - bias.double(),
        rtol=tolerance,
        atol=tolerance,
    )


def test_linear_takes_any_strides(backend):
    codes, scale, dense = make()
    x = torch.randn(40, 6).T
    assert torch.allclose(ops.linear(x, codes, scale, None, "rf8", backend).double(), x.double() @ dense.T, atol=1e-5)
    wide = torch.zeros(24, 80, dtype=torch.uint8)
    wide[:, ::2] = codes
    assert torch.equal(
        ops.linear(x, wide[:, ::2], scale, None, "rf8", backend), ops.linear(x, codes, scale, None, "rf8", backend)
    )


def test_gradients_equal_those_of_the_dense_layer(backend):
    codes, scale, dense = make()
    x = torch.randn(3, 5, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    grad = torch.randn(3, 5, 24)
    ops.linear(x, codes, scale, bias, "rf8", backend).backward(grad)
    assert torch.allclose(x.grad.double(), grad.double() @ dense, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)


def test_second_derivatives():
    codes, scale, _ = make(6, 5)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    function = lambda x, bias: ops.linear(x, codes, scale, bias, "rf8", "torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


def test_backward_keeps_codes_and_no_weight(backend):
    codes, scale, _ = make(64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.linear(x, codes, scale, None, "rf8", backend)
    assert sorted(t.dtype for t in kept if t.numel() >= 64 * 64) == [torch.uint8]


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear(backend, transposed):
    codes, scale, dense = make(stack=(4,))
    x = torch.randn(11, 40, requires_grad=True)
    offsets = torch.tensor([3, 3, 8, 10], dtype=torch.int32)  # an empty group, and a row past the last one
    args = (codes.mT.contiguous(), scale.mT.contiguous()) if transposed else (codes, scale)
    y = ops.grouped_linear(x, *args, offsets, "rf8", transposed, backend)
    expected = torch.zeros(11, 24, dtype=torch.float64)
    grad, grad_x = torch.randn(11, 24), torch.zeros(11, 40, dtype=torch.float64)
    for group, (start, end) in enumerate([(0, 3), (3, 3), (3, 8), (8, 10)]):
        expected[start:end] = x[start:end].detach().double() @ dense[group].T
        grad_x[start:end] = grad[start:end].double() @ dense[group]
    assert torch.allclose(y.double(), expected, atol=1e-5)
    y.backward(grad)
    assert torch.allclose(x.grad.double(), grad_x, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    codes, scale, _ = make()
    stacked, stacked_scale, _ = make(stack=(3,))
    x = torch.randn(2, 3, 40, requires_grad=requires_grad)
    bias = torch.randn(24, requires_grad=requires_grad)
    hf_gg = torch.ops.hf_gg
    opcheck(hf_gg.dequantize.default, (codes, scale, "rf8", torch.bfloat16, backend))
    opcheck(hf_gg.linear.default, (x, codes, scale, bias, "rf8", backend))
    opcheck(hf_gg.linear.default, (x, codes, scale, None, "rf8", backend))
    grad = torch.randn(2, 3, 24, requires_grad=requires_grad)
    opcheck(hf_gg.linear_grad_input.default, (grad, codes, scale, "rf8", backend))
    offsets = torch.tensor([1, 4, 5], dtype=torch.int32)
    rows = torch.randn(6, 40, requires_grad=requires_grad)
    opcheck(hf_gg.grouped_linear.default, (rows, stacked, stacked_scale, offsets, "rf8", False, backend))


def test_compiles_without_a_graph_break():
    codes, scale, dense = make()

    @torch.compile(fullgraph=True, dynamic=True)
    def function(x):
        return ops.linear(x.sin(), codes, scale, None, "rf8").cos().sum()

    for rows in (3, 7):
        x = torch.randn(rows, 40, requires_grad=True)
        y = copy.deepcopy(x)
        function(x).backward()
        (y.sin() @ dense.float().T).cos().sum().backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-5)


def test_outputs_are_written_whole(backend, monkeypatch):
    real = torch.empty

    def poisoned(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    codes, scale, dense = make(63, 70)
    x = torch.randn(17, 70)
    monkeypatch.setattr(torch, "empty", poisoned)
    for rows in (1, 3, 17):
        y = ops.linear(x[:rows], codes, scale, None, "rf8", backend)
        assert torch.allclose(y.double(), x[:rows].double() @ dense.T, atol=1e-5)
    assert torch.equal(ops.dequantize(codes, scale, "rf8", backend=backend), dense.float())


def test_quantize_equals_the_format(backend, monkeypatch):
    monkeypatch.setenv("HF_GG_BACKEND", backend)
    torch.manual_seed(0)
    for name in FORMATS:
        for scale in ("row", "tensor") if name == "grid" else ("row", "absmax", "pow2", "tensor", "unit"):
            for weight in (torch.randn(33, 70) * 0.02, torch.randn(3, 8, 5), torch.randn(9, 16).bfloat16()):
                codes, scales = ops.quantize(weight, get_format(name), scale)
                expected = get_format(name).quantize(weight, scale=scale)
                assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        ops.quantize(torch.full((2, 2), torch.nan), get_format("rf8"))


def test_errors_name_the_operator_and_the_argument():
    codes, scale, _ = make()
    x = torch.randn(2, 40)
    with pytest.raises(ValueError, match=r"hf_gg::linear.*must be 40.*\(2, 39\)"):
        ops.linear(x[:, 1:], codes, scale)
    with pytest.raises(TypeError, match="hf_gg::linear: codes must be uint8, got torch.int8"):
        ops.linear(x, codes.view(torch.int8), scale)
    with pytest.raises(TypeError, match="scale must be float32, got torch.bfloat16"):
        ops.linear(x, codes, scale.bfloat16())
    with pytest.raises(TypeError, match="input must be floating point, got torch.int64"):
        ops.linear(x.long(), codes, scale)
    with pytest.raises(ValueError, match=r"scale of shape \(23, 1\) does not fit codes of shape \(24, 40\)"):
        ops.linear(x, codes, scale[1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(24,\), got \(40,\)"):
        ops.linear(x, codes, scale, torch.ones(40))
    with pytest.raises(ValueError, match="Unknown weight format 'fp4'"):
        ops.linear(x, codes, scale, format="fp4")
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        ops.linear(x, codes, scale, backend="cuda")
    with pytest.raises(TypeError, match="dtype must be floating point"):
        ops.dequantize(codes, scale, dtype=torch.int32)
    stacked, stacked_scale, _ = make(stack=(3,))
    with pytest.raises(ValueError, match="offsets must hold one end a group, 3"):
        ops.grouped_linear(x, stacked, stacked_scale, torch.tensor([1, 2], dtype=torch.int32))


def test_a_backend_asked_for_by_name_fails_loudly(monkeypatch):
    codes, scale, _ = make()
    x = torch.randn(2, 40)
    monkeypatch.setattr(backends.cpu, "available", lambda: False)
    monkeypatch.setattr(backends.cpu, "why_not", lambda: "no compiler")
    with pytest.raises(RuntimeError, match="'cpu' is not available: no compiler"):
        ops.linear(x, codes, scale, backend="cpu")
    monkeypatch.setattr(backends.triton_backend, "available", lambda: False)
    monkeypatch.setattr(backends.triton_backend, "why_not", lambda: "no device")
    with pytest.raises(RuntimeError, match="'triton' is not available: no device"):
        ops.linear(x, codes, scale, backend="triton")
    ops.linear(x, codes, scale)
    monkeypatch.setenv("HF_GG_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="no compiler"):
        ops.linear(x, codes, scale)
