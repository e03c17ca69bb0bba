"""Reads an exported ONNX file back and compares every number in it with the program it should hold.

Shares no code with the exporter. A finite set of images can miss a scale that is off by one unit in the last place;
this comparison cannot. It also yields each layer as a little model of its own (:meth:`File.cut`), made of the file's
own nodes and initialisers, which is how a difference is located: looking inside a whole network changes what the
runtime does.

What is relied on: the file lists layers in the program's order; a clip that is a layer of its own carries a name, the
clip of a layer's range does not; what depends on no input is folded here as the runtime folds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError, require
from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Input, Linear, MaxPool, Op, Program, Reshape, Tensor

__all__ = ["File", "Finding", "Layer", "compare", "read"]

_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One number or node in the file that is not what the bundle says: ``field`` of the layer at ``path``."""

    path: str
    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"layer {self.path!r}: {self.field} is {self.got}, the bundle says {self.expected}"


@dataclass(frozen=True)
class Layer:
    """One layer as the file holds it.

    Attributes:
        node: The node that does the work.
        nodes: All nodes of the layer in execution order, dequantization of its inputs and parameters included.
        inputs: Names of the quantized tensors it reads.
        output: Name of the quantized tensor it makes.
    """

    node: Any
    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class File:
    """A parsed file: the model, its layers in order, its initialisers, and what could not be understood."""

    model: Any
    layers: tuple[Layer, ...]
    constants: Mapping[str, NDArray[Any]]
    strange: tuple[Finding, ...] = field(default=())

    def cut(self, index: int, first: int | None = None) -> bytes:
        """Layer ``index`` as a model of its own, or the layers ``first..index`` together.

        Its inputs are the ``uint8`` tensors (fp32 for the first layer) that these layers read and do not make, under
        their names in the file; its only output is the layer's integers.
        """
        onnx = require("onnx")
        part = self.layers[index if first is None else first : index + 1]
        made = {layer.output for layer in part}
        nodes = {id(node): node for layer in part for node in layer.nodes}
        wanted = {name for layer in part for name in layer.inputs if name not in made}
        used = {name for node in nodes.values() for name in node.input}
        real = {value.name: value for value in self.model.graph.input}
        helper = onnx.helper
        inputs = [real.get(name) or _any_shape(name) for name in sorted(wanted)]
        output = _any_shape(self.layers[index].output)
        constants = [value for value in self.model.graph.initializer if value.name in used]
        graph = helper.make_graph(list(nodes.values()), "cut", inputs, [output], constants)
        imports = self.model.opset_import
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.model.ir_version)
        data: bytes = model.SerializeToString()
        return data


def _any_shape(name: str) -> Any:
    onnx = require("onnx")
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)


def read(source: bytes | Path) -> File:
    """Parses a file into layers; what is not understood is listed in :attr:`File.strange`, never skipped.

    Raises:
        ArtifactError: Not a valid ONNX file, larger than 1 GiB, or with data outside the file.
    """
    onnx = require("onnx")
    if isinstance(source, Path) and source.stat().st_size > _MAX_BYTES:
        raise ArtifactError(f"{source} has {source.stat().st_size} bytes; at most {_MAX_BYTES} are read.")
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
        embedded = list(_embedded(model))
        onnx.checker.check_model(model)
        constants = {value.name: onnx.numpy_helper.to_array(value) for value in embedded}
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"this is not a valid ONNX file: {error}. Export the bundle again.") from error
    return _Reader(model, constants).file()


def _embedded(model: Any) -> Iterable[Any]:
    for value in model.graph.initializer:
        if value.external_data or value.data_location:
            raise ArtifactError(f"the initialiser {value.name!r} lies outside the file, which must hold all its data.")
        yield value


_WORKERS = ("Conv", "Gemm", "Add", "GlobalAveragePool", "AveragePool", "MaxPool", "Flatten", "Reshape", "Concat")
_ON_INTEGERS = ("MaxPool", "Flatten", "Reshape", "Clip")


_CASTS = {3: np.int8, 6: np.int32}  # by their codes in onnx.TensorProto


