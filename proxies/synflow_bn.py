"""synflow_bn: synflow with BatchNorm kept."""

from __future__ import annotations

from nasq.ranking import Needs

from .synflow import Synflow

__all__ = ["SynflowBN"]


class SynflowBN(Synflow):
    """:class:`~nasq.proxies.synflow.Synflow` with BatchNorm of the batch of one as it is in training mode.

    BatchNorm divides the growth out again, so this measures much less; it is here for comparison.
    """

    name = "synflow_bn"
    needs = Needs()
    reference = "Cavagnero et al. 2023; NASLib"
    norms = True
