"""l2_norm: the size of the weights."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy, layers_of

__all__ = ["L2Norm"]


class L2Norm(PassProxy):
    """``sum over layers of |W|`` (Frobenius): no data, no pass."""

    name = "l2_norm"
    needs = Needs()
    reference = "Abdelfattah et al., ICLR 2021 (arXiv 2101.08134)"

    def measure(self, passes: Passes) -> float:
        """The sum over layers."""
        return sum(float(weight.detach().norm()) for weight in layers_of(passes.original).values())
