"""Tables: what subnets are known to be worth and to cost. Score files have the same form.

A table is a CSV file (``.csv``, or gzipped ``.csv.gz``) with a header, one row per subnet, and these columns:

* ``name``: the official name in the space, or ``subnet``: the subnet as JSON; both may be there;
* ``subnet_id`` is allowed and not read;
* every other column is a metric: numbers. An empty cell or ``nan`` says that the value is not known.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nasq.errors import ArtifactError, InputError, choose_from
from nasq.files import write_bytes
from nasq.ranking.table_names import from_official_name
from nasq.space import SearchSpace, Subnet

__all__ = ["Table"]

Floats = NDArray[np.float64]
_KEYS = ("subnet_id", "name", "subnet")


@dataclass(frozen=True)
class Table:
    """Metrics of subnets.

    Attributes:
        metrics: Float64 arrays ``[n]`` by name, in the order of the columns; NaN where nothing is known.
        names: Official names ``[n]``, or none at all.
        subnets: Subnets ``[n]``, or none at all.
        source: Where it came from, for messages.
    """

    metrics: Mapping[str, Floats]
    names: Sequence[str] = ()
    subnets: Sequence[Subnet] = ()
    source: str = field(default="the table", compare=False)

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.metrics.values()}
        lengths |= {len(keys) for keys in (self.names, self.subnets) if keys}
        if not (self.names or self.subnets) or len(lengths) > 1:
            raise InputError(
                f"{self.source} does not name every subnet once per value (rows: {sorted(lengths)}). Every row needs a name "
                "or a subnet."
            )
        for what, values in (("name", self.names), ("subnet", self.subnets)):
            if len(set(values)) != len(values):
                repeated = next(value for value in values if values.count(value) > 1)
                text = repeated if isinstance(repeated, str) else repeated.to_json()
                raise InputError(f"{self.source} has the {what} {text[:200]} twice. Keep one row per subnet.")

    def __len__(self) -> int:
        return len(self.names or self.subnets)

    def column(self, metric: str | None = None) -> tuple[str, Floats]:
        """A metric's name and values ``[n]``; without a name, the first column's.

        Raises:
            InputError: There is no such metric, or none at all.
        """
        if not self.metrics:
            raise InputError(f"{self.source} has no metric, only the subnets. Add a column of numbers.")
        name = next(iter(self.metrics)) if metric is None else metric
        if name not in self.metrics:
            raise choose_from(f"metric of {self.source}", name, self.metrics)
        return name, self.metrics[name]

    def members(self, network: nn.Module, space: SearchSpace) -> list[Subnet]:
        """The subnets of all rows ``[n]``, in canonical form; names are translated by the network.

        Args:
            network: Of the search space; where it has official names it knows them (:class:`OfficialNames`).
            space: Its space.

        Raises:
            InputError: A row's subnet is not in the space; says which row, and why.
        """
        found = []
        for number in range(len(self)):
            try:
                subnet = self.subnets[number] if self.subnets else from_official_name(network, self.names[number])
                found.append(space.canonical(subnet))
            except InputError as error:
                raise InputError(f"row {number + 1} of {self.source} is not in the space: {error}") from error
        return found

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> Table:
        """The table of some rows, in the order given."""
        chosen = np.asarray(indices, dtype=np.int64)
        metrics = {name: values[chosen] for name, values in self.metrics.items()}
        names = [self.names[index] for index in chosen] if self.names else []
        subnets = [self.subnets[index] for index in chosen] if self.subnets else []
        return Table(metrics, names, subnets, self.source)

    def to_csv(self) -> str:
        """The table as CSV; reading it gives equal numbers."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        keys = [key for key, values in (("name", self.names), ("subnet", self.subnets)) if values]
        writer.writerow([*keys, *self.metrics])
        for number in range(len(self)):
            cells = [self.names[number]] if self.names else []
            cells += [self.subnets[number].to_json()] if self.subnets else []
            writer.writerow([*cells, *(_cell(float(values[number])) for values in self.metrics.values())])
        return file.getvalue()

    def write(self, path: Path) -> None:
        """Writes CSV, gzipped where the name ends in ``.gz``; atomically."""
        data = self.to_csv().encode()
        write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

    @classmethod
    def read(cls, path: Path) -> Table:
        """Reads a table or a score file.

        Raises:
            InputError: It is not there.
            ArtifactError: It is no CSV, has no column of subnets, or a cell is no number (line and column are named).
        """
        return cls.parse(read_text(path), str(path))

    @classmethod
    def parse(cls, text: str, source: str, names: str = "name", skip: Sequence[str] = ()) -> Table:
        """Reads CSV text.

        Args:
            text: The file's content.
            source: For messages.
            names: The column that holds the official names.
            skip: Columns that are not read.

        Raises:
            ArtifactError: As :meth:`read`.
        """
        header, rows = _split(text, source)
        keys = (*_KEYS, names)
        if not {names, "subnet"} & set(header):
            raise ArtifactError(
                f"{source} has no column {names!r} or 'subnet', only {', '.join(header)}. Name the subnets in one of them."
            )
        metrics = [name for name in header if name not in keys and name not in skip]
        places = {name: header.index(name) for name in header}
        values = {name: _numbers(rows, places[name], name, source) for name in metrics}
        known = [row[places[names]] for _, row in rows] if names in places else []
        subnets = [_subnet(row[places["subnet"]], line, source) for line, row in rows] if "subnet" in places else []
        return cls(values, known if all(known) else [], subnets, source)


_Rows = list[tuple[int, list[str]]]


def read_text(path: Path) -> str:
    """The text of a file that may be gzipped.

    Raises:
        InputError: It is not there.
        ArtifactError: It cannot be read.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. Give the path of a file that exists.") from error
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read as text: {error}. It is corrupt, or another kind of file."
        ) from error


def _split(text: str, source: str) -> tuple[list[str], _Rows]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ArtifactError(f"{source} is no CSV in line {reader.line_num}: {error}.") from error
    repeated = [name for name in header if header.count(name) > 1]
    if not rows or not all(header) or repeated:
        why = f"the column {repeated[0]!r} twice" if repeated else "no rows, or a column without a name"
        raise ArtifactError(f"{source} has {why}. Give a header line with a name per column, then one row per subnet.")
    for line, row in rows:
        if len(row) != len(header):
            raise ArtifactError(
                f"{source} has {len(row)} cells in line {line} and {len(header)} columns. It is truncated, or a comma is "
                "not quoted."
            )
    return header, rows


def _numbers(rows: _Rows, place: int, name: str, source: str) -> Floats:
    values = np.empty(len(rows))
    for number, (line, row) in enumerate(rows):
        try:
            values[number] = float(row[place]) if row[place].strip() else nan
        except ValueError as error:
            raise ArtifactError(
                f"{source} has {row[place]!r} in line {line}, column {name!r}, which is no number. Columns other than "
                "'name', 'subnet' and 'subnet_id' are metrics."
            ) from error
    return values


def _subnet(text: str, line: int, source: str) -> Subnet:
    try:
        return Subnet.from_json(text)
    except InputError as error:
        raise ArtifactError(f"{source}, line {line}: {error}") from error


def _cell(value: float) -> str:
    if isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
