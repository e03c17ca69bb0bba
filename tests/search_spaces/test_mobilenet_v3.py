from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import pytest
import torch
from nasq.search_spaces.mobilenet_v3 import PHASES, MobileNetV3, mobilenet_v3
from networks import generator, images, randomise
from torch import nn

from nasq import Subnet, Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.plugins import space_info

DATA = os.environ.get("NASQ_DATA", "")
TINY = space_info(mobilenet_v3).tiny
SHAPE = space_info(mobilenet_v3).tiny_input_shape


def tiny(seed: int = 0, **arguments: object) -> MobileNetV3:
    torch.manual_seed(seed)
    net = mobilenet_v3(**{**TINY, **arguments})
    randomise(net, seed)
    return net.eval()


@pytest.fixture(scope="module")
def full() -> Supernet:
    return Supernet(mobilenet_v3().eval())


def multiple_of_8(channels: float) -> int:
    """The channel rule of MobileNet, written out."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def published(subnet: Subnet, classes: int = 1000) -> tuple[int, int]:
    """Parameters and multiply-adds, counted layer by layer from the published description."""
    params = macs = 0
    side = -(-int(subnet["resolution"]) // 2)

    def conv(inner: int, outer: int, kernel: int, groups: int = 1, norm: bool = True, bias: bool = False) -> None:
        nonlocal params, macs
        weights = outer * (inner // groups) * kernel**2
        params += weights + (2 * outer if norm else 0) + (outer if bias else 0)
        macs += weights * side**2

    def squeeze(channels: int) -> None:
        nonlocal side
        before, side = side, 1
        reduced = multiple_of_8(channels // 4)
        conv(channels, reduced, 1, norm=False, bias=True)
        conv(reduced, channels, 1, norm=False, bias=True)
        side = before

    conv(3, 16, 3)
    conv(16, 16, 3, 16)
    conv(16, 16, 1)
    channels = 16
    stages = [(24, 2, False), (40, 2, True), (80, 2, False), (112, 1, True), (160, 2, True)]
    for stage, (width, stride, excite) in enumerate(stages, 1):
        for block in range(int(subnet[f"stage{stage}.depth"])):
            hidden = channels * int(subnet[f"stage{stage}.{block}.expand"])
            conv(channels, hidden, 1)
            side = -(-side // (stride if block == 0 else 1))
            conv(hidden, hidden, int(subnet[f"stage{stage}.{block}.kernel"]), hidden)
            if excite:
                squeeze(hidden)
            conv(hidden, width, 1)
            channels = width
    conv(160, 960, 1)
    side = 1
    conv(960, 1280, 1, norm=False)
    conv(1280, classes, 1, norm=False, bias=True)
    return params, macs


def test_the_space_has_the_published_size(full: Supernet) -> None:
    assert full.space.size == 7371**5 * 25
    assert f"{7371**5:.3g}" == "2.18e+19"
    assert Supernet(mobilenet_v3(resolutions=())).space.size == 7371**5
    ends = [name.rpartition(".")[2] for name in full.space.names]
    assert {end: ends.count(end) for end in ends} == {"depth": 5, "kernel": 20, "expand": 20, "resolution": 1}


def test_costs_are_those_of_the_published_description(full: Supernet) -> None:
    x = torch.zeros(1, 3, 224, 224)
    model, space = CostModel(full, x), full.space
    subnets = [space.largest(), space.smallest(), *(space.sample(generator(seed)) for seed in range(40))]
    for subnet in subnets:
        found = model.of(subnet)
        assert (found["params"], found["macs"]) == published(subnet)
    largest = model.of(space.largest())
    assert (largest["params"], largest["macs"]) == (7_664_760, 566_170_656)
    for subnet in subnets[:3]:
        plain = full.extract(subnet)
        found = model.of(subnet)
        assert found["params"] == sum(parameter.numel() for parameter in plain.parameters())
        assert found["macs"] == counted_macs(plain, x)


def test_the_wider_network() -> None:
    net = mobilenet_v3(width=1.2)
    widths = [stage.blocks[0].project[0].out_channels for stage in net.stages]
    assert [net.stem[0].out_channels, *widths, net.final_expand[0].out_channels] == [24, 32, 48, 96, 136, 192, 1152]
    assert net.feature_mix[0].out_channels == 1536


def test_extracted_subnets_equal_activated_ones() -> None:
    supernet, x = Supernet(tiny()).eval(), images(2, shape=SHAPE)
    space = supernet.space
    for subnet in [space.smallest(), space.largest(), *(space.sample(generator(seed)) for seed in range(8))]:
        plain = supernet.extract(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))


def test_activations_and_squeeze_excite_are_where_they_were_published() -> None:
    net = mobilenet_v3()
    found = []
    for stage in net.stages:
        block = stage.blocks[0]
        kinds = {type(part).__name__ for part in block.modules()}
        found.append(("Hardswish" in kinds, "SqueezeExcite" in kinds, block.depthwise[0].stride))
        assert all(later.shortcut for later in stage.blocks[1:]) and not block.shortcut
    assert found == [(False, False, 2), (False, True, 2), (True, False, 2), (True, True, 1), (True, True, 2)]
    assert net.first.shortcut and isinstance(net.first.expand, nn.Identity)


def test_sorting_changes_no_function_that_is_in_use() -> None:
    net, x = tiny(stages=2, expansions=(2, 3, 4)), images(2, shape=SHAPE)
    supernet = Supernet(net).eval()
    large = supernet.space.restrict({name: (4,) for name in supernet.space.names if name.endswith("expand")})
    middle = supernet.space.restrict({name: (3, 4) for name in supernet.space.names if name.endswith("expand")})

    def outputs(space: object, seeds: int = 4) -> list[torch.Tensor]:
        found = []
        for seed in range(seeds):
            subnet = space.sample(generator(seed))  # type: ignore[attr-defined]
            with supernet.activate(subnet), torch.no_grad():
                found.append(supernet(x))
        return found

    before = outputs(large)
    net.sort_channels()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, outputs(large), strict=True))
    weight = net.stages[1].blocks[0].project[0].weight
    assert weight.detach().abs().sum((0, 2, 3)).diff().max() <= 0
    before = outputs(middle)
    net.sort_channels(fixed=(3,))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, outputs(middle), strict=True))


def test_the_published_phases_end_with_the_whole_space(full: Supernet) -> None:
    allowed: dict[str, tuple[int, ...]] = {}
    for _, options, epochs in PHASES:
        for word, given in options.items():
            assert set(allowed.get(word, given[-1:])) <= set(given)
            allowed[word] = given
        assert epochs > 0
    for choice in full.space.choices:
        if choice.name != "resolution":  # elastic from the start
            assert choice.options == allowed[choice.name.rpartition(".")[2]]


def test_official_names_both_ways() -> None:
    net = tiny()
    space = Supernet(net).space
    for seed in range(20):
        subnet = space.sample(generator(seed))
        name = net.official_name(subnet)
        assert net.from_official_name(name) == subnet
    subnet = net.from_official_name("d=1-2,e=3-2-2-3,ks=5-3-3-5,r=24")
    assert subnet == Subnet(
        {
            "stage1.depth": 1, "stage1.0.expand": 3, "stage1.0.kernel": 5, "stage2.depth": 2, "stage2.0.expand": 2,
            "stage2.0.kernel": 3, "stage2.1.expand": 3, "stage2.1.kernel": 5, "resolution": 24,
        }
    )  # fmt: skip
    assert net.official_name(subnet) == "d=1-2,e=3-3-2-3,ks=5-5-3-5,r=24"


def test_names_that_do_not_fit_are_refused() -> None:
    net = tiny()
    with pytest.raises(InputError, match=r"is no architecture of this mobilenet_v3. Give d, e, ks, r, as in 'd=2-2,e="):
        net.from_official_name("d=1-2,e=3-2-2-3")
    with pytest.raises(
        InputError, match=r"ks=5-3-3 is not possible .* Give 4 numbers out of 3, 5, with '-' between them"
    ):
        net.from_official_name("d=1-2,e=3-2-2-3,ks=5-3-3,r=24")
    with pytest.raises(InputError, match=r"d=1-4 is not possible .* Give 2 numbers out of 1, 2"):
        net.from_official_name("d=1-4,e=3-2-2-3,ks=5-3-3-5,r=24")
    with pytest.raises(InputError, match=r"the width 0 and 6 stages. Give a width above 0 and 1 to 5 stages"):
        mobilenet_v3(width=0, stages=6)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="set NASQ_DATA to the directory of the public data sets")
def test_the_architectures_of_the_published_latency_table_are_members(full: Supernet) -> None:
    with gzip.open(Path(DATA) / "tables" / "ofa_mbv3_latency.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5000
    net = full.module
    assert isinstance(net, MobileNetV3)
    subnets = [net.from_official_name(f"d={row['d']},e={row['e']},ks={row['ks']},r={row['r']}") for row in rows[:200]]
    assert all(full.space.contains(subnet) for subnet in subnets)
    model = CostModel(full, torch.zeros(1, 3, 224, 224))
    macs = torch.tensor(model.evaluate(full.space.to_rows(subnets))["macs"]).double()
    latency = torch.tensor([float(row["lat_titan_xp_64"]) for row in rows[:200]]).double()
    # At a batch of 64 a GPU is busy computing: its time follows the multiply-adds.
    assert torch.corrcoef(torch.stack([macs, latency]))[0, 1] > 0.95
