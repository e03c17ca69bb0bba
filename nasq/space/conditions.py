"""When choices are active: checking, ordering and simplifying the conditions of a space.

A choice may be used at several places. Each use has a condition: a conjunction of ``(parent, options)``, the whole path
from the root. The choice is active where any of its uses holds; a parent that is itself inactive holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nasq.errors import InputError, choose_from
from nasq.space.choice import Choice
from nasq.space.options import Option

__all__ = ["ALWAYS", "Condition", "Use", "Uses", "arrange", "prune", "spell"]

Condition = tuple[tuple[str, frozenset[Option]], ...]
Use = tuple[tuple[int, frozenset[int]], ...]  # the same in positions of choices and of their options, sorted
Uses = frozenset[Use]
ALWAYS: Uses = frozenset({()})

_Named = dict[str, frozenset[int]]  # one use while choices have no positions yet


def arrange(
    choices: Iterable[Choice], conditions: Mapping[str, Sequence[Condition]]
) -> tuple[tuple[Choice, ...], tuple[Uses, ...]]:
    """Orders choices, parents first and otherwise as given, and expresses conditions in positions.

    Raises:
        InputError: Equal names with different options, an unknown name or option in a condition, a choice that can
            never be active, or choices that wait for each other.
    """
    by_name = _by_name(choices)
    for name in conditions:
        if name not in by_name:
            raise choose_from("choice in the conditions", str(name), by_name)
    named = {name: _read(choice, conditions.get(name), by_name) for name, choice in by_name.items()}
    order = _order(named)
    positions = {name: position for position, name in enumerate(order)}
    uses: list[Uses] = []
    for name in order:
        found = {_simplify(use, positions, by_name, uses) for use in named[name]}
        uses.append(_absorb(found))
    return tuple(by_name[name] for name in order), tuple(uses)


def prune(
    choices: Sequence[Choice], conditions: Mapping[str, Sequence[Condition]]
) -> tuple[list[Choice], dict[str, list[Condition]]]:
    """Drops the uses, and then the choices, that can never be active because options were taken away.

    Args:
        choices: In an order with parents first, with the options that are left.
        conditions: May mention options that are gone.
    """
    alive: dict[str, Choice] = {}
    kept: dict[str, list[Condition]] = {}
    for choice in choices:
        if choice.name not in conditions:
            alive[choice.name] = choice
            continue
        possible = [use for use in (_left(use, alive) for use in conditions[choice.name]) if use is not None]
        if possible:
            alive[choice.name] = choice
            kept[choice.name] = possible
    return list(alive.values()), kept


def spell(choices: Sequence[Choice], uses: Sequence[Uses]) -> dict[str, tuple[Condition, ...]]:
    """Conditions in names and options, of the choices that are not always active, in a canonical order."""
    found: dict[str, tuple[Condition, ...]] = {}
    for choice, own in zip(choices, uses, strict=True):
        if own != ALWAYS:
            ordered = sorted(own, key=lambda use: [(parent, sorted(allowed)) for parent, allowed in use])
            found[choice.name] = tuple(
                tuple(
                    (choices[parent].name, frozenset(choices[parent].options[index] for index in allowed))
                    for parent, allowed in use
                )
                for use in ordered
            )
    return found


def _by_name(choices: Iterable[Choice]) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    for choice in choices:
        if not isinstance(choice, Choice):
            raise InputError(f"a search space was given {choice!r} as a choice. Give Choice objects.")
        known = found.setdefault(choice.name, choice)
        if known != choice:
            raise InputError(
                f"two different choices are named {choice.name!r}: {known!r} and {choice!r}. Choices of one name are "
                "tied: make them equal, or rename one."
            )
    return found


def _read(choice: Choice, uses: Sequence[Condition] | None, by_name: Mapping[str, Choice]) -> list[_Named]:
    """The possible uses of one choice; raises where none is."""
    if uses is None:
        return [{}]
    read = [_read_use(choice, use, by_name) for use in uses]
    possible = [use for use in read if all(use.values())]
    if not possible:
        raise InputError(
            f"choice {choice.name!r} can never be active: no options of its parents lead to it (conditions: "
            f"{[tuple((parent, sorted(map(repr, options))) for parent, options in use) for use in uses]}). Remove it, "
            "or give its parents the options that reach it."
        )
    return possible


def _read_use(choice: Choice, use: Sequence[tuple[str, Iterable[Option]]], by_name: Mapping[str, Choice]) -> _Named:
    found: _Named = {}
    for parent, options in use:
        if parent not in by_name:
            raise choose_from(f"choice in the conditions of {choice.name!r}:", str(parent), by_name)
        if isinstance(options, str):
            raise InputError(f"the condition of {choice.name!r} on {parent!r} is {options!r}. Give a set of options.")
        allowed = frozenset(by_name[parent].index(option) for option in options)
        found[parent] = found[parent] & allowed if parent in found else allowed
    return found


def _order(named: Mapping[str, list[_Named]]) -> list[str]:
    """Names with parents first: always the first in the given order whose parents are placed."""
    waiting = {name: {parent for use in uses for parent in use} for name, uses in named.items()}
    placed: dict[str, None] = {}
    while waiting:
        ready = next((name for name, parents in waiting.items() if parents <= placed.keys()), None)
        if ready is None:
            raise InputError(
                f"the choices {', '.join(map(repr, waiting))} wait for each other: the conditions of each mention "
                "another of them. Remove one of these conditions."
            )
        placed[ready] = None
        del waiting[ready]
    return list(placed)


def _simplify(use: _Named, positions: Mapping[str, int], by_name: Mapping[str, Choice], uses: Sequence[Uses]) -> Use:
    """Leaves out a parent that is always active and whose every option will do."""
    parts = (
        (positions[parent], allowed)
        for parent, allowed in use.items()
        if len(allowed) < len(by_name[parent].options) or uses[positions[parent]] != ALWAYS
    )
    return tuple(sorted(parts, key=lambda part: part[0]))


def _absorb(found: set[Use]) -> Uses:
    """Leaves out a use that holds only where another does anyway."""
    return frozenset(use for use in found if not any(other != use and _implies(use, other) for other in found))


def _implies(use: Use, other: Use) -> bool:
    own = dict(use)
    return all(parent in own and own[parent] <= allowed for parent, allowed in other)


def _left(use: Condition, alive: Mapping[str, Choice]) -> Condition | None:
    """What is left of a use after options were taken away; None where nothing is."""
    parts: list[tuple[str, frozenset[Option]]] = []
    for parent, options in use:
        allowed = frozenset(option for option in options if parent in alive and option in alive[parent])
        if not allowed:
            return None
        parts.append((parent, allowed))
    return tuple(parts)