def _fold(node: Any, inputs: list[NDArray[Any]]) -> NDArray[Any] | None:
    """What a node of constants computes, or ``None`` where such a node has no business in a file of ours."""
    types, settings = tuple(value.dtype.name for value in inputs), {item.name: item for item in node.attribute}
    match node.op_type, types:
        case "Mul", ("float32", "float32") | ("int32", "int32"):
            return np.asarray(inputs[0] * inputs[1])
        case "BitShift", ("uint8", "uint8") if settings["direction"].s == b"RIGHT":
            return np.asarray(inputs[0] >> inputs[1])
        case "Mod", ("uint8", "uint8") if not settings and bool(np.all(inputs[1] > 0)):
            return np.asarray(inputs[0] % inputs[1])
        case "Reshape", (_, "int64") if np.prod(inputs[1]) == inputs[0].size and bool(np.all(inputs[1] > 0)):
            return inputs[0].reshape(inputs[1])
        case "MatMulInteger", ("uint8", "int8") if inputs[0].shape[-1:] == inputs[1].shape:
            return np.asarray(inputs[0].astype(np.int32) @ inputs[1].astype(np.int32))
        case "Cast", ("uint8" | "int32",) if settings["to"].i in _CASTS:
            cast = inputs[0].astype(_CASTS[settings["to"].i])
            return cast if np.array_equal(cast, inputs[0]) else None
    return None


