"""The variance that a training tells with its epochs: its value, and that measuring it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from fake_supernet import FakeSpace, FakeSupernet, tiny_data
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.data import AugmentPolicy, DataSet, Split
from nasq.data.importance import ImportanceSampler
from nasq.errors import InputError
from nasq.run.summary import _training
from nasq.training import ImportancePaths, Sandwich, TrainConfig, Trainer, stream

CONFIG = TrainConfig(
    epochs=4, batch_size=8, lr=0.05, bf16=False, sampler="importance", data_sampler="importance", distill=0.0
)
MEASURED = replace(CONFIG, variance_every=2, variance_paths=2)
FACTORS = {"plain": 1.0, "double": 2.0, "half": 0.5}


class Scaled(nn.Module):
    """An operator with a weight of its own, so that importance has something to see."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _supernet(noisy: bool = True) -> Supernet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, nn.Module] = {name: Scaled(factor) for name, factor in FACTORS.items()}
        choose = elastic.OneOf(Choice("scale", tuple(FACTORS), ordered=False), parts)
        noise = [nn.BatchNorm2d(1), nn.Dropout(0.3)] if noisy else []
        return Supernet(nn.Sequential(*noise, choose, nn.Flatten(), nn.Linear(6, 3)))


def _data(count: int = 24) -> DataSet:
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(count), 0, 0, labels] = 200
    return DataSet.from_splits("lights", ["a", "b", "c"], *[Split(images, labels)] * 3)


def _trainer(config: TrainConfig, directory: FilePath | None = None, noisy: bool = True) -> Trainer:
    return Trainer(_supernet(noisy), _data(), config, directory, augment=AugmentPolicy())


