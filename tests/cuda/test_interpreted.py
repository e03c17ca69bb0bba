"""The kernels, interpreted on the CPU in one process of its own (:mod:`tests.cuda.interpreted`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cuda.interpreted import CHECKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cuda.interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    # triton 3.6 interprets no loop over a range with the NumPy of today; its compiler is not concerned.
    if any("only 0-dimensional arrays can be converted to Python scalars" in text for text in found.values()):
        pytest.skip(f"the interpreter of triton {version('triton')} does not run with numpy {version('numpy')}")
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, results: dict[str, str]) -> None:
    assert results[name] == "", results[name]


def test_every_check_was_run(results: dict[str, str]) -> None:
    assert set(results) == set(CHECKS) and len(CHECKS) >= 15
