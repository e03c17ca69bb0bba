"""The integer form of a layer against a slow re-computation from the law: int64, float64, exact fractions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, images, quantized_supernet, randomise
from torch import Tensor, nn

from nasq import Supernet, elastic
from nasq.quant import calibrate, freeze, quantize
from nasq.quant import program as p
from nasq.quant.arithmetic import EXACT, integer_layer, is_wide
from nasq.quant.network import QuantizedNetwork
from nasq.quant.producers import InputProducer, LayerProducer, Producer
from nasq.quant.value import Grid, Value

from . import slow

f32, f64 = np.float32, np.float64


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """One layer of each form, with what follows it, and the shape of its input."""
    return {
        "conv": (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (4, 6, 6)),
        "conv with bias": (nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (4, 7, 7)),
        "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(4)), (4, 6, 6)),
        "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU6()), (4, 6, 6)),
        "no affine": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), nn.ReLU()), (4, 5, 5)),
        "no norm": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU()), (4, 5, 5)),
        "norm alone": (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), (4, 5, 5)),
        "linear": (nn.Sequential(nn.Linear(12, 7)), (12,)),
    }


def build(
    form: str, bits: tuple[int, int], seed: int = 0, signed: bool = True, grain: str = "channel"
) -> QuantizedNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, shape = layers()[form]
    randomise(net, seed)
    network = quantize(
        net, torch.zeros(1, *shape), weight_bits=(bits[0],), activation_bits=(bits[1],), weight_granularity=(grain,),
        first_last_bits=None,
    )  # fmt: skip
    calibrate(network, images(32, seed, shape=shape) if signed else images(32, seed, shape=shape).abs())
    return network.eval()


def producer_of(network: QuantizedNetwork) -> LayerProducer:
    (found,) = [module for module in network.modules() if isinstance(module, LayerProducer)]
    return found


def numbers(tensor: Tensor | None, count: int, default: float) -> Any:
    return np.full(count, default) if tensor is None else tensor.detach().double().numpy()


def affine(producer: LayerProducer, count: int) -> tuple[Any, Any]:
    """Slope and offset behind the accumulator, from the numbers of the layers alone (section 3 of the law)."""
    bias = numbers(getattr(producer.layer, "bias", None), count, 0.0)
    norm = producer.norm
    if norm is None:
        return np.ones(count), bias
    gamma, beta = numbers(norm.weight, count, 1.0), numbers(norm.bias, count, 0.0)
    k = gamma / np.sqrt(numbers(norm.running_var, count, 1.0) + norm.eps)
    return k, beta - k * (numbers(norm.running_mean, count, 0.0) - bias)


def weights(producer: LayerProducer, count: int, k: Any) -> tuple[Any, Any]:
    """Integer weights and their fp32 steps ``[count]``."""
    form = producer.weight_quantizer.form()
    w = (
        np.ones((count, 1, 1, 1), f32)
        if not hasattr(producer.layer, "weight")
        else producer.layer.weight.detach().numpy()
    )
    step = np.broadcast_to(form.step(count).detach().numpy(), (count,)).astype(f32)
    column = (-1, *[1] * (w.ndim - 1))
    sign = np.where(k < 0, -1, 1).astype(f32).reshape(column)
    q = np.rint(sign * w / step.reshape(column))
    return np.clip(q, -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1).astype(np.int64), step


class Spec:
    """A grid as the slow executor reads it."""

    def __init__(self, grid: Grid) -> None:
        self.scale, self.zero_point = grid.fixed()
        self.low, self.high = grid.low, grid.high


def check(network: QuantizedNetwork, x: Tensor) -> dict[str, Any]:
    """Compares one layer's integers, scales, biases and outputs with the slow ones; returns what was found."""
    producer = producer_of(network)
    caught: list[tuple[Value, Value]] = []
    hook = producer.register_forward_hook(lambda _, given, made: caught.append((given[0], made)))
    network.run(x, "integer")
    hook.remove()
    ((given, made),) = caught
    assert given.grid is not None and made.grid is not None
    source, out = Spec(given.grid), Spec(made.grid)
    with torch.no_grad():
        found = producer.integers(given, made.grid)
    count = len(found.weight)
    k, offset = affine(producer, count)
    q_w, step = weights(producer, count, k)
    scale = (step.astype(f64) * np.abs(k)).astype(f32)
    bits = producer.weight_quantizer.form().bits
    shift = found.shift.numpy().astype(np.int64)
    assert (shift >= 0).all() and (shift <= max(8 - bits, 0)).all()
    unit = (f32(source.scale) * found.scale.numpy()).astype(f32).astype(f64)
    with np.errstate(divide="ignore", invalid="ignore"):
        constant = (np.abs(offset) / (source.scale * scale.astype(f64)) >= EXACT - 1) | (scale == 0)
    live = ~constant & found.weight.numpy().reshape(count, -1).any(1)
    assert np.array_equal(found.weight.numpy()[live], q_w[live].astype(f32))
    assert np.array_equal(found.scale.numpy()[live], (scale.astype(f64) / 2.0**shift).astype(f32)[live])
    assert not found.weight.numpy()[constant].any()
    assert np.array_equal(found.bias.numpy(), np.rint(offset / unit).astype(f32))
    assert (np.abs(found.bias.numpy()) < EXACT).all() and np.isfinite(found.scale.numpy()).all()
    assert (found.scale.numpy() > 0).all()
    used = found.weight.numpy().astype(np.int64) << shift.reshape(-1, *[1] * (q_w.ndim - 1))
    centred = given.data.numpy().astype(np.int64) - source.zero_point
    geometry = _geometry(producer, centred)
    acc = centred @ used.T if geometry is None else slow.convolve(centred, used, *geometry)
    wanted = slow.requantise(acc, found.bias.numpy().astype(np.int64), source.scale, found.scale.numpy(), out)
    assert np.array_equal(made.data.numpy(), wanted.astype(f32))
    # The whole is what the layers compute in real numbers, up to half a step, the grid of the bias and of the weights.
    return {"constant": constant, "live": live, "shift": shift, "found": found, "out": out, "unit": unit,
            "offset": offset, "acc": acc, "made": made.data.numpy(), "wide": is_wide(
                found.shifted, given.grid.low, given.grid.high, int(given.grid.zero_point))}  # fmt: skip


