"""Quantized operators in an ONNX graph: stand-ins while a model is traced, then operators of ONNX alone.

A code is decoded by `GatherElements` in the 256 values of its row, `table * scale`. (`Gather` in one table is the same
and fourteen times slower in onnxruntime, integer arithmetic slower still.) The weights are then those that our own
operators multiply by, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .. import ops
from ..formats import get_format


DOMAIN = "hf_gg"
# An initializer that is a graph input as well may be given by the caller, so no runtime folds what depends on it.
KEEP = "hf_gg.keep_codes"
DECODE = ("run", "load")
_SYMBOL = r"\bs\d+\b"


@contextmanager
def stand_ins() -> Iterator[None]:
    """While a model is traced: our operators become nodes of the domain `hf_gg`, which `lower` replaces."""
    replaced = {name: getattr(ops, name) for name in _STAND_INS}
    for name, function in _STAND_INS.items():
        setattr(ops, name, function)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(ops, name, function)


def _node(name: str, inputs: Sequence[torch.Tensor | None], shape, dtype: torch.dtype, **attributes) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=dtype, shape=shape)


def _float_of(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dequantize(codes, scale, format="rf8", dtype=torch.float32, backend="auto"):
    return _node("Dequantize", [codes, scale], codes.shape, dtype, format=format)


def _linear(x, codes, scale, bias=None, format="rf8", backend="auto"):
    shape = [*x.shape[:-1], codes.shape[0]]
    bias = None if bias is None else bias.to(x.dtype)
    return _node("Linear", [x, codes, scale, bias], shape, x.dtype, format=format, rank=x.ndim)


def _grouped_linear(x, codes, scale, offsets, format="rf8", transposed=False, backend="auto"):
    shape = [x.shape[0], codes.shape[2 if transposed else 1]]
    inputs = [x, codes, scale, offsets]
    return _node("GroupedLinear", inputs, shape, x.dtype, format=format, transposed=int(transposed))


def _outlier_linear(x, index, value, rows, columns, transposed=False):
    shape = [*x.shape[:-1], columns if transposed else rows]
    sizes = {"rows": rows, "columns": columns, "transposed": int(transposed)}
    return _node("OutlierLinear", [x, index, value], shape, _float_of(x), rank=x.ndim, **sizes)


def _grouped_outlier_linear(x, index, value, offsets, rows, columns, transposed=False):
    shape = [x.shape[0], columns if transposed else rows]
    sizes = {"rows": rows, "columns": columns, "transposed": int(transposed)}
    return _node("GroupedOutlierLinear", [x, index, value, offsets], shape, _float_of(x), **sizes)


def _put_outlier_rows(weight, rows, index, value):
    return _node("PutOutlierRows", [weight, rows, index, value], weight.shape, weight.dtype)


_STAND_INS: dict[str, Callable] = {
    "dequantize": _dequantize,
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "outlier_linear": _outlier_linear,
    "grouped_outlier_linear": _grouped_outlier_linear,
    "put_outlier_rows": _put_outlier_rows,
}


def lower(model: ir.Model, decode: str) -> None:
    """Replace the nodes of the domain `hf_gg` in a model by operators of ONNX, in place.

    Args:
        model: the traced model.
        decode: `"run"`: the codes stay codes in memory, and each weight is decoded when it is used; `"load"`: a
            runtime may decode all of them once, when it loads the model.
    """
    graph = model.graph
    lowering = _Lowering(graph, decode == "run")
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        lowering.start(node)
        result = getattr(lowering, node.op_type)(node, *node.inputs)
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        graph.insert_before(node, lowering.nodes)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        result.name = old.name
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # where in whose folders the source of each node is


def name_dimensions(graph: ir.Graph) -> None:
    """Call the dynamic dimensions of a graph by what they are, in place of the tracer's `s44`."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and re.fullmatch(_SYMBOL, str(dim.value)):
                names.setdefault(str(dim.value), _dimension(value.name or "", axis))
    outputs = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*graph.inputs, *outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _dimension(name: str, axis: int) -> str:
    if name == "input_ids" and axis < 2:
        return ("batch", "sequence")[axis]
    return "past" if "past_key_values" in name and axis == 2 else f"{name}.{axis}"


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(_SYMBOL, lambda match: names.get(match[0], match[0]), str(dim.value))


