"""epe_nas: how alike the network is around images of one class."""

from __future__ import annotations

from itertools import product

from nasq.ranking import Needs, Passes, PassProxy

from .jacov import K, correlations

__all__ = ["EpeNas"]

MANY = 100
"""Above so many outputs classes are compared with each other."""


class EpeNas(PassProxy):
    """With ``s_c = sum of log(|correlations| + k)`` over the rows of class ``c``, ``k = 1e-5``.

    ``sum over classes of |s_c|``; above 100 outputs every ``s_c`` is divided by the number of its images, and the score is
    ``sum over pairs of |s_c - s_d| / classes seen``. Rows are those of :class:`~nasq.proxies.jacov.Jacov`.
    """

    name = "epe_nas"
    needs = Needs(data=True, labels=True)
    reference = "Lopes, Alirezazadeh and Alexandre 2021 (arXiv 2102.08099)"
    uses = frozenset({"input_gradients"})

    def measure(self, passes: Passes) -> float:
        """NaN where an image has a constant gradient."""
        rows, y = passes.see("input_gradients"), passes.y
        many = passes.observed.outputs > MANY
        sums = []
        for label in sorted(set(y.tolist())):
            own = rows[y == label]
            total = float((correlations(own).abs() + K).log().sum()) if len(own) > 1 else _ALONE
            sums.append(total / len(own) if many else total)
        if not many:
            return sum(abs(one) for one in sums)
        return sum(abs(a - b) for a, b in product(sums, sums)) / len(sums)


_ALONE = 9.999950000398841e-06
"""``log(1 + k)``: a single image correlates with itself."""
