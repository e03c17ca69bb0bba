"""The training stage: float warm-up, calibration, quantized training; each can be killed and goes on.

With several processes (:mod:`nasq.run.ranks`) all of them run what is here, and the first one writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from nasq.errors import ArtifactError, InputError, choose_from
from nasq.quant import calibrate
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.run.search import constraints_of
from nasq.search import sample_feasible
from nasq.space import Subnet
from nasq.supernet import Supernet
from nasq.training import PathSampler, Pooled, TrainConfig, Trainer, stream
from nasq.training.distributed import World
from nasq.training.splitting import (
    Forest,
    ForestTrainer,
    Mixture,
    MixturePaths,
    SplitPlan,
    WeightSets,
    validation_batches,
)
from nasq.training.splitting.assignment import Configurations, linear_temperature
from nasq.training.splitting.forest import read_regions
from nasq.training.splitting.plan import check_plan

__all__ = ["load_trained", "require_plan", "require_trained", "split", "train", "trained"]

OnStep = Callable[[str, int, int], None]
_DRAWS = 16384
"""Most uniform samples per epoch for subnets inside the constraints; the rest are repaired ones."""


def _config(workshop: Workshop, settings: dict[str, Any]) -> TrainConfig:
    shared = {"seed": workshop.config.seed, "threads": workshop.config.threads}
    return TrainConfig.from_dict({**shared, **settings})


def _device(workshop: Workshop) -> torch.device:
    """Where this process trains: with several processes, each CUDA device has one."""
    world, device = World.current(), torch.device(workshop.config.device)
    return world.device if world.size > 1 and device.type == "cuda" else device


def _phase(
    run: RunDirectory,
    workshop: Workshop,
    name: str,
    settings: dict[str, Any],
    on_step: OnStep | None,
    mixture: Mixture | None = None,
) -> None:
    config = _config(workshop, settings)
    sampler = None
    if name == "quantized":
        sampler = _inside(workshop, config) if mixture is None else _mixture_paths(workshop, mixture, config)
    trainer = Trainer(
        cast(Supernet, workshop.supernet if mixture is None else mixture),
        workshop.data,
        config,
        run.supernet / name,
        mode="float" if name == "warmup" else None,
        device=_device(workshop),
        on_event=lambda event: run.tell({**event, "event": f"train.{event['event']}", "phase": name}),
        on_step=None if on_step is None else lambda done, total: on_step(name, done, total),
        path_sampler=sampler,
    )
    trainer.run()
    if isinstance(sampler, MixturePaths):
        sampler.settle()


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
    _require_processes(workshop)
    if training.variance_every and (config.mixture.sets > 1 or config.train_inside_constraints):
        other = "mixture.sets" if config.mixture.sets > 1 else "train_inside_constraints"
        raise InputError(
            f"train.variance_every measures draws of single subnets from the whole space, and {other} draws them in another "
            "way. Set one of them back."
        )
    used = {"split.epochs": bool(config.split.epochs), "mixture.sets": config.mixture.sets > 1}
    parts = [name for name in used if used[name]]
    if not parts:
        return
    if len(parts) > 1:
        raise InputError("split.epochs makes a forest, and mixture.sets a mixture. Leave one of them out.")
    if config.train_inside_constraints:
        raise InputError(
            f"train_inside_constraints trains pools of the whole space, and {parts[0]} trains parts of it. Leave one of them "
            "out."
        )
    allowed = _PARTS if config.split.epochs else _PARTS[:1]
    if training.sampler not in allowed:
        raise choose_from("train.sampler", training.sampler, allowed, f"Only these go together with {parts[0]}.")
    if config.split.epochs:
        check_plan(SplitPlan(**config.split.model_dump()), training, workshop.supernet.space)
    else:
        _require_mixture(workshop, training)


_PARTS = ("uniform", "fair", "importance")


def _require_processes(workshop: Workshop) -> None:
    config = workshop.config
    world = World(0, config.processes)
    devices = torch.cuda.device_count() if torch.device(config.device).type == "cuda" else config.processes
    if config.processes > devices:
        raise InputError(
            f"processes is {config.processes}, and there are {devices} CUDA devices: each process needs one of its own. "
            "Lower processes, or train on the cpu."
        )
    settings = {"warmup": config.warmup, "train": config.train}
    for name, each in ((name, _config(workshop, one)) for name, one in settings.items() if one is not None):
        try:
            world.check_batch(min(each.batch_size, len(workshop.data.train)))
        except InputError as error:
            raise InputError(f"in the config key {name!r}: {error}") from error


def _require_mixture(workshop: Workshop, training: TrainConfig) -> None:
    space, choices = workshop.supernet.space, workshop.config.mixture.choices
    if training.paths > 1:
        raise InputError(f"train.paths is {training.paths}; a mixture trains one subnet per step. Set it to 1.")
    for name in choices or ():
        if name not in space.positions:
            raise choose_from("choice of a mixture", name, space.names)
    found = Configurations(space, choices)
    found.indices(space.sample_batch(256, torch.Generator().manual_seed(0)))  # refuses choices that depend on others
    if len(found) < workshop.config.mixture.sets:
        raise InputError(
            f"mixture.sets is {workshop.config.mixture.sets}, and {', '.join(found.choices)[:100]} have {len(found)} "
            "configurations to share out among them. Use fewer sets, or name more choices."
        )


def _mixture_paths(workshop: Workshop, mixture: Mixture, config: TrainConfig) -> MixturePaths:
    settings = workshop.config.mixture
    return MixturePaths(
        mixture,
        stream(config.seed, "paths"),
        config.epochs,
        validation_batches(workshop.data, config.batch_size, _device(workshop)),
        decay=settings.decay,
        temperature=lambda epoch, epochs: linear_temperature(epoch, epochs, high=settings.temperature),
    )


def _copies(workshop: Workshop, count: int) -> list[Supernet]:
    return [cast(Supernet, copy.deepcopy(workshop.supernet)) for _ in range(count)]


def _grower(run: RunDirectory, workshop: Workshop, on_step: OnStep | None) -> ForestTrainer:
    """Quantized training with splits, from the calibrated weights."""
    config = workshop.config
    return ForestTrainer(
        lambda name: copy.deepcopy(cast(Supernet, workshop.supernet)),
        workshop.data,
        _config(workshop, config.train),
        run.forest / "growth",
        SplitPlan(**config.split.model_dump()),
        device=_device(workshop),
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
    config, calibrated, world = workshop.config, run.supernet / "calibrated", World.current()
    known = (calibrated / "supernet.json").exists()
    world.wait()  # all have looked before the first one writes
    if not known and config.warmup is not None:
        _phase(run, workshop, "warmup", config.warmup, on_step)
    if not known and world.first:
        _calibrated(workshop)
        workshop.supernet.save(calibrated)
        run.tell({"event": "train.calibrated", "images": config.quantization.calibration_images})
    world.wait()
    if known or not world.first:
        cast(Supernet, workshop.supernet).load(calibrated)


def train(run: RunDirectory, workshop: Workshop, on_step: OnStep | None = None) -> None:
    """Trains the run's supernet, or goes on where it was; afterwards ``supernet/`` holds its weights.

    With splits it trains up to the first one, and :func:`split` goes on. With a mixture ``forest/`` holds all sets of
    weights, which begin as copies, and ``supernet/`` the first of them.

    Raises:
        TrainingError: A loss became NaN; the last good checkpoint is kept.
        InputError: The settings of training and of splits do not go together.
    """
    _calibrate_once(run, workshop, on_step)
    config = workshop.config
    made = cast(Supernet, workshop.supernet)
    if config.split.epochs:
        made = _grower(run, workshop, on_step).train_root()
    elif config.mixture.sets > 1:
        mixture = Mixture(_copies(workshop, config.mixture.sets), config.mixture.choices)
        _phase(run, workshop, "quantized", config.train, on_step, mixture)
        _save(mixture, run)
        made = mixture.supernet(0)
    else:
        _phase(run, workshop, "quantized", config.train, on_step)
    _save(made, run)


def _save(made: Supernet | WeightSets, run: RunDirectory) -> None:
    """Writes what was trained, once."""
    world = World.current()
    if world.first:
        made.save(run.forest if isinstance(made, WeightSets) else run.supernet)
    world.wait()


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
    _save(_grower(run, workshop, on_step).run(), run)


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
    """Loads the trained weights: the forest or the mixture where there is one, else the supernet.

    Raises:
        ArtifactError: There are none; says which command makes them.
    """
    require_trained(run)
    if not (run.forest / "forest.json").exists():
        cast(Supernet, workshop.supernet).load(run.supernet)
    elif not isinstance(workshop.supernet, WeightSets):
        sets = workshop.config.mixture.sets
        count = sets if sets > 1 else len(read_regions(run.forest, workshop.supernet.space))
        copies: Sequence[Supernet] = [workshop.supernet, *_copies(workshop, count - 1)]
        workshop.supernet = (Mixture if sets > 1 else Forest).load(run.forest, copies)
    workshop.supernet.to(workshop.config.device).eval()
