"""Times from the bytes of image files to the class: decode, resize, normalise, run.

A network's own time is what the runtime needs for a tensor that is there already. Who serves images pays for the rest
too, often more than for a small integer network.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, storage
from nasq.deploy.engines import engine_of, target_of
from nasq.deploy.parity import MODEL
from nasq.deploy.timing import Timing
from nasq.errors import InputError, require
from nasq.quant.program import Program

__all__ = ["STAGES", "end_to_end", "normaliser"]

STAGES = ("decode", "resize", "normalise", "run")


@dataclass(frozen=True)
class _Input:
    """How a bundle's inputs are made."""

    channels: int
    size: tuple[int, int]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]


def normaliser(program: Program) -> _Input:
    """What a program's ``meta`` says about its inputs.

    Raises:
        InputError: It says nothing, or the input is no image.
    """
    shape, data = program.ops[0].output.shape, program.meta.get("data")
    if len(shape) != 3 or not isinstance(data, Mapping) or not {"mean", "std"} <= set(data):
        raise InputError(
            f"the bundle does not say how images become inputs (shape {shape}, meta 'data': {data!r}). End-to-end times "
            "need a bundle exported by a run."
        )
    mean, std = (np.asarray(data[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return _Input(shape[0], (shape[1], shape[2]), mean, std)


def end_to_end(
    directory: Path, images: Sequence[bytes], threads: int = 1, repeats: int = 30, warmup: int = 3
) -> dict[str, Timing]:
    """Times one image at a time, each stage and the whole, on the bundle's runtime.

    Args:
        directory: The bundle.
        images: Files (PNG, JPEG, ...), taken in turn.
        threads: Of the runtime; decoding has one.
        repeats: Counted images, at least 6.
        warmup: Images before that.

    Returns:
        Times in ms by stage (:data:`STAGES`), and ``"total"``.

    Raises:
        InputError: No images, or a bundle that does not say how they become inputs.
    """
    if not images or repeats < 6:
        raise InputError(f"end-to-end times need at least one image and 6 repeats; given: {len(images)} and {repeats}.")
    program = bundle.read(directory)
    made, target = normaliser(program), target_of(program)
    data, session = storage.read(directory, MODEL), {} if target is None else target.session
    engine = engine_of(program)
    # One image at a time: a runtime that compiles does it for one.
    opened = (
        engine.open_fixed(program, threads, session, 1) if engine.rebuilds else engine.open(data, threads, session, 256)
    )
    steps = _steps(made, opened.run)
    samples: dict[str, list[float]] = {name: [] for name in (*STAGES, "total")}
    for index in range(warmup + repeats):
        value: Any = images[index % len(images)]
        marks = [time.perf_counter()]
        for step in steps:
            value = step(value)
            marks.append(time.perf_counter())
        if index >= warmup:
            for name, spent in zip(STAGES, np.diff(marks), strict=True):
                samples[name].append(1e3 * float(spent))
            samples["total"].append(1e3 * (marks[-1] - marks[0]))
    return {name: Timing(tuple(own), 1) for name, own in samples.items()}


def _steps(made: _Input, run: Callable[[NDArray[np.float32]], object]) -> list[Callable[[Any], Any]]:
    image = require("PIL.Image")
    mode = "L" if made.channels == 1 else "RGB"

    def decode(data: bytes) -> Any:
        return image.open(io.BytesIO(data)).convert(mode)

    def resize(picture: Any) -> Any:
        rows, columns = made.size
        return (
            picture if picture.size == (columns, rows) else picture.resize((columns, rows), image.Resampling.BILINEAR)
        )

    def normalise(picture: Any) -> NDArray[np.float32]:
        pixels = np.asarray(picture, np.float32).reshape(*made.size, made.channels).transpose(2, 0, 1)
        return np.ascontiguousarray(((pixels / np.float32(255) - made.mean) / made.std)[None], np.float32)

    return [decode, resize, normalise, run]
