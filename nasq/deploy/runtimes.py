"""Runs exported files on their real runtime, all optimizations on, and reads which layers it runs as integers.

How many layers became integer kernels is read from the graph that the runtime itself wrote after optimizing: a fusion
seen in a two-node graph says nothing about a network.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError, InputError, TargetError, choose_from, require
from nasq.quant.program import Add, AvgPool, Concat, Conv, Linear, MatMul, Mul, Op, Program
from nasq.version import __version__

__all__ = [
    "KINDS",
    "Coverage",
    "OnnxRuntime",
    "Runtime",
    "integer_coverage",
    "kernel_counts",
    "kinds_of",
    "named_layers",
    "optimized_graph",
    "prepare_cut",
    "run_cut",
    "versions",
]

_PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "torch")


class Runtime(Protocol):
    """Executes one exported file."""

    @property
    def name(self) -> str:
        """Such as ``"onnxruntime 1.32.0"``."""

    def run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The final integers of images ``x``, fp32 ``[N, ...]``."""

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The dequantized output of images ``x``, fp32 ``[N, ...]``."""


class OnnxRuntime:
    """An onnxruntime session on the CPU.

    Args:
        model: The file or its bytes; run as it is.
        threads: Threads inside an operator; operators run one after the other.
        session: Options of the target: ``graph_optimization_level`` (default ``ORT_ENABLE_ALL``), ``execution_mode``,
            ``providers``; a key with a dot, such as ``session.force_spinning_stop``, is a session configuration entry.
        chunk: Most images in one call; a file with a fixed batch size overrides it.

    Raises:
        ArtifactError: The runtime refuses the file.
        InputError: An unknown session option, or ``threads`` below 1.
    """

    def __init__(
        self,
        model: bytes | Path,
        threads: int = 1,
        session: Mapping[str, object] | None = None,
        chunk: int = 256,
    ) -> None:
        runtime = require("onnxruntime")
        options = _options(threads, session or {})
        self.session = _open(model, options, session or {})
        self.name = f"onnxruntime {runtime.__version__}"
        self.input: str = self.session.get_inputs()[0].name
        self.outputs: tuple[str, ...] = tuple(value.name for value in self.session.get_outputs())
        batch = (self.session.get_inputs()[0].shape or [None])[0]
        self.fixed: int | None = batch if isinstance(batch, int) else None
        self.chunk = self.fixed or chunk

    def run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The final integers, ``uint8 [N, ...]``.

        Raises:
            TargetError: The file has no output ``integers`` (an fp32 baseline, say).
            InputError: The file has a fixed batch size that does not divide ``N``.
        """
        return np.asarray(self._fetch("integers", x), np.uint8)

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The fp32 output, ``[N, ...]``."""
        return np.asarray(self._fetch("output", x), np.float32)

    def _fetch(self, name: str, x: NDArray[np.float32]) -> NDArray[Any]:
        return self._fetch_all((name,), x)[0]

    def _fetch_all(self, names: tuple[str, ...], x: NDArray[np.float32]) -> list[NDArray[Any]]:
        for name in names:
            if name not in self.outputs:
                raise TargetError(
                    f"the file has no output {name!r}; it has {', '.join(self.outputs)}. Export it again."
                )
        if self.fixed and len(x) % self.fixed:
            raise InputError(
                f"the file takes batches of {self.fixed} images, and {len(x)} is not a multiple of that. "
                "Give another number of images or export without a fixed batch size."
            )
        parts = [x[i : i + self.chunk] for i in range(0, len(x), self.chunk)]
        results = [_execute(self.session, list(names), {self.input: part}) for part in parts]
        return [np.concatenate(pieces) for pieces in zip(*results, strict=True)]


def run_cut(model: bytes, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The only output of a small model with any inputs, such as one layer cut out of a file.

    Raises:
        ArtifactError: The runtime refuses the model or its inputs.
    """
    return _execute(open_session(model), None, feeds)[0]


def open_session(model: bytes, threads: int = 1) -> Any:
    """An onnxruntime session of a small model, all optimizations on."""
    return _open(model, _options(threads, {}), {})


def prepare_cut(model: bytes, feeds: Mapping[str, NDArray[Any]], threads: int) -> Callable[[], object]:
    """A small model, opened once, to be run on the same inputs again and again."""
    session = open_session(model, threads)
    return lambda: session.run(None, feeds)


def _execute(session: Any, names: list[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    try:
        results: list[NDArray[Any]] = session.run(names, dict(feeds))
    except Exception as error:
        shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in feeds.items())
        raise ArtifactError(f"onnxruntime cannot run the file on {shapes}: {error}") from error
    return results


_OPTIONS = ("execution_mode", "graph_optimization_level", "providers")


def _options(threads: int, session: Mapping[str, object]) -> Any:
    """Session options: quiet, ``threads`` inside an operator, and what the target asks for."""
    runtime = require("onnxruntime")
    if threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1.")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in session.items():
        if "." in key:
            options.add_session_config_entry(key, str(value))
        elif key not in _OPTIONS:
            raise choose_from("session option", key, [*_OPTIONS, "session.<configuration entry>"])
    if level := session.get("graph_optimization_level"):
        options.graph_optimization_level = _member(runtime.GraphOptimizationLevel, str(level))
    if mode := session.get("execution_mode"):
        options.execution_mode = _member(runtime.ExecutionMode, str(mode))
    return options


def _member(kind: Any, name: str) -> Any:
    if name not in kind.__members__:
        raise choose_from(kind.__name__, name, kind.__members__)
    return kind.__members__[name]


def _open(model: bytes | Path, options: Any, session: Mapping[str, object]) -> Any:
    runtime = require("onnxruntime")
    wanted = session.get("providers", ("CPUExecutionProvider",))
    providers = [str(name) for name in wanted] if isinstance(wanted, Iterable) else [str(wanted)]
    try:
        return runtime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=providers)
    except Exception as error:
        where = "the ONNX file" if isinstance(model, bytes) else str(model)
        raise ArtifactError(f"onnxruntime {runtime.__version__} refuses {where}: {error}") from error


