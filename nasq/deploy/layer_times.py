"""Times of single layers in the runtime, beside the same layer in fp32: what is slower in integers than in float.

Each layer of the exported file is cut out and run alone. Sums of layer times are not the time of a network (caches,
fused neighbours), but a layer that loses alone is a layer to look at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, readback, runtimes
from nasq.deploy.parity import MODEL
from nasq.errors import require
from nasq.quant.program import Add, Conv, Linear, Op, Program

__all__ = ["LayerTime", "layer_times"]


@dataclass(frozen=True)
class LayerTime:
    """One layer: its path, its operation, and median milliseconds per call in integers and in fp32."""

    path: str
    kind: str
    integer_ms: float
    float_ms: float

    @property
    def speedup(self) -> float:
        """fp32 time over integer time; below 1 the layer is slower in integers."""
        return self.float_ms / self.integer_ms


def layer_times(
    directory: Path, batch: int = 1, repeats: int = 20, seed: int = 0, skip: Collection[str] = ()
) -> list[LayerTime]:
    """Times every convolution, linear layer and sum of a bundle's file, one thread, both forms in turn.

    Args:
        directory: A bundle with its ``model.onnx``.
        batch: Images per call.
        repeats: Counted calls of each form, after three that are not.
        seed: Of the random inputs; times do not depend on the values.
        skip: Paths of layers to leave out.
    """
    program = bundle.read(directory)
    file = readback.read(directory / MODEL)
    rng = np.random.default_rng(seed)
    found = []
    for index, op in enumerate(program.ops):
        if not isinstance(op, (Conv, Linear, Add)) or op.path in skip:
            continue
        layer = file.layers[index]
        shapes = [(batch, *program.tensor(name).shape) for name in op.inputs]
        read = [(batch, *program.tensor(name).shape) for name in dict.fromkeys(op.inputs)]
        integers = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in zip(layer.inputs, read, strict=True)}
        reals = {f"x{i}": rng.standard_normal(shape, np.float32) for i, shape in enumerate(shapes)}
        calls = [_session(file.cut(index), integers), _session(_float_model(op, program, rng), reals)]
        times = _in_turn(calls, repeats)
        found.append(LayerTime(op.path, type(op).__name__, 1000 * times[0], 1000 * times[1]))
    return found


def _session(model: bytes, feeds: dict[str, NDArray[Any]]) -> Callable[[], object]:
    session = runtimes.open_session(model)
    return lambda: session.run(None, feeds)


def _in_turn(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 3):
        for call, own in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if round_ >= 3:
                own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in times]


def _float_model(op: Op, program: Program, rng: np.random.Generator) -> bytes:
    """The same operation in fp32 as an ONNX model with the inputs ``x0`` (and ``x1``)."""
    onnx = require("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info(f"x{i}", kind, ["batch", *program.tensor(name).shape])
        for i, name in enumerate(op.inputs)
    ]
    constants = []
    if isinstance(op, Linear):
        weight = rng.standard_normal(op.weight.shape, np.float32)
        bias = rng.standard_normal(len(op.weight), np.float32)
        constants = [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")]
    if isinstance(op, Conv):
        attributes = {
            "strides": op.stride, "pads": op.padding * 2, "dilations": op.dilation, "group": op.groups,
        }  # fmt: skip
        nodes = [helper.make_node("Conv", ["x0", "w", "b"], ["y"], **attributes)]
    elif isinstance(op, Linear) and len(op.output.shape) == 1:
        nodes = [helper.make_node("Gemm", ["x0", "w", "b"], ["y"], transB=1)]
    elif isinstance(op, Linear):
        constants[0] = onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
        nodes = [helper.make_node("MatMul", ["x0", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    else:
        nodes = [helper.make_node("Add", ["x0", f"x{len(op.inputs) - 1}"], ["y"])]
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "float", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
