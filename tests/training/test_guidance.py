from __future__ import annotations

import copy

import pytest
import torch
from networks import quantized_supernet, tiny_images

from nasq import Choice
from nasq.data import AugmentPolicy, UniformSampler
from nasq.errors import InputError
from nasq.space import SearchSpace
from nasq.training import Guidance, Path, PathSampler, TrainConfig, Trainer, cross_entropy, distillation, stream
from nasq.training.losses import teachers

SPACE = SearchSpace(
    [
        Choice("depth", (1, 2)),
        Choice("bits", (2, 4, 8)),
        Choice("form", ("symmetric", "asymmetric"), ordered=False),
        Choice("inner.bits", (2, 3)),
    ],
    {"inner.bits": [(("depth", (2,)),)]},
)


def test_the_ends_take_every_number_to_its_end_and_draw_the_forms() -> None:
    """Property 8 of EQ-Net: H uses the largest bits everywhere, L the smallest; forms are drawn for both."""
    sampler = Guidance(SPACE, stream(0, "paths"), paths=2)
    assert isinstance(sampler, PathSampler)
    steps = [sampler.step() for _ in range(40)]
    for paths in steps:
        assert [path.role for path in paths] == ["high", "random", "random", "low"]
        assert all(SPACE.contains(path.subnet) for path in paths)
        high, low = paths[0].subnet, paths[-1].subnet
        assert (high["depth"], high["bits"], high["inner.bits"]) == (2, 8, 3)
        assert (low["depth"], low["bits"]) == (1, 2) and "inner.bits" not in low
    assert {paths[0].subnet["form"] for paths in steps} == {paths[-1].subnet["form"] for paths in steps}
    assert {paths[0].subnet["form"] for paths in steps} == {"symmetric", "asymmetric"}
    assert {paths[1].subnet["bits"] for paths in steps} == {2, 4, 8}


def test_the_low_end_can_weigh_more() -> None:
    paths = Guidance(SPACE, stream(0, "paths"), low_weight=1.5).step()
    assert [path.weight for path in paths] == [1.0, 1.0, 1.5]
    with pytest.raises(InputError, match=r"low_weight is 0; allowed: a number above 0"):
        TrainConfig(sampler="guided", low_weight=0)


def test_the_state_goes_on_where_it_was() -> None:
    one = Guidance(SPACE, stream(0, "paths"))
    one.step()
    state, wanted = one.state_dict(), [one.step() for _ in range(3)]
    other = Guidance(SPACE, stream(5, "paths"))
    other.load_state_dict(state)
    assert [other.step() for _ in range(3)] == wanted
    with pytest.raises(InputError, match="paths is 0; allowed: 1 or more"):
        Guidance(SPACE, stream(0, "paths"), paths=0)


def test_each_is_taught_by_the_one_before_it() -> None:
    assert teachers(Guidance(SPACE, stream(0, "p"), paths=2).step()) == [None, 0, 1, 2]
    subnet = SPACE.largest()
    assert teachers([Path(subnet, "largest"), Path(subnet, "random"), Path(subnet, "smallest")]) == [None, 0, 0]
    assert teachers([]) == []


CONFIG = TrainConfig(
    epochs=1, batch_size=16, lr=0.05, momentum=0.0, weight_decay=0.0, warmup_epochs=0, scheduler="constant",
    clip_norm=None, sampler="guided", bf16=False, channels_last=False,
)  # fmt: skip


def test_one_step_is_three_forwards_and_the_sum_of_three_gradients() -> None:
    """Property 10 of EQ-Net: three forwards, gradients summed, teachers get none; equations 7 and 8 with lambda 0.5."""
    data = tiny_images(16)
    supernet = quantized_supernet(activation_symmetry=("symmetric", "asymmetric"))
    start = copy.deepcopy(supernet).train()
    calls: list[bool] = []
    supernet.module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    Trainer(supernet, data, CONFIG, augment=AugmentPolicy()).run()
    assert calls == [True] * 3

    order = UniformSampler(16, stream(0, "data")).indices(0)
    images, labels = data.normalise(data.train.images[order]), data.train.labels[order]
    total = {name: torch.zeros_like(parameter) for name, parameter in start.named_parameters()}
    taught: torch.Tensor | None = None
    state = torch.random.get_rng_state()
    torch.random.set_rng_state(stream(0, "layers").get_state())
    for path in Guidance(start.space, stream(0, "paths")).step():
        start.zero_grad()
        with start.activate(path.subnet):
            logits = start(images)
            loss = cross_entropy(logits, labels)
            if taught is not None:
                loss = 0.5 * distillation(logits, taught) + 0.5 * loss
            loss.backward()
        taught = logits.detach()
        for name, parameter in start.named_parameters():
            total[name] += 0 if parameter.grad is None else parameter.grad
    torch.random.set_rng_state(state)
    before = dict(start.named_parameters())
    for name, parameter in supernet.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.05 * total[name], rtol=1e-4, atol=1e-6)


def test_a_fixed_teacher_teaches_whom_no_other_teaches() -> None:
    data = tiny_images(16)
    supernet, teacher = quantized_supernet(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    before = copy.deepcopy(teacher.state_dict())
    seen: list[torch.Tensor | None] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, weights: object) -> torch.Tensor:
        seen.append(taught)
        return cross_entropy(logits, labels)

    Trainer(supernet, data, CONFIG, augment=AugmentPolicy(), loss=loss, teacher=teacher).run()
    order = UniformSampler(16, stream(0, "data")).indices(0)
    with torch.no_grad():
        wanted = teacher(data.normalise(data.train.images[order]))
    assert seen[0] is not None and torch.equal(seen[0], wanted)
    assert all(taught is not None and not torch.equal(taught, wanted) for taught in seen[1:])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
