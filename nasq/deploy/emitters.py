"""How each operation is written as ONNX nodes: one function per kind of operation.

Every function gets the graph that is being written, the operation, and its place: the number of the operation, the name of
the tensor it makes, and the name of the node that does the work. What a function names stays within its number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nasq.deploy.stored_weights import bias, by_groups, weight
from nasq.errors import TargetError
from nasq.quant import program as p

if TYPE_CHECKING:
    from nasq.deploy.onnx import Graph

__all__ = ["EMITTERS", "Place"]


@dataclass(frozen=True)
class Place:
    """Where an operation stands: its number, the tensor it makes, the name of its working node."""

    index: int
    final: str
    path: str

    def name(self, what: str) -> str:
        """A name of this operation's own."""
        return f"{what}.{self.index}"


_Emit = TypeVar("_Emit", bound=Callable[..., None])
EMITTERS: dict[type[p.Op], Callable[[Graph, Any, Place], None]] = {}
"""The function that writes each kind of operation."""


def _of(*kinds: type[p.Op]) -> Callable[[_Emit], _Emit]:
    def register(function: _Emit) -> _Emit:
        EMITTERS.update(dict.fromkeys(kinds, function))
        return function

    return register


@_of(p.Input)
def _input(graph: Graph, op: p.Input, at: Place) -> None:
    graph.quantize("input", op.output, at.final, at.path)


@_of(p.Conv)
def _conv(graph: Graph, op: p.Conv, at: Place) -> None:
    inputs = [graph.dequantize(op.inputs[0]), weight(graph, op, at.index), bias(graph, op, at.index)]
    attributes = _window(op)
    if op.dilation != (1, 1):
        attributes["dilations"] = op.dilation
    if op.groups != 1:
        attributes["group"] = op.groups
    made = graph.node("Conv", inputs, at.name("r"), at.path, **attributes)
    graph.quantize(_with_shortcut(graph, op, at, made), op.output, at.final)


def _with_shortcut(graph: Graph, op: p.Conv, at: Place, made: str) -> str:
    """What a convolution makes, or its sum with the shortcut: only the shortcut is quantized in front of that sum."""
    if len(op.inputs) == 1:
        return made
    return graph.node("Add", [made, graph.dequantize(op.inputs[1])], at.name("a"), f"{at.path}+" if at.path else "")


@_of(p.Linear)
def _linear(graph: Graph, op: p.Linear, at: Place) -> None:
    """A Gemm; more than one dimension behind the batch is flattened into it on the integers."""
    if op.multipliers is not None:
        _linear_by_groups(graph, op, at)
        return
    tokens = len(op.output.shape) > 1
    if not tokens:
        source, final = graph.dequantize(op.inputs[0]), at.final
    else:
        flat = graph.node("Reshape", [graph.source(op), graph.integers(-1, op.weight.shape[1])], at.name("g"))
        source, final = graph.real(flat, graph.tensor(op).scale, graph.tensor(op).zero_point), at.name("o")
    inputs = [source, weight(graph, op, at.index), bias(graph, op, at.index)]
    graph.quantize(graph.node("Gemm", inputs, f"r{at.index}", at.path, transB=1), op.output, final)
    if tokens:
        graph.node("Reshape", [final, graph.integers(-1, *op.output.shape)], at.final)


def _linear_by_groups(graph: Graph, op: p.Linear, at: Place) -> None:
    """No runtime has an integer kernel for it; in float64 every product and sum is exact, in whatever order."""
    types, source = graph.onnx.TensorProto, graph.tensor(op)
    whole = graph.node("Cast", [graph.source(op)], at.name("k"), to=types.DOUBLE)
    zero = graph.constant(at.name("z"), np.array(source.zero_point, np.float64))
    inputs = [graph.node("Sub", [whole, zero], at.name("c")), by_groups(graph, op, at.index)]
    made = graph.node("MatMul", inputs, at.name("r"), at.path)
    total = graph.node("Add", [made, graph.constant(at.name("b"), op.bias.astype(np.float64))], at.name("t"))
    single = graph.node("Cast", [total], at.name("f"), to=types.FLOAT)
    ratio = np.float32(source.scale) * op.weight_scale / np.float32(op.output.scale)
    steps = graph.node("Mul", [single, graph.constant(at.name("v"), ratio)], at.name("s"))
    graph.quantize(steps, op.output, at.final, scale=1.0)


@_of(p.Add)
def _add(graph: Graph, op: p.Add, at: Place) -> None:
    if graph.program.add == "one" and (fused := _fused_with(graph.program, op)) is not None:
        raise TargetError(
            f"layer {op.path!r}: the runtime of {graph.program.target!r} fuses this sum with {fused.path!r} and rounds once "
            "(add='one'), and the network rounds both. Put the convolution and the sum into the same module, with nothing "
            "but BatchNorm between them, or quantize for a target whose rule is add='both', such as 'onnxruntime-cpu'."
        )
    _pairwise(graph, op, at)


