"""Networks that are nobody's search space, from the command line to a bundle: a model of timm's and a file of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run.tiny import CONFIG, finish, start

FACTORY = """
from torch import nn

from nasq import Choice, elastic


def build(num_classes=3, in_channels=1):
    width = Choice("width", (8, 16))
    return nn.Sequential(
        elastic.Conv2d(in_channels, width, 3), elastic.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        elastic.Linear(width, num_classes),
    )
"""


@pytest.mark.long
@pytest.mark.parametrize("space", ["timm:test_efficientnet", "torch_module:{}:build"])
def test_a_whole_run(space: str, tmp_path: Path) -> None:
    config, factory, run = tmp_path / "run.yaml", tmp_path / "factory.py", tmp_path / "run"
    config.write_text(CONFIG.replace("check_target: false", "check_target: true"))
    factory.write_text(FACTORY)
    changes = ("search.constraints=[]", "search.evaluations=4", "export=1", f"space={space.format(factory)}")
    sets = [part for change in changes for part in ("--set", change)]
    done = finish(start("run", config, "--out", run, "--json", "--quiet", *sets))
    assert done.code == 0, done.err
    assert json.loads(done.out)["subnet"]
    assert json.loads((run / "best" / "parity.json").read_text())["passed"]
    assert len((run / "search" / "subnets.csv").read_text().splitlines()) == 5
