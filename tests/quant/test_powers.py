"""Steps at powers of two: every scale of the frozen program is one, training computes with the same, gradients flow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.deploy import bundle, onnx, parity
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.quant.arithmetic import STEP_FLOOR, snapped_step
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.layers import Unit
from nasq.quant.producers import LayerProducer
from nasq.quant.program import Linear, Program
from tests.networks import TinyNet, generator, images


def is_power(value: float) -> bool:
    return math.frexp(value)[0] == 0.5


def test_the_nearest_power_in_logarithms_and_the_gradient_of_the_learned_step() -> None:
    log_step = torch.log(torch.tensor([0.26, 0.35, 0.36, 1.41, 1.42, 2.0**-40])).requires_grad_()
    step = snapped_step(log_step)
    assert step.tolist() == [0.25, 0.25, 0.5, 1.0, 2.0, STEP_FLOOR]
    step.sum().backward()
    assert log_step.grad is not None
    assert torch.allclose(log_step.grad[:5], step[:5].detach(), rtol=1e-6)  # that of an exponential, straight-through


def test_step_times_slope_is_the_power() -> None:
    log_step = torch.rand(50, generator=generator(0)) * 8 - 9
    slope = torch.randn(50, generator=generator(1)) * 3
    slope[0] = 0.0
    step = snapped_step(log_step, slope).double()
    power = torch.log2(step * slope.double().abs())[1:]
    assert torch.allclose(power, power.round(), atol=1e-6)
    moved = (step.log2() - log_step.double() / math.log(2)).abs()
    assert float(moved.max()) <= 0.5 + 1e-6 and is_power(float(step[0]))


def network(seed: int) -> tuple[Supernet, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TinyNet()
    x = images(16, seed)
    made = quantize(module, x[:1], weight_bits=(2, 8), activation_bits=(4, 8), power_of_two_steps=True)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(-1.5, 1.5, generator=generator(seed))
                module.weight[0] = 0.0
                module.bias.normal_(generator=generator(seed))
    calibrate(made, x)
    return Supernet(made), x


def expect_powers(program: Program) -> None:
    assert all(is_power(op.output.scale) for op in program.ops)
    scales = np.concatenate([op.weight_scale for op in program.ops if isinstance(op, Linear)])
    assert set(np.frexp(scales)[0]) == {0.5} and len(scales) > 20


@pytest.mark.parametrize("seed", range(2))
def test_every_scale_of_a_subnet_and_its_file(seed: int, tmp_path: Path) -> None:
    supernet, x = network(seed)
    subnet = supernet.space.sample(generator(seed))
    statistics = supernet.recalibrate(subnet, [x])
    supernet.eval()
    with supernet.activate(subnet, statistics):
        made = supernet.module
        assert isinstance(made, QuantizedNetwork)
        wanted, program = made.integers(x), freeze(made)
    expect_powers(program)
    extracted = supernet.extract(subnet, statistics).eval()
    assert isinstance(extracted, QuantizedNetwork) and torch.equal(extracted.integers(x), wanted)
    if seed == 0:
        bundle.write(tmp_path / "b", program, {parity.MODEL: onnx.export(program)})
        report = parity.check(tmp_path / "b", x.numpy(), layer_images=2)
        assert report.differing == 0 and all(layer.differing == 0 for layer in report.layers)


def test_training_with_frozen_statistics_computes_what_the_file_computes() -> None:
    supernet, x = network(1)
    made = supernet.module.eval()
    assert isinstance(made, QuantizedNetwork)
    with supernet.activate(supernet.space.largest()), torch.no_grad():
        integer = made(x, mode="integer")
        # Given equal inputs layers agree but for ties; what a tie moves spreads, so the whole network is compared in steps.
        step = float(made.run(x, "integer").grid.step)  # type: ignore[union-attr]
        assert float((made(x, mode="fake") - integer).abs().median()) <= step


def test_the_steps_learn() -> None:
    supernet, x = network(2)
    supernet.train()
    with supernet.activate(supernet.space.largest()):
        F.cross_entropy(supernet(x), torch.arange(16) % 5).backward()
    grads = {name: one.grad for name, one in supernet.named_parameters() if name.endswith("log_step")}
    used = [grad for grad in grads.values() if grad is not None]
    assert len(used) > 10 and all(bool(grad.isfinite().all()) for grad in used)
    assert sum(bool(grad.any()) for grad in used) > len(used) / 2


def test_a_batch_norm_without_a_layer_keeps_its_slope_within_a_percent() -> None:
    supernet, _ = network(0)
    units = [one for one in supernet.modules() if isinstance(one, LayerProducer) and isinstance(one.layer, Unit)]
    assert units
    slope = torch.rand(40, generator=generator(3)) * 4 + 0.01
    for unit in units:
        form = unit.weight_quantizer.form()
        ones = torch.ones(40, 1, 1, 1)
        q = form.integers(ones, torch.ones(40), slope).flatten()
        assert float((q * form.step(40, slope) - 1).abs().max()) < 0.01 and not form.log_step.requires_grad


def test_forms_keep_the_option_when_they_are_copied() -> None:
    weight, tensor = WeightForm(4, 3, True), ActivationForm(4, False, True)
    weight.power_of_two = tensor.power_of_two = True
    assert weight.sliced(2).power_of_two and tensor.copied().power_of_two
    assert not WeightForm(4, 3, True).power_of_two