class _Reader:
    """Groups the nodes of a graph into layers."""

    def __init__(self, model: Any, initializers: Mapping[str, NDArray[Any]]) -> None:
        self.model = model
        self.constants = dict(initializers)
        self.nodes = list(model.graph.node)
        self.folded: set[int] = set()
        for node in self.nodes:
            inputs = [self.constants[name] for name in node.input if name in self.constants]
            if len(inputs) == len(node.input) and (value := _fold(node, inputs)) is not None:
                self.constants[node.output[0]] = value
                self.folded.add(id(node))
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.strange: list[Finding] = []

    def file(self) -> File:
        working = [node for node in self.nodes if id(node) not in self.folded]
        layers = tuple(layer for node in working if (layer := self.layer(node)) is not None)
        known = {id(node) for layer in layers for node in layer.nodes} | self.folded
        for node in self.nodes:
            if id(node) not in known and not self.is_final(node):
                self.say(node, "node", "no such node", f"{node.op_type} {node.output[0]!r}")
        if self.model.functions or any(node.domain for node in self.nodes):
            self.strange.append(Finding("", "operators", "standard ONNX operators only", "functions or another domain"))
        return File(self.model, layers, self.constants, tuple(self.strange))

    def say(self, node: Any, what: str, expected: str, got: str) -> None:
        self.strange.append(Finding(node.name or node.output[0], what, expected, got))

    def is_final(self, node: Any) -> bool:
        """Whether this is the dequantization of the network's output."""
        outputs = {value.name for value in self.model.graph.output}
        return node.op_type == "DequantizeLinear" and node.output[0] in outputs

    def layer(self, node: Any) -> Layer | None:
        inputs = {value.name for value in self.model.graph.input}
        if node.op_type == "QuantizeLinear" and node.input[0] in inputs:
            return self.behind(node, node, [node], (node.input[0],))
        if node.op_type in _ON_INTEGERS and (node.op_type != "Clip" or node.name):
            return Layer(node, (node,), (node.input[0],), node.output[0])
        if node.op_type in _WORKERS:
            return self.quantized(node)
        return None

    def quantized(self, node: Any) -> Layer | None:
        """A layer on dequantized inputs, with the quantization behind it."""
        before = [maker for name in node.input if (maker := self.maker.get(name)) is not None]
        readers = self.readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            got = ", ".join(reader.op_type for reader in readers) or "nothing"
            self.say(node, "what reads its output", "one QuantizeLinear", got)
            return None
        for maker in before:
            if maker.op_type != "DequantizeLinear":
                self.say(node, "an input", "a DequantizeLinear", maker.op_type)
                return None
        read = tuple(maker.input[0] for maker in before if maker.input[0] not in self.constants)
        parts = [part for maker in before for part in self.sources(maker)]
        return self.behind(node, readers[0], [*parts, *before, node, readers[0]], read)

    def sources(self, node: Any) -> list[Any]:
        """The folded nodes that a node depends on, in execution order."""
        makers = [self.maker[name] for name in node.input if name in self.maker and id(self.maker[name]) in self.folded]
        return [part for maker in makers for part in [*self.sources(maker), maker]]

    def behind(self, node: Any, quantize: Any, nodes: list[Any], inputs: tuple[str, ...]) -> Layer:
        """Adds the clip of the layer's own range, where the file has one."""
        readers = self.readers.get(quantize.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Clip" and not readers[0].name:
            nodes = [*nodes, readers[0]]
        return Layer(node, tuple(nodes), inputs, nodes[-1].output[0])


# -- comparison -------------------------------------------------------------------------------------------------------

_KINDS: Mapping[type[Op], tuple[str, ...]] = {
    Input: ("QuantizeLinear",),
    Conv: ("Conv",),
    Linear: ("Gemm",),
    Add: ("Add",),
    AvgPool: ("GlobalAveragePool", "Conv"),
    MaxPool: ("MaxPool",),
    Reshape: ("Flatten", "Reshape"),
    Clip: ("Clip",),
    Concat: ("Concat",),
}


def compare(file: File, program: Program) -> tuple[Finding, ...]:
    """Every number, shape and connection of ``file`` that differs from ``program``; empty where they are the same."""
    found = list(file.strange)
    if len(file.layers) != len(program.ops):
        found.append(Finding("", "the number of layers", str(len(program.ops)), str(len(file.layers))))
        return tuple(found)
    names: dict[str, str] = {}
    for op, layer in zip(program.ops, file.layers, strict=True):
        found += _Comparison(file, program, op, layer, names).run()
        names[op.output.name] = layer.output
    return tuple(found + _compare_ends(file, program))


def _compare_ends(file: File, program: Program) -> list[Finding]:
    """The graph's outputs: the final integers, and their dequantization."""
    tensor = program.output
    final = file.layers[-1].output
    outputs = {value.name for value in file.model.graph.output}
    last = [node for node in file.model.graph.node if node.op_type == "DequantizeLinear" and node.output[0] in outputs]
    if len(last) != 1 or last[0].input[0] != final or outputs != {final, last[0].output[0]}:
        wanted = "the final integers and their dequantization"
        return [Finding("", "the graph's outputs", wanted, ", ".join(sorted(outputs)))]
    check = _Comparison(file, program, program.ops[-1], file.layers[-1], {})
    check.same_parameters(last[0], tensor, "dequantized output")
    return check.found


class _Comparison:
    """One layer of the file against one operation of the program."""

    def __init__(self, file: File, program: Program, op: Op, layer: Layer, names: Mapping[str, str]) -> None:
        self.file, self.program, self.op, self.layer, self.names = file, program, op, layer, names
        self.found: list[Finding] = []

    def run(self) -> list[Finding]:
        kinds = _KINDS.get(type(self.op), ())
        if self.layer.node.op_type not in kinds:
            self.say("operator", " or ".join(kinds), self.layer.node.op_type)
            return self.found
        if not isinstance(self.op, Input):
            wanted = tuple(self.names.get(name, "?") for name in self.op.inputs)
            self.same("inputs", wanted, self.layer.inputs)
            self.dequantizers()
        if not isinstance(self.op, MaxPool | Reshape | Clip):
            self.same_parameters(self.quantizer(), self.op.output, "output")
        self.range()
        self.details()
        return self.found

    def say(self, what: str, expected: object, got: object) -> None:
        self.found.append(Finding(self.op.path, what, str(expected), str(got)))

    def same(self, what: str, expected: object, got: object) -> None:
        if expected != got:
            self.say(what, expected, got)

    def constant(self, name: str) -> NDArray[Any] | None:
        return self.file.constants.get(name)

    def array(self, what: str, name: str, expected: NDArray[Any]) -> None:
        """Type, shape and every bit equal; names the first element that differs."""
        got = self.constant(name)
        if got is None:
            self.say(what, "a constant", f"the tensor {name!r}")
        elif got.dtype != expected.dtype or got.shape != expected.shape:
            self.say(what, f"{expected.dtype} {expected.shape}", f"{got.dtype} {got.shape}")
        elif got.tobytes() != expected.tobytes():
            differs = np.argwhere(got.reshape(-1) != expected.reshape(-1)).reshape(-1)
            where = np.unravel_index(int(differs[0]) if len(differs) else 0, got.shape)
            place = f"[{', '.join(str(int(i)) for i in where)}]" if got.ndim else ""
            self.say(f"{what}{place}", repr(expected[where].item()), f"{got[where].item()!r} ({len(differs)} differ)")

    def same_parameters(self, node: Any, tensor: Tensor, what: str) -> None:
        """Scale and zero-point of a quantizing or dequantizing node."""
        self.array(f"{what} scale", node.input[1], np.array(tensor.scale, np.float32))
        zero = node.input[2] if len(node.input) > 2 else ""
        self.array(f"{what} zero-point", zero, np.array(tensor.zero_point, np.uint8))

    def quantizer(self) -> Any:
        return next(node for node in reversed(self.layer.nodes) if node.op_type == "QuantizeLinear")

    def dequantizers(self) -> None:
        for node in self.layer.nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.layer.inputs:
                for name in self.op.inputs:
                    if self.names.get(name) == node.input[0]:
                        self.same_parameters(node, self.program.tensor(name), f"input {name!r}")

    def range(self) -> None:
        """The clip on the integers: with these bounds, and there wherever the range is narrower than the container."""
        tensor, node = self.op.output, self.layer.nodes[-1]
        if isinstance(self.op, MaxPool | Reshape):
            return
        if node.op_type == "Clip":
            for what, name, bound in zip(("low", "high"), node.input[1:], (tensor.low, tensor.high), strict=False):
                self.array(f"clip {what}", name, np.array(bound, np.uint8))
            self.same("clip bounds", 2, len([name for name in node.input[1:] if name]))
        elif (tensor.low, tensor.high) != (0, 255):
            self.say("clip", f"[{tensor.low}, {tensor.high}]", "missing")

    def details(self) -> None:
        match self.op:
            case Linear():
                self.affine(self.op)
            case AvgPool() if self.layer.node.op_type == "Conv":
                self.average(self.op)
            case AvgPool():
                self.same("kernel", self.op.kernel, self.program.tensor(self.op.inputs[0]).shape[1:])
            case MaxPool():
                self.window(self.op.kernel, self.op.stride, self.op.padding)
            case Reshape():
                self.reshape(self.op)
            case Concat():
                self.attributes({"axis": 1})
            case _:
                self.attributes({})

    def attributes(self, wanted: Mapping[str, object], defaults: Mapping[str, object] | None = None) -> None:
        """The node's attributes are exactly ``wanted``, where one that is absent counts as its default."""
        onnx = require("onnx")
        values = ((item.name, onnx.helper.get_attribute_value(item)) for item in self.layer.node.attribute)
        got = {name: tuple(value) if isinstance(value, list) else value for name, value in values}
        defaults = defaults or {}
        for name in sorted({*wanted, *got}):
            expected = wanted.get(name, defaults.get(name))
            self.same(name, expected, got.get(name, defaults.get(name)))

    def window(
        self,
        kernel: tuple[int, ...],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        defaults = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
        defaults |= {"auto_pad": b"NOTSET", "ceil_mode": 0, "storage_order": 0, "kernel_shape": kernel}
        self.attributes({"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}, defaults)

    def parameters(self) -> list[Any]:
        """The nodes that dequantize weight and bias; a parameter that is not dequantized is ``None``."""
        maker = {name: node for node in self.layer.nodes for name in node.output}
        return [maker.get(name) for name in self.layer.node.input[1:]]

    def affine(self, op: Linear) -> None:
        grid = np.float32(self.program.tensor(op.inputs[0]).scale) * op.weight_scale
        made = self.parameters()
        if len(made) != 2 or None in made:
            self.say("weight and bias", "int8 and int32 with their scales", "a float, or missing")
            return
        self.parameter("weight", made[0], op.used.astype(np.int8), op.weight_scale)
        self.parameter("bias", made[1], op.bias, grid)
        if isinstance(op, Conv):
            self.window(op.weight.shape[2:], op.stride, op.padding, op.dilation, op.groups)
        else:
            self.attributes({"transB": 1}, {"alpha": 1.0, "beta": 1.0, "transA": 0})

    def parameter(self, what: str, node: Any, value: NDArray[Any], scale: NDArray[np.float32]) -> None:
        self.array(what, node.input[0], value)
        self.array(f"{what} scale", node.input[1], scale)
        if len(node.input) > 2:
            self.array(f"{what} zero-point", node.input[2], np.zeros(len(scale), value.dtype))
        axes = [item.i for item in node.attribute if item.name == "axis"]
        self.same(f"{what} axis", [0], axes)

    def average(self, op: AvgPool) -> None:
        channels = op.output.shape[0]
        share = np.full(channels, np.float32(1) / np.float32(op.kernel[0] * op.kernel[1]), np.float32)
        made = self.parameters()
        if len(made) != 1 or made[0] is None:
            self.say("weight", "int8 ones with their scale", "something else")
            return
        self.parameter("weight", made[0], np.ones((channels, 1, *op.kernel), np.int8), share)
        self.window(op.kernel, op.stride, (0, 0), groups=channels)

    def reshape(self, op: Reshape) -> None:
        if self.layer.node.op_type == "Flatten":
            self.same("shape", 1, len(op.output.shape))
            self.attributes({}, {"axis": 1})
        else:
            self.array("shape", self.layer.node.input[1], np.array((0, *op.output.shape), np.int64))
            self.attributes({}, {"allowzero": 0})
