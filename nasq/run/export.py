"""The export stage: bundles of the best subnets, each through the gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.data import Split
from nasq.deploy import bundle, diagnosis, onnx, parity
from nasq.deploy.runtimes import OnnxRuntime
from nasq.errors import ArtifactError, ParityError
from nasq.files import read_json, write_json
from nasq.quant import freeze
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.run.search import Evaluation, best_record, search_results
from nasq.search import Record, front
from nasq.space import Subnet
from nasq.version import __version__

__all__ = ["export", "export_subnet", "exported", "file_accuracy"]


@dataclass(frozen=True)
class Exported:
    """One exported subnet: its bundle and what its file reaches."""

    subnet: Subnet
    directory: Path
    validation: float
    report: parity.ParityReport


def _images(workshop: Workshop, split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return workshop.data.normalise(split.images).cpu().numpy(), split.labels.cpu().numpy()


def _card(workshop: Workshop, subnet: Subnet, costs: Mapping[str, float], report: parity.ParityReport) -> str:
    """The model card of a bundle."""
    config = workshop.config
    rows = "\n".join(f"| {name} | {value:,.4g} |" for name, value in costs.items())
    accuracy = "not measured" if report.accuracy is None else f"{100 * report.accuracy:.2f} %"
    return f"""# Subnet {subnet.id} of {config.space}

Searched and exported by nasq {__version__} for the target `{config.target}`.

Accuracy of this file on the {len(workshop.data.validation)} validation images of `{workshop.data.name}`
(fingerprint {workshop.data.fingerprint}; {config.data.validation_views} view(s) of each): {accuracy}.
The search selected on these images.

Input: fp32 `[N, {", ".join(map(str, workshop.data.input_shape))}]`, `(pixel / 255 - mean) / std` with
mean {list(workshop.data.mean)} and std {list(workshop.data.std)}.

| cost | value |
|---|---|
{rows}

{report.summary()}
"""


def export_subnet(
    workshop: Workshop, evaluation: Evaluation, subnet: Subnet, directory: Path, strict: bool = True
) -> Exported:
    """Writes the bundle of a subnet and runs its file through the gate on the validation images.

    Args:
        strict: Whether a file that does not pass is an error. The bundle and its ``parity.json`` stay either way.

    Raises:
        ParityError: The file does not compute what was evaluated; the message holds the diagnosis.
    """
    supernet, data = workshop.supernet, workshop.data
    supernet.eval()
    costs = workshop.costs.of(subnet)
    facts = {
        "subnet": dict(subnet), "space": supernet.space.name, "fingerprint": supernet.space.fingerprint,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "mean": list(data.mean), "std": list(data.std),
                 "classes": list(data.classes)},
        "costs": costs,
    }  # fmt: skip
    with supernet.activate(subnet, evaluation.statistics(subnet)):
        program = freeze(workshop.network, meta=facts)
    bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
    images, labels = _images(workshop, data.validation)
    report = parity.check(directory, images, labels)
    bundle.add_file(directory, "parity.json", (json.dumps(report.to_json(), indent=1) + "\n").encode())
    bundle.add_file(directory, "README.md", _card(workshop, subnet, costs, report).encode())
    if strict and not report.passed:
        kept = diagnosis.keep(directory, images, directory.with_name(f"{directory.name}.diagnosis"))
        where = f"\nthe layer, with its tensors: {kept}" if kept is not None else ""
        raise ParityError(f"{directory}: {report.summary()}{where}")
    searched = evaluation.accuracy(subnet)
    if strict and report.accuracy != searched:
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
    test = file_accuracy(run.best, *_images(workshop, workshop.data.test))
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
    extra = {path.name: path.read_bytes() for path in source.iterdir() if path.name not in _WRITTEN}
    bundle.write(run.best, program, extra)


_WRITTEN = {"subnet.json", "model.safetensors", "checksums.json"}


def file_accuracy(directory: Path, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of images that a bundle's ONNX file classifies right."""
    runtime = OnnxRuntime(directory / parity.MODEL)
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
