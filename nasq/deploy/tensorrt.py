"""The ONNX form that TensorRT reads: QuantizeLinear and DequantizeLinear adjacent, int8, no zero-points.

By its documentation (Working with Quantized Types; never run here, for want of a device): every operation stands in float
between the DequantizeLinear of what it reads and the QuantizeLinear of what it makes, and the builder fuses the three; scales
per tensor for activations and per output channel for weights; zero-points are 0; biases stay fp32; nothing may stand between
a QuantizeLinear and its DequantizeLinear, so a grid's bounds are those of int8; a ReLU is an operator of its own.

A program fits where each of its tensors is either signed with 8 bits (container 0..255 around 128, stored minus 128) or
never negative with 7 bits (0..127): that is what :func:`nasq.quant.quantize` makes for the target ``tensorrt``. What the file
computes can be checked with any runtime that knows ONNX: in float arithmetic it is the integer arithmetic up to ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError, TargetError, require
from nasq.quant import program as p
from nasq.quant.operations import STAYS
from nasq.quant.program import Program

__all__ = ["OUTPUT", "export"]

OUTPUT = "output"
OPSET, IR_VERSION = 17, 8


def export(program: Program, batch: int | None = None) -> bytes:
    """Serializes a program as explicitly quantized ONNX: input ``input``, output ``output``, both fp32.

    Args:
        program: Of 8-bit weights without zero-points and of tensors that int8 holds as described above.
        batch: A fixed batch size, or ``None`` for any.

    Raises:
        TargetError: A tensor, a weight or an operation that this form cannot hold; names the layer.
        InputError: ``batch`` is below 1.
    """
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1, or None for a dynamic batch size.")
    onnx = require("onnx")
    graph = _Graph(onnx, program)
    for op in program.ops:
        graph.layer(op)
    model = onnx.helper.make_model(
        graph.proto("batch" if batch is None else batch),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="nasq",
    )
    onnx.helper.set_model_props(model, {"nasq.target": program.target, "nasq.form": "tensorrt"})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _relu(op: p.Op) -> bool:
    """Whether a ReLU stands in front of an operation's QuantizeLinear; raises where int8 is not its tensor's grid."""
    made = op.output
    grid = (made.zero_point, made.low, made.high)
    if grid not in ((128, 0, 255), (0, 0, 127)):
        raise TargetError(
            f"layer {op.path!r}: its tensor of {made.bits} bits has the integers {made.low} to {made.high} and the "
            f"zero-point {made.zero_point}; TensorRT's form holds signed tensors of 8 bits and never negative ones of 7. "
            "Quantize for the target 'tensorrt', which makes these."
        )
    return made.zero_point == 0


class _Graph:
    """Nodes and initialisers while they are collected."""

    def __init__(self, onnx: Any, program: Program) -> None:
        self.onnx, self.program = onnx, program
        self.nodes: list[Any] = []
        self.constants: dict[str, NDArray[Any]] = {"zero": np.array(0, np.int8)}
        self.tensors: dict[str, p.Tensor] = {}
        self.real: dict[str, str] = {}
        self.paths = Counter[str]()

    def node(self, kind: str, inputs: list[str], output: str, path: str = "", **attributes: Any) -> str:
        self.paths[path] += 1
        if path and self.paths[path] > 1:  # a module called twice, or one of several operations
            path = f"{path}@{self.paths[path]}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=path, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = value
        return name

    def integers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def layer(self, op: p.Op) -> None:
        """One operation: in float, between what dequantizes and what quantizes."""
        index = len(self.tensors)
        relu = _relu(op)
        if op.kind not in _EMIT and not isinstance(op, p.Input):
            raise TargetError(
                f"layer {op.path!r}: the operation {op.kind!r} has no form for TensorRT. It has: input, {', '.join(_EMIT)}. "
                "Replace the operation, or choose another target."
            )
        made = "input" if isinstance(op, p.Input) else _EMIT[op.kind](self, op, index)
        if relu and not isinstance(op, (*STAYS, p.Scale)):  # what only moves numbers finds none below 0
            made = self.node("Relu", [made], f"relu{index}")
        step = self.constant(f"s{index}", np.array(op.output.scale, np.float32))
        last = op is self.program.ops[-1]
        stored = self.node("QuantizeLinear", [made, step, "zero"], f"q{index}")
        self.tensors[op.output.name] = op.output
        self.real[op.output.name] = self.node(
            "DequantizeLinear", [stored, step, "zero"], OUTPUT if last else f"d{index}"
        )

    def proto(self, batch: int | str) -> Any:
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        first, last = self.program.ops[0].output.shape, self.program.output.shape
        constants = [self.onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        inputs = [helper.make_tensor_value_info("input", kind, [batch, *first])]
        outputs = [helper.make_tensor_value_info(OUTPUT, kind, [batch, *last])]
        return helper.make_graph(self.nodes, "nasq", inputs, outputs, constants)


def _read(graph: _Graph, op: p.Op) -> list[str]:
    return [graph.real[name] for name in op.inputs]


def _parameters(graph: _Graph, op: p.Linear, index: int) -> list[str]:
    """The weight, int8 with a scale per output channel, and the fp32 bias: a multiple of the accumulator's unit."""
    used = op.used
    if op.weight_zero is not None or used.min() < -128 or used.max() > 127:
        raise TargetError(
            f"layer {op.path!r}: its weights have zero-points or do not fit int8, which TensorRT refuses. Quantize with "
            "weight_symmetry=('symmetric',)."
        )
    scale = graph.constant(f"ws{index}", op.weight_scale)
    zeros = graph.constant(f"wz{index}", np.zeros(len(used), np.int8))
    stored = graph.constant(f"w{index}", used.astype(np.int8))
    unit = np.float32(graph.tensors[op.inputs[0]].scale) * op.weight_scale
    bias = graph.constant(f"b{index}", op.bias.astype(np.float32) * unit)
    return [graph.node("DequantizeLinear", [stored, scale, zeros], f"wd{index}", axis=0), bias]


