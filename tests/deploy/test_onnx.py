"""The exported file against the independent reference, run by the runtime with all optimizations on."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nasq.deploy import bundle, parity
from nasq.deploy.onnx import INTEGERS, OPSET, OUTPUT, export, export_float
from nasq.deploy.reference import Reference
from nasq.deploy.runtimes import OnnxRuntime, kernel_counts
from nasq.errors import InputError, TargetError
from nasq.quant.program import Add, AvgPool, Conv, Linear, Op, Program
from tests.deploy.programs import KINDS, Maker, fused_program, random_input, random_program, residual_program


def expected(program: Program, x: np.ndarray, tmp_path: Path) -> np.ndarray:
    bundle.write(tmp_path / "bundle", program)
    return Reference(tmp_path / "bundle").run(x)


def count(program: Program, kind: type[Op]) -> int:
    return sum(type(op) is kind for op in program.ops)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threads", [1, 2])
def test_random_programs_of_every_operation_equal_the_reference(seed: int, threads: int, tmp_path: Path) -> None:
    program = random_program(seed, len(KINDS) + 2)
    x = random_input(program, 40, seed)
    got = OnnxRuntime(export(program), threads).run(x)
    assert got.dtype == np.uint8
    assert int((got != expected(program, x, tmp_path)).sum()) == 0


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_residual_network_is_exact_and_fully_fused_at_every_bit_width(bits: int, tmp_path: Path) -> None:
    program = residual_program(bits, bits, bits)
    x = random_input(program, 64, bits)
    data = export(program)
    assert int((OnnxRuntime(data).run(x) != expected(program, x, tmp_path)).sum()) == 0
    kernels = kernel_counts(data)
    assert kernels["QLinearConv"] == count(program, Conv)
    assert kernels["QLinearAdd"] == count(program, Add)
    assert kernels["QGemm"] == count(program, Linear)
    assert kernels["QLinearGlobalAveragePool"] == count(program, AvgPool)
    assert (kernels["QuantizeLinear"], kernels["DequantizeLinear"]) == (1, 1)
    assert not {"Conv", "FusedConv", "Add", "Gemm", "Cast", "MatMulInteger"} & set(kernels)


def test_the_dequantized_output_holds_the_integers_exactly() -> None:
    program = residual_program(0, 4, 6)
    runtime = OnnxRuntime(export(program))
    x = random_input(program, 30, 1)
    integers, real, tensor = runtime.run(x), runtime.logits(x), program.output
    assert real.dtype == np.float32
    np.testing.assert_array_equal(real, (integers.astype(np.float32) - tensor.zero_point) * np.float32(tensor.scale))
    np.testing.assert_array_equal(np.rint(real / tensor.scale) + tensor.zero_point, integers)


@pytest.mark.parametrize("ratio", [2 / 3, 2 / 9, 1 / 2, 3 / 4, 1.1])
def test_a_window_is_pooled_as_a_depthwise_convolution_even_at_ties(ratio: float, tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0))
    maker.avg_pool(maker.input((3, 20, 20)), (3, 3), (1, 1), bits=8)
    source, pool = maker.ops
    grid = replace(pool.output, scale=float(np.float32(np.float32(source.output.scale) * np.float32(ratio))))
    program = replace(maker.program(), ops=[source, replace(pool, output=grid)])
    steps = np.random.default_rng(1).integers(0, 60, (30, 3, 20, 20))
    views = np.lib.stride_tricks.sliding_window_view(steps, (3, 3), axis=(2, 3)).sum((-1, -2)).astype(np.float32)
    sx, sy, share = np.float32(source.output.scale), np.float32(grid.scale), np.float32(1) / np.float32(9)
    right = np.clip(np.rint(views * (sx * share / sy)) + grid.zero_point, grid.low, grid.high)
    x = (steps * sx).astype(np.float32)
    np.testing.assert_array_equal(OnnxRuntime(export(program)).run(x), right)
    np.testing.assert_array_equal(expected(program, x, tmp_path), right)


def test_the_second_output_changes_no_fusion() -> None:
    data = export(residual_program(0, 4, 4))
    alone = onnx.load_model_from_string(data)
    del alone.graph.output[1]
    assert [value.name for value in alone.graph.output] == [OUTPUT]
    assert kernel_counts(alone.SerializeToString()) == kernel_counts(data)


def test_packed_and_plain_files_compute_the_same_and_packed_is_smaller() -> None:
    program = residual_program(3, 4, 5, channels=24)
    x = random_input(program, 20, 0)
    packed, plain = export(program), export(program, packed=False)
    np.testing.assert_array_equal(OnnxRuntime(packed).run(x), OnnxRuntime(plain).run(x))
    assert kernel_counts(packed) == kernel_counts(plain)
    assert len(packed) < 0.6 * len(plain)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_packed_file_has_the_bytes_of_its_bits(bits: int) -> None:
    program = residual_program(bits, bits, 8, channels=32)
    layers = [op for op in program.ops if isinstance(op, Linear)]
    weights = sum(-(-op.weight.size * (8 if op in (layers[0], layers[-1]) else bits) // 8) for op in layers)
    channels = sum(len(op.shift) for op in layers)
    assert weights + 8 * channels < len(export(program)) <= weights + 8 * channels + 450 * len(program.ops)


def test_shifted_low_bit_weights_are_packed_too(tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0), 4 * (4,))
    last = maker.conv(maker.input((3, 8, 8)), 16, 3, padding=(1, 1), weight_bits=8)
    last = maker.conv(last, 16, 3, padding=(1, 1), weight_bits=3, shifted=True)
    program = maker.classifier(last, 10)
    conv = program.ops[2]
    assert isinstance(conv, Conv) and conv.shift.any()
    data = export(program)
    assert "MatMulInteger" in {node.op_type for node in onnx.load_model_from_string(data).graph.node}
    x = random_input(program, 40, 1)
    assert int((OnnxRuntime(data).run(x) != expected(program, x, tmp_path)).sum()) == 0


def test_the_graph_around_the_weights_stays_small() -> None:
    program = residual_program(0, 8, 8, channels=64)
    layers = [op for op in program.ops if isinstance(op, Linear)]
    weights = sum(op.weight.size for op in layers)
    channels = sum(len(op.shift) for op in layers)
    assert weights > 150_000
    assert len(export(program)) <= weights + 8 * channels + 330 * len(program.ops)


def test_the_file_says_what_it_is_and_names_its_layers() -> None:
    program = residual_program(0, 4, 4)
    model = onnx.load_model_from_string(export(program))
    facts = {item.key: item.value for item in model.metadata_props}
    assert facts["nasq.target"] == "onnxruntime-cpu"
    assert set(facts) == {"nasq.version", "nasq.schema", "nasq.target"}
    assert [node.name for node in model.graph.node if node.name] == [op.path for op in program.ops]
    assert [value.name for value in model.graph.output] == [OUTPUT, INTEGERS]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    onnx.checker.check_model(model, full_check=True)


def test_scales_of_activations_are_zero_dimensional() -> None:
    model = onnx.load_model_from_string(export(residual_program(0, 4, 4)))
    dims = {value.name: tuple(value.dims) for value in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 1 + 8 + 3 + 1 + 1  # input, convolutions, sums, pool, linear
    assert {dims[name] for node in quantizers for name in node.input[1:]} == {()}


def test_a_path_that_occurs_twice_is_numbered() -> None:
    program = residual_program(0, 4, 4)
    paths = ["same" if isinstance(op, Conv) else op.path for op in program.ops]
    program = replace(program, ops=[replace(op, path=path) for op, path in zip(program.ops, paths, strict=True)])
    names = Counter(node.name for node in onnx.load_model_from_string(export(program)).graph.node if node.name)
    assert max(names.values()) == 1
    assert {"same", "same@2", "same@8"} <= set(names)


def test_a_fixed_batch_size_is_kept_and_wrong_ones_are_refused() -> None:
    program = residual_program(0, 4, 4)
    runtime = OnnxRuntime(export(program, batch=4))
    x = random_input(program, 8, 0)
    np.testing.assert_array_equal(runtime.run(x), OnnxRuntime(export(program)).run(x))
    with pytest.raises(InputError, match="batches of 4 images, and 6 is not a multiple"):
        runtime.run(x[:6])
    with pytest.raises(InputError, match="batch is 0; it must be at least 1"):
        export(program, batch=0)


@dataclass(frozen=True)
class Swish(Op):
    """An operation that no exporter knows."""


def test_an_unsupported_operation_names_itself_and_its_layer() -> None:
    program = residual_program(0, 4, 4)
    last = program.ops[-1].output
    strange = Swish((last.name,), replace(last, name="odd"), "head.act")
    with pytest.raises(TargetError, match=r"layer 'head\.act': the operation Swish cannot be written"):
        export(replace(program, ops=[*program.ops, strange]))


def test_a_sum_that_the_runtime_would_fuse_with_its_convolution_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'add_4'.* fuses this sum with 'conv_3' and rounds once .*onnxruntime-cpu"):
        export(replace(residual_program(0, 4, 4), add="one", target="openvino-cpu"))


@pytest.mark.parametrize(
    ("target", "own", "rule"), [("openvino-cpu", "one", "both"), ("onnxruntime-cpu", "both", "one")]
)
def test_a_program_with_another_rule_for_sums_than_its_target_is_refused(target: str, own: str, rule: str) -> None:
    program = residual_program(0, 4, 4) if rule == "both" else fused_program(residual_program(0, 4, 4))
    wanted = (
        rf"adds by the rule '{rule}', and its target '{target}' by '{own}': .*Quantize .*example, '{target}'.*'{rule}'"
    )
    with pytest.raises(InputError, match=wanted):
        export(replace(program, target=target))
    export(replace(program, target="a target of somebody else's"))


def test_a_shift_that_leaves_int8_is_refused() -> None:
    program = residual_program(0, 8, 8)
    conv = program.ops[1]
    assert isinstance(conv, Conv)
    wrong = replace(conv, shift=np.full_like(conv.shift, 1), path="stem")
    with pytest.raises(TargetError, match="layer 'stem': weight << shift leaves int8"):
        export(replace(program, ops=[program.ops[0], wrong, *program.ops[2:]]))


def test_the_float_baseline_equals_torch_and_restores_the_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = export_float(model, x[:1])
    assert model.training
    with torch.no_grad():
        real = model.eval()(x).numpy()
    np.testing.assert_allclose(OnnxRuntime(data).logits(x.numpy()), real, atol=1e-5)
    with pytest.raises(TargetError, match="the file has no output 'integers'; it has output"):
        OnnxRuntime(data).run(x.numpy())


def test_int4_is_exact_fused_and_as_small_as_it_says(tmp_path: Path) -> None:
    program = residual_program(1, 4, 4, 16)
    paths = [op.path for op in program.ops if isinstance(op, Conv) and op.weight_bits == 4 and not op.shift.any()]
    data, plain = export(program, packed=False, int4=paths), export(program, packed=False)
    count = sum(op.weight.size for op in program.ops if isinstance(op, Conv) and op.path in paths)
    assert len(paths) >= 6 and 0.4 * count < len(plain) - len(data) <= count / 2
    assert onnx.load_model_from_string(data).opset_import[0].version == 21
    bundle.write(tmp_path / "b", program, {parity.MODEL: data})
    report = parity.check(tmp_path / "b", random_input(program, 32, 0), layer_images=4)
    assert report.passed and report.differing == 0, report.summary()
    assert report.coverage.integer == report.coverage.total


def test_layers_that_cannot_store_int4_are_named() -> None:
    program = residual_program(0, 4, 4)
    with pytest.raises(TargetError, match=r"'conv_1' cannot store INT4: .* \(8 bits, .* Allowed: -8 to 7"):
        export(program, int4=["conv_1"])
    with pytest.raises(InputError, match=r"unknown layer of int4 'conv_0'. Did you mean 'conv_"):
        export(program, int4=["conv_0"])
