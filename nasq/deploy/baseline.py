"""Compares a benchmark with a saved one: what became slower, by more than noise explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nasq.errors import ArtifactError, InputError

__all__ = ["Change", "changes"]


@dataclass(frozen=True)
class Change:
    """One candidate at one batch size, then and now, in ms per call.

    Attributes:
        candidate, batch: What is compared.
        before, now: Medians.
        slower: Whether even the lower end of today's interval is above the upper end of the former one by more than the
            tolerance.
    """

    candidate: str
    batch: int
    before: float
    now: float
    slower: bool

    @property
    def ratio(self) -> float:
        """Now by before; above 1 it is slower."""
        return self.now / self.before


def changes(before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float = 0.1) -> list[Change]:
    """The rows that two benchmarks (``bench.json``) share.

    Args:
        before, now: As :meth:`nasq.deploy.bench.BenchReport.to_json` gives them.
        tolerance: Slower by this share is still the same.

    Raises:
        InputError: They are of other machines or numbers of threads, share no row, or the tolerance is negative.
        ArtifactError: ``before`` is not a benchmark.
    """
    if not tolerance >= 0:
        raise InputError(f"the tolerance is {tolerance}; allowed: 0 or more, such as 0.1 for 10 %.")
    try:
        known = {(row["candidate"], row["batch"]): row for row in before["rows"]}
        for key in ("cpu", "threads"):
            if before["environment"][key] != now["environment"][key]:
                raise InputError(
                    f"the baseline was taken with {key} {before['environment'][key]!r}, this benchmark with "
                    f"{now['environment'][key]!r}: their times do not compare. Take a baseline here."
                )
        found = []
        for row in now["rows"]:
            former = known.get((row["candidate"], row["batch"]))
            if former is not None:
                slower = row["low"] > former["high"] * (1 + tolerance)
                found.append(Change(row["candidate"], row["batch"], former["median"], row["median"], slower))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"the baseline is not a benchmark: {reason}. Give the bench.json of a run.") from error
    if not found:
        raise InputError("the baseline and this benchmark share no candidate at the same batch size.")
    return found
