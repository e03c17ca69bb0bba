"""linear_regions: into how many linear pieces the ReLUs cut the input space, along straight lines."""

from __future__ import annotations

import torch
from torch import Tensor

from nasq.errors import InputError
from nasq.ranking import Needs, Passes, PassProxy, Recorder

from ._initialise import kaiming

__all__ = ["LinearRegions"]


class LinearRegions(PassProxy):
    """Borders crossed on the way between two inputs, averaged over lines, plus one.

    TE-NAS counts distinct ReLU patterns of 3,000 random inputs of 3x3 pixels, on a network with one channel and one cell
    per stage. On the network itself every pattern is distinct and the count is the number of inputs; so here points
    lie densely on lines between two noise inputs, and a unit that changes its state between two neighbouring points is a
    border crossed. All points form one batch, so BatchNorm's statistics are the same for all of them.

    Args:
        lines: Number of lines.
        points: Points on each.
    """

    name = "linear_regions"
    needs = Needs()
    reference = (
        "Xiong et al., ICML 2020; Chen, Gong and Wang, TE-NAS, ICLR 2021; along lines as in Hanin and Rolnick 2019"
    )

    def __init__(self, lines: int = 2, points: int = 24) -> None:
        self.lines, self.points = lines, points

    def measure(self, passes: Passes) -> float:
        """The mean number of regions on a line."""
        model = passes.copy()
        kaiming(model, passes.generator("linear_regions weights"))
        ends = passes.noise((2, self.lines, 1, *passes.x.shape[1:]), "linear_regions input")
        along = torch.linspace(0, 1, self.points, device=passes.device, dtype=ends.dtype).view(
            -1, *[1] * (passes.x.ndim - 1)
        )
        x = (ends[0] * (1 - along) + ends[1] * along).flatten(0, 1)
        crossed = [0]

        def watch(before: Tensor) -> None:
            on = (before > 0).reshape(self.lines, self.points, -1)
            crossed[0] += int((on[:, 1:] != on[:, :-1]).sum())

        with torch.no_grad(), Recorder({}, on_relu=watch):
            passes.run(model, x, "float")
        if crossed == [0] and self.points < 2:
            raise InputError(f"linear_regions was given points={self.points}. Allowed: 2 or more.")
        return 1 + crossed[0] / self.lines