def _fused_with(program: p.Program, op: p.Add) -> p.Op | None:
    """What a runtime that rounds sums once would fuse this one with: a convolution that nothing else reads."""
    for name in op.inputs:
        maker = next(one for one in program.ops if one.output.name == name)
        if isinstance(maker, p.Conv | p.AvgPool) and sum(name in one.inputs for one in program.ops) == 1:
            return maker
    return None


@_of(p.Mul, p.Sub, p.MatMul)
def _pairwise(graph: Graph, op: p.Op, at: Place) -> None:
    """An operator of two dequantized tensors, which has the operation's own name."""
    real = graph.node(type(op).__name__, [graph.dequantize(name) for name in op.inputs], f"r{at.index}", at.path)
    graph.quantize(real, op.output, at.final)


@_of(p.Concat)
def _concat(graph: Graph, op: p.Concat, at: Place) -> None:
    parts = []
    batch = next((name for name in op.inputs if name not in graph.constants), op.inputs[0])
    for place, name in enumerate(op.inputs):
        parts.append(_repeated(graph, name, batch, at, place) if name in graph.constants else graph.dequantize(name))
    graph.quantize(graph.node("Concat", parts, f"r{at.index}", at.path, axis=op.dim + 1), op.output, at.final)


def _repeated(graph: Graph, name: str, batch: str, at: Place, place: int) -> str:
    """A constant, once for every image of the tensor ``batch``."""
    tensor = graph.tensors[name]
    sizes = graph.node("Shape", [graph.names[batch]], at.name(f"k{place}"))
    count = graph.node("Slice", [sizes, graph.integers(0), graph.integers(1)], at.name(f"l{place}"))
    shape = graph.node("Concat", [count, graph.integers(*tensor.shape)], at.name(f"m{place}"), axis=0)
    whole = graph.node("Expand", [graph.names[name], shape], at.name(f"g{place}"))
    return graph.real(whole, tensor.scale, tensor.zero_point)


@_of(p.AvgPool)
def _avg_pool(graph: Graph, op: p.AvgPool, at: Place) -> None:
    source = graph.tensor(op)
    if not op.counted:
        _uncounted(graph, op, at)
        return
    real = graph.dequantize(op.inputs[0])
    if op.kernel == source.shape[1:] and op.padding == (0, 0):
        made = graph.node("GlobalAveragePool", [real], f"r{at.index}", at.path)
    else:
        channels = source.shape[0]
        share = np.full(channels, np.float32(1) / np.float32(prod(op.kernel)), np.float32)
        ones = np.ones((channels, 1, *op.kernel), np.int8)
        inputs = [graph.constant(at.name("w"), ones), graph.constant(at.name("v"), share)]
        taps = graph.node("DequantizeLinear", inputs, at.name("x"), axis=0)
        made = graph.node("Conv", [real, taps], f"r{at.index}", at.path, group=channels, **_window(op))
    graph.quantize(made, op.output, at.final)


def _uncounted(graph: Graph, op: p.AvgPool, at: Place) -> None:
    """With steps of 1 in front, the runtime's kernel adds exact integers; the quotient of the steps stands behind."""
    source = graph.tensor(op)
    real = graph.real(graph.source(op), 1.0, source.zero_point, at.name("t"))
    made = graph.node(
        "AveragePool", [real], f"r{at.index}", at.path, kernel_shape=op.kernel, count_include_pad=0, **_window(op)
    )
    graph.quantize(made, op.output, at.final, scale=float(np.float32(op.output.scale) / np.float32(source.scale)))


@_of(p.MaxPool)
def _max_pool(graph: Graph, op: p.MaxPool, at: Place) -> None:
    graph.node("MaxPool", [graph.source(op)], at.final, at.path, kernel_shape=op.kernel, **_window(op))


@_of(p.Reshape)
def _reshape(graph: Graph, op: p.Reshape, at: Place) -> None:
    if len(op.output.shape) == 1:
        graph.node("Flatten", [graph.source(op)], at.final, at.path)
    else:
        shape = graph.constant(at.name("h"), np.array((0, *op.output.shape), np.int64))
        graph.node("Reshape", [graph.source(op), shape], at.final, at.path)


@_of(p.Slice)
def _slice(graph: Graph, op: p.Slice, at: Place) -> None:
    """Only the dimensions that lose elements are named."""
    whole, made = graph.tensor(op).shape, op.output.shape
    cut = [i for i, (size, kept) in enumerate(zip(whole, made, strict=True)) if size != kept]
    ends = [op.start[i] + op.step[i] * (made[i] - 1) + 1 for i in cut]
    numbers = ([op.start[i] for i in cut], ends, [i + 1 for i in cut], [op.step[i] for i in cut])
    graph.node("Slice", [graph.source(op), *(graph.integers(*row) for row in numbers)], at.final, at.path)


@_of(p.Pad)
def _pad(graph: Graph, op: p.Pad, at: Place) -> None:
    amounts = graph.integers(0, *op.before, 0, *op.after)
    graph.node("Pad", [graph.source(op), amounts, graph.byte(op.output.zero_point)], at.final, at.path)