def _geometry(producer: LayerProducer, x: Any) -> tuple[Any, ...] | None:
    layer: Any = producer.layer
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        return (1, 1), (0, 0), (1, 1), x.shape[1]
    return layer.stride, layer.padding, layer.dilation, layer.groups


@pytest.mark.parametrize("form", list(layers()))
@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8), (2, 8), (8, 2), (3, 6)])
@pytest.mark.parametrize("grain", ["channel", "tensor"])
def test_a_layer_computes_the_law(form: str, bits: tuple[int, int], grain: str) -> None:
    for seed in range(2):
        network = build(form, bits, seed, grain=grain)
        found = check(network, images(3, 9, shape=network.example_shape))
        assert found["live"].any() and len(np.unique(found["made"])) > 1


@pytest.mark.parametrize("gammas", [
    [-1.5, 1.0, -0.2, 0.4, -1e-3, 1e-3], [0.0, 1e-6, -1e-6, 1e-9, -1e-12, 1e-30], [0.0] * 6, [-1.0] * 6,
])  # fmt: skip
@pytest.mark.parametrize("bits", [(8, 8), (2, 4)])
def test_negative_tiny_and_zero_scales_of_the_norm(gammas: list[float], bits: tuple[int, int]) -> None:
    network = build("conv", bits)
    norm: Any = producer_of(network).norm
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gammas))
        norm.bias.copy_(torch.tensor([2.0, -1.0, 0.5, 0.25, 3.0, 0.01]))
    x = images(3, 4, shape=(4, 6, 6))
    found = check(network, x)
    # A channel that is constant in the file is nearly constant in real numbers: its output is the offset's integer.
    out = found["out"]
    wanted = np.clip(np.rint(found["offset"] / out.scale) + out.zero_point, out.low, out.high)
    dead = ~found["found"].weight.numpy().reshape(6, -1).any(1)
    assert dead[[abs(gamma) <= 1e-9 for gamma in gammas]].all()
    assert (np.abs(found["made"] - wanted.reshape(1, -1, 1, 1))[:, dead] <= 1).all()
    real = network(x, mode="float").detach().numpy().clip(0, (out.high - out.zero_point) * out.scale)
    error = np.abs((found["made"] - out.zero_point) * out.scale - real)[:, dead]
    assert error.size == 0 or error.max() <= 1.01 * out.scale


