from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import IMAGE, generator, images, quantized, quantized_supernet, tiny
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.deploy import bundle
from nasq.deploy.reference import Reference
from nasq.errors import InputError
from nasq.quant import calibrate, freeze, quantize
from nasq.quant import program as p

from . import slow


def check(frozen: p.Program) -> None:
    """What every consumer of a program may rely on."""
    names = [op.output.name for op in frozen.ops]
    assert len(set(names)) == len(names)
    assert isinstance(frozen.ops[0], p.Input) and sum(isinstance(op, p.Input) for op in frozen.ops) == 1
    specs: dict[str, p.Tensor] = {}
    for op in frozen.ops:
        out = op.output
        assert all(name in specs for name in op.inputs), "tensors are made before they are read"
        assert op.path and out.shape and all(isinstance(size, int) and size > 0 for size in out.shape)
        assert isinstance(out.scale, float) and np.float32(out.scale) == out.scale and out.scale >= 2.0**-24
        assert 0 <= out.low <= out.zero_point <= out.high <= 255 and 2 <= out.bits <= 8
        assert out.high - out.low < 2**out.bits
        if isinstance(op, p.Linear):
            check_layer(op, specs[op.inputs[0]])
        elif isinstance(op, (p.MaxPool, p.Reshape, p.Clip)):
            source = specs[op.inputs[0]]
            assert (source.scale, source.zero_point, source.bits) == (out.scale, out.zero_point, out.bits)
        elif isinstance(op, p.Add):
            assert {specs[name].shape for name in op.inputs} == {out.shape}
        elif isinstance(op, p.Concat):
            assert out.shape[0] == sum(specs[name].shape[0] for name in op.inputs)
        specs[out.name] = out
    read = {name for op in frozen.ops for name in op.inputs}
    assert set(names) - read == {frozen.output.name}, "every tensor but the last is read by somebody"


def check_layer(op: p.Linear, source: p.Tensor) -> None:
    count = op.output.shape[0]
    assert op.weight.dtype == np.int8 and op.bias.dtype == np.int32 and op.shift.dtype == np.uint8
    assert op.weight_scale.dtype == np.float32 and op.weight_scale.shape == op.bias.shape == op.shift.shape == (count,)
    assert len(op.weight) == count and np.isfinite(op.weight_scale).all() and (op.weight_scale > 0).all()
    assert -(2 ** (op.weight_bits - 1)) <= op.weight.min() and op.weight.max() <= 2 ** (op.weight_bits - 1) - 1
    centred = op.weight.astype(np.int64)
    if op.weight_zero is not None:
        assert op.weight_zero.dtype == np.int8 and op.weight_zero.shape == (count,)
        assert -(2 ** (op.weight_bits - 1)) <= op.weight_zero.min() and op.weight_zero.max() < 2 ** (op.weight_bits - 1)
        centred -= op.weight_zero.reshape(-1, *[1] * (op.weight.ndim - 1))
    shifted = centred << op.shift.astype(np.int64).reshape(-1, *[1] * (op.weight.ndim - 1))
    assert np.array_equal(op.used, shifted) and op.shift.max() + op.weight_bits <= 8
    if op.weight_zero is None:
        assert shifted.min() >= -128 and shifted.max() <= 127
    assert np.abs(op.bias.astype(np.int64)).max() < 2**24
    reach = np.abs(shifted).reshape(count, -1).sum(1).max()
    most = max(source.high - source.zero_point, source.zero_point - source.low)
    assert op.wide == (reach * most >= 2**24) and reach * most < 2**31
    if isinstance(op, p.Conv):
        assert op.weight.shape[1] * op.groups == source.shape[0] and count % op.groups == 0
        for axis in (0, 1):
            span = (
                source.shape[1 + axis] + 2 * op.padding[axis] - op.dilation[axis] * (op.weight.shape[2 + axis] - 1) - 1
            )
            assert op.output.shape[1 + axis] == span // op.stride[axis] + 1
    else:
        assert op.weight.shape[1:] == source.shape


def test_programs_of_random_subnets_are_self_consistent() -> None:
    supernet = quantized_supernet(activation_symmetry=("symmetric", "asymmetric"))
    for seed in range(30):
        subnet = supernet.space.sample(generator(seed))
        with supernet.activate(subnet):
            frozen = freeze(supernet.module, meta={"subnet": subnet.id})
        check(frozen)
        assert frozen.output.shape == (5,) and frozen.target == "onnxruntime-cpu" and frozen.add == "both"
        assert frozen.meta == {"subnet": subnet.id} and frozen.ops[0].output.shape == IMAGE
        assert frozen.tensor(frozen.output.name) is frozen.output


