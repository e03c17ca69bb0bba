from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import generator, images, quantized, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet, elastic
from nasq.cost import CostModel
from nasq.deploy.onnx import export
from nasq.deploy.runtimes import OnnxRuntime, integer_coverage
from nasq.errors import InputError, TargetError
from nasq.quant import freeze
from nasq.quant.program import AvgPool, Conv

from . import slow


class Block(nn.Module):
    """Two convolutions beside an identity or a projection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.project = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.project(x))


def residual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        blocks = elastic.Repeat([Block(6, 6, 1), Block(6, 6, 1)], 2)
        net = nn.Sequential(stem, blocks, Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return randomise(net).eval()


CONVOLUTIONS = {"1.blocks.0.conv1", "1.blocks.1.conv1", "2.conv1", "2.project"}
INNER = {"1.blocks.0", "1.blocks.1", "2"}


def test_the_stream_keeps_its_bits_and_convolutions_choose_what_they_read() -> None:
    supernet = Supernet(quantized(residual(), sum_bits=8))
    activations = {name for name in supernet.space.names if name.endswith("activation_bits")}
    read = {f"{path}.input.activation_bits" for path in CONVOLUTIONS}
    assert activations == read | {f"{path}.conv1.activation_bits" for path in INNER}
    with supernet.activate(supernet.space.smallest()):
        program = freeze(supernet.module)
    made = {op.output.name: op for op in program.ops}
    for op in program.ops:
        if isinstance(op, Conv) and op.path != "0.0":
            (source,) = op.inputs
            assert made[source].output.bits == 2
            assert isinstance(made[source], AvgPool) == (op.path in CONVOLUTIONS)
        elif type(op).__name__ == "Add":
            assert [made[name].output.bits for name in (*op.inputs, op.output.name)] == [8, 8, 8]


def test_average_bits_are_those_that_convolutions_read() -> None:
    """Property 11 of EQ-Net: the average equals b for uniform b, whatever the first, the last layer and the sums have."""
    supernet = Supernet(quantized(residual(), sum_bits=8, weight_bits=(2, 3, 8), activation_bits=(2, 3, 8)))
    costs = CostModel(supernet)
    for bits in (2, 3, 8):
        found = costs.of({name: bits for name in supernet.space.names})
        assert (found["average_weight_bits"], found["average_activation_bits"]) == (bits, bits)
    rows = supernet.space.to_rows([supernet.space.smallest()])
    for column, name in enumerate(supernet.space.names):
        more = rows.copy()
        more[0, column] = 1
        key = "average_weight_bits" if name.endswith("weight_bits") else "average_activation_bits"
        before, after = (costs.evaluate(row) for row in (rows, more))
        assert after[key][0] > before[key][0] and after["bitops"][0] > before["bitops"][0], name


def test_it_computes_what_the_network_computes_and_runs_on_the_runtime() -> None:
    supernet, x = Supernet(quantized(residual(), sum_bits=8)).eval(), images(6, 3)
    with torch.no_grad():
        torch.testing.assert_close(supernet(x, mode="float"), residual()(x), rtol=1e-4, atol=1e-5)
    for seed in range(4):
        subnet = supernet.space.sample(generator(seed))
        with supernet.activate(subnet):
            program, integers = freeze(supernet.module), supernet.module.integers(x).numpy()
        assert np.array_equal(slow.run(program, x.numpy())[program.output.name], integers)
        data = export(program)
        assert np.array_equal(OnnxRuntime(data).run(x.numpy()), integers)
        assert np.array_equal(supernet.extract(subnet).eval().integers(x).numpy(), integers)
    assert integer_coverage(data, program).floats == ()


def test_without_sum_bits_nothing_is_put_in_between() -> None:
    names = Supernet(quantized(residual())).space.names
    assert not any(".input." in name for name in names) and "1.blocks.0.add.activation_bits" in names


def test_pinned_layers_read_the_stream_as_it_is() -> None:
    net = nn.Sequential(Block(3, 3, 1), nn.Conv2d(3, 4, 3))
    supernet = Supernet(quantized(randomise(net).eval(), sum_bits=8))
    assert [name for name in supernet.space.names if ".input." in name] == []


@pytest.mark.parametrize("bits", [0, 17, "8", True])
def test_bits_of_sums_are_checked(bits: object) -> None:
    with pytest.raises(InputError, match=r"sum_bits is .*; allowed are whole numbers from 1 to 16, or None"):
        quantized(residual(), sum_bits=bits)


def test_bits_of_sums_follow_the_target() -> None:
    from dataclasses import replace

    from nasq.targets import load

    narrow = replace(load("generic"), activation_bits=(2, 4))
    with pytest.raises(TargetError, match="sum_bits is 8, and the target 'generic' takes only 2, 4 as activation_bits"):
        quantized(residual(), sum_bits=8, target=narrow, first_last_bits=None, activation_bits=(2, 4))
