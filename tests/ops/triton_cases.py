"""The Triton kernels against float64 references, on a CUDA device, or on the CPU with TRITON_INTERPRET=1.

One process has one of the two modes, so `test_triton.py` runs this file in processes of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

from hf_gg.ops import triton
from hf_gg.ops.triton.config import fitted, split, tiles_for


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = ("rf8", "rf8x", "rf8-e5", "grid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of a float32 sum, in units of the sum of magnitudes
SUM_ERROR = 2e-6 if INTERPRETED else 1e-5


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch):
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


def values_by_code(name: str) -> torch.Tensor:
    """The format as specified, float64 [256]; NaN for reserved states."""
    values = []
    for code in range(256):
        low = code & 0x7F
        if name == "grid":
            value = float(low)
        elif name == "rf8-e5":
            value = 2.0 ** ((low >> 2) - 31) * (1 + 2.0 ** -((low & 3) + 1))
        else:
            mantissas = (16, 17, 18, 20, 24, 28, 30, None) if name == "rf8" else (16, 17, 18, 20, 22, 24, 28, 30)
            sixteenths = mantissas[low & 7]
            value = float("nan") if sixteenths is None else 2.0 ** ((low >> 3) - 15) * sixteenths / 16
        values.append(0.0 if low == 0 else -value if code & 0x80 else value)
    return torch.tensor(values, dtype=torch.float64)


def random_codes(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Codes of all kinds but reserved ones, small exponents as likely as large ones, and some zeros."""
    allowed = torch.arange(256)[~values_by_code(name).isnan()]
    generator = torch.Generator().manual_seed(seed)
    codes = allowed[torch.randint(len(allowed), shape, generator=generator)].to(torch.uint8)
    return codes * (torch.rand(shape, generator=generator) > 0.1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_scale(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def embedded(tensor: torch.Tensor, device: str, padding: int = 5) -> torch.Tensor:
    """The same values as a view inside a larger buffer of NaN, or of 0xff: a read out of bounds shows."""
    fill = 255 if tensor.dtype == torch.uint8 else float("nan")
    outer = torch.full([size + 2 * padding for size in tensor.shape], fill, dtype=tensor.dtype, device=device)
    view = outer[tuple(slice(padding, padding + size) for size in tensor.shape)]
    return view.copy_(tensor)


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    error = (actual.cpu().double() - expected).abs()
    assert actual.shape == expected.shape
    # "not above" would let NaN pass
    assert bool((error <= bound + 1e-300).all()), f"largest error {error.max()}, bound there {bound.max()}"


def check_linear(x, codes, scale, bias, name, device):
    """Run `linear` on views inside poisoned buffers; the result must be the exact one, rounded once."""
    placed = [None if tensor is None else embedded(tensor, device) for tensor in (x, codes, scale, bias)]
    y = triton.linear(*placed, name)
    weight = values_by_code(name)[codes.long()] * scale.double()
    offset = torch.zeros(codes.shape[0], dtype=torch.float64) if bias is None else bias.double()
    expected = x.double() @ weight.T + offset
    magnitude = x.double().abs() @ weight.abs().T + offset.abs()
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert_within(y, expected, half_ulp(x.dtype) * expected.abs() + SUM_ERROR * magnitude + smallest)


def check_grad(grad, codes, scale, name, device):
    out = triton.linear_grad_input(embedded(grad, device), embedded(codes, device), embedded(scale, device), name)
    weight = values_by_code(name)[codes.long()] * scale.double()
    expected = grad.double() @ weight
    # each product of gradient and scale is rounded once, then the sum
    magnitude = grad.double().abs() @ weight.abs()
    step = 0.0 if grad.dtype == torch.float32 else half_ulp(grad.dtype)
    assert out.dtype == grad.dtype
    assert out.is_contiguous()
    smallest = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    bound = half_ulp(grad.dtype) * expected.abs() + (step + SUM_ERROR) * magnitude + smallest
    assert_within(out, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_exactly(name, dtype, device):
    expected = values_by_code(name)
    valid = ~expected.isnan()
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    # a power of two that lifts the smallest values into float16, and none above it
    unit = 16.0 if name == "grid" else 4096.0
    decoded = triton.dequantize(codes[None], torch.full((1, 1), unit, device=device), name, dtype)[0]
    assert torch.equal(decoded.cpu().double()[valid], expected[valid] * unit)
    product = triton.linear(
        torch.ones(1, 1, dtype=dtype, device=device),
        codes[:, None],
        torch.full((1, 1), unit, device=device),
        None,
        name,
    )[0]
    assert torch.equal(product.cpu().double()[valid], expected[valid] * unit)
    gradient = triton.linear_grad_input(
        torch.ones(1, 1, dtype=dtype, device=device),
        codes[None],
        torch.full((1, 1), unit, device=device),
        name,
    )[0]
    assert torch.equal(gradient.cpu().double()[valid], expected[valid] * unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale_shape", [(3, 33, 1), (3, 1, 130), (3, 1, 1), (1, 1, 1)])
def test_dequantize(name, dtype, scale_shape, device):
    codes, scale = random_codes(name, 3, 33, 130), random_scale(*scale_shape)
    weight = triton.dequantize(embedded(codes, device), embedded(scale, device), name, dtype)
    expected = (values_by_code(name)[codes.long()].float() * scale).to(dtype)
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    assert torch.equal(weight.cpu(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 9), (5, 2, 3, 4), (2, 0, 3, 4)])
def test_dequantize_of_any_rank(shape, device):
    codes = random_codes("rf8", *shape)
    for scale_shape in ((*shape[:-1], 1), (*shape[:-2], 1, shape[-1])):
        scale = random_scale(*scale_shape)
        weight = triton.dequantize(codes.to(device), scale.to(device), "rf8", torch.float32)
        assert torch.equal(weight.cpu(), values_by_code("rf8")[codes.long()].float() * scale)


def test_dequantize_of_strided_codes(device):
    codes, scale = random_codes("rf8", 40, 3, 50).to(device), random_scale(3, 50, 1).to(device)
    expected = values_by_code("rf8").float()[codes.cpu().long()].permute(1, 2, 0) * scale.cpu()
    assert torch.equal(triton.dequantize(codes.permute(1, 2, 0), scale, "rf8", torch.float32).cpu(), expected)
    every_second = triton.dequantize(codes.permute(1, 2, 0)[:, ::2, 1::3], scale[:, ::2], "rf8", torch.float32)
    assert torch.equal(every_second.cpu(), expected[:, ::2, 1::3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_and_gradient_of_every_format(name, dtype, device):
    codes, scale = random_codes(name, 63, 70), random_scale(63, 1)
    check_linear(random(33, 70, dtype=dtype), codes, scale, random(63, seed=3), name, device)
    check_grad(random(33, 63, dtype=dtype), codes, scale, name, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 63, 70), (1, 1, 1), (16, 64, 128), (17, 5, 1), (65, 1, 131), (130, 129, 33), (129, 131, 129)]
)
def test_linear_and_gradient_of_odd_sizes(sizes, dtype, device):
    rows, outer, inner = sizes
    codes, scale = random_codes("rf8", outer, inner), random_scale(outer, 1)
    check_linear(random(rows, inner, dtype=dtype), codes, scale, None, "rf8", device)
    check_grad(random(rows, outer, dtype=dtype), codes, scale, "rf8", device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale_for_the_matrix_and_bias_in_the_dtype(dtype, device):
    codes, scale = random_codes("rf8x", 20, 30), random_scale(1, 1)
    check_linear(random(3, 30, dtype=dtype), codes, scale, random(20, dtype=dtype, seed=3), "rf8x", device)
    check_grad(random(3, 20, dtype=dtype), codes, scale, "rf8x", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "parts"), [(1, 4), (3, 4), (16, 2)])
def test_columns_split_over_programs(rows, parts, dtype, device):
    codes, scale = random_codes("rf8", 70, 2048 * parts // 4), random_scale(70, 1)
    if dtype != torch.float32:
        assert split(*_tiles(rows, codes, dtype), codes.shape[1]) == parts
    check_linear(random(rows, codes.shape[1], dtype=dtype), codes, scale, random(70, seed=3), "rf8", device)


def _tiles(rows: int, codes: torch.Tensor, dtype: torch.dtype):
    tiles, _ = fitted(tiles_for("linear", rows, dtype), codes.shape[1])
    return tiles, -(-codes.shape[0] // tiles.n)


def test_a_wide_layer(device):
    codes, scale = random_codes("rf8", 20, 11008), random_scale(20, 1)
    check_linear(random(2, 11008, dtype=torch.bfloat16), codes, scale, None, "rf8", device)
    check_linear(random(2, 1000, dtype=torch.bfloat16), codes[:, :1000], scale, None, "rf8", device)


def check_grouped(x, codes, scale, ends, name, transposed, device):
    """Run `grouped_linear` on views inside poisoned buffers, against one product a group."""
    weight = values_by_code(name)[codes.long()] * scale.double()
    weight = weight.mT if transposed else weight
    expected = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    magnitude, start = expected.clone(), 0
    for group, end in enumerate(max(end, 0) for end in ends):
        expected[start:end] = x[start:end].double() @ weight[group].T
        magnitude[start:end] = x[start:end].double().abs() @ weight[group].abs().T
        start = max(start, end)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    y = triton.grouped_linear(*(embedded(t, device) for t in (x, codes, scale)), offsets, name, transposed)
    assert y.dtype == x.dtype
    # a scale along the sum is rounded into x
    per_k = scale.shape[1 if transposed else 2] != 1
    step = half_ulp(x.dtype) if per_k and x.dtype != torch.float32 else 0.0
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert_within(y, expected, half_ulp(x.dtype) * expected.abs() + (step + SUM_ERROR) * magnitude + smallest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_k", [False, True])
def test_grouped_linear(transposed, per_k, dtype, device):
    for name, sizes, ends in (
        ("rf8", (4, 63, 70), [3, 3, 40, 42]),  # an empty group
        ("rf8x", (5, 20, 64), [0, 0, 1, 1, 33]),
        ("rf8-e5", (1, 5, 1), [2]),
        ("grid", (3, 33, 130), [50, 20, 90]),  # an end before the one before it
        ("rf8", (2, 8, 8), [0, 0]),
    ):
        groups, outer, inner = sizes
        codes = random_codes(name, groups, *((inner, outer) if transposed else (outer, inner)))
        along_out = transposed == per_k
        scale = random_scale(groups, codes.shape[1], 1) if along_out else random_scale(groups, 1, codes.shape[2])
        check_grouped(random(ends[-1] + 3, inner, dtype=dtype), codes, scale, ends, name, transposed, device)


def test_ends_past_the_rows_write_nothing_else(device):
    codes, scale = random_codes("rf8", 3, 20, 40), random_scale(3, 20, 1)
    for ends in ([2, 9, 40], [7, 5, 5], [-3, 2, 2**30]):
        check_grouped(random(5, 40), codes, scale, ends, "rf8", False, device)


def test_grouped_operands_that_do_not_fit(device):
    codes, scale = random_codes("rf8", 2, 6, 8).to(device), torch.ones(2, 6, 1, device=device)
    x, ends = torch.ones(3, 8, device=device), torch.tensor([1, 3], device=device)
    refused = {
        r"x must be \[rows, in\]": lambda: triton.grouped_linear(x[:, :7], codes, scale, ends, "rf8"),
        "offsets must be int32 or int64": lambda: triton.grouped_linear(x, codes, scale, ends.float(), "rf8"),
        r"offsets must be .* \[2\]": lambda: triton.grouped_linear(x, codes, scale, ends[:1], "rf8"),
        "offsets is on meta": lambda: triton.grouped_linear(x, codes, scale, ends.to("meta"), "rf8"),
        "scale must have shape": lambda: triton.grouped_linear(x, codes, scale[:, :5], ends, "rf8"),
        "codes must be uint8": lambda: triton.grouped_linear(x, codes.int(), scale, ends, "rf8"),
        "x: .*float64": lambda: triton.grouped_linear(x.double(), codes, scale, ends, "rf8"),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_transposed_operands(device):
    codes, scale = random_codes("rf8", 70, 63).to(device), random_scale(63, 1).to(device)
    x, grad = random(70, 33).to(device), random(63, 33).to(device)
    for strided, dense in ((codes.T, codes.T.contiguous()), (codes.T[::2], codes.T[::2].contiguous())):
        part = scale[: len(dense)]
        expected = triton.linear(x.T.contiguous(), dense, part, None, "rf8")
        assert torch.equal(triton.linear(x.T, strided, part, None, "rf8"), expected)
        expected = triton.linear_grad_input(grad[: len(dense)].T.contiguous(), dense, part, "rf8")
        assert torch.equal(triton.linear_grad_input(grad[: len(dense)].T, strided, part, "rf8"), expected)


def test_offsets_beyond_32_bits(device):
    codes = random_codes("rf8", 3, 40)
    # rows 1 GiB apart; on a CPU the memory between them is never touched
    far = torch.empty(2**31 + 40, dtype=torch.uint8, device=device).as_strided((3, 40), (2**30, 1)).copy_(codes)
    scale, x, grad = random_scale(3, 1).to(device), random(2, 40).to(device), random(2, 3).to(device)
    codes, ends = codes.to(device), torch.tensor([0, 1, 2], device=device)
    for operation in (
        lambda c: triton.dequantize(c, scale, "rf8", torch.float32),
        lambda c: triton.linear(x, c, scale, None, "rf8"),
        lambda c: triton.linear_grad_input(grad, c, scale, "rf8"),
        lambda c: triton.grouped_linear(x, c[:, None], scale[:, None], ends, "rf8"),
    ):
        assert torch.equal(operation(far), operation(codes))
    columns, row_scale = far.T, random_scale(40, 1).to(device)
    assert torch.equal(
        triton.linear(grad, columns, row_scale, None, "rf8"), triton.linear(grad, codes.T, row_scale, None, "rf8")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "scale"), [(1.0, 1e-6), (3e4, 0.4), (6e4, 0.499), (1e-3, 50.0)])
def test_gradient_with_scales_far_from_one(size, scale, dtype, device):
    grad = (random(9, 100).clamp(-1, 1) * size).to(dtype)
    scales = scale * (1 + random_scale(100, 1))
    scales[50:] *= 1e-3
    codes = random_codes("rf8", 100, 20)
    codes[:, 10:] = random_codes("rf8", 100, 10, seed=5) & 0x87  # small values, so that nothing overflows
    if size > 1 and dtype == torch.float16:
        codes &= 0x87
    check_grad(grad, codes, scales, "rf8", device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_rows(device):
    x = random(5, 40)
    x[1, 3], x[3, 7] = float("nan"), float("inf")
    codes = random_codes("rf8", 6, 40) | 0x08  # no zeros
    y = triton.linear(x.to(device), codes.to(device), torch.ones(6, 1, device=device), None, "rf8").cpu()
    assert bool(y[1].isnan().all())
    assert bool(y[3].isinf().all())
    assert bool(y[[0, 2, 4]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outer", "inner"), [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_empty_operands(rows, outer, inner, dtype, device):
    codes = torch.zeros(outer, inner, dtype=torch.uint8, device=device)
    scale, bias = torch.ones(outer, 1, device=device), torch.arange(outer, dtype=torch.float32, device=device)
    x, grad = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(rows, outer, dtype=dtype, device=device)
    assert torch.equal(triton.linear(x, codes, scale, bias, "rf8"), bias.to(dtype).expand(rows, outer))
    assert torch.equal(triton.linear(x, codes, scale, None, "rf8"), torch.zeros_like(grad))
    assert torch.equal(triton.linear_grad_input(grad, codes, scale, "rf8"), torch.zeros_like(x))
    assert triton.dequantize(codes, scale, "rf8", dtype).shape == (outer, inner)


def test_operands_that_do_not_fit(device):
    codes, scale = random_codes("rf8", 6, 8).to(device), torch.ones(6, 1, device=device)
    x, grad, bias = (torch.ones(*shape, device=device) for shape in ((2, 8), (2, 6), (6,)))
    refused = {
        "codes must be uint8": lambda: triton.linear(x, codes.int(), scale, None, "rf8"),
        r"x: .*float64": lambda: triton.linear(x.double(), codes, scale, None, "rf8"),
        r"grad: .*int64": lambda: triton.linear_grad_input(grad.long(), codes, scale, "rf8"),
        r"x must have shape \[rows, 8\]": lambda: triton.linear(grad, codes, scale, None, "rf8"),
        r"grad must have shape \[rows, 6\]": lambda: triton.linear_grad_input(x, codes, scale, "rf8"),
        "x must have shape": lambda: triton.linear(x[0], codes, scale, None, "rf8"),
        "codes must be a matrix": lambda: triton.linear(x, codes[None], scale, None, "rf8"),
        "scale must be float32": lambda: triton.linear(x, codes, scale.half(), None, "rf8"),
        r"scale must have shape \(6, 1\)": lambda: triton.linear(x, codes, scale[:5], None, "rf8"),
        "scale must have shape": lambda: triton.linear_grad_input(grad, codes, torch.ones(1, 8).to(device), "rf8"),
        "bias must be": lambda: triton.linear(x, codes, scale, bias[:5], "rf8"),
        "bias must be floating": lambda: triton.linear(x, codes, scale, bias.long(), "rf8"),
        "Unknown weight format 'rf9'": lambda: triton.linear(x, codes, scale, None, "rf9"),
        "dtype: .*float64": lambda: triton.dequantize(codes, scale, "rf8", torch.float64),
        "codes must have at least two": lambda: triton.dequantize(codes[0], scale, "rf8", torch.float32),
        r"scale must have shape \(6, 1\), ": lambda: triton.dequantize(codes, scale.T, "rf8", torch.float32),
        "x is on meta": lambda: triton.linear(x.to("meta"), codes, scale, None, "rf8"),
        "bias is on meta": lambda: triton.linear(x, codes, scale, bias.to("meta"), "rf8"),
        "scale is on meta": lambda: triton.dequantize(codes, scale.to("meta"), "rf8", torch.float32),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_available(device):
    assert triton.available()
    assert triton.why_not() is None


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_kernels_do_not_compile_in_the_interpreter():
    from hf_gg.ops.triton.compile import compile_all

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_all()
