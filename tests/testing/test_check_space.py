"""The kit finds what is broken: one space that passes, and one for every check that does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import randomise as shaken
from torch import Tensor, nn

from nasq import Choice, elastic
from nasq.errors import InputError, NasqError
from nasq.plugins import search_space
from nasq.testing import ConformanceError, check_space, randomise

WIDTH = (2, 4)


class Net(nn.Module):
    """A small honest space; tests replace its layer, or what it computes."""

    def __init__(self, layer: Callable[..., nn.Module] | None = None, width: tuple[int, ...] = WIDTH) -> None:
        super().__init__()
        size = Choice("width", width)
        make = elastic.Conv2d if layer is None else layer
        self.stem = make(3, size, 3)
        self.norm = elastic.BatchNorm2d(size)
        self.mix = elastic.OneOf(
            Choice("mix", ("conv", "skip")),
            conv=elastic.Conv2d(size, size, Choice("kernel", (1, 3))),
            skip=nn.Identity(),
        )
        self.head = elastic.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def check(factory: Callable[..., nn.Module], **options: Any) -> Any:
    return check_space(factory, **{"input_shape": (3, 6, 6), "subnets": 6, "exported": 1, "name": "mine", **options})


def test_an_honest_space_passes_every_check() -> None:
    said: list[str] = []
    report = check(Net, exported=2, say=said.append)
    assert report.size == 2 * (1 + 2) and not report.left_out
    assert [line.split(": ")[1] for line in said] == [one.name for one in report.checks] and len(said) == 14
    text = report.summary()
    assert text.startswith("mine: 6 subnets\n") and "passed   exported parity: 2 subnets, 96 final integers" in text


def test_a_declared_reason_is_reported_and_never_silent() -> None:
    @search_space(source="here", data="digits", input_shape=(3, 6, 6), float_only="its shifts have no integer form")
    def floats() -> nn.Module:
        return Net()

    said: list[str] = []
    report = check_space(floats, subnets=3, say=said.append)
    assert [one.name for one in report.left_out] == ["quantize", "exported parity"]
    assert report.summary().count("LEFT OUT") == 2 == sum("LEFT OUT" in line for line in said)
    assert all("its shifts have no integer form" in line for line in said[-2:])


class Forgetful(elastic.Conv2d):
    """Extracts something else than it computes."""

    def extract(self, recurse: Any) -> nn.Module:
        made = super().extract(recurse)
        with torch.no_grad():
            made.weight[0, 0, 0, 0] += 1e-3
        return made


class Sharing(elastic.Conv2d):
    """Hands its own weights out."""

    def extract(self, recurse: Any) -> nn.Module:
        made = super().extract(recurse)
        if self.value(self.out_channels) == max(WIDTH):
            made.weight = self.weight
        return made


class Miscounted(elastic.Conv2d):
    def cost_parameters(self, lookup: Any) -> Any:
        return super().cost_parameters(lookup) + 1


class Exploding(elastic.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (float("nan") if self.value(self.out_channels) == 2 else 1)


class Product(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return super().forward(x) + torch.einsum("nchw,nchv->ncw", y, y).mean((1, 2))[:, None]


class Tuple(Net):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class Strict(Net):
    def forward(self, x: Tensor) -> Tensor:
        if int(x.shape[1]) != 3:
            raise LookupError("colours")
        return super().forward(x)


@pytest.mark.parametrize(
    ("factory", "name", "message"),
    [
        (Strict, "wrong inputs", r"an input of shape \[1, 4, 6, 6\] raises LookupError instead of an InputError: colours"),
        (lambda: Net(Forgetful), "extract equals activate", r"\{\"kernel\":.*does not compute what .* numbers differ, by"),
        (lambda: Net(Sharing), "extract equals activate", r"extracting .* changed 'module.stem.weight' of the supernet"),
        (lambda: Net(Miscounted), "costs equal counters", r"params of the subnet \{.* are \d+, and \d+ by torch's count"),
        (Product, "costs equal counters", "cannot be counted"),
        (lambda: Net(Exploding), "forward and gradients", r"the subnet \{.*\"width\":2\} computes NaN"),
        (Tuple, "forward and gradients", "returns tuple instead of one tensor"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(factory: Any, name: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=rf"(?s)'mine' fails the check '{name}': .*{message}"):
        check(factory)


def test_choices_that_depend_on_chance_are_found() -> None:
    widths = itertools.cycle([(2, 4), (2, 6)])
    with pytest.raises(ConformanceError, match=r"'choices': two calls of the factory build different spaces"):
        check(lambda: Net(width=next(widths)))


def test_weights_that_another_build_cannot_load_are_found() -> None:
    names = itertools.count()

    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            if (number := next(names)) > 1:
                self.add_module(f"extra{number}", nn.Linear(1, 1))

    with pytest.raises(ConformanceError, match=r"'save and load': ArtifactError: .*extra2"):
        check(Renamed)


def test_a_space_without_an_integer_form_has_to_say_so() -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.atan(super().forward(x))

    with pytest.raises(ConformanceError, match=r"'quantize': InputError: .*atan.* has no integer form"):
        check(Odd)


def test_an_undecorated_factory_needs_an_input_shape() -> None:
    with pytest.raises(InputError, match=r"'Net' does not say the shape of an input. Give check_space"):
        check_space(Net)
    with pytest.raises(ConformanceError, match=r"the factory returned int"):
        check(lambda: 3)
    assert issubclass(ConformanceError, NasqError) and issubclass(ConformanceError, AssertionError)


def test_randomised_norms_have_four_tensors_that_matter() -> None:
    net = randomise(Net(), 1)
    other = randomise(Net(), 1)
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = getattr(net.norm, name)
        assert len(value.unique()) == len(value) and torch.equal(value, getattr(other.norm, name))
    assert (net.norm.running_var > 0.29).all()
    with torch.no_grad():
        assert not torch.equal(net.eval()(torch.ones(1, 3, 6, 6)), shaken(Net()).eval()(torch.ones(1, 3, 6, 6)))
