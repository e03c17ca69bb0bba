"""What runtimes execute: one data file per target."""

from nasq.targets.files import load, names
from nasq.targets.target import FEATURES, OPERATORS, Removal, Target

__all__ = ["FEATURES", "OPERATORS", "Removal", "Target", "load", "names"]
