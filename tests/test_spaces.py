"""Every installed search space through the conformance kit, and one of somebody else's package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nasq import plugins
from nasq.testing import check_space

SPACES = list(plugins.installed("search_spaces"))

USERS_FACTORY = """
from torch import nn

from nasq import Choice, elastic


def build(num_classes=3, in_channels=1):
    width = Choice("width", (2, 4))
    return nn.Sequential(
        elastic.Conv2d(in_channels, width, 3), elastic.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        elastic.Linear(width, num_classes),
    )
"""


def member(name: str, scratch: Path) -> dict[str, Any]:
    """What a space that is named with a colon needs beside its test-size arguments."""
    if name != "torch_module":
        return {}
    (scratch / "factory.py").write_text(USERS_FACTORY)
    return {"arguments": {"factory": f"{scratch / 'factory.py'}:build"}}


@pytest.mark.parametrize("name", SPACES)
def test_every_installed_space_conforms(name: str, tmp_path: Path) -> None:
    report = check_space(plugins.load("search_spaces", name), name=name, **member(name, tmp_path))
    print(report.summary())  # for `pytest -rP`: a check that is left out is never silent
    info = plugins.space_info(plugins.load("search_spaces", name))
    assert len(report.checks) + len(report.left_out) == 14
    assert bool(report.left_out) == bool(info.float_only)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in SPACES if name != "torch_module"])
def test_every_full_space_conforms(name: str) -> None:
    report = check_space(plugins.load("search_spaces", name), name=name, tiny=False, subnets=5, exported=1)
    assert len(report.checks) + len(report.left_out) == 14


def test_every_space_says_where_it_is_from() -> None:
    for name in SPACES:
        info = plugins.space_info(plugins.load("search_spaces", name))
        assert info.source and info.data and len(info.input_shape) == 3, name


PACKAGE = {
    "setup.cfg": """
[metadata]
name = somebodys-space
version = 0.1

[options]
py_modules = somebodys_space

[options.entry_points]
nasq.search_spaces =
    somebodys_net = somebodys_space:somebodys_net
""",
    "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n',
    "somebodys_space.py": USERS_FACTORY
    + """
from nasq.plugins import search_space


@search_space(source="somebody else", data="digits", input_shape=(1, 8, 8))
def somebodys_net(num_classes=10, in_channels=1):
    return build(num_classes, in_channels)
""",
}

CONFORM = """
from nasq import plugins
from nasq.testing import check_space

print(check_space(plugins.load("search_spaces", "somebodys_net"), subnets=4).summary())
"""


def run(arguments: list[str], path: Path | None = None, **options: Any) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path) if path else ""}
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=250, env=environment, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_somebody_elses_package_is_found_through_its_entry_point_and_conforms(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name, text in PACKAGE.items():
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, "--target", str(target), str(source)])
    program = "from nasq.cli.main import main; main()"
    rows = json.loads(run([sys.executable, "-c", program, "spaces", "somebodys_net", "--json"], target, cwd=tmp_path))
    assert [(row["choice"], row["options"]) for row in rows] == [("width", "2 4")]
    out = run([sys.executable, "-c", CONFORM], target, cwd=tmp_path)
    assert out.startswith("somebodys_net: 2 subnets") and "passed   exported parity" in out and "LEFT OUT" not in out
