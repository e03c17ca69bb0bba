from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_supernet import FakeSubnet, FakeSupernet, tiny_data

from nasq.data import AugmentPolicy
from nasq.errors import InputError, TrainingError
from nasq.training import MetaTrainer, Path, TrainConfig, Trainer, Uniform, stream

CONFIG = TrainConfig(
    epochs=1, batch_size=32, lr=0.1, bf16=False, channels_last=False, sampler="uniform", distill=0.0, warmup_epochs=0.0,
    scheduler="constant", clip_norm=None, momentum=0.0, weight_decay=0.0,
)  # fmt: skip


class Given(Uniform):
    """The same paths in every step."""

    def __init__(self, space: Any, subnets: list[FakeSubnet]) -> None:
        super().__init__(space, stream(0, "paths"))
        self.subnets = subnets

    def step(self) -> list[Path]:
        return [Path(subnet, "random") for subnet in self.subnets]  # type: ignore[arg-type]


def _meta(net: FakeSupernet, config: TrainConfig, subnets: list[FakeSubnet], **options: Any) -> MetaTrainer:
    sampler = Given(net.space, subnets)
    return MetaTrainer(net, tiny_data(), config, augment=AugmentPolicy(), path_sampler=sampler, **options)


def test_one_inner_step_of_one_path_is_plain_sgd() -> None:
    subnets = [FakeSubnet(4, "conv")]
    plain, meta = FakeSupernet(dropout=0.0), FakeSupernet(dropout=0.0)
    sampler = Given(plain.space, subnets)
    Trainer(plain, tiny_data(), CONFIG, augment=AugmentPolicy(), path_sampler=sampler).run()
    _meta(meta, CONFIG, subnets, inner_steps=1).run()
    for one, other in zip(plain.parameters(), meta.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_step_is_the_mean_of_the_ways_of_the_paths_that_use_a_weight() -> None:
    config = replace(CONFIG, batch_size=96, momentum=0.9, weight_decay=0.01)
    subnets = [FakeSubnet(8, "conv"), FakeSubnet(4, "skip"), FakeSubnet(8, "skip")]
    net = FakeSupernet(dropout=0.0)
    trainer = _meta(net, config, subnets, inner_steps=3, outer_lr=0.5)
    before = copy.deepcopy(net)
    indices = trainer.data_sampler.indices(0)
    images = trainer.data.normalise(trainer.split.images[indices])
    labels = trainer.split.labels[indices]
    trainer.data_sampler.indices = lambda epoch: indices  # type: ignore[method-assign]
    trainer.run()
    ends = []
    for subnet in subnets:
        own = copy.deepcopy(before).train()
        decay = [p for p in own.parameters() if p.ndim >= 2]
        rest = [p for p in own.parameters() if p.ndim < 2]
        optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 0.01}, {"params": rest}], lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            with own.activate(subnet):
                torch.nn.functional.cross_entropy(own(images), labels).backward()
            optimizer.step()
        ends.append(own)
    users = {"mix": [0], "never": []}
    for name, start in before.named_parameters():
        used = users.get(name, [0, 1, 2])
        ways = [dict(ends[index].named_parameters())[name] - start for index in used]
        wanted = start + 0.5 * torch.stack(ways).mean(0) if ways else start
        torch.testing.assert_close(dict(net.named_parameters())[name], wanted, rtol=1e-4, atol=1e-6)


def test_it_learns_and_goes_on_where_it_was(tmp_path: Any) -> None:
    learning = replace(CONFIG, epochs=12, momentum=0.9, lr=0.2)
    history = _meta(
        FakeSupernet(dropout=0.0), learning, [FakeSubnet(8, "conv"), FakeSubnet(8, "skip")], inner_steps=4
    ).run()
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    config = replace(CONFIG, epochs=4, momentum=0.9, lr=0.05)
    whole = FakeSupernet(seed=1)
    MetaTrainer(whole, tiny_data(), config).run()
    MetaTrainer(FakeSupernet(seed=1), tiny_data(), config, tmp_path).run(2)
    again = FakeSupernet(seed=5)
    MetaTrainer(again, tiny_data(), config, tmp_path).run()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_what_it_cannot_do_is_refused() -> None:
    net = FakeSupernet()
    with pytest.raises(InputError, match="inner_steps is 0; allowed: 1 or more"):
        _meta(net, CONFIG, [], inner_steps=0)
    with pytest.raises(InputError, match="outer_lr is 0; allowed: a number above 0"):
        _meta(net, CONFIG, [], outer_lr=0)
    with pytest.raises(InputError, match="optimizer is 'adam', and a MetaTrainer has 'sgd'"):
        _meta(net, replace(CONFIG, optimizer="adam"), [])
    with pytest.raises(InputError, match="gave no subnet"):
        _meta(net, CONFIG, []).run()


def test_a_way_that_is_not_finite_leaves_the_weights_alone() -> None:
    net = FakeSupernet()
    before = copy.deepcopy(net)
    with pytest.raises(TrainingError, match="not moved"):
        _meta(net, replace(CONFIG, lr=1e30), [FakeSubnet(8, "conv")], inner_steps=4).run()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), net.parameters(), strict=True))
