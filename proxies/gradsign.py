"""GradSign: how far the gradients of single samples agree in sign, weight by weight."""

from __future__ import annotations

from typing import Literal

from nasq.errors import InputError
from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["GradSign"]


class GradSign(PassProxy):
    """``sum over weights of |sum over samples of sign(dl_n / dw)|``, an integer in ``[0, samples * weights]``.

    Weights are those of convolutions and linear layers; ``sign(0)`` and the sign of NaN are 0. Each sample is normalised
    by its own statistics, as where samples come one at a time (the released code); with ``norm="running"`` BatchNorm uses
    its running statistics, which is another and weaker score.

    Args:
        norm: ``"sample"`` or ``"running"``.
    """

    name = "gradsign"
    needs = Needs(data=True, labels=True)
    reference = "Zhang and Jia, ICLR 2022 (arXiv 2110.08616)"

    def __init__(self, norm: Literal["sample", "running"] = "sample") -> None:
        if norm not in {"sample", "running"}:
            raise InputError(f"gradsign was given norm={norm!r}. Allowed: 'sample', 'running'.")
        self.norm = norm

    def measure(self, passes: Passes) -> float:
        """The sum over all weights."""
        counts = passes.signs if self.norm == "sample" else passes.count_signs(norms=False)
        return float(sum(int(one.abs().sum()) for one in counts.values()))
