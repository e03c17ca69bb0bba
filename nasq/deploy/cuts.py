"""Parts of a bundle, run as the runtime of its target runs them: one layer alone, or everything up to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import readback
from nasq.deploy.engines import engine_of
from nasq.quant.program import Program

__all__ = ["alone", "feeds", "up_to"]

Values = Mapping[str, NDArray[np.uint8]]


def feeds(
    file: readback.File, program: Program, values: Values, x: NDArray[np.float32], wanted: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """What a model cut out of a file reads, by its names in the file.

    Args:
        file: Whose layers are the program's operations.
        program: Of the bundle.
        values: Container integers by the program's names.
        x: The network's input.
        wanted: Names in the file.
    """
    made = {layer.output: op.output.name for layer, op in zip(file.layers, program.ops, strict=True)}
    return {name: values[made[name]] if name in made else x for name in wanted}


def alone(file: readback.File, program: Program, values: Values, x: NDArray[np.float32], index: int) -> NDArray[Any]:
    """What one layer makes of the reference's integers (of ``x``, where it is the first).

    Raises:
        ArtifactError: The runtime refuses the layer.
    """
    engine = engine_of(program)
    if not engine.rebuilds:
        return engine.cut(file.cut(index), feeds(file, program, values, x, file.layers[index].inputs))
    from nasq.deploy import inductor

    return inductor.run_part(program, index, values) if index else up_to(file, program, x, 0)


def up_to(file: readback.File, program: Program, x: NDArray[np.float32], index: int) -> NDArray[Any]:
    """What everything up to a layer makes of images ``x``.

    Raises:
        ArtifactError: The runtime refuses that part of the file.
    """
    engine = engine_of(program)
    if not engine.rebuilds:
        return engine.cut(file.cut(index, first=0), dict.fromkeys(file.layers[0].inputs, x))
    from nasq.deploy.inductor import Inductor

    return Inductor(replace(program, ops=program.ops[: index + 1]), compile=False).run(x)
