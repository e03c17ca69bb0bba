from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nasq import Subnet
from nasq.errors import ArtifactError, InputError
from nasq.ranking.table import Table
from nasq.run.assemble import Workshop
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop, prepare, stage
from nasq.run.search import Evaluation
from nasq.run.table_rank import rank_supernet, with_largest_bits
from nasq.supernet import Supernet
from nasq.training.region import Region
from nasq.training.splitting import Forest
from tests.run.tiny import Call, refused

SETTINGS = [
    "data.validation=1200", "check_target=false", "threads=1", "warmup=null", "train.epochs=1", "train.warmup_epochs=0",
    "train.sampler=uniform", "train.distill=0", "train.from_scratch=true", "train.bf16=false", "train.channels_last=false",
    "quantization.calibration_images=64", "search.recalibration_images=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose supernet is trained, barely, and nothing else."""
    path = tmp_path_factory.mktemp("ranked") / "run"
    config = load_config(None, None, SETTINGS)
    with RunDirectory.create(path, config, resume=False) as run:
        stage(run, prepare(config), "train")
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def opened(copied: Path) -> tuple[RunDirectory, Workshop]:
    run = RunDirectory.open(copied)
    return run, open_workshop(run)


def architectures(workshop: Workshop, count: int) -> list[Subnet]:
    """Random ones: the choices of the space that are no bits."""
    space = workshop.supernet.space
    subnets = space.to_subnets(space.sample_batch(count, torch.Generator().manual_seed(0)))
    return [Subnet({n: o for n, o in one.items() if "_bits" not in n}) for one in subnets]


def test_a_table_of_architectures_is_ranked_at_the_largest_bits(opened: tuple[RunDirectory, Workshop]) -> None:
    run, workshop = opened
    subnets = architectures(workshop, 6)
    table = Table({"acc": np.arange(6.0)}, subnets=subnets)
    seen: list[tuple[int, int]] = []
    found, scores = rank_supernet(run, workshop, table, on_subnet=lambda *at: seen.append(at), resamples=5)
    assert [score.name for score in found.scores] == ["inherited", "params", "flops"] and found.subnets == 6
    assert seen[-1] == (6, 6)
    evaluation = Evaluation(workshop)
    for subnet, value in zip(subnets, scores.metrics["inherited"], strict=True):
        full = with_largest_bits(workshop.supernet.space, subnet)
        assert {option for name, option in full.items() if name.endswith("weight_bits")} == {8}
        assert value == pytest.approx(100 * evaluation.accuracy(full))
    assert Table.read(run.path / "ranking" / "scores.csv").subnets == subnets


def test_a_forest_ranks_each_subnet_with_its_own_leaf(opened: tuple[RunDirectory, Workshop]) -> None:
    run, workshop = opened
    first = workshop.supernet
    assert isinstance(first, Supernet)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    regions = Region(first.space, {}).split("stem.width", [[0], [1, 2]])
    Forest(regions, [first, second]).save(run.forest)
    workshop = open_workshop(run)
    assert isinstance(workshop.supernet, Forest)
    subnets = architectures(workshop, 8)
    table = Table({"acc": np.arange(8.0)}, subnets=subnets)
    _, scores = rank_supernet(run, workshop, table, resamples=5)
    leaves = scores.metrics["leaf"]
    assert [subnet["stem.width"] == 16 for subnet in subnets] == (leaves == 0).tolist() and len(set(leaves)) == 2
    evaluation = Evaluation(workshop)
    for subnet, value in zip(subnets, scores.metrics["inherited"], strict=True):
        full = with_largest_bits(workshop.supernet.space, subnet)
        assert value == pytest.approx(100 * evaluation.accuracy(full))
    assert len(set(scores.metrics["inherited"][leaves == 1])) == 1  # all weights zero: one class always
    # A leaf that changed is evaluated again: what was kept belongs to other weights.
    before = {path.name for path in (run.path / "ranking").glob("inherited-*")}
    second.load_state_dict(first.state_dict())
    Forest(regions, [first, second]).save(run.forest)
    _, again = rank_supernet(run, open_workshop(run), table, resamples=5)
    after = {path.name for path in (run.path / "ranking").glob("inherited-*")}
    assert len(before) == 1 and len(after) == 2
    np.testing.assert_array_equal(again.metrics["inherited"][leaves == 0], scores.metrics["inherited"][leaves == 0])


def test_subnets_with_bits_are_taken_as_they_are_and_kept(opened: tuple[RunDirectory, Workshop]) -> None:
    run, workshop = opened
    space = workshop.supernet.space
    subnets = space.to_subnets(space.sample_batch(5, torch.Generator().manual_seed(1)))
    table = Table({"acc": np.arange(5.0)}, subnets=subnets)
    _, scores = rank_supernet(run, workshop, table, resamples=5)
    assert scores.metrics["inherited"][0] == pytest.approx(100 * Evaluation(workshop).accuracy(subnets[0]))
    [file] = (run.path / "ranking").glob("inherited-*.jsonl")
    # Goes on from what is there, without a line that a kill cut short: a changed value shows that nothing is done again.
    lines = file.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "accuracy": 12.5})
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])
    _, again = rank_supernet(run, workshop, table, resamples=5)
    assert again.metrics["inherited"].tolist() == [12.5, *scores.metrics["inherited"][1:].tolist()]
    assert len(file.read_text().splitlines()) == 5
    file.write_text("x\n")
    with pytest.raises(ArtifactError, match=r"is damaged: .*Delete it"):
        rank_supernet(run, workshop, table)


def test_a_sample_of_the_table_and_refusals(opened: tuple[RunDirectory, Workshop]) -> None:
    run, workshop = opened
    table = Table({"acc": np.arange(8.0)}, subnets=architectures(workshop, 8))
    found, scores = rank_supernet(run, workshop, table, count=5, resamples=5)
    assert found.subnets == len(scores) == 5
    wrong = Table({"acc": np.ones(1)}, subnets=[Subnet({"stem.width": 7})])
    with pytest.raises(
        InputError, match=r"row 1 of the table is not in the space: choice 'stem\.width' has no option 7"
    ):
        rank_supernet(run, workshop, wrong)
    with pytest.raises(InputError, match="unknown metric of the table 'test'"):
        rank_supernet(run, workshop, table, "test")


def test_the_command(copied: Path, tmp_path: Path, call: Call) -> None:
    workshop = open_workshop(RunDirectory.open(copied))
    Table({"acc": np.arange(5.0)}, subnets=architectures(workshop, 5)).write(tmp_path / "t.csv")
    done = call("rank-supernet", copied, "--table", tmp_path / "t.csv", "--resamples", 5, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["scores"][0]["score"] == "inherited"
    refused(call("rank-supernet", tmp_path, "--table", tmp_path / "t.csv"), "holds no run")
    refused(call("rank-supernet", copied, "--table", tmp_path / "none.csv"), "none.csv is missing")
