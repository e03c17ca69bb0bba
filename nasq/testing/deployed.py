"""Checks of the quantized supernet and of exported files."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path

import torch

from nasq.cost import CostModel
from nasq.deploy import bundle, onnx, parity
from nasq.quant import QuantizedNetwork, freeze
from nasq.quant import program as p
from nasq.testing.network import expect_same
from nasq.testing.subject import Subject, expect, shown

__all__ = ["exported", "quantized"]


def quantized(subject: Subject) -> str:
    """The integer form is extracted bit for bit, and its costs are those of its program."""
    supernet, x = subject.quantized, subject.inputs(2)
    assert isinstance(supernet.module, QuantizedNetwork)
    subnets = subject.some(supernet.space, max(subject.count // 2, 3))
    found = CostModel(supernet).evaluate(supernet.space.to_rows(subnets))
    for index, subnet in enumerate(subnets):
        with supernet.activate(subnet), torch.no_grad():
            wanted = supernet.module.integers(x)
            program = freeze(supernet.module)
        plain = supernet.extract(subnet).eval()
        assert isinstance(plain, QuantizedNetwork)
        expect_same(plain.integers(x), wanted, f"the extracted quantized subnet {shown(subnet)}")
        counted = {
            "params": sum(t.numel() for name, t in plain.named_parameters() if "quantization." not in name),
            "bytes": sum(_stored(op) for op in program.ops if isinstance(op, p.Linear)),
        }
        for cost, value in counted.items():
            given = int(found[cost][index])
            expect(given == value, f"{cost} of the quantized subnet {shown(subnet)} are {given}, and {value} counted.")
    return f"{len(subnets)} subnets with bits, of {len(supernet.space)} choices"


def _stored(op: p.Linear) -> int:
    """Bytes of packed weights, each output channel from a byte on, an fp32 scale and an int32 bias per channel, and an int32
    multiplier per group of inputs.
    """
    rows = op.weight.shape[0]
    return int(rows * (-(-op.weight_bits * prod(op.weight.shape[1:]) // 8) + 8 + 4 * len(op.sizes)))


def exported(subject: Subject) -> str:
    """The exported files compute the integers that nasq evaluates."""
    supernet = subject.quantized
    network = supernet.module
    assert isinstance(network, QuantizedNetwork)
    images = subject.inputs(subject.images, 4)
    total = 0
    subnets = subject.some(supernet.space, subject.exported)
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        for index, subnet in enumerate(subnets):
            with supernet.activate(subnet), torch.no_grad():
                program = freeze(network)
            directory = Path(scratch) / str(index)
            bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
            report = parity.check(directory, images.numpy(), layer_images=max(subject.images // 2, 2))
            expect(report.passed, f"the exported subnet {shown(subnet)} fails its gate: {report.summary()}")
            total += report.total
    return f"{len(subnets)} subnets, {total} final integers"
