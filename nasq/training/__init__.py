"""Training a supernet: loop, path sampling, losses, checkpoints. Nothing else in nasq needs it."""

from nasq.training.balanced import Balanced
from nasq.training.config import TrainConfig
from nasq.training.distribution import WeightDistribution
from nasq.training.fairness import StrictFairness
from nasq.training.guidance import Guidance
from nasq.training.importance import ImportancePaths
from nasq.training.loop import Trainer
from nasq.training.losses import PathLoss, cross_entropy, distillation
from nasq.training.meta import MetaTrainer
from nasq.training.paths import Path, PathSampler, Pooled, Sandwich, Uniform
from nasq.training.region import Region
from nasq.training.shrinking import Phase, ProgressiveShrinking
from nasq.training.streams import stream

__all__ = [
    "Balanced",
    "Guidance",
    "ImportancePaths",
    "MetaTrainer",
    "Path",
    "PathLoss",
    "PathSampler",
    "Phase",
    "Pooled",
    "ProgressiveShrinking",
    "Region",
    "Sandwich",
    "StrictFairness",
    "TrainConfig",
    "Trainer",
    "Uniform",
    "WeightDistribution",
    "cross_entropy",
    "distillation",
    "stream",
]
