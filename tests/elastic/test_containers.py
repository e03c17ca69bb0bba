from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import images
from torch import nn

from nasq import Choice, Supernet
from nasq.cost import CostModel
from nasq.elastic import Conv2d, OneOf, Repeat, extract, share_active
from nasq.errors import InputError


class Plus(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Any) -> Any:
        return x + self.number


def test_one_of_runs_the_branch_of_its_option() -> None:
    one = OneOf(Choice("mix", ("a", "b")), a=Plus(1), b=Plus(10))
    active = share_active(one)
    for option, wanted in (("a", 1.0), ("b", 10.0)):
        active["mix"] = option
        assert one(torch.zeros(1)).item() == wanted
        plain = extract(one)
        assert isinstance(plain, Plus) and plain.number == wanted
    active.clear()
    assert one(torch.zeros(1)).item() == 1.0


def test_one_of_passes_all_inputs_to_its_branch() -> None:
    class Second(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return y

    one = OneOf(Choice("mix", (1, 2)), {1: nn.Bilinear(2, 2, 2), 2: Second()})
    assert torch.equal(one(torch.zeros(1, 2), torch.ones(1, 2)), torch.ones(1, 2))


def test_repeat_runs_the_first_blocks() -> None:
    repeat = Repeat([Plus(1), Plus(10), Plus(100)], Choice("depth", (0, 1, 2, 3)))
    active = share_active(repeat)
    for depth, wanted in enumerate((0.0, 1.0, 11.0, 111.0)):
        active["depth"] = depth
        assert repeat(torch.zeros(1)).item() == wanted
        assert extract(repeat)(torch.zeros(1)).item() == wanted
    assert Repeat([Plus(1)] * 2)(torch.zeros(1)).item() == 2.0
    assert Repeat([Plus(1)] * 2, 1)(torch.zeros(1)).item() == 1.0


def test_conditions_say_when_a_part_runs() -> None:
    depth = Choice("depth", (1, 3))
    repeat = Repeat([Plus(1)] * 3, depth)
    assert [repeat.condition(i) for i in range(3)] == [(), (("depth", frozenset({3})),), (("depth", frozenset({3})),)]
    one = OneOf(Choice("mix", ("a", "b")), a=Plus(1), b=Plus(2))
    assert one.condition(1) == (("mix", frozenset({"b"})),)
    assert all(Repeat([Plus(1)] * 2, 2).condition(i) == () for i in range(2))


def test_a_fixed_depth_leaves_out_the_blocks_behind_it() -> None:
    """They never run: no choice of theirs is one of the space, and they cost nothing."""
    blocks = [Conv2d(3, 3, Choice(f"kernel{i}", (1, 3))) for i in range(3)]
    supernet = Supernet(Repeat(blocks, 1))
    assert supernet.space.names == ("kernel0",)
    found = CostModel(supernet, images(1)).of({"kernel0": 1})
    assert found["params"] == 12 and found["macs"] == 9 * 64
    assert Supernet(Repeat(blocks, 0)).space.size == 1


def test_with_parts_keeps_the_decision() -> None:
    one = OneOf(Choice("mix", ("a", "b")), a=Plus(1), b=Plus(2))
    again = one.with_parts([Plus(5), Plus(6)])
    assert again.own_choices == one.own_choices and again(torch.zeros(1)).item() == 5
    repeat = Repeat([Plus(1)] * 2, Choice("depth", (1, 2))).with_parts([Plus(3), Plus(4)])
    assert repeat(torch.zeros(1)).item() == 7 and [name for name, _ in repeat.parts()] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("given", [{"a": Plus(1)}, {"a": Plus(1), "b": Plus(2), "c": Plus(3)}, {}])
def test_branches_have_to_be_the_options(given: dict[str, nn.Module]) -> None:
    with pytest.raises(InputError, match=r"OneOf\('mix'\) has the options \['a', 'b'\].*exactly one branch per option"):
        OneOf(Choice("mix", ("a", "b")), given)


@pytest.mark.parametrize("depth", [3, -1, Choice("depth", (1, 3)), Choice("depth", (True,)), Choice("depth", ("1",))])
def test_a_depth_is_a_number_of_blocks(depth: Any) -> None:
    with pytest.raises(InputError, match=r"is not a number of blocks from 0 to 2"):
        Repeat([Plus(1), Plus(2)], depth)


@pytest.mark.parametrize("options", [("a.b", "c"), (0.5, 1.0), ("pop", "keys"), ("type", "float"), ("values", "x")])
def test_any_option_may_name_a_branch(options: tuple[Any, ...]) -> None:
    """An option is any text or number; what torch's ModuleDict cannot use as a key is not the user's business."""
    one = OneOf(Choice("mix", options, ordered=False), {options[0]: Plus(1), options[1]: Plus(2)})
    active = share_active(one)
    for option, wanted in zip(options, (1.0, 2.0), strict=True):
        active["mix"] = option
        assert one(torch.zeros(1)).item() == wanted
    assert set(Supernet(one).space["mix"].options) == set(options)


def test_options_with_equal_texts_stay_two_branches() -> None:
    one = OneOf(Choice("mix", (1, "1"), ordered=False), {1: Plus(1), "1": Plus(2)})
    active = share_active(one)
    found = []
    for option in (1, "1"):
        active["mix"] = option
        found.append(one(torch.zeros(1)).item())
    assert found == [1.0, 2.0]


@pytest.mark.parametrize("training", [True, False])
def test_extracted_containers_keep_the_mode_everywhere(training: bool) -> None:
    """An extracted network in evaluation mode holds no module that says it is training."""
    net = nn.Sequential(
        Repeat([Conv2d(3, 3, 1), nn.Dropout()], Choice("depth", (1, 2))),
        OneOf(Choice("mix", ("a", "b")), a=nn.Dropout(), b=nn.Identity()),
    )
    plain = extract(net.train(training))
    assert {module.training for module in plain.modules()} == {training}
    assert plain(images(1)).shape == (1, 3, 8, 8)
