"""The form for TensorRT: how it is written, and, on onnxruntime, that it computes the program up to rounding ties."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasq import elastic
from nasq.deploy import tensorrt
from nasq.deploy.onnx import export
from nasq.errors import InputError, TargetError
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.quant.program import Conv, Program
from tests.deploy.programs import residual_program
from tests.networks import images


class Net(nn.Module):
    """Convolutions, a residual sum, pools, a concatenation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.pool(F.relu(x + self.norm2(self.inner(x))))
        x = torch.cat([self.left(x), F.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def made() -> tuple[Program, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Net()
    x = images(64)
    network = quantize(module, x[:1], "tensorrt", weight_bits=(8,), activation_bits=(8,))
    calibrate(network, x)
    assert isinstance(network, QuantizedNetwork)
    network.eval()
    return freeze(network), x, network.integers(x)


def run(data: bytes, x: torch.Tensor, optimized: bool) -> Any:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


@pytest.mark.parametrize("optimized", [False, True])
def test_it_computes_the_program(made: tuple[Program, torch.Tensor, torch.Tensor], optimized: bool) -> None:
    program, x, wanted = made
    real, tensor = run(tensorrt.export(program), x, optimized), program.output
    steps = np.rint(real / np.float32(tensor.scale)) + tensor.zero_point
    assert np.allclose(real, (steps - tensor.zero_point) * tensor.scale)
    away = np.abs(steps - wanted.numpy())
    # In float arithmetic a value at a tie may fall to the other side, and what follows moves with it.
    assert (away > 0).mean() < 0.02 and away.max() <= 1


def test_quantization_is_explicit_adjacent_and_symmetric(made: tuple[Program, torch.Tensor, torch.Tensor]) -> None:
    program, _, _ = made
    grids = {(op.output.zero_point, op.output.low, op.output.high) for op in program.ops}
    assert grids == {(128, 0, 255), (0, 0, 127)}
    model = onnx.load_model_from_string(tensorrt.export(program, batch=2))
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kinds = Counter(node.op_type for node in model.graph.node)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader in readers[node.output[0]]] == ["DequantizeLinear"]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert arrays[node.input[2]].dtype == np.int8 and not arrays[node.input[2]].any()
        if node.op_type in ("Conv", "MatMul", "Add", "Concat", "MaxPool", "AveragePool"):
            assert all(arrays[name].dtype == np.float32 for name in node.input if name in arrays)
    assert kinds["QuantizeLinear"] == len(program.ops) and kinds["Clip"] == 0
    assert [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 8, 8]


def test_what_it_cannot_hold(made: tuple[Program, torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(TargetError, match=r"uint8 tensors and clips, .* nasq\.deploy\.tensorrt\.export"):
        export(made[0])
    with pytest.raises(TargetError, match=r"layer '.*': its tensor of \d bits has the integers .* target 'tensorrt'"):
        tensorrt.export(residual_program(0, 4, 4))
    with pytest.raises(InputError, match="batch is 0"):
        tensorrt.export(made[0], batch=0)
    index, conv = next((i, op) for i, op in enumerate(made[0].ops) if isinstance(op, Conv))
    odd = replace(conv, weight_zero=np.ones(len(conv.weight), np.int8))
    ops = [*made[0].ops[:index], odd, *made[0].ops[index + 1 :]]
    with pytest.raises(TargetError, match=f"layer '{conv.path}': its weights have zero-points"):
        tensorrt.export(replace(made[0], ops=ops))


def test_an_operation_without_a_form() -> None:
    network = quantize(nn.Sequential(elastic.Conv2d(3, 4, 1), nn.ReLU()), images(1), "tensorrt", weight_bits=(8,),
                       activation_bits=(8,))  # fmt: skip
    calibrate(network, images(4))
    program = freeze(network.eval())
    from nasq.quant.program import Clip

    last = program.output
    with pytest.raises(TargetError, match="layer 'odd': the operation 'clip' has no form for TensorRT"):
        tensorrt.export(replace(program, ops=[*program.ops, Clip((last.name,), replace(last, name="c"), "odd")]))
