"""Conformance kits: what every search space has to do, also yours."""

from nasq.testing.randomise import randomise
from nasq.testing.spaces import ConformanceError, SpaceCheck, SpaceReport, check_space

__all__ = ["ConformanceError", "SpaceCheck", "SpaceReport", "check_space", "randomise"]
