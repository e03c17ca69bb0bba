"""Resolution as a choice: float, costs, integers and the exported file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import images, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel, counted_macs
from nasq.deploy import bundle, onnx, parity
from nasq.errors import InputError
from nasq.quant import calibrate, freeze, quantize
from nasq.quant.resizing import interpolation

SIDES = (5, 6, 8, 11)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resize = elastic.Resize(Choice("resolution", SIDES))
        self.conv = elastic.Conv2d(3, Choice("width", (4, 6)), 3, stride=2)
        self.head = elastic.Linear(self.conv.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(self.resize(x))).mean((2, 3)))


def net() -> Net:
    return randomise(Net()).eval()


def bilinear(x: np.ndarray, size: int) -> np.ndarray:
    """The last dimension resized, one sample at a time, by the definition (half-pixel centres, clamped)."""
    old = x.shape[-1]
    out = np.zeros((*x.shape[:-1], size))
    for j in range(size):
        at = max((j + 0.5) * old / size - 0.5, 0.0)
        low = min(int(at), old - 1)
        part = at - low
        out[..., j] = (1 - part) * x[..., low] + part * x[..., min(low + 1, old - 1)]
    return out


@pytest.mark.parametrize("side", SIDES)
def test_it_is_bilinear_interpolation(side: int) -> None:
    x = images(2)
    supernet = Supernet(elastic.Resize(Choice("resolution", SIDES)))
    with supernet.activate({"resolution": side}):
        found = supernet(x).numpy()
    rows = bilinear(bilinear(x.double().numpy(), side).swapaxes(2, 3), side).swapaxes(2, 3)
    assert found.shape == (2, 3, side, side) and np.allclose(found, rows, atol=1e-6)


def test_the_inputs_own_size_changes_nothing() -> None:
    x = images(2)
    assert torch.equal(elastic.Resize(8)(x), x)


def test_extract_equals_activate_and_costs_are_those_of_the_resolution() -> None:
    supernet = Supernet(net())
    model, x = CostModel(supernet, images(1)), images(3)
    macs = []
    for side in SIDES:
        subnet = {"resolution": side, "width": 4}
        with supernet.activate(subnet), torch.no_grad():
            wanted = supernet(x)
        plain = supernet.extract(subnet)
        assert torch.equal(plain(x), wanted)
        macs.append(model.of(subnet)["macs"])
        assert macs[-1] == counted_macs(plain, images(1)) == 27 * 4 * ((side + 1) // 2) ** 2 + 12
    assert macs == sorted(macs) and len(set(macs)) == 3


def test_sizes_behind_a_resolution_are_checked() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resize, self.head = elastic.Resize(Choice("resolution", SIDES)), elastic.Linear(3 * 64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.resize(x).flatten(1))

    with pytest.raises(InputError, match=r"sizes disagree: 'head' takes 192 input features, and .* gives it \d+"):
        quantize(Flat(), images(1))
    with pytest.raises(InputError, match="Give at least 1 pixel"):
        elastic.Resize(0)


@pytest.mark.parametrize(("inside", "outside"), [(8, 5), (8, 6), (5, 11), (7, 7), (224, 129), (3, 1)])
def test_integer_weights_are_the_rounded_ones_and_keep_constants(inside: int, outside: int) -> None:
    units = interpolation(inside, outside)
    exact = bilinear(np.eye(inside), outside)
    assert units.shape == (inside, outside) and (units.sum(0) == 128).all() and (units >= 0).all()
    assert ((units > 0).sum(0) <= 2).all()
    assert np.abs(units.numpy() / 128 - exact).max() <= 1.01 / 128


def test_quantized_subnets_run_as_exported(tmp_path: Path) -> None:
    network = quantize(net(), images(1), weight_bits=(8,), activation_bits=(8,))
    calibrate(network, images(32))
    supernet = Supernet(network).eval()
    x = images(16, 5)
    for side in SIDES:
        subnet = supernet.space.default().updated({"resolution": side})
        with supernet.activate(subnet), torch.no_grad():
            wanted, program = network.integers(x), freeze(network)
            found, fake = supernet(x), supernet(x, mode="fake")
        assert torch.equal(supernet.extract(subnet).integers(x), wanted)
        assert (fake - found).abs().max() <= 2.01 * program.output.scale
        directory = tmp_path / str(side)
        bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
        report = parity.check(directory, x.numpy(), layer_images=8)
        assert report.passed and report.differing == 0, report.summary()


def test_gradients_pass_through_the_fake_form() -> None:
    network = quantize(net(), images(1))
    calibrate(network, images(32))
    supernet = Supernet(network).train()
    x = images(4).requires_grad_()
    with supernet.activate(supernet.space.default().updated({"resolution": 6})):
        supernet(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0


def test_plain_interpolation_is_known_as_well() -> None:
    layer = nn.Upsample(size=(6, 5), mode="bilinear")
    supernet = Supernet(nn.Sequential(layer, elastic.Conv2d(3, 4, 3)))
    assert CostModel(supernet, images(1)).of({})["macs"] == 27 * 4 * 30
    assert torch.equal(layer(images(1)), F.interpolate(images(1), size=(6, 5), mode="bilinear"))
