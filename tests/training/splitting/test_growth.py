from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.data import DataSet, Split
from nasq.errors import ArtifactError, InputError
from nasq.space import SearchSpace
from nasq.training import TrainConfig, stream
from nasq.training.importance import ImportancePaths
from nasq.training.splitting.growth import ForestTrainer
from nasq.training.splitting.plan import SplitPlan, check_plan


class Net(nn.Module):
    """Two operator choices and a width; 4 x 3 x 2 = 24 subnets."""

    def __init__(self) -> None:
        super().__init__()
        width = Choice("width", (3, 6))
        self.stem = elastic.Conv2d(1, width, 3)
        self.norm = elastic.BatchNorm2d(width)
        branches = {"skip": nn.Identity(), "one": elastic.Conv2d(width, width, 1)}
        wide = {"three": elastic.Conv2d(width, width, 3, padding="same"), "relu": nn.ReLU()}
        self.a = elastic.OneOf(Choice("a", ("skip", "one", "three", "relu")), {**branches, **wide})
        more = {"skip": nn.Identity(), "one": elastic.Conv2d(width, width, 1), "relu": nn.ReLU()}
        self.b = elastic.OneOf(Choice("b", ("skip", "one", "relu")), more)
        self.head = elastic.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.b(self.a(x)).mean((2, 3)))


def _build(name: str = "") -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=stream(0, f"init{name}"))))
        return Supernet(Net())


def _data() -> DataSet:
    generator = torch.Generator().manual_seed(0)

    def part(count: int, first: int) -> Split:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 60, (count, 1, 6, 6), generator=generator) + 45 * labels[:, None, None, None]
        return Split(images.to(torch.uint8), labels, torch.arange(first, first + count))

    return DataSet.from_splits("toy", ["a", "b", "c", "d"], part(64, 0), part(16, 64), part(16, 80))


CONFIG = TrainConfig(epochs=4, batch_size=16, lr=0.05, paths=1, sampler="uniform", distill=0.0, warmup_epochs=0.0)


def _grow(directory: Path, plan: SplitPlan, **options: Any) -> ForestTrainer:
    return ForestTrainer(_build, _data(), options.pop("config", CONFIG), directory, plan, **options)


PLAN = SplitPlan(epochs=(1, 2), repetitions=3, batch_size=8)


