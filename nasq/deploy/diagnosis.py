"""Keeps what is needed to look at a difference: the first layer that differs, as a model of its own, with its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors

from nasq import files
from nasq.deploy import bundle, cuts, readback, storage
from nasq.deploy.parity import MODEL
from nasq.deploy.reference import Reference
from nasq.errors import ArtifactError
from nasq.quant.program import Constant

__all__ = ["keep"]

LAYER, TENSORS, NOTE = "layer.onnx", "tensors.safetensors", "note.json"


def keep(directory: Path, images: NDArray[np.float32], into: Path, count: int = 8) -> Path | None:
    """Writes the first layer of a bundle's file that computes something else than the reference.

    ``layer.onnx`` is the layer cut out of the file, made of the file's own nodes (or, where each layer alone agrees, the
    file up to the first layer at which it does not); ``tensors.safetensors`` holds what it reads, what the reference makes
    of that (``expected``) and what the runtime makes (``got``); ``note.json`` names the layer and counts the differences.

    Args:
        directory: A bundle with its ``model.onnx``.
        images: fp32 ``[N, ...]``, as the network takes them.
        into: The directory to write to; made where it is missing.
        count: How many images to keep.

    Returns:
        ``into``, or ``None`` where every layer, and every part of the file from its start, agrees on these images.

    Raises:
        ArtifactError: The bundle or its file is damaged.
    """
    program, reference = bundle.read(directory), Reference(directory)
    file = readback.read(storage.read(directory, MODEL))
    if len(file.layers) != len(program.ops):
        raise ArtifactError(f"{directory / MODEL} has {len(file.layers)} layers, the bundle {len(program.ops)}.")
    sample = images[:count]
    values = reference.run(sample, every=True)
    for first in (None, 0):  # each layer alone, then everything up to it
        for index, op in enumerate(program.ops):
            read = file.layers[index].inputs if first is None else file.layers[0].inputs
            feeds = cuts.feeds(file, program, values, sample, read)
            expected = values[op.output.name][: 1 if isinstance(op, Constant) else None]
            part = partial(cuts.alone, file, program, values, sample, index)
            found = _difference(part if first is None else partial(cuts.up_to, file, program, sample, index), expected)
            if found is not None:
                note = {"layer": op.path, "operation": op.kind, "index": index, "alone": first is None, **found[1]}
                _write(into, file.cut(index, first), {**feeds, "expected": expected, "got": found[0]}, note)
                return into
    return None


def _difference(
    run: Callable[[], NDArray[Any]], expected: NDArray[np.uint8]
) -> tuple[NDArray[Any], dict[str, Any]] | None:
    """What the runtime makes where that is not ``expected``, and in how many places it differs."""
    try:
        got = run()
    except ArtifactError as error:
        return np.zeros(0, np.uint8), {"error": str(error)}
    if got.shape != expected.shape:
        return got, {"error": f"the shape is {list(got.shape)} instead of {list(expected.shape)}"}
    wrong = got != expected
    return (got, {"differing": int(wrong.sum()), "total": int(wrong.size)}) if wrong.any() else None


def _write(into: Path, model: bytes, tensors: dict[str, NDArray[Any]], note: dict[str, Any]) -> None:
    into.mkdir(parents=True, exist_ok=True)
    files.write_bytes(into / LAYER, model)
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    files.write_bytes(into / TENSORS, safetensors.save(whole))
    files.write_json(into / NOTE, note)
