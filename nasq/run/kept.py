"""Numbers that cost time, kept on disk by key, so that a search that was killed computes none of them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from nasq.errors import ArtifactError
from nasq.files import append_line, parse_json, write_bytes

__all__ = ["KeptValues"]


class KeptValues:
    """Named numbers by key, a line of JSON each: there after a kill at any moment.

    Args:
        path: The file; made with the first line.
        what: Says what the numbers are of, such as a proxy and its images; lines of anything else are left alone.

    Raises:
        ArtifactError: A line is damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._known: dict[str, dict[str, float]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_bytes(path, whole)  # what a kill cut short
        for number, line in enumerate(whole.splitlines(), 1):
            self._take(line, number)

    def _take(self, line: bytes, number: int) -> None:
        found = parse_json(line, self._path)
        try:
            if found["of"] == self._what:
                values = {str(name): float(value) for name, value in found["values"].items()}
                self._known[str(found["key"])] = values
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(
                f"{self._path} is damaged in line {number}. Remove that line; it is only computed again."
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str, compute: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """The values of ``key``: those on disk, or what ``compute`` gives now."""
        if key not in self._known:
            values = {name: float(value) for name, value in compute().items()}
            append_line(self._path, json.dumps({"of": self._what, "key": key, "values": values}, allow_nan=False))
            self._known[key] = values
        return self._known[key]
