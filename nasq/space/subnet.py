"""A subnet: one option for each of the choices that matter in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from nasq.errors import InputError
from nasq.files import strict_json
from nasq.space.options import Option, as_option, exact

__all__ = ["Subnet"]


class Subnet(Mapping[str, Option]):
    """An immutable, hashable mapping from choice names to options. Types count: ``True``, ``1`` and ``1.0`` differ.

    Args:
        options: Choice name to option; any mapping.

    Raises:
        InputError: A name is no text, or an option is no str, int, finite float or bool.
    """

    def __init__(self, options: Mapping[str, Option] | None = None) -> None:
        given = options or {}
        for name in given:
            if not isinstance(name, str):
                raise InputError(f"a choice's name in a subnet is {name!r}. Names are texts.")
        self._options = {name: as_option(given[name], f"the option of {name!r}") for name in sorted(given)}

    @classmethod
    def _trusted(cls, options: dict[str, Option]) -> Subnet:
        """A subnet of options that come from choices and need no second look."""
        subnet = cls.__new__(cls)
        subnet._options = {name: options[name] for name in sorted(options)}
        return subnet

    def __getitem__(self, name: str) -> Option:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self._options == other and all(
            type(other[name]) is type(option) for name, option in self._options.items()
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple((name, exact(option)) for name, option in self._options.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Subnet, (self._options,)

    def __copy__(self) -> Subnet:
        return self

    def __deepcopy__(self, memo: object) -> Subnet:
        return self

    def __repr__(self) -> str:
        return f"Subnet({self._options!r})"

    def to_json(self) -> str:
        """Canonical JSON: equal subnets give equal text."""
        return json.dumps(self._options, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Subnet:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: The text is no JSON object of options, or names a choice twice.
        """
        try:
            value = strict_json(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"a subnet's JSON cannot be read: {error}. Give an object of choice names and options."
            ) from error
        if not isinstance(value, dict):
            raise InputError(f"a subnet's JSON is {text[:60]!r}. Give an object of choice names and options.")
        return cls(value)

    @cached_property
    def id(self) -> str:
        """A short name that is the same in every process: 12 hex digits of the SHA-256 of its JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def updated(self, options: Mapping[str, Option]) -> Subnet:
        """A copy with some options changed or added; names may hold dots."""
        return Subnet({**self._options, **options})

    def replace(self, **options: Option) -> Subnet:
        """:meth:`updated` with keywords."""
        return self.updated(options)
