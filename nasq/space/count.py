"""How many subnets a space holds, exactly: recursion on its structure instead of enumeration.

A choice that decides about others is resolved option by option (options that leave the same rest are taken together);
what remains falls into independent parts, whose counts multiply. Equal parts are counted once. In the nests that
networks have (depths, branches), that takes milliseconds for hundreds of choices.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.space.conditions import ALWAYS, Use, Uses

__all__ = ["count", "count_ruled"]

_Part = frozenset[tuple[int, Uses]]  # undecided choices with what their uses still wait for
_Recursion = Generator[_Part, int, int]


def count(sizes: Sequence[int], uses: Sequence[Uses]) -> int:
    """The number of canonical subnets.

    Args:
        sizes: Number of options of each choice, parents first.
        uses: Conditions of each choice; their parents come earlier.
    """
    memo: dict[_Part, int] = {}
    whole: _Part = frozenset(enumerate(uses))
    # The recursion is as deep as there are deciding choices, so it keeps its own stack.
    stack: list[tuple[_Part, _Recursion]] = [(whole, _solve(whole, sizes))]
    answer: int | None = None
    while stack:
        part, recursion = stack[-1]
        try:
            wanted = next(recursion) if answer is None else recursion.send(answer)
        except StopIteration as done:
            memo[part] = answer = done.value
            stack.pop()
            continue
        answer = memo.get(wanted)
        if answer is None:
            stack.append((wanted, _solve(wanted, sizes)))
    return memo[whole]


def count_ruled(
    sizes: Sequence[int], uses: Sequence[Uses], columns: Sequence[int], members: NDArray[np.integer[Any]]
) -> int:
    """The number of canonical subnets where the choices ``columns`` take the combinations ``members`` ``[m, columns]``.

    Combinations that decide the same about the other choices are counted together.

    Args:
        sizes: Number of options of each choice, parents first.
        uses: Conditions of each choice; their parents come earlier.
        columns: Positions of the choices with rules, which are always active.
        members: Their allowed combinations of option indices, each once.
    """
    place = {column: position for position, column in enumerate(columns)}
    parts = sorted({part for own in uses for use in own for part in use if part[0] in place}, key=str)
    decided = np.zeros((len(members), len(parts)), dtype=np.bool_)
    for index, (parent, allowed) in enumerate(parts):
        decided[:, index] = np.isin(members[:, place[parent]], list(allowed))
    if parts:
        patterns, counts = np.unique(decided, axis=0, return_counts=True)
    else:
        patterns, counts = decided[:1], np.array([len(members)])
    total = 0
    for pattern, times in zip(patterns, counts, strict=True):
        total += int(times) * _count_rest(sizes, uses, place, dict(zip(parts, pattern.tolist(), strict=True)))
    return total


def _count_rest(
    sizes: Sequence[int],
    uses: Sequence[Uses],
    ruled: Mapping[int, int],
    holds: Mapping[tuple[int, frozenset[int]], bool],
) -> int:
    """The number of canonical combinations of the choices without rules, once the others are decided."""
    left_sizes, left_uses = list(sizes), list(uses)
    gone: set[int] = set()
    for index, own in enumerate(uses):
        left: set[Use] = set()
        for use in own:
            if all(holds.get(part, part[0] not in gone) for part in use):
                left.add(tuple(part for part in use if part[0] not in ruled))
        if index in ruled or not left:
            left_sizes[index], left = 1, {()}
            gone.update([index] if index not in ruled else [])
        left_uses[index] = ALWAYS if () in left else frozenset(left)
    return count(left_sizes, left_uses)


def _solve(part: _Part, sizes: Sequence[int]) -> _Recursion:
    undecided = dict(part)
    deciding = {parent for uses in undecided.values() for use in uses for parent, _ in use}
    product = 1
    for index in [index for index, uses in undecided.items() if uses == ALWAYS and index not in deciding]:
        product *= sizes[index]
        del undecided[index]
    pieces = _split(undecided)
    for piece in pieces:
        if len(pieces) > 1 or product > 1:
            product *= yield frozenset(piece.items())
        else:
            total = 0
            for weight, rest in _branch(piece, sizes):
                total += weight * (yield frozenset(rest.items()))
            product *= total
    return product


def _split(undecided: Mapping[int, Uses]) -> list[dict[int, Uses]]:
    """Connected components; a choice is connected to those that decide about it."""
    root = {index: index for index in undecided}

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for index, uses in undecided.items():
        for use in uses:
            for parent, _ in use:
                root[find(parent)] = find(index)
    pieces: dict[int, dict[int, Uses]] = {}
    for index in sorted(undecided):
        pieces.setdefault(find(index), {})[index] = undecided[index]
    return list(pieces.values())


def _branch(piece: Mapping[int, Uses], sizes: Sequence[int]) -> Iterator[tuple[int, dict[int, Uses]]]:
    """Resolves the active choice that decides most: how many options leave each rest, and that rest."""
    sets: dict[int, list[frozenset[int]]] = {index: [] for index, uses in piece.items() if uses == ALWAYS}
    for uses in piece.values():
        for use in uses:
            for parent, allowed in use:
                if parent in sets:
                    sets[parent].append(allowed)
    gate = max(sets, key=lambda index: (len(sets[index]), -index))
    distinct = list(dict.fromkeys(sets[gate]))
    groups: dict[tuple[bool, ...], list[int]] = {}
    for option in range(sizes[gate]):
        groups.setdefault(tuple(option in allowed for allowed in distinct), []).append(option)
    for options in groups.values():
        yield len(options), _assume(piece, gate, options[0])


def _assume(piece: Mapping[int, Uses], gate: int, option: int) -> dict[int, Uses]:
    """What is left undecided once ``gate`` has ``option``; choices that became inactive are gone."""
    rest: dict[int, Uses] = {}
    for index in sorted(piece):
        if index == gate:
            continue
        left: set[Use] = set()
        for use in piece[index]:
            if all(option in allowed if parent == gate else parent in rest for parent, allowed in use):
                left.add(tuple(part for part in use if part[0] != gate))
        if left:
            rest[index] = ALWAYS if () in left else frozenset(left)
    return rest
