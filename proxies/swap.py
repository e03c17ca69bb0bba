"""swap: how many different patterns over the images the ReLU units show."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasq.errors import InputError
from nasq.ranking import Needs, Passes, PassProxy, Recorder, Repeats

from ._initialise import gaussian

__all__ = ["Swap"]

TABLE = 20
"""Up to so many samples the patterns, 2 to the power of that many, fit a table."""


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
        found, repeats = _Patterns(len(x), passes.device), Repeats()

        def watch(before: Tensor) -> None:
            if before.ndim == 4:  # patterns of the same input again are no new ones
                repeats.made(before, lambda one: found.add(one > 0))

        with torch.no_grad(), Recorder({}, on_relu=watch):
            passes.run(model, x, "float")
        if not found.units:
            raise InputError("swap looks at ReLUs on feature maps and the network ran none. Take another proxy.")
        return found.count()


class _Patterns:
    """Counts distinct patterns: of few samples by a table of what was seen, of many by sorting."""

    def __init__(self, samples: int, device: torch.device) -> None:
        self.units, few = 0, samples <= TABLE
        # Numbers below 2^20 are exact in float32, whose products are much faster than those of integers.
        powers = 2 ** torch.arange(samples, device=device, dtype=torch.int64)
        self.powers = powers.float() if few else powers
        self.seen = torch.zeros(2**samples if few else 0, dtype=torch.bool, device=device)
        self.listed: list[Tensor] = []

    def add(self, states: Tensor) -> None:
        """The states ``[samples, ...]`` of some units."""
        rows = states.flatten(1)
        self.units += rows.shape[1]
        if len(self.seen):
            self.seen[(self.powers @ rows.float()).long()] = True
        else:
            self.listed.append((rows * self.powers[:, None]).sum(0).unique())  # type: ignore[no-untyped-call]

    def count(self) -> int:
        """Of all that was added."""
        if len(self.seen):
            return int(self.seen.sum())
        return len(torch.cat(self.listed).unique())  # type: ignore[no-untyped-call]
