"""ntk: the condition number of the neural tangent kernel."""

from __future__ import annotations

import math

import torch

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Ntk"]


class Ntk(PassProxy):
    """Minus the condition number of ``K[i, j] = <d sum f(x_i) / dW, d sum f(x_j) / dW>``.

    The released code of TE-NAS differentiates one image's outputs at a time in a batch that BatchNorm couples; here every
    image is normalised by its own statistics, so that one batched pass gives all rows and ``K`` is a kernel of images.

    Args:
        samples: How many images of the batch are used.
    """

    name = "ntk"
    needs = Needs(data=True)
    reference = "Chen, Gong and Wang, TE-NAS, ICLR 2021 (arXiv 2102.11535)"
    direction = "smaller"

    def __init__(self, samples: int = 32) -> None:
        self.samples = samples

    def measure(self, passes: Passes) -> float:
        """``-inf`` where the kernel is singular."""
        values = torch.linalg.eigvalsh(passes.sample_gram(self.samples))
        low, high = float(values[0]), float(values[-1])
        if math.isnan(low) or math.isnan(high):
            return math.nan
        return -high / low if low > high * torch.finfo(torch.float64).eps * len(values) else -math.inf
