"""snip: what the loss would change if single weights were removed."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Snip"]


class Snip(PassProxy):
    """``sum over weights of |w dL/dw|``."""

    name = "snip"
    needs = Needs(data=True, labels=True)
    reference = "Lee et al., ICLR 2019; as a proxy Abdelfattah et al., ICLR 2021"
    uses = frozenset({"gradients"})

    def measure(self, passes: Passes) -> float:
        """The sum over layers."""
        found = passes.see("gradients")
        return sum(float((passes.layers[path].detach() * one).abs().sum()) for path, one in found.items())
