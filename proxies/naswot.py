"""naswot: how well the ReLUs tell images apart."""

from __future__ import annotations

import math

import torch

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Naswot"]


class Naswot(PassProxy):
    """``log |det K|``, ``K[i, j]`` the number of ReLUs in the same state for images ``i`` and ``j``.

    Every ReLU that runs counts, as in NASLib; the original code leaves out those that no gradient reaches. Two equal images
    make ``K`` singular: ``-inf``.
    """

    name = "naswot"
    needs = Needs(data=True)
    reference = "Mellor et al., ICML 2021 (arXiv 2006.04647)"
    uses = frozenset({"codes"})

    def measure(self, passes: Passes) -> float:
        """Of the whole batch."""
        sign, value = torch.linalg.slogdet(passes.see("codes"))
        return float(value) if float(sign) != 0 else -math.inf
