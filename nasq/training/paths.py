"""Which subnets a training step visits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nasq.errors import InputError

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet
    from nasq.training.region import Region

__all__ = ["LARGEST", "RANDOM", "SMALLEST", "Path", "PathSampler", "Pooled", "Sandwich", "Uniform"]

LARGEST = "largest"
RANDOM = "random"
SMALLEST = "smallest"


class Path(NamedTuple):
    """One subnet of a training step, why it is there, and what its loss is multiplied by."""

    subnet: Subnet
    role: str
    weight: float = 1.0


@runtime_checkable
class PathSampler(Protocol):
    """Proposes the subnets of a step and learns from their gradients.

    A training loop calls :meth:`step` once per step, trains the paths in the order given, and calls :meth:`observe`
    after each one's backward pass. The state holds everything that the next call depends on, generator included.
    """

    def step(self) -> list[Path]:
        """The subnets of the next step, at least one, in the order in which they are trained."""
        ...

    def observe(self, path: Path, loss: Tensor, supernet: nn.Module) -> None:
        """Feedback, right after the backward pass of ``path`` and before any clipping.

        Args:
            path: What was trained.
            loss: Its loss: 0-d, detached, on the training device.
            supernet: Its parameters' ``.grad`` hold the sum over this step's paths so far; ``None`` for parameters
                that none of them used.
        """
        ...

    def on_epoch(self, epoch: int) -> None:
        """An epoch begins; counted from 0."""
        ...

    def on_phase(self, name: str) -> None:
        """A phase begins: a part of the training with rules of its own, as in progressive shrinking."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as a nested dict of plain types and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        ...


class Uniform:
    """Subnets drawn by ``space.sample``, each step afresh (single-path one-shot; Guo et al., 2020).

    Args:
        space: Where to draw.
        generator: The stream to draw from; its state is part of the sampler's.
        paths: Subnets per step.
        region: The part of the space to stay in, for a leaf of a forest.

    Raises:
        InputError: ``paths`` is below 1.
    """

    def __init__(
        self, space: SearchSpace, generator: torch.Generator, paths: int = 1, region: Region | None = None
    ) -> None:
        if paths < 1:
            raise InputError(f"paths is {paths}; allowed: 1 or more subnets per step")
        self.space = space
        self.generator = generator
        self.paths = paths
        self.region = region

    def step(self) -> list[Path]:
        """``paths`` random subnets."""
        source = self.space if self.region is None else self.region
        return [Path(source.sample(self.generator), RANDOM) for _ in range(self.paths)]

    def observe(self, path: Path, loss: Tensor, supernet: nn.Module) -> None:
        """Learns nothing."""

    def on_epoch(self, epoch: int) -> None:
        """Changes nothing."""

    def on_phase(self, name: str) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"])


class Sandwich(Uniform):
    """The sandwich rule: the largest subnet first, then random ones, the smallest last (Yu & Huang, 2019).

    The largest comes first because its outputs teach the others (in-place distillation).

    Args:
        space: Where to draw.
        generator: The stream to draw from; its state is part of the sampler's.
        random: Random subnets between the two, 0 or more.
        smallest: Whether the smallest ends the step. In a space with very low bit-widths it may be one that no search
            would ever pick, at the cost of those that one would.

    Raises:
        InputError: ``random`` is negative.
    """

    def __init__(self, space: SearchSpace, generator: torch.Generator, random: int = 1, smallest: bool = True) -> None:
        if random < 0:
            raise InputError(f"random is {random}; allowed: 0 or more random subnets between largest and smallest")
        super().__init__(space, generator)
        self.paths = random
        self.first = Path(space.largest(), LARGEST)
        self.last = [Path(space.smallest(), SMALLEST)] if smallest else []

    def step(self) -> list[Path]:
        """Largest, random ones, smallest."""
        return [self.first, *super().step(), *self.last]


class Pooled(Sandwich):
    """A sandwich whose random subnets come from a pool that is made anew each epoch.

    With a pool of subnets that keep a search's constraints, training spends its steps on those the search may return.

    Args:
        space: Where the largest and the smallest are from.
        generator: Draws from the pool; its state is part of the sampler's.
        pool: The pool of an epoch (counted from 0), at least one subnet; a deterministic function, or a resumed
            training differs.
        random: Subnets drawn from the pool per step.
        smallest: See :class:`Sandwich`.
    """

    def __init__(
        self,
        space: SearchSpace,
        generator: torch.Generator,
        pool: Callable[[int], Sequence[Subnet]],
        random: int = 1,
        smallest: bool = True,
    ) -> None:
        super().__init__(space, generator, random, smallest)
        self.pool = pool
        self.members: Sequence[Subnet] = ()

    def on_epoch(self, epoch: int) -> None:
        """Makes the epoch's pool.

        Raises:
            InputError: The pool is empty.
        """
        self.members = self.pool(epoch)
        if not self.members:
            raise InputError(f"the pool of subnets for epoch {epoch} is empty; loosen what its members have to keep")

    def step(self) -> list[Path]:
        """Largest, members of the pool, smallest."""
        drawn = torch.randint(len(self.members), (self.paths,), generator=self.generator).tolist()
        return [self.first, *(Path(self.members[index], RANDOM) for index in drawn), *self.last]
