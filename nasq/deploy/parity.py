"""The gate: does the exported file compute what nasq evaluated?

The shipped file is run unmodified, with the runtime's optimizations on, and its final integers are compared with the
independent reference (:mod:`nasq.deploy.reference`). Beside that, every number in the file is compared with the bundle
(:mod:`nasq.deploy.readback`), every layer is run alone on the reference's integers, and the layers that the runtime
executes as integer kernels are counted. What is promised is section 7 of `docs/integer_arithmetic.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, cuts, readback, storage, ties
from nasq.deploy.engines import engine_of, target_of
from nasq.deploy.parity_report import TOLERANCE, LayerResult, ParityReport, differing_alone, too_often
from nasq.deploy.reference import Reference
from nasq.deploy.runtimes import Runtime, versions
from nasq.errors import ArtifactError, InputError, ParityError
from nasq.quant.program import AvgPool, Constant, Conv, Input, Linear, Program

__all__ = ["MODEL", "LayerResult", "ParityReport", "check", "gate", "promises_equal", "same_class"]

MODEL = "model.onnx"
FEWEST_LEVELS = 3
_COMPILED = 64  # images in one call of a compiled program
DECISIVE = 10_000_000  # integers of layers alone decide whether they differ in more than 1 of 100,000
_UNUSED = "the labels were not used: the output has a class at each of several places, not one for an image."
MOST_PLACES = 200  # of one layer's differing integers are looked at for ties


def check(
    directory: Path,
    images: NDArray[np.float32],
    labels: NDArray[np.integer] | None = None,
    *,
    runtime: Callable[[bytes], Runtime] | None = None,
    layer_images: int = 32,
) -> ParityReport:
    """Compares a bundle's ``model.onnx``, as it is, with the bundle's own reference.

    Args:
        directory: The bundle.
        images: fp32 ``[N, ...]``, as the network takes them.
        labels: Class of every image ``[N]``, for the accuracy of the file.
        runtime: Makes the runtime of a file's bytes; one that works in a child process fits here. Without it,
            onnxruntime with the session options of the bundle's target.
        layer_images: Images on which each layer is run alone; those that differ come first.

    Raises:
        ArtifactError: The bundle or its file is damaged, or the runtime refuses the file.
        InputError: No images, or labels of another length.
    """
    _check_arguments(images, labels, layer_images)
    program, data = bundle.read(directory), storage.read(directory, MODEL)
    file = readback.read(data)  # first: it refuses what no runtime should be given
    reference, executed = Reference(directory), (runtime or _default(program, len(images)))(data)
    findings = readback.compare(file, program)
    expected, got = reference.run(images), executed.run(images)
    if expected.shape != got.shape:
        raise ArtifactError(
            f"{MODEL} makes integers of shape {got.shape}, the bundle {expected.shape}; export it again."
        )
    wrong = (expected != got).reshape(len(images), -1)
    order = np.argsort(~wrong.any(1), kind="stable")
    sample = images[order[:layer_images]]
    values = reference.run(sample, every=True)
    aligned = len(file.layers) == len(program.ops)
    exact = promises_equal(program)
    layers = _layers(file, program, values, sample) if aligned else ()
    if too_often(layers):  # so few integers decide no rate of 1 in 100,000, least of all on the images that differ most
        decisive = images[: math.ceil(DECISIVE * len(sample) / differing_alone(layers)[1])]
        layers = _layers(file, program, reference.run(decisive, every=True), decisive)
    accuracy = _accuracy(got, labels)
    unused = [_UNUSED] if labels is not None and accuracy is None else []
    return ParityReport(
        target=program.target,
        runtime=executed.name,
        images=len(images),
        total=wrong.size,
        differing=int(wrong.sum()),
        images_differing=int(wrong.any(1).sum()),
        allowed=_allowed(program, wrong.size, exact),
        dequantized_differing=_not_dequantized(executed, images[order[: _whole(executed, layer_images)]], program),
        accuracy=accuracy,
        coverage=engine_of(program).coverage(data, program, None),
        layers=layers,
        findings=tuple(str(finding) for finding in findings),
        warnings=(*unused, *_warnings(values, accuracy, got)),
        diagnosis=_diagnosis(layers, file, program, values, sample, exact and bool(wrong.any())),
        versions=versions(),
        same_class=same_class(got, expected, program),
    )


def gate(
    directory: Path,
    images: NDArray[np.float32],
    labels: NDArray[np.integer] | None = None,
    *,
    runtime: Callable[[bytes], Runtime] | None = None,
    layer_images: int = 32,
) -> ParityReport:
    """:func:`check`, and an error where the file may not be shipped.

    Raises:
        ParityError: The report did not pass; the message is its summary with the diagnosis.
    """
    report = check(directory, images, labels, runtime=runtime, layer_images=layer_images)
    if not report.passed:
        raise ParityError(f"{directory}: {report.summary()}")
    return report


def _default(program: Program, count: int) -> Callable[[bytes], Runtime]:
    engine, target = engine_of(program), target_of(program)
    session = {} if target is None else target.session
    if engine.rebuilds:  # compiled once, for one batch size
        return lambda data: engine.open_fixed(program, 1, session, min(count, _COMPILED))
    return lambda data: engine.open(data, 1, session, 256)


def promises_equal(program: Program) -> bool:
    """Whether the runtime of a program's target computes the very integers of the reference."""
    target = target_of(program)
    return program.add == "both" if target is None else target.exact


