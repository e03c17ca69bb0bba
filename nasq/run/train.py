"""The training stage: float warm-up, calibration, quantized training; each can be killed and goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nasq.errors import ArtifactError
from nasq.quant import calibrate
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.run.search import constraints_of
from nasq.search import sample_feasible
from nasq.space import Subnet
from nasq.training import PathSampler, Pooled, TrainConfig, Trainer, stream

__all__ = ["load_trained", "require_trained", "train", "trained"]

OnStep = Callable[[str, int, int], None]
_DRAWS = 16384
"""Most uniform samples per epoch for subnets inside the constraints; the rest are repaired ones."""


def _config(workshop: Workshop, settings: dict[str, Any]) -> TrainConfig:
    shared = {"seed": workshop.config.seed, "threads": workshop.config.threads}
    return TrainConfig.from_dict({**shared, **settings})


def _phase(run: RunDirectory, workshop: Workshop, name: str, settings: dict[str, Any], on_step: OnStep | None) -> None:
    trainer = Trainer(
        workshop.supernet,
        workshop.data,
        _config(workshop, settings),
        run.supernet / name,
        mode="float" if name == "warmup" else None,
        device=workshop.config.device,
        on_event=lambda event: run.tell({**event, "event": f"train.{event['event']}", "phase": name}),
        on_step=None if on_step is None else lambda done, total: on_step(name, done, total),
        path_sampler=_paths(workshop, _config(workshop, settings)) if name == "quantized" else None,
    )
    trainer.run()


def _paths(workshop: Workshop, config: TrainConfig) -> PathSampler | None:
    """Subnets that keep the search's constraints, drawn anew each epoch; ``None`` for the trainer's own sampler."""
    constraints = constraints_of(workshop)
    if not workshop.config.train_inside_constraints or not constraints:
        return None
    space = workshop.supernet.space
    steps = max(1, len(workshop.data.train) // config.batch_size)

    def pool(epoch: int) -> list[Subnet]:
        rng = np.random.default_rng([config.seed, epoch])
        rows = sample_feasible(space, constraints, config.paths * steps, rng, draws=_DRAWS).rows
        return list(space.to_subnets(rows))

    return Pooled(space, stream(config.seed, "paths"), pool, config.paths, config.smallest)


def _calibrated(workshop: Workshop) -> None:
    """Step sizes from the training images, with BatchNorm statistics of the largest subnet."""
    supernet, data = workshop.supernet, workshop.data
    count = workshop.config.quantization.calibration_images
    device = next(supernet.parameters()).device
    images = data.normalise(data.train.images[:count].to(device))
    largest = supernet.space.largest()
    bn = supernet.recalibrate(largest, [images], mode="float")
    with supernet.activate(largest, bn):
        calibrate(workshop.network, images)


def train(run: RunDirectory, workshop: Workshop, on_step: OnStep | None = None) -> None:
    """Trains the run's supernet, or goes on where it was; afterwards ``supernet/`` holds its weights.

    Raises:
        TrainingError: A loss became NaN; the last good checkpoint is kept.
    """
    config = workshop.config
    calibrated = run.supernet / "calibrated"
    if not (calibrated / "supernet.json").exists():
        if config.warmup is not None:
            _phase(run, workshop, "warmup", config.warmup, on_step)
        _calibrated(workshop)
        workshop.supernet.save(calibrated)
        run.tell({"event": "train.calibrated", "images": config.quantization.calibration_images})
    else:
        workshop.supernet.load(calibrated)
    _phase(run, workshop, "quantized", config.train, on_step)
    workshop.supernet.save(run.supernet)


def trained(run: RunDirectory) -> bool:
    """Whether the training stage is done."""
    return (run.supernet / "supernet.json").exists()


def require_trained(run: RunDirectory) -> None:
    """Refuses a run whose supernet is not trained yet.

    Raises:
        ArtifactError: Says which command trains it.
    """
    if not trained(run):
        raise ArtifactError(f"{run.path} holds no trained supernet. Train it first: nasq train {run.path}")


def load_trained(run: RunDirectory, workshop: Workshop) -> None:
    """Loads the trained weights.

    Raises:
        ArtifactError: There are none; says which command makes them.
    """
    require_trained(run)
    workshop.supernet.load(run.supernet)
    workshop.supernet.to(workshop.config.device).eval()
