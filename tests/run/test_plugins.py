from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from nasq import plugins
from nasq.errors import InputError
from nasq.ranking import load_proxy
from nasq.run.score import ScoreJob, run_score
from tests.run.tiny import Call, refused

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replaces what is installed by ``(name, value)`` pairs of the group ``nasq.search_spaces``."""

    def replace(*points: tuple[str, str]) -> None:
        made = EntryPoints(EntryPoint(name, value, "nasq.search_spaces") for name, value in points)
        monkeypatch.setattr(plugins, "entry_points", lambda group: made.select(group=group))

    return replace


def test_the_built_in_members_are_found_like_any_other() -> None:
    assert "digits_mobile" in plugins.installed("search_spaces")
    assert {"params", "flops"} <= set(plugins.installed("proxies"))
    assert plugins.space_info(plugins.load("search_spaces", "digits_mobile")).input_shape == (1, 8, 8)


def test_two_packages_with_one_name(install: Install) -> None:
    install(("mine", "first.pkg:space"), ("mine", "second.pkg:space"))
    with pytest.raises(InputError, match=r"'mine' is installed twice, as first.pkg:space and as second.pkg:space"):
        plugins.installed("search_spaces")


def test_one_package_found_twice_is_no_clash(install: Install) -> None:
    install(("mine", "pkg:space"), ("other", "pkg:other"), ("mine", "pkg:space"))
    assert list(plugins.installed("search_spaces")) == ["mine", "other"]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("import there_is_no_such_package\n", "No module named 'there_is_no_such_package'"),
        ("other = 1\n", "has no attribute 'space'"),
        ("def space(:\n", "invalid syntax"),
        ("space = 1 / 0\n", "division by zero"),
    ],
)
def test_a_broken_package_is_named(
    source: str, match: str, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_space.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_space", raising=False)
    install(("mine", "broken_space:space"))
    with pytest.raises(InputError, match=rf"'mine' \(broken_space:space\) cannot be imported: .*{match}"):
        plugins.load("search_spaces", "mine")
    assert list(plugins.installed("search_spaces")) == ["mine"]  # listing imports nothing


def test_an_unknown_name(install: Install) -> None:
    install(("resnet", "pkg:resnet"))
    with pytest.raises(InputError, match=r"unknown search space 'resnt'\. Did you mean 'resnet'\?.*nasq spaces"):
        plugins.load("search_spaces", "resnt")
    own = r"unknown search space 'nets/mine\.py'.*A network of your own is torch_module:nets/mine\.py:FACTORY\."
    with pytest.raises(InputError, match=own):
        plugins.load("search_spaces", "nets/mine.py")
    with pytest.raises(InputError, match=own):
        plugins.load("search_spaces", "nets/mine.py:build")
    install()
    with pytest.raises(InputError, match="none is installed"):
        plugins.load("search_spaces", "resnet")


def test_an_unknown_proxy() -> None:
    with pytest.raises(InputError, match=r"unknown proxy 'flop'\. Did you mean 'flops'\?.*'nasq proxies' lists them"):
        plugins.load("proxies", "flop")


def test_a_space_that_does_not_say_its_data() -> None:
    def bare() -> None: ...

    with pytest.raises(InputError, match=r"'bare' does not say what data it is for\. .*search_space"):
        plugins.space_info(bare)
    decorated = plugins.search_space(source="here", data="digits", input_shape=(1, 8, 8))(bare)
    assert decorated is bare and plugins.space_info(bare) == plugins.SpaceInfo("here", "digits", (1, 8, 8))


def test_what_a_space_says_of_its_test_size_member() -> None:
    @plugins.search_space(
        source="here", data="digits", input_shape=(3, 32, 32), tiny={"width": 4}, tiny_input_shape=(3, 8, 8),
        published="12 subnets", float_only="no integer form of a shift",
    )  # fmt: skip
    def factory(width: int = 64) -> None: ...

    info = plugins.space_info(factory)
    assert (info.tiny, info.tiny_input_shape, info.published) == ({"width": 4}, (3, 8, 8), "12 subnets")
    assert info.float_only == "no integer form of a shift"
    assert plugins.SpaceInfo("here", "digits", (1, 8, 8)).tiny_input_shape == (1, 8, 8)


OWN = """
import torch

from nasq.ranking import Needs, Proxy


class Good(Proxy):
    name, needs, reference = "good", Needs(), "the tests"

    def score(self, model, batch, generator=None):
        return 1.0


class Nameless(Proxy):
    def score(self, model, batch, generator=None):
        return 1.0


class Abstract(Proxy):
    name, needs, reference = "abstract", Needs(), "the tests"


class Three(Good):
    name = "three"

    def score(self, model, batch, generator=None):
        return torch.ones(3)


class Raising(Good):
    name = "raising"

    def score(self, model, batch, generator=None):
        return {}["there is no such key"]


function = print
"""
PROXIES = ("good", "nameless", "abstract", "other", "function", "nowhere", "three", "raising")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's package of proxies, most of them wrong."""
    (tmp_path / "own_proxies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_proxies", raising=False)
    names = {"other": "Good", "function": "function"}
    points = [EntryPoint(one, f"own_proxies:{names.get(one, one.title())}", "nasq.proxies") for one in PROXIES]
    both = EntryPoints([*points, *plugins.entry_points(group="nasq.search_spaces")])
    monkeypatch.setattr(plugins, "entry_points", lambda group: both.select(group=group))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nameless", r"'nameless' \(Nameless\) has no name, needs, reference\. Inherit from nasq.ranking.Proxy"),
        ("abstract", r"'abstract' cannot be made: .*score"),
        ("other", r"'other' \(Good\) calls itself 'good'\. Give both the same name"),
        ("function", "'function' is installed as .*which is no class of proxies"),
        ("nowhere", r"cannot be imported: .*has no attribute 'Nowhere'"),
    ],
)
def test_a_proxy_that_is_none_says_what_it_lacks(name: str, match: str, own: None) -> None:
    with pytest.raises(InputError, match=match):
        load_proxy(name)


def test_wrong_proxies_hide_no_others(own: None, call: Call) -> None:
    assert load_proxy("good").name == "good"
    done = call("proxies")
    assert done.code == 0 and [line.split()[0] for line in done.out.splitlines()[1:]] == ["good", "raising", "three"]
    assert done.err.count("nasq: the proxy") == 5


def test_a_proxy_that_fails_is_one_line(own: None, tmp_path: Path, call: Call) -> None:
    words = ["score", "digits_mobile", "--count", "1", "--out", tmp_path / "x.csv", "--proxy"]
    refused(call(*words, "three"), "the proxy 'three' gave Tensor [3]; a score is one number")
    done = call(*words, "raising")
    refused(done, "scoring the subnet ", "own_proxies.py, line ", "KeyError: 'there is no such key'", code=1)


def test_a_space_without_choices_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rigid.py").write_text(
        "from torch import nn\nfrom nasq.plugins import search_space\n\n\n"
        "@search_space(source='the tests', data='digits', input_shape=(1, 8, 8))\n"
        "def build():\n    return nn.Conv2d(1, 2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    for count in (None, 5):
        job = ScoreJob("torch_module:rigid.py:build", ("params",), tmp_path / "x.csv", count)
        assert run_score(job)["rows"] == 1
    assert (tmp_path / "x.csv").read_text().splitlines()[1].endswith(",20.0")