@_of(p.Transpose)
def _transpose(graph: Graph, op: p.Transpose, at: Place) -> None:
    graph.node("Transpose", [graph.source(op)], at.final, at.path, perm=(0, *(place + 1 for place in op.order)))


@_of(p.Upsample)
def _upsample(graph: Graph, op: p.Upsample, at: Place) -> None:
    scales = graph.constant(at.name("h"), np.array((1, 1, *op.factor), np.float32))
    modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    graph.node("Resize", [graph.source(op), "", scales], at.final, at.path, **modes)


@_of(p.Clip)
def _clip(graph: Graph, op: p.Clip, at: Place) -> None:
    graph.clip(graph.source(op), op.output, at.final, at.path)


@_of(p.Scale)
def _scale(graph: Graph, op: p.Scale, at: Place) -> None:
    graph.node("Identity", [graph.source(op)], at.final, at.path)


@_of(p.Constant)
def _constant(graph: Graph, op: p.Constant, at: Place) -> None:
    graph.constants.add(op.output.name)
    graph.node("Identity", [graph.constant(at.name("c"), op.values[None])], at.final, at.path)


@_of(p.Table)
def _table(graph: Graph, op: p.Table, at: Place) -> None:
    index = graph.node("Cast", [graph.source(op)], at.name("k"), to=graph.onnx.TensorProto.INT32)
    graph.node("Gather", [graph.constant(at.name("t"), op.values), index], at.final, at.path, axis=0)


@_of(p.Softmax)
def _softmax(graph: Graph, op: p.Softmax, at: Place) -> None:
    """Exponentials of distances to the largest integer are looked up as whole numbers, so that their sum is exact."""
    types = graph.onnx.TensorProto
    seen = None
    if op.causal:
        seen = np.tril(np.ones(op.output.shape[-2:], np.int32))
    whole = graph.node("Cast", [graph.source(op)], at.name("k"), to=types.INT32)
    if seen is not None:
        whole = graph.node("Mul", [whole, graph.constant(at.name("j"), seen)], at.name("n"))
    largest = graph.node("ReduceMax", [whole], at.name("l"), axes=[-1], keepdims=1)
    distance = graph.node("Sub", [largest, whole], at.name("m"))
    table = graph.constant(at.name("t"), op.table.astype(np.float32))
    weights = graph.node("Gather", [table, distance], at.name("e"), axis=0)
    if seen is not None:
        weights = graph.node("Mul", [weights, graph.constant(at.name("f"), seen.astype(np.float32))], at.name("a"))
    total = graph.node("ReduceSum", [weights, graph.integers(-1)], at.name("s"), keepdims=1)
    graph.quantize(graph.node("Div", [weights, total], at.name("r"), at.path), op.output, at.final)


@_of(p.LayerNorm)
def _layer_norm(graph: Graph, op: p.LayerNorm, at: Place) -> None:
    """Sums of integers in fp64 are exact; what follows works on each number alone, so its order cannot matter."""
    types, source = graph.onnx.TensorProto, graph.tensor(op)
    axes = graph.integers(*(dim + 1 for dim in op.dims))
    count = prod(source.shape[dim] for dim in op.dims)
    number = graph.constant(at.name("nd"), np.array(count, np.float64))
    floor = graph.constant(
        at.name("ed"), np.array(op.eps * (count * count) / (source.scale * source.scale), np.float64)
    )
    q = graph.node("Cast", [graph.source(op)], at.name("k"), to=types.DOUBLE)
    total = graph.node("ReduceSum", [q, axes], at.name("l"), keepdims=1)
    squares = graph.node("ReduceSum", [graph.node("Mul", [q, q], at.name("m")), axes], at.name("n"), keepdims=1)
    spread = graph.node(
        "Sub",
        [graph.node("Mul", [squares, number], at.name("o")), graph.node("Mul", [total, total], at.name("a"))],
        at.name("p"),
    )
    root = graph.node("Sqrt", [graph.node("Add", [spread, floor], at.name("c"))], at.name("d"))
    centred = graph.node("Sub", [graph.node("Mul", [q, number], at.name("e")), total], at.name("f"))
    normal = graph.node("Div", [centred, root], at.name("g"), at.path)
    normal = graph.node("Cast", [normal], at.name("h"), to=types.FLOAT)
    along = [1] * (len(source.shape) + 1)
    along[op.channel + 1] = -1
    scaled = graph.node("Mul", [normal, graph.constant(at.name("v"), op.gain.reshape(along))], at.name("i"))
    shifted = graph.node("Add", [scaled, graph.constant(at.name("b"), op.shift.reshape(along))], at.name("r"))
    graph.quantize(shifted, op.output, at.final)


def _window(op: p.Conv | p.AvgPool | p.MaxPool) -> dict[str, Any]:
    """Strides and pads, left out where they are the defaults."""
    attributes: dict[str, Any] = {}
    if op.stride != (1, 1):
        attributes["strides"] = op.stride
    if op.padding != (0, 0):
        attributes["pads"] = op.padding * 2
    return attributes
