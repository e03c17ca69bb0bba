from __future__ import annotations

import re

import nasq.search_spaces.group_conv as family
import pytest
import torch
from nasq.search_spaces.group_conv import DataMovement, Grouping, group_conv
from networks import generator, images, quantized, randomise
from torch import Tensor, nn

from nasq import Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.plugins import space_info

INFO = space_info(group_conv)
SHAPE = INFO.tiny_input_shape
RESNEXT = {"family": "resnext", "options": (2, 4), "width": 0.0625, "blocks": (1, 2, 1, 1), "num_classes": 4}
MEMBERS = [
    INFO.tiny, {**INFO.tiny, "by": "count", "options": (8, 4, 1)}, {**INFO.tiny, "tied": True}, RESNEXT,
    {**RESNEXT, "by": "count", "tied": True},
]  # fmt: skip


def member(arguments: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(group_conv(**arguments)).eval()


@pytest.mark.parametrize(
    ("arguments", "params", "macs"),
    [
        # Howard et al. 2017: 4.2 million parameters, 569 million multiply-adds. torchvision: 25,028,904 and 4.23e9.
        ({"options": (1,)}, 4_231_976, 568_740_352),
        ({"family": "resnext", "by": "count", "options": (32,)}, 25_028_904, 4_230_479_872),
    ],
)
def test_the_published_networks_are_inside(arguments: dict[str, object], params: int, macs: int) -> None:
    net = group_conv(**arguments).eval()
    assert Supernet(net).space.size == 1
    assert sum(parameter.numel() for parameter in net.parameters()) == params
    assert counted_macs(net, torch.zeros(1, 3, 224, 224)) == macs


def test_the_numbers_of_architectures_are_what_the_docstring_says() -> None:
    for arguments, size in (({}, 6**13), ({"family": "resnext"}, 4**16), ({"tied": True}, 6)):
        assert Supernet(group_conv(**arguments)).space.size == size
    assert Supernet(group_conv(family="resnext", tied=True)).space.size == 4
    said = re.findall(r"\d+\^\d+ = ([\d.]+e\d+)", family.__doc__ or "")
    assert [float(text) for text in said] == [round(6**13 / 1e10, 2) * 1e10, round(4**16 / 1e9, 2) * 1e9]


def test_one_size_of_group_and_one_number_of_groups() -> None:
    """With a constant size the number grows with the widths; with a constant number the size does."""
    for by, option in (("size", 8), ("count", 8)):
        net = group_conv(by=by, options=(8, 16), tied=True, blocks=6)
        plain = Supernet(net).extract({f"group_{by}": option})
        convs = [part for part in plain.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
        sizes, counts = [conv.weight.shape[1] for conv in convs], [conv.groups for conv in convs]
        widths = [conv.in_channels for conv in convs]
        assert widths == [32, 64, 128, 128, 256, 256]
        constant, other = (sizes, counts) if by == "size" else (counts, sizes)
        assert constant == [8] * 6 and other == [width // 8 for width in widths]


@pytest.mark.parametrize("arguments", MEMBERS)
def test_extracted_subnets_equal_activated_ones(arguments: dict[str, object]) -> None:
    supernet, x = Supernet(member(arguments)), images(2, shape=SHAPE)
    model = CostModel(supernet, x[:1])
    for seed in range(5):
        subnet = supernet.space.sample(generator(seed))
        plain, found = supernet.extract(subnet), model.of(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))
        assert found["params"] == sum(parameter.numel() for parameter in plain.parameters())
        assert found["macs"] == counted_macs(plain, x[:1])


def moved_by_hooks(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Numbers moved and multiply-adds, seen while the plain model runs."""
    moved = macs = 0

    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal moved, macs
        weight = layer.get_parameter("weight")
        moved += inputs[0].numel() + weight.numel() + output.numel()
        macs += output.numel() * weight[0].numel()

    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    return moved, macs


@pytest.mark.parametrize("arguments", MEMBERS)
def test_data_movement_is_what_layers_read_and_write(arguments: dict[str, object]) -> None:
    supernet, x = Supernet(member(arguments)), images(1, shape=SHAPE)
    model = DataMovement(supernet, x)
    rows = supernet.space.sample_batch(6, generator(1))
    moved, reuse = model.moved(rows), model.reuse(rows)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        numbers, macs = moved_by_hooks(supernet.extract(subnet), x)
        assert moved[index] == numbers and reuse[index] == macs / numbers


def test_a_constant_size_balances_the_reuse_of_all_layers() -> None:
    """The claim of E2GC: reuse of grouped layers is G k^2 / 2 on large maps whatever the width, and grows with it else."""
    x = torch.zeros(1, 3, 224, 224)
    spread = {}
    for by in ("size", "count"):
        supernet = Supernet(group_conv(by=by, options=(8,), tied=True, blocks=7).eval())
        layers = DataMovement(supernet, x).by_layer(supernet.space.to_rows([supernet.space.default()]))
        reuse = []
        for path, part in supernet.module.named_modules():
            if path in layers and getattr(part, "groups", 1) > 1 and part.stride == 1:
                moved, macs = layers[path]
                reuse.append(float(macs[0] / moved[0]))
        spread[by] = max(reuse) / min(reuse)
        if by == "size":
            assert all(reuse[i] == pytest.approx(8 * 9 / 2, rel=0.2) for i in range(len(reuse)))
    assert spread["size"] < 1.2 and spread["count"] > 4


def test_a_quantized_member_computes_the_same_integers_when_extracted() -> None:
    supernet = Supernet(quantized(member(INFO.tiny), shape=SHAPE)).eval()
    x = images(2, shape=SHAPE)
    for seed in range(3):
        subnet = supernet.space.sample(generator(seed))
        plain = supernet.extract(subnet)
        with supernet.activate(subnet):
            assert torch.equal(supernet.module.integers(x), plain.integers(x))
    rows = supernet.space.sample_batch(4, generator(0))
    assert (DataMovement(supernet).moved(rows) > 0).all()


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(InputError, match=r"'block0' has 32 channels, which the group size 3 does not divide"):
        group_conv(options=(3,))
    with pytest.raises(InputError, match=r"'stage1.0' has 128 channels, which the group count 48 does not divide"):
        group_conv(family="resnext", by="count", options=(48,))
    with pytest.raises(InputError, match=r"family of networks.*mobilenet"):
        group_conv(family="mobilnet")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"kind of grouping"):
        Grouping("sizes", (1,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"options of a grouping are \[0, 1\]. Give whole numbers of at least 1"):
        Grouping("size", (0, 1))
