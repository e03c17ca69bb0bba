"""The process around a command: streams that are closed, paths that are none, what goes on after Ctrl-C."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

import nasq
from nasq.cli.output import Output
from nasq.cli.process import open_closed_streams, refused_by_system, what_goes_on
from tests.run.tiny import Call, refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run mine.yaml --out x", "'nasq run' with --resume goes on"),
        ("--quiet run", "--resume"),
        ("table build digits_mobile", "the same command goes on"),
        ("rank-supernet x --table y", "the same command goes on"),
    ],
)
def test_what_goes_on_after_ctrl_c(line: str, words: str) -> None:
    assert words in what_goes_on(line.split())


def test_nothing_is_promised_of_commands_that_keep_nothing() -> None:
    assert [what_goes_on(line.split()) for line in ("doctor", "audit a.csv", "verify b", "")] == [""] * 4


def test_a_path_that_is_a_directory_is_no_bug() -> None:
    line = refused_by_system(IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "there"))
    assert line.startswith("a path cannot be used: Is a directory (there).")
    assert refused_by_system(OSError(errno.ENOENT, "no such file")) == ""  # without a path it may be anything
    assert refused_by_system(OSError(errno.ENOTCONN, "not connected", "there")) == ""


def test_closed_streams_are_opened_to_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    open_closed_streams()
    Output(as_json=False, quiet=False).table([{"a": 1}])
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_the_version(call: Call) -> None:
    assert call("--version") == (0, f"nasq {nasq.__version__}\n", "")


def test_resume_of_a_directory_without_a_run_begins_none(tmp_path: Path, call: Call) -> None:
    done = call("run", "--out", tmp_path / "mistyped", "--resume")
    refused(done, "mistyped holds no run to go on with", "config.yaml is missing", "--preset NAME")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_bundle_is_said_to_be_none(command: str, tmp_path: Path, call: Call) -> None:
    refused(call(command, tmp_path / "nowhere"), "there is no directory", "nowhere", "RUN/best")
    refused(call(command, tmp_path), "checksums.json is missing")
    (tmp_path / "config.yaml").write_text("space: digits_mobile\n")
    if command == "verify":
        refused(call(command, tmp_path), "is a run, not a bundle", str(tmp_path / "best"))


def test_numbers_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False, quiet=False)
    output.table([{"bytes": 54482.0, "share": 0.46333, "large": 12345.6, "tiny": 1.5e-7}])
    assert capsys.readouterr().out.split()[4:] == ["54,482", "0.4633", "12,346", "1.5e-07"]
