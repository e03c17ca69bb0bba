from __future__ import annotations

import pytest
import torch
from networks import generator, images, tiny_supernet
from torch import nn

from nasq import Choice, Supernet, elastic
from nasq.elastic.base import elastic_modules
from nasq.elastic.read import read_space, read_space_of
from nasq.errors import InputError


def test_the_active_choices_are_those_of_the_modules_that_run() -> None:
    """Found independently: hooks see which modules run in each random subnet."""
    supernet = tiny_supernet()
    ran: set[str] = set()
    for _, module in elastic_modules(supernet):
        module.register_forward_hook(lambda module, *_: ran.update(choice.name for choice in module.own_choices))
    for seed in range(60):
        subnet = supernet.space.sample(generator(seed))
        ran.clear()
        with supernet.activate(subnet), torch.no_grad():
            supernet(images(1))
        assert set(subnet) == ran


def test_choices_are_tied_by_name_and_found_once() -> None:
    space = tiny_supernet().space
    assert sorted(space.names) == sorted(
        ["width", "kernel", "expand", "depth", "mix", "groups", "stride", *(f"block{i}.kernel" for i in range(3))]
    )
    assert set(space.conditions) == {"block1.kernel", "block2.kernel"}


def test_the_space_of_a_factory_needs_no_weights() -> None:
    made: list[nn.Module] = []
    before = torch.get_rng_state()

    def build() -> nn.Module:
        net = nn.Sequential(
            elastic.Conv2d(3, 4, Choice("k", (3, 5)), kernel_transform=True), nn.Linear(4, 2), nn.GRU(2, 2)
        )
        nn.init.kaiming_normal_(net[0].weight)
        nn.init.uniform_(net[1].weight, 0, 1)
        made.append(net)
        return net

    space = read_space_of(build, "mine")
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        assert space == read_space(build(), "mine")
    assert [{weight.device.type for weight in net.parameters()} for net in made] == [{"meta"}, {"cpu"}]
    assert all(float(weight.detach().std()) > 0 for weight in made[1][1].parameters())


def test_a_factory_that_looks_at_its_weights_is_built_for_real() -> None:
    width = Choice("w", (2, 4))
    space = read_space_of(
        lambda: nn.Sequential(*[nn.Identity()] * int(torch.ones(2).sum()), elastic.Conv2d(3, width, 1))
    )
    assert space.names == ("w",)


def test_equal_but_separate_choices_are_one() -> None:
    net = nn.Sequential(
        elastic.Conv2d(3, Choice("w", (2, 4)), 1), elastic.Conv2d(Choice("w", (2, 4)), Choice("v", (2, 4)), 1)
    )
    supernet = Supernet(net)
    assert supernet.space.names == ("w", "v") and supernet.space.size == 4
    assert supernet.extract({"w": 2, "v": 4})(images(1)).shape[1] == 4


def test_a_name_clash_names_both_modules() -> None:
    net = nn.ModuleDict(
        {"one": elastic.Conv2d(3, Choice("w", (2, 4)), 1), "two": elastic.Linear(3, Choice("w", (2, 8)))}
    )
    with pytest.raises(InputError, match=r"'w' has the options \[2, 4\] in 'one' and \[2, 8\] in 'two'"):
        read_space(net)


def test_a_name_clash_inside_one_module_is_found_too() -> None:
    with pytest.raises(InputError, match=r"'w'"):
        read_space(nn.Sequential(elastic.Conv2d(3, Choice("w", (2, 4)), Choice("w", (3, 5)))))


def test_a_clash_of_defaults_is_a_clash() -> None:
    net = nn.ModuleDict(
        {"one": elastic.Linear(3, Choice("w", (2, 4))), "two": elastic.Linear(3, Choice("w", (2, 4), 2))}
    )
    with pytest.raises(InputError, match=r"'one'.*'two'"):
        read_space(net)


def test_conditions_nest() -> None:
    inner = elastic.Repeat([nn.Identity(), elastic.Conv2d(3, 3, Choice("k", (1, 3)))], Choice("depth", (1, 2)))
    net = elastic.OneOf(Choice("mix", ("deep", "skip")), deep=inner, skip=nn.Identity())
    space = read_space(net)
    assert space.contains({"mix": "skip"}) and space.contains({"mix": "deep", "depth": 1})
    assert space.contains({"mix": "deep", "depth": 2, "k": 3}) and space.size == 1 + 1 + 2
    assert not space.contains({"mix": "skip", "depth": 1}) and not space.contains({"mix": "deep", "depth": 1, "k": 1})


def test_a_module_used_at_two_places_is_active_where_either_is() -> None:
    shared = elastic.Conv2d(3, 3, Choice("k", (1, 3)))
    net = nn.Sequential(
        elastic.OneOf(Choice("a", ("on", "off")), on=shared, off=nn.Identity()),
        elastic.OneOf(Choice("b", ("on", "off")), on=shared, off=nn.Identity()),
    )
    space = read_space(net)
    for a in ("on", "off"):
        for b in ("on", "off"):
            subnet = {"a": a, "b": b} | ({"k": 3} if "on" in (a, b) else {})
            assert space.contains(subnet), subnet
    assert space.size == 3 * 2 + 1


def test_a_shared_module_outside_the_container_is_always_active() -> None:
    shared = elastic.Conv2d(3, 3, Choice("k", (1, 3)))
    net = nn.Sequential(shared, elastic.OneOf(Choice("a", ("on", "off")), on=shared, off=nn.Identity()))
    assert "k" not in read_space(net).conditions


def test_a_network_without_choices_has_one_subnet() -> None:
    supernet = Supernet(nn.Linear(3, 2))
    assert supernet.space.size == 1 and len(supernet.space) == 0
    assert supernet.extract({})(torch.zeros(1, 3)).shape == (1, 2)
