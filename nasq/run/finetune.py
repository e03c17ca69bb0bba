"""The fine-tuning stage: one subnet inherits the supernet's weights and is trained on alone, then exported.

The subnet is extracted with BatchNorm statistics of its own, which stay frozen: what is trained is what the file holds,
rounded biases included. The largest subnet teaches it, in the integers that it would be deployed in. Checkpoints are kept
under ``RUN/finetune/<subnet-id>/``; a training that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasq.data import Split
from nasq.elastic.norm import batch_norms
from nasq.errors import InputError, choose_from
from nasq.files import read_json, write_json
from nasq.quant import QuantizedNetwork, freeze
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.run.export import Exported, exported, facts_of, file_accuracy, images_of, keep_best, ship
from nasq.run.search import Evaluation, search_results
from nasq.run.train import OnStep
from nasq.space import Subnet
from nasq.supernet import Supernet
from nasq.training import TrainConfig, Trainer, Uniform, stream

__all__ = ["DEFAULTS", "FrozenNorms", "chosen", "finetune", "finetuned", "tune"]

DEFAULTS: Mapping[str, Any] = {"epochs": 3, "lr": 0.005, "warmup_epochs": 0.5, "distill": 0.5}
"""What differs from :class:`nasq.training.TrainConfig` where ``finetune`` says nothing else."""


class FrozenNorms(Supernet):
    """A network whose BatchNorm statistics stay as they are while it trains; their slopes and offsets are trained."""

    def train(self, mode: bool = True) -> FrozenNorms:
        """Training mode for everything but BatchNorm."""
        super().train(mode)
        for _, norm in batch_norms(self.module):
            norm.eval()
        return self


def settings_of(workshop: Workshop, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """The training settings: defaults, then the run's ``finetune``, then ``changes``.

    Raises:
        InputError: An unknown setting, or a value outside its range.
    """
    config = workshop.config
    shared = {"seed": config.seed, "threads": config.threads}
    return TrainConfig.from_dict({**shared, **DEFAULTS, **(config.finetune or {}), **(changes or {})})


def chosen(run: RunDirectory, name: str | None) -> Subnet:
    """The subnet to fine-tune: by its id, or the beginning of it, among the evaluated ones; the best by default.

    Raises:
        InputError: No evaluated subnet, or several, have that id.
        ArtifactError: Nothing was searched, or (without a name) exported.
    """
    name = name or str(exported(run)["best"])
    known = {record.subnet.id: record.subnet for record in search_results(run)[1]}
    found = [subnet for key, subnet in known.items() if key.startswith(name)]
    if len(found) > 1:
        raise InputError(f"{len(found)} evaluated subnets have an id that begins with {name!r}; give more of it.")
    if not found:
        raise choose_from("subnet", name, known, f"'nasq show {run.path}' lists the best ones.")
    return found[0]


def tune(
    run: RunDirectory,
    workshop: Workshop,
    evaluation: Evaluation,
    subnet: Subnet,
    directory: Path,
    settings: TrainConfig,
    on_step: OnStep | None = None,
) -> QuantizedNetwork:
    """Trains a subnet alone, or goes on training it; the supernet is left as it was.

    Args:
        run: Told the events of the training.
        workshop: With trained weights.
        evaluation: Gives BatchNorm statistics.
        subnet: What to train.
        directory: Where checkpoints go.
        settings: Of the training; its path sampler plays no role, as there is one path.
        on_step: Called with ``("finetune", steps done, steps)``.

    Raises:
        TrainingError: A loss became NaN; the last good checkpoint is kept.
    """
    supernet = workshop.supernet
    largest = supernet.space.largest()
    network = supernet.extract(subnet, evaluation.statistics(subnet))
    teacher = None if subnet == largest else supernet.extract(largest, evaluation.statistics(largest))
    student = FrozenNorms(network)
    Trainer(
        student,
        workshop.data,
        settings,
        directory,
        device=workshop.config.device,
        on_event=lambda event: run.tell({**event, "event": f"train.{event['event']}", "phase": "finetune"}),
        on_step=None if on_step is None else lambda done, total: on_step("finetune", done, total),
        path_sampler=Uniform(student.space, stream(settings.seed, "paths")),
        teacher=teacher,
    ).run()
    assert isinstance(network, QuantizedNetwork)
    network.eval()
    return network


@torch.no_grad()
def integer_accuracy(network: QuantizedNetwork, workshop: Workshop, split: Split) -> float:
    """Share of a split's images that a network's integers classify right, 0..1. Ties go to the lower class."""
    device = next(network.parameters()).device
    parts = [
        network.integers(workshop.data.normalise(images.to(device))).cpu().numpy()
        for images, _ in split.batches(workshop.config.search.batch_size)
    ]
    return float((np.argmax(np.concatenate(parts), axis=1) == split.labels.cpu().numpy()).mean())


def finetune(
    run: RunDirectory,
    workshop: Workshop,
    evaluation: Evaluation | None = None,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Fine-tunes one subnet of a run and exports it through the gate; ``best/`` becomes its bundle where it is better.

    The choice is made on validation images; the test images are read once, by the file.

    Args:
        name: Id of an evaluated subnet, or its beginning; the best one by default.
        changes: Training settings that replace the run's.

    Returns:
        What ``finetune/index.json`` then holds for this subnet: accuracies before and after, whether it became the best.

    Raises:
        ParityError: The file does not compute what was evaluated; the message holds the diagnosis.
        InputError: An unknown subnet or setting.
    """
    evaluation = evaluation or Evaluation(workshop)
    settings, subnet = settings_of(workshop, changes), chosen(run, name)
    place = run.path / "finetune" / subnet.id
    before = evaluation.accuracy(subnet)
    network = tune(run, workshop, evaluation, subnet, place, settings, on_step)
    done = _export(workshop, subnet, network, place / "bundle", settings, before)
    images, labels = images_of(workshop, workshop.data.test)
    row: dict[str, Any] = {
        "id": subnet.id, "bundle": str(done.directory.relative_to(run.path)), "epochs": settings.epochs,
        "validation_before": before, "validation_after": done.validation,
        "test_accuracy": file_accuracy(done.directory, images, labels),
        "differing": done.report.differing, "total": done.report.total,
    }  # fmt: skip
    row["best"] = _keep_if_better(run, row, done)
    rows = {**finetuned(run), subnet.id: row}
    write_json(run.path / "finetune" / "index.json", {"subnets": list(rows.values())})
    run.tell({"event": "finetune.done", **row})
    return row


