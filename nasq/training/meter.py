"""The gradient's variance along a training: what its samplers do to it, told with the epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from nasq.data.importance import ImportanceSampler, draw
from nasq.errors import InputError
from nasq.training.importance import ImportancePaths
from nasq.training.paths import Uniform
from nasq.training.region import Region
from nasq.training.streams import stream
from nasq.training.variance import Batch, Draw, GradientVariance, UnclearMeanError, gradient_variance

if TYPE_CHECKING:
    from nasq.training.loop import Trainer

__all__ = ["VarianceMeter"]

_BATCHES = 2
"""Batches per path: with the number of images fixed, more paths say more."""


class VarianceMeter:
    """Measures :func:`~nasq.training.variance.gradient_variance` of a training that draws one path at a time.

    For uniform draws of paths and images, and, where paths or images are drawn by importance, for the training's own
    draws in the epoch that ended, reweighted to the same mean, at the same weights: their difference is what the
    sampling does. The training goes on as if nothing had been measured: weights, statistics and every random stream
    stay as they were.

    Images are not augmented, and gradients are in full precision.

    Args:
        trainer: Whose supernet, data and samplers.
        paths: Paths that are drawn for a measurement, 2 or more.

    Raises:
        InputError: Paths are drawn in another way than :class:`Uniform` or :class:`ImportancePaths` do.
    """

    def __init__(self, trainer: Trainer, paths: int) -> None:
        sampler = trainer.path_sampler
        if not isinstance(sampler, ImportancePaths) and type(sampler) is not Uniform:  # a sandwich is one, too
            raise InputError(
                f"the gradient's variance is that of one drawn path, and {type(sampler).__name__} draws in another way. Set "
                "variance_every to 0, or sampler to uniform or importance."
            )
        assert isinstance(sampler, Uniform | ImportancePaths)
        self.trainer, self.paths, self.sampler = trainer, paths, sampler
        self.region = sampler.region or Region(sampler.space, {})

    def measure(self, epoch: int) -> dict[str, dict[str, float] | None]:
        """``{"uniform": ..., "own": ...}``, each ``{"path", "data", "total", "bias"}`` without unit.

        ``own`` is absent where the training draws uniformly. A value is ``None`` where the mean gradient cannot be told
        from zero, so that nothing can be said relative to it.

        Args:
            epoch: Decides which draws are made.
        """
        before = self.sampler.state_dict()
        found = {"uniform": self._measured(epoch, own=False)}
        if isinstance(self.sampler, ImportancePaths) or self._shares is not None:
            found["own"] = self._measured(epoch, own=True)
        self.sampler.load_state_dict(before)
        return found

    @property
    def _shares(self) -> torch.Tensor | None:
        """Probabilities of the images in this epoch; ``None`` for uniform ones."""
        sampler = self.trainer.data_sampler
        return sampler.probabilities if isinstance(sampler, ImportanceSampler) else None

    def _measured(self, epoch: int, own: bool) -> dict[str, float] | None:
        trainer, generator = self.trainer, stream(self.trainer.config.seed, f"variance {epoch}")
        try:
            found = gradient_variance(
                trainer.supernet,
                self._own_path if own else lambda: (self.region.sample(generator), 1.0),
                self._batches(generator, self._shares if own else None),
                path_count=self.paths,
                batch_count=_BATCHES,
                mode=trainer.mode,
            )
        except UnclearMeanError:  # a training does not stop for that
            return None
        return _plain(found)

    def _own_path(self) -> Draw:
        subnet = self.sampler.step()[0].subnet
        return subnet, self.sampler.weight(subnet) if isinstance(self.sampler, ImportancePaths) else 1.0

    def _batches(self, generator: torch.Generator, shares: torch.Tensor | None) -> Callable[[], Batch]:
        trainer = self.trainer
        count = len(trainer.split)
        even = torch.full((count,), 1 / count, dtype=torch.float64)

        def drawn() -> Batch:
            at = draw(even if shares is None else shares, trainer.batch_size, generator)
            weights = None if shares is None else (1 / (count * shares[at])).float().to(trainer.device)
            on_device = at.to(trainer.device)
            return trainer.data.normalise(trainer.split.images[on_device]), trainer.split.labels[on_device], weights

        return drawn


def _plain(found: GradientVariance) -> dict[str, float]:
    return {"path": found.path, "data": found.data, "total": found.total, "bias": found.bias}
