"""Splitting the options of a choice into balanced groups by what their gradients ask for.

Source: gradient-matching few-shot NAS (Hu et al., ICLR 2022, arXiv 2203.15207): the minimum cut of the similarity graph at
fixed group sizes. Its released searches differ from each other and from that objective in four of five places; here there
is one, and the criterion for choosing an edge is normalised, so that choices with different numbers of options compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

__all__ = ["Partition", "balanced_partition", "group_sizes"]

Matrix = NDArray[np.float64]
Groups = tuple[tuple[int, ...], ...]

#: Up to this many options all balanced partitions are compared; beyond, their number explodes.
EXACT = 8


@dataclass(frozen=True)
class Partition:
    """Groups of options of one choice.

    Attributes:
        groups: Indices of options, ascending; the group of the first option first.
        within: Sum of the distances between options of one group.
        cross: Sum of the distances between options of different groups.
        pairs: Number of pairs in different groups.
    """

    groups: Groups
    within: float
    cross: float
    pairs: int

    @property
    def separation(self) -> float:
        """Mean distance between options of different groups: what decides which choice is split."""
        return self.cross / self.pairs


def group_sizes(options: int, groups: int) -> list[int]:
    """Sizes that differ by one at most, ascending.

    Raises:
        InputError: A group would be empty, or there is nothing to split.
    """
    if not 2 <= groups <= options:
        raise InputError(
            f"{options} option{'s' * (options != 1)} cannot be split into {groups} groups; allowed: 2 to {options} groups, "
            "and at least two options"
        )
    return sorted(options // groups + (index < options % groups) for index in range(groups))


def _partitions(members: tuple[int, ...], sizes: Sequence[int]) -> Iterator[Groups]:
    """All ways to share ``members`` among groups of ``sizes``, each once: the first member opens the first group."""
    if not members:
        yield ()
        return
    first, rest = members[0], members[1:]
    for size in sorted(set(sizes)):
        left = list(sizes)
        left.remove(size)
        for others in combinations(rest, size - 1):
            group = (first, *others)
            remaining = tuple(member for member in rest if member not in others)
            yield from ((group, *more) for more in _partitions(remaining, left))


def _within(distance: Matrix, groups: Groups) -> float:
    return sum(float(distance[np.ix_(group, group)].sum()) / 2 for group in groups)


def balanced_partition(distance: Matrix, groups: int) -> Partition:
    """The balanced partition with the least distance within groups (so the most between them).

    Exact up to 8 options, with ties going to the lexicographically first partition; beyond, a spectral start refined by
    exchanging pairs while that helps.

    Args:
        distance: Symmetric ``[options, options]``, zero diagonal.
        groups: How many, from 2 to the number of options.

    Raises:
        InputError: The matrix is not a distance matrix, or the number of groups does not fit.
    """
    distance = _checked(distance)
    count = len(distance)
    sizes = group_sizes(count, groups)
    if count <= EXACT:
        # Rounded, so that the order of a sum does not decide a tie.
        best = min(
            _partitions(tuple(range(count)), sizes), key=lambda found: (round(_within(distance, found), 12), found)
        )
    else:
        best = _refined(distance, _spectral(distance, sizes))
    within = _within(distance, best)
    pairs = count * (count - 1) // 2 - sum(len(group) * (len(group) - 1) // 2 for group in best)
    return Partition(best, within, float(distance.sum()) / 2 - within, pairs)


def _checked(distance: Matrix) -> Matrix:
    distance = np.asarray(distance, dtype=np.float64)
    square = distance.ndim == 2 and distance.shape[0] == distance.shape[1]
    if not square or not np.isfinite(distance).all() or not np.allclose(distance, distance.T, atol=1e-6):
        raise InputError(f"a distance matrix has to be square, finite and symmetric; got shape {distance.shape}")
    symmetric: Matrix = (distance + distance.T) / 2
    np.fill_diagonal(symmetric, 0.0)
    return symmetric


def _spectral(distance: Matrix, sizes: Sequence[int]) -> Groups:
    """Options in the order of the second eigenvector of the similarity graph's Laplacian, cut into ``sizes``."""
    similarity = distance.max() - distance
    np.fill_diagonal(similarity, 0.0)
    laplacian = np.diag(similarity.sum(1)) - similarity
    order = np.argsort(np.linalg.eigh(laplacian)[1][:, 1], kind="stable").tolist()
    ends = np.cumsum(sizes)
    return tuple(tuple(order[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def _refined(distance: Matrix, start: Groups) -> Groups:
    """Exchanges two options of different groups, the best exchange first, until none lowers the distance within."""
    label = np.empty(len(distance), dtype=np.int64)
    for index, group in enumerate(start):
        label[list(group)] = index
    # Each exchange lowers the objective, which takes finitely many values; the bound is against rounding.
    for _ in range(len(distance) ** 2):
        member = np.eye(len(start))[label]
        to_group = distance @ member  # [option, group]: distance to all of the group
        own = to_group[np.arange(len(label)), label]
        moved = to_group[:, label]  # [a, b]: a's distance to b's group
        gain = own[:, None] + own[None] - moved - moved.T + 2 * distance
        gain[label[:, None] == label[None]] = -np.inf
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] <= 1e-12:
            break
        label[a], label[b] = label[b], label[a]
    groups = [tuple(np.flatnonzero(label == index).tolist()) for index in range(len(start))]
    return tuple(sorted(groups))