def finetuned(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What was fine-tuned so far, by subnet id."""
    path = run.path / "finetune" / "index.json"
    return {row["id"]: row for row in read_json(path)["subnets"]} if path.exists() else {}


def _export(
    workshop: Workshop, subnet: Subnet, network: QuantizedNetwork, directory: Path, settings: TrainConfig, before: float
) -> Exported:
    note = {"epochs": settings.epochs, "lr": settings.lr, "distill": settings.distill}
    program = freeze(network, meta={**facts_of(workshop, subnet), "finetune": note})
    told = (
        f"Then fine-tuned alone for {settings.epochs} epochs (`{settings.to_dict()}`), BatchNorm statistics frozen, taught "
        f"by the largest subnet; {100 * before:.2f} % of the validation images before."
    )

    def accuracy() -> float:
        return integer_accuracy(network, workshop, workshop.data.validation)

    return ship(workshop, subnet, program, accuracy, directory, training=(told,))


def _keep_if_better(run: RunDirectory, row: Mapping[str, Any], done: Exported) -> bool:
    """Makes ``best/`` the fine-tuned bundle, where that is better on the validation images than what is there."""
    index = run.exports / "index.json"
    if not index.exists():
        return False
    found = exported(run)
    best = next(one for one in found["subnets"] if one["id"] == found["best"])
    if row["validation_after"] <= best["validation_accuracy"]:
        return False
    keep_best(run, done.directory)
    others = [one for one in found["subnets"] if one["id"] != row["id"]]
    mine = {"id": row["id"], "validation_accuracy": row["validation_after"], "finetuned": True}
    write_json(index, {**found, "best": row["id"], "test_accuracy": row["test_accuracy"], "subnets": [mine, *others]})
    return True
