"""Reads an exported ONNX file back and compares every number in it with the program it should hold.

Shares no code with the exporter. A finite set of images can miss a scale that is off by one unit in the last place;
this comparison cannot. It also yields each layer as a little model of its own (:meth:`File.cut`), made of the file's
own nodes and initialisers, which is how a difference is located: looking inside a whole network changes what the
runtime does.

What is relied on: the file lists layers in the program's order and calls what they make ``q0``, ``q1``, ..., the last
``integers``; what depends on no input is folded here as the runtime folds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy.expected import expected
from nasq.deploy.pattern import Finding, Fixed, Made, Match, Read
from nasq.deploy.screening import screen
from nasq.deploy.shapes import MAX_ELEMENTS
from nasq.errors import ArtifactError, require
from nasq.quant.program import Program

__all__ = ["File", "Finding", "Layer", "compare", "read"]

_MAX_BYTES = 1 << 30
_LAYER = re.compile(r"q\d+|integers")


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
        inputs = [_any_batch(real[name]) if name in real else _any_shape(name) for name in sorted(wanted)]
        output = _any_shape(self.layers[index].output)
        constants = [value for value in self.model.graph.initializer if value.name in used]
        graph = helper.make_graph(list(nodes.values()), "cut", inputs, [output], constants)
        imports = self.model.opset_import
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.model.ir_version)
        data: bytes = model.SerializeToString()
        return data


def _any_batch(value: Any) -> Any:
    """An input of the file for any number of images: a part of it is run on as many as there are."""
    onnx = require("onnx")
    kind, sizes = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
    shape = ["batch", *(size.dim_value if size.HasField("dim_value") else size.dim_param for size in sizes[1:])]
    return onnx.helper.make_tensor_value_info(value.name, kind, shape)


def _any_shape(name: str) -> Any:
    onnx = require("onnx")
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)


def read(source: bytes | Path) -> File:
    """Parses a file into layers; what is not understood is listed in :attr:`File.strange`, never skipped.

    Raises:
        ArtifactError: Not a valid ONNX file, larger than 1 GiB, or with what is never allowed
            (:mod:`nasq.deploy.screening`).
    """
    onnx = require("onnx")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > _MAX_BYTES:
        raise ArtifactError(f"the ONNX file has {size} bytes; at most {_MAX_BYTES} are read.")
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
        screen(model)
        onnx.checker.check_model(model)
        constants = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"this is not a valid ONNX file: {error}. Export the bundle again.") from error
    return _Reader(model, constants).file()


_CASTS = {3: np.int8, 6: np.int32}  # by their codes in onnx.TensorProto


def _fold(node: Any, inputs: list[NDArray[Any]]) -> NDArray[Any] | None:
    """What a node of constants computes, or ``None`` where such a node has no business in a file of ours."""
    types, settings = tuple(value.dtype.name for value in inputs), {item.name: item for item in node.attribute}
    if not _small(inputs):
        return None
    match node.op_type, types:
        case "Mul", ("float32", "float32") | ("int32", "int32"):
            with np.errstate(invalid="ignore", over="ignore"):  # of a damaged file
                return np.asarray(inputs[0] * inputs[1])
        case "BitShift", ("uint8", "uint8") if settings["direction"].s == b"RIGHT":
            return np.asarray(inputs[0] >> inputs[1])
        case "Mod", ("uint8", "uint8") if not settings and bool(np.all(inputs[1] > 0)):
            return np.asarray(inputs[0] % inputs[1])
        case "Reshape", (_, "int64") if prod(map(int, inputs[1])) == inputs[0].size and bool(np.all(inputs[1] > 0)):
            return inputs[0].reshape(inputs[1])
        case "MatMulInteger", ("uint8", "int8") if inputs[0].shape[-1:] == inputs[1].shape:
            return np.asarray(inputs[0].astype(np.int32) @ inputs[1].astype(np.int32))
        case "Cast", ("uint8" | "int32" | "int4",) if settings["to"].i in _CASTS:
            cast = inputs[0].astype(_CASTS[settings["to"].i])
            return cast if np.array_equal(cast, inputs[0]) else None
    return None


def _small(inputs: list[NDArray[Any]]) -> bool:
    """Whether what small arrays become together stays small: two of them may broadcast to something huge."""
    try:
        return prod(np.broadcast_shapes(*(value.shape for value in inputs))) <= MAX_ELEMENTS
    except ValueError:  # they do not broadcast: a new shape, or a matrix and a vector, make nothing larger
        return True


class _Reader:
    """Groups the nodes of a graph into layers."""

    def __init__(self, model: Any, initializers: Mapping[str, NDArray[Any]]) -> None:
        self.model = model
        self.constants = dict(initializers)
        self.nodes = list(model.graph.node)
        for node in self.nodes:
            inputs = [self.constants[name] for name in node.input if name in self.constants]
            if len(inputs) == len(node.input) and (value := _fold(node, inputs)) is not None:
                self.constants[node.output[0]] = value
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.made = {name for node in self.nodes for name in node.output if _LAYER.fullmatch(name)}
        self.given = {value.name for value in model.graph.input}
        self.strange: list[Finding] = []

    def file(self) -> File:
        outputs = [name for node in self.nodes for name in node.output if name in self.made]
        layers = tuple(self.layer(name) for name in outputs)
        known = {id(node) for layer in layers for node in layer.nodes}
        for node in self.nodes:
            if id(node) not in known and not self.is_final(node):
                found = Finding(
                    node.name or node.output[0], "node", "no such node", f"{node.op_type} {node.output[0]!r}"
                )
                self.strange.append(found)
        if self.model.functions or any(node.domain for node in self.nodes):
            self.strange.append(Finding("", "operators", "standard ONNX operators only", "functions or another domain"))
        return File(self.model, layers, self.constants, tuple(self.strange))

    def is_final(self, node: Any) -> bool:
        """Whether this is the dequantization of the network's output."""
        outputs = {value.name for value in self.model.graph.output}
        return node.op_type == "DequantizeLinear" and node.output[0] in outputs

    def layer(self, output: str) -> Layer:
        """Everything that the layer's tensor is made of, up to other layers' tensors."""
        part: dict[int, Any] = {}
        read: dict[str, None] = {}
        left = [output]
        while left:
            name = left.pop()
            if name in self.given or (name in self.made and name != output):
                read[name] = None
            elif name in self.makers and id(self.makers[name]) not in part:
                part[id(self.makers[name])] = self.makers[name]
                left.extend(reversed(self.makers[name].input))
        nodes = tuple(node for node in self.nodes if id(node) in part)
        return Layer(next((node for node in nodes if node.name), nodes[-1]), nodes, tuple(read), output)


