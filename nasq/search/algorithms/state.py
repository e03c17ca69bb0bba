"""What a saved state of a search holds, checked: the settings it belongs to, and the generations that were told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.errors import ArtifactError, InputError
from nasq.search.objectives import Rows

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["History", "require_settings"]


@dataclass(frozen=True)
class History:
    """The generations that an algorithm was told.

    Attributes:
        rows: Canonical, ``[n, choices]``, in the order of asking.
        values: Of each row, turned so that larger is better.
        ends: Number of rows before each generation, and at the end.
        told: Values of the present generation that are known already, by the subnet's id.
    """

    rows: Rows
    values: list[tuple[float, ...]]
    ends: list[int]
    told: dict[str, tuple[float, ...]]

    @classmethod
    def read(cls, state: Mapping[str, Any], space: SearchSpace, objectives: int) -> History:
        """Of a saved state.

        Raises:
            ValueError, KeyError, TypeError: A part is missing, or parts do not fit.
        """
        rows = np.array(state["rows"], dtype=np.int16).reshape(len(state["rows"]), len(space))
        values = [tuple(map(float, one)) for one in state["values"]]
        ends = [int(end) for end in state["ends"]]
        if [len(one) for one in values] != [objectives] * len(rows):
            raise ValueError("rows and values do not fit")
        if ends[:1] != [0] or ends[-1] != len(rows) or any(end <= start for start, end in pairwise(ends)):
            raise ValueError("rows and generations do not fit")
        told = {str(identity): tuple(map(float, one)) for identity, one in state["told"].items()}
        return cls(space.canonical(rows), values, ends, told)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`read` takes, as JSON-able values."""
        return {
            "ends": list(self.ends),
            "rows": self.rows.tolist(),
            "values": [list(one) for one in self.values],
            "told": {identity: list(one) for identity, one in self.told.items()},
        }


def require_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses a saved state of other settings.

    Raises:
        InputError: Names the first setting that differs, with both values.
        ArtifactError: The state has no settings.
    """
    saved = state.get("settings")
    if not isinstance(saved, Mapping):
        raise ArtifactError("the saved state of the search is damaged: it has no settings.")
    for name, value in settings.items():
        # What an older version did not have was off: a state without it goes on where it is off now.
        if (saved[name] != value) if name in saved else bool(value):
            raise InputError(
                f"this search was begun with {name} = {saved.get(name)!r} and is continued with {value!r}. Use "
                "the same setting, or another directory."
            )
