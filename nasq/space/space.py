"""The search space: choices, when they are active, and everything that works on subnets of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError, InputError, choose_from
from nasq.space.activity import Activity
from nasq.space.choice import Choice
from nasq.space.conditions import Condition, arrange, prune, spell
from nasq.space.count import count
from nasq.space.options import Option
from nasq.space.random import as_numpy
from nasq.space.rejection import sample_members
from nasq.space.rules import Bound, SpaceRules
from nasq.space.serial import dump, parse
from nasq.space.subnet import Subnet
from nasq.space.variation import Rows, crossover_rows, mutate_rows, neighbour_rows

if TYPE_CHECKING:
    from nasq.space.random import Rng

__all__ = ["SearchSpace"]

MOST_OPTIONS = 2**15 - 1  # rows are int16


class SearchSpace:
    """Choices and the conditions under which they are active.

    A subnet has two forms with equal meaning: a :class:`Subnet`, and a row of option indices, int16 ``[choices]``, for
    work on many at once. A *canonical* subnet holds the active choices only; a canonical row has the index of the
    default where a choice is inactive.

    Args:
        choices: In any order; parents are moved before the choices they decide about.
        conditions: For a choice that is not always active, one conjunction ``((parent, options), ...)`` per place
            where it is used, each the whole path from the root. It is active where any of them holds.
        name: For messages and files.
        rules: Which combinations of some choices are valid, and which are the same; see :class:`SpaceRules`. A subnet is
            then canonical if its combination is as well.

    Raises:
        InputError: Equal names with different options, unknown names or options in a condition, a cycle, a choice that
            can never be active, one with more than 32,767 options, or rules about choices that some subnets lack.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        conditions: Mapping[str, Sequence[Condition]] | None = None,
        name: str = "",
        rules: SpaceRules | None = None,
    ) -> None:
        self._choices, self._uses = arrange(choices, conditions or {})
        self._name = name
        self._bound = None if rules is None else Bound(rules, self._choices, frozenset(self.conditions))
        for choice in self._choices:
            if len(choice.options) > MOST_OPTIONS:
                raise InputError(f"choice {choice.name!r} has {len(choice.options)} options. Allowed: {MOST_OPTIONS}.")
        self._names = tuple(choice.name for choice in self._choices)
        self._positions = MappingProxyType({name: position for position, name in enumerate(self._names)})
        self._sizes = np.array([len(choice.options) for choice in self._choices], dtype=np.int64)
        self._defaults = np.array([choice.index(choice.default) for choice in self._choices], dtype=np.int16)
        self._sizes.setflags(write=False)
        self._activity = Activity(self._sizes.tolist(), self._uses)

    # What it is

    @property
    def name(self) -> str:
        """For messages and files; may be empty."""
        return self._name

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices in the order of a row's columns: parents first, otherwise as given."""
        return self._choices

    @property
    def names(self) -> tuple[str, ...]:
        """The choices' names, in the same order."""
        return self._names

    @property
    def positions(self) -> Mapping[str, int]:
        """The column of each name."""
        return self._positions

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of options of each choice, ``[choices]``."""
        return self._sizes

    @cached_property
    def conditions(self) -> Mapping[str, tuple[Condition, ...]]:
        """The simplified conditions of the choices that are not always active."""
        return MappingProxyType(spell(self._choices, self._uses))

    @property
    def rules(self) -> SpaceRules | None:
        """Which combinations of choices are valid, where structure does not say it."""
        return None if self._bound is None else self._bound.rules

    @cached_property
    def size(self) -> int:
        """How many canonical subnets there are, exactly.

        Raises:
            InputError: The space has rules that would have to list their members for it, and cannot.
        """
        if self._bound is None:
            return count(self._sizes.tolist(), self._uses)
        return self._bound.count(self._sizes.tolist(), self._uses)

    def __len__(self) -> int:
        return len(self._choices)

    def __getitem__(self, name: str) -> Choice:
        if name not in self._positions:
            raise choose_from("choice", str(name), self._names)
        return self._choices[self._positions[name]]

    def __repr__(self) -> str:
        size = f"{self.size:.4g} subnets" if self._bound is None else f"rules {self._bound.rules.name!r}"
        return f"SearchSpace({self._name!r}, {len(self)} choices, {size})"

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, SearchSpace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return SearchSpace.from_json, (self.to_json(), self.rules)

    # Drawing subnets

    def sample(self, rng: Rng) -> Subnet:
        """One subnet: every choice uniform over its options (with rules: over what is valid), then made canonical."""
        return self.to_subnet(self.sample_batch(1, rng)[0])

    def sample_batch(self, n: int, rng: Rng) -> Rows:
        """``n`` independent canonical rows ``[n, choices]``: uniform over options, not over canonical subnets.

        With rules, rows are drawn until ``n`` are valid, up to 100,000 draws and 1000 more per row.

        Raises:
            InputError: ``n`` is negative, or too few draws were valid; says how many.
        """
        if n < 0:
            raise InputError(f"cannot sample {n} subnets. Give a number of at least 0.")
        generator = as_numpy(rng)

        def draw(count: int) -> Rows:
            return generator.integers(0, self._sizes, size=(count, len(self)), dtype=np.int64).astype(np.int16)

        if self._bound is None:
            return self._structural(draw(n))
        return sample_members(self.settle, draw, n, self._bound.rules.name)

    def default(self) -> Subnet:
        """Every choice at its default (with rules: the valid subnet nearest to that of 1,000 random ones)."""
        return self._nearest(self._defaults)

    def smallest(self) -> Subnet:
        """Ordered choices of numbers at their first option, all others at their default."""
        return self._nearest(np.where(self._ordered, 0, self._defaults).astype(np.int16))

    def largest(self) -> Subnet:
        """Ordered choices of numbers at their last option, all others at their default."""
        return self._nearest(np.where(self._ordered, self._sizes - 1, self._defaults).astype(np.int16))

    def _nearest(self, row: Rows) -> Subnet:
        """The subnet of a row; with rules that it breaks, the nearest of some valid ones, always the same."""
        rows, member = self.settle(self._structural(row[None]))
        if member[0]:
            return self.to_subnet(rows[0])
        found = self.sample_batch(1000, np.random.default_rng(0))
        steps = np.abs(found - row) / np.maximum(self._sizes - 1, 1)
        distance = np.where(self._ordered, steps, found != row).sum(axis=1)
        return self.to_subnet(found[distance.argmin()])

    @cached_property
    def _ordered(self) -> NDArray[np.bool_]:
        return np.array([choice.ordered and choice.is_size for choice in self._choices], dtype=np.bool_)

    # Rows and subnets

    def active(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether each choice is active in each row, ``[n, choices]``.

        Raises:
            InputError: The rows have another shape or type, or an index is no option.
        """
        return self._activity(self._checked(rows))

    def settle(self, rows: NDArray[np.integer[Any]]) -> tuple[Rows, NDArray[np.bool_]]:
        """The canonical form of rows ``[n, choices]``, and which of them are members of the space, ``[n]``.

        Without rules all are; rows that are none only have their inactive choices at the default.
        """
        found = self._structural(self._checked(rows))
        if self._bound is None:
            return found, np.ones(len(found), dtype=np.bool_)
        settled, member = self._bound.settle(found)
        return self._structural(settled), member

    def _structural(self, rows: Rows) -> Rows:
        return np.where(self._activity(rows), rows, self._defaults)

    @overload
    def canonical(self, x: NDArray[np.integer[Any]]) -> Rows: ...

    @overload
    def canonical(self, x: Mapping[str, Option]) -> Subnet: ...

    def canonical(self, x: NDArray[np.integer[Any]] | Mapping[str, Option]) -> Rows | Subnet:
        """The canonical form: inactive entries of rows ``[n, choices]`` at their default, inactive names dropped.

        Raises:
            InputError: A name or an option is unknown, an active choice is missing, or a row breaks the space's rules.
        """
        if isinstance(x, Mapping):
            return self.to_subnet(self.to_rows([x])[0])
        rows, member = self.settle(x)
        return self._members(rows, member)

    def _members(self, rows: Rows, member: NDArray[np.bool_]) -> Rows:
        if not member.all():
            assert self._bound is not None
            broken = self._view(rows[np.flatnonzero(~member)[:1]])[0]
            raise InputError(
                f"the subnet {broken.to_json()[:300]} is not valid by the rules {self._bound.rules.name!r}, or not in this "
                "part of the space. Take it from sample, mutate or crossover, or ask settle() which rows are valid."
            )
        return rows

    def to_rows(self, subnets: Iterable[Mapping[str, Option]]) -> Rows:
        """Canonical rows ``[n, choices]``; options of inactive choices are ignored.

        Raises:
            InputError: A name or an option is unknown, or an active choice is missing.
        """
        given = list(subnets)
        rows = np.repeat(self._defaults[None], len(given), axis=0)
        present = np.zeros(rows.shape, dtype=np.bool_)
        for number, subnet in enumerate(given):
            for name, option in subnet.items():
                column = self._positions.get(name)
                if column is None:
                    raise choose_from("choice", str(name), self._names)
                rows[number, column] = self._choices[column].index(option)
                present[number, column] = True
        active = self._activity(rows)
        lacking = np.argwhere(active & ~present)
        if len(lacking):
            number = lacking[0, 0]
            missing = [self._names[column] for row, column in lacking if row == number]
            raise InputError(
                f"a subnet has no option for the active choice{'s' * (len(missing) > 1)} {_listed(missing)}. "
                "Give one for each."
            )
        return self.canonical(rows)

    def to_subnets(self, rows: NDArray[np.integer[Any]]) -> list[Subnet]:
        """The canonical subnets of rows ``[n, choices]``."""
        return self._view(self._checked(rows) if self._bound is None else self.canonical(rows))

    def _view(self, checked: Rows) -> list[Subnet]:
        active = self._activity(checked)
        return [
            Subnet._trusted(
                {self._names[column]: self._choices[column].options[row[column]] for column in np.flatnonzero(mask)}
            )
            for row, mask in zip(checked, active, strict=True)
        ]

    def to_subnet(self, row: NDArray[np.integer[Any]]) -> Subnet:
        """The canonical subnet of one row ``[choices]``."""
        return self.to_subnets(np.asarray(row)[None])[0]

    def encode(
        self, x: NDArray[np.integer[Any]] | Mapping[str, Option] | Sequence[Mapping[str, Option]]
    ) -> NDArray[np.float32]:
        """One-hot codes, float32 ``[n, total number of options]``, zeros where a choice is inactive.

        Different canonical subnets have different codes.

        Args:
            x: Rows ``[n, choices]``, one subnet (``n = 1``) or a sequence of subnets.
        """
        rows = self._rows(x)
        codes = np.zeros((len(rows), int(self._sizes.sum())), dtype=np.float32)
        columns = rows + (np.cumsum(self._sizes) - self._sizes)
        codes[np.arange(len(rows))[:, None], columns] = self._activity(rows)
        return codes

    def contains(self, subnet: Mapping[str, Option]) -> bool:
        """Whether ``subnet`` is a canonical subnet of this space."""
        try:
            self.validate(subnet)
        except InputError:
            return False
        return True

    def validate(self, subnet: Mapping[str, Option]) -> None:
        """Raises unless ``subnet`` is a canonical subnet of this space.

        Raises:
            InputError: Names the choice that is unknown, missing or superfluous, or the option that is not allowed.
        """
        if not isinstance(subnet, Mapping):
            raise InputError(f"a subnet is {subnet!r}. Give a Subnet, or a mapping from choice names to options.")
        kept = self.canonical(subnet)
        superfluous = [name for name in subnet if name not in kept]
        if superfluous:
            name = superfluous[0]
            raise InputError(
                f"a subnet has options for {_listed(superfluous)}, which it does not use: {name!r} is active only if "
                f"{self.when(name)}. Leave them out, or use SearchSpace.canonical."
            )
        if self._bound is not None and kept != subnet:
            name = next(name for name in kept if kept[name] != subnet[name])
            raise InputError(
                f"a subnet is not the canonical one of those that are the same by the rules {self._bound.rules.name!r}: "
                f"there, {name!r} is {kept[name]!r}. Use SearchSpace.canonical."
            )

    def when(self, name: str) -> str:
        """The condition of a choice in words; empty where it is always active."""
        uses = (
            " and ".join(
                f"{parent!r} is {' or '.join(repr(o) for o in self[parent].options if o in options)}"
                for parent, options in use
            )
            for use in self.conditions.get(name, ())
        )
        return "; or ".join(uses)

    # Changing subnets

    @overload
    def mutate(self, x: NDArray[np.integer[Any]], rng: Rng, rate: float = 0.1) -> Rows: ...

    @overload
    def mutate(self, x: Mapping[str, Option], rng: Rng, rate: float = 0.1) -> Subnet: ...

    def mutate(self, x: NDArray[np.integer[Any]] | Mapping[str, Option], rng: Rng, rate: float = 0.1) -> Rows | Subnet:
        """Redraws each active choice among its other options with probability ``rate``; the result is canonical.

        At least one active choice changes where any has more than one option. A choice that becomes active through
        the change is drawn uniformly. With rules, a change that leads nowhere is drawn again; a subnet for which 100
        draws find no other stays.

        Args:
            x: A subnet or rows ``[n, choices]``; the result has the same form.
            rng: A torch or NumPy generator.
            rate: From 0 to 1.
        """
        changed = mutate_rows(self, self._rows(x), as_numpy(rng), rate)
        return self.to_subnet(changed[0]) if isinstance(x, Mapping) else changed

    @overload
    def crossover(self, a: NDArray[np.integer[Any]], b: NDArray[np.integer[Any]], rng: Rng) -> Rows: ...

    @overload
    def crossover(self, a: Mapping[str, Option], b: Mapping[str, Option], rng: Rng) -> Subnet: ...

    def crossover(
        self,
        a: NDArray[np.integer[Any]] | Mapping[str, Option],
        b: NDArray[np.integer[Any]] | Mapping[str, Option],
        rng: Rng,
    ) -> Rows | Subnet:
        """A child per pair: each choice has either parent's option with equal probability; the result is canonical.

        Where a choice is active in one parent only, that parent's option is taken; a choice that is active in the
        child alone has its default. With rules, a child that is not valid is drawn again, at most 100 times; then it is
        the first parent.

        Args:
            a: A subnet or rows ``[n, choices]``.
            b: The same form as ``a``; the result has it too.
            rng: A torch or NumPy generator.
        """
        child = crossover_rows(self, self._rows(a), self._rows(b), as_numpy(rng))
        return self.to_subnet(child[0]) if isinstance(a, Mapping) else child

    def neighbours(self, subnet: Mapping[str, Option]) -> Iterator[Subnet]:
        """The canonical subnets that differ in the option of one active choice, each once.

        What becomes active through the change has its default.
        """
        yield from self.to_subnets(neighbour_rows(self, self.to_rows([subnet])[0]))

    # Sub-spaces and files

    def restrict(self, allowed: Mapping[str, Iterable[Option]]) -> SearchSpace:
        """The sub-space in which some choices have fewer options.

        Options keep their order; a default that is gone is replaced by the choice's usual one. Choices that can no
        longer be active are left out. With rules, the canonical subnets are those of this space whose options are left.

        Args:
            allowed: Choice name to the options to keep.

        Raises:
            InputError: A name or an option is unknown, or no option is left.
        """
        kept = {name: self._kept(name, options) for name, options in allowed.items()}
        narrowed = [_narrow(choice, kept.get(choice.name)) for choice in self._choices]
        choices, conditions = prune(narrowed, self.conditions)
        return SearchSpace(choices, conditions, name=self._name, rules=self.rules)

    def _kept(self, name: str, options: Iterable[Option]) -> set[int]:
        choice = self[name]
        if isinstance(options, str) or not isinstance(options, Iterable):
            raise InputError(f"choice {name!r} is restricted to {options!r}. Give a tuple of options: ({options!r},).")
        kept = {choice.index(option) for option in options}
        if not kept:
            raise InputError(f"choice {name!r} is restricted to no option. Keep one of {list(choice.options)}.")
        return kept

    def to_json(self) -> str:
        """Canonical JSON of choices and conditions: equal spaces give equal text."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return dump(self)

    @classmethod
    def from_json(cls, text: str, rules: SpaceRules | None = None) -> SearchSpace:
        """Reads what :meth:`to_json` wrote.

        Args:
            text: The JSON.
            rules: The space's rules, where it has any: they are code, and the JSON holds only their name.

        Raises:
            ArtifactError: The text is corrupt, of a newer schema, or of a space with other rules.
        """
        choices, conditions, name = parse(text, rules)
        try:
            return cls(choices, conditions, name=name, rules=rules)
        except InputError as error:
            raise ArtifactError(f"a search space's JSON is not valid: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    # Checks

    def _rows(self, x: NDArray[np.integer[Any]] | Mapping[str, Option] | Sequence[Mapping[str, Option]]) -> Rows:
        if isinstance(x, np.ndarray):
            return self.canonical(x)
        return self.to_rows([x] if isinstance(x, Mapping) else x)

    def _checked(self, rows: NDArray[np.integer[Any]]) -> Rows:
        array = np.asarray(rows)
        if array.ndim != 2 or array.shape[1] != len(self) or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"rows have the shape {array.shape} and type {array.dtype}. Give option indices as integers, "
                f"[n, {len(self)}]: one column per choice of the space."
            )
        wrong = (array < 0) | (array >= self._sizes)
        if wrong.any():
            row, column = (int(index) for index in np.argwhere(wrong)[0])
            choice = self._choices[column]
            raise InputError(
                f"row {row} has the option index {array[row, column]} for choice {choice.name!r}, which has "
                f"{len(choice.options)} options. Allowed: 0 to {len(choice.options) - 1}."
            )
        return array.astype(np.int16, copy=False)


def _narrow(choice: Choice, kept: set[int] | None) -> Choice:
    if kept is None:
        return choice
    options = [option for index, option in enumerate(choice.options) if index in kept]
    default = choice.default if choice.index(choice.default) in kept else None
    return Choice(choice.name, options, default=default, ordered=choice.ordered)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
