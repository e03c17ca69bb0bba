"""What the command line says of a bundle and of a benchmark: true where the gate failed, and in 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasq.cli import benching
from nasq.cli.output import Output
from nasq.cli.showing import show_bundle
from nasq.deploy import bundle, parity
from nasq.deploy.onnx import export
from nasq.errors import ArtifactError
from tests.deploy.programs import random_input, residual_program

PROGRAM = residual_program(5, 4, 4)


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    show_bundle(path, Output(False, False))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    return " ".join(out.split())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "b", PROGRAM, {parity.MODEL: export(PROGRAM)})
    return tmp_path / "b"


def test_show_says_whether_the_gate_ran_passed_or_failed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "parity: the gate never ran on this bundle; 'nasq verify' runs it" in shown(directory, capsys)
    images = random_input(PROGRAM, 20, 0)
    report = parity.check(directory, images, np.arange(20) % 10).to_json()
    bundle.add_file(directory, "parity.json", json.dumps(report).encode())
    out = shown(directory, capsys)
    assert f"20 images, accuracy {report['accuracy']:.2%} (file): passed" in out and "FAILED" not in out
    # The verdict is that of the figures, also where somebody writes another one beside them.
    worse = {**report, "differing": 7, "images_differing": 2, "passed": True, "failures": [], "accuracy": None}
    bundle.add_file(directory, "parity.json", json.dumps(worse).encode())
    out = shown(directory, capsys)
    assert "20 images: FAILED: 7 of 200 final integers differ, on 2 of 20 images; allowed: 0." in out
    show_bundle(directory, Output(True, False))
    facts = json.loads(capsys.readouterr().out)
    assert facts["parity"]["passed"] is False and len(facts["parity"]["failures"]) == 1
    bundle.add_file(directory, "parity.json", b"{}")
    with pytest.raises(ArtifactError, match="this is not a parity report"):
        show_bundle(directory, Output(False, False))


def row(candidate: str, batch: int, median: float, spread: float = 0.1, memory: str = "child") -> dict[str, Any]:
    return {
        "candidate": candidate, "batch": batch, "median": median, "low": median - spread, "high": median + spread,
        "p95": median + spread, "throughput": 1e3 * batch / median, "peak_mib": 12.5, "memory": memory,
    }  # fmt: skip


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"environment": {"cpu": "a processor", "threads": 2}, "rows": list(rows)}


def test_a_format_that_is_slower_than_fp32_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("onnxruntime fp32", 1, 1.0), row("onnxruntime int8", 1, 1.5),  # slower
        row("onnxruntime fp32", 8, 1.0), row("onnxruntime int8", 8, 1.15),  # the intervals meet
        row("torch fp32", 8, 0.1, memory="growth"),  # another runtime
    ]  # fmt: skip
    assert benching.slower_than_float(rows) == [
        "warning: onnxruntime int8 is slower than fp32 at batch 1: 1.5 ms, not 1 ms."
    ]
    benching.show_rows(report(*rows), Output(False, False))
    done = capsys.readouterr()
    assert done.out.startswith("a processor, 2 thread(s)\n") and max(map(len, done.out.splitlines())) <= 80
    said = " ".join(done.err.split())
    assert "warning: onnxruntime int8 is slower" in said
    assert "peak MiB of onnxruntime fp32, onnxruntime int8: child; others do not compare." in said
    assert "peak MiB of torch fp32: growth; others do not compare." in said
    assert benching.slower_than_float(rows[2:]) == []


def test_what_only_one_benchmark_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    before = report(row("onnxruntime int8", 1, 1.0), row("onnxruntime int8", 8, 4.0))
    now = report(row("onnxruntime int8", 1, 1.5), row("torch fp32", 1, 2.0))
    assert benching.show_changes(before, now, 0.1, Output(False, False))
    done = capsys.readouterr()
    assert "slower" in done.out
    assert "has them: onnxruntime int8 at batch 8, torch fp32 at batch 1" in " ".join(done.err.split())
    assert not benching.show_changes(before, before, 0.1, Output(False, False))
    assert "not compared" not in capsys.readouterr().err
