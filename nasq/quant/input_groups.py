"""Groups of neighbouring inputs of a linear layer, each with a weight step of its own in every output.

Groups are counted on the whole weight: inputs ``0..g - 1`` are the first group, whatever is active. A smaller form of the
layer uses its inputs in their order, so what is left of a group is still in one piece: a group that is cut keeps its step,
and one without inputs drops out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasq.elastic.base import Size
from nasq.elastic.segments import Segments
from nasq.space import maximum_of_size

__all__ = ["InputGroups", "Slices", "count_groups", "group_size"]

_NAME = re.compile("group([1-9][0-9]*)")


def group_size(granularity: object) -> int | None:
    """Inputs of a group of the granularity ``"group<g>"``; ``None`` for all others."""
    found = _NAME.fullmatch(granularity) if isinstance(granularity, str) else None
    return None if found is None else int(found[1])


@dataclass(frozen=True)
class Slices:
    """Which channels of a shared weight are active, where they are not simply the first ones.

    Attributes:
        rows, columns: Places of the active outputs and inputs in the whole weight, int64 ``[n]``, ascending; ``None``: the
            first ones.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class InputGroups:
    """How the inputs of a layer are cut into groups.

    Attributes:
        size: Inputs of a whole group, ``g``.
        sizes: Inputs of every group, in order; the last may be smaller, and after slicing any may be.
    """

    size: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, size: int, inputs: int) -> InputGroups:
        """Groups of ``size`` among ``inputs``, the last one with what is left."""
        whole, rest = divmod(inputs, size)
        return cls(size, (size,) * whole + (rest,) * (rest > 0))

    @property
    def inputs(self) -> int:
        """Inputs of all groups."""
        return sum(self.sizes)

    def spread(self, values: Tensor, inputs: int, columns: Tensor | None = None) -> Tensor:
        """Values ``[out, groups]`` as ``[out, inputs]``: every active input has that of its group.

        Args:
            values: Of all groups.
            inputs: Number of active inputs.
            columns: Their places; ``None``: the first ones.
        """
        first = self.sizes[0]
        if columns is None and self._regular():
            # Repeating without an index: its gradient is a sum in a fixed order on every device.
            used = values[:, : -(-inputs // first)]
            return used.unsqueeze(2).expand(-1, -1, first).flatten(1)[:, :inputs]
        owners = self._owners(values.device)
        return values[:, owners[:inputs] if columns is None else owners[columns]]

    def active(self, inputs: int, columns: Tensor | None = None) -> tuple[Tensor | slice, tuple[int, ...]]:
        """Which groups have active inputs, and how many each; arguments of :meth:`spread`."""
        if columns is not None:
            owners = self._owners(columns.device)[columns]
            kept, counts = torch.unique_consecutive(owners, return_counts=True)
            return kept, tuple(counts.tolist())
        sizes = list[int]()
        for size in self.sizes:
            if inputs <= 0:
                break
            sizes.append(min(size, inputs))
            inputs -= size
        return slice(0, len(sizes)), tuple(sizes)

    def _regular(self) -> bool:
        return all(size == self.sizes[0] for size in self.sizes[:-1]) and self.sizes[-1] <= self.sizes[0]

    def _owners(self, device: torch.device) -> Tensor:
        """The group of every input, int64 ``[inputs]``."""
        counts = torch.tensor(self.sizes, device=device)
        return torch.repeat_interleave(torch.arange(len(self.sizes), device=device), counts)


def count_groups(size: Size, group: int, lookup: Callable[[Size], Any]) -> Any:
    """How many groups have active inputs, as ``lookup`` gives sizes: an int, or an int64 array of one per subnet.

    Args:
        size: The layer's inputs.
        group: Inputs of a whole group.
        lookup: Gives a size.
    """
    if not isinstance(size, Segments):
        return -(-lookup(size) // group)
    total: Any = 0
    last: Any = -1  # the last group counted: the next segment may go on in it
    offset = 0
    for part in size.parts:
        active = lookup(part)
        first, end = offset // group, (offset + active - 1) // group
        total = total + np.where(active > 0, end - np.maximum(first, last + 1) + 1, 0)
        last = np.where(active > 0, end, last)
        offset += maximum_of_size(part)
    return total
