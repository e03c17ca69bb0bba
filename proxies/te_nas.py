"""te_nas: trainability and expressivity, by the sum of their ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nasq.ranking import Needs, PoolProxy, ranks

from .linear_regions import LinearRegions
from .ntk import Ntk

__all__ = ["TeNas"]


class TeNas(PoolProxy):
    """The rank by the kernel's condition number (smaller is better) plus that by linear regions, over the pool."""

    name = "te_nas"
    needs = Needs(data=True)
    reference = "Chen, Gong and Wang, ICLR 2021 (arXiv 2102.11535)"

    def __init__(self) -> None:
        self.parts = (Ntk(), LinearRegions())

    def combine(self, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """``rank(-condition number) + rank(regions)``."""
        return ranks(values["ntk"]) + ranks(values["linear_regions"])