class _Lowering:
    """Builds the nodes that stand for one node of ours; constants and tables are shared by the whole graph."""

    def __init__(self, graph: ir.Graph, keep_codes: bool):
        self.graph, self.keep_codes = graph, keep_codes
        self.nodes: list[ir.Node] = []
        self._tables: dict[str, ir.Value] = {}
        self._constants: dict[tuple, ir.Value] = {}
        self._prefix, self._count = "", 0

    def start(self, node: ir.Node) -> None:
        """Begin the nodes for a node of ours."""
        self.nodes, self._prefix, self._count = [], f"{node.outputs[0].name}.", 0

    # --- the nodes of ours ---

    def Dequantize(self, node, codes, scale) -> ir.Value:
        return self._decode(codes, scale, _text(node, "format"), node.outputs[0].dtype)

    def Linear(self, node, x, codes, scale, bias=None) -> ir.Value:
        rows, columns = (int(size) for size in codes.shape)
        weight = self._decode(codes, scale, _text(node, "format"), node.outputs[0].dtype, stored=True)
        flat = self._flat(x, _number(node, "rank"), columns)
        y = self.op("Gemm", flat, weight, *([] if bias is None else [bias]), transB=1)
        return self._like(y, x, _number(node, "rank"), rows)

    def GroupedLinear(self, node, x, codes, scale, offsets) -> ir.Value:
        """A loop over the experts that have rows, so that only these are decoded."""
        dtype, transposed = node.outputs[0].dtype, _number(node, "transposed")
        ends, starts = self._bounds(offsets)
        hit = self.op("Reshape", self.op("NonZero", self.op("Sub", ends, starts)), self.constant([-1]))
        table = self._table(_text(node, "format"))
        outer, self.nodes = self.nodes, []
        step = self._input("step", ir.TensorType(ir.DataType.INT64), [])
        go = self._input("go", ir.TensorType(ir.DataType.BOOL), [])
        done = self._input("done", ir.SequenceType(ir.TensorType(dtype)), None)
        expert = self.op("Gather", hit, step)
        first, last = (self.op("Unsqueeze", self.op("Gather", t, expert), self.constant([0])) for t in (starts, ends))
        rows = self.op("Slice", x, first, last, self.constant([0]))
        own, own_scale = self.op("Gather", codes, expert), self.op("Gather", scale, expert)
        if transposed:
            values = self.op("Expand", table, self.constant([int(codes.shape[1]), 1]))
            index = self.op("Cast", own, to=ir.DataType.INT32)
            weight = self.op("Mul", self.op("GatherElements", values, index, axis=1), own_scale)
            y = self.op("MatMul", rows, self._cast(weight, dtype))
        else:
            weight = self._decode(own, own_scale, _text(node, "format"), dtype)
            y = self.op("Gemm", rows, weight, transB=1)
        outputs = [self.op("Identity", go), self.op("SequenceInsert", done, y)]
        body = ir.Graph([step, go, done], outputs, nodes=self.nodes, name=f"{self._prefix}experts")
        self.nodes = outer
        empty = self.op("SequenceEmpty", dtype=int(dtype))
        parts = self.op("Loop", self.op("Size", hit), None, empty, body=ir.AttrGraph("body", body))
        return self.op("ConcatFromSequence", parts, axis=0)

    def OutlierLinear(self, node, x, index, value) -> ir.Value:
        _, source, target, columns, width = _places(node, index)
        flat = self._flat(x, _number(node, "rank"), columns)
        products = self._products(flat, source, value, node.outputs[0].dtype)
        return self._like(self._sum(products, target, width), x, _number(node, "rank"), width)

    def GroupedOutlierLinear(self, node, x, index, value, offsets) -> ir.Value:
        expert, source, target, _, width = _places(node, index)
        products = self._products(x, source, value, node.outputs[0].dtype)
        ends, _ = self._bounds(offsets)
        count = self.op("Squeeze", self.op("Shape", x, start=0, end=1), self.constant([0]))
        numbers = self.op("Range", self.constant(0), count, self.constant(1))
        past = self.op("GreaterOrEqual", self.op("Unsqueeze", numbers, self.constant([1])), ends)
        of_row = self.op("ReduceSum", self.op("Cast", past, to=ir.DataType.INT64), self.constant([1]), keepdims=1)
        zero = self._cast(self.constant(np.float32(0)), node.outputs[0].dtype)
        mine = self.op("Where", self.op("Equal", of_row, self.constant(expert)), products, zero)
        return self._sum(mine, target, width)

    def PutOutlierRows(self, node, weight, rows, index, value) -> ir.Value:
        columns = int(weight.shape[1])
        flat = _array(index)
        wanted = self.op("Unsqueeze", self.op("Cast", rows, to=ir.DataType.INT64), self.constant([1]))
        found = self.op("NonZero", self.op("Equal", wanted, self.constant(flat // columns)))
        row, which = (self.op("Gather", found, self.constant(number)) for number in (0, 1))
        column = self.op("Gather", self.constant(flat % columns), which)
        places = [self.op("Unsqueeze", part, self.constant([1])) for part in (row, column)]
        values = self._cast(self.op("Gather", value, which), node.outputs[0].dtype)
        return self.op("ScatterND", weight, self.op("Concat", *places, axis=1), values)

    # --- parts of them ---

    def _decode(self, codes, scale, format: str, dtype: ir.DataType, stored: bool = False) -> ir.Value:
        """The numbers of codes [rows, columns]; `stored` codes are held back from what a runtime folds."""
        table = self._table(format)
        if stored and self.keep_codes:
            codes = self.op("Reshape", codes, self._keep())
        values = self._cast(self.op("Mul", table, scale), dtype)
        return self.op("GatherElements", values, self.op("Cast", codes, to=ir.DataType.INT32), axis=1)

    def _table(self, format: str) -> ir.Value:
        if format not in self._tables:
            table = self.constant(get_format(format).table().numpy()[None])
            # at the place of its first use, before any loop
            self._tables[format] = self.op("Reshape", table, self._keep()) if self.keep_codes else table
        return self._tables[format]

    def _keep(self) -> ir.Value:
        value = self.graph.initializers.get(KEEP)
        if value is None:
            value = self._initializer(KEEP, np.array([0, -1]))  # the shape of any matrix
            self.graph.inputs.append(value)
        return value

    def _bounds(self, offsets) -> tuple[ir.Value, ir.Value]:
        """The row at which each group ends, and the one at which it starts."""
        ends = self.op("Cast", offsets, to=ir.DataType.INT64)
        before = self.op("Slice", ends, self.constant([0]), self.constant([-1]), self.constant([0]))
        return ends, self.op("Concat", self.constant([0]), before, axis=0)

    def _products(self, x, source: np.ndarray, value, dtype: ir.DataType) -> ir.Value:
        inputs = self._cast(self.op("Gather", x, self.constant(source), axis=1), dtype)
        return self.op("Mul", inputs, self._cast(value, dtype))

    def _sum(self, products, target: np.ndarray, width: int) -> ir.Value:
        """Products [rows, outliers] added up in the columns `target` of [rows, width]."""
        rows = self.op("Shape", products, start=0, end=1)
        zero = self.op("CastLike", self.constant(np.float32(0)), products)
        zeros = self.op("Expand", zero, self.op("Concat", rows, self.constant([width]), axis=0))
        places = self.op("Expand", self.constant(target[None]), self.op("Shape", products))
        return self.op("ScatterElements", zeros, places, products, axis=1, reduction="add")

    def _flat(self, x, rank: int, columns: int) -> ir.Value:
        return x if rank == 2 else self.op("Reshape", x, self.constant([-1, columns]))

    def _like(self, y, x, rank: int, columns: int) -> ir.Value:
        """`y` [rows, columns] with the leading dimensions of `x`."""
        if rank == 2:
            return y
        lead = self.op("Shape", x, start=0, end=rank - 1)
        return self.op("Reshape", y, self.op("Concat", lead, self.constant([columns]), axis=0))

    def _cast(self, value, dtype: ir.DataType) -> ir.Value:
        return value if dtype == ir.DataType.FLOAT else self.op("Cast", value, to=dtype)

    # --- nodes and values ---

    def op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node; its first output."""
        attributes = {key: int(a) if isinstance(a, ir.DataType) else a for key, a in attributes.items()}
        node = ir.node(name, inputs, attributes)
        self._count += 1
        node.name = node.outputs[0].name = f"{self._prefix}{name}.{self._count}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: Any) -> ir.Value:
        """A constant of the graph, int64 unless it is an array of another type."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(f"{DOMAIN}.constant.{len(self._constants)}", array)
        return self._constants[key]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def _input(self, name: str, type: Any, shape: list[int] | None) -> ir.Value:
        return ir.Value(name=self._prefix + name, type=type, shape=None if shape is None else ir.Shape(shape))


def _places(node: ir.Node, index: ir.Value) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Of outliers: their expert, column of the input and column of the output; the widths of input and output."""
    rows, columns = _number(node, "rows"), _number(node, "columns")
    flat = _array(index)
    expert, row, column = flat // (rows * columns), flat // columns % rows, flat % columns
    return (
        (expert, row, column, rows, columns) if _number(node, "transposed") else (expert, column, row, columns, rows)
    )


def _array(value: ir.Value) -> np.ndarray:
    """The numbers of a constant, int64."""
    constant = ir.convenience.get_const_tensor(value)
    if constant is None:
        raise ValueError(f"{value.name}, a list of outliers, is no constant of the traced model.")
    return constant.numpy().astype(np.int64)


def _number(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()


def _text(node: ir.Node, name: str) -> str:
    return node.attributes[name].as_string()
