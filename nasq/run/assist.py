"""Assistance of a run's search: the cheap score that chooses among the algorithm's own proposals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nasq import plugins
from nasq.errors import NasqError, choose_from
from nasq.run.architecture import ArchitectureScore, single_proxy
from nasq.run.assemble import Workshop
from nasq.run.kept import KeptValues
from nasq.search import Assist, Measure
from nasq.search.objectives import Rows, Values
from nasq.space import Subnet

__all__ = ["assist_of", "require_assist"]

_KEY = "search.assist.score"


def require_assist(workshop: Workshop, costs: Mapping[str, Measure]) -> None:
    """Refuses assistance that could not work, before anything is trained.

    Raises:
        InputError: The score is neither a cost nor a proxy that scores one network at a time.
    """
    name = workshop.config.search.assist.score
    if name is None or name in costs:
        return
    known = plugins.installed("proxies")
    if name not in known:
        raise choose_from(_KEY, name, [*costs, *known])
    single_proxy(name, _KEY)


def assist_of(workshop: Workshop, costs: Mapping[str, Measure], directory: Path) -> Assist | None:
    """What assists the run's search; ``None`` where nothing does.

    Args:
        workshop: Of the run.
        costs: Measures by name; more is better.
        directory: Where scores of a proxy are kept (``assist.jsonl``).
    """
    settings = workshop.config.search.assist
    if settings.score is None:
        return None
    if settings.score in costs:
        return Assist(settings.score, costs[settings.score].function, settings.starts, settings.offspring)
    name = f"{settings.score} on {settings.images} images"
    score = _KeptScore(workshop, KeptValues(directory / "assist.jsonl", name))
    return Assist(name, score, settings.starts, settings.offspring)


class _KeptScore:
    """A proxy's scores of rows; every architecture is scored once."""

    def __init__(self, workshop: Workshop, kept: KeptValues) -> None:
        settings = workshop.config.search.assist
        assert settings.score is not None
        self._space, self._kept, self._name = workshop.supernet.space, kept, settings.score
        self._score = ArchitectureScore(workshop, single_proxy(settings.score, _KEY), settings.images)

    def __call__(self, rows: Rows) -> Values:
        return np.array([self._value(subnet) for subnet in self._space.to_subnets(rows)])

    def _value(self, subnet: Subnet) -> float:
        return self._kept.get(self._score.architecture(subnet).id, lambda: {"score": self._finite(subnet)})["score"]

    def _finite(self, subnet: Subnet) -> float:
        value = self._score(subnet)
        if not np.isfinite(value):
            raise NasqError(
                f"{self._name!r} scores subnet {subnet.id} {value}, so it cannot be compared. Take another score: {_KEY}."
            )
        return value
