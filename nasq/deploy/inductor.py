"""Runs programs compiled by Inductor (``torch.compile``), and counts the layers that run on int8 kernels.

There is no file: a program is built into a torch module (:mod:`nasq.deploy.inductor_network`) and compiled on the machine at
hand, which takes from seconds to minutes once per batch size; Inductor keeps what it compiled in its own cache. So any bundle
runs here, of whatever target, and gives the reference's integers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.deploy.inductor_network import InductorNetwork
from nasq.deploy.runtimes import KINDS, Coverage, kinds_of
from nasq.errors import InputError, TargetError
from nasq.quant import program as p
from nasq.quant.program import Program

__all__ = ["Inductor", "compiled", "integer_coverage", "require_compiler", "run_part"]

_OPTIONS: Mapping[str, Any] = {
    # One source for all loops of a network: one call of the compiler instead of one for each.
    "cpp_wrapper": True,
    # a * b + c is rounded twice, as in the reference.
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
}


class Inductor:
    """A program compiled for this processor, as a :class:`nasq.deploy.runtimes.Runtime`.

    Args:
        program: A valid program, of any target.
        threads: Threads of one inference.
        chunk: Most images in one call.
        batch: A fixed batch size to compile for: what is left over is filled up. Without it, powers of two up to ``chunk``
            are compiled for as they are needed.
        compile: Without, the same network runs operation by operation: slower, and ready at once.

    Raises:
        TargetError: The processor has no such kernels, or there is no C++ compiler.
        InputError: ``threads`` or ``batch`` is below 1.
    """

    def __init__(
        self, program: Program, threads: int = 1, chunk: int = 256, batch: int | None = None, compile: bool = True
    ) -> None:
        for name, value in (("threads", threads), ("batch", 1 if batch is None else batch)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        self.program, self.threads, self.fixed = program, threads, batch
        self.chunk = batch or chunk
        self.network = InductorNetwork(program).eval()
        if compile:
            require_compiler()
        self._compile = compile
        self._calls: dict[int, Callable[[Tensor], Tensor]] = {}
        self.name = f"inductor (torch {torch.__version__})"

    def run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The final integers of images ``x``, fp32 ``[N, ...]``: uint8 ``[N, ...]``."""
        parts = [x[i : i + self.chunk] for i in range(0, len(x), self.chunk)]
        with _threads(self.threads), torch.no_grad():
            return np.concatenate([self._run(part) for part in parts])

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The dequantized output, fp32 ``[N, ...]``."""
        made = self.program.output
        return (self.run(x).astype(np.float32) - np.float32(made.zero_point)) * np.float32(made.scale)

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        count = len(x)
        size = self.fixed or min(self.chunk, 1 << max(0, count - 1).bit_length())
        if count < size:
            x = np.concatenate([x, np.repeat(x[-1:], size - count, axis=0)])
        images = torch.from_numpy(np.ascontiguousarray(x))
        if size not in self._calls:
            self._calls[size] = compiled(self.network, images) if self._compile else self.network
        return np.asarray(self._calls[size](images).numpy()[:count], np.uint8)


def compiled(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """A network compiled for inputs of one shape, with the settings under which integers stay exact.

    It is exported first: a flat graph, in which nothing of the Python that wrote it is left to be watched in each call.

    Args:
        network: In eval mode.
        example: fp32 ``[N, ...]``.
    """
    graph = torch.export.export(network, (example,), strict=False).module()
    call: Callable[[Tensor], Tensor] = torch.compile(graph, fullgraph=True, dynamic=False, options=dict(_OPTIONS))
    return call


def require_compiler() -> None:
    """Raises where Inductor would find no C++ compiler.

    Raises:
        TargetError: Says what to install.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TargetError(
            f"the runtime 'inductor' needs a C++ compiler, and {compiler!r} is not found. Install g++ (apt-get install g++) "
            "or name another in the environment variable CXX."
        )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_part(program: Program, index: int, values: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """What one operation makes of container integers, not compiled.

    Args:
        program: Holds the operation.
        index: Its number.
        values: uint8 ``[N, ...]`` by tensor, what it reads among them. A first operation quantizes: use a whole program.
    """
    op = program.ops[index]
    given_to = [p.Input((), made.output, made.path) for made in program.ops[:index] if made.output.name in op.inputs]
    network = InductorNetwork(replace(program, ops=(*given_to, op)))
    count = len(next(iter(values.values())))
    with torch.no_grad():
        given = [torch.from_numpy(np.ascontiguousarray(values[name])) for name in op.inputs]
        return np.asarray(network.execute(len(given_to), op, given, count).numpy(), np.uint8)


def integer_coverage(program: Program) -> Coverage:
    """Counts the layers of a program that run on int8 kernels, and names the others.

    Convolutions and linear layers are calls of oneDNN's int8 convolution, which does nothing else. Whatever else reads and
    writes uint8 in loops that Inductor generates counts as well; products of two tensors run in fp32.
    """
    floats = InductorNetwork(program).floats
    total, integer, kernels = Counter[str](), Counter[str](), Counter[str]()
    for index, op in enumerate(program.ops):
        kernels["float" if index in floats else "onednn.qconv" if isinstance(op, p.Linear) else "generated"] += 1
        for kind in kinds_of(op):
            total[kind] += 1
            integer[kind] += index not in floats
    named = tuple(program.ops[index].path for index in sorted(floats))
    counts = ({kind: found[kind] for kind in KINDS} for found in (total, integer))
    return Coverage(next(counts), next(counts), named, dict(sorted(kernels.items())))
