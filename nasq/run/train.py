"""The training stage: float warm-up, calibration, quantized training; each can be killed and goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from nasq.errors import ArtifactError, InputError, choose_from
from nasq.quant import calibrate
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.run.search import constraints_of
from nasq.search import sample_feasible
from nasq.space import Subnet
from nasq.supernet import Supernet
from nasq.training import PathSampler, Pooled, TrainConfig, Trainer, stream
from nasq.training.splitting import Forest, ForestTrainer, SplitPlan
from nasq.training.splitting.forest import read_regions
from nasq.training.splitting.growth import check_plan

__all__ = ["load_trained", "require_plan", "require_trained", "split", "train", "trained"]

OnStep = Callable[[str, int, int], None]
_DRAWS = 16384
"""Most uniform samples per epoch for subnets inside the constraints; the rest are repaired ones."""


def _config(workshop: Workshop, settings: dict[str, Any]) -> TrainConfig:
    shared = {"seed": workshop.config.seed, "threads": workshop.config.threads}
    return TrainConfig.from_dict({**shared, **settings})


def _phase(run: RunDirectory, workshop: Workshop, name: str, settings: dict[str, Any], on_step: OnStep | None) -> None:
    supernet = workshop.supernet
    assert isinstance(supernet, Supernet)
    trainer = Trainer(
        supernet,
        workshop.data,
        _config(workshop, settings),
        run.supernet / name,
        mode="float" if name == "warmup" else None,
        device=workshop.config.device,
        on_event=lambda event: run.tell({**event, "event": f"train.{event['event']}", "phase": name}),
        on_step=None if on_step is None else lambda done, total: on_step(name, done, total),
        path_sampler=_inside(workshop, _config(workshop, settings)) if name == "quantized" else None,
    )
    trainer.run()


def _inside(workshop: Workshop, config: TrainConfig) -> PathSampler | None:
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


def require_plan(workshop: Workshop) -> None:
    """Refuses a training whose settings do not go together, before anything is trained.

    Raises:
        InputError: Says which settings.
    """
    config = workshop.config
    training = _config(workshop, config.train)
    if not config.split.epochs:
        return
    if config.train_inside_constraints:
        raise InputError(
            "train_inside_constraints trains pools of the whole space, and split.epochs trains its parts. Leave one of them "
            "out."
        )
    if training.sampler not in _PARTS:
        raise choose_from("train.sampler", training.sampler, _PARTS, "Only these can train the parts of a split space.")
    check_plan(SplitPlan(**config.split.model_dump()), training, workshop.supernet.space)


_PARTS = ("uniform", "fair", "importance")


def _grower(run: RunDirectory, workshop: Workshop, on_step: OnStep | None) -> ForestTrainer:
    """Quantized training with splits, from the calibrated weights."""
    config = workshop.config
    return ForestTrainer(
        lambda name: copy.deepcopy(cast(Supernet, workshop.supernet)),
        workshop.data,
        _config(workshop, config.train),
        run.forest / "growth",
        SplitPlan(**config.split.model_dump()),
        device=config.device,
        on_event=lambda event: run.tell({**event, "event": f"train.{event['event']}", "phase": "quantized"}),
        on_step=None if on_step is None else lambda done, total: on_step("quantized", done, total),
    )


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


def _calibrate_once(run: RunDirectory, workshop: Workshop, on_step: OnStep | None) -> None:
    """Loads the calibrated float weights, which a first call trains."""
    config, calibrated = workshop.config, run.supernet / "calibrated"
    if (calibrated / "supernet.json").exists():
        cast(Supernet, workshop.supernet).load(calibrated)
        return
    if config.warmup is not None:
        _phase(run, workshop, "warmup", config.warmup, on_step)
    _calibrated(workshop)
    workshop.supernet.save(calibrated)
    run.tell({"event": "train.calibrated", "images": config.quantization.calibration_images})


def train(run: RunDirectory, workshop: Workshop, on_step: OnStep | None = None) -> None:
    """Trains the run's supernet, or goes on where it was; afterwards ``supernet/`` holds its weights.

    With splits it trains up to the first one, and :func:`split` goes on.

    Raises:
        TrainingError: A loss became NaN; the last good checkpoint is kept.
        InputError: The settings of training and of splits do not go together.
    """
    _calibrate_once(run, workshop, on_step)
    if workshop.config.split.epochs:
        _grower(run, workshop, on_step).train_root().save(run.supernet)
        return
    _phase(run, workshop, "quantized", workshop.config.train, on_step)
    workshop.supernet.save(run.supernet)


def split(run: RunDirectory, workshop: Workshop, on_step: OnStep | None = None) -> None:
    """Splits the run's supernet and trains the leaves; afterwards ``forest/`` holds them.

    Raises:
        TrainingError: A loss became NaN; the last good checkpoint is kept.
        InputError: The run plans no split, or nothing is left to split.
    """
    if not workshop.config.split.epochs:
        raise InputError(
            f"the run in {run.path} plans no split. Give a new run the epochs after which to split: --set "
            "split.epochs='[15, 30]'."
        )
    require_trained(run)
    if isinstance(workshop.supernet, Forest):
        return  # it is done, and loaded
    _calibrate_once(run, workshop, on_step)
    _grower(run, workshop, on_step).run().save(run.forest)


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
    """Loads the trained weights: the forest where there is one, else the supernet.

    Raises:
        ArtifactError: There are none; says which command makes them.
    """
    require_trained(run)
    if (run.forest / "forest.json").exists():
        if not isinstance(workshop.supernet, Forest):
            count = len(read_regions(run.forest, workshop.supernet.space))
            copies = [cast(Supernet, workshop.supernet), *(copy.deepcopy(workshop.supernet) for _ in range(count - 1))]
            workshop.supernet = Forest.load(run.forest, cast("list[Supernet]", copies))
    else:
        cast(Supernet, workshop.supernet).load(run.supernet)
    workshop.supernet.to(workshop.config.device).eval()
