"""Squeeze-excitation, tables, slices and transformers: the reference, the file, the readback, and each layer alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import pytest
from numpy.typing import NDArray

from nasq.deploy import bundle, parity, readback
from nasq.deploy.onnx import export
from nasq.deploy.reference import Reference
from nasq.errors import ArtifactError
from nasq.quant import program as p
from nasq.quant.operations import KINDS
from nasq.quant.program import Program
from tests.deploy.programs import random_input
from tests.deploy.test_reference import clip, exact, fp32
from tests.deploy.token_programs import cnn_program, vit_program


def shipped(program: Program, directory: Path) -> Path:
    bundle.write(directory, program, {parity.MODEL: export(program)})
    return directory


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("build", [cnn_program, vit_program])
def test_the_file_equals_the_reference_as_a_whole_and_layer_by_layer(
    build: Callable[[int], Program], seed: int, tmp_path: Path
) -> None:
    program: Program = build(seed)
    report = parity.check(shipped(program, tmp_path / "b"), random_input(program, 24, seed))
    assert report.findings == ()
    assert [str(layer) for layer in report.layers if layer.differing] == []
    assert report.differing == 0


# -- the reference against loops over exact fractions


def slow_mul(op: p.Mul, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    factors = []
    for values, tensor in zip(q, made, strict=True):
        place = tuple(0 if size == 1 else i for i, size in zip(at, values.shape, strict=True))
        factors.append(int(values[place]) - tensor.zero_point)
    unit = fp32(exact(made[0].scale) * exact(made[1].scale))
    product = fp32(fp32(Fraction(factors[0] * factors[1])) * fp32(unit / exact(op.output.scale)))
    return clip(round(fp32(product + op.output.zero_point)), op.output)


def slow_sub(op: p.Sub, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    one, other = (
        fp32(exact(tensor.scale) * (int(values[at]) - tensor.zero_point))
        for values, tensor in zip(q, made, strict=True)
    )
    return clip(round(fp32(fp32(one - other) / exact(op.output.scale))) + op.output.zero_point, op.output)


def slow_matmul(op: p.MatMul, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    *before, row, column = at
    left, right = q[0][(*before, row)], q[1][(*before, slice(None), column)]
    zeros = made[0].zero_point, made[1].zero_point
    total = sum((int(a) - zeros[0]) * (int(b) - zeros[1]) for a, b in zip(left, right, strict=True))
    unit = fp32(fp32(exact(made[0].scale) * exact(made[1].scale)) / exact(op.output.scale))
    return clip(round(fp32(fp32(Fraction(total)) * unit)) + op.output.zero_point, op.output)


def slow_softmax(op: p.Softmax, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    *before, row, column = at
    seen = row + 1 if op.causal else q[0].shape[-1]
    if column >= seen:
        return clip(op.output.zero_point, op.output)
    whole = [int(one) for one in q[0][(*before, row)]][:seen]
    # What is masked counts as container integer 0 for the largest, which is never above it.
    largest = max([*whole, 0] if op.causal and seen < q[0].shape[-1] else whole)
    weights = [int(op.table[largest - one]) for one in whole]
    share = fp32(Fraction(weights[column], sum(weights)))
    return clip(round(fp32(share / exact(op.output.scale))) + op.output.zero_point, op.output)


def slow_layer_norm(op: p.LayerNorm, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    index = tuple(slice(None) if dim in op.dims else i for dim, i in enumerate(at))
    whole = [int(one) for one in q[0][index].ravel()]
    count, total, step = len(whole), sum(whole), made[0].scale
    spread = count * sum(one * one for one in whole) - total * total
    root = float(spread) + op.eps * (count * count) / (step * step)
    normal = float(np.float32((count * int(q[0][at]) - total) / math.sqrt(root)))
    gain, shift = (exact(array[at[op.channel]]) for array in (op.gain, op.shift))
    real = fp32(fp32(exact(normal) * gain) + shift)
    return clip(round(fp32(real / exact(op.output.scale))) + op.output.zero_point, op.output)


def slow_pool(op: p.AvgPool, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    channel, y, x = at
    inside, total = 0, 0
    for i in range(op.kernel[0]):
        for j in range(op.kernel[1]):
            row, column = y * op.stride[0] + i - op.padding[0], x * op.stride[1] + j - op.padding[1]
            if 0 <= row < q[0].shape[1] and 0 <= column < q[0].shape[2]:
                inside += 1
                total += int(q[0][channel, row, column]) - made[0].zero_point
    step, scale = exact(made[0].scale), exact(op.output.scale)
    if not op.counted:
        steps = fp32(fp32(Fraction(total, inside)) / fp32(scale / step))
        return clip(round(fp32(steps + op.output.zero_point)), op.output)
    whole = op.kernel == q[0].shape[1:] and op.padding == (0, 0)
    count = op.kernel[0] * op.kernel[1]
    ratio = fp32(step / fp32(scale * count)) if whole else fp32(fp32(step * fp32(Fraction(1, count))) / scale)
    return clip(round(fp32(fp32(Fraction(total)) * ratio)) + op.output.zero_point, op.output)


def slow_tokens(op: p.Linear, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    *before, out = at
    row = [int(one) - made[0].zero_point for one in q[0][tuple(before)]]
    total = sum(a * int(b) for a, b in zip(row, op.used[out], strict=True)) + int(op.bias[out])
    unit = fp32(fp32(exact(made[0].scale) * exact(op.weight_scale[out])) / exact(op.output.scale))
    return clip(round(fp32(fp32(Fraction(total)) * unit)) + op.output.zero_point, op.output)


def slow_join(op: p.Concat, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    place = list(at)
    for values, source in zip(q, made, strict=True):
        if place[op.dim] < values.shape[op.dim]:
            real = fp32(exact(source.scale) * (int(values[tuple(place)]) - source.zero_point))
            same = (source.scale, source.zero_point) == (op.output.scale, op.output.zero_point)
            steps = (
                int(values[tuple(place)]) - source.zero_point if same else round(fp32(real / exact(op.output.scale)))
            )
            return clip(steps + op.output.zero_point, op.output)
        place[op.dim] -= values.shape[op.dim]
    raise AssertionError("nothing there")


def slow_slice(op: p.Slice, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    return int(q[0][tuple(start + step * i for start, step, i in zip(op.start, op.step, at, strict=True))])


def slow_pad(op: p.Pad, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    place = tuple(i - before for i, before in zip(at, op.before, strict=True))
    inside = all(0 <= i < size for i, size in zip(place, q[0].shape, strict=True))
    return int(q[0][place]) if inside else made[0].zero_point


def slow_transpose(op: p.Transpose, q: list[NDArray[Any]], made: list[p.Tensor], at: tuple[int, ...]) -> int:
    place = [0] * len(at)
    for i, source in zip(at, op.order, strict=True):
        place[source] = i
    return int(q[0][tuple(place)])


SLOW: dict[type[p.Op], Callable[..., int]] = {
    p.Mul: slow_mul, p.Sub: slow_sub, p.MatMul: slow_matmul, p.Softmax: slow_softmax, p.LayerNorm: slow_layer_norm,
    p.AvgPool: slow_pool, p.Linear: slow_tokens, p.Concat: slow_join, p.Slice: slow_slice, p.Pad: slow_pad,
    p.Transpose: slow_transpose,
    p.Table: lambda op, q, made, at: int(op.values[int(q[0][at])]),
    p.Constant: lambda op, q, made, at: int(op.values[at]),
    p.Scale: lambda op, q, made, at: int(q[0][at]),
    p.Upsample: lambda op, q, made, at: int(q[0][at[0], at[1] // op.factor[0], at[2] // op.factor[1]]),
    p.Reshape: lambda op, q, made, at: int(q[0].ravel()[np.ravel_multi_index(at, op.output.shape)]),
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_every_operation_equals_the_loops_over_fractions(seed: int, causal: bool, tmp_path: Path) -> None:
    program = vit_program(seed, causal=True) if causal else cnn_program(seed)
    bundle.write(tmp_path / "b", program)
    executor = Reference(tmp_path / "b")
    values = executor.run(random_input(program, 1, seed), every=True)
    rng = np.random.default_rng(seed)
    for index, op in enumerate(program.ops):
        if type(op) not in SLOW:
            continue
        made = [program.tensor(name) for name in op.inputs]
        q = [values[name][0] for name in op.inputs]
        every = list(np.ndindex(*op.output.shape))
        for place in [every[i] for i in rng.permutation(len(every))[:60]]:
            assert values[op.output.name][0][place] == SLOW[type(op)](op, q, made, place), (op.output.name, place)
        alone = executor.step(index, {name: values[name] for name in op.inputs})
        assert np.array_equal(alone, values[op.output.name])


def test_the_programs_hold_every_operation() -> None:
    ops = {type(op) for program in (cnn_program(0), vit_program(0)) for op in program.ops}
    assert ops >= set(SLOW) and ops | {p.Add, p.MaxPool, p.Clip} == set(KINDS.values())


# -- bundles and files


@pytest.mark.parametrize("build", [cnn_program, vit_program])
def test_what_is_read_is_what_was_written(build: Callable[[int], Program], tmp_path: Path) -> None:
    program = build(1)
    bundle.write(tmp_path / "b", program)
    found = bundle.read(tmp_path / "b")
    for one, other in zip(found.ops, program.ops, strict=True):
        for name, value in vars(other).items():
            same = np.array_equal if isinstance(value, np.ndarray) else eq
            assert same(getattr(one, name), value), (other.output.name, name)


PROGRAMS = {"cnn": cnn_program(0), "vit": vit_program(0)}
MODELS = {name: onnx_package.load_model_from_string(export(program)) for name, program in PROGRAMS.items()}


def found_in(model: onnx_package.ModelProto, name: str) -> list[str]:
    try:
        return [str(one) for one in readback.compare(readback.read(model.SerializeToString()), PROGRAMS[name])]
    except ArtifactError as error:
        return [str(error)]


@pytest.mark.parametrize("which", MODELS)
def test_any_dropped_node_is_found(which: str) -> None:
    for index in range(len(MODELS[which].graph.node)):
        model = onnx_package.ModelProto()
        model.CopyFrom(MODELS[which])
        node = model.graph.node.pop(index)
        for other in model.graph.node:
            for place, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[place] = node.input[0]
        assert found_in(model, which) != [], node


@pytest.mark.parametrize("which", MODELS)
def test_one_changed_bit_in_any_initialiser_is_found(which: str) -> None:
    rng = np.random.default_rng(0)
    for index in range(len(MODELS[which].graph.initializer)):
        model = onnx_package.ModelProto()
        model.CopyFrom(MODELS[which])
        value = model.graph.initializer[index]
        raw = bytearray(value.raw_data)
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        value.raw_data = bytes(raw)
        assert found_in(model, which) != [], value.name


def with_op(program: Program, kind: type[p.Op], **changes: Any) -> Program:
    index = next(i for i, op in enumerate(program.ops) if type(op) is kind)
    ops = list(program.ops)
    ops[index] = replace(ops[index], **changes)
    return replace(program, ops=ops)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (p.Table, {"values": np.full(256, 255, np.uint8)}, "its values reach from 255 to 255, and its range is"),
        (p.Table, {"values": np.zeros(16, np.uint8)}, r"uint8 of shape \(16,\); allowed: uint8 of shape \(256,\)"),
        (p.Transpose, {"order": (0, 0, 1, 2)}, "the order .* does not fit"),
        (p.Pad, {"before": (4, 0)}, "the padding .* does not fit an input"),
        (p.Slice, {"start": (10, 0)}, "elements from 10 on"),
        (p.Upsample, {"factor": (0, 1)}, "at least 1 each"),
        (p.Softmax, {"table": np.arange(256, dtype=np.int32)}, "its table has to fall"),
        (p.Softmax, {"table": np.full(256, 1 << 23, np.int32)}, r"must be at most 2\^24"),
        (p.LayerNorm, {"eps": 0.0}, "eps 0.0 has to be above 0"),
        (p.LayerNorm, {"gain": np.full(16, np.nan, np.float32)}, "finite fp32"),
        (p.LayerNorm, {"dims": (5,)}, "dimensions .* do not fit"),
        (p.Concat, {"dim": 3}, "cannot be joined on dimension 3"),
        (p.Constant, {"values": np.zeros((2, 2), np.uint8)}, r"of shape \(2, 2\); allowed"),
    ],
)
def test_what_does_not_hold_is_not_written(kind: type[p.Op], changes: Any, message: str, tmp_path: Path) -> None:
    program = next(one for one in (vit_program(0, (4,)), cnn_program(0, (4,))) if kind in {type(op) for op in one.ops})
    with pytest.raises(ArtifactError, match=message):
        bundle.write(tmp_path / "b", with_op(program, kind, **changes))
