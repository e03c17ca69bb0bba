"""Runs exported files on OpenVINO's CPU plugin, and reads which layers it runs as integers.

The file is the same ONNX form that onnxruntime runs, with one operation of its own: a convolution and the residual sum
behind it, because OpenVINO fuses the two and rounds once (rule ``add="one"``). What became an integer kernel is read
from the graph that the plugin executes: the kernel's own type, such as ``brgconv_avx512_I8``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy.runtimes import KINDS, Coverage, kinds_of, named_layers
from nasq.errors import ArtifactError, InputError, TargetError, choose_from, require
from nasq.quant.program import Program

__all__ = ["OpenVino", "integer_coverage", "kernel_counts", "prepare_cut", "run_cut"]

_EXTRA = "openvino"
_IDLE = {"Parameter", "Input", "Const", "Output", "Result"}


class OpenVino:
    """A model compiled for the CPU by OpenVINO.

    Args:
        model: The file or its bytes; run as it is.
        threads: Threads of one inference.
        session: Properties of the plugin, such as ``INFERENCE_PRECISION_HINT`` (``"f32"`` by default: without it, layers
            that stay in float run in bf16 where the processor has that).
        chunk: Most images in one call.
        batch: A fixed batch size to compile for; without it, any.

    Raises:
        ArtifactError: The runtime refuses the file.
        InputError: An unknown property, or ``threads`` below 1.
        MissingPackageError: OpenVINO is not installed.
    """

    def __init__(
        self,
        model: bytes | Path,
        threads: int = 1,
        session: Mapping[str, object] | None = None,
        chunk: int = 256,
        batch: int | None = None,
    ) -> None:
        self.compiled = _compile(model, threads, session or {}, batch)
        self.name = f"openvino {require('openvino').__version__.split('-')[0]}"
        self.chunk = batch or chunk
        self.fixed = batch
        self.outputs = tuple(name for port in self.compiled.outputs for name in port.get_names())

    def run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The final integers, ``uint8 [N, ...]``.

        Raises:
            TargetError: The file has no output ``integers`` (an fp32 baseline, say).
            InputError: ``N`` is no multiple of the fixed batch size.
        """
        return np.asarray(self._fetch("integers", x), np.uint8)

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The fp32 output, ``[N, ...]``."""
        return np.asarray(self._fetch("output", x), np.float32)

    def _fetch(self, name: str, x: NDArray[np.float32]) -> NDArray[Any]:
        if name not in self.outputs:
            raise TargetError(f"the file has no output {name!r}; it has {', '.join(self.outputs)}. Export it again.")
        if self.fixed and len(x) % self.fixed:
            raise InputError(
                f"the file was compiled for batches of {self.fixed} images, and {len(x)} is not a multiple of that. "
                "Give another number of images."
            )
        parts = [x[i : i + self.chunk] for i in range(0, len(x), self.chunk)]
        return np.concatenate([_execute(self.compiled, {0: part})[name] for part in parts])


def _compile(model: bytes | Path, threads: int, session: Mapping[str, object], batch: int | None = None) -> Any:
    ov = require("openvino", _EXTRA)
    if threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1.")
    core = ov.Core()
    known = set(core.get_property("CPU", "SUPPORTED_PROPERTIES"))
    for key in session:
        if key not in known:
            raise choose_from("property of OpenVINO's CPU plugin", key, known)
    settings = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", **session}
    try:
        read = core.read_model(model if isinstance(model, bytes) else str(model))
        if batch is not None:
            read.reshape([batch, *list(read.input(0).partial_shape)[1:]])
        return core.compile_model(read, "CPU", settings)
    except RuntimeError as error:
        where = "the ONNX file" if isinstance(model, bytes) else str(model)
        raise ArtifactError(f"openvino {ov.__version__} refuses {where}: {error}") from error


def _execute(compiled: Any, feeds: Mapping[Any, NDArray[Any]]) -> Any:
    try:
        return compiled(dict(feeds))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in feeds.items())
        raise ArtifactError(f"openvino cannot run the file on {shapes}: {error}") from error


def run_cut(model: bytes, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The only output of a small model with any inputs, such as one layer cut out of a file.

    Raises:
        ArtifactError: The runtime refuses the model or its inputs.
    """
    shaped = _with_shapes(model, {name: value.shape for name, value in feeds.items()})
    return np.asarray(_execute(_compile(shaped, 1, {}), feeds)[0])


def prepare_cut(model: bytes, feeds: Mapping[str, NDArray[Any]], threads: int) -> Callable[[], object]:
    """A small model, compiled once, to be run on the same inputs again and again."""
    shaped = _with_shapes(model, {name: value.shape for name, value in feeds.items()})
    compiled = _compile(shaped, threads, {})
    return lambda: _execute(compiled, feeds)


def _with_shapes(model: bytes, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """OpenVINO has to know the rank of every input; a cut layer does not say it."""
    onnx = require("onnx")
    proto = onnx.load_model_from_string(model)
    for value in proto.graph.input:
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    data: bytes = proto.SerializeToString()
    return data


def _executed(model: bytes | Path, session: Mapping[str, object]) -> list[tuple[str, str, list[str]]]:
    """Every node that the plugin executes: layer type, kernel type, and the names of the nodes it stands for."""
    nodes = []
    for node in _compile(model, 1, session).get_runtime_model().get_ordered_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if facts.get("layerType", "Const") not in _IDLE:
            stands = facts.get("originalLayersNames", "").split(",")
            nodes.append((facts["layerType"], facts.get("primitiveType", ""), stands))
    return nodes


def kernel_counts(model: bytes | Path, session: Mapping[str, object] | None = None) -> dict[str, int]:
    """How often each kind of kernel occurs in the graph that the runtime executes: ``"Convolution I8"``."""
    kinds = (f"{layer} {kernel.rsplit('_', 1)[-1].upper()}" for layer, kernel, _ in _executed(model, session or {}))
    return dict(sorted(Counter(kinds).items()))


def integer_coverage(model: bytes | Path, program: Program, session: Mapping[str, object] | None = None) -> Coverage:
    """Counts the layers of ``program`` that the runtime executes as integer kernels, and names the others."""
    executed = _executed(model, session or {})
    # What a node was split into is called after it: "fc/WithoutBiases".
    owners = {name.split("/")[0]: kernel.upper().endswith("_I8") for _, kernel, stands in executed for name in stands}
    total, integer, floats = Counter[str](), Counter[str](), list[str]()
    for name, op in named_layers(program):
        for kind in kinds_of(op):
            total[kind] += 1
            # A sum that is part of a convolution has a node of its own in the file.
            node = f"{name}+" if kind == "sums" and len(op.inputs) == 2 and kinds_of(op)[0] != kind else name
            if owners.get(node, False):
                integer[kind] += 1
            else:
                floats.append(op.path)
    kernels = dict(
        sorted(Counter(f"{layer} {kernel.rsplit('_', 1)[-1].upper()}" for layer, kernel, _ in executed).items())
    )
    return Coverage(
        {kind: total[kind] for kind in KINDS}, {kind: integer[kind] for kind in KINDS}, tuple(floats), kernels
    )
