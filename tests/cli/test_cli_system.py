"""What the system refuses: a package that is not installed, a full disk, a read-only one, an interrupted process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nasq.cli import main as program
from tests.run.tiny import Call, Run, files, refused


def test_a_missing_package_says_how_to_install_it(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    # 'verify' works in a process of its own, where importing it fails as well.
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "onnxruntime.py").write_text("raise ModuleNotFoundError(name='onnxruntime')")
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))  # which the other process takes over
    refused(call("verify", finished.directory / "best"), "'onnxruntime'", "pip install onnxruntime")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    arguments = ["--set", "data.name=cifar10", "--data-root", tmp_path]
    (tmp_path / "cifar-10-batches-py").mkdir()
    done = call("run", finished.config, "--out", tmp_path / "run", *arguments)
    refused(done, "torchvision", "pip install torchvision")
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_from_the_start(finished: Run, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    with largest_file(100):
        done = call("run", finished.config, "--out", run, "--quiet")
    refused(done, "config.yaml", "File too large", "free space", code=1)
    assert set(files(run)) == {".lock"}
    with largest_file(100_000):  # space was made, but not enough
        done = call("run", finished.config, "--out", run, "--quiet")
    refused(done, "cannot write", "checkpoint", "File too large", code=1)
    assert {name for name in files(run) if "/." in name} == set(), "a part of a file was left"


def test_a_disk_that_is_full_while_training(finished: Run, copied: Path, call: Call) -> None:
    (copied / "supernet" / "supernet.json").unlink()
    checkpoints = copied / "supernet" / "quantized"
    slot = json.loads((checkpoints / "checkpoint.json").read_text())["slot"]
    (checkpoints / "checkpoint.json").write_bytes((checkpoints / f"checkpoint.{1 - slot}.json").read_bytes())
    before = files(copied / "supernet")
    with largest_file(100_000):
        refused(call("train", copied, "--quiet"), "cannot write", "checkpoint", "File too large", code=1)
    assert files(copied / "supernet") == before
    # Space was made: the same command goes on, and ends like the undisturbed run.
    assert call("train", copied, "--quiet").code == 0
    weights = "supernet/weights.safetensors"
    assert (copied / weights).read_bytes() == (finished.directory / weights).read_bytes()


@pytest.mark.parametrize("stage", ["export", "report"])
def test_a_full_disk_loses_nothing(stage: str, copied: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    before = files(copied)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        done = call(stage, copied, "--quiet")
    refused(done, "cannot write", "No space left on device", "untouched", code=1)
    after = files(copied)
    assert {name: after[name] for name in before if name != "events.jsonl"} == {
        name: content for name, content in before.items() if name != "events.jsonl"
    }
    assert set(after) == set(before)
    assert call(stage, copied, "--quiet").code == 0


def test_a_read_only_directory(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def read_only(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    done = call("run", finished.config, "--out", tmp_path / "run", "--quiet")
    refused(done, f"cannot write in {tmp_path / 'run'}", "Read-only file system", "--out", code=1)


def test_a_log_that_cannot_be_written(copied: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files(copied)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        done = call("bench", copied, "--quiet")
    refused(done, "events.jsonl", "No space left on device", code=1)
    assert files(copied) == before


def test_a_refusal_of_the_system_elsewhere(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def raising(number: int) -> object:
        def app(standalone_mode: bool) -> None:
            raise OSError(number, os.strerror(number), "/scratch/x")

        return app

    monkeypatch.setattr(program, "app", raising(errno.ENOSPC))
    refused(call("show"), "No space left on device (/scratch/x)", "free space", code=1)
    monkeypatch.setattr(program, "app", raising(errno.ENOTCONN))
    with pytest.raises(OSError, match="not connected"):  # a bug keeps its traceback
        call("show")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr("nasq.plugins.installed", interrupted)
    done = call("spaces")
    assert (done.code, done.err) == (130, "nasq: interrupted\n")  # of a list nothing can be lost
    refused(call("score", "my_net", "--proxy", "params", "--out", "x.csv"), "the same command goes on", code=130)
    assert signal.getsignal(signal.SIGINT) is before
