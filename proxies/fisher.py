"""fisher: how much single channels matter to the loss."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Fisher"]


class Fisher(PassProxy):
    """``sum over channels of fan-in x 1/2 mean_n (sum over positions of output x dL/d output)^2``.

    The fan-in (``C_in / groups * k * k``) is part of the reference, which gives a channel's value to each of its weights.
    A layer's output is taken before BatchNorm.
    """

    name = "fisher"
    needs = Needs(data=True, labels=True)
    reference = "Turner et al., ICLR 2020; as a proxy Abdelfattah et al., ICLR 2021"
    uses = frozenset({"fisher"})

    def measure(self, passes: Passes) -> float:
        """The sum over layers."""
        return sum(float(one.abs().sum()) for one in passes.see("fisher").values())
