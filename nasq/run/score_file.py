"""The CSV of scores: one line per subnet, appended whole, so that the file is valid at any moment and nothing is lost.

Beside it lies ``FILE.csv.json`` with what the scores depend on; a file is only continued by the same settings. Node-wise
statistics, where they are asked for, go to ``FILE.csv.nodes``: one JSON object per line, ``{"id": ..., "nodes": ...}``.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nasq.errors import ArtifactError, InputError
from nasq.files import append_line, read_json, write_json, write_text
from nasq.ranking.nodes import NodeStatistics, from_text, to_text

__all__ = ["FIRST", "ScoreFile", "column", "nodes_file", "read_nodes", "read_scores"]

FIRST = ("subnet_id", "name", "subnet")
"""The columns before the scores."""

Row = dict[str, str]


def _line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(cells)
    return buffer.getvalue()


def _text(value: float) -> str:
    return repr(float(value))


def _whole(path: Path, repair: bool) -> bytes:
    """The complete lines of a file; a last one that a kill cut short is taken off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content) and repair:
        write_text(path, whole.decode())
    return whole


def nodes_file(path: Path) -> Path:
    """Where the node-wise statistics of a file of scores lie."""
    return path.with_name(path.name + ".nodes")


class ScoreFile:
    """One file of scores.

    Args:
        path: The CSV.
        columns: Behind the first three.
        settings: What the values depend on.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.path, self.columns, self.settings = path, (*FIRST, *columns), json.loads(json.dumps(dict(settings)))
        self.described = path.with_name(path.name + ".json")
        self.nodes = nodes_file(path)

    def open(self, repair: bool = True) -> dict[str, Row]:
        """Makes the file or continues it; returns the finished rows by subnet id.

        Args:
            repair: Whether a last line that a kill cut short is taken off; only one process may.

        Raises:
            InputError: The file holds scores of other settings (names the first that differs), or something else. One
                that holds no score yet, since the first failed, takes the new settings.
        """
        if self.path.is_dir():
            raise InputError(f"{self.path} is a directory, and scores go to a file. Give another: --out FILE.csv.")
        if not self.path.exists() or (self._is_empty() if repair else not self.path.read_bytes()):
            if repair:
                write_json(self.described, self.settings)
                write_text(self.path, _line(self.columns) + "\n")
            return {}
        self._same_settings()
        whole = _whole(self.path, repair)
        if self.nodes.exists():
            _whole(self.nodes, repair)
        return {row["subnet_id"]: row for row in self._rows(whole.decode())}

    def _is_empty(self) -> bool:
        """Whether no row has been written: nothing at all, or a head that these settings or others have left."""
        content = self.path.read_bytes()
        head = content.startswith(",".join(FIRST).encode()) and content.count(b"\n") == 1 and content.endswith(b"\n")
        return not content or (head and self.described.exists())

    def _same_settings(self) -> None:
        if not self.described.exists():
            raise InputError(
                f"{self.path} exists and {self.described.name} does not, so what its scores were made with is unknown. "
                "Give another --out."
            )
        before = read_json(self.described)
        for key in {**before, **self.settings} if isinstance(before, dict) else ():
            old, new = before.get(key), self.settings.get(key)
            if old != new:
                raise InputError(
                    f"{self.path} holds scores of other settings: {key} is {old!r} there and {new!r} here. Use its "
                    "settings to go on with it, or give another --out."
                )

    def _rows(self, text: str) -> list[Row]:
        reader = csv.DictReader(io.StringIO(text))
        if tuple(reader.fieldnames or ()) != self.columns:
            raise ArtifactError(
                f"{self.path} has the columns {reader.fieldnames}, not {list(self.columns)}. It is damaged."
            )
        return list(reader)

    def add(
        self, subnet_id: str, name: str, subnet: str, values: Mapping[str, float], nodes: NodeStatistics | None = None
    ) -> None:
        """Appends one row; columns without a value are empty."""
        if nodes is not None:  # first, so that no row is without them
            append_line(self.nodes, json.dumps({"id": subnet_id, "nodes": json.loads(to_text(nodes))}))
        cells = [_text(values[column]) if column in values else "" for column in self.columns[len(FIRST) :]]
        append_line(self.path, _line([subnet_id, name, subnet, *cells]))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While one process does what only one may do."""
        with self.described.open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def finish(self, order: Sequence[str], added: Mapping[str, Sequence[float]]) -> None:
        """Rewrites the file atomically: rows in ``order`` of their ids, with further columns' values filled in."""
        rows = self.open(repair=False)
        lines = [_line(self.columns)]
        for index, subnet_id in enumerate(order):
            row = {**rows[subnet_id], **{name: _text(float(values[index])) for name, values in added.items()}}
            lines.append(_line([row[column] for column in self.columns]))
        write_text(self.path, "\n".join(lines) + "\n")


def read_scores(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file of scores and the names of its score columns.

    Raises:
        ArtifactError: It is missing, or has not the columns of such a file.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise ArtifactError(f"{path} cannot be read as a file of scores: {error}. 'nasq score' makes one.") from error
    if tuple(columns[:3]) != FIRST or any(None in row.values() for row in rows):
        raise ArtifactError(
            f"{path} is no file of scores: its columns are {columns[:4]}, expected {', '.join(FIRST)}, then scores. "
            "'nasq score' makes one."
        )
    return rows, columns[3:]


def read_nodes(path: Path) -> dict[str, NodeStatistics]:
    """The node-wise statistics beside a file of scores, by subnet id; of a subnet that is there twice, the last.

    Raises:
        ArtifactError: There are none, or a line is damaged.
    """
    try:
        lines = nodes_file(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ArtifactError(
            f"{path} has no node-wise statistics beside it ({nodes_file(path).name}): {why}. Make it with 'nasq score "
            "--nodes'."
        ) from error
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            found[str(one["id"])] = from_text(json.dumps(one["nodes"]))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a kill cut the last line short; its row is not there either
            raise ArtifactError(f"{nodes_file(path)} is damaged in line {number}. Make it anew.") from error
    return found


def column(rows: Sequence[Row], name: str) -> list[float]:
    """The values of one column; an empty cell is NaN."""
    return [float(row[name]) if row[name] else math.nan for row in rows]
