"""Writes a :class:`~nasq.quant.program.Program` as an ONNX file whose layers onnxruntime runs as integer kernels.

The graph is built operation by operation, never traced: `DequantizeLinear → operator → QuantizeLinear → Clip`, with
the clip on the ``uint8`` integers and only where the tensor's range is narrower than 0..255. Max pooling, reshapes, slices
and clips stand on the integers themselves. These forms were measured to be exact and fused
(:mod:`nasq.deploy.emitters` writes them):

* Average pooling over the whole map is a ``GlobalAveragePool``. Over smaller windows it is a depthwise convolution with
  weights 1 and weight scale ``fp32(1 / count)``, because the runtime's windowed kernel adds floats.
* A linear layer is a ``Gemm``; it becomes an integer kernel only if its weights carry an explicit zero-point.
* Weights of fewer than 8 bits are stored as a dense stream of bits, which a few integer nodes spread out to ``int8``.
  The runtime folds these nodes away when it loads the file: fewer bytes, the same kernels. (ONNX's ``INT4`` can
  be asked for: a ``Cast`` to ``int8`` is folded as well, while ``DequantizeLinear`` of the ``INT4`` itself stays in float.)
* Tables are a ``Gather``; softmax and normalisation are written out on exact integers, because the runtime's own kernels
  add floats in an order of their own.
* The scale of a bias is the product of two scales that the file holds anyway, folded in the same way.

Names are short (a file of a small network is mostly names otherwise): operation ``k`` makes ``q<k>``; the node that
does the work is named after the layer's path, the nodes around it have no name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq import targets
from nasq.deploy.emitters import EMITTERS, Place
from nasq.errors import InputError, TargetError, choose_from, require
from nasq.quant import program as p
from nasq.quant.program import Program
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
_INT4_OPSET, _INT4_IR_VERSION = 21, 10
_SCHEMA = "1"


def export(program: Program, batch: int | None = None, packed: bool | None = None, int4: Collection[str] = ()) -> bytes:
    """Serializes a program as an ONNX model with input ``input`` fp32 ``[batch, ...]`` and two outputs.

    ``output`` holds the final tensor dequantized to fp32, ``integers`` the same as ``uint8``. The second output changes
    no fusion (measured on the whole network).

    Args:
        program: What to write.
        batch: A fixed batch size, or ``None`` for any.
        packed: Whether weights of fewer than 8 bits are stored as a dense stream of bits, where that makes the file
            smaller. Unpacking takes about 0.1 s and 45 MB per million weights, once, when the file is loaded. ``None``:
            where the program's target folds the unpacking away.
        int4: Paths of layers whose weights, of at most 4 bits, are stored as ONNX's ``INT4`` instead, which other tools read;
            the file then needs operator set 21 instead of 13.

    Raises:
        TargetError: An operation or a sum that the target's runtime would compute differently; names the layer.
        InputError: ``batch`` is below 1, ``int4`` names a layer that the program does not have, or the program's rule for
            sums is not that of its target.
    """
    known = targets.load(program.target) if program.target in targets.names() else None
    _check_rule(program, known)
    _check_int4(program, int4)
    if program.target == "tensorrt":
        raise TargetError(
            "this form has uint8 tensors and clips, which the target 'tensorrt' does not take. Write its own form: "
            "nasq.deploy.tensorrt.export(program)."
        )
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1, or None for a dynamic batch size.")
    onnx = require("onnx")
    if packed is None:
        packed = known.packed if known is not None else program.add == "both"
    graph = Graph(program, packed, frozenset(int4))
    for op in program.ops:
        graph.layer(op)
    graph.finish()
    model = onnx.helper.make_model(
        graph.proto(batch if batch is not None else "batch"),
        opset_imports=[onnx.helper.make_opsetid("", _INT4_OPSET if int4 else OPSET)],
        ir_version=_INT4_IR_VERSION if int4 else _IR_VERSION,
        producer_name="nasq",
        producer_version=__version__,
    )
    facts = {"nasq.version": __version__, "nasq.schema": _SCHEMA, "nasq.target": program.target}
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _check_rule(program: Program, target: targets.Target | None) -> None:
    """A runtime adds by its own rule, whatever the program says."""
    if target is not None and program.add != target.add:
        raise InputError(
            f"the program adds by the rule {program.add!r}, and its target {target.name!r} by {target.add!r}: the runtime "
            "would make other integers. Quantize the network for that target and freeze it again, "
            f"nasq.quant.quantize(network, example, {target.name!r}), or name a target whose rule is {program.add!r}."
        )


def _check_int4(program: Program, int4: Collection[str]) -> None:
    layers = [op.path for op in program.ops if isinstance(op, p.Linear)]
    for path in int4:
        if path not in layers:
            raise choose_from("layer of int4", path, layers)
    if int4 and any(isinstance(op, p.Softmax) for op in program.ops):
        raise TargetError(
            "a network with a softmax is written for operator set 13, which has no INT4. Leave out int4: weights of "
            "fewer than 8 bits are stored as a stream of bits, which is as small."
        )


class Graph:
    """Nodes and initialisers while they are collected.

    Attributes:
        onnx: The package.
        program, packed, int4: As :func:`export` was given them.
        tensors, names: Of what was written so far, by the program's names: the tensor, and its name in the file.
        constants: The program's names of tensors that are the same for every image.
    """

    def __init__(self, program: Program, packed: bool, int4: frozenset[str] = frozenset()) -> None:
        self.onnx = require("onnx")
        self.program = program
        self.packed, self.int4 = packed, int4
        self.nodes: list[Any] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.scales: dict[bytes, str] = {}
        self.tensors: dict[str, p.Tensor] = {}
        self.names: dict[str, str] = {}
        self.paths: dict[str, int] = {}
        self.dequantized: set[str] = set()
        self.constants: set[str] = set()

    def node(self, kind: str, inputs: Sequence[str], output: str, path: str = "", **attributes: Any) -> str:
        """Adds a node; returns the name of what it makes."""
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], name=path, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Adds an initialiser, or finds it; returns its name."""
        known = self.initializers.setdefault(name, value)
        assert known is value or np.array_equal(known, value), name
        return name

    def scale(self, value: float) -> str:
        """An fp32 number; equal ones are stored once."""
        number = np.array(value, np.float32)
        assert float(number) == value, f"scale {value!r} is not an fp32 number"
        return self.constant(self.scales.setdefault(number.tobytes(), f"s{len(self.scales)}"), number)

    def byte(self, value: int) -> str:
        """A ``uint8`` number."""
        return self.constant(f"z{value}", np.array(value, np.uint8))

    def unique(self, path: str) -> str:
        """``path``, or ``path@2`` for the second layer of that path (a module called twice)."""
        self.paths[path] = self.paths.get(path, 0) + 1
        return path if self.paths[path] == 1 else f"{path}@{self.paths[path]}"

    def layer(self, op: p.Op) -> None:
        """Writes one operation: its nodes make ``q<index>``, and the one that does the work is named after its path."""
        index = len(self.tensors)
        final = INTEGERS if op is self.program.ops[-1] else f"q{index}"
        self.tensors[op.output.name] = op.output
        self.names[op.output.name] = final
        emit = EMITTERS.get(type(op))
        if emit is None:
            raise TargetError(
                f"layer {op.path!r}: the operation {type(op).__name__} cannot be written as ONNX. "
                "Export it to another target or replace the layer."
            )
        emit(self, op, Place(index, final, self.unique(op.path)))

    def source(self, op: p.Op, place: int = 0) -> str:
        """The quantized tensor that an operation reads."""
        return self.names[op.inputs[place]]

    def tensor(self, op: p.Op, place: int = 0) -> p.Tensor:
        """What an operation reads."""
        return self.tensors[op.inputs[place]]

    def dequantize(self, name: str) -> str:
        """The fp32 view of a quantized tensor; one node for all its readers."""
        return self.real(self.names[name], self.tensors[name].scale, self.tensors[name].zero_point)

    def real(self, integers: str, scale: float, zero_point: int, name: str = "") -> str:
        """``scale * (integers - zero_point)`` in fp32."""
        real = name or f"d{integers}"
        if real not in self.dequantized:
            self.dequantized.add(real)
            self.node("DequantizeLinear", [integers, self.scale(scale), self.byte(zero_point)], real)
        return real

    def quantize(self, real: str, tensor: p.Tensor, final: str, path: str = "", scale: float | None = None) -> None:
        """Rounds to the grid of ``tensor`` (in steps of ``scale``, where another is given) and clips to its range."""
        narrow = (tensor.low, tensor.high) != (0, 255)
        wide = f"p{final}" if narrow else final
        step = self.scale(tensor.scale if scale is None else scale)
        self.node("QuantizeLinear", [real, step, self.byte(tensor.zero_point)], wide, path)
        if narrow:
            self.clip(wide, tensor, final)

    def clip(self, source: str, tensor: p.Tensor, final: str, path: str = "") -> None:
        """Clips integers to the range of ``tensor``."""
        self.node("Clip", [source, self.byte(tensor.low), self.byte(tensor.high)], final, path)

    def integers(self, *values: int) -> str:
        """A constant of shapes, axes and the like."""
        return self.constant("I" + "_".join(map(str, values)), np.array(values, np.int64))

    def finish(self) -> None:
        """The second output: the final tensor, dequantized."""
        tensor = self.program.output
        inputs = [INTEGERS, self.scale(tensor.scale), self.byte(tensor.zero_point)]
        self.node("DequantizeLinear", inputs, OUTPUT)

    def proto(self, batch: int | str) -> Any:
        """The whole graph."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        first, last = self.program.ops[0].output.shape, self.program.output.shape
        outputs = [
            helper.make_tensor_value_info(OUTPUT, types.FLOAT, [batch, *last]),
            helper.make_tensor_value_info(INTEGERS, types.UINT8, [batch, *last]),
        ]
        constants = [self.onnx.numpy_helper.from_array(value, name) for name, value in self.initializers.items()]
        inputs = [helper.make_tensor_value_info("input", types.FLOAT, [batch, *first])]
        return helper.make_graph(self.nodes, "nasq", inputs, outputs, constants)


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
