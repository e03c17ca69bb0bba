"""alive_params: how many weights the loss depends on at all."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["AliveParams"]


class AliveParams(PassProxy):
    """The number of weights of convolutions and linear layers whose gradient is not 0.

    ``params`` without what lies on no path from input to output, or behind units that no image of the batch switches on.
    At random initialisation GradSign is close to this number times ``sqrt(2 n / pi)`` for ``n`` images, so it is the
    baseline that GradSign has to beat; with one image the two are equal.
    """

    name = "alive_params"
    needs = Needs(data=True, labels=True)
    reference = "this project: what GradSign (Zhang and Jia, ICLR 2022) mostly counts at initialisation"
    uses = frozenset({"gradients"})

    def measure(self, passes: Passes) -> float:
        """The sum over layers; NaN where a gradient is."""
        found = passes.see("gradients").values()
        if any(bool(one.isnan().any()) for one in found):
            return float("nan")
        return float(sum(int((one != 0).sum()) for one in found))
