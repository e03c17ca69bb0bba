"""A run so small that it takes seconds, made once per session by the real command line, and ways to call that."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nasq.cli.main import main

# Most of the digits are validation images, so that epochs are short.
CONFIG = """
space: digits_mobile
data: {name: digits, validation: 1100}
check_target: false
threads: 1
warmup: {epochs: 1, warmup_epochs: 0, bf16: false, channels_last: false}
train: {epochs: 2, warmup_epochs: 0, bf16: false, channels_last: false}
quantization: {calibration_images: 128}
search:
  objectives: [accuracy, bytes, average_activation_bits]
  constraints: ["bytes<=60k", "bytes>=12k"]
  evaluations: 8
  population: 4
  recalibration_images: 128
export: 3
bench: {batch_sizes: [1], repeats: 6}
"""
NASQ = str(Path(sys.executable).parent / "nasq")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)}


class Done(NamedTuple):
    """What a call of the command line left."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]


class Run(NamedTuple):
    """The undisturbed run: do not change it (``copied`` may be changed)."""

    config: Path
    directory: Path
    done: Done


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [NASQ, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=240)
    return Done(process.returncode, out, err)


@contextlib.contextmanager
def _one_worker(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Made once, also where several workers test: the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_run"
    place.mkdir(exist_ok=True)
    config, directory, out, err = (place / name for name in ("tiny.yaml", "run", "stdout", "stderr"))
    with _one_worker(place / "lock"):
        if not err.exists():
            config.write_text(CONFIG)
            done = finish(start("run", config, "--out", directory, "--json", "--quiet"))
            assert done.code == 0, done.err
            out.write_text(done.out)
            err.write_text(done.err)
    return Run(config, directory, Done(0, out.read_text(), err.read_text()))


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Path:
    """A copy of the run's directory that may be damaged."""
    return Path(shutil.copytree(finished.directory, tmp_path / "copy"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line in this process, through its entry point."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["nasq", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Done(code, out, err)

    return run


def refused(done: Done, *words: str, code: int = 2) -> None:
    """One clear message: the words on stderr, behind the program's name; nothing on stdout, no traceback."""
    assert done.code == code, done
    messages = [line for line in done.err.splitlines() if line.startswith(("nasq: ", "Error: "))]
    assert len(messages) == 1, done.err
    assert "Traceback" not in done.err and done.out == ""
    for word in words:
        assert word in done.err, f"{word!r} is not in {done.err!r}"


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def subnets(directory: Path) -> list[dict[str, str]]:
    """The rows of ``search/subnets.csv`` without the column that measures time."""
    import csv

    with (directory / "search" / "subnets.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