def _conv(graph: _Graph, op: Any, index: int) -> str:
    inputs = [_read(graph, op)[0], *_parameters(graph, op, index)]
    options = {"strides": op.stride, "pads": op.padding * 2, "dilations": op.dilation, "group": op.groups}
    made = graph.node("Conv", inputs, f"r{index}", op.path, **options)
    return made if len(op.inputs) == 1 else graph.node("Add", [made, _read(graph, op)[1]], f"a{index}", f"{op.path}+")


def _linear(graph: _Graph, op: Any, index: int) -> str:
    weight, bias = _parameters(graph, op, index)
    turned = graph.node("Transpose", [weight], f"t{index}", perm=(1, 0))
    made = graph.node("MatMul", [_read(graph, op)[0], turned], f"r{index}", op.path)
    return graph.node("Add", [made, bias], f"a{index}")


def _add(graph: _Graph, op: Any, index: int) -> str:
    return graph.node("Add", _read(graph, op), f"r{index}", op.path)


def _avg_pool(graph: _Graph, op: Any, index: int) -> str:
    options = {"kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding * 2}
    return graph.node(
        "AveragePool", _read(graph, op), f"r{index}", op.path, count_include_pad=int(op.counted), **options
    )


def _max_pool(graph: _Graph, op: Any, index: int) -> str:
    options = {"kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding * 2}
    return graph.node("MaxPool", _read(graph, op), f"r{index}", op.path, **options)


def _reshape(graph: _Graph, op: Any, index: int) -> str:
    shape = graph.integers(f"i{index}", 0, *op.output.shape)
    return graph.node("Reshape", [*_read(graph, op), shape], f"r{index}", op.path)


def _concat(graph: _Graph, op: Any, index: int) -> str:
    return graph.node("Concat", _read(graph, op), f"r{index}", op.path, axis=op.dim + 1)


def _transpose(graph: _Graph, op: Any, index: int) -> str:
    return graph.node("Transpose", _read(graph, op), f"r{index}", op.path, perm=(0, *(place + 1 for place in op.order)))


def _slice(graph: _Graph, op: Any, index: int) -> str:
    ends = [a + s * (n - 1) + 1 for a, s, n in zip(op.start, op.step, op.output.shape, strict=True)]
    rows = {"first": op.start, "end": ends, "axis": range(1, len(ends) + 1), "step": op.step}
    numbers = [graph.integers(f"{name}{index}", *row) for name, row in rows.items()]
    return graph.node("Slice", [*_read(graph, op), *numbers], f"r{index}", op.path)


_EMIT: Mapping[str, Callable[[_Graph, Any, int], str]] = {
    "conv": _conv, "linear": _linear, "add": _add, "avg_pool": _avg_pool, "max_pool": _max_pool, "reshape": _reshape,
    "concat": _concat, "slice": _slice, "transpose": _transpose,
}  # fmt: skip