def test_every_subnet_belongs_to_one_leaf_and_no_choice_is_split_twice(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    forest = _grow(tmp_path, PLAN, on_event=events.append).run()
    assert len(forest.supernets) == 4
    sizes = [0] * 4
    for row in forest.space.sample_batch(1500, torch.Generator().manual_seed(0)):
        sizes[forest.index(forest.space.to_subnet(row))] += 1
    assert all(sizes)
    splits = {event["leaf"]: event for event in events if event["event"] == "split"}
    assert sorted(splits) == ["", "0", "1"]
    for leaf in ("0", "1"):
        assert splits[leaf]["choice"] != splits[""]["choice"]
        assert splits[""]["choice"] not in splits[leaf]["separations"]
    for split in splits.values():
        assert split["separations"][split["choice"]] == max(split["separations"].values())
    # Each leaf's options of each choice: the groups of its own way, no others.
    for index, region in enumerate(forest.regions):
        way = f"{index:02b}"
        for depth in (0, 1):
            split = splits[way[:depth]]
            assert set(region.allowed[split["choice"]]) == set(split["groups"][int(way[depth])])


def test_children_begin_where_the_parent_was(tmp_path: Path) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    trainer = _grow(tmp_path, SplitPlan(epochs=(2,), repetitions=2, batch_size=8))
    original = trainer.paths

    def paths(supernet: Supernet, region: Any, generator: torch.Generator) -> Any:
        sampler = original(supernet, region, generator)
        begin = sampler.on_epoch

        def on_epoch(epoch: int) -> None:
            state = {name: value.clone() for name, value in supernet.state_dict().items()}
            seen.setdefault(f"{sorted(region.allowed.items())}@{epoch}", state)
            begin(epoch)

        sampler.on_epoch = on_epoch
        return sampler

    trainer.paths = paths
    forest = trainer.run()
    children = [state for key, state in seen.items() if key.endswith("@2")]
    assert len(children) == 2
    assert all(torch.equal(children[0][name], value) for name, value in children[1].items())
    first, second = (forest.supernet(index).state_dict() for index in (0, 1))
    assert any(not torch.equal(first[name], value) for name, value in second.items())
    # Each leaf went on for the epochs that were left, with the optimizer's momentum of its parent.
    assert {key.rpartition("@")[2] for key in seen} == {"0", "1", "2", "3"}


def test_after_a_restart_leaves_have_weights_of_their_own(tmp_path: Path) -> None:
    plan = SplitPlan(epochs=(1,), repetitions=2, batch_size=8, restart=True)
    events: list[dict[str, Any]] = []
    _grow(tmp_path, plan, on_event=events.append).run()
    epochs = [event["epoch"] for event in events if event["event"] == "epoch" and event["leaf"] == "1"]
    assert epochs == [1, 2, 3, 4]


def test_an_exhaustive_split_gives_every_option_a_leaf(tmp_path: Path) -> None:
    plan = SplitPlan(epochs=(1,), groups=None, repetitions=1, batch_size=8, choices=("a",))
    forest = _grow(tmp_path, plan).run()
    assert [region.allowed["a"] for region in forest.regions] == [("skip",), ("one",), ("three",), ("relu",)]


def test_each_leaf_keeps_an_importance_of_its_own(tmp_path: Path) -> None:
    made: list[ImportancePaths] = []

    def paths(supernet: Supernet, region: Any, generator: torch.Generator) -> ImportancePaths:
        made.append(ImportancePaths(supernet, generator, CONFIG.epochs, region=region))
        return made[-1]

    forest = _grow(tmp_path, SplitPlan(epochs=(2,), repetitions=2, batch_size=8), paths=paths).run()
    for sampler, region in zip(made[1:], forest.regions, strict=True):
        (name,) = region.allowed
        p = sampler.distribution(name)
        assert {option for option, share in p.items() if share > 0} == set(region.allowed[name])
        assert sum(p.values()) == pytest.approx(1)
        assert all(region.contains(sampler.step()[0].subnet) for _ in range(20))


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("after", [1, 3, 4, 6, 9])
def test_killed_and_run_again_it_is_the_same_forest(tmp_path: Path, after: int) -> None:
    wanted = _grow(tmp_path / "whole", PLAN).run()
    count = 0

    def kill(event: dict[str, Any]) -> None:
        nonlocal count
        count += event["event"] in {"epoch", "split"}
        if count == after:
            raise Killed

    with pytest.raises(Killed):
        _grow(tmp_path / "killed", PLAN, on_event=kill).run()
    found = _grow(tmp_path / "killed", PLAN).run()
    assert [region.allowed for region in found.regions] == [region.allowed for region in wanted.regions]
    for index in range(4):
        state = found.supernet(index).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in wanted.supernet(index).state_dict().items())


def test_bad_plans_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"epochs of splits are \[2, 1\]; allowed: 1 or more, ascending"):
        SplitPlan(epochs=(2, 1))
    with pytest.raises(InputError, match="groups is 1; allowed: 2 or more, or None"):
        SplitPlan(groups=1)
    with pytest.raises(InputError, match="repetitions is 0; allowed: 1 or more"):
        SplitPlan(repetitions=0)
    with pytest.raises(InputError, match="last split is after epoch 4 of 4"):
        _grow(tmp_path, SplitPlan(epochs=(4,)))
    plan = SplitPlan(epochs=(1, 2), repetitions=1, batch_size=8, choices=("a",))
    with pytest.raises(InputError, match=r"2 splits are planned, and 1 choices .* may be split \(a\)"):
        _grow(tmp_path, plan)
    with pytest.raises(InputError, match=r"choice to split 'aa'.*'a'"):
        _grow(tmp_path, SplitPlan(epochs=(1,), choices=("aa",)))
    space = SearchSpace([Choice("a", ("one", "two")), Choice("only", ("one",))])
    with pytest.raises(InputError, match=r"'only' has one option, 'one': there is nothing to split. Leave it out"):
        check_plan(SplitPlan(epochs=(1,), choices=("a", "only")), CONFIG, space)


def test_another_growth_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    _grow(tmp_path, SplitPlan(epochs=(1,), repetitions=1, batch_size=8)).run()
    with pytest.raises(InputError, match="grown with other settings"):
        _grow(tmp_path, SplitPlan(epochs=(2,), repetitions=1, batch_size=8))
    (tmp_path / "splits.json").write_text(json.dumps([1]))
    with pytest.raises(ArtifactError, match="does not describe a growth"):
        _grow(tmp_path, PLAN)
