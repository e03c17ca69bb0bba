"""Looks at a bundle from elsewhere in a child process with limits on memory, processor time, and time.

Parsers and runtimes of ONNX files are large programs in C++: a hostile file may make them loop, crash or fill the
memory. In a child process that ends with a refusal and not with the caller. The child runs as the same user: limits are
no jail, and a bundle that nobody trusts is better looked at on a machine of its own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq import errors, files
from nasq.deploy import bundle, parity, readback, storage
from nasq.errors import ArtifactError, InputError, NasqError
from nasq.quant.program import Program

__all__ = ["Inspection", "Limits", "check", "inspect"]

MAX_RESULT = 64 << 20
_FEWER = " (a large network is slow to compare: give fewer images, as in 'nasq verify --images 8')"
_CODE = "import sys; from nasq.deploy.sandbox import _child; _child(sys.argv[1])"


@dataclass(frozen=True)
class Limits:
    """What a child process may take.

    Attributes:
        memory: Bytes of address space, what the interpreter and the runtime take included.
        cpu_seconds: Processor time.
        seconds: Time on the clock.
        file: Bytes of any file that it writes (the runtime writes its optimized graph, which is read for the gate).
    """

    memory: int = 4 << 30
    cpu_seconds: int = 120
    seconds: float = 600.0
    file: int = 2 << 30

    def __post_init__(self) -> None:
        if min(self.memory, self.cpu_seconds, self.seconds, self.file) <= 0:
            raise InputError(f"the limits of a child process are {self}; each has to be above 0.")


@dataclass(frozen=True)
class Inspection:
    """What the child process found without running the file.

    Attributes:
        digest: SHA-256 of the ``model.onnx`` that it looked at.
        findings: What the file says otherwise than the bundle; empty where they agree number by number.
    """

    digest: str
    findings: tuple[str, ...]


def inspect(directory: Path, limits: Limits | None = None) -> Inspection:
    """Reads a bundle and its ``model.onnx`` in a child process and compares them, without running the file.

    Raises:
        ArtifactError: The bundle or its file is damaged or hostile, or the child process met a limit or died.
    """
    found = _call("inspect", {"directory": str(Path(directory).absolute())}, limits or Limits())
    return Inspection(str(found["digest"]), tuple(map(str, found["findings"])))


def check(
    directory: Path,
    images: NDArray[np.float32],
    labels: NDArray[np.integer] | None = None,
    *,
    layer_images: int = 32,
    limits: Limits | None = None,
) -> parity.ParityReport:
    """:func:`nasq.deploy.parity.check` in a child process.

    Raises:
        ArtifactError: As there, or the child process met a limit or died.
        InputError: As there.
    """
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        given = Path(scratch) / "images.npz"
        if labels is None:
            np.savez(given, images=images)
        else:
            np.savez(given, images=images, labels=labels)
        job = {"directory": str(Path(directory).absolute()), "data": str(given), "layer_images": layer_images}
        return parity.ParityReport.from_json(_call("check", job, limits or Limits()))


def _call(name: str, job: Mapping[str, object], limits: Limits) -> dict[str, Any]:
    """Runs a job in a child process; its result, or the error that it raised."""
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        folder = Path(scratch)
        files.write_json(folder / "job.json", {"name": name, "limits": asdict(limits), **job})
        said = folder / "stderr"
        with said.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, scratch],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, cwd=scratch,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,
            )  # fmt: skip
            code = _wait(process, limits)
        return _result(folder, code, said, str(job["directory"]), limits)


def _wait(process: subprocess.Popen[bytes], limits: Limits) -> int | None:
    """The exit code; ``None`` where the time was up. Whatever happens, nothing of the child is left."""
    try:
        return process.wait(limits.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _result(folder: Path, code: int | None, said: Path, directory: str, limits: Limits) -> dict[str, Any]:
    path = folder / "result.json"
    if code == 0 and path.is_file() and path.stat().st_size <= MAX_RESULT:
        found = files.read_json(path)
        if "error" not in found:
            return dict(found["value"])
        kind = getattr(errors, str(found["error"]), ArtifactError)
        raise kind(found["message"])
    raise ArtifactError(f"{directory} is refused: the child process that looked at it {_end(code, said, limits)}.")


def _end(code: int | None, said: Path, limits: Limits) -> str:
    if code is None:
        return f"took more than {limits.seconds:g} seconds{_FEWER}"
    if code == -signal.SIGXCPU:
        return f"took more than {limits.cpu_seconds} seconds of processor time{_FEWER}"
    memory = f"(its memory is limited to {limits.memory >> 20} MiB)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} {memory}"
    lines = said.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
    return f"failed {memory}: {lines[-1] if lines else f'exit code {code}'}"


# -- in the child -----------------------------------------------------------------------------------------------------


def _limit(limits: Mapping[str, Any]) -> None:
    cpu = int(limits["cpu_seconds"])
    wanted = {
        resource.RLIMIT_AS: (int(limits["memory"]),) * 2,
        resource.RLIMIT_CPU: (cpu, cpu + 5),  # the first sends SIGXCPU, the second SIGKILL
        resource.RLIMIT_FSIZE: (int(limits["file"]),) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, pair in wanted.items():
        try:
            resource.setrlimit(kind, pair)
        except (ValueError, OSError) as error:
            if sys.platform == "linux":  # elsewhere a system may not know a limit
                raise NasqError(f"the limits of the child process cannot be set: {error}.") from error


def _inspect(job: Mapping[str, Any]) -> dict[str, Any]:
    directory = Path(job["directory"])
    program = bundle.read(directory)
    data = storage.read(directory, parity.MODEL)
    return {"digest": storage.digest(data), "findings": differences(program, data)}


def differences(program: Program, data: bytes) -> list[str]:
    """What an ONNX file says otherwise than a program; for files that are trusted enough to be parsed here.

    Raises:
        ArtifactError: It is not a valid file, or holds what is never allowed.
    """
    return [str(finding) for finding in readback.compare(readback.read(data), program)]


def _check(job: Mapping[str, Any]) -> dict[str, Any]:
    with np.load(job["data"], allow_pickle=False) as given:
        images, labels = given["images"], given.get("labels")
    return parity.check(Path(job["directory"]), images, labels, layer_images=job["layer_images"]).to_json()


_JOBS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"inspect": _inspect, "check": _check}


def _child(scratch: str) -> None:
    folder = Path(scratch)
    job = files.read_json(folder / "job.json")
    _limit(job["limits"])
    try:
        found: dict[str, Any] = {"value": _JOBS[job["name"]](job)}
    except NasqError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        limit = int(job["limits"]["memory"]) >> 20
        found = {"error": "ArtifactError", "message": f"{job['directory']} is refused: reading it takes more than {limit} "
                 "MiB of memory."}  # fmt: skip
    files.write_json(folder / "result.json", found)