def test_constant_channels_and_all_zero_inputs() -> None:
    network = build("conv", (4, 4))
    conv: Any = producer_of(network).layer
    with torch.no_grad():
        conv.weight[1] = 0
        conv.weight[2] = 0.3
    check(network, torch.zeros(2, 4, 6, 6))
    check(network, torch.full((2, 4, 6, 6), 1e6))
    check(network, torch.full((2, 4, 6, 6), -1e6))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_biases_of_any_size_fit(scale: float) -> None:
    network = build("no norm", (4, 4))
    conv: Any = producer_of(network).layer
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -3.0]) * scale)
    found = check(network, images(2, shape=(4, 5, 5)))
    assert np.abs(found["found"].bias.numpy()).max() < EXACT


def test_the_bias_grid_is_fine_where_bits_allow_it() -> None:
    """Behind low-bit weights the grid of the bias is at most 1/16 of an output step, or as fine as int8 weights allow."""
    shifted = 0
    for seed in range(6):
        for bits in ((2, 2), (2, 8), (4, 8), (8, 8)):
            found = check(build("conv", bits, seed), images(1, seed, shape=(4, 6, 6)))
            coarse = found["unit"] > found["out"].scale / 16 * 1.0001
            fits = np.abs(found["found"].bias.numpy()) * 2 < EXACT - 1
            assert (~coarse | (found["shift"] == max(8 - bits[0], 0)) | ~fits.all()).all()
            shifted += int(found["shift"].any())
            used = found["found"].shifted
            assert float(used.min()) >= -128 and float(used.max()) <= 127
    assert shifted >= 6


