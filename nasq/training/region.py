"""Parts of a search space that a split makes: every subnet belongs to exactly one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.random import as_numpy

if TYPE_CHECKING:
    import torch

    from nasq.space import Option, SearchSpace, Subnet

__all__ = ["Region"]

Rows = NDArray[np.int16]

# Draws per subnet before a region is given up as empty.
_DRAWS = 4096


class Region:
    """The subnets of a space whose options are among ``allowed``.

    A subnet in which a restricted choice is inactive belongs to the region that holds the choice's default: the options
    of a choice can be shared out among regions, and the regions then share out the space.

    Args:
        space: The whole space.
        allowed: Choice name to the options that are left, in any order; other choices have all of theirs.

    Raises:
        InputError: A name or an option is unknown, or no option is left.
    """

    def __init__(self, space: SearchSpace, allowed: Mapping[str, Iterable[Option]]) -> None:
        self.space = space
        self.allowed: dict[str, tuple[Option, ...]] = {}
        for name, options in allowed.items():
            kept = {space[name].index(option) for option in options}
            if not kept:
                raise InputError(
                    f"a leaf keeps no option of {name!r}. Keep at least one of {list(space[name].options)}."
                )
            self.allowed[name] = tuple(space[name].options[index] for index in sorted(kept))

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which options are allowed, ``[choices, most options]``."""
        choices = self.space.choices
        mask = np.zeros((len(choices), max(len(choice.options) for choice in choices)), dtype=np.bool_)
        for column, choice in enumerate(choices):
            kept = self.allowed.get(choice.name, choice.options)
            mask[column, [choice.index(option) for option in kept]] = True
        return mask

    def holds(self, rows: Rows) -> NDArray[np.bool_]:
        """Which canonical rows ``[n, choices]`` of the whole space belong to the region."""
        return np.asarray(self.mask[np.arange(rows.shape[1])[None], rows].all(1), dtype=np.bool_)

    def contains(self, subnet: Mapping[str, Option]) -> bool:
        """Whether a subnet of the whole space belongs to the region."""
        return self.space.contains(subnet) and bool(self.holds(self.space.to_rows([subnet]))[0])

    def sample_batch(self, count: int, rng: np.random.Generator | torch.Generator) -> Rows:
        """``count`` canonical rows: options drawn uniformly among those that are left.

        Raises:
            InputError: Hardly any draw belongs to the region; says how many did.
        """
        generator = as_numpy(rng)
        sizes = self.mask.sum(1)
        order = np.argsort(~self.mask, axis=1, kind="stable")  # the allowed options of each choice come first
        found: list[Rows] = []
        have = drawn = 0
        while have < count:
            if drawn >= _DRAWS * count:
                raise InputError(
                    f"a leaf with {self.allowed} has hardly any subnet: {have} of {drawn} draws belong to it. Split another "
                    "choice, one that is always active."
                )
            picks = (generator.random((max(count, 16), len(sizes))) * sizes).astype(np.int64)
            rows, member = self.space.settle(order[np.arange(len(sizes))[None], picks].astype(np.int16))
            kept = rows[member & self.holds(rows)]
            found.append(kept)
            have, drawn = have + len(kept), drawn + len(rows)
        return np.concatenate(found)[:count]

    def sample(self, rng: np.random.Generator | torch.Generator) -> Subnet:
        """One subnet; see :meth:`sample_batch`."""
        return self.space.to_subnet(self.sample_batch(1, rng)[0])

    def split(self, name: str, groups: Sequence[Sequence[int]]) -> list[Region]:
        """One region per group of indices into the options of ``name`` that are left.

        Raises:
            InputError: The groups do not share out these options.
        """
        options = self.allowed.get(name, self.space[name].options)
        if sorted(index for group in groups for index in group) != list(range(len(options))) or not all(groups):
            raise InputError(
                f"the groups {[list(group) for group in groups]} do not share out the {len(options)} options of {name!r}, "
                f"{list(options)}: each has to be in exactly one group, and no group empty."
            )
        return [Region(self.space, {**self.allowed, name: [options[index] for index in group]}) for group in groups]

    def to_dict(self) -> dict[str, Any]:
        """The allowed options, for JSON."""
        return {name: list(options) for name, options in self.allowed.items()}
