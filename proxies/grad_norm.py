"""grad_norm: the size of the first gradient."""

from __future__ import annotations

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["GradNorm"]


class GradNorm(PassProxy):
    """``sum over layers of |dL/dW|`` (Frobenius), of the mean cross-entropy over the batch."""

    name = "grad_norm"
    needs = Needs(data=True, labels=True)
    reference = "Abdelfattah et al., ICLR 2021 (arXiv 2101.08134)"
    uses = frozenset({"gradients"})

    def measure(self, passes: Passes) -> float:
        """The sum over layers."""
        return sum(float(one.norm()) for one in passes.see("gradients").values())
