from __future__ import annotations

import math

import pytest
import torch
from fake_supernet import FakeSupernet

from nasq.errors import InputError
from nasq.training import TrainConfig
from nasq.training.optim import (
    build_optimizer,
    build_scheduler,
    load_optimizer_state,
    lr_factor,
    optimizer_state,
)


def test_only_parameters_with_two_axes_decay() -> None:
    net = FakeSupernet()
    decays = {
        id(p): group["weight_decay"]
        for group in build_optimizer(net, TrainConfig(weight_decay=0.01)).param_groups
        for p in group["params"]
    }
    expected = {name: 0.01 if p.ndim >= 2 else 0.0 for name, p in net.named_parameters()}
    assert {name: decays[id(p)] for name, p in net.named_parameters()} == expected
    assert {name for name, decay in expected.items() if decay} == {"stem", "mix", "head.weight"}


@pytest.mark.parametrize("scheduler", ["cosine", "constant"])
def test_the_schedule_is_the_closed_form(scheduler: str) -> None:
    config = TrainConfig(epochs=10, lr=0.4, warmup_epochs=2, scheduler=scheduler, optimizer="sgd")
    optimizer = build_optimizer(FakeSupernet(), config)
    schedule = build_scheduler(optimizer, config, steps_per_epoch=5)
    for step in range(50):
        if step < 10:
            expected = 0.4 * (step + 1) / 10
        elif scheduler == "constant":
            expected = 0.4
        else:
            expected = 0.2 * (1 + math.cos(math.pi * (step - 10) / 40))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0 if scheduler == "cosine" else 0.4, abs=1e-12)


def test_no_warmup_starts_at_the_top_and_a_warmup_of_everything_ends_there() -> None:
    assert lr_factor(0, 10, 0, "cosine") == 1
    assert [lr_factor(step, 4, 4, "cosine") for step in range(4)] == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_state_by_name_goes_on_bit_for_bit(kind: str) -> None:
    config = TrainConfig(optimizer=kind, lr=0.01)

    def step(net: FakeSupernet, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in net.named_parameters():
            if name not in {"never", "mix"} or (name == "mix" and seed == 2):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    net = FakeSupernet()
    optimizer = build_optimizer(net, config)
    step(net, optimizer, 0)
    step(net, optimizer, 1)
    state = optimizer_state(optimizer, net)
    assert "never" not in state
    assert "mix" not in state
    copy = FakeSupernet(seed=5)
    copy.load_state_dict(net.state_dict())
    copied = build_optimizer(copy, config)
    step(copy, copied, 7)  # what it remembers must be replaced, not added to
    copy.load_state_dict(net.state_dict())
    load_optimizer_state(copied, copy, state)
    assert optimizer_state(copied, copy).keys() == state.keys()
    for seed in (2, 3):
        step(net, optimizer, seed)
        step(copy, copied, seed)
    for name, value in net.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name]), name
    if kind != "sgd":  # each parameter counts its own steps
        assert optimizer_state(copied, copy)["mix"]["step"].item() == 1
        assert optimizer_state(copied, copy)["stem"]["step"].item() == 4


def test_fused_sgd_equals_the_plain_one_when_parameters_join_late() -> None:
    config = TrainConfig(lr=0.1, weight_decay=0.01)
    fused, plain = FakeSupernet(), FakeSupernet()
    ours = build_optimizer(fused, config)
    groups = [{**group, "params": [], "fused": False} for group in ours.param_groups]
    for p in plain.parameters():
        groups[0 if p.ndim >= 2 else 1]["params"].append(p)
    reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=False)
    for step in range(4):
        for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
            used = name != "mix" or step >= 2
            a.grad = torch.full_like(a, 0.1 * (step + 1)) if used else None
            b.grad = torch.full_like(b, 0.1 * (step + 1)) if used else None
        ours.step()
        reference.step()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_nothing_to_train_and_foreign_state_are_errors() -> None:
    net = FakeSupernet()
    optimizer = build_optimizer(net, TrainConfig())
    with pytest.raises(InputError, match="no parameter 'other'"):
        load_optimizer_state(optimizer, net, {"other": {}})
    with pytest.raises(InputError, match="nothing to train"):
        build_optimizer(net.requires_grad_(False), TrainConfig())
