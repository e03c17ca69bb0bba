"""Sums, pools, concatenations and what keeps its input's grid, in every mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, images
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.quant import calibrate, freeze, quantize
from nasq.quant import program as p
from nasq.quant.arithmetic import add_integers
from nasq.quant.combining import AddProducer, AvgPoolProducer, ConcatProducer
from nasq.quant.forms import ActivationForm
from nasq.quant.passing import Clip, Flatten, MaxPool, Same
from nasq.quant.producers import Producer
from nasq.quant.value import Grid, Recorder, Value

from . import slow

KINDS = [(8, True, True), (4, True, True), (8, False, True), (2, False, True), (8, True, False), (3, True, False)]


class Spec:
    def __init__(self, grid: Grid) -> None:
        self.scale, self.zero_point = grid.fixed()
        self.low, self.high = grid.low, grid.high


def form_of(kind: tuple[int, bool, bool], seed: int) -> ActivationForm:
    form, rng = ActivationForm(*kind), generator(seed)
    with torch.no_grad():
        form.log_step.copy_(torch.log(torch.rand((), generator=rng) * 4 / 2 ** kind[0] + 1e-3))
        if form.zeta is not None:
            form.zeta.copy_(torch.rand((), generator=rng) * 2 ** kind[0])
    return form


def value(kind: tuple[int, bool, bool], seed: int, shape: tuple[int, ...] = (2, 4, 6, 6)) -> Value:
    """Random integers on a random grid."""
    grid = form_of(kind, seed).grid()
    drawn = torch.randint(grid.low, grid.high + 1, shape, generator=generator(seed + 1)).float()
    with torch.no_grad():
        fixed = Grid(grid.step.detach(), float(grid.fixed()[1]), grid.low, grid.high, grid.bits)
    return Value(drawn, "integer", fixed)


def as_fake(x: Value) -> Value:
    return Value(x.real(), "fake", x.grid)


def ints(x: Value) -> Any:
    return x.data.numpy().astype(np.int64)


def same_in_both_forms(module: nn.Module, *given: Value, allowed: int = 0) -> Value:
    """The integer output; the fake form has to give the same but for rounding ties."""
    with torch.no_grad():
        made, fake = module(*given), module(*map(as_fake, given))
    step, zero = made.grid.fixed()
    steps = (torch.round(fake.data / step) + zero - made.data).abs()
    assert float(steps.max()) <= 1 and int((steps > 0).sum()) <= allowed
    return made


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_a_sum_is_onnxruntimes_kernel_in_exact_fractions(seed: int, activation: Any) -> None:
    one, other = value(KINDS[seed % 6], seed), value(KINDS[(seed // 2 + 1) % 6], seed + 50)
    signed = activation == "none"
    producer = AddProducer("add", form_of((8 - seed % 5, signed, seed % 2 == 0 or not signed), seed + 99), activation)
    with torch.no_grad():
        made = producer(one, other)
        grid = producer.output_grid()
    assert np.array_equal(ints(made), slow.add(ints(one), ints(other), Spec(one.grid), Spec(other.grid), Spec(grid)))
    # The order of the operands is part of the kernel; up to the last rounding it is the real sum.
    real = one.real() + other.real()
    real = real if signed else real.clamp(0, 6.0 if activation == "relu6" else None)
    step, zero = grid.fixed()
    inside = real.clamp((grid.low - zero) * step, (grid.high - zero) * step)
    assert float((made.real() - inside).abs().max()) <= 0.501 * step


def test_the_real_numbers_of_a_sum_in_both_forms() -> None:
    different = total = 0
    for seed in range(40):
        one, other = value(KINDS[seed % 6], seed, (4, 4, 8, 8)), value(KINDS[(seed + 2) % 6], seed + 1, (4, 4, 8, 8))
        producer = AddProducer("add", form_of(KINDS[seed % 4], seed + 9), "none")
        with torch.no_grad():
            made, fake = producer(one, other), producer(as_fake(one), as_fake(other))
        steps = (torch.round(fake.data / fake.grid.step) + fake.grid.zero_point - made.data).abs()
        assert float(steps.max()) <= 1
        different, total = different + int((steps > 0).sum()), total + steps.numel()
    assert different <= total / 10_000


def test_a_sum_with_simple_ratios_rounds_half_to_even_behind_the_zero_point() -> None:
    steps, zeros = (torch.tensor(0.5), torch.tensor(0.5), torch.tensor(1.0)), (0.0, 0.0, 1.0)
    a = torch.tensor([1.0, 3.0, 5.0, 7.0])
    # 0.5 + 1 = 1.5 rounds to 2, 1.5 + 1 = 2.5 to 2, 2.5 + 1 = 3.5 to 4, 3.5 + 1 = 4.5 to 4.
    assert add_integers(a, torch.zeros(4), steps, zeros, 0, 255).tolist() == [2, 2, 4, 4]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [((2, 2), (2, 2)), ((3, 2), (1, 2)), None])
def test_average_pools(seed: int, window: Any) -> None:
    x = value(KINDS[seed % 6], seed)
    kind = (8 - seed % 6, True, seed % 2 == 0)
    producer = AvgPoolProducer("pool", form_of(kind, seed + 7), "none", window, window is None and seed % 2 == 0)
    made = same_in_both_forms(producer, x, allowed=2)
    kernel, stride = window or ((6, 6), (1, 1))
    grid = producer.output_grid()
    wanted = slow.average(ints(x), Spec(x.grid), Spec(grid), kernel, stride)
    assert np.array_equal(ints(made), wanted.reshape(ints(made).shape))


@pytest.mark.parametrize("seed", range(12))
def test_a_concatenation_requantizes_each_input(seed: int) -> None:
    one, other = value(KINDS[seed % 6], seed), value(KINDS[(seed + 1) % 6], seed + 1, (2, 3, 6, 6))
    producer = ConcatProducer("cat", form_of((8 - seed % 6, True, seed % 2 == 0), seed + 7), "none")
    made = same_in_both_forms(producer, one, other, allowed=2)
    out = Spec(producer.output_grid())
    wanted = [slow.onto(ints(x), Spec(x.grid), out) for x in (one, other)]
    assert np.array_equal(ints(made), np.concatenate(wanted, 1))


def test_an_input_already_on_the_grid_of_a_concatenation_is_copied() -> None:
    form = form_of((4, True, True), 3)
    x = Value(value((4, True, True), 5).data, "integer", form.grid())
    made = ConcatProducer("cat", form, "none")(x, x)
    assert torch.equal(made.data, torch.cat([x.data, x.data], 1))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_an_activation_behind_a_quantized_tensor_clips_its_integers(activation: Any) -> None:
    """And the fake form stays on the grid: six is seldom a multiple of the step."""
    for seed in range(24):
        drawn = value(KINDS[seed % 6], seed)
        grid = Grid(drawn.grid.step * 20, drawn.grid.zero_point, drawn.grid.low, drawn.grid.high, drawn.grid.bits)
        x = Value(drawn.data, "integer", grid)
        made = same_in_both_forms(Clip("clip", activation), x)
        step, zero = grid.fixed()
        high = min(grid.high, zero + round(6 / step)) if activation == "relu6" else grid.high
        assert np.array_equal(ints(made), ints(x).clip(max(grid.low, zero), high))
        fake = Clip("clip", activation)(as_fake(x)).data
        assert torch.equal(fake, made.real()), f"the fake form left the grid of seed {seed}"


def test_max_pool_keeps_the_grid_and_padding_never_wins() -> None:
    for kind in KINDS:
        x = value(kind, 4)
        pool = MaxPool("pool", (3, 3), (2, 2), (1, 1))
        made = same_in_both_forms(pool, x)
        assert made.grid is x.grid
        assert np.array_equal(ints(made), slow.windows(ints(x), (3, 3), (2, 2), (1, 1), fill=-1000).max(-1))


def test_flatten_and_identity_keep_everything() -> None:
    x = value(KINDS[0], 0)
    assert torch.equal(Flatten("f")(x).data, x.data.flatten(1)) and Flatten("f")(x).grid is x.grid
    assert Same()(x) is x and Same(nn.Dropout(0.5).eval())(x) is x


def test_dropout_acts_in_training_and_vanishes_in_evaluation() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x), 0.5, self.training)

    for net in (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5)), Functional()):
        network, x = quantize(net, images(1)), images(2)
        calibrate(network, x)
        network.train()
        dropped = (network(x) == 0).float().mean().item()
        assert not torch.equal(network(x), network(x)) and dropped > 0.3, type(net).__name__
        network.eval()
        assert torch.equal(network(x), network(x)) and [type(op) for op in freeze(network).ops] == [p.Input, p.Conv]


def test_relu6_bounds_of_a_producer() -> None:
    producer = Producer("p", ActivationForm(8, False, True), "relu6")
    for step, high in ((0.05, 120), (6 / 255, 255), (1.0, 6), (4.0, 2), (0.001, 255)):
        with torch.no_grad():
            producer.quantizer.form().log_step.fill_(float(np.log(step)))
        grid = producer.output_grid()
        assert (grid.low, grid.high) == (0, high)
        x = torch.linspace(-3, 30, 1001)
        fake = producer.finish(x, Value(x, "fake")).data.detach()
        wanted = (x / grid.step).round().clamp(0, high) * grid.step
        assert float((fake - wanted).detach().abs().max()) <= 1e-5


def test_relu_of_a_signed_producer_starts_at_real_zero() -> None:
    producer = Producer("p", ActivationForm(4, True, True), "relu")
    grid = producer.output_grid()
    assert (grid.low, grid.high, grid.zero_point) == (128, 135, 128.0)


def test_values_know_their_real_numbers() -> None:
    grid = Grid(torch.tensor(0.5), 3.0, 0, 15, 4)
    x = Value(torch.tensor([3.0, 4.0, 0.0]), "integer", grid)
    assert x.real().tolist() == [0.0, 0.5, -1.5] and x.centred().tolist() == [0, 1, -3] and grid.fixed() == (0.5, 3)
    assert Value(x.data, "fake", grid).real() is x.data
    assert x.on(x.data, None).mode == "integer" and x.on(x.data, None).grid is None
    recorder = Recorder()
    spec = recorder.spec(Value(torch.zeros(2, 3, 4), "integer", grid), grid)
    assert spec == p.Tensor("t0", (3, 4), 0.5, 3, 0, 15, 4)
