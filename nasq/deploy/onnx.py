"""Writes a :class:`~nasq.quant.program.Program` as an ONNX file whose layers onnxruntime runs as integer kernels.

The graph is built operation by operation, never traced: `DequantizeLinear → operator → QuantizeLinear → Clip`, with
the clip on the ``uint8`` integers and only where the tensor's range is narrower than 0..255. Max pooling, reshapes and
clips stand on the integers themselves. These forms were measured to be exact and fused:

* Average pooling over the whole map is a ``GlobalAveragePool``. Over smaller windows it is a depthwise convolution with
  weights 1 and weight scale ``fp32(1 / count)``, because the runtime's windowed kernel adds floats.
* A linear layer is a ``Gemm``; it becomes an integer kernel only if its weights carry an explicit zero-point.
* Weights of fewer than 8 bits are stored as a dense stream of bits, which a few integer nodes spread out to ``int8``.
  The runtime folds these nodes away when it loads the file: fewer bytes, the same kernels. (ONNX's ``INT4`` read by
  ``DequantizeLinear`` stays in float, and onnxruntime 1.22 has no ``Cast`` for it.)
* The scale of a bias is the product of two scales that the file holds anyway, folded in the same way.

Names are short (a file of a small network is mostly names otherwise): operation ``k`` makes ``q<k>``; the node that
does the work is named after the layer's path, the nodes around it have no name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError, TargetError, require
from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Input, Linear, MaxPool, Op, Program, Reshape, Tensor
from nasq.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["INTEGERS", "OPSET", "OUTPUT", "export", "export_float"]

OPSET = 13
"""The lowest operator set that holds per-channel DequantizeLinear and all others; its IR version is 7."""

OUTPUT = "output"
"""Name of the dequantized fp32 output."""

INTEGERS = "integers"
"""Name of the ``uint8`` output; :data:`OUTPUT` is ``(integers - zero_point) * scale``."""

_IR_VERSION = 7
_UNPACKING = (200, 75)  # bytes of the nodes that unpack one weight, and of those that shift it, about
_SCHEMA = "1"


def export(program: Program, batch: int | None = None, packed: bool = True) -> bytes:
    """Serializes a program as an ONNX model with input ``input`` fp32 ``[batch, ...]`` and two outputs.

    ``output`` holds the final tensor dequantized to fp32, ``integers`` the same as ``uint8``. The second output changes
    no fusion (measured on the whole network).

    Args:
        program: What to write; its sums must follow the rule ``"both"``.
        batch: A fixed batch size, or ``None`` for any.
        packed: Whether weights of fewer than 8 bits are stored as a dense stream of bits, where that makes the file
            smaller. Unpacking takes about 0.1 s and 45 MB per million weights, once, when the file is loaded.

    Raises:
        TargetError: An operation or a rule for sums that this file format cannot hold; names the layer.
        InputError: ``batch`` is below 1.
    """
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1, or None for a dynamic batch size.")
    onnx = require("onnx")
    graph = _Graph(program, packed)
    for op in program.ops:
        graph.layer(op)
    graph.finish()
    model = onnx.helper.make_model(
        graph.proto(batch if batch is not None else "batch"),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="nasq",
        producer_version=__version__,
    )
    facts = {"nasq.version": __version__, "nasq.schema": _SCHEMA, "nasq.target": program.target}
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class _Graph:
    """Nodes and initialisers while they are collected."""

    def __init__(self, program: Program, packed: bool) -> None:
        self.onnx = require("onnx")
        self.program = program
        self.packed = packed
        self.nodes: list[Any] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.scales: dict[bytes, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        self.paths: dict[str, int] = {}
        self.dequantized: set[str] = set()

    def node(self, kind: str, inputs: Sequence[str], output: str, path: str = "", **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], name=path, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        known = self.initializers.setdefault(name, value)
        assert known is value or np.array_equal(known, value), name
        return name

    def scale(self, value: float) -> str:
        number = np.array(value, np.float32)
        assert float(number) == value, f"scale {value!r} is not an fp32 number"
        return self.constant(self.scales.setdefault(number.tobytes(), f"s{len(self.scales)}"), number)

    def byte(self, value: int) -> str:
        return self.constant(f"z{value}", np.array(value, np.uint8))

    def unique(self, path: str) -> str:
        """``path``, or ``path@2`` for the second layer of that path (a module called twice)."""
        self.paths[path] = self.paths.get(path, 0) + 1
        return path if self.paths[path] == 1 else f"{path}@{self.paths[path]}"

    # -- one layer ------------------------------------------------------------------------------------------------

    def layer(self, op: Op) -> None:
        index = len(self.tensors)
        last = op is self.program.ops[-1]
        final = INTEGERS if last else f"q{index}"
        self.tensors[op.output.name] = op.output
        self.names[op.output.name] = final
        path = self.unique(op.path)
        match op:
            case Input():
                self.quantize("input", op.output, final, path)
            case Linear():
                self.quantize(self.affine(op, index, path), op.output, final)
            case Add():
                self.quantize(self.sum(op, index, path), op.output, final)
            case AvgPool():
                self.quantize(self.average(op, index, path), op.output, final)
            case Concat():
                parts = [self.dequantize(name) for name in op.inputs]
                self.quantize(self.node("Concat", parts, f"r{index}", path, axis=1), op.output, final)
            case MaxPool():
                self.node("MaxPool", [self.source(op)], final, path, kernel_shape=op.kernel, **_window(op))
            case Reshape():
                self.reshape(op, index, final, path)
            case Clip():
                self.clip(self.source(op), op.output, final, path)
            case _:
                raise TargetError(
                    f"layer {op.path!r}: the operation {type(op).__name__} cannot be written as ONNX. "
                    "Export it to another target or replace the layer."
                )

    def source(self, op: Op) -> str:
        return self.names[op.inputs[0]]

    def dequantize(self, name: str) -> str:
        """The fp32 view of a quantized tensor; one node for all its readers."""
        tensor, integers = self.tensors[name], self.names[name]
        real = f"d{integers}"
        if real not in self.dequantized:
            self.dequantized.add(real)
            self.node("DequantizeLinear", [integers, self.scale(tensor.scale), self.byte(tensor.zero_point)], real)
        return real

    def quantize(self, real: str, tensor: Tensor, final: str, path: str = "") -> None:
        narrow = (tensor.low, tensor.high) != (0, 255)
        wide = f"p{final}" if narrow else final
        self.node("QuantizeLinear", [real, self.scale(tensor.scale), self.byte(tensor.zero_point)], wide, path)
        if narrow:
            self.clip(wide, tensor, final)

    def clip(self, source: str, tensor: Tensor, final: str, path: str = "") -> None:
        self.node("Clip", [source, self.byte(tensor.low), self.byte(tensor.high)], final, path)

    def affine(self, op: Linear, index: int, path: str) -> str:
        inputs = [self.dequantize(op.inputs[0]), self.weight(op, index), self.bias(op, index)]
        if not isinstance(op, Conv):
            return self.node("Gemm", inputs, f"r{index}", path, transB=1)
        attributes = _window(op)
        if op.dilation != (1, 1):
            attributes["dilations"] = op.dilation
        if op.groups != 1:
            attributes["group"] = op.groups
        return self.node("Conv", inputs, f"r{index}", path, **attributes)

    def weight(self, op: Linear, index: int) -> str:
        inputs = [self.integers(op, index), self.constant(f"v{index}", op.weight_scale)]
        if not isinstance(op, Conv):
            # Without an explicit zero-point onnxruntime leaves the Gemm in float.
            inputs.append(self.constant(f"n{len(op.shift)}", np.zeros(len(op.shift), np.int8)))
        return self.node("DequantizeLinear", inputs, f"x{index}", axis=0)

    def integers(self, op: Linear, index: int) -> str:
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
        bits = _stream_bits(op.weight)
        cost = op.weight.size * bits // 8 + _UNPACKING[0] + (op.shift.size + _UNPACKING[1] if op.shift.any() else 0)
        if not self.packed or bits == 8 or cost >= op.weight.size:
            return self.constant(f"w{index}", wide.astype(np.int8))
        spread = self.spread(op.weight, bits, index)
        if op.shift.any():
            factor = self.constant(f"j{index}", (1 << op.shift.astype(np.int64)).astype(np.uint8).reshape(shape))
            factor = self.node("Cast", [factor], f"k{index}", to=self.onnx.TensorProto.INT32)
            spread = self.node("Mul", [spread, factor], f"m{index}")
        return self.node("Cast", [spread], f"w{index}", to=self.onnx.TensorProto.INT8)

    def spread(self, weight: NDArray[np.int8], bits: int, index: int) -> str:
        """Nodes that turn a stream of ``bits``-bit two's complements, lowest bit first, into int32 ``weight.shape``."""
        planes = (weight.reshape(-1, 1).view(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
        stream = self.constant(f"i{index}", np.packbits(planes, bitorder="little").reshape(-1, 1))
        value = 1 << np.arange(bits)
        value[-1] *= -1
        single = self.node(
            "BitShift", [stream, self.constant("e", np.arange(8, dtype=np.uint8))], f"e{index}", direction="RIGHT"
        )
        single = self.node("Mod", [single, self.byte(2)], f"f{index}")
        shape = self.constant(f"h{index}", np.array((*weight.shape, bits), np.int64))
        parts = [self.node("Reshape", [single, shape], f"g{index}"), self.constant(f"c{bits}", value.astype(np.int8))]
        return self.node("MatMulInteger", parts, f"l{index}")

    def bias(self, op: Linear, index: int) -> str:
        parts = [self.scale(self.tensors[op.inputs[0]].scale), f"v{index}"]
        inputs = [self.constant(f"b{index}", op.bias), self.node("Mul", parts, f"u{index}")]
        return self.node("DequantizeLinear", inputs, f"y{index}", axis=0)

    def sum(self, op: Add, index: int, path: str) -> str:
        if self.program.add != "both":
            raise TargetError(
                f"layer {op.path!r}: its sum follows the rule add={self.program.add!r}, but this file rounds both "
                "inputs. Quantize the network for a target whose rule is add='both', such as 'onnxruntime-cpu'."
            )
        return self.node("Add", [self.dequantize(name) for name in op.inputs], f"r{index}", path)

    def average(self, op: AvgPool, index: int, path: str) -> str:
        source = self.tensors[op.inputs[0]]
        real = self.dequantize(op.inputs[0])
        if op.kernel == source.shape[1:]:
            return self.node("GlobalAveragePool", [real], f"r{index}", path)
        channels = source.shape[0]
        share = np.full(channels, np.float32(1) / np.float32(op.kernel[0] * op.kernel[1]), np.float32)
        ones = np.ones((channels, 1, *op.kernel), np.int8)
        inputs = [self.constant(f"w{index}", ones), self.constant(f"v{index}", share)]
        weight = self.node("DequantizeLinear", inputs, f"x{index}", axis=0)
        return self.node("Conv", [real, weight], f"r{index}", path, group=channels, **_window(op))

    def reshape(self, op: Reshape, index: int, final: str, path: str) -> None:
        if len(op.output.shape) == 1:
            self.node("Flatten", [self.source(op)], final, path)
        else:
            shape = self.constant(f"h{index}", np.array((0, *op.output.shape), np.int64))
            self.node("Reshape", [self.source(op), shape], final, path)

    # -- the whole ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        tensor = self.program.output
        inputs = [INTEGERS, self.scale(tensor.scale), self.byte(tensor.zero_point)]
        self.node("DequantizeLinear", inputs, OUTPUT)

    def proto(self, batch: int | str) -> Any:
        helper, types = self.onnx.helper, self.onnx.TensorProto
        first, last = self.program.ops[0].output.shape, self.program.output.shape
        outputs = [
            helper.make_tensor_value_info(OUTPUT, types.FLOAT, [batch, *last]),
            helper.make_tensor_value_info(INTEGERS, types.UINT8, [batch, *last]),
        ]
        constants = [self.onnx.numpy_helper.from_array(value, name) for name, value in self.initializers.items()]
        inputs = [helper.make_tensor_value_info("input", types.FLOAT, [batch, *first])]
        return helper.make_graph(self.nodes, "nasq", inputs, outputs, constants)


def _stream_bits(weight: NDArray[np.int8]) -> int:
    """The fewest bits that hold every weight and make whole bytes of all of them; 8 means that nothing is gained."""
    fits = (bits for bits in range(1, 8) if -1 << (bits - 1) <= weight.min() and weight.max() < 1 << (bits - 1))
    return next((bits for bits in fits if weight.size * bits % 8 == 0), 8)


def _window(op: Conv | AvgPool | MaxPool) -> dict[str, Any]:
    """Strides and pads, left out where they are the defaults."""
    attributes: dict[str, Any] = {}
    if op.stride != (1, 1):
        attributes["strides"] = op.stride
    if not isinstance(op, AvgPool) and op.padding != (0, 0):
        attributes["pads"] = op.padding * 2
    return attributes


def export_float(model: torch.nn.Module, example: torch.Tensor) -> bytes:
    """Serializes a plain fp32 network as ONNX with a dynamic batch size: the baseline that a benchmark compares with.

    Args:
        model: Any module; exported in eval mode (its own mode is restored), BatchNorm folded by the exporter.
        example: An input ``[batch, ...]``.
    """
    torch = require("torch")
    buffer = io.BytesIO()
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The older exporter is asked for: it needs no further package, folds BatchNorm and writes a small file.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                buffer,
                dynamo=False,
                opset_version=17,
                input_names=["input"],
                output_names=[OUTPUT],
                dynamic_axes={"input": {0: "batch"}, OUTPUT: {0: "batch"}},
            )
    finally:
        model.train(training)
    return buffer.getvalue()
