"""Weights that a format's codes cannot hold, as a sparse list beside the codes: products, look-ups, errors.

A list is flat indices into the codes, ascending, int32 or int64, and float32 values of the same length. The code in
such a place is 0, so a product is that of the codes and that of the list, added in float32. The operators are opaque
to `torch.compile` and keep only the list for the backward pass.
"""

from __future__ import annotations

import torch


# Products formed at once: rows of x times outliers.
_CHUNK = 1 << 22

_library = torch.library.Library("hf_gg", "FRAGMENT")
for _schema in (
    "outlier_linear(Tensor x, Tensor index, Tensor value, int rows, int columns, bool transposed=False) -> Tensor",
    "grouped_outlier_linear(Tensor x, Tensor index, Tensor value, Tensor offsets, int rows, int columns, "
    "bool transposed=False) -> Tensor",
    "put_outlier_rows(Tensor weight, Tensor rows, Tensor index, Tensor value) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def outlier_linear(
    x: torch.Tensor, index: torch.Tensor, value: torch.Tensor, rows: int, columns: int, transposed: bool = False
) -> torch.Tensor:
    """The outliers' part of a linear layer, differentiable in `x`.

    Args:
        x: floating point [..., columns], or [..., rows] if `transposed`.
        index: of the outliers in a matrix [rows, columns].
        value: the outliers.
        rows: of the matrix.
        columns: of the matrix.
        transposed: multiply by the matrix instead of by its transpose.

    Returns:
        [..., rows], or [..., columns] if `transposed`; float32, or float64 for such an x.
    """
    return torch.ops.hf_gg.outlier_linear(x, index, value, rows, columns, transposed)


def grouped_outlier_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    rows: int,
    columns: int,
    transposed: bool = False,
) -> torch.Tensor:
    """`outlier_linear` of a stack of matrices [groups, rows, columns], one for each group of rows of x.

    Args:
        x: floating point, sorted by group; [n, columns], or [n, rows] if `transposed`.
        index: of the outliers in the stack.
        value: the outliers.
        offsets: int32 [groups], the row at which each group ends. Rows past the last one give zeros.
        rows: of a matrix.
        columns: of a matrix.
        transposed: multiply by the matrices instead of by their transposes.
    """
    return torch.ops.hf_gg.grouped_outlier_linear(x, index, value, offsets, rows, columns, transposed)


