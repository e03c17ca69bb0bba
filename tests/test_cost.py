"""Costs on arrays against slow counts on extracted models and frozen programs."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, images, quantized, quantized_supernet, tiny_supernet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nasq import Choice, Supernet, elastic
from nasq.cost import COSTS, CostModel
from nasq.errors import InputError
from nasq.quant import freeze, quantize
from nasq.quant import program as p
from nasq.quant.producers import LayerProducer

WEIGHTED = (nn.Conv2d, nn.Linear)


def flops(model: nn.Module, x: Tensor, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, **options)
    return int(counter.get_total_flops()) // 2


def params(model: nn.Module) -> int:
    """Everything but the quantizers' own parameters."""
    return sum(t.numel() for name, t in model.named_parameters() if "quantization." not in name)


class Shapes:
    """Input and output sizes of every call of a layer in one forward pass, seen by hooks."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.calls: list[tuple[str, nn.Module, Any]] = []
        hooks = [
            module.register_forward_hook(lambda module, given, y: self.calls.append((module.path, module, (given[0], y))))
            for module in model.modules() if isinstance(module, LayerProducer)
        ]  # fmt: skip
        with torch.no_grad():
            model(x, mode="integer")
        for hook in hooks:
            hook.remove()


def test_float_costs_are_torchs_counts_on_60_random_subnets() -> None:
    supernet = tiny_supernet()
    rows = supernet.space.sample_batch(60, generator(4))
    found = CostModel(supernet, images(1)).evaluate(rows)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        model = supernet.extract(subnet)
        assert found["params"][index] == sum(t.numel() for t in model.parameters())
        assert found["macs"][index] == flops(model, images(1))
        assert found["bytes"][index] == 4 * found["params"][index]
        assert found["bitops"][index] == 32 * 32 * found["macs"][index]


def test_macs_are_per_input_whatever_the_example() -> None:
    supernet = tiny_supernet()
    largest = supernet.space.largest()
    one, eight = (CostModel(supernet, images(count)).of(largest) for count in (1, 8))
    assert one == eight
    assert CostModel(supernet, images(1, shape=(3, 16, 16))).of(largest)["macs"] > 3 * one["macs"]


def test_quantized_parameters_and_macs_on_50_random_subnets() -> None:
    supernet = quantized_supernet()
    rows = supernet.space.sample_batch(50, generator(4))
    found = CostModel(supernet).evaluate(rows)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        model = supernet.extract(subnet)
        assert found["params"][index] == params(model), subnet
        assert found["macs"][index] == flops(model, images(1), mode="integer"), subnet


def test_bitops_are_the_sum_over_the_programs_layers() -> None:
    """A BatchNorm alone is a depthwise convolution by one in the file: it is stored, and it runs."""
    supernet = quantized_supernet()
    rows = supernet.space.sample_batch(50, generator(5))
    found = CostModel(supernet).evaluate(rows)["bitops"]
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        with supernet.activate(subnet):
            frozen = freeze(supernet.module)
        total = 0
        for op in frozen.ops:
            if isinstance(op, p.Linear):
                positions = prod(op.output.shape[1:]) if isinstance(op, p.Conv) else 1
                macs = op.weight.size * positions
                total += macs * op.weight_bits * frozen.tensor(op.inputs[0]).bits
        assert found[index] == total, subnet


def packed(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of packed weights: each output channel begins at a byte."""
    return shape[0] * -(-bits * prod(shape[1:]) // 8)


def test_bytes_are_the_sum_over_the_programs_layers() -> None:
    """Packed weights, and an fp32 scale and an int32 bias per output channel, of every layer that the file holds.

    A layer that is called twice is in the file twice: its two calls have other scales, biases and shifts.
    """
    supernet = quantized_supernet()
    rows = supernet.space.sample_batch(50, generator(6))
    found = CostModel(supernet).evaluate(rows)["bytes"]
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        with supernet.activate(subnet):
            frozen = freeze(supernet.module)
        layers = [op for op in frozen.ops if isinstance(op, p.Linear)]
        assert found[index] == sum(packed(op.weight.shape, op.weight_bits) + 8 * len(op.weight) for op in layers), (
            subnet
        )


def straight() -> nn.Module:
    """No layer twice and no BatchNorm alone."""
    width = Choice("width", (4, 8))
    return nn.Sequential(
        elastic.Conv2d(3, width, 3), elastic.BatchNorm2d(width), nn.ReLU(),
        elastic.Conv2d(width, width, Choice("kernel", (1, 3)), groups=width), elastic.BatchNorm2d(width), nn.ReLU(),
        elastic.Repeat([elastic.Conv2d(width, width, 1), elastic.Conv2d(width, width, 3)], Choice("depth", (1, 2))),
        elastic.Conv2d(width, 4, 3), nn.MaxPool2d(2), nn.Flatten(), elastic.Linear(64, 5),
    ).eval()  # fmt: skip


def test_bytes_of_a_network_without_repeated_layers() -> None:
    supernet = Supernet(quantized(straight())).eval()
    rows = supernet.space.sample_batch(50, generator(6))
    found = CostModel(supernet).evaluate(rows)["bytes"]
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        with supernet.activate(subnet):
            layers = [op for op in freeze(supernet.module).ops if isinstance(op, p.Linear)]
        assert found[index] == sum(packed(op.weight.shape, op.weight_bits) + 8 * len(op.weight) for op in layers), (
            subnet
        )


def averages(supernet: Supernet, subnet: Any) -> tuple[float, float]:
    """Section 2.8 of the EQ-Net digest, on the extracted model: convolutions and linear layers, first and last left out."""
    model: Any = supernet.extract(subnet)
    calls = [
        (path, module, io) for path, module, io in Shapes(model, images(1)).calls if isinstance(module.layer, WEIGHTED)
    ]
    inner = calls[1:-1]
    weights = {
        id(module.layer): (module.layer.weight.numel(), module.weight_quantizer.form().bits) for _, module, _ in inner
    }
    inputs = [(x.data[0].numel(), x.grid.bits) for _, _, (x, _) in inner]
    return tuple(sum(n * b for n, b in pairs) / sum(n for n, _ in pairs) for pairs in (list(weights.values()), inputs))


@pytest.mark.parametrize(
    "build", [lambda: Supernet(quantized(straight())), quantized_supernet], ids=["straight", "tiny"]
)
def test_average_bits_are_those_of_the_definition(build: Any) -> None:
    supernet = build().eval()
    rows = supernet.space.sample_batch(25, generator(7))
    found = CostModel(supernet).evaluate(rows)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        weight, activation = averages(supernet, subnet)
        assert found["average_weight_bits"][index] == pytest.approx(weight, rel=1e-12), subnet
        assert found["average_activation_bits"][index] == pytest.approx(activation, rel=1e-12), subnet


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_average_bits_of_uniform_bits_are_those_bits(bits: int) -> None:
    supernet = Supernet(quantized(straight(), weight_bits=(bits,), activation_bits=(bits,)))
    found = CostModel(supernet).of(supernet.space.largest())
    assert found["average_weight_bits"] == found["average_activation_bits"] == bits


def test_compression_is_the_fp32_parameters_over_the_bytes() -> None:
    supernet = quantized_supernet()
    model = CostModel(supernet)
    for seed in range(5):
        subnet = supernet.space.sample(generator(seed))
        found = model.of(subnet)
        assert found["compression"] == 4 * found["params"] / found["bytes"]


def test_more_bits_never_cost_less() -> None:
    supernet = Supernet(quantized(straight()))
    model, space = CostModel(supernet), supernet.space
    for seed in range(10):
        subnet = space.sample(generator(seed))
        before = model.of(subnet)
        for name, option in subnet.items():
            if name.endswith("_bits") and option != 8:
                after = model.of(subnet.updated({name: 8}))
                assert all(after[key] >= before[key] for key in COSTS if key != "compression"), name
                assert after["compression"] <= before["compression"]
                changed = "average_weight_bits" if name.endswith("weight_bits") else "bitops"
                assert after[changed] > before[changed]
                assert after["params"] == before["params"] and after["macs"] == before["macs"]


RATIOS = {"average_weight_bits", "average_activation_bits", "compression"}


def test_arrays_and_single_subnets_agree() -> None:
    supernet = quantized_supernet()
    model, rows = CostModel(supernet), supernet.space.sample_batch(20, generator(1))
    many = model.evaluate(rows)
    assert set(many) == set(COSTS)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        assert model.of(subnet) == {name: values[index].item() for name, values in many.items()}
    for name, values in many.items():
        assert values.shape == (20,) and values.dtype == (np.float64 if name in RATIOS else np.int64)
    assert all(values.shape == (0,) for values in model.evaluate(rows[:0]).values())


def test_a_layer_called_twice_has_its_parameters_once_and_its_work_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = elastic.Conv2d(3, 3, Choice("kernel", (1, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    model = CostModel(Supernet(Twice()), images(1))
    wanted = {"params": 12, "macs": 2 * 9 * 64, "bitops": 2 * 9 * 64 * 1024, "bytes": 48, "compression": 1.0}
    assert model.of({"kernel": 1}) == wanted


def test_a_module_shared_by_branches_counts_where_any_of_them_runs() -> None:
    shared = elastic.Conv2d(3, 3, 1)
    net = nn.Sequential(
        elastic.OneOf(Choice("a", ("on", "off")), on=shared, off=nn.Identity()),
        elastic.OneOf(Choice("b", ("on", "off")), on=shared, off=nn.Identity()),
    )
    model = CostModel(Supernet(net), images(1))
    found = {(a, b): model.of({"a": a, "b": b}) for a in ("on", "off") for b in ("on", "off")}
    assert [found[key]["params"] for key in found] == [12, 12, 12, 0]
    assert [found[key]["macs"] for key in found] == [2 * 576, 576, 576, 0]


@pytest.mark.parametrize("own", ["parameter", "buffer"])
def test_a_network_with_tensors_of_its_own_is_counted(own: str) -> None:
    """A scale (as in ConvNeXt) or a mean to subtract: legal in a float network."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            if own == "parameter":
                self.scale = nn.Parameter(torch.ones(4, 1, 1))
            else:
                self.register_buffer("scale", torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.scale

    supernet = Supernet(Own())
    found = CostModel(supernet, images(1)).of({})
    assert found["params"] == sum(t.numel() for t in supernet.parameters()) and found["macs"] == 12 * 64


def test_a_tensor_joined_with_itself_is_counted_twice() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = elastic.Conv2d(3, 4, 1), elastic.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(torch.cat([y, y], 1))

    supernet = Supernet(Joined())
    assert CostModel(supernet, images(1)).of({})["macs"] == flops(supernet.extract({}), images(1))


def test_a_copied_supernet_has_its_costs() -> None:
    supernet = quantized_supernet()
    subnet = supernet.space.sample(generator(2))
    assert CostModel(copy.deepcopy(supernet)).of(subnet) == CostModel(supernet).of(subnet)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_plain_convolutions_with_padding_by_name(padding: Any, kernel: int) -> None:
    supernet = Supernet(nn.Sequential(nn.Conv2d(3, 4, kernel, padding=padding), elastic.Conv2d(4, 2, 1)))
    assert CostModel(supernet, images(1)).of({})["macs"] == flops(supernet.extract({}), images(1))


def test_multiply_adds_that_the_layers_do_not_show_are_refused() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = elastic.Conv2d(3, Choice("width", (2, 4)), 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.einsum("nchw,nchv->ncwv", y, y)

    with pytest.raises(InputError, match=r"default subnet has \d+, its layers have 768.*not known: .*einsum"):
        CostModel(Supernet(Product()), images(2))


def test_linear_layers_on_tokens() -> None:
    supernet = Supernet(nn.Sequential(elastic.Linear(6, Choice("w", (4, 8))), nn.GELU()))
    x = torch.zeros(1, 7, 6)
    model = CostModel(supernet, x)
    for width in (4, 8):
        assert model.of({"w": width})["macs"] == 7 * 6 * width == flops(supernet.extract({"w": width}), x)


def test_without_an_example_or_a_member_it_says_so() -> None:
    with pytest.raises(InputError, match=r"not quantized: give CostModel an example input"):
        CostModel(tiny_supernet())
    model = CostModel(quantized_supernet())
    with pytest.raises(InputError, match=r"width"):
        model.of({"width": 5})


def test_first_and_last_layer_are_left_out_of_the_averages() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = CostModel(Supernet(quantize(net, images(1), activation_bits=(4, 8), weight_bits=(2, 8))))
    found = model.of({"0.activation_bits": 4, "2.weight_bits": 2})
    assert (found["average_weight_bits"], found["average_activation_bits"]) == (2, 4)
