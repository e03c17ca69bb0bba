from __future__ import annotations

import os
import re
from pathlib import Path

import nasq.search_spaces.resnet as family
import numpy as np
import pytest
import torch
from nasq.search_spaces.resnet import RATIOS, load_weights, resnet20, resnet50, resnet56
from networks import generator, images, quantized, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.cost import CostModel, counted_macs
from nasq.data import load
from nasq.elastic import PadChannels
from nasq.errors import ArtifactError, InputError
from nasq.space import Choice

DATA = os.environ.get("NASQ_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="set NASQ_DATA to the directory of the public data sets")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def count(depths: tuple[tuple[int, ...], ...], widths: int, per_block: int) -> int:
    """By the structure: one width for each, a depth per stage, one expansion per block that is there."""
    total = widths
    for stage in depths:
        total *= sum(per_block**depth for depth in stage)
    return total


@pytest.mark.parametrize(
    ("factory", "size"),
    [
        (resnet20, count(((1, 2, 3),) * 3, 3**3, 3)),
        (resnet56, count(((5, 7, 9),) * 3, 3**3, 3)),
        (resnet50, count(((1, 2, 3), (2, 3, 4), (4, 5, 6), (1, 2, 3)), 3**5, 3)),
    ],
)
def test_the_number_of_architectures_is_what_the_docstring_says(factory: object, size: int) -> None:
    assert callable(factory)
    space = Supernet(factory()).space
    assert space.size == size
    said = re.search(rf"``{factory.__name__}``.*?([\d,]{{9,}}|[\d.]+e\d+) {{6,}}", family.__doc__ or "")
    assert said is not None
    assert said[1] in {f"{size:,}", f"{size:.1e}".replace("e+", "e")}


@pytest.mark.parametrize(
    ("factory", "count", "macs", "shape"),
    [
        (resnet20, 269_722, 40_551_040, (3, 32, 32)),
        (resnet56, 853_018, 125_485_696, (3, 32, 32)),
        (resnet50, 25_557_032, 4_089_184_256, (3, 224, 224)),
    ],
)
def test_the_largest_subnet_has_the_published_size(
    factory: object, count: int, macs: int, shape: tuple[int, int, int]
) -> None:
    # He et al.: 0.27 M, 0.85 M and 25.6 M; the exact numbers are those of torchvision and of the usual CIFAR code.
    assert callable(factory)
    fixed = factory(elastic=False).eval()
    supernet = Supernet(factory().eval())
    assert parameters(fixed) == parameters(supernet.extract(supernet.space.largest())) == count
    assert Supernet(fixed).space.size == 1
    assert counted_macs(fixed, torch.zeros(1, *shape)) == macs


def test_resnet50_computes_what_torchvision_computes() -> None:
    from torchvision.models import resnet50 as reference

    torch.manual_seed(0)
    original = randomise(reference(num_classes=7)).eval()
    x = images(2, shape=(3, 64, 64))
    for elastic in (False, True):
        net = resnet50(num_classes=7, elastic=elastic).eval()
        load_weights(net, original.state_dict())
        supernet = Supernet(net)
        with torch.no_grad():
            assert torch.equal(supernet.extract(supernet.space.largest())(x), original(x))


class Reference(nn.Module):
    """A residual block of option A, as the published code has it: fixed sizes, written out."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        zeros = y.new_zeros(len(y), self.added, *y.shape[2:])
        rows, columns = torch.arange(0, x.shape[2], self.stride), torch.arange(0, x.shape[3], self.stride)
        return F.relu(y + torch.cat([zeros, x[:, :, rows][:, :, :, columns], zeros], dim=1))


def test_a_block_is_that_of_the_published_network() -> None:
    torch.manual_seed(0)
    reference = randomise(Reference(16, 32, 2)).eval()
    block = family.BasicBlock(16, 32, 32, 2).eval()
    block.load_state_dict(reference.state_dict(), strict=False)
    x = images(3, shape=(16, 9, 8))
    with torch.no_grad():
        assert torch.equal(block(x), reference(x))


def test_the_elastic_shortcut_is_a_slice_of_the_largest() -> None:
    """Channels keep their places, so that all subnets add the shortcut to the same channels of shared weights."""
    inner, outer = Choice("in", (4, 8, 16)), Choice("out", (12, 16, 24, 32))
    pad = PadChannels(inner, outer)
    full = images(2, shape=(16, 3, 3))
    for channels in inner.options:
        for out in outer.options:
            assert isinstance(channels, int) and isinstance(out, int)
            pad.active = {"in": channels, "out": out}
            x = torch.zeros_like(full)
            x[:, :channels] = full[:, :channels]
            wide = torch.cat([torch.zeros(2, 8, 3, 3), x, torch.zeros(2, 8, 3, 3)], dim=1)
            assert torch.equal(pad(full[:, :channels]), wide[:, :out])
            assert torch.equal(pad.extract(lambda part: part)(full[:, :channels]), wide[:, :out])


def test_a_shortcut_that_would_keep_nothing_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"puts 32 zero channels first and gives 32 in all.* Give a front from 0 to 31"
    ):
        PadChannels(16, 32, front=32)
    with pytest.raises(InputError, match=r"puts 8 zero channels first and gives 8 in all"):
        PadChannels(16, Choice("out", (8, 32)))
    with pytest.raises(InputError, match=r"puts 8 zero channels first and gives 4 in all"):
        pad = PadChannels(16, 1 * Choice("out", (4, 32)))
        pad.active = {"out": 4}
        pad(images(1, shape=(16, 2, 2)))


@pytest.mark.parametrize(("factory", "shape"), [(resnet20, (3, 32, 32)), (resnet50, (3, 32, 32))])
def test_extracted_subnets_equal_activated_ones(factory: object, shape: tuple[int, int, int]) -> None:
    assert callable(factory)
    arguments = {"widths": (0.0625, 0.09375, 0.125), "num_classes": 5} if factory is resnet50 else {}
    supernet = Supernet(randomise(factory(**arguments)).eval())
    x = images(2, shape=shape)
    space = supernet.space
    for subnet in [space.smallest(), space.largest(), *(space.sample(generator(seed)) for seed in range(6))]:
        plain = supernet.extract(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))
        blocks = sum(int(option) for name, option in subnet.items() if name.endswith(".depth"))
        assert sum(type(part).__name__ in {"BasicBlock", "Bottleneck"} for part in plain.modules()) == blocks


def test_costs_equal_counters() -> None:
    supernet, x = Supernet(resnet20().eval()), torch.zeros(1, 3, 32, 32)
    model = CostModel(supernet, x)
    for seed in range(6):
        subnet = supernet.space.sample(generator(seed))
        plain, found = supernet.extract(subnet), model.of(subnet)
        assert found["params"] == parameters(plain) and found["macs"] == counted_macs(plain, x)


@pytest.mark.parametrize("elastic", [False, True])
def test_quantized_subnets_compute_the_same_integers_when_extracted(elastic: bool) -> None:
    net = randomise(resnet20(elastic=elastic, depths=(1, 2))).eval()
    supernet = Supernet(quantized(net, shape=(3, 32, 32))).eval()
    x = images(2, shape=(3, 32, 32))
    for seed in range(3):
        subnet = supernet.space.sample(generator(seed))
        plain = supernet.extract(subnet)
        with supernet.activate(subnet):
            assert torch.equal(supernet.module.integers(x), plain.integers(x))


def test_arguments_fix_single_dimensions() -> None:
    ends = {name.rpartition(".")[2] for name in Supernet(resnet20(widths=(1.0,))).space.names}
    assert ends == {"depth", "expand"}
    assert Supernet(resnet20(depths=(3,), expansions=(1.0,))).space.names == (
        "layer1.width",
        "layer2.width",
        "layer3.width",
    )


def test_weights_are_those_that_were_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = randomise(resnet20(elastic=False)).eval()
    usual = {re.sub(r"blocks\.", "", name): value.numpy() for name, value in source.state_dict().items()}
    path = tmp_path / "weights.npz"
    np.savez(path, **{name: value for name, value in usual.items() if not name.endswith("tracked")})
    net = resnet20().eval()
    load_weights(net, path)
    x = images(2, shape=(3, 32, 32))
    with torch.no_grad():
        assert torch.equal(net(x), source(x))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = dict(resnet20(elastic=False).state_dict())
    with pytest.raises(
        ArtifactError, match=r"do not fit CifarResNet: 'layer1.blocks.3.bn1.bias' .* is absent.* in them and \[16\]"
    ):
        load_weights(resnet56(), state)
    with pytest.raises(ArtifactError, match=r"'linear.bias' has the shape \[10\] in them and \[7\] here"):
        load_weights(resnet20(num_classes=7), state)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match=r"cannot be read as a .npz file"):
        load_weights(resnet20(), broken)
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        load_weights(resnet20(), tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        load_weights(resnet20(), tmp_path / "array.npy")


def test_widths_are_multiples_of_four() -> None:
    space = Supernet(resnet20()).space
    widths = [choice for choice in space.choices if choice.name.endswith("width")]
    assert [choice.options for choice in widths] == [(8, 12, 16), (16, 24, 32), (32, 48, 64)]
    assert len(RATIOS) == 3


def correct(factory: object, name: str, images_wanted: int) -> int:
    assert callable(factory)
    net = factory().eval()
    load_weights(net, Path(DATA) / "weights" / name)
    test = load("cifar10", root=DATA).test
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    found = 0
    with torch.no_grad():
        for start in range(0, images_wanted, 500):
            part = slice(start, start + 500)
            x = (test.images[part].float() / 255 - mean) / std
            found += int((net(x).argmax(1) == test.labels[part]).sum())
    return found


@needs_data
@pytest.mark.data
def test_the_published_weights_classify_the_first_images() -> None:
    assert correct(resnet20, "resnet20.npz", 1000) == 915


@needs_data
@pytest.mark.data
@pytest.mark.long
def test_the_published_accuracies() -> None:
    assert correct(resnet20, "resnet20.npz", 10_000) == 9173
    assert correct(resnet56, "resnet56.npz", 10_000) == 9339
