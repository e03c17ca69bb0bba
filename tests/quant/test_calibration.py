from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, images
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.errors import NasqError
from nasq.quant import calibrate, quantize
from nasq.quant.arithmetic import STEP_FLOOR
from nasq.quant.calibration import histogram, initialise_activation, initialise_weight, search_range
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.producers import LayerProducer
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer

Reals = NDArray[np.float64]


def loss(x: Reals, step: float, zero: float, low: int, high: int) -> float:
    """``mean |x - Q(x)|^2.4`` in float64."""
    q = np.clip(np.rint(x / step + zero), low, high)
    return float((np.abs((q - zero) * step - x) ** 2.4).mean())


def candidate(x: Reals, low: int, high: int, symmetric: bool, factor: float) -> tuple[float, float]:
    """Step and zero-point of one candidate range, from the digest 2.4."""
    top, bottom = max(x.max(), 0.0), min(x.min(), 0.0)
    if symmetric:
        extent = max(top, -bottom)
        return factor * (extent if low == 0 else 2 * extent) / (high - low), 0.0
    step = factor * (top - bottom) / (high - low)
    return step, float(np.clip(np.rint(low - factor * bottom / step), low, high))


def brute(x: Reals, low: int, high: int, symmetric: bool) -> tuple[float, float]:
    """The least loss of the eighty candidates, and the loss of the largest range."""
    losses = [loss(x, *candidate(x, low, high, symmetric, 1 - 0.01 * i), low, high) for i in range(80)]
    return min(losses), losses[0]


def rows_of(seed: int, shape: tuple[int, ...] = (5, 300)) -> Tensor:
    rng = generator(seed)
    heavy = torch.randn(shape, generator=rng) ** 3
    return torch.stack([heavy[0], *(torch.randn(shape[1], generator=rng) + 0.4 * i for i in range(1, shape[0]))])


def found_loss(form: WeightForm | ActivationForm, x: Reals, row: int | None = None) -> float:
    step = form.log_step.detach().double().exp()
    zeta = form.zeta.detach().double().round() if form.zeta is not None else torch.zeros_like(step)
    low, high = form.low, form.high
    if isinstance(form, ActivationForm) and form.signed and form.symmetric:
        low, high = low - 128, high - 128
    zeta = zeta.clamp(low, high)
    pick = (lambda t: float(t[row])) if row is not None and step.ndim else float
    return loss(x, pick(step), pick(zeta), low, high)


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_weights_get_the_best_of_the_eighty_candidates(symmetry: str) -> None:
    w = rows_of(0)
    quantizer = WeightQuantizer("w", 5, range(2, 9), ("tensor", "channel"), (symmetry,))
    initialise_weight(quantizer, w)
    whole = w.double().numpy()
    for key, form in quantizer.forms.items():
        groups = [(row, whole[row]) for row in range(5)] if key.startswith("channel") else [(None, whole.ravel())]
        for row, x in groups:
            best, largest = brute(x, form.low, form.high, symmetry == "symmetric")
            found = found_loss(form, x, row)
            assert found <= 1.001 * best + 1e-12 and found <= 1.0001 * largest, (key, row)


@pytest.mark.parametrize(("signed", "symmetry"), [(True, "symmetric"), (True, "asymmetric"), (False, "symmetric")])
@pytest.mark.parametrize("seed", range(3))
def test_activations_get_nearly_the_best_of_the_eighty_candidates(signed: bool, symmetry: str, seed: int) -> None:
    x = rows_of(seed, (6, 900)) if signed else rows_of(seed, (6, 900)).relu()
    quantizer = ActivationQuantizer("x", signed, range(2, 9), (symmetry,))
    initialise_activation(quantizer, x)
    flat = x.double().numpy().ravel()
    for bits in range(2, 9):
        form: Any = quantizer.forms[f"{symmetry}_{bits}"]
        low, high = (
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed and symmetry == "symmetric" else (0, 2**bits - 1)
        )
        best, largest = brute(flat, low, high, symmetry == "symmetric")
        found = found_loss(form, flat)
        assert found <= 1.02 * best and found <= 1.001 * largest, bits


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_more_bits_lose_less_and_channels_lose_less_than_the_tensor(symmetry: str) -> None:
    for seed in range(3):
        w = rows_of(seed)
        quantizer = WeightQuantizer("w", 5, range(2, 9), ("tensor", "channel"), (symmetry,))
        initialise_weight(quantizer, w)
        losses: dict[str, list[float]] = {"tensor": [], "channel": []}
        for bits in range(2, 9):
            for grain in losses:
                form: Any = quantizer.forms[f"{grain}_{symmetry}_{bits}"]
                each = [found_loss(form, w[row].double().numpy(), row) for row in range(5)]
                losses[grain].append(float(np.mean(each)))
            assert losses["channel"][-1] <= losses["tensor"][-1] * 1.0001
        for found in losses.values():
            assert all(more <= less for less, more in pairwise(found))


