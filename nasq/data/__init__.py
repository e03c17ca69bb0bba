"""Data sets, their splits, augmentation on the device, and samplers."""

from nasq.data.augment import Augment, AugmentPolicy, training_views
from nasq.data.dataset import DataSet, Split
from nasq.data.importance import ImportanceSampler
from nasq.data.samplers import DataSampler, UniformSampler
from nasq.data.sources import NAMES, load

__all__ = [
    "NAMES",
    "Augment",
    "AugmentPolicy",
    "DataSampler",
    "DataSet",
    "ImportanceSampler",
    "Split",
    "UniformSampler",
    "load",
    "training_views",
]