def optimized_graph(model: bytes | Path, session: Mapping[str, object] | None = None) -> Any:
    """The graph that onnxruntime executes, after all its optimizations, as an ``onnx.ModelProto``."""
    onnx = require("onnx")
    with tempfile.TemporaryDirectory(prefix="nasq-") as directory:
        path = Path(directory) / "optimized.onnx"
        options = _options(1, session or {})
        options.optimized_model_filepath = str(path)
        _open(model, options, session or {})
        return onnx.load_model_from_string(path.read_bytes())


def kernel_counts(model: bytes | Path, session: Mapping[str, object] | None = None) -> dict[str, int]:
    """How often each operator occurs in the graph that the runtime executes, by operator type."""
    return dict(sorted(Counter(node.op_type for node in optimized_graph(model, session).graph.node).items()))


@dataclass(frozen=True)
class Coverage:
    """How many layers run as integer kernels.

    Attributes:
        total: Number of layers by kind: ``convolutions``, ``linears``, ``sums``, ``pools``, ``concats``.
        integer: Those of them that run as integer kernels.
        floats: Paths of the layers that do not, where the runtime kept their names.
        kernels: Every operator of the executed graph and how often it occurs.
    """

    total: Mapping[str, int]
    integer: Mapping[str, int]
    floats: tuple[str, ...]
    kernels: Mapping[str, int] = field(default_factory=dict)

    def share(self, kind: str) -> float:
        """Integer layers of a kind by all of that kind; 1 where the network has none."""
        return self.integer[kind] / self.total[kind] if self.total[kind] else 1.0

    def to_json(self) -> dict[str, object]:
        """A plain dictionary."""
        return {
            "total": dict(self.total),
            "integer": dict(self.integer),
            "floats": list(self.floats),
            "kernels": dict(self.kernels),
        }


KINDS: Mapping[str, tuple[type[Op], tuple[str, ...]]] = {
    "convolutions": (Conv, ("QLinearConv", "ConvInteger")),
    "linears": (Linear, ("QGemm", "QLinearMatMul")),
    "sums": (Add, ("QLinearAdd",)),
    "pools": (AvgPool, ("QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearConv")),
    "concats": (Concat, ("QLinearConcat",)),
    "products": (Mul, ("QLinearMul",)),
    "matrix products": (MatMul, ("QLinearMatMul",)),
}
"""Kind of layer: what counts as it in a program, and onnxruntime's integer kernels that may run it."""


def integer_coverage(model: bytes | Path, program: Program, session: Mapping[str, object] | None = None) -> Coverage:
    """Counts the layers of ``program`` that the runtime executes as integer kernels, and names the others.

    A layer is found by its name in the executed graph, which the runtime keeps (with a suffix). Where it kept none, the
    counts of the operators decide and the layer is left out of :attr:`Coverage.floats`.
    """
    nodes = optimized_graph(model, session).graph.node
    kernels: Mapping[str, int] = Counter(node.op_type for node in nodes)
    owners = _owners(nodes, [name for name, _ in named_layers(program)])
    total, integer, floats = Counter[str](), Counter[str](), list[str]()
    for name, op in named_layers(program):
        for kind in kinds_of(op):
            total[kind] += 1
            found = owners.get(name, set())
            if found & set(KINDS[kind][1]):
                integer[kind] += 1
            elif found:
                floats.append(op.path)
            elif sum(kernels[kernel] for kernel in KINDS[kind][1]) >= total[kind]:
                integer[kind] += 1
    counts = {kind: total[kind] for kind in KINDS}
    return Coverage(counts, {kind: integer[kind] for kind in KINDS}, tuple(floats), dict(sorted(kernels.items())))


def kinds_of(op: Op) -> list[str]:
    """What an operation counts as: a convolution that adds a shortcut is a sum as well."""
    kinds = [kind for kind, (of, _) in KINDS.items() if type(op) is of]
    return [*kinds, "sums"] if isinstance(op, Conv) and len(op.inputs) == 2 else kinds


def named_layers(program: Program) -> list[tuple[str, Op]]:
    """Every operation with the name its node has in the file: its path, numbered where a path repeats."""
    seen = Counter[str]()
    named = []
    for op in program.ops:
        seen[op.path] += 1
        named.append((op.path if seen[op.path] == 1 else f"{op.path}@{seen[op.path]}", op))
    return named


def _owners(nodes: Iterable[Any], names: list[str]) -> dict[str, set[str]]:
    """Operator types of the executed nodes by the layer they came from."""
    known = set(names)
    found: dict[str, set[str]] = {}
    for node in nodes:
        name = node.name if node.name in known else re.sub(r"_(token_\d+|nhwc|quant)$", "", node.name)
        if name in known:
            found.setdefault(name, set()).add(node.op_type)
    return found


def versions() -> dict[str, str]:
    """Versions of nasq, Python and the packages that take part, where installed; imports none of them."""
    found = {"nasq": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
