"""swap: how many different patterns over the images the ReLU units show."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasq.errors import InputError
from nasq.ranking import Needs, Passes, PassProxy, Recorder

from ._initialise import gaussian

__all__ = ["Swap"]


class Swap(PassProxy):
    """The number of distinct sample-wise patterns of the 4-D ReLU outputs, averaged over initialisations.

    A unit's pattern is its on/off state on each of the samples, so the score is at most ``min(units, 2^samples)``. With
    ``mu`` and ``sigma`` it is times ``exp(-(P - mu)^2 / sigma)``, ``P`` the parameters in thousands.

    Args:
        samples: Images used, at most 62.
        repeats: Gaussian initialisations that are averaged.
        mu: Centre of the regularisation, in thousands of parameters.
        sigma: Its width.
    """

    name = "swap"
    needs = Needs(data=True)
    reference = "Peng et al., ICLR 2024 (arXiv 2403.04161)"

    def __init__(
        self, samples: int = 16, repeats: int = 32, mu: float | None = None, sigma: float | None = None
    ) -> None:
        if not 1 <= samples <= 62 or repeats < 1:
            raise InputError(f"swap was given samples={samples}, repeats={repeats}. Allowed: 1 to 62, and 1 or more.")
        if (mu is None) != (sigma is None):
            raise InputError(f"swap was given mu={mu}, sigma={sigma}. Give both for the regularised score, or neither.")
        self.samples, self.repeats, self.mu, self.sigma = samples, repeats, mu, sigma

    def measure(self, passes: Passes) -> float:
        """The mean over initialisations."""
        rng = passes.generator("swap weights")
        model = passes.copy()
        counts = []
        for _ in range(self.repeats):
            gaussian(model, rng)
            counts.append(self._patterns(passes, model))
        score = sum(counts) / len(counts)
        if self.mu is None or self.sigma is None:
            return score
        thousands = sum(one.numel() for one in passes.original.parameters()) / 1000
        return score * math.exp(-((thousands - self.mu) ** 2) / self.sigma)

    def _patterns(self, passes: Passes, model: torch.nn.Module) -> int:
        x = passes.x[: self.samples]
        powers = 2 ** torch.arange(len(x), device=passes.device, dtype=torch.int64)
        found: list[Tensor] = []

        def watch(before: Tensor) -> None:
            if before.ndim == 4:
                found.append(((before > 0).flatten(1) * powers[:, None]).sum(0).unique())

        with torch.no_grad(), Recorder({}, on_relu=watch):
            passes.run(model, x, "float")
        if not found:
            raise InputError("swap looks at ReLUs on feature maps and the network ran none. Take another proxy.")
        return len(torch.cat(found).unique())
