"""Which samples an epoch visits, in which order, and with which weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nasq.errors import InputError

__all__ = ["DataSampler", "UniformSampler", "check_samples"]


@runtime_checkable
class DataSampler(Protocol):
    """Proposes the samples of an epoch and learns from what the network made of them.

    A training loop calls :meth:`indices` once at the start of an epoch, cuts the result into batches, asks
    :meth:`weights` for each batch and reports each forward pass to :meth:`observe`. The state holds everything that
    the next call depends on, the sampler's generator included.
    """

    def indices(self, epoch: int) -> Tensor:
        """The samples of ``epoch`` (from 0) in order: int64 ``[n]`` on the CPU, ``n`` the size of the data set.

        Repetitions are allowed.
        """
        ...

    def weights(self, indices: Tensor) -> Tensor | None:
        """What each sample's loss is multiplied by before the batch mean: fp32 ``[n]``, or ``None`` for all ones.

        An importance sampler that draws sample ``i`` with probability ``p_i`` stays unbiased with ``1 / (N p_i)``.
        """
        ...

    def observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Reports one forward pass, once per path of a step.

        Args:
            indices: int64 ``[n]`` on the CPU, as :meth:`indices` gave them.
            logits: fp32 ``[n, classes]``, detached, on the training device.
            labels: int64 ``[n]``, there too.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as a nested dict of plain types and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        ...


def check_samples(state: Mapping[str, Any], n: int) -> None:
    """Refuses a sampler's state that is not that of ``n`` samples.

    Raises:
        InputError: Names both numbers.
    """
    if state["n"] != n:
        raise InputError(f"the sampler's state is that of {state['n']} samples; this data set has {n}")


class UniformSampler:
    """Every sample once per epoch, in a fresh random order.

    Args:
        n: Number of samples.
        generator: The stream to draw from; its state is part of the sampler's.

    Raises:
        InputError: ``n`` is below 1.
    """

    def __init__(self, n: int, generator: torch.Generator) -> None:
        if n < 1:
            raise InputError(f"a sampler needs at least one sample; got n = {n}")
        self.n = n
        self.generator = generator

    def indices(self, epoch: int) -> Tensor:
        """A permutation of ``0 .. n-1``."""
        return torch.randperm(self.n, generator=self.generator, device=self.generator.device).cpu()

    def weights(self, indices: Tensor) -> Tensor | None:
        """All ones."""
        return None

    def observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The number of samples and the state of the generator."""
        return {"n": self.n, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            InputError: The state is that of another number of samples.
        """
        check_samples(state, self.n)
        self.generator.set_state(state["generator"])