def test_first_and_last_layer_have_eight_bits_in_every_program() -> None:
    supernet = quantized_supernet()
    for seed in range(10):
        with supernet.activate(supernet.space.sample(generator(seed))):
            frozen = freeze(supernet.module)
        layers = [op for op in frozen.ops if isinstance(op, p.Linear)]
        assert layers[0].weight_bits == layers[-1].weight_bits == 8 and frozen.ops[0].output.bits == 8
        assert frozen.output.bits == 8 and frozen.tensor(layers[-1].inputs[0]).bits == 8


def test_bits_in_the_program_are_those_of_the_subnet() -> None:
    supernet = quantized_supernet()
    for seed in range(10):
        subnet = supernet.space.sample(generator(seed))
        with supernet.activate(subnet):
            frozen = freeze(supernet.module)
        for op in frozen.ops:
            if isinstance(op, p.Linear) and f"{op.path}.weight_bits" in subnet:
                assert op.weight_bits == subnet[f"{op.path}.weight_bits"]
            if not isinstance(op, (p.Reshape, p.MaxPool, p.Clip)) and f"{op.path}.activation_bits" in subnet:
                assert op.output.bits == subnet[f"{op.path}.activation_bits"]


def test_freezing_changes_nothing() -> None:
    network = quantized().train()
    network.stem_bn.eval()
    modes = [module.training for module in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    freeze(network)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_an_example_of_another_size() -> None:
    network = quantized()
    frozen = freeze(network, images(3, shape=(3, 16, 12)))
    check(frozen)
    assert frozen.ops[0].output.shape == (3, 16, 12)
    x = images(2, shape=(3, 16, 12))
    assert np.array_equal(slow.run(frozen, x.numpy())[frozen.output.name], network.integers(x).numpy())


def test_what_is_not_quantized_cannot_be_frozen() -> None:
    with pytest.raises(InputError, match=r"TinyNet is not a quantized network\. Pass it through nasq\.quant\.quantize"):
        freeze(tiny())


class Pick(nn.Module):
    """One of two inputs."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x, y)[self.index]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.pick = elastic.OneOf(Choice("pick", ("one", "two")), one=Pick(0), two=Pick(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.one(x), self.two(x))


@pytest.mark.parametrize("option", ["one", "two"])
def test_what_the_output_does_not_depend_on_is_not_in_the_program(option: str) -> None:
    """A branch that ignores an input: its last operation is the output's, and nothing dead is shipped."""
    network = quantize(TwoInputs(), images(1), activation_bits=(8,))
    calibrate(network, images(8))
    supernet = Supernet(network).eval()
    with supernet.activate({"pick": option}):
        frozen, x = freeze(network), images(2)
        made = slow.run(frozen, x.numpy())[frozen.output.name]
        assert np.array_equal(made, network.integers(x).numpy())
        assert frozen.ops[-1].path == option
        check(frozen)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_asymmetric_weights_are_in_the_program(granularity: str, tmp_path: Path) -> None:
    """Evaluation, program, bundle and the independent reference agree; negative scales of norms included."""
    options: dict[str, Any] = {"weight_symmetry": ("symmetric", "asymmetric"), "weight_granularity": (granularity,)}
    supernet, x = quantized_supernet(target="generic", **options), images(4, 77)
    used = set()
    for seed in range(8):
        subnet = supernet.space.sample(generator(seed))
        with supernet.activate(subnet):
            frozen, integers = freeze(supernet.module), supernet.module.integers(x).numpy()
        check(frozen)
        assert np.array_equal(slow.run(frozen, x.numpy())[frozen.output.name], integers)
        bundle.write(tmp_path / "b", frozen)
        assert np.array_equal(Reference(tmp_path / "b").run(x.numpy()), integers)
        for op in frozen.ops:
            if isinstance(op, p.Linear) and f"{op.path}.weight_symmetry" in subnet:
                assert (op.weight_zero is not None) == (subnet[f"{op.path}.weight_symmetry"] == "asymmetric")
                used.add(op.weight_zero is not None and bool(op.weight_zero.any()))
    assert used == {True, False}