def test_wide_accumulators_are_exact() -> None:
    """Above 2^24 an fp32 accumulator would lose bits; the layer switches to float64 and stays equal to int64."""
    net = nn.Sequential(nn.Linear(4096, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.rand(3, 4096, generator=generator(0)) * 0.2 + 0.9)
    network = quantize(net, torch.zeros(1, 4096), weight_bits=(8,), activation_bits=(8,))
    x = images(8, 1, shape=(4096,)).abs() + 1
    calibrate(network, x)
    found = check(network.eval(), x)
    assert found["wide"] and np.abs(found["acc"]).max() > EXACT
    assert [op.wide for op in freeze(network).ops if isinstance(op, p.Linear)] == [True]
    narrow = build("conv", (8, 8))
    assert not check(narrow, images(1, shape=(4, 6, 6)))["wide"]


def test_is_wide_is_the_bound_of_the_law() -> None:
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([100.0, -27.0, 1.0])
    # 128 * max|q - z| against 2^24: the largest magnitude counts, on either side of the zero-point.
    for low, high, zero, wanted in ((0, 255, 0, 255), (0, 255, 200, 200), (0, 255, 128, 128)):
        factor = int(EXACT) // (128 * wanted)
        exactly = weight * factor
        assert is_wide(exactly, low, high, zero) == (128 * factor * wanted >= EXACT)
        assert is_wide(exactly * 2, low, high, zero)


def test_integer_layer_with_power_of_two_steps_is_exact() -> None:
    weight = torch.tensor([[3.0, -8.0], [7.0, 1.0]])
    made = integer_layer(
        weight, torch.tensor(0.25), 4, torch.tensor([2.0, -0.5], dtype=torch.float64),
        torch.tensor([1.0, -3.0], dtype=torch.float64), torch.tensor(0.5), torch.tensor(64.0),
    )  # fmt: skip
    assert torch.equal(made.weight, weight) and made.shift.tolist() == [0, 0]
    assert made.scale.tolist() == [0.5, 0.125] and made.bias.tolist() == [4.0, -48.0]


# Whole networks


def subnets(supernet: Supernet, count: int, seed: int = 0) -> Iterator[Any]:
    for index in range(count):
        yield supernet.space.sample(generator(1000 * seed + index))


@pytest.mark.parametrize("activation_symmetry", [("symmetric",), ("symmetric", "asymmetric")])
def test_whole_subnets_equal_the_slow_executor(activation_symmetry: tuple[str, ...]) -> None:
    supernet = quantized_supernet(activation_symmetry=activation_symmetry, weight_granularity=("tensor", "channel"))
    x = images(4, 77)
    for subnet in subnets(supernet, 12):
        with supernet.activate(subnet):
            frozen = freeze(supernet.module)
            integers = supernet.module.integers(x)
        made = slow.run(frozen, x.numpy())[frozen.output.name]
        assert np.array_equal(integers.numpy(), made.astype(np.uint8)), subnet
        assert freeze(supernet.extract(subnet)) is not None


def test_the_extracted_subnet_freezes_to_the_same_program() -> None:
    supernet = quantized_supernet()
    for subnet in subnets(supernet, 4, 3):
        with supernet.activate(subnet):
            one = freeze(supernet.module)
        other = freeze(supernet.extract(subnet))
        assert len(one.ops) == len(other.ops)
        for a, b in zip(one.ops, other.ops, strict=True):
            assert type(a) is type(b) and a.output == b.output and a.inputs == b.inputs and a.path == b.path
            if isinstance(a, p.Linear) and isinstance(b, p.Linear):
                for name in ("weight", "shift", "weight_scale", "bias"):
                    assert np.array_equal(getattr(a, name), getattr(b, name)), (a.path, name)


def test_the_order_of_evaluation_changes_nothing() -> None:
    supernet, x = quantized_supernet(), images(3)
    drawn = list(subnets(supernet, 6, 1))

    def evaluate(order: list[Any]) -> dict[Any, Tensor]:
        found = {}
        for subnet in order:
            with supernet.activate(subnet, supernet.recalibrate(subnet, [images(8, 5)])):
                found[subnet] = supernet.module.integers(x)
        return found

    once, again = evaluate(drawn), evaluate(drawn[::-1])
    assert all(torch.equal(integers, again[subnet]) for subnet, integers in once.items())


def test_memory_format_and_batch_change_no_integer() -> None:
    supernet, x = quantized_supernet(), images(6)
    for subnet in subnets(supernet, 4, 2):
        with supernet.activate(subnet):
            wanted = supernet.module.integers(x)
            assert torch.equal(supernet.module.integers(x.to(memory_format=torch.channels_last)), wanted)
            one_by_one = [supernet.module.integers(x[i : i + 1]) for i in range(len(x))]
            assert torch.equal(torch.cat(one_by_one), wanted)
            supernet.to(memory_format=torch.channels_last)
            assert torch.equal(supernet.module.integers(x.to(memory_format=torch.channels_last)), wanted)
            supernet.to(memory_format=torch.contiguous_format)


def test_autocast_changes_no_integer() -> None:
    supernet, x = quantized_supernet(), images(3)
    wanted = supernet.module.integers(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(supernet.module.integers(x), wanted)


def test_recalibration_changes_scales_and_biases_but_no_weight() -> None:
    supernet = quantized_supernet()
    changed = 0
    for subnet in subnets(supernet, 4, 4):
        with supernet.activate(subnet):
            before = freeze(supernet.module)
        with supernet.activate(subnet, supernet.recalibrate(subnet, [images(16, 8) * 1.3])):
            after = freeze(supernet.module)
        for a, b in zip(before.ops, after.ops, strict=True):
            assert a.output == b.output
            if isinstance(a, p.Linear) and isinstance(b, p.Linear):
                assert np.array_equal(a.weight, b.weight), a.path
                changed += not np.array_equal(a.weight_scale, b.weight_scale)
    assert changed > 10


# Training's form against evaluation's


def caught(network: nn.Module, x: Tensor) -> list[tuple[Producer, tuple[Value, ...], Value]]:
    """Every producer's inputs and output in one integer pass, in order."""
    found: list[tuple[Producer, tuple[Value, ...], Value]] = []
    hooks = [
        module.register_forward_hook(lambda module, given, made: found.append((module, given, made)))
        for module in network.modules() if isinstance(module, Producer)
    ]  # fmt: skip
    with torch.no_grad():
        network.run(x, "integer")
    for hook in hooks:
        hook.remove()
    return found


def differing(producer: Producer, given: tuple[Value, ...], made: Value) -> Tensor:
    """By how many steps the fake form's output differs, given the same integers."""
    if isinstance(producer, InputProducer):
        values = [Value(given[0].data, "fake")]
    else:
        values = [Value(value.real(), "fake", value.grid) for value in given]
    with torch.no_grad():
        fake = producer(*values)
    return (torch.round(fake.data / fake.grid.step) + fake.grid.zero_point - made.data).abs()


def test_fake_and_integer_forms_differ_at_rounding_ties_only() -> None:
    """Section 2 of the law: at most 1 in 10,000 integers of a layer, one step, given equal inputs and frozen BatchNorm."""
    for seed in range(3):
        supernet = quantized_supernet(seed, weight_granularity=("tensor", "channel"))
        totals: dict[str, list[int]] = {}
        for subnet in subnets(supernet, 6, 10 + seed):
            with supernet.activate(subnet):
                for producer, given, made in caught(supernet.module, images(48, seed + 5)):
                    steps = differing(producer, given, made)
                    assert float(steps.max()) <= 1, producer.path
                    count = totals.setdefault(producer.path, [0, 0])
                    count[0] += int((steps > 0).sum())
                    count[1] += steps.numel()
        for path, (different, total) in totals.items():
            assert different <= max(1, total / 10_000), (seed, path, different, total)


def test_small_scales_of_the_norm_are_simulated_too() -> None:
    """Where a bias does not fit 2^24 the channel is constant in the file; training's form has to see that."""
    for gamma in (1e-2, 1e-3, 1e-4, 1e-6):
        network = build("conv", (8, 8))
        norm: Any = producer_of(network).norm
        with torch.no_grad():
            norm.weight.fill_(gamma)
            norm.bias.copy_(torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0, 0.3]))
        calibrate(network, images(32, shape=(4, 6, 6)))
        for producer, given, made in caught(network, images(64, shape=(4, 6, 6))):
            steps = differing(producer, given, made)
            assert int((steps > 0).sum()) <= max(1, steps.numel() / 10_000), (gamma, producer.path)


def test_gradients_reach_weights_norms_and_steps_with_frozen_statistics() -> None:
    network = build("conv", (4, 4)).eval()
    network(images(4, shape=(4, 6, 6)), mode="fake").square().sum().backward()
    producer = producer_of(network)
    for parameter in (
        producer.layer.weight, producer.norm.weight, producer.norm.bias,
        producer.weight_quantizer.form().log_step, producer.quantizer.form().log_step,
    ):  # fmt: skip
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0


def test_elastic_and_plain_layers_give_the_same_integers() -> None:
    plain = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()))
    ours = nn.Sequential(elastic.Conv2d(3, 6, 3), elastic.BatchNorm2d(6), nn.ReLU())
    ours.load_state_dict(plain.state_dict())
    found = []
    for net in (plain, ours):
        network = quantize(net, images(1), weight_bits=(4,), activation_bits=(4,))
        calibrate(network, images(8))
        found.append(network.eval().integers(images(4)))
    assert torch.equal(*found)
