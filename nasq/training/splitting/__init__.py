"""Splitting a supernet: scores, partitions, and the forest of supernets that comes of it."""

from nasq.training.splitting.forest import Forest, WeightSets
from nasq.training.splitting.growth import ForestTrainer
from nasq.training.splitting.matching import Matching, gradient_distances
from nasq.training.splitting.mixture import Mixture, MixturePaths, validation_batches
from nasq.training.splitting.partition import Partition, balanced_partition
from nasq.training.splitting.plan import SplitPlan

__all__ = [
    "Forest",
    "ForestTrainer",
    "Matching",
    "Mixture",
    "MixturePaths",
    "Partition",
    "SplitPlan",
    "WeightSets",
    "balanced_partition",
    "gradient_distances",
    "validation_batches",
]
