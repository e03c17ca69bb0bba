"""Pairs of subnet and accuracy: what a predictor learns from. One line of JSON each, so that a killed run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError, InputError, NasqError
from nasq.files import append_line
from nasq.search.objectives import Rows

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["Pairs", "generate_pairs"]


@dataclass(frozen=True)
class Pairs:
    """Subnets and what was measured of them.

    Attributes:
        rows: Canonical rows ``[n, choices]``.
        values: ``[n]``.
    """

    rows: Rows
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)

    def split(self, share: float, rng: np.random.Generator) -> tuple[Pairs, Pairs]:
        """A random ``share`` of the pairs, and the rest.

        Raises:
            InputError: One of the parts would be empty.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise InputError(f"{share} of {len(self)} pairs leaves one part empty; take a share between 0 and 1.")
        order = rng.permutation(len(self))
        return self.take(order[:count]), self.take(order[count:])

    def take(self, at: NDArray[np.integer]) -> Pairs:
        """The pairs at some places."""
        return Pairs(self.rows[at], self.values[at])

    @classmethod
    def read(cls, path: Path, space: SearchSpace) -> Pairs:
        """Reads what :func:`generate_pairs` wrote; a last line that a kill cut off is left out.

        Raises:
            ArtifactError: A line is damaged, or its subnet is not of ``space``.
        """
        subnets, values = [], []
        lines = path.read_text().split("\n") if path.exists() else [""]
        # What follows the last line end was never finished.
        for number, line in enumerate(lines[:-1], 1):
            try:
                found = json.loads(line)
                space.validate(found["subnet"])
                subnets.append(found["subnet"])
                values.append(float(found["value"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"line {number} of {path} is not a pair of this space: {error}. Remove the line, or the file."
                ) from error
        return cls(space.to_rows(subnets), np.array(values, dtype=np.float64))


def generate_pairs(
    space: SearchSpace,
    rows: Rows,
    evaluate: Callable[[Subnet], float],
    path: Path,
    on_pair: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Measures subnets, one line in ``path`` for each; what is there already is not measured again.

    Args:
        space: What the rows belong to.
        rows: ``[n, choices]``, in the order in which they are measured.
        evaluate: The value of one subnet, such as its integer accuracy with statistics of its own.
        path: A ``.jsonl`` file; it may hold a part of them from a run before.
        on_pair: Called with ``(done, n)``.

    Raises:
        NasqError: A value is not finite.
        InputError: A row breaks the space's rules; names it.
        ArtifactError: The file is damaged or of another space.
    """
    _drop_torn_line(path)
    before = Pairs.read(path, space)
    known = {row.tobytes(): value for row, value in zip(before.rows, before.values.tolist(), strict=True)}
    canonical = space.canonical(rows)
    values = []
    for done, (row, subnet) in enumerate(zip(canonical, space.to_subnets(canonical), strict=True), 1):
        if row.tobytes() not in known:
            value = float(evaluate(subnet))
            if not math.isfinite(value):
                raise NasqError(f"the value of subnet {subnet.id} is {value}; it must be finite.")
            append_line(path, json.dumps({"subnet": dict(subnet), "value": value}))
            known[row.tobytes()] = value
        values.append(known[row.tobytes()])
        if on_pair is not None:
            on_pair(done, len(canonical))
    return Pairs(canonical, np.array(values, dtype=np.float64))


def _drop_torn_line(path: Path) -> None:
    """Takes back a line that a kill cut off, or the next one would be glued to it."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