def put_outliers(weight: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A decoded weight, contiguous, with its outliers in their places; changed in place."""
    weight.view(-1)[index.long()] = value.to(weight.dtype)
    return weight


def put_outlier_rows(
    weight: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Some rows of a decoded matrix with their outliers in their places.

    Args:
        weight: [n, columns].
        rows: [n], the number of each of these rows in the matrix.
        index: of the outliers in the matrix.
        value: the outliers.
    """
    return torch.ops.hf_gg.put_outlier_rows(weight, rows, index, value)


def check_outliers(name: str, codes: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """Check a list of outliers that was read from a file.

    Raises:
        ValueError: other types or lengths, an index that is out of order or outside the codes, a code in an outlier's
            place, NaN or infinity. The list is named after `name`, the parameter that holds the codes.
    """
    where, what = f"{name}_outlier_index", "The checkpoint is damaged."
    if index.dtype not in (torch.int32, torch.int64) or value.dtype != torch.float32:
        raise ValueError(f"{where} and its values are {index.dtype} and {value.dtype}, not int32 and float32. {what}")
    if index.ndim != 1 or index.shape != value.shape:
        raise ValueError(f"{where} {[*index.shape]} and its values {[*value.shape]} differ in length. {what}")
    if not index.numel():
        return
    index = index.long()
    if bool((index[1:] <= index[:-1]).any()):
        raise ValueError(f"{where} is not in ascending order. {what}")
    if int(index[0]) < 0 or int(index[-1]) >= codes.numel():
        raise ValueError(
            f"{where} holds {int(index[0])} to {int(index[-1])}, and there are {codes.numel()} codes. {what}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}_outlier_value holds NaN or infinity. {what}")
    if bool(codes.reshape(-1)[index].any()):
        raise ValueError(f"{where} names a place where there is a code other than 0. {what}")


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outlier_linear(x, index, value, rows, columns, transposed=False):
    out_features = columns if transposed else rows
    dtype, index = _product_dtype(x.dtype), index.long()
    source, target = index % columns, index // columns
    if transposed:
        source, target = target, source
    flat = x.reshape(-1, x.shape[-1])
    out = torch.zeros(out_features, flat.shape[0], dtype=dtype, device=x.device)
    size = max(1, _CHUNK // max(flat.shape[0], 1))
    for start in range(0, index.numel(), size):
        part = slice(start, start + size)
        out.index_add_(0, target[part], flat[:, source[part]].T.to(dtype) * value[part].to(dtype).unsqueeze(1))
    return out.T.contiguous().view(*x.shape[:-1], out_features)


def _grouped_outlier_linear(x, index, value, offsets, rows, columns, transposed=False):
    out = x.new_zeros(x.shape[0], columns if transposed else rows, dtype=_product_dtype(x.dtype))
    size = rows * columns
    bounds = torch.arange(offsets.numel() + 1, device=index.device, dtype=torch.int64) * size
    bounds = torch.searchsorted(index.long(), bounds).tolist()
    start = 0
    for group, end in enumerate(offsets.tolist()):
        part = slice(bounds[group], bounds[group + 1])
        if end > start and part.stop > part.start:
            own = index[part].long() - group * size
            out[start:end] = _outlier_linear(x[start:end], own, value[part], rows, columns, transposed)
        start = max(start, end)
    return out


def _put_outlier_rows(weight, rows, index, value):
    columns, weight, index = weight.shape[1], weight.clone(), index.long()
    first = torch.searchsorted(index, rows.long() * columns)
    count = torch.searchsorted(index, (rows.long() + 1) * columns) - first
    number = torch.repeat_interleave(count)  # which of the rows
    within = torch.arange(number.numel(), device=index.device) - (count.cumsum(0) - count)[number]
    source = first[number] + within
    weight[number, index[source] % columns] = value[source].to(weight.dtype)
    return weight


for _name, _function in (
    ("outlier_linear", _outlier_linear),
    ("grouped_outlier_linear", _grouped_outlier_linear),
    ("put_outlier_rows", _put_outlier_rows),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("hf_gg::outlier_linear")
def _(x, index, value, rows, columns, transposed=False):
    return x.new_empty(*x.shape[:-1], columns if transposed else rows, dtype=_product_dtype(x.dtype))


@torch.library.register_fake("hf_gg::grouped_outlier_linear")
def _(x, index, value, offsets, rows, columns, transposed=False):
    return x.new_empty(x.shape[0], columns if transposed else rows, dtype=_product_dtype(x.dtype))


@torch.library.register_fake("hf_gg::put_outlier_rows")
def _(weight, rows, index, value):
    return torch.empty_like(weight)


def _linear_setup(ctx, inputs, output):
    x, index, value, ctx.rows, ctx.columns, ctx.transposed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(index, value)


def _linear_backward(ctx, grad):
    index, value = ctx.saved_tensors
    grad_x = torch.ops.hf_gg.outlier_linear(grad, index, value, ctx.rows, ctx.columns, not ctx.transposed)
    return grad_x.to(ctx.dtype), None, None, None, None, None


def _grouped_setup(ctx, inputs, output):
    x, index, value, offsets, ctx.rows, ctx.columns, ctx.transposed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(index, value, offsets)


def _grouped_backward(ctx, grad):
    index, value, offsets = ctx.saved_tensors
    grad_x = torch.ops.hf_gg.grouped_outlier_linear(
        grad, index, value, offsets, ctx.rows, ctx.columns, not ctx.transposed
    )
    return grad_x.to(ctx.dtype), None, None, None, None, None, None


torch.library.register_autograd("hf_gg::outlier_linear", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("hf_gg::grouped_outlier_linear", _grouped_backward, setup_context=_grouped_setup)
