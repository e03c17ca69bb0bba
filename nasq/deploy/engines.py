"""Which runtime runs a bundle: the one of its target.

Most run the bundle's file. Inductor compiles the program on the machine at hand; there is no file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nasq import targets
from nasq.deploy import openvino, runtimes
from nasq.deploy.openvino import OpenVino
from nasq.deploy.runtimes import Coverage, OnnxRuntime, Runtime
from nasq.errors import TargetError, choose_from
from nasq.quant.program import Program
from nasq.targets import Target

__all__ = ["ENGINES", "Engine", "engine_of", "named", "target_of", "timed_session"]


@dataclass(frozen=True)
class Engine:
    """What nasq does with a runtime.

    Attributes:
        name: Such as ``"onnxruntime"``.
        open: ``(what it runs, threads, session options, largest batch)`` to a runtime; :meth:`runs` says what it runs.
        open_fixed: The same for calls of exactly that many images, which some runtimes compile better.
        cut: Runs a small ONNX model, such as one layer.
        coverage: Counts the layers that run as integer kernels: ``(what it runs, program, session options)``.
        prepare: Opens such a model once, to be timed on the same inputs: ``(model, inputs, threads)``.
        rebuilds: Whether it runs the bundle's program, compiled here, instead of its file.
    """

    name: str
    open: Callable[[Any, int, Mapping[str, object], int], Runtime]
    open_fixed: Callable[[Any, int, Mapping[str, object], int], Runtime]
    cut: Callable[[bytes, Mapping[str, NDArray[Any]]], NDArray[Any]]
    coverage: Callable[[Any, Program, Mapping[str, object] | None], Coverage]
    prepare: Callable[[bytes, Mapping[str, NDArray[Any]], int], Callable[[], object]] = runtimes.prepare_cut
    rebuilds: bool = False

    def runs(self, program: Program, model: bytes | Path) -> bytes | Path | Program:
        """What of a bundle :attr:`open` takes: the ONNX file (or its bytes), or the program."""
        return program if self.rebuilds else model


def _fixed_openvino(model: bytes | Path, threads: int, session: Mapping[str, object], batch: int) -> Runtime:
    return OpenVino(model, threads, session, batch=batch)


def _open_inductor(program: Program, threads: int, session: Mapping[str, object], chunk: int) -> Runtime:
    from nasq.deploy.inductor import Inductor

    return Inductor(program, threads, chunk)


def _fixed_inductor(program: Program, threads: int, session: Mapping[str, object], batch: int) -> Runtime:
    from nasq.deploy.inductor import Inductor

    return Inductor(program, threads, batch=batch)


def _inductor_coverage(model: object, program: Program, session: Mapping[str, object] | None) -> Coverage:
    from nasq.deploy.inductor import integer_coverage

    return integer_coverage(program)


ENGINES: Mapping[str, Engine] = {
    "onnxruntime": Engine("onnxruntime", OnnxRuntime, OnnxRuntime, runtimes.run_cut, runtimes.integer_coverage),
    "openvino": Engine(
        "openvino", OpenVino, _fixed_openvino, openvino.run_cut, openvino.integer_coverage, openvino.prepare_cut
    ),
    "inductor": Engine(
        "inductor", _open_inductor, _fixed_inductor, runtimes.run_cut, _inductor_coverage, rebuilds=True
    ),
}
"""Every runtime that nasq can run bundles on, by name."""


def named(name: str) -> Engine:
    """An engine by its name.

    Raises:
        InputError: There is none; lists those there are.
    """
    if name not in ENGINES:
        raise choose_from("runtime", name, ENGINES)
    return ENGINES[name]


def target_of(program: Program) -> Target | None:
    """The target a program was made for, if it is one that nasq ships."""
    return targets.load(program.target) if program.target in targets.names() else None


def timed_session(program: Program) -> dict[str, object]:
    """The target's session options; onnxruntime's threads stop spinning behind each run, lest they slow the next."""
    target = target_of(program)
    known: dict[str, object] = {} if target is None else dict(target.session)
    return {**known, "session.force_spinning_stop": "1"} if engine_of(program).name == "onnxruntime" else known


def engine_of(program: Program) -> Engine:
    """What runs a program's file; onnxruntime for the reference's own target, which has no runtime.

    Raises:
        TargetError: nasq does not run files of that target; gives the reason.
    """
    target = target_of(program)
    if target is None:
        return ENGINES["onnxruntime" if program.add == "both" else "openvino"]
    if not target.executes:
        raise TargetError(f"nasq does not run files of the target {target.name!r}: {target.refused['execution']}.")
    return ENGINES["onnxruntime" if target.runtime == "reference" else target.runtime]