def test_search_range_reports_its_own_error_and_uses_shares() -> None:
    x = torch.randn(1, 50, generator=generator(0)).repeat(1, 3)
    counted = search_range(x[:, :50], -8, 7, True, torch.full((1, 50), 1 / 50))
    plain = search_range(x, -8, 7, True)
    torch.testing.assert_close(counted.step, plain.step)
    torch.testing.assert_close(counted.error, plain.error)
    assert counted.error.item() == pytest.approx(loss(x.double().numpy(), counted.step.item(), 0, -8, 7), rel=1e-4)


def test_histogram_keeps_the_extremes_and_the_mass() -> None:
    x = torch.randn(7, 3000, generator=generator(0)) * 3
    centres, shares = histogram(x)
    assert centres.shape == shares.shape and shares.sum().item() == pytest.approx(1, abs=1e-5)
    assert centres.min() == x.min() and centres.max() == x.max()
    assert (centres * shares).sum().item() == pytest.approx(x.mean().item(), abs=1e-3)


def test_a_large_tensor_is_sampled_without_missing_its_columns() -> None:
    """A map whose columns differ (borders do): the sample must not fall on one column only."""
    x = torch.randn(4096, 32, 8, 8, generator=generator(0))
    x[..., 0] = 0
    centres, shares = histogram(x)
    spread = ((centres**2) * shares).sum().item()
    assert spread == pytest.approx(7 / 8, rel=0.05)
    assert centres.max() > 0.8 * x.max() and centres.min() < 0.8 * x.min()


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-12, -3e4])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_constant_tensors_give_finite_positive_steps(value: float, symmetry: str) -> None:
    weights = WeightQuantizer("w", 3, (2, 8), ("tensor", "channel"), (symmetry,))
    initialise_weight(weights, torch.full((3, 2, 1, 1), value))
    for signed in (True, False):
        activations = ActivationQuantizer("x", signed, (2, 8), (symmetry,) if signed else ("symmetric",))
        initialise_activation(activations, torch.full((2, 3), value))
        for form in [*weights.forms.values(), *activations.forms.values()]:
            step = form.log_step.exp()
            assert torch.isfinite(step).all() and (step > 0).all()
            if form.zeta is not None:
                assert torch.isfinite(form.zeta).all()
        if signed and abs(value) > 1e-6 and symmetry == "symmetric":
            form8: Any = activations.forms["symmetric_8"]
            assert form8.fake(torch.full((1,), value), form8.grid()).item() == pytest.approx(value, rel=0.02)


