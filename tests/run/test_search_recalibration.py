"""BatchNorm statistics of subnets come from training images as training sees them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nasq.data import Augment, AugmentPolicy, DataSet, Split, load, training_views
from nasq.quant import calibrate
from nasq.run.assemble import Workshop, assemble, recalibration_images
from nasq.run.config import RunConfig, load_config
from nasq.run.search import Evaluation
from nasq.supernet import BNState
from nasq.training import stream

SETTINGS = ["data.validation=1200", "threads=1", "search.recalibration_images=96", "search.batch_size=40"]


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load("digits", validation=1200)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    made = assemble(load_config(None, None, SETTINGS))
    calibrate(made.network, made.data.normalise(made.data.train.images[:32]))
    return made


def config(*changes: str) -> RunConfig:
    return load_config(None, None, [*SETTINGS, *changes])


def flat(state: BNState) -> list[float]:
    return [value for pair in state.statistics.values() for part in pair for value in part.tolist()]


def test_the_views_are_random_training_images_changed_one_by_one(data: DataSet) -> None:
    found = training_views(data, 50, stream(3, "order"), stream(3, "changes"))
    at = torch.randperm(len(data.train), generator=stream(3, "order"))[:50]
    augment = Augment(AugmentPolicy.for_data("digits"), stream(3, "changes"))
    # Image by image from the same stream: a batch's draws are those of its images, one after the other.
    wanted = torch.cat([augment(data.train.images[index : index + 1]) for index in at.tolist()])
    assert torch.equal(found, wanted)
    assert not torch.equal(found, data.train.images[at])


def test_all_images_are_there_once_where_fewer_exist_than_asked_for(data: DataSet) -> None:
    marked = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 4, 4).contiguous()
    few = replace(data, name="unknown", train=Split(marked, torch.zeros(20, dtype=torch.long)))
    found = training_views(few, 1000, stream(0, "order"), stream(0, "changes"))
    assert sorted(found[:, 0, 0, 0].tolist()) == list(range(20))


def test_a_run_draws_them_from_its_seed_alone(data: DataSet) -> None:
    first, again, other = (recalibration_images(config(f"seed={seed}"), data, 96) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    plain = recalibration_images(config("data.recalibration_augment=false"), data, 96)
    assert torch.equal(plain, data.train.images[:96])


def test_every_subnet_sees_the_same_batches_and_a_new_process_sees_them_again(workshop: Workshop) -> None:
    space = workshop.supernet.space
    one, two = space.to_subnets(space.sample_batch(2, np.random.default_rng(0)))
    evaluation = Evaluation(workshop)
    wanted = workshop.data.normalise(recalibration_images(workshop.config, workshop.data, 96))
    assert torch.equal(torch.cat(evaluation.batches), wanted)
    assert [len(batch) for batch in evaluation.batches] == [40, 40, 16]
    evaluation.statistics(one)
    after_one = evaluation.statistics(two)
    fresh = Evaluation(workshop).statistics(two)
    reference = workshop.supernet.recalibrate(two, list(wanted.split(40)))
    assert flat(after_one) == flat(fresh) == flat(reference)


def test_the_former_way_gives_other_statistics(workshop: Workshop) -> None:
    subnet = workshop.supernet.space.largest()
    plain = replace(workshop, config=config("data.recalibration_augment=false"))
    old, new = Evaluation(plain).statistics(subnet), Evaluation(workshop).statistics(subnet)
    assert old.statistics.keys() == new.statistics.keys() and flat(old) != flat(new)
