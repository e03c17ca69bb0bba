"""From a training's settings to its samplers of paths and of data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nasq.data import DataSampler, UniformSampler
from nasq.data.importance import ImportanceSampler
from nasq.errors import InputError
from nasq.training.config import TrainConfig
from nasq.training.fairness import StrictFairness
from nasq.training.guidance import Guidance
from nasq.training.importance import ImportancePaths
from nasq.training.paths import PathSampler, Sandwich, Uniform
from nasq.training.region import Region

if TYPE_CHECKING:
    from nasq.supernet import Supernet

__all__ = ["data_sampler", "path_sampler"]


def path_sampler(
    supernet: Supernet, config: TrainConfig, generator: torch.Generator, region: Region | None = None
) -> PathSampler:
    """The sampler that ``config.sampler`` names.

    Args:
        supernet: What is trained.
        config: Its settings.
        generator: The stream to draw from; the sampler keeps it as ``generator``.
        region: The part of the space that a leaf of a forest has; ``None`` for all.

    Raises:
        InputError: The sampler cannot stay inside a region, or the space is not one for it.
    """
    if config.sampler == "uniform":
        return Uniform(supernet.space, generator, config.paths, region)
    if config.sampler == "fair":
        return StrictFairness(supernet.space if region is None else region, generator)
    if config.sampler == "importance":
        return ImportancePaths(
            supernet,
            generator,
            config.epochs,
            shared=config.importance_shared,
            decay=config.importance_decay,
            floor=config.importance_floor,
            whole=config.importance_whole,
            reweight=config.reweight,
            region=region,
        )
    if region is not None and region.allowed:
        raise InputError(
            f"the sampler {config.sampler!r} trains the largest and the smallest subnet, which no leaf of a forest has both "
            "of. Allowed for a split: uniform, fair, importance."
        )
    if config.sampler == "guided":
        return Guidance(supernet.space, generator, config.paths, config.low_weight)
    return Sandwich(supernet.space, generator, config.paths, config.smallest)


def data_sampler(
    count: int, config: TrainConfig, generator: torch.Generator, device: torch.device | str = "cpu"
) -> DataSampler:
    """The sampler that ``config.data_sampler`` names.

    Args:
        count: Number of training samples.
        config: Its settings.
        generator: The stream to draw from; the sampler keeps it as ``generator``.
        device: Where the network runs.
    """
    if config.data_sampler == "uniform":
        return UniformSampler(count, generator)
    return ImportanceSampler(
        count, generator, config.epochs, device=device, reweight=config.reweight, keep=config.importance_keep
    )
