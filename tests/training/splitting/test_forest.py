from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.errors import ArtifactError, InputError
from nasq.training.region import Region
from nasq.training.splitting.forest import Forest


class Small(nn.Module):
    """An operator choice with a kernel of its own inside one branch, and a width: 3 x (2 + 1 + 1) = 12 subnets."""

    def __init__(self) -> None:
        super().__init__()
        width = Choice("width", (2, 4, 6), default=4)
        self.stem = elastic.Conv2d(1, width, 1)
        conv = elastic.Conv2d(width, width, Choice("kernel", (1, 3), default=3))
        self.op = elastic.OneOf(Choice("op", ("conv", "relu", "skip")), conv=conv, relu=nn.ReLU(), skip=nn.Identity())
        self.norm = elastic.BatchNorm2d(width)
        self.head = elastic.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.op(self.stem(x))).mean((2, 3)))


def _supernet(seed: int = 0) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Supernet(Small())


def _all_rows(supernet: Supernet) -> np.ndarray:
    return np.unique(supernet.space.sample_batch(2000, torch.Generator().manual_seed(0)), axis=0)


def _forest() -> Forest:
    """Four leaves: split by operator, then one side by kernel and the other by width."""
    first = _supernet()
    conv, rest = Region(first.space, {}).split("op", [[0], [1, 2]])
    regions = [*conv.split("kernel", [[0], [1]]), *rest.split("width", [[0, 2], [1]])]
    return Forest(regions, [first, *(copy.deepcopy(first) for _ in range(3))])


def test_regions_share_out_the_space() -> None:
    forest = _forest()
    rows = _all_rows(forest.supernet(0))
    assert len(rows) == forest.space.size == 12
    inside = np.stack([region.holds(rows) for region in forest.regions], 1)
    assert (inside.sum(1) == 1).all()
    assert inside.sum(0).tolist() == [3, 3, 4, 2]
    assert [forest.index(forest.space.to_subnet(row)) for row in rows] == inside.argmax(1).tolist()


def test_an_inactive_choice_belongs_to_the_leaf_of_its_default() -> None:
    supernet = _supernet()
    small, large = Region(supernet.space, {}).split("kernel", [[0], [1]])
    skip = {"width": 2, "op": "skip"}
    assert large.contains(skip) and not small.contains(skip)
    assert not large.contains({"width": 3, "op": "skip"})  # not in the space at all


def test_samples_stay_inside_and_reach_all_of_the_region() -> None:
    forest = _forest()
    rows = _all_rows(forest.supernet(0))
    for region in forest.regions:
        drawn = region.sample_batch(300, torch.Generator().manual_seed(1))
        assert region.holds(drawn).all()
        assert len(np.unique(drawn, axis=0)) == region.holds(rows).sum()
        assert region.contains(region.sample(torch.Generator().manual_seed(2)))


def test_a_forest_runs_the_weights_that_a_subnet_belongs_to() -> None:
    forest = _forest()
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    for index in range(4):
        with torch.no_grad():
            forest.supernet(index).module.head.bias.fill_(float(index) * 10)
    subnet = forest.space.canonical({"width": 4, "op": "relu"})
    assert forest.index(subnet) == 3
    for _ in range(2):
        bn = forest.recalibrate(subnet, [x])
        forest.eval()
        with forest.activate(subnet, bn), torch.no_grad():
            found = forest(x)
            assert forest.module is forest.supernet(3).module
        own = forest.supernet(3)
        with own.activate(subnet, bn), torch.no_grad():
            assert torch.equal(found, own(x))
        assert torch.equal(forest.extract(subnet, bn).eval()(x), found)
        assert 25 < float(found.detach().mean()) < 35
    before = forest.version
    with torch.no_grad():
        forest.supernet(2).module.head.bias.add_(1)
    assert forest.version != before


def test_a_saved_forest_comes_back(tmp_path: Path) -> None:
    forest = _forest()
    with torch.no_grad():
        forest.supernet(1).module.head.bias.fill_(7.0)
    forest.save(tmp_path)
    loaded = Forest.load(tmp_path, [_supernet(seed) for seed in range(4)])
    assert [region.allowed for region in loaded.regions] == [region.allowed for region in forest.regions]
    for index in range(4):
        for one, other in zip(forest.supernet(index).parameters(), loaded.supernet(index).parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_forest_on_disk_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    forest = _forest()
    forest.save(tmp_path)
    description = json.loads((tmp_path / "forest.json").read_text())
    for change, message in (
        ({"fingerprint": "00"}, "belongs to a space with fingerprint 00"),
        ({"schema": 99}, "does not describe a forest"),
        ({"regions": [{"op": ["nonsense"]}]}, "leaves that this space does not have"),
        ({"regions": [{"colour": ["red"]}]}, "leaves that this space does not have"),
    ):
        (tmp_path / "forest.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(ArtifactError, match=message):
            Forest.load(tmp_path, [_supernet() for _ in range(4)])


def test_leaves_that_do_not_share_out_the_space_are_refused() -> None:
    supernet = _supernet()
    conv = Region(supernet.space, {"op": ["conv"]})
    with pytest.raises(InputError, match="belongs to 0 leaves"):
        Forest([conv], [supernet])
    with pytest.raises(InputError, match="belongs to 2 leaves"):
        Forest([Region(supernet.space, {}), conv], [supernet, copy.deepcopy(supernet)])
    with pytest.raises(InputError, match="one region per supernet; got 1 and 2"):
        Forest([conv], [supernet, supernet])
    with pytest.raises(InputError, match="at least one supernet"):
        Forest([], [])


def test_bad_splits_are_named() -> None:
    region = Region(_supernet().space, {"op": ("relu", "conv")})
    assert region.allowed == {"op": ("conv", "relu")}
    for groups in ([[0], [0, 1]], [[0]], [[0, 1], []]):
        with pytest.raises(InputError, match=r"do not share out the 2 options of 'op'"):
            region.split("op", groups)
    with pytest.raises(InputError, match="a leaf keeps no option of 'op'"):
        Region(_supernet().space, {"op": ()})


def test_a_region_that_is_nearly_empty_says_so() -> None:
    # Inactive in all but one subnet in a hundred thousand, and without its default.
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            part: nn.Module = elastic.Conv2d(1, 1, Choice("kernel", (1, 3), default=3))
            for index in range(16):
                part = elastic.OneOf(Choice(f"gate{index}", ("off", "on")), off=nn.Identity(), on=part)
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)  # type: ignore[no-any-return]

    region = Region(Supernet(Rare()).space, {"kernel": (1,)})
    with pytest.raises(InputError, match="has hardly any subnet: 0 of"):
        region.sample(torch.Generator().manual_seed(0))
