"""Peak memory of a candidate, from the kernel's own accounts (Linux: `VmHWM`, proc(5)); elsewhere it is not known.

A file is loaded and run in a child process that holds nothing else: what the parent has loaded and cached before does
not count. A function of this process can only be watched from inside: memory that earlier calls left behind is given
back to the system first, then the growth of the peak during one call is taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nasq.errors import NasqError, require

__all__ = ["CHILD", "GROWTH", "growth_of_call", "peak_of_file"]

CHILD = "child process: peak growth from loading the file and 3 runs"
"""The method of :func:`peak_of_file`, in words; figures of different methods do not compare."""

GROWTH = "this process: peak growth during one run, weights not counted"
"""The method of :func:`growth_of_call`, in words."""

_MIB = 1 << 20
_SECONDS = 120
_CODE = "import sys; from nasq.deploy.memory import _child; _child(*sys.argv[1:])"


def peak_of_file(path: Path, shape: Sequence[int], threads: int) -> float | None:
    """Peak memory, MiB, of an ONNX file on onnxruntime, above what the bare runtime takes.

    Args:
        path: The file.
        shape: Of its input, batch included.
        threads: Threads inside an operator.

    Raises:
        NasqError: The child fails or takes more than 120 s; the message has the end of what it said.
    """
    command = [sys.executable, "-c", _CODE, str(path), json.dumps([int(size) for size in shape]), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True, text=True)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error))[-500:]
        raise NasqError(f"the memory of {path} could not be measured in a child process: {said}") from error
    value = json.loads(done.stdout)
    return None if value is None else float(value)


def growth_of_call(call: Callable[[], object]) -> float | None:
    """Growth of this process's peak memory during ``call``, MiB."""
    _trim()
    before = _reset_peak()
    call()
    return _growth(before)


def _trim() -> None:
    """Returns freed memory to the system, where the C library can (glibc: malloc_trim(3))."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _child(path: str, shape: str, threads: str) -> None:
    """In the child: the figure as JSON on stdout."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    x = np.zeros(json.loads(shape), np.float32)
    before = _reset_peak()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(3):
        session.run(None, {session.get_inputs()[0].name: x})
    sys.stdout.write(json.dumps(_growth(before)))


def _reset_peak() -> int | None:
    """Lets the kernel count the peak from now on; returns what is resident now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _growth(before: int | None) -> float | None:
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before) / _MIB


def _status(field: str) -> int | None:
    """A field of ``/proc/self/status`` in bytes, or ``None`` on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
