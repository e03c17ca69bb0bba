"""The AutoFormer spaces against closed forms and published numbers."""

from __future__ import annotations

import re

import nasq.search_spaces.autoformer as family
import pytest
import torch
from nasq.search_spaces.autoformer import RELEASED, VARIANTS, autoformer
from networks import generator

from nasq import Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.plugins import space_info

TINY = space_info(autoformer).tiny


def closed_form(name: str) -> int:
    """Parameters of a released subnet, layer by layer: 224 pixels, patches of 16, 1000 classes."""
    release = RELEASED[name]
    e = release.embed
    total = (3 * 16 * 16 + 1) * e + 197 * e + e  # patches, positions, class token
    for heads, ratio in zip(release.heads, release.mlp_ratio, strict=True):
        inner, hidden = 64 * heads, int(ratio * e)
        total += 3 * inner * (e + 1) + e * (inner + 1)
        total += hidden * (e + 1) + e * (hidden + 1)
        total += 2 * 2 * e  # layer norms
        total += 2 * 2 * 30 * 64  # relative positions of keys and of values
    return total + 2 * e + 1000 * (e + 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_released_subnets_have_their_published_parameters(name: str) -> None:
    release = RELEASED[name]
    with torch.device("meta"):  # weights on no device: only sizes are looked at
        plain = Supernet(autoformer(name)).extract(release.subnet())
    params = sum(parameter.numel() for parameter in plain.parameters())
    assert params == closed_form(name)
    # 22.891 and 53.692 are published as 22.9 and 53.7; 5.868 as 5.8, 1.2 % less (see the module's docstring).
    assert abs(params / 1e6 / release.params - 1) < (0.012 if name == "tiny" else 0.0005)


def test_the_docstring_gives_the_sizes_and_counts() -> None:
    said = family.__doc__ or ""
    for name in VARIANTS:
        found = re.search(rf"([\d.]+e\d+) \({name}\)", said)
        with torch.device("meta"):
            space = Supernet(autoformer(name)).space
        options = VARIANTS[name]
        block = len(options.heads) * len(options.mlp_ratio)
        assert space.size == len(options.embed) * sum(block**depth for depth in options.depth)
        assert found is not None and f"{space.size:.2e}" == found[1].replace("e", "e+")
        assert f"{closed_form(name) / 1e6:.3f}" in said


@pytest.fixture(scope="module", params=[False, True], ids=["absolute", "relative"])
def supernet(request) -> Supernet:
    network = autoformer(**{**TINY, "relative_position": request.param})
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(index)))
    return Supernet(network).eval()


def test_extract_is_bit_exact_and_costs_equal_counters(supernet: Supernet) -> None:
    x = torch.randn(2, 3, 16, 16, generator=generator(0))
    model = CostModel(supernet, x)
    rows = supernet.space.sample_batch(20, generator(1))
    costs = model.evaluate(rows)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        plain = supernet.extract(subnet)
        with supernet.activate(subnet):
            assert torch.equal(supernet(x), plain(x))
        assert costs["params"][index] == sum(parameter.numel() for parameter in plain.parameters())
        assert 2 * costs["macs"][index] == counted_macs(plain, x)


def test_a_step_reaches_every_active_parameter(supernet: Supernet) -> None:
    subnet = supernet.space.largest()
    with supernet.activate(subnet):
        supernet(torch.randn(2, 3, 16, 16, generator=generator(0))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in supernet.parameters())
    supernet.zero_grad()


def test_the_class_token_is_the_other_pool() -> None:
    supernet = Supernet(autoformer(**TINY, pool="token")).eval()
    x = torch.randn(1, 3, 16, 16, generator=generator(0))
    kinds = [node.kind for node in CostModel(supernet, x).graph.walk()]
    assert "select" in kinds and "mean" not in kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "smal"}, "unknown variant of autoformer 'smal'. Did you mean 'small'"),
        ({"image_size": 225}, "images of 225 pixels cannot be cut into patches of 16"),
        ({"pool": "max"}, "unknown pool 'max'.*Allowed: mean, token"),
    ],
)
def test_what_cannot_be_is_named(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        autoformer(**arguments)