def same_class(got: NDArray[Any], expected: NDArray[Any], program: Program) -> float:
    """The share of images that two outputs ``[N, ...]`` put into the same class, 0..1; ties go to the first.

    Where a network classifies every place of a map or every token, the share of all places. The classes are the channels
    of a map; of tokens they are the last dimension.
    """
    last = next((op for op in reversed(program.ops) if isinstance(op, Linear)), None)
    axis = 1 if isinstance(last, Conv) or got.ndim < 3 else -1
    return float((got.argmax(axis) == expected.argmax(axis)).mean())


def _whole(executed: Runtime, count: int) -> int:
    """At least ``count`` images, as many as whole batches of a file that takes only those have."""
    batch = getattr(executed, "fixed", None) or 1
    return -(-count // batch) * batch


def _allowed(program: Program, count: int, exact: bool) -> int:
    if not exact:
        return count
    return count // TOLERANCE if any(isinstance(op, AvgPool) for op in program.ops) else 0


def _check_arguments(images: NDArray[np.float32], labels: NDArray[np.integer] | None, layer_images: int) -> None:
    if len(images) == 0 or layer_images < 1:
        raise InputError("parity needs at least one image; give some of the validation set.")
    if images.dtype != np.float32:
        raise InputError(f"the images are {images.dtype}; the network takes float32.")
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(
            f"the labels are {labels.dtype} of shape {labels.shape}; give the number of each image's class, integers of "
            f"shape ({len(images)},)."
        )
    if labels is not None and len(labels) != len(images):
        raise InputError(f"there are {len(labels)} labels for {len(images)} images; give one for each.")


def _not_dequantized(executed: Runtime, sample: NDArray[np.float32], program: Program) -> int:
    tensor = program.output
    steps = executed.run(sample).astype(np.float32) - np.float32(tensor.zero_point)
    return int((executed.logits(sample) != steps * np.float32(tensor.scale)).sum())


def _accuracy(integers: NDArray[np.uint8], labels: NDArray[np.integer] | None) -> float | None:
    if labels is None or integers.ndim != 2:
        return None
    return float((integers.argmax(1) == labels).mean())


def _warnings(values: Mapping[str, NDArray[np.uint8]], accuracy: float | None, final: NDArray[np.uint8]) -> list[str]:
    """Reasons why equal integers would mean little: constant tensors, a network that has learnt nothing."""
    found = []
    flat = [name for name, value in values.items() if len(np.unique(value)) < FEWEST_LEVELS]
    if flat:
        found.append(f"{len(flat)} tensors use fewer than {FEWEST_LEVELS} levels: {', '.join(flat)}.")
    if accuracy is not None:
        chance = 1 / final.shape[1]
        if accuracy < min(3 * chance, (1 + chance) / 2):
            found.append(f"the file's accuracy of {accuracy:.2%} is not well above chance ({chance:.2%}).")
    return found


# -- where a difference comes from ------------------------------------------------------------------------------------


def _layers(
    file: readback.File, program: Program, values: Mapping[str, NDArray[np.uint8]], x: NDArray[np.float32]
) -> tuple[LayerResult, ...]:
    return tuple(_alone(file, program, values, x, index) for index in range(len(program.ops)))


def _alone(
    file: readback.File,
    program: Program,
    values: Mapping[str, NDArray[np.uint8]],
    x: NDArray[np.float32],
    index: int,
) -> LayerResult:
    """Runs one layer of the file on the reference's integers."""
    op = program.ops[index]
    kind, expected = type(op).__name__, values[op.output.name]
    if isinstance(op, Constant):  # the same for every image: the file holds it once
        expected = expected[:1]
    try:
        got = cuts.alone(file, program, values, x, index)
    except ArtifactError as error:
        return LayerResult(op.path, kind, expected.size, expected.size, 255, f"it does not run alone ({error})")
    found = replace(_compare(op.path, kind, expected, got), exact=promises_equal(program))
    if found.exact or not found.differing or got.shape != expected.shape or not isinstance(op, Linear | Input):
        return found
    places, given = np.argwhere(got != expected)[:MOST_PLACES], [values[name] for name in op.inputs]
    if isinstance(op, Input):
        before_rounding = ties.exact_input(op.output, x, places)
    else:
        before_rounding = ties.exact(op, [program.tensor(name) for name in op.inputs], given, places)
    return replace(found, away=int((~ties.at_tie(before_rounding)).sum()))


def _compare(path: str, kind: str, expected: NDArray[np.uint8], got: NDArray[Any]) -> LayerResult:
    if got.shape != expected.shape:
        example = f"the shape is {got.shape[1:]} instead of {expected.shape[1:]}"
        return LayerResult(path, kind, expected.size, expected.size, 255, example)
    step = np.abs(expected.astype(np.int64) - got.astype(np.int64))
    count = int((step != 0).sum())
    if not count:
        return LayerResult(path, kind, expected.size, 0, 0)
    place = tuple(int(i) for i in np.argwhere(step)[0])
    example = f"image {place[0]}, channel {place[1]}"
    example += f", position {list(place[2:])}" if len(place) > 2 else ""
    example += f": expected {int(expected[place])}, got {int(got[place])}"
    return LayerResult(path, kind, expected.size, count, int(step.max()), example)


def _diagnosis(
    layers: Sequence[LayerResult],
    file: readback.File,
    program: Program,
    values: Mapping[str, NDArray[np.uint8]],
    x: NDArray[np.float32],
    differs: bool,
) -> str:
    """Names the first layer that differs, alone or together with the layers before it."""
    if first := next((layer for layer in layers if not layer.passed or (layer.exact and layer.differing)), None):
        return (
            f"the first layer that differs on its own is {first.path!r} ({first.kind}): {first.differing} of "
            f"{first.total} integers, by up to {first.largest_step} steps; {first.example}."
        )
    if not differs:
        return ""
    if not layers:
        return "the file's layers are not the bundle's; see what the file differs in."
    return _together(file, program, values, x)


def _together(
    file: readback.File, program: Program, values: Mapping[str, NDArray[np.uint8]], x: NDArray[np.float32]
) -> str:
    """Every layer alone agrees: finds the first at which the file up to there does not (a fusion across layers)."""
    for index, op in enumerate(program.ops):
        got = cuts.up_to(file, program, x, index)
        result = _compare(op.path, type(op).__name__, values[op.output.name], got)
        if result.differing:
            return (
                f"every layer alone agrees, but the layers up to {op.path!r} together do not: {result.example}. "
                "The runtime fuses them into something else."
            )
    return "every layer, and every part of the file from its start, agrees alone; only the whole file differs."
