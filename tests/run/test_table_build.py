from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nasq import Subnet, Supernet
from nasq.errors import InputError
from nasq.ranking.table import Table
from nasq.run.assemble import build_network, load_images
from nasq.run.config import load_config
from nasq.run.table_build import Selection, TableBuild, _draw, accuracy, fresh_subnet
from tests.run.tiny import Call, refused, start

SETTINGS = ["train.epochs=2", "train.batch_size=32", "threads=1", "data.validation=1100"]


def opened(path: Path, *changes: str, count: int = 2, seeds: int = 2, **options: Any) -> TableBuild:
    config = load_config(None, None, [*SETTINGS, *changes])
    options = {"images": 96, "selection": Selection(count), **options}
    selection = options.pop("selection")
    return TableBuild(path, config, selection, seeds, **options)


def outcome(build: TableBuild) -> dict[str, Any]:
    """The results without the times."""
    return {
        f"{subnet.id}-{seed}": {
            key: value for key, value in (build.result(subnet, seed) or {}).items() if key != "seconds"
        }
        for subnet, seed in build.jobs
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> TableBuild:
    build = opened(tmp_path_factory.mktemp("straight") / "work")
    assert build.done() == 0 and build.work() == 4 and build.done() == 4
    return build


class Killed(BaseException):
    """Ends the work after some trainings."""


def test_interrupted_work_goes_on_and_ends_the_same(straight: TableBuild, tmp_path: Path) -> None:
    def stop(event: object) -> None:
        raise Killed

    for done in (1, 2):
        with pytest.raises(Killed):
            opened(tmp_path / "w", listener=stop).work()
        assert opened(tmp_path / "w").done() == done
    told: list[Any] = []
    again = opened(tmp_path / "w", listener=told.append)
    assert again.work() == 2 and len(told) == 2 and again.work() == 0
    assert outcome(again) == outcome(straight)


def test_the_table_holds_means_seeds_and_costs(straight: TableBuild) -> None:
    table = straight.table()
    assert table.subnets == straight.subnets and not table.names and table.column()[0] == "valid_acc"
    results = [[straight.result(subnet, seed) for seed in range(2)] for subnet in straight.subnets]
    for key in ("valid_acc", "test_acc"):
        each = np.array([[100 * one[key] for one in row if one] for row in results])
        assert table.metrics[key] == pytest.approx(each.mean(1))
        assert table.metrics[f"{key}_seed1"] == pytest.approx(each[:, 1])
    for number, subnet in enumerate(straight.subnets):
        plain = Supernet(straight.network).extract(subnet)
        assert table.metrics["params"][number] == sum(p.numel() for p in plain.parameters())
    assert len({json.dumps(one) for one in outcome(straight).values()}) == 4, "every training is one of its own"
    left = {path.name for path in (straight.directory / "jobs").rglob("*") if path.is_file()}
    assert left == {"result.json", ".lock"}, "checkpoints of finished trainings are removed"


def test_two_that_work_at_once_share_the_jobs(straight: TableBuild, tmp_path: Path) -> None:
    counts: list[int] = []
    other = opened(tmp_path / "w")

    def meanwhile(event: object) -> None:
        if not counts:
            counts.append(other.work())

    first = opened(tmp_path / "w", listener=meanwhile)
    own = first.work()
    # While `other` works the first job's lock is still held, and its result is there: the other does the remaining three.
    assert (own, counts) == (1, [3]) and outcome(first) == outcome(straight)


def test_other_settings_in_one_directory_are_refused(straight: TableBuild) -> None:
    for changes, options, words in (
        (["train.lr=0.1"], {}, ["train is", "'lr': 0.05", "there and", "'lr': 0.1"]),
        ([], {"seeds": 3}, ["seeds is 2 there and 3 here"]),
        ([], {"count": 3}, ["selection is {'count': 2, 'file': None} there and {'count': 3"]),
        ([], {"images": 97}, ["data is "]),
    ):
        with pytest.raises(InputError, match="holds the work on another table: ") as caught:
            opened(straight.directory, *changes, **options)
        for word in (*words, "Use the same settings, or another --out"):
            assert word in str(caught.value)


def test_a_training_that_fails_is_kept_as_failed(tmp_path: Path) -> None:
    build = opened(tmp_path / "w", "train.lr=1e30", "train.clip_norm=null", count=1, seeds=1)
    assert build.work() == 1 and build.work() == 0
    [line] = build.failed()
    assert line.startswith(f"{build.subnets[0].id}, seed 0: ") and "nan" in line.lower()
    with pytest.raises(InputError, match=r"no training of .* has ended well yet"):
        build.table()


def test_selections(tmp_path: Path) -> None:
    config = load_config(None, None, SETTINGS)
    data = load_images(config)
    network = build_network(config, data)
    space = Supernet(network, "digits_mobile").space
    drawn = Selection(50).subnets(network, space, 0)
    assert len(set(drawn)) == 50 and all(space.contains(subnet) for subnet in drawn)
    assert drawn == Selection(50).subnets(network, space, 0) != Selection(50).subnets(network, space, 1)
    Table({"acc": np.ones(2)}, subnets=drawn[:2]).write(tmp_path / "named.csv")
    assert Selection(file=tmp_path / "named.csv").subnets(network, space, 0) == drawn[:2]
    small = space.restrict({choice.name: [choice.default] for choice in space.choices if choice.name != "stem.width"})
    assert {subnet["stem.width"] for subnet in Selection().subnets(network, small, 0)} == {16, 24, 32}
    for wanted in (None, 10**9, 0):
        with pytest.raises(InputError, match="It has 979,776; give --count from 1 to 200,000"):
            Selection(wanted).subnets(network, space, 0)
    (tmp_path / "other.csv").write_text('subnet\n"{""a"":1}"\n')
    with pytest.raises(InputError, match=r"row 1 of .*other\.csv is not in the space: unknown choice 'a'"):
        Selection(file=tmp_path / "other.csv").subnets(network, space, 0)


def test_every_subnet_of_a_space_is_found_though_drawing_misses_some() -> None:
    """A chain of conditions: the last of 20 subnets is drawn once in 2^19."""
    from nasq import Choice, SearchSpace

    choices = [Choice(f"c{number}", (0, 1), ordered=False) for number in range(19)]
    conditions = {f"c{number}": [tuple((f"c{i}", frozenset({1})) for i in range(number))] for number in range(1, 19)}
    space = SearchSpace(choices, conditions)
    assert space.size == 20
    assert len(set(_draw(space, 20, np.random.default_rng(0)))) == 20


def test_initial_weights_are_those_of_the_subnet_and_of_the_seed() -> None:
    config = load_config(None, None, SETTINGS)
    data = load_images(config)
    space = Supernet(build_network(config, data)).space
    small = space.smallest()
    first, second, other = (fresh_subnet(config.model_copy(update={"seed": seed}), data, small) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    convolutions = [module for module in first.modules() if isinstance(module, nn.Conv2d)]
    assert not torch.equal(convolutions[0].weight, next(m for m in other.modules() if isinstance(m, nn.Conv2d)).weight)
    for conv in convolutions:
        # Kaiming uniform with a = sqrt 5 over the subnet's own fan-in: within 1/sqrt(fan-in), and filling that range.
        bound = conv.weight[0].numel() ** -0.5
        assert 0.8 * bound < conv.weight.abs().max() <= bound * 1.0001


def test_accuracy_is_counted_over_the_whole_split() -> None:
    config = load_config(None, None, SETTINGS)
    data = load_images(config)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        wanted = (model(data.normalise(data.test.images)).argmax(1) == data.test.labels).double().mean().item()
    assert accuracy(model, data, data.test, batch_size=7) == pytest.approx(wanted)


def test_the_command_refuses_bad_input(tmp_path: Path, call: Call) -> None:
    out = tmp_path / "t.csv"
    refused(call("table", "build", "digits_mobil", "--out", out), "unknown search space 'digits_mobil'")
    refused(call("table", "build", "digits_mobile", "--out", out), "It has 979,776; give --count")
    refused(call("table", "build", "digits_mobile", "--out", out, "--count", 1, "--subnets", out), "Give one of them")
    refused(call("table", "build", "digits_mobile", "--out", out, "--count", 1, "--set", "train.epoch=1"),
            "unknown training setting 'epoch'", "Did you mean 'epochs'?")  # fmt: skip
    refused(call("table", "build", "digits_mobile", "--out", out, "--count", 1, "--train-images", 0), "training images")
    refused(call("table", "build", "digits_mobile", "--out", out, "--count", 1, "--set", "search.evaluations=3"),
            "'search'", "Allowed: data, device, seed")  # fmt: skip
    refused(
        call("table", "build", "digits_mobile", "--out", out, "--subnets", tmp_path / "no.csv"), "no.csv cannot be read"
    )
    refused(call("table", "build", "digits_mobile", "--out", tmp_path, "--count", 1), "is a directory")
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_and_continued_by_two_workers(tmp_path: Path, call: Call) -> None:
    settings = [part for setting in SETTINGS[:3] for part in ("--set", setting)] + ["--set", "train.epochs=3"]
    words = ["table", "build", "digits_mobile", "--count", 3, "--train-images", 160, "--quiet", *settings]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert call(*words, "--out", one).code == 0
    process = start(*words, "--out", two)
    work = tmp_path / "two.csv.work" / "jobs"
    try:
        while process.poll() is None and not (list(work.glob("*/result.json")) and list(work.glob("*/checkpoint*"))):
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not two.exists()
    done = call(*words, "--out", two, "--workers", 2, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["trainings"] == 3
    straight, killed = Table.read(one), Table.read(two)
    assert straight.subnets == killed.subnets
    for name in ("valid_acc", "test_acc", "train_loss", "params", "flops"):
        assert np.array_equal(straight.metrics[name], killed.metrics[name]), name
    assert isinstance(straight.subnets[0], Subnet)