def _without_times(history: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    left_out = {"seconds", "images_per_second", *more}
    return [{key: value for key, value in event.items() if key not in left_out} for event in history]


@pytest.mark.parametrize("sampler", ["importance", "uniform"])
def test_measuring_changes_nothing(sampler: str) -> None:
    plain, measured = (_trainer(replace(config, sampler=sampler)) for config in (CONFIG, MEASURED))
    plain.run()
    history = measured.run()
    assert [("gradient_variance" in event) for event in history] == [False, True, False, True]
    assert _without_times(history, "gradient_variance") == _without_times(plain.history)
    for one, other in zip(plain.supernet.state_dict().values(), measured.supernet.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain.path_sampler.generator.get_state(), measured.path_sampler.generator.get_state())
    assert torch.equal(plain.data_sampler.generator.get_state(), measured.data_sampler.generator.get_state())
    assert torch.equal(plain.augment.generator.get_state(), measured.augment.generator.get_state())


def test_a_resumed_training_measures_the_same(tmp_path: FilePath) -> None:
    straight = _trainer(MEASURED).run()
    _trainer(MEASURED, tmp_path).run(until=1)
    _trainer(MEASURED, tmp_path).run(until=3)
    assert _without_times(_trainer(MEASURED, tmp_path).run()) == _without_times(straight)
    other = replace(MEASURED, variance_every=1, variance_paths=3)  # looking more closely is no other training
    assert len(_trainer(other, tmp_path).run()) == 4


def _exact(trainer: Trainer, paths: dict[str, float], images: Tensor) -> tuple[float, float, float]:
    """Path part, data part and bias of the reweighted gradient over all pairs of a path and an image, in float64."""
    network = trainer.supernet
    network.train()
    count = len(trainer.split)
    means: list[tuple[float, Tensor]] = []
    within, plain = 0.0, torch.zeros(())
    for option, share in paths.items():
        gradients = []
        for index in range(count):
            network.zero_grad()
            with network.activate({"scale": option}):
                x = trainer.data.normalise(trainer.split.images[index : index + 1])
                nn.functional.cross_entropy(network(x), trainer.split.labels[index : index + 1]).backward()
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
            gradients.append(torch.cat([one.double().flatten() for one in flat]))
        each = torch.stack(gradients)
        weighted = each / (len(paths) * share) / (count * images[:, None])
        mean = images @ weighted
        within += share * float(images @ (weighted - mean).square().sum(1)) / trainer.batch_size
        plain = plain + share * (images @ each)
        means.append((share, mean))
    network.zero_grad()
    mean = sum((share * one for share, one in means), torch.zeros(()))
    square = float(mean @ mean)
    between = sum(share * float((one - mean).square().sum()) for share, one in means)
    return between / square, within / square, float((plain - mean).square().sum()) / square


def test_the_numbers_are_those_of_all_pairs_of_a_path_and_an_image() -> None:
    trainer = _trainer(replace(CONFIG, batch_size=4, variance_every=3, variance_paths=300), noisy=False)
    found = trainer.run(until=3)[-1]["gradient_variance"]
    sampler, data = trainer.path_sampler, trainer.data_sampler
    assert isinstance(sampler, ImportancePaths)
    assert isinstance(data, ImportanceSampler) and data.probabilities is not None
    shares = {str(option): share for option, share in sampler.distribution("scale").items()}
    assert max(shares.values()) > 0.4 and float(data.probabilities.std() * 24) > 0.1  # not uniform any more
    even = torch.full((24,), 1 / 24, dtype=torch.float64)
    for draws, paths, images in (
        ("uniform", dict.fromkeys(FACTORS, 1 / 3), even),
        ("own", shares, data.probabilities),
    ):
        path, within, bias = _exact(trainer, paths, images)
        one = found[draws]
        assert one["path"] == pytest.approx(path, rel=0.25, abs=0.1)
        assert one["data"] == pytest.approx(within, rel=0.25)
        assert one["total"] == one["path"] + one["data"]
        assert one["bias"] == pytest.approx(bias, rel=0.5, abs=0.05)


def test_uniform_draws_alone_are_measured_once_and_stay_in_the_leaf() -> None:
    from nasq.training.meter import VarianceMeter
    from nasq.training.region import Region

    supernet, seen = _supernet(), set()
    region = Region(supernet.space, {"scale": ["double", "half"]})
    config = replace(CONFIG, sampler="uniform", data_sampler="uniform", variance_paths=12)
    trainer = Trainer(supernet, _data(), config, path_sampler=_uniform(supernet, region), augment=AugmentPolicy())
    activate = supernet.activate

    def watched(subnet: Any, *more: Any) -> Any:
        seen.add(subnet["scale"])
        return activate(subnet, *more)

    supernet.activate = watched  # type: ignore[method-assign]
    assert set(VarianceMeter(trainer, 12).measure(1)) == {"uniform"}
    assert seen == {"double", "half"}


def _uniform(supernet: Supernet, region: Any) -> Any:
    from nasq.training import Uniform

    return Uniform(supernet.space, stream(0, "paths"), region=region)


def test_what_cannot_be_measured_is_refused_or_left_open() -> None:
    with pytest.raises(InputError, match=r"variance_every is 5; allowed: 0 with sampler 'sandwich'.*'importance'"):
        TrainConfig(variance_every=5)
    with pytest.raises(InputError, match="variance_paths is 1; allowed: an integer, 2 or more"):
        TrainConfig(variance_paths=1)
    config = replace(CONFIG, sampler="uniform", data_sampler="uniform", variance_every=1)
    with pytest.raises(InputError, match="that of one drawn path, and Sandwich draws in another way"):
        Trainer(FakeSupernet(), tiny_data(), config, path_sampler=Sandwich(FakeSpace(), stream(0, "paths")))
    trainer = _trainer(replace(MEASURED, variance_every=1, epochs=1), noisy=False)
    head = trainer.supernet.module[-1]
    for parameter in (head.weight, head.bias):
        parameter.requires_grad_(False)
    for parameter in trainer.supernet.parameters():
        parameter.data.zero_()  # logits are 0, and so is every gradient
    assert trainer.run()[-1]["gradient_variance"]["uniform"] is None


def test_the_report_draws_the_curves() -> None:
    events: list[dict[str, Any]] = [
        {"event": "train.epoch", "phase": "quantized", "epoch": epoch, "losses": {}, "accuracy": {}}
        for epoch in (1, 2, 3)
    ]
    for event, value in zip(events[1:], (3.0, 2.0), strict=True):
        event["gradient_variance"] = {"uniform": {"total": value}, "own": {"total": value / 2} if value < 3 else None}
    drawn = _training(events)
    assert drawn is not None
    assert [(curve.name, list(curve.x), list(curve.y)) for curve in drawn.curves] == [
        ("uniform draws", [2.0, 3.0], [3.0, 2.0]),
        ("own draws, reweighted", [3.0], [1.0]),
    ]
    assert {curve.panel for curve in drawn.curves} == {"Gradient variance over squared mean"}
