"""The export stage: bundles of the best subnets, each through the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.data import Split
from nasq.deploy import bundle, diagnosis, onnx, parity, storage
from nasq.deploy.engines import engine_of, target_of
from nasq.errors import ArtifactError, ParityError
from nasq.files import read_json, write_json
from nasq.quant import freeze
from nasq.quant.program import Program
from nasq.run.assemble import Workshop
from nasq.run.card import card
from nasq.run.directory import RunDirectory
from nasq.run.search import Evaluation, best_record, search_results
from nasq.search import Record, front
from nasq.space import Subnet

__all__ = [
    "CARD", "Exported", "export", "export_subnet", "exported", "facts_of", "file_accuracy", "images_of",
    "keep_best", "ship",
]  # fmt: skip

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """One exported subnet: its bundle and what its file reaches."""

    subnet: Subnet
    directory: Path
    validation: float
    report: parity.ParityReport


def images_of(workshop: Workshop, split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A split as a file takes it: normalised fp32 images, and their labels."""
    return workshop.data.normalise(split.images).cpu().numpy(), split.labels.cpu().numpy()


def export_subnet(
    workshop: Workshop, evaluation: Evaluation, subnet: Subnet, directory: Path, strict: bool = True
) -> Exported:
    """Writes the bundle of a subnet and runs its file through the gate on the validation images.

    Args:
        strict: Whether a file that does not pass is an error. The bundle and its ``parity.json`` stay either way.

    Raises:
        ParityError: The file does not compute what was evaluated; the message holds the diagnosis.
    """
    supernet = workshop.supernet
    supernet.eval()
    with supernet.activate(subnet, evaluation.statistics(subnet)):
        program = freeze(workshop.network, meta=facts_of(workshop, subnet))
    return ship(workshop, subnet, program, lambda: evaluation.accuracy(subnet), directory, strict)


def facts_of(workshop: Workshop, subnet: Subnet) -> dict[str, Any]:
    """What a bundle's ``meta`` says about where its subnet comes from."""
    space, data = workshop.supernet.space, workshop.data
    return {
        "subnet": dict(subnet), "space": space.name, "fingerprint": space.fingerprint,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "mean": list(data.mean), "std": list(data.std),
                 "classes": list(data.classes)},
        "costs": workshop.costs.of(subnet),
    }  # fmt: skip


def ship(
    workshop: Workshop,
    subnet: Subnet,
    program: Program,
    accuracy: Callable[[], float],
    directory: Path,
    strict: bool = True,
    training: Sequence[str] = (),
) -> Exported:
    """Writes the bundle of a program, with its card, and runs its file through the gate on the validation images.

    Args:
        workshop: Of the run.
        subnet: What the program is.
        program: Frozen.
        accuracy: Evaluates nasq's own integers on the validation images: what the file has to reach exactly.
        directory: The bundle.
        strict: Whether a file that does not pass is an error.
        training: Further sentences of the card on how the weights came about.

    Raises:
        ParityError: As in :func:`export_subnet`.
    """
    bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
    images, labels = images_of(workshop, workshop.data.validation)
    report = parity.check(directory, images, labels)
    bundle.add_file(directory, "parity.json", (json.dumps(report.to_json(), indent=1) + "\n").encode())
    text = card(workshop, subnet, workshop.costs.of(subnet), report, training)
    bundle.add_file(directory, CARD, text.encode())
    if strict and not report.passed:
        kept = diagnosis.keep(directory, images, directory.with_name(f"{directory.name}.diagnosis"))
        where = f"\nthe layer, with its tensors: {kept}" if kept is not None else ""
        raise ParityError(f"{directory}: {report.summary()}{where}")
    searched = accuracy()
    if strict and not report.reaches(searched):
        raise ParityError(
            f"{directory}: the file classifies {report.accuracy} of the validation images right, the search evaluated "
            f"{searched}. Run 'nasq verify {directory}' for the first layer that differs."
        )
    return Exported(subnet, directory, searched, report)


def _chosen(workshop: Workshop, run: RunDirectory, count: int) -> list[Record]:
    """The best subnet, then those of the front, best first."""
    goals, records = search_results(run)
    best = best_record(goals, records)
    first = goals[0]
    others = [record for record in front(records, goals) if record.subnet != best.subnet]
    others.sort(key=lambda record: (-first.sign * record.values[first.name], record.subnet.id))
    return [best, *others][:count]


def export(run: RunDirectory, workshop: Workshop, evaluation: Evaluation | None = None) -> list[Exported]:
    """Exports the best subnets of a run's front; ``best/`` becomes the best one's bundle.

    The test images are read here, once: by the best bundle's file.
    """
    evaluation = evaluation or Evaluation(workshop)
    made = []
    for record in _chosen(workshop, run, workshop.config.export):
        directory = run.exports / record.subnet.id
        done = export_subnet(workshop, evaluation, record.subnet, directory)
        run.tell({"event": "export.subnet", "subnet": record.subnet.id, "validation": done.validation,
                  "differing": done.report.differing, "total": done.report.total})  # fmt: skip
        made.append(done)
    keep_best(run, made[0].directory)
    test = file_accuracy(run.best, *images_of(workshop, workshop.data.test))
    index = {
        "best": made[0].subnet.id,
        "test_accuracy": test,
        "test_images": len(workshop.data.test),
        "subnets": [{"id": one.subnet.id, "validation_accuracy": one.validation} for one in made],
    }
    write_json(run.exports / "index.json", index)
    run.tell({"event": "export.done", **index})
    return made


def keep_best(run: RunDirectory, source: Path) -> None:
    """Makes ``best/`` a copy of a bundle, replacing the former one at once."""
    program = bundle.read(source)
    extra = {name: data for name, data in storage.contents(source).items() if name not in _WRITTEN}
    bundle.write(run.best, program, extra)


_WRITTEN = {bundle.SUBNET, bundle.WEIGHTS}


def file_accuracy(directory: Path, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of images that a bundle's ONNX file classifies right."""
    program = bundle.read(directory)
    engine, target = engine_of(program), target_of(program)
    session = {} if target is None else target.session
    runtime = engine.open(engine.runs(program, directory / parity.MODEL), 1, session, 256)
    return float((np.argmax(runtime.run(images), axis=1) == labels).mean())


def exported(run: RunDirectory) -> dict[str, Any]:
    """What :func:`export` wrote to ``exports/index.json``.

    Raises:
        ArtifactError: Nothing was exported.
    """
    path = run.exports / "index.json"
    if not path.exists():
        raise ArtifactError(f"{run.path} holds no exported subnet. Export first: nasq export {run.path}")
    index = read_json(path)
    assert isinstance(index, dict)
    return index
