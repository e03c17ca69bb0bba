"""plain: weights times gradients, with their signs."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Plain"]


class Plain(PassProxy):
    """``sum over weights of w dL/dw``, signed; a weak baseline."""

    name = "plain"
    needs = Needs(data=True, labels=True)
    reference = "Mozer and Smolensky 1989; as a proxy Abdelfattah et al., ICLR 2021"
    uses = frozenset({"gradients"})

    def measure(self, passes: Passes) -> float:
        """The sum over layers."""
        found = passes.see("gradients")
        return sum(float((passes.layers[path].detach() * one).sum()) for path, one in found.items())
