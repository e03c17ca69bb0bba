"""What a zero-cost proxy is: a score of an untrained network, or of a pool of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nasq import plugins
from nasq.errors import InputError
from nasq.ranking.copies import untouched
from nasq.ranking.passes import Batch, Passes, begin

__all__ = ["Batch", "Needs", "PassProxy", "PoolProxy", "Proxy", "load_proxy", "ranks"]


@dataclass(frozen=True)
class Needs:
    """What a proxy looks at.

    Attributes:
        data: Real inputs; otherwise only their shape matters.
        labels: The labels as well.
        batches: Into how many equal batches the given one is split.
    """

    data: bool = False
    labels: bool = False
    batches: int = 1

    def check(self, name: str, batch: Batch) -> None:
        """Raises where a batch lacks what the proxy ``name`` looks at.

        Raises:
            InputError: It has no labels, or too few images.
        """
        x, y = batch
        if self.labels and y is None:
            raise InputError(
                f"{name!r} needs labels and the batch has none. Give a batch (images, labels), or take a proxy without "
                "labels ('nasq proxies' says what each needs)."
            )
        if len(x) < self.batches:
            raise InputError(f"{name!r} splits the batch into {self.batches} and it has {len(x)} image(s). Give more.")

    def text(self) -> str:
        """In a few words: ``"data, labels"``."""
        named = (("data", self.data), ("labels", self.labels), (f"{self.batches} batches", self.batches > 1))
        return ", ".join(word for word, needed in named if needed) or "nothing"


class Proxy(ABC):
    """Scores an untrained network; larger is better.

    A proxy never changes the model it is given, draws random numbers from ``generator`` alone, and reports NaN and
    overflow as they are.

    Attributes:
        name: As on the command line.
        needs: What it looks at.
        reference: Where it was published.
        direction: Whether the published quantity grows with quality. Where a ``"smaller"`` one is better, the score is
            its negative.
    """

    name: str
    needs: Needs
    reference: str
    direction: Literal["larger", "smaller"] = "larger"

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> float:
        """The score of ``model``.

        Args:
            model: As its constructor initialised it.
            batch: Inputs and labels.
            generator: For whatever is drawn; ``None`` is one seeded with 0. One call advances it by one draw.
        """


class PassProxy(Proxy):
    """A proxy that reads shared passes, so that several of them cost hardly more than one.

    Attributes:
        uses: The names of the observations it reads (see :class:`~nasq.ranking.Passes`).
    """

    uses: frozenset[str] = frozenset()

    @abstractmethod
    def measure(self, passes: Passes) -> float:
        """The score, from what the passes saw."""

    def score(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> float:
        """See :meth:`Proxy.score`; to score several proxies together use :func:`nasq.ranking.score`."""
        self.needs.check(self.name, batch)
        passes = begin(model, batch, generator, wanted=set(self.uses))
        with untouched(model):
            return float(self.measure(passes))


def load_proxy(name: str) -> Proxy:
    """An installed proxy, checked to be one.

    Args:
        name: Of its entry point.

    Raises:
        InputError: No package installs it, it cannot be imported, or it is no proxy: says what it lacks.
    """
    maker = plugins.load("proxies", name)
    wanted = "Inherit from nasq.ranking.Proxy and set name, needs and reference (docs/proxies.md)."
    if not (isinstance(maker, type) and issubclass(maker, Proxy)):
        raise InputError(f"the proxy {name!r} is installed as {maker!r}, which is no class of proxies. {wanted}")
    lacking = [key for key in ("name", "needs", "reference") if not hasattr(maker, key)]
    if lacking:
        raise InputError(f"the proxy {name!r} ({maker.__qualname__}) has no {', '.join(lacking)}. {wanted}")
    if maker.name != name:
        raise InputError(
            f"the proxy {name!r} ({maker.__qualname__}) calls itself {maker.name!r}. Give both the same name."
        )
    try:
        return maker()
    except TypeError as error:
        raise InputError(f"the proxy {name!r} cannot be made: {error}. {wanted}") from error


class PoolProxy(Proxy):
    """A proxy that only compares: it combines other proxies' values over a pool of candidates.

    Attributes:
        parts: The proxies whose values it combines.
    """

    parts: tuple[Proxy, ...]

    @abstractmethod
    def combine(self, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Scores ``[pool]`` from the parts' values, each ``[pool]``, by name."""

    def score(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> float:
        """Not defined for one network.

        Raises:
            InputError: Always; says what to call.
        """
        raise InputError(
            f"{self.name!r} compares candidates with each other, so a single network has no score. Use "
            f"nasq.ranking.score_pool([{self.name!r} ...], models, batch), or 'nasq score'."
        )


def ranks(values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    """Ranks 1 (worst) to the number of values (best) ``[n]``; equal values share the mean, NaN stays NaN.

    A NaN takes no rank: the others are ranked among themselves.
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(np.asarray(values, dtype=np.float64), nan_policy="omit"), dtype=np.float64)
