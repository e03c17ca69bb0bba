"""Two processes that share a batch against one that has it alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch
from torch import Tensor

from nasq.data import Augment, AugmentPolicy
from nasq.errors import InputError
from nasq.training import stream
from nasq.training.distributed import World

State = dict[str, Tensor]


@dataclass
class Ranks:
    """What two ranks left behind."""

    directory: Path
    states: list[dict[str, State]]
    facts: list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    directory = tmp_path_factory.mktemp("ranks")
    rank_worker.run(rank_worker.LEARNING, directory / "from_one", until=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(rank_worker.__file__)), str(directory)]
    children = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        )
        for rank in range(2)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    states = [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return Ranks(directory, states, [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)])


def _far(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_two_processes_train_what_one_does(ranks: Ranks) -> None:
    alone, seen = rank_worker.run(rank_worker.SANDWICH)
    assert _far(alone.supernet.state_dict(), rank_worker.build().state_dict()) > 1e-3
    for rank in range(2):
        assert _far(ranks.states[rank]["sandwich"], alone.supernet.state_dict()) < 1e-10
        assert ranks.facts[rank]["world"] == 2
        assert ranks.facts[rank]["seen"]["paths"] == seen["paths"]  # the same subnets on every rank
        assert ranks.facts[rank]["seen"]["indices"] == seen["indices"]
    assert ranks.facts[1]["seen"]["events"] == []
    told = [event for event in ranks.facts[0]["seen"]["events"] if event["event"] == "epoch"]
    for event, own in zip(told, alone.history, strict=True):
        assert event["losses"] == pytest.approx(own["losses"], abs=1e-10)
        assert event["accuracy"] == pytest.approx(own["accuracy"])


def test_it_is_the_same_bits_on_all_ranks_and_every_time(ranks: Ranks) -> None:
    first, second = ranks.states
    for name, value in first["sandwich"].items():
        assert torch.equal(value, second["sandwich"][name])
        assert torch.equal(value, first["again"][name])


def test_gradients_are_sent_once_for_all_subnets_of_a_step(ranks: Ranks) -> None:
    assert [facts["messages"] for facts in ranks.facts] == [ranks.facts[0]["steps"]] * 2


def test_another_number_of_processes_goes_on_with_the_same_streams(ranks: Ranks) -> None:
    whole, seen = rank_worker.run(rank_worker.LEARNING)
    steps = whole.steps_per_epoch
    # One process began, two went on.
    for rank in range(2):
        assert ranks.facts[rank]["rest"]["paths"] == seen["paths"][steps:]
        assert ranks.facts[rank]["rest"]["indices"] == seen["indices"][1:]
        assert _far(ranks.states[rank]["resumed"], whole.supernet.state_dict()) < 1e-10
    # Two processes began, one goes on; importance of paths and of data was that of the whole batch.
    resumed, rest = rank_worker.run(rank_worker.LEARNING, ranks.directory / "from_two")
    assert ranks.facts[0]["paths"]["paths"] == seen["paths"][:steps]
    assert rest["paths"] == seen["paths"][steps:] and rest["indices"] == seen["indices"][1:]
    assert _far(resumed.supernet.state_dict(), whole.supernet.state_dict()) < 1e-10
    assert len(set(map(tuple, seen["indices"]))) == 3


def test_a_batch_that_cannot_be_shared_is_refused(ranks: Ranks) -> None:
    assert "a batch of 15 images cannot be shared equally by 2 processes" in ranks.facts[0]["refused"]
    with pytest.raises(InputError, match=r"multiple of 3, such as 9\."):
        World(0, 3).check_batch(10)
    assert [World(rank, 3).own(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_one_process_sends_nothing() -> None:
    world = World.current()
    assert world == World(0, 1) and world.first
    x = torch.randn(4, 2)
    assert world.gather(x) is x and world.mean(x) is x
    parameter = torch.nn.Parameter(x)
    parameter.grad = x.clone()
    world.average_gradients([parameter])
    world.wait()
    assert torch.equal(parameter.grad, x)


@pytest.mark.parametrize(
    "policy", [AugmentPolicy(flip=True, crop=0.25), AugmentPolicy(rotate=20, shift=0.2, cutout=0.3)]
)
def test_a_part_of_a_batch_changes_as_in_the_whole(policy: AugmentPolicy) -> None:
    images = torch.randint(0, 256, (12, 2, 8, 8), dtype=torch.uint8)
    whole = Augment(policy, stream(0, "augmentation"))(images)
    part = Augment(policy, stream(0, "augmentation"))(images[4:8], of=12, first=4)
    assert torch.equal(part, whole[4:8])
