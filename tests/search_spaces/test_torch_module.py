from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasq import Choice, elastic, plugins
from nasq.errors import InputError
from nasq.run.assemble import _require_outputs
from nasq.run.config import load_config

SOURCE = """
from dataclasses import dataclass
from torch import nn
from nasq.plugins import search_space

@dataclass
class Options:
    width: int = 4

def plain(width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))

@search_space(source="mine", data="digits", input_shape=(1, 8, 8))
def decorated(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

def wrong():
    return 3

number = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_factory_in_a_file(file: Path) -> None:
    factory = plugins.load("search_spaces", f"torch_module:{file}:plain")
    # What the data offer goes to factories that have a place for it; what the user asks for goes in any case.
    network = factory(num_classes=10, in_channels=1, width=6)
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 10) and network[1].out_features == 6
    with pytest.raises(TypeError, match="height"):
        factory(height=3)


def test_a_decorated_factory_says_its_data(file: Path) -> None:
    factory = plugins.load("search_spaces", f"torch_module:{file}:decorated")
    assert plugins.space_info(factory) == plugins.SpaceInfo("mine", "digits", (1, 8, 8))
    assert factory(num_classes=3, in_channels=2)[1].weight.shape == (3, 128)
    with pytest.raises(InputError, match="'plain' does not say what data it is for"):
        plugins.space_info(plugins.load("search_spaces", f"torch_module:{file}:plain"))


def test_an_installed_module() -> None:
    factory = plugins.load("search_spaces", "torch_module:torch.nn:Flatten")
    assert isinstance(factory(num_classes=10), nn.Flatten)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("there_is_none.py:net", r"there is no file 'there_is_none\.py'\. Write torch_module:PATH\.py:FACTORY"),
        ("no_such_package:net", r"'no_such_package' cannot be imported: ModuleNotFoundError"),
        ("torch.nn", "'torch.nn' names no factory"),
        ("torch.nn:Flaten", r"unknown factory 'Flaten'\. Did you mean 'Flatten'\?"),
    ],
)
def test_errors(name: str, match: str) -> None:
    with pytest.raises(InputError, match=match) as found:
        plugins.load("search_spaces", f"torch_module:{name}")
    assert "\n" not in str(found.value)


def test_errors_of_a_file(file: Path) -> None:
    with pytest.raises(InputError, match=r"unknown factory 'number'.*Allowed: .*decorated, plain"):
        plugins.load("search_spaces", f"torch_module:{file}:number")
    with pytest.raises(InputError, match=r"wrong' gives a int, not a torch\.nn\.Module"):
        plugins.load("search_spaces", f"torch_module:{file}:wrong")()
    file.write_text("raise RuntimeError('first line\\nsecond line')")
    before = set(sys.modules)
    with pytest.raises(InputError, match=r"cannot be imported: RuntimeError: first line\. Repair it"):
        plugins.load("search_spaces", f"torch_module:{file}:plain")
    assert "nasq_user_mine" in before or "nasq_user_mine" not in sys.modules


class Takes(nn.Module):
    """A network whose forward may be given."""

    def __init__(self, forward: Callable[[Tensor], Any] | None) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), forward

    def forward(self, x: Tensor) -> Any:
        return self.function(x) if self.function is not None else self.conv(x)


TIED = nn.Sequential(
    elastic.Conv2d(1, Choice("width", (4, 8)), 3), nn.Flatten(), elastic.Linear(Choice("width", (4, 16)), 10)
)


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (Takes(None), r"does not run on one image of the data, of shape \[1, 1, 8, 8\]: RuntimeError: .* in_channels"),
        (Takes(lambda x: (x, x)), "gives a tuple for one image. Its network has to return one tensor"),
        (Takes(lambda x: x.flatten(1)), r"gives outputs of shape \[1, 64\] for one image; the data set has 10 classes"),
        (TIED, r"the choice 'width' has the options \[4, 8\] in '0' and \[4, 16\] in '2'"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_one_line(network: nn.Module, match: str) -> None:
    config = load_config(preset="digits", changes=["space=torch_module:mine.py:build"])
    with pytest.raises(InputError, match=match):
        _require_outputs(config, network, torch.zeros(1, 1, 8, 8), 10)
