"""``import nasq`` and ``nasq --help`` load no torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import nasq

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "scipy", "sklearn", "optuna", "deap", "matplotlib", "plotly")


def heavy_after(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after ``code``."""
    script = f"import sys\n{code}\nsys.stderr.write('loaded:' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "loaded:" in done.stderr, done.stderr
    return set(HEAVY) & set(done.stderr.rpartition("loaded:")[2].split())


def test_the_check_sees_what_it_is_for() -> None:
    assert "torch" in heavy_after("import torch") and heavy_after("import json") == set()


def test_importing_nasq_loads_nothing_heavy() -> None:
    assert heavy_after("import nasq; assert nasq.__version__ and 'Supernet' in dir(nasq)") == set()


@pytest.mark.parametrize("name", ["nasq.errors", "nasq.files", "nasq.space", "nasq.targets"])
def test_the_first_packages_work_without_torch(name: str) -> None:
    assert heavy_after(f"import {name}") == set()


def test_names_load_on_first_use() -> None:
    assert "torch" in heavy_after("import nasq; nasq.Supernet")
    assert heavy_after("import nasq; nasq.Choice('a', (1, 2)); nasq.targets.load('generic')") == set()


@pytest.mark.skipif(importlib.util.find_spec("nasq.cli.main") is None, reason="the command line does not exist yet")
def test_help_loads_no_torch() -> None:
    code = (
        "import contextlib, io\nfrom nasq.cli.main import main\nsys.argv = ['nasq', '--help']\nout = io.StringIO()\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):\n    main()\n"
        "assert 'Usage' in out.getvalue() or 'usage' in out.getvalue(), out.getvalue()"
    )
    assert heavy_after(code) == set()


def test_every_public_name_exists() -> None:
    for name in nasq.__all__:
        if name != "report":
            assert getattr(nasq, name) is not None, name
    assert set(dir(nasq)) >= set(nasq.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'nasq' has no attribute 'Supernett'"):
        nasq.__getattr__("Supernett")
