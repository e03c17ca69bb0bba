"""Training a supernet: loop, path sampling, losses, checkpoints. Nothing else in nasq needs it."""

from nasq.training.config import TrainConfig
from nasq.training.loop import Trainer
from nasq.training.losses import PathLoss, cross_entropy, distillation
from nasq.training.paths import Path, PathSampler, Pooled, Sandwich, Uniform
from nasq.training.streams import stream

__all__ = [
    "Path",
    "PathLoss",
    "PathSampler",
    "Pooled",
    "Sandwich",
    "TrainConfig",
    "Trainer",
    "Uniform",
    "cross_entropy",
    "distillation",
    "stream",
]
