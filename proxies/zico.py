"""zico: gradients that are large and the same on every batch."""

from __future__ import annotations

import math

import torch

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Zico"]


class Zico(PassProxy):
    """``sum over layers of log(sum over weights of mean |g| / std(g))`` over equal parts of the batch.

    ``std`` is the population's, of the signed gradients; weights whose gradient does not vary are left out, and so are
    layers without others. With two parts, as here by default, ``std`` is half the difference.

    Args:
        batches: Into how many the batch is split; at least 2.
    """

    name = "zico"
    reference = "Li et al., ICLR 2023 (arXiv 2301.11300)"
    needs = Needs(data=True, labels=True, batches=2)

    def __init__(self, batches: int = 2) -> None:
        self.needs = Needs(data=True, labels=True, batches=max(2, batches))

    def measure(self, passes: Passes) -> float:
        """NaN where no layer has a gradient that varies."""
        size = len(passes.x) // self.needs.batches
        places = [slice(at * size, (at + 1) * size) for at in range(self.needs.batches)]
        found = [passes.gradients(passes.x[at], passes.y[at]) for at in places]
        logs = []
        for path in passes.layers:
            stack = torch.stack([one[path] for one in found])
            std = stack.std(0, correction=0)
            ratio = stack.abs().mean(0)[std > 0] / std[std > 0]
            if float(ratio.sum()) > 0:
                logs.append(math.log(float(ratio.sum())))
        return sum(logs) if logs else math.nan
