"""The cheap levels of a run's evaluation: a proxy on the architecture, and accuracy on part of the validation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nasq.data import Split
from nasq.errors import InputError
from nasq.run.architecture import ArchitectureScore, single_proxy
from nasq.run.assemble import Workshop
from nasq.search import Measure, Objective
from nasq.search.cascade import Cascade, CascadeSettings
from nasq.space import Subnet
from nasq.training import stream

if TYPE_CHECKING:
    from nasq.run.evaluation import Evaluation

__all__ = ["cascade_of", "require_cascade"]

_PROXY = "search.cascade.proxy"


def require_cascade(workshop: Workshop) -> None:
    """Refuses a cascade that could not work, before anything is trained.

    Raises:
        InputError: Unknown levels, an unknown proxy or one that compares candidates, objectives besides accuracy and costs.
    """
    settings = workshop.config.search.cascade
    CascadeSettings(settings.levels, settings.confidence, settings.dominators, settings.least)
    if "proxy" in settings.levels:
        single_proxy(settings.proxy, _PROXY)
    names = workshop.config.search.objectives
    if names[0] != "accuracy" or "latency" in names:
        raise InputError(
            f"a cascade saves evaluations of accuracy: it must be the first objective, and all others must be costs, not "
            f"{', '.join(names)}. Change search.objectives, or leave search.cascade.levels empty."
        )


def cascade_of(
    workshop: Workshop, evaluation: Evaluation, objectives: Sequence[Objective], measures: Sequence[Measure]
) -> Cascade:
    """The evaluator in levels that a run's configuration asks for."""
    config = workshop.config.search.cascade
    settings = CascadeSettings(config.levels, config.confidence, config.dominators, config.least)
    return Cascade(
        workshop.supernet.space,
        objectives,
        measures,
        settings,
        proxy=_score(workshop) if "proxy" in config.levels else None,
        part=_PartialAccuracy(workshop, evaluation) if "part" in config.levels else None,
    )


def _score(workshop: Workshop) -> ArchitectureScore:
    settings = workshop.config.search.cascade
    return ArchitectureScore(workshop, single_proxy(settings.proxy, _PROXY), settings.proxy_images)


class _PartialAccuracy:
    """Integer accuracy on the same random validation images for every subnet, as they come; statistics of few images."""

    def __init__(self, workshop: Workshop, evaluation: Evaluation) -> None:
        settings, split = workshop.config.search.cascade, workshop.data.validation
        count = max(1, round(settings.images * len(split)))
        at = torch.randperm(len(split), generator=stream(workshop.config.seed, "partial validation"))[:count]
        at = at.to(split.images.device)
        self._split = Split(split.images[at], split.labels[at])
        self._step, self._evaluation, self._supernet = settings.step, evaluation, workshop.supernet
        images = torch.cat(list(evaluation.batches))[: settings.recalibration_images]
        self._batches = list(torch.split(images, workshop.config.search.batch_size))

    def __call__(self, subnet: Subnet) -> Iterator[tuple[int, int]]:
        statistics = self._supernet.recalibrate(subnet, self._batches)
        right = seen = 0
        for images, labels in self._split.batches(self._step):
            integers = self._evaluation.integers(subnet, Split(images, labels), statistics)
            right += int((np.argmax(integers.cpu().numpy(), axis=1) == labels.cpu().numpy()).sum())
            seen += len(labels)
            yield right, seen
