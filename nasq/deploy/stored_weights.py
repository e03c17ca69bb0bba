"""How the weights and biases of a layer are stored in an ONNX file, and the nodes that make ``int8`` of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import TargetError, require
from nasq.quant.operations import GROUP_UNIT
from nasq.quant.program import Conv, Linear

if TYPE_CHECKING:
    from nasq.deploy.onnx import Graph

__all__ = ["bias", "by_groups", "weight"]

_UNPACKING = (200, 75)  # bytes of the nodes that unpack one weight, and of those that shift it, about


def weight(graph: Graph, op: Linear, index: int) -> str:
    """The weights of layer ``index`` as real numbers."""
    inputs = [_integers(graph, op, index), graph.constant(f"v{index}", op.weight_scale)]
    if not isinstance(op, Conv):
        # Without an explicit zero-point onnxruntime leaves the Gemm in float.
        inputs.append(graph.constant(f"n{len(op.shift)}", np.zeros(len(op.shift), np.int8)))
    return graph.node("DequantizeLinear", inputs, f"x{index}", axis=0)


def bias(graph: Graph, op: Linear, index: int) -> str:
    """The bias of layer ``index`` as real numbers; its scale is the product of two that the file holds anyway."""
    parts = [graph.scale(graph.tensor(op).scale), f"v{index}"]
    inputs = [graph.constant(f"b{index}", op.bias), graph.node("Mul", parts, f"u{index}")]
    return graph.node("DequantizeLinear", inputs, f"y{index}", axis=0)


def by_groups(graph: Graph, op: Linear, index: int) -> str:
    """The weights ``[in, out]`` of a layer whose groups of inputs have multipliers: exact float64, in units of its scale."""
    assert op.multipliers is not None
    used, double = op.used.T, graph.onnx.TensorProto.DOUBLE
    narrow = np.int8 if used.min() >= -128 and used.max() <= 127 else np.int16
    whole = graph.node("Cast", [graph.constant(f"w{index}", used.astype(narrow))], f"i{index}", to=double)
    owners = np.repeat(np.arange(len(op.sizes)), op.sizes)
    parts = [graph.constant(f"m{index}", np.ascontiguousarray(op.multipliers.T)), graph.constant(f"o{index}", owners)]
    factor = graph.node("Cast", [graph.node("Gather", parts, f"g{index}", axis=0)], f"k{index}", to=double)
    unit = graph.constant("group_unit", np.array(1 / GROUP_UNIT, np.float64))
    return graph.node("Mul", [graph.node("Mul", [whole, factor], f"e{index}"), unit], f"x{index}")


def _integers(graph: Graph, op: Linear, index: int) -> str:
    """The ``int8`` weights that the runtime uses, ``weight << shift``, in the smaller of two ways to store them."""
    if op.weight_zero is not None:
        raise TargetError(
            f"layer {op.path!r} has asymmetric weights, which this file format does not hold: they run in float. "
            "Quantize the network for a target that refuses them, such as 'onnxruntime-cpu'."
        )
    shape = (-1, *[1] * (op.weight.ndim - 1))
    wide = op.used
    if wide.min(initial=0) < -128 or wide.max(initial=0) > 127:
        raise TargetError(f"layer {op.path!r}: weight << shift leaves int8; lower the shift of that channel.")
    if op.path in graph.int4:
        return _int4(graph, op, wide, index)
    bits = _stream_bits(op.weight)
    cost = op.weight.size * bits // 8 + _UNPACKING[0] + (op.shift.size + _UNPACKING[1] if op.shift.any() else 0)
    if not graph.packed or bits == 8 or cost >= op.weight.size:
        return graph.constant(f"w{index}", wide.astype(np.int8))
    spread = _spread(graph, op.weight, bits, index)
    if op.shift.any():
        factor = graph.constant(f"j{index}", (1 << op.shift.astype(np.int64)).astype(np.uint8).reshape(shape))
        factor = graph.node("Cast", [factor], f"k{index}", to=graph.onnx.TensorProto.INT32)
        spread = graph.node("Mul", [spread, factor], f"m{index}")
    return graph.node("Cast", [spread], f"w{index}", to=graph.onnx.TensorProto.INT8)


def _int4(graph: Graph, op: Linear, values: NDArray[np.int64], index: int) -> str:
    """ONNX's own ``INT4``, cast to ``int8``: the cast is folded when the file is loaded (behind a ``DequantizeLinear`` of the
    ``INT4`` itself the layer would stay in float).
    """
    if values.min(initial=0) < -8 or values.max(initial=0) > 7:
        raise TargetError(
            f"layer {op.path!r} cannot store INT4: its weights reach from {values.min()} to {values.max()} "
            f"({op.weight_bits} bits, shifts up to {op.shift.max()}). Allowed: -8 to 7. Leave it out of int4."
        )
    stored = graph.constant(f"i{index}", values.astype(require("ml_dtypes").int4))
    return graph.node("Cast", [stored], f"w{index}", to=graph.onnx.TensorProto.INT8)


def _spread(graph: Graph, values: NDArray[np.int8], bits: int, index: int) -> str:
    """Nodes that turn a stream of ``bits``-bit two's complements, lowest bit first, into int32 ``values.shape``."""
    planes = (values.reshape(-1, 1).view(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    stream = graph.constant(f"i{index}", np.packbits(planes, bitorder="little").reshape(-1, 1))
    worth = 1 << np.arange(bits)
    worth[-1] *= -1
    single = graph.node(
        "BitShift", [stream, graph.constant("e", np.arange(8, dtype=np.uint8))], f"e{index}", direction="RIGHT"
    )
    single = graph.node("Mod", [single, graph.byte(2)], f"f{index}")
    shape = graph.constant(f"h{index}", np.array((*values.shape, bits), np.int64))
    parts = [graph.node("Reshape", [single, shape], f"g{index}"), graph.constant(f"c{bits}", worth.astype(np.int8))]
    return graph.node("MatMulInteger", parts, f"l{index}")


def _stream_bits(values: NDArray[np.int8]) -> int:
    """The fewest bits that hold every weight and make whole bytes of all of them; 8 means that nothing is gained."""
    fits = (bits for bits in range(1, 8) if -1 << (bits - 1) <= values.min() and values.max() < 1 << (bits - 1))
    return next((bits for bits in fits if values.size * bits % 8 == 0), 8)