# -- comparison -------------------------------------------------------------------------------------------------------


def compare(file: File, program: Program) -> tuple[Finding, ...]:
    """Every number, shape and connection of ``file`` that differs from ``program``; empty where they are the same."""
    found = list(file.strange)
    if len(file.layers) != len(program.ops):
        found.append(Finding("", "the number of layers", str(len(program.ops)), str(len(file.layers))))
        return tuple(found)
    makers = {name: node for node in file.model.graph.node for name in node.output}
    names = {"input": next((value.name for value in file.model.graph.input), "")}
    # The network's input is no tensor of the program: only its quantized form is, whatever it is called.
    for op, layer in zip(program.ops, file.layers, strict=True):
        match = Match(op.path, makers, file.constants, names)
        wanted = expected(op, program)
        if wanted is None:
            match.say("operator", "one that a file can hold", type(op).__name__)
        else:
            match.part(layer.output, wanted)
        found += match.found
        names[op.output.name] = layer.output
    return tuple(found + _compare_ends(file, program, makers))


def _compare_ends(file: File, program: Program, makers: Mapping[str, Any]) -> list[Finding]:
    """The graph's outputs: the final integers, and their dequantization."""
    tensor = program.output
    final = file.layers[-1].output
    outputs = {value.name for value in file.model.graph.output}
    last = [node for node in file.model.graph.node if node.op_type == "DequantizeLinear" and node.output[0] in outputs]
    if len(last) != 1 or last[0].input[0] != final or outputs != {final, last[0].output[0]}:
        wanted = "the final integers and their dequantization"
        return [Finding("", "the graph's outputs", wanted, ", ".join(sorted(outputs)))]
    match = Match(program.ops[-1].path, makers, file.constants, {tensor.name: final})
    grid = (
        Fixed("dequantized output scale", np.array(tensor.scale, np.float32)),
        Fixed("dequantized output zero-point", np.array(tensor.zero_point, np.uint8)),
    )
    match.part(last[0].output[0], Made("DequantizeLinear", (Read(tensor.name), *grid)))
    return match.found
