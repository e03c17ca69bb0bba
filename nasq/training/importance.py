"""Path importance: options whose weights still have large gradients are drawn more often.

Source: the path side of PA&DA (Lu et al., CVPR 2023, arXiv 2302.14772) as its released code computes it, for any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.data.importance import linear_smoothing, smoothed
from nasq.errors import InputError, TrainingError
from nasq.space.random import as_numpy
from nasq.training.ownership import OwnedNorms, owned_weights, sent
from nasq.training.paths import RANDOM, Path
from nasq.training.region import Region

if TYPE_CHECKING:
    from nasq.space import Option, Subnet
    from nasq.supernet import Supernet

__all__ = ["ImportancePaths"]

# Draws of one path before a space with rules of its own is given up.
_TRIES = 1000


@dataclass(frozen=True)
class _Group:
    """Choices that share one distribution over their options."""

    columns: tuple[int, ...]
    options: tuple[Option, ...]
    start: int


class ImportancePaths:
    """Draws each option with a probability that grows with the gradient norm of the weights it owns.

    Every step has one path. After its backward pass the norms of the gradients that exist anyway are averaged per
    option (:mod:`nasq.training.ownership` says which weights count); nothing leaves the device until the epoch ends.
    Then ``p = importance * G / sum(G) + (1 - importance) / options`` with ``importance = epoch / epochs``.

    Differences from the released code: norms are read before clipping, not after (clipping mixes the scale of all
    other gradients in); distributions may be per choice (``shared=False``), which its authors recommend in its issues
    and do not do; options without weights have the published probability ``(1 - importance) / options``, which falls
    to nearly nothing, unless ``floor`` keeps them alive.

    Args:
        supernet: What is trained.
        generator: The stream to draw from; its state is part of the sampler's.
        epochs: Of the whole training, for the schedule.
        shared: Whether all choices with equal options share one distribution, as published.
        importance: ``(epoch, epochs)`` to 0..1; the published schedule by default.
        decay: ``None`` as published: averages of factor one half that start at 0 in every epoch. A number in 0..1: a
            real moving average ``decay * G + (1 - decay) * norm`` over the whole training.
        whole: Whether an option's norm is that of the whole gradient of the paths that hold it (root mean square) instead of
            that of the weights it owns. This is what the theory asks for: with layers drawn apart, the variance is least at
            ``p(o)`` in proportion to ``sqrt(E[|g|^2 | o])``; it does not tell options without weights from others. An
            option that was not seen yet counts like the mean of the others.
        floor: Least probability of every option, as a share of ``1 / options``; 0..1.
        reweight: Whether a path's loss is multiplied by uniform over drawn probability, which makes the gradient that
            of uniform sampling in expectation. Off as published.
        region: The part of the space to stay in, for a leaf of a forest.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        supernet: Supernet,
        generator: torch.Generator,
        epochs: int,
        *,
        shared: bool = False,
        importance: Callable[[int, int], float] = linear_smoothing,
        decay: float | None = None,
        floor: float = 0.0,
        whole: bool = False,
        reweight: bool = False,
        region: Region | None = None,
    ) -> None:
        if epochs < 1:
            raise InputError(f"epochs is {epochs}; allowed: 1 or more")
        for name, value in (("decay", decay), ("floor", floor)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; allowed: 0 to 1")
        self.space = supernet.space
        self.region = region or Region(supernet.space, {})
        self.generator, self.epochs = generator, epochs
        self.importance, self.decay, self.floor, self.reweight = importance, decay, floor, reweight
        self.whole = whole
        self.groups = _groups(supernet, shared)
        self._group = {column: group for group in self.groups for column in group.columns}
        self._places = _places(self.groups, self.space.choices)
        self._owned = OwnedNorms(owned_weights(supernet), self._places)
        device = next(supernet.parameters()).device
        entries = sum(len(group.options) for group in self.groups)
        self.norms = torch.zeros(entries, device=device)
        self.seen = torch.zeros(entries, dtype=torch.bool, device=device)
        self.probabilities = smoothed(torch.zeros(0), 0.0) if not entries else self._even()
        self._table = self._cumulative()

    def _even(self) -> Tensor:
        return torch.cat([torch.full((len(g.options),), 1 / len(g.options), dtype=torch.float64) for g in self.groups])

    def distribution(self, choice: str) -> dict[Option, float]:
        """The probability of each option of a choice in this epoch."""
        column = self.space.positions[choice]
        return dict(zip(self.space[choice].options, self._column(column).tolist(), strict=True))

    def _column(self, column: int) -> NDArray[np.float64]:
        """The distribution of one choice: its group's, on the options that are left."""
        group = self._group[column]
        values = self.probabilities[group.start : group.start + len(group.options)].numpy()
        kept = np.where(self.region.mask[column, : len(values)], values, 0.0)
        shares: NDArray[np.float64] = kept / kept.sum()
        return shares

    def step(self) -> list[Path]:
        """One path.

        Raises:
            InputError: The space's own rules refused every path drawn.
        """
        rng = as_numpy(self.generator)
        for _ in range(_TRIES):
            points = rng.random(len(self.space.choices))
            row = (self._table <= points[:, None]).sum(1).astype(np.int16)
            rows, member = self.space.settle(row[None])
            if member[0] and self.region.holds(rows)[0]:
                subnet = self.space.to_subnet(rows[0])
                return [Path(subnet, RANDOM, self.weight(subnet) if self.reweight else 1.0)]
        raise InputError(
            f"none of {_TRIES} paths drawn is a member of the space {self.space.name!r} with {self.region.allowed}; raise "
            "the floor, or lower the importance."
        )

    def weight(self, subnet: Subnet) -> float:
        """Uniform over drawn probability of a path in this epoch: what makes means over paths those of uniform ones."""
        weight = 1.0
        for name, option in subnet.items():
            column = self.space.positions[name]
            drawn = self._column(column)
            weight /= np.count_nonzero(drawn) * drawn[self.space[name].index(option)]
        return float(weight)

    def observe(self, path: Path, loss: Tensor, supernet: nn.Module) -> None:
        """Averages the gradient norms of the options in ``path``, on the device."""
        found = self._whole_norms(path, supernet) if self.whole else self._owned.norms(path.subnet)
        if found is None:
            return
        entries, values = found
        values = values / path.weight
        if self.whole:
            values = values.square()
        # An operator that the path cuts off has a gradient of zero, which says nothing about it.
        known = values > 0
        old = self.norms[entries]
        if self.decay is None:
            new = (old + values) / 2
        else:
            new = torch.where(self.seen[entries], self.decay * old + (1 - self.decay) * values, values)
        self.norms[entries] = torch.where(known, new, old)
        self.seen[entries] |= known

    def _whole_norms(self, path: Path, supernet: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Entries of the path's options (int64 ``[m]``) and, for each, the norm of the whole gradient."""
        gradients = [parameter.grad for parameter in supernet.parameters() if parameter.grad is not None]
        if not gradients:
            return None
        entries = sent(sorted({self._places[item] for item in path.subnet.items()}), self.norms.device)
        norm = torch.nn.utils.get_total_norm(gradients).to(self.norms)
        return entries, norm.expand(len(entries))

    def _statistics(self, group: _Group, norms: Tensor) -> Tensor:
        """What a group's distribution is in proportion to."""
        part = norms[group.start : group.start + len(group.options)]
        if not self.whole:
            return part
        known = part > 0
        mean = part[known].mean() if bool(known.any()) else torch.zeros(())
        return torch.where(known, part, mean).sqrt()

    def on_epoch(self, epoch: int) -> None:
        """Turns what was seen in the epoch before into this one's distributions.

        Raises:
            TrainingError: A gradient norm is not finite.
            InputError: The schedule gives something outside 0..1.
        """
        share = self.importance(epoch, self.epochs)
        if not 0 <= share <= 1:
            raise InputError(f"the share of importance in epoch {epoch} is {share}; allowed: 0 to 1")
        norms = self.norms.cpu()
        if not bool(torch.isfinite(norms).all()):
            raise TrainingError(f"the gradient norm of {self._first_bad(norms)} is not finite in epoch {epoch}")
        parts = [self._statistics(group, norms) for group in self.groups]
        mixed = [(1 - self.floor) * smoothed(part, share) + self.floor / len(part) for part in parts]
        self.probabilities = torch.cat(mixed) if mixed else norms.double()
        self._table = self._cumulative()
        if self.decay is None:
            self.norms.zero_()
            self.seen.zero_()

    def _first_bad(self, norms: Tensor) -> str:
        bad = int((~torch.isfinite(norms)).nonzero()[0])
        return next(f"{name!r} = {option!r}" for (name, option), entry in self._places.items() if entry == bad)

    def _cumulative(self) -> NDArray[np.float64]:
        """Inner edges ``[choices, most options - 1]`` of every choice's distribution; 2 where there is none."""
        most = max((len(choice.options) for choice in self.space.choices), default=1)
        table = np.full((len(self.space.choices), max(most - 1, 1)), 2.0)
        for group in self.groups:
            for column in group.columns:
                table[column, : len(group.options) - 1] = np.cumsum(self._column(column))[:-1]
        return table

    def on_phase(self, name: str) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Norms, distributions, and the state of the generator."""
        return {
            "norms": self.norms.clone().cpu(),
            "seen": self.seen.clone().cpu(),
            "probabilities": self.probabilities,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.norms.copy_(state["norms"])
        self.seen.copy_(state["seen"])
        self.probabilities = state["probabilities"]
        self._table = self._cumulative()
        self.generator.set_state(state["generator"])


def _groups(supernet: Supernet, shared: bool) -> list[_Group]:
    choices = supernet.space.choices
    tied: dict[Any, list[int]] = {}
    for column, choice in enumerate(choices):
        tied.setdefault(choice.options if shared else column, []).append(column)
    groups: list[_Group] = []
    start = 0
    for columns in tied.values():
        options = choices[columns[0]].options
        groups.append(_Group(tuple(columns), options, start))
        start += len(options)
    return groups


def _places(groups: Sequence[_Group], choices: Sequence[Any]) -> dict[tuple[str, Option], int]:
    """Where the statistic of (choice, option) is kept."""
    return {
        (choices[column].name, option): group.start + index
        for group in groups
        for column in group.columns
        for index, option in enumerate(group.options)
    }
