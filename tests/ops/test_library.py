"""The operators: values, gradients, what PyTorch demands of an operator, and errors."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from hf_gg import ops
from hf_gg.formats import FORMATS, get_format
from hf_gg.ops import backends, few_rows
from hf_gg.ops.cpu import boxed


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
    with pytest.raises(TypeError, match="hf_gg::linear: bias must be floating point and on cpu, got torch.int64"):
        ops.linear(x, codes, scale, torch.ones(24, dtype=torch.int64))
    stacked, stacked_scale, _ = make(stack=(3,))
    with pytest.raises(ValueError, match="offsets must hold one end a group, 3"):
        ops.grouped_linear(x, stacked, stacked_scale, torch.tensor([1, 2], dtype=torch.int32))
    with pytest.raises(TypeError, match="hf_gg::grouped_linear: offsets must be int32 or int64, got torch.float32"):
        ops.grouped_linear(x, stacked, stacked_scale, torch.ones(3))


def test_a_backend_asked_for_by_name_fails_loudly(monkeypatch):
    codes, scale, _ = make()
    x = torch.randn(2, 40)
    monkeypatch.setattr(backends.cpu, "available", lambda: False)
    monkeypatch.setattr(backends.cpu, "why_not", lambda: "no compiler")
    monkeypatch.setattr(few_rows, "format_number", lambda name: None)  # registered in this process already
    with pytest.raises(RuntimeError, match="'cpu' is not available: no compiler"):
        ops.linear(x, codes, scale, backend="cpu")
    monkeypatch.setattr(backends.triton_backend, "available", lambda: False)
    monkeypatch.setattr(backends.triton_backend, "why_not", lambda: "no device")
    with pytest.raises(RuntimeError, match="'triton' is not available: no device"):
        ops.linear(x, codes, scale, backend="triton")
    monkeypatch.setenv("HF_GG_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="no compiler"):
        ops.linear(x, codes, scale)


def test_auto_falls_back_once_with_one_warning(monkeypatch):
    codes, scale, dense = make()
    x = torch.randn(2, 40)
    monkeypatch.setattr(backends.cpu, "available", lambda: False)
    monkeypatch.setattr(backends.cpu, "why_not", lambda: "a reason of this test")
    monkeypatch.setattr(few_rows, "format_number", lambda name: None)
    backends._fall_back.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"kernels for cpu cannot run here \(a reason of this test\): plain torch"):
        y = ops.linear(x, codes, scale)
    assert torch.allclose(y.double(), x.double() @ dense.T, atol=1e-5)
    ops.linear(x, codes, scale)  # a second warning would be an error
    monkeypatch.setattr(backends.cpu, "why_not", lambda: backends.cpu.TURNED_OFF)
    ops.linear(x, codes, scale)  # whoever turned them off knows
    backends._fall_back.cache_clear()


def test_a_triton_kernel_that_does_not_compile(monkeypatch):
    codes, scale, dense = make()
    x, stacked = torch.randn(2, 40), make(stack=(2,))
    offsets = torch.tensor([1, 2], dtype=torch.int32)

    def broken(*arguments):
        raise backends.triton_backend.KernelError("the Triton kernel x cannot be compiled, take backend 'torch'")

    monkeypatch.setattr(backends.triton_backend, "available", lambda: True)
    for name in ("linear", "linear_grad_input", "dequantize", "grouped_linear"):
        monkeypatch.setattr(backends.triton_backend, name, broken)
    calls = {
        "linear": lambda backend: ops.linear(x, codes, scale, backend=backend),
        "dequantize": lambda backend: ops.dequantize(codes, scale, backend=backend),
        "linear_grad_input": lambda b: torch.ops.hf_gg.linear_grad_input(x[:, :24], codes, scale, "rf8", b),
        "grouped_linear": lambda b: ops.grouped_linear(x, *stacked[:2], offsets, backend=b),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"hf_gg::{name}: the Triton kernel x cannot be compiled"):
            call("triton")
    # on `auto` it is one warning, and the right result
    monkeypatch.setattr(few_rows, "format_number", lambda name: None)  # the kernel in C would come first
    monkeypatch.setattr(backends, "resolve", lambda *arguments: "triton")
    monkeypatch.setattr(backends, "_failed", set())
    backends._fall_back.cache_clear()
    with pytest.warns(RuntimeWarning) as caught:
        first = ops.linear(x, codes, scale)
    assert [str(w.message)[:38] for w in caught] == ["hf_gg: the fast kernels for this GPU c"] * 2  # and dequantize
    assert torch.allclose(first.double(), x.double() @ dense.T, atol=1e-5)
    assert torch.equal(ops.linear(x, codes, scale), first)
    backends._fall_back.cache_clear()


def test_a_backend_asked_for_by_name_names_the_operator_and_what_it_takes(monkeypatch):
    codes, scale, _ = make()
    stacked, stacked_scale, _ = make(stack=(2,))
    offsets = torch.tensor([1, 2], dtype=torch.int32)
    calls = {
        "linear": lambda backend, dtype: ops.linear(torch.ones(2, 40, dtype=dtype), codes, scale, backend=backend),
        "dequantize": lambda backend, dtype: ops.dequantize(codes, scale, dtype=dtype, backend=backend),
        "linear_grad_input": lambda backend, dtype: torch.ops.hf_gg.linear_grad_input(
            torch.ones(2, 24, dtype=dtype), codes, scale, "rf8", backend
        ),
        "grouped_linear": lambda backend, dtype: ops.grouped_linear(
            torch.ones(2, 40, dtype=dtype), stacked, stacked_scale, offsets, backend=backend
        ),
    }
    monkeypatch.setattr(few_rows, "format_number", lambda name: None)  # registered in this process already
    for module in (backends.cpu, backends.triton_backend):
        monkeypatch.setattr(module, "available", lambda: True)
    for name, call in calls.items():
        for backend in ("cpu", "triton"):
            with pytest.raises(
                TypeError,
                match=f"hf_gg::{name}: backend '{backend}' takes float32, bfloat16, float16, got torch.float64",
            ):
                call(backend, torch.float64)
        assert call("auto", torch.float64).dtype == torch.float64  # plain torch takes it
    monkeypatch.setenv("HF_GG_BACKEND", "cpu")
    with pytest.raises(TypeError, match="hf_gg::linear: backend 'cpu' takes"), torch.no_grad():
        calls["linear"]("auto", torch.float64)
    monkeypatch.setattr(backends.cpu, "available", lambda: False)
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"hf_gg::{name}: backend 'cpu' is not available"):
            call("auto", torch.float32)
    monkeypatch.setenv("HF_GG_BACKEND", "")  # as if it were not there
    assert calls["linear"]("torch", torch.float32).shape == (2, 24)
    assert backends.resolve("auto", torch.device("meta"), "linear", torch.float32) == "torch"


@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_without_memory_is_an_error_and_not_what_lies_in_memory(grad):
    codes, scale, _ = make()
    stacked, stacked_scale, _ = make(stack=(2,))
    x, bias, offsets = torch.randn(2, 40), torch.ones(24), torch.tensor([1, 2], dtype=torch.int32)
    with torch.set_grad_enabled(grad):
        for index in range(4):
            arguments = [x, codes, scale, bias]
            arguments[index] = arguments[index].to("meta")
            with pytest.raises((ValueError, TypeError), match=r"hf_gg::linear: .* on (meta|cpu)"):
                ops.linear(*arguments)
            arguments = [x, stacked, stacked_scale, offsets]
            arguments[index] = arguments[index].to("meta")
            with pytest.raises(ValueError, match=r"hf_gg::grouped_linear: .* on (meta|cpu)"):
                ops.grouped_linear(*arguments)
        for arguments in ((codes.to("meta"), scale), (codes, scale.to("meta"))):
            with pytest.raises(ValueError, match=r"hf_gg::dequantize: codes are on"):
                ops.dequantize(*arguments)
            with pytest.raises(ValueError, match=r"hf_gg::linear_grad_input: codes are on"):
                torch.ops.hf_gg.linear_grad_input(bias, *arguments, "rf8")
        assert ops.linear(*(t.to("meta") for t in (x, codes, scale, bias))).shape == (2, 24)


def test_8_bit_inputs_are_refused(backend):
    codes, scale, _ = make()
    with pytest.raises(TypeError, match="hf_gg::linear: the input must be float64, .*got torch.float8_e4m3fn"):
        ops.linear(torch.ones(2, 40).to(torch.float8_e4m3fn), codes, scale, backend=backend)


@pytest.mark.parametrize("offsets", [[2, 9], [-1, 5]])
def test_offsets_past_the_rows_are_refused(backend, offsets):
    codes, scale, _ = make(stack=(2,))
    for transposed in (False, True):
        arguments = (codes.mT, scale.mT) if transposed else (codes, scale)
        with pytest.raises(ValueError, match="hf_gg::grouped_linear: offsets must lie in 0 to 5, the rows"):
            ops.grouped_linear(torch.ones(5, 40), *arguments, torch.tensor(offsets), "rf8", transposed, backend)


def test_widths_of_zero(backend):
    codes, scale, _ = make()
    bias = torch.ones(24, requires_grad=True)
    x = torch.zeros(3, 2, 0, requires_grad=True)
    y = ops.linear(x, codes[:, :0], scale, bias, backend=backend)
    assert torch.equal(y, torch.ones(3, 2, 24))
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(bias.grad, torch.full((24,), 6.0))
    with torch.no_grad():
        assert torch.equal(ops.linear(x, codes[:, :0], scale, bias, backend=backend), y)
    x, bias = torch.ones(3, 2, 40, requires_grad=True), torch.ones(0, requires_grad=True)
    y = ops.linear(x, codes[:0], scale[:0], bias, backend=backend)
    assert y.shape == (3, 2, 0)
    y.sum().backward()
    assert not x.grad.any() and bias.grad.shape == (0,)


# --- the short way of few rows on a CPU ---


@pytest.fixture
def short_way():
    if few_rows.format_number("rf8") is None:
        pytest.skip("no kernel is registered with PyTorch here")


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_short_way_gives_what_the_long_way_gives(short_way, name, dtype):
    for rows, columns in ((24, 40), (63, 1000), (3, 11008), (1, 1)):
        codes, scale, _ = make(rows, columns, name)
        for shape in ((columns,), (1, columns), (2, 3, columns), (16, columns)):
            x = torch.randn(shape).to(dtype)
            for bias in (None, torch.randn(rows), torch.randn(rows).to(dtype)):
                expected = backends.linear(x, codes, scale, bias, get_format(name), "cpu")
                torch.full(expected.shape, torch.nan, dtype=dtype)  # what the allocator hands out next holds NaN
                found = few_rows.linear(x, codes, scale, bias, name, "auto")
                assert found.dtype == dtype and found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_short_way_with_one_scale_a_matrix(short_way, rows):
    codes, _, _ = make()
    # what lies behind the one scale is not another
    one, x = torch.tensor([[0.5], [torch.nan]]).repeat(12, 1)[:1], torch.randn(rows, 40)
    expected = x.double() @ (get_format("rf8").decode(codes).double() * 0.5).T
    assert torch.allclose(few_rows.linear(x, codes, one, None, "rf8", "auto").double(), expected, atol=1e-5)


def test_the_short_way_declines(short_way, monkeypatch):
    codes, scale, _ = make()
    x = torch.randn(3, 40)
    for arguments in (
        (x.double(), codes, scale, None),
        (torch.randn(17, 40), codes, scale, None),
        (x[:0], codes, scale, None),
        (torch.randn(40, 3).T, codes, scale, None),
        (x, torch.zeros(40, 24, dtype=torch.uint8).T, scale, None),
        (x[:, :39], codes, scale, None),
        (x, codes.int(), scale, None),
        (x, codes, scale.double(), None),
        (x, codes, scale[:3], None),
        (x, codes, scale, torch.ones(23)),
        (x, codes, scale, torch.ones(24, dtype=torch.int64)),
        (x, codes, scale, torch.ones(24, dtype=torch.float64)),
        (x, codes.to("meta"), scale.to("meta"), None),
    ):
        assert few_rows.linear(*arguments, "rf8", "auto") is None
    assert torch.ops.hf_gg.few_rows(x, codes, scale, None, 99) is None
    assert few_rows.linear(x, codes, scale, None, "rf8", "torch") is None
    monkeypatch.setenv("HF_GG_BACKEND", "torch")
    assert few_rows.linear(x, codes, scale, None, "rf8", "auto") is None
    monkeypatch.delenv("HF_GG_BACKEND")
    with torch.no_grad(), pytest.raises(ValueError, match=r"hf_gg::linear.*must be 40"):
        ops.linear(x[:, 1:], codes, scale)


def test_the_short_way_is_below_autograd(short_way, monkeypatch):
    codes, scale, dense = make()
    bias, x = torch.randn(24, requires_grad=True), torch.randn(2, 40)
    taken = []
    real = few_rows._few_rows
    monkeypatch.setattr(few_rows, "_few_rows", lambda *arguments: taken.append(1) or real(*arguments))
    learnt = ops.linear(x, codes, scale, bias)
    assert learnt.requires_grad and len(taken) == 1
    learnt.sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 2.0))
    with torch.no_grad():
        expected = ops.linear(x, codes, scale, bias)
        assert torch.equal(expected, learnt) and len(taken) == 2
        mapped = torch.func.vmap(lambda row: ops.linear(row, codes, scale, None))(x)
    assert torch.allclose(mapped.double(), x.double() @ dense.T, atol=1e-5)
    with torch.inference_mode():
        taken.clear()
        assert torch.equal(ops.linear(x, codes, scale, bias), expected) and len(taken) == 1


def test_the_short_way_under_compile(short_way, monkeypatch):
    codes, scale, _ = make()
    x, taken, real = torch.randn(2, 40), [], few_rows._few_rows
    monkeypatch.setattr(few_rows, "_few_rows", lambda *arguments: taken.append(1) or real(*arguments))
    compiled = torch.compile(lambda x: ops.linear(x.sin(), codes, scale).cos(), fullgraph=True)
    with torch.no_grad():
        found = compiled(x)
        assert taken  # by the graph
        assert torch.allclose(found, ops.linear(x.sin(), codes, scale).cos(), atol=1e-6)


def test_the_short_way_is_not_recorded(short_way):
    from torch.fx.experimental.proxy_tensor import make_fx

    codes, scale, dense = make()
    x, more = torch.randn(2, 40), torch.randn(17, 40)
    function = lambda x: ops.linear(x, codes, scale)  # noqa: E731
    with torch.no_grad():
        for recorded in (torch.jit.trace(function, (x,), check_trace=False), make_fx(function)(x)):
            assert torch.allclose(recorded(more).double(), more.double() @ dense.T, atol=1e-5)


def test_formats_have_one_number_each_however_many_threads_ask(short_way, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    asked = []

    class Slow:
        def hf_gg_rf8_register_format(self, tables):
            asked.append(tables)
            time.sleep(0.01)
            return len(asked) - 1

    monkeypatch.setattr(boxed, "library", Slow)
    monkeypatch.setattr(boxed, "_numbers", {})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(boxed.format_number, [*FORMATS] * 4))
    assert len(asked) == len(FORMATS) == len(set(found)) and found == found[: len(FORMATS)] * 4
