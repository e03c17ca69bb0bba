"""grasp: what removing single weights would do to the gradient's flow."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Grasp"]


class Grasp(PassProxy):
    """``-sum over weights of w (H g)``: ``g`` the gradient, ``H`` the Hessian of the batch's mean loss; of either sign."""

    name = "grasp"
    needs = Needs(data=True, labels=True)
    reference = "Wang et al., ICLR 2020; as a proxy Abdelfattah et al., ICLR 2021"
    uses = frozenset({"curvature", "gradients"})

    def measure(self, passes: Passes) -> float:
        """The sum over layers."""
        found = passes.see("curvature")
        return -sum(float((passes.layers[path].detach() * one).sum()) for path, one in found.items())
