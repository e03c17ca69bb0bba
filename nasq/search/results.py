"""What a search found, on disk and in memory: ``subnets.csv``, the front, and picking a subnet under limits."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nasq.errors import ArtifactError, InfeasibleError, InputError
from nasq.files import append_line, write_bytes
from nasq.search import pareto
from nasq.search.objectives import Bound, Direction, Goal, format_number
from nasq.space import Subnet

__all__ = ["LEVEL", "Record", "RecordFile", "front", "hypervolumes", "pick", "pick_knee"]

LEVEL = "level"
"""The column of a search with a cascade: how many of its levels a subnet passed, of ``FULL``."""
FULL = 4

_BEFORE = ("id", "subnet")
_BEHIND = ("generation", "seconds")


@dataclass(frozen=True)
class Record:
    """One evaluated subnet.

    Attributes:
        subnet: Canonical.
        values: Every objective and cost by name.
        generation: Of the search that asked for it.
        seconds: Wall-clock time of its evaluation.
    """

    subnet: Subnet
    values: Mapping[str, float]
    generation: int
    seconds: float

    @property
    def full(self) -> bool:
        """Whether its values are final: not of a subnet that a cascade gave up on an estimate."""
        return self.values.get(LEVEL, FULL) == FULL


def front(records: Sequence[Record], goals: Sequence[Goal]) -> list[Record]:
    """The records that no other one dominates, in their order; see :func:`nasq.search.pareto.front`.

    Estimates of a cascade are left out.
    """
    records = [record for record in records if record.full]
    if not records:
        return []
    values = [[record.values[goal.name] for goal in goals] for record in records]
    directions: list[Direction] = [goal.direction for goal in goals]
    mask = pareto.front(values, directions)
    return [record for record, kept in zip(records, mask, strict=True) if kept]


def pick(records: Sequence[Record], goals: Sequence[Goal], limits: Iterable[Bound] = ()) -> Record:
    """The best record within ``limits``, without searching again.

    Best is by the first goal; ties go to the next goals, then to the smaller subnet id.

    Args:
        records: What was evaluated.
        goals: At least one, the most important first; objectives are goals.
        limits: Bounds on any recorded value; see :func:`nasq.search.objectives.parse_bound`.

    Raises:
        InputError: Nothing was evaluated, or a limit is on a value that was not recorded.
        InfeasibleError: No record keeps all limits; the message holds the nearest value for each.
    """
    within = _within(records, list(limits))
    return min(
        within, key=lambda record: (*(-goal.sign * record.values[goal.name] for goal in goals), record.subnet.id)
    )


def pick_knee(records: Sequence[Record], goals: Sequence[Goal], limits: Iterable[Bound] = ()) -> Record:
    """The knee of the front within ``limits``; see :func:`nasq.search.pareto.knee` and :func:`pick`."""
    best = front(_within(records, list(limits)), goals)
    values = [[record.values[goal.name] for goal in goals] for record in best]
    return best[pareto.knee(values, [goal.direction for goal in goals])]


def hypervolumes(
    records: Sequence[Record], goals: Sequence[Goal], reference: Sequence[float] | None = None
) -> list[float]:
    """The front's hypervolume after each evaluation; see :func:`nasq.search.pareto.hypervolume`.

    Args:
        records: In the order of evaluation; one that is an estimate adds nothing.
        goals: The objectives, for at most four.
        reference: The worst corner; ``None``: the worst value of each objective among the records.
    """
    kept = [[record.values[goal.name] for goal in goals] for record in records if record.full]
    if not kept:
        return [0.0] * len(records)
    directions: list[Direction] = [goal.direction for goal in goals]
    if reference is None:
        reference = [
            (min if goal.sign > 0 else max)(column) for goal, column in zip(goals, zip(*kept, strict=True), strict=True)
        ]
    found, best = [], 0.0
    points: list[list[float]] = []
    for record in records:
        point = [record.values[goal.name] for goal in goals]
        if record.full:
            points.append(point)
            kept_points = pareto.front(points, directions)
            if kept_points[-1]:  # a dominated point adds nothing
                points = [one for one, good in zip(points, kept_points, strict=True) if good]
                best = pareto.hypervolume(points, reference, directions)
            else:
                points.pop()
        found.append(best)
    return found


def _within(records: Sequence[Record], limits: Sequence[Bound]) -> list[Record]:
    """The records that keep all limits; refuses where there are none."""
    records = [record for record in records if record.full]
    if not records:
        raise InputError("there is nothing to pick from: no subnet was evaluated. Run the search first.")
    for limit in limits:
        if limit.name not in records[0].values:
            raise InputError(f"{limit.name!r} was not recorded. Recorded: {', '.join(sorted(records[0].values))}.")
    within = [record for record in records if all(_holds(limit, record) for limit in limits)]
    if not within:
        raise InfeasibleError(_nothing_within(records, limits))
    return within


def _holds(limit: Bound, record: Record) -> bool:
    value = record.values[limit.name]
    return (limit.lower is None or value >= limit.lower) and (limit.upper is None or value <= limit.upper)


def _nothing_within(records: Sequence[Record], limits: Sequence[Bound]) -> str:
    lines = []
    for limit in limits:
        values = [record.values[limit.name] for record in records]
        kept = sum(_holds(limit, record) for record in records)
        lines.append(f"{limit} holds for {kept} (seen {format_number(min(values))} to {format_number(max(values))})")
    return f"none of the {len(records)} evaluated subnets keeps every limit: {'; '.join(lines)}. Loosen one."


class RecordFile:
    """``subnets.csv``: a header, then one line for each evaluated subnet, appended as soon as it is known.

    A line that a kill cut short is dropped when the file is opened again; anything else that does not fit is an error.

    Args:
        path: Of the file.
        names: The columns of values, in order.

    Raises:
        InputError: A name is that of another column.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        reserved = [name for name in names if name in (*_BEFORE, *_BEHIND)]
        if reserved or len(set(names)) != len(names) or not all(_one_line(name) for name in names):
            taken = ", ".join((*_BEFORE, *_BEHIND))
            raise InputError(f"the value names {list(names)} must differ, and none may be {taken}.")
        self.path = path
        self._names = tuple(names)
        self._header = [*_BEFORE, *self._names, *_BEHIND]

    def open(self) -> list[Record]:
        """Repairs a torn end, makes the file where there is none, and reads it; for the one process that appends.

        Raises:
            ArtifactError: The file is of other columns or damaged; the message names the line.
        """
        content = self._content()
        whole = self._whole(content)
        if whole != content:
            write_bytes(self.path, whole)
        return self._parse(whole)

    def read(self) -> list[Record]:
        """Reads what is there without changing it, also while a search appends; see :meth:`open`."""
        return self._parse(self._whole(self._content()))

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror}.") from error

    def _whole(self, content: bytes) -> bytes:
        """The lines that are complete; a header where there is none."""
        return content[: content.rfind(b"\n") + 1] or (_line(self._header) + "\n").encode()

    def append(self, record: Record) -> None:
        """Adds one line."""
        values = [_number(record.values[name]) for name in self._names]
        fields = [record.subnet.id, record.subnet.to_json(), *values, str(record.generation), _number(record.seconds)]
        append_line(self.path, _line(fields))

    def sync(self) -> None:
        """Waits until all lines are on the disk, so that a state written afterwards never knows more than they do."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _parse(self, content: bytes) -> list[Record]:
        try:
            lines = list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ArtifactError(f"{self.path} is damaged: {error}.") from error
        if lines[0] != self._header:
            raise ArtifactError(
                f"{self.path} has the columns {', '.join(lines[0])}; this search writes {', '.join(self._header)}. Use "
                "the same objectives and costs, or another directory."
            )
        records = [self._record(number, fields) for number, fields in enumerate(lines[1:], start=2)]
        seen: set[str] = set()
        for number, record in enumerate(records, start=2):
            if record.subnet.id in seen:
                raise ArtifactError(f"{self.path}, line {number}: subnet {record.subnet.id} is there twice.")
            seen.add(record.subnet.id)
        return records

    def _record(self, number: int, fields: Sequence[str]) -> Record:
        where = f"{self.path}, line {number}"
        if len(fields) != len(self._header):
            raise ArtifactError(f"{where}: {len(fields)} fields instead of {len(self._header)}. The file is damaged.")
        try:
            subnet = Subnet.from_json(fields[1])
            values = dict(zip(self._names, map(float, fields[2:-2]), strict=True))
            record = Record(subnet, values, int(fields[-2]), float(fields[-1]))
        except (InputError, ValueError) as error:
            raise ArtifactError(f"{where}: {error}. The file is damaged.") from error
        if subnet.id != fields[0]:
            raise ArtifactError(f"{where}: the id {fields[0]!r} is not that of its subnet ({subnet.id}).")
        if not all(map(math.isfinite, values.values())):
            raise ArtifactError(f"{where}: a value is not finite. The file is damaged.")
        return record


def _one_line(name: str) -> bool:
    return bool(name) and name.isprintable()


def _number(value: float) -> str:
    """The shortest text that reads back as the same number; a resumed search depends on it."""
    return repr(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))


def _line(fields: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(fields)
    return buffer.getvalue()
