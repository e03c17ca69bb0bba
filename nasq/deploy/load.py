"""Loads a bundle to use it: as a torch module that computes the bundle's integers, or on the runtime it was made for.

:class:`IntegerNetwork` runs a :class:`~nasq.quant.program.Program` operation by operation with the arithmetic of the
evaluation (:mod:`nasq.quant.arithmetic`), integers held in fp32 (in float64 where a layer's sums pass 2^24). It needs
neither the search space nor the training code that the subnet came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, sandbox, storage
from nasq.deploy.engines import ENGINES, engine_of, target_of
from nasq.deploy.parity import MODEL
from nasq.deploy.runtimes import Runtime
from nasq.errors import ArtifactError, InputError, TargetError, choose_from
from nasq.quant.program import Program

if TYPE_CHECKING:
    from nasq.deploy.integer_network import IntegerNetwork

__all__ = ["RuntimeNetwork", "load"]

CUDA, INDUCTOR = "nasq-cuda", "inductor"
LARGEST_BATCH = 256  # images in one call of the runtime; more are split


class RuntimeNetwork:
    """A bundle's file on its runtime, as a function of images.

    Args:
        program: The bundle's program.
        runtime: Runs the file.

    Attributes:
        program: As given; its ``meta`` says what the subnet was trained on and how inputs are normalised.
    """

    def __init__(self, program: Program, runtime: Runtime) -> None:
        self.program, self.runtime = program, runtime

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The dequantized output ``[N, ...]`` of normalised fp32 images ``[N, ...]``.

        Raises:
            InputError: ``x`` is no fp32 array of images of the network's shape, or holds NaN or infinities.
        """
        return self.runtime.logits(self._taken(x))

    def integers(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The final container integers ``[N, ...]``; raises as a call does."""
        return self.runtime.run(self._taken(x))

    def _taken(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        shape = self.program.ops[0].output.shape
        if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.shape[1:] != shape or not x.shape[0]:
            given = f"{type(x).__name__} {getattr(x, 'dtype', '')} of shape {list(getattr(x, 'shape', []))}"
            raise InputError(
                f"the network takes a NumPy array of fp32 images [N, {', '.join(map(str, shape))}], given: {given}."
            )
        if not np.isfinite(x).all():
            raise InputError("the images hold NaN or infinities; they have no integer. Look at what normalises them.")
        return x

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.program.ops[0].output.shape))
        return f"RuntimeNetwork({len(self.program.ops)} operations, input {shape}, {self.runtime.name})"


@overload
def load(directory: Path | str, runtime: None = None) -> IntegerNetwork: ...
@overload
def load(directory: Path | str, runtime: str, *, threads: int = 1, trusted: bool = False) -> RuntimeNetwork: ...
def load(directory: Path | str, runtime: str | None = None, *, threads: int = 1, trusted: bool = False) -> Any:
    """Loads a bundle.

    Args:
        directory: The bundle.
        runtime: ``None``: a torch module, made of ``subnet.json`` and ``model.safetensors`` alone; else the runtime of
            the bundle's target, such as ``"onnxruntime"``, on which its ``model.onnx`` runs; or, for bundles of any
            target and made of the program alone, ``"inductor"``: compiled for this processor when it is first called
            (:mod:`nasq.deploy.inductor`), and ``"nasq-cuda"``: nasq's own kernels on a CUDA device.
        threads: Threads inside an operator (with a runtime).
        trusted: Whether ``model.onnx`` is run without being looked at first. Otherwise it is parsed in a child process
            with limits (:mod:`nasq.deploy.sandbox`), and only a file that says, number by number, what the bundle says
            is given to the runtime; that takes a second or two.

    Returns:
        :class:`~nasq.deploy.integer_network.IntegerNetwork` (``model(x)`` is the dequantized output,
        ``model.integers(x)`` the final integers), or a :class:`RuntimeNetwork` with the same two calls on arrays.

    Raises:
        ArtifactError: The bundle is damaged, incomplete or hostile, or its file is not what the bundle says.
        TargetError: The bundle was made for another runtime, or nothing here can compile it for ``"inductor"``.
        InputError: An unknown runtime, or no CUDA device for ``"nasq-cuda"``.
    """
    directory = Path(directory)
    if runtime not in (None, CUDA, *ENGINES):
        raise choose_from("runtime", str(runtime), [CUDA, *ENGINES], "Without one, a torch module is loaded.")
    program = bundle.read(directory)
    if runtime is None:
        from nasq.deploy.integer_network import IntegerNetwork

        return IntegerNetwork(program)
    if runtime == INDUCTOR:
        return RuntimeNetwork(program, ENGINES[INDUCTOR].open(program, threads, {}, LARGEST_BATCH))
    if runtime == CUDA:
        from nasq.deploy.cuda_runtime import CudaRuntime

        return RuntimeNetwork(program, CudaRuntime(program))
    engine = engine_of(program)
    if engine.name != runtime:
        raise TargetError(
            f"{directory} was made for the target {program.target!r}, whose file runs on {engine.name!r}, not on "
            f"{runtime!r}. Load it for that, without a runtime, or export it for another target."
        )
    data = storage.steady(directory, lambda: storage.read(directory, MODEL))
    if not trusted:
        _require_same(directory, data)
    target = target_of(program)
    return RuntimeNetwork(program, engine.open(data, threads, {} if target is None else target.session, LARGEST_BATCH))


def _require_same(directory: Path, data: bytes) -> None:
    """Refuses a file that the child process finds to differ from the bundle, or that is not the one it looked at."""
    found = sandbox.inspect(directory)
    if found.digest != storage.digest(data):
        raise ArtifactError(f"{directory / MODEL} changed while it was being checked. Load it again.")
    if found.findings:
        more = f" (and {len(found.findings) - 1} more)" if len(found.findings) > 1 else ""
        raise ArtifactError(f"{directory / MODEL} is not the bundle's: {found.findings[0]}{more}. Export it again.")