def test_a_layer_of_zeros_can_still_learn() -> None:
    """A zero-initialised layer must not get a step at the floor, where every later weight would be clipped for good."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        net[0].weight.zero_()
    network = quantize(net, images(1), weight_bits=(4,), activation_bits=(8,))
    calibrate(network, images(4))
    for module in network.modules():
        if isinstance(module, LayerProducer):
            assert float(module.weight_quantizer.form().step(4).detach().min()) > 1000 * STEP_FLOOR


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    network = quantize(nn.Sequential(nn.Conv2d(3, 4, 1)), images(1))
    x = images(2)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(NasqError, match=r"(?i)nan|finite"):
        calibrate(network, x)


def hidden_net() -> nn.Module:
    """Parts that the largest subnet does not reach, one inside another."""
    width = Choice("width", (4, 8))
    inner = elastic.OneOf(Choice("inner", ("skip", "conv")), skip=nn.Identity(), conv=elastic.Conv2d(width, width, 3))
    return nn.Sequential(
        elastic.Conv2d(3, width, 3),
        elastic.OneOf(Choice("outer", ("skip", "deep")), skip=nn.Identity(), deep=nn.Sequential(inner, nn.ReLU())),
        elastic.Conv2d(width, 4, 1),
    )


def test_every_quantizer_is_visited_and_nothing_else_changes() -> None:
    network = quantize(hidden_net(), images(1))
    supernet = Supernet(network)
    supernet.activate(supernet.space.smallest())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    active = dict(supernet.active)
    network.get_submodule("0").eval()
    modes = [module.training for module in network.modules()]
    calibrate(network, images(8))
    quantizers = [m for m in network.modules() if isinstance(m, (WeightQuantizer, ActivationQuantizer))]
    assert len(quantizers) == 7 and all(quantizer.calibrated for quantizer in quantizers)
    assert dict(supernet.active) == active and [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        if "quantizer" not in name:
            assert torch.equal(tensor, before[name]), name
    untouched = [n for n, t in network.state_dict().items() if n.endswith("log_step") and "quantizer.forms" in n
                 and torch.equal(t, before[n])]  # fmt: skip
    assert untouched == []


def test_calibration_is_repeatable_and_independent_of_what_was_active() -> None:
    found = []
    for seed in range(2):
        torch.manual_seed(0)
        network = quantize(hidden_net(), images(1))
        supernet = Supernet(network)
        supernet.activate(supernet.space.sample(generator(seed)))
        calibrate(network, images(8))
        if seed:
            calibrate(network, images(8))
        found.append({name: tensor for name, tensor in network.state_dict().items() if ".forms." in name})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_steps_come_from_the_largest_subnet_that_reaches_a_tensor() -> None:
    """What the largest subnet reaches keeps the steps of its run: a later run for a hidden part changes nothing there."""
    torch.manual_seed(0)
    network, x = quantize(hidden_net(), images(1), activation_bits=(8,)), images(8)
    calibrate(network, x)
    last: Any = [m for m in network.modules() if isinstance(m, LayerProducer)][-1]
    largest = Supernet(network).space.largest()
    supernet = Supernet(network)
    with supernet.activate(largest), torch.no_grad():
        wanted = supernet(x, mode="float")
    quantizer = ActivationQuantizer("x", True, (8,), ("symmetric",))
    initialise_activation(quantizer, wanted)
    torch.testing.assert_close(last.quantizer.form().log_step, quantizer.form().log_step)


def test_extracted_forms_keep_what_they_learned() -> None:
    supernet = Supernet(quantize(hidden_net(), images(1)))
    calibrate(supernet.module, images(8))
    plain: Any = supernet.extract(supernet.space.sample(generator(1)))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    calibrate(plain, images(8) * 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def deep_net(layers: int = 6) -> nn.Sequential:
    """Convolutions whose outputs shrink by ten each, with BatchNorm behind them."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        conv = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.normal_(conv.weight, std=0.05, generator=generator(len(parts)))
        parts += [conv, nn.BatchNorm2d(3), nn.ReLU()]
    last = nn.Linear(192, 2)
    nn.init.normal_(last.weight, std=0.1, generator=generator(len(parts)))
    return nn.Sequential(*parts, nn.Flatten(), last)


def steps_of(network: nn.Module) -> list[float]:
    return [float(m.quantizer.form().grid().step.detach()) for m in network.modules() if isinstance(m, LayerProducer)]


def test_a_norm_that_was_never_updated_is_calibrated_with_the_batch() -> None:
    """Statistics 0 and 1 are nobody's: with them, each layer of an untrained network would be smaller than the last."""
    net, x = deep_net(), images(16)
    network = quantize(net, images(1), weight_bits=(8,), activation_bits=(8,))
    state = {name: tensor.clone() for name, tensor in network.state_dict().items() if "running" in name}
    calibrate(network, x)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    assert min(steps_of(network)[:-1]) > 0.005
    with torch.no_grad():
        supernet = Supernet(network)
        statistics = supernet.recalibrate({}, [x])
        with supernet.activate({}, statistics):
            network.eval()
            integers, real = network(x), network(x, mode="float")
    assert (integers - real).abs().max() < 0.1 * real.abs().max()


def test_a_norm_with_statistics_of_its_own_keeps_them_in_calibration() -> None:
    net, x = deep_net(1), images(16)
    for mean in (0.5, 0.0):
        net[1].running_mean.fill_(mean)
        net[1].num_batches_tracked.fill_(1 - int(2 * mean))  # either says that they are its own
        network = quantize(net, images(1), weight_bits=(8,), activation_bits=(8,))
        calibrate(network, x)
        quantizer = ActivationQuantizer("x", False, (8,), ("symmetric",))
        initialise_activation(quantizer, net.eval()[:3](x))
        assert steps_of(network)[0] == pytest.approx(float(quantizer.form().grid().step.detach()), rel=1e-4)
