"""jacov: how different the network is, to first order, around different images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Jacov", "correlations"]

K = 1e-5
"""What the reference adds to eigenvalues and correlations before a logarithm."""


def correlations(rows: Tensor) -> Tensor:
    """Correlation between rows, ``[n, n]`` in float64; NaN where a row is constant."""
    return torch.corrcoef(rows.double()).reshape(len(rows), len(rows))


class Jacov(PassProxy):
    """``-sum over eigenvalues v of (log(v + k) + 1 / (v + k))``, ``k = 1e-5``.

    The eigenvalues are those of the correlation between images of the gradients of the summed outputs with respect to the
    pixels. BatchNorm sees the whole batch, so a row holds what its image does to other images' outputs too, as in the
    reference. The matrix is symmetric and is treated as such; the reference uses a general solver.
    """

    name = "jacov"
    needs = Needs(data=True)
    reference = "Mellor et al. 2020 (arXiv 2006.04647v1); Abdelfattah et al., ICLR 2021"
    uses = frozenset({"input_gradients"})

    def measure(self, passes: Passes) -> float:
        """NaN where an image has a constant gradient."""
        matrix = correlations(passes.see("input_gradients"))
        if not bool(matrix.isfinite().all()):
            return math.nan
        values = torch.linalg.eigvalsh(matrix) + K
        # Rounding leaves eigenvalues of a singular matrix slightly below zero, whose logarithm would be NaN.
        values = values.clamp_min(torch.finfo(values.dtype).eps)
        return -float((values.log() + 1 / values).sum())
