"""Weights with zero-points: held by a program, stored in a bundle, run by the reference, refused by the ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nasq.deploy import bundle
from nasq.deploy.layers import accumulator_bound
from nasq.deploy.onnx import export
from nasq.deploy.program_json import json_from_program, program_from_json
from nasq.deploy.reference import Reference
from nasq.errors import ArtifactError, TargetError
from nasq.quant.program import Linear, Program
from tests.deploy.programs import KINDS, random_input, random_program, residual_program
from tests.deploy.test_bundle import assert_same
from tests.deploy.test_reference import slow_step

Arrays = dict[str, NDArray[Any]]


def asymmetric(program: Program, seed: int = 0) -> Program:
    """The same function with random weight zero-points: one more bit holds ``weight + zero`` for every zero.

    Layers that have no bit left stay symmetric.
    """
    rng, ops = np.random.default_rng(seed), list(program.ops)
    for index, op in enumerate(ops):
        if isinstance(op, Linear) and op.weight_bits + int(op.shift.max()) < 8:
            half = 1 << (op.weight_bits - 1)
            zero = rng.integers(-half, half, len(op.weight)).astype(np.int8)
            weight = op.weight + zero.reshape(-1, *[1] * (op.weight.ndim - 1))
            ops[index] = replace(op, weight=weight, weight_bits=op.weight_bits + 1, weight_zero=zero)
    return replace(program, ops=tuple(ops), target="generic")


def plain(op: Any) -> Any:
    """The same layer without zero-points, its weights in wider integers."""
    if not isinstance(op, Linear) or op.weight_zero is None:
        return op
    column = op.weight_zero.astype(np.int16).reshape(-1, *[1] * (op.weight.ndim - 1))
    return replace(op, weight=op.weight.astype(np.int16) - column, weight_zero=None)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_equals_the_loops_over_fractions(seed: int, tmp_path: Path) -> None:
    program = asymmetric(random_program(seed, size=len(KINDS), channels=4, image=(9, 8)), seed)
    bundle.write(tmp_path / "b", program)
    executor, x = Reference(tmp_path / "b"), random_input(program, 1, seed)
    values = executor.run(x, every=True)
    for op in program.ops[1:]:
        assert np.array_equal(values[op.output.name][0], slow_step(plain(op), program, values)), op.output.name


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_zero_point_that_the_weights_hold_as_well_changes_nothing_and_one_more_does(
    bits: int, tmp_path: Path
) -> None:
    original = residual_program(0, bits, 8)
    program = asymmetric(original)
    moved = list(program.ops)
    layer = moved[2]
    assert isinstance(layer, Linear) and layer.weight_zero is not None
    moved[2] = replace(layer, weight_zero=layer.weight_zero + np.int8(1))
    found = []
    for index, variant in enumerate((original, program, replace(program, ops=tuple(moved)))):
        bundle.write(tmp_path / str(index), variant)
        found.append(Reference(tmp_path / str(index)).run(random_input(program, 32, 1)))
    assert len(np.unique(found[0])) > 20
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_is_what_was_written(seed: int, tmp_path: Path) -> None:
    program = asymmetric(random_program(seed, size=14))
    bundle.write(tmp_path / "b", program)
    assert_same(bundle.read(tmp_path / "b"), program)
    document, arrays = json_from_program(program)
    assert_same(program_from_json(json.loads(json.dumps(document)), arrays), program)
    layers = [op for op in program.ops if isinstance(op, Linear)]
    held = {f"z{index}": len(op.weight) for index, op in enumerate(layers) if op.weight_zero is not None}
    assert 0 < len(held) < len(layers)
    assert {name: array.nbytes for name, array in arrays.items() if name.startswith("z")} == held


def test_symmetric_programs_are_stored_as_before() -> None:
    document, arrays = json_from_program(residual_program(0, 3, 5))
    assert "zeros" not in json.dumps(document) and not any(name.startswith("z") for name in arrays)


def test_the_accumulator_bound_counts_what_is_multiplied() -> None:
    program = asymmetric(residual_program(0, 4, 4))
    for op in program.ops:
        if isinstance(op, Linear):
            source = program.tensor(op.inputs[0])
            assert np.array_equal(accumulator_bound(op, source), accumulator_bound(plain(op), source))


def test_the_onnx_file_does_not_hold_them() -> None:
    with pytest.raises(TargetError, match=r"layer 'conv_2' has asymmetric weights.*onnxruntime-cpu"):
        export(asymmetric(residual_program(0, 4, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("z3"), r"the tensor 'z3' is missing"),
        (lambda a: a.update(z9=a["z1"]), r"the tensor 'z9' is unknown"),
        (
            lambda a: a.update(z1=a["z1"][:-1]),
            r"'z1' is uint8 of shape \(7,\); subnet\.json needs uint8 of shape \(8,\)",
        ),
        (lambda a: a.update(z1=a["z1"] | np.uint8(32)), r"zero-points of 'conv_2' reach \d+; 5 bits hold 0 to 31"),
    ],
)
def test_arrays_that_do_not_hold(change: Callable[[Arrays], Any], message: str) -> None:
    document, arrays = json_from_program(asymmetric(residual_program(0, 4, 4)))
    change(arrays)
    with pytest.raises(ArtifactError, match=message):
        program_from_json(document, arrays)


def test_another_name_is_refused() -> None:
    document, arrays = json_from_program(asymmetric(residual_program(0, 4, 4)))
    document["ops"][2]["weight"]["zeros"] = "w0"
    with pytest.raises(ArtifactError, match=r"zero-points at 'z1', not 'w0'"):
        program_from_json(document, arrays)


def test_programs_that_do_not_hold_are_not_written() -> None:
    program = asymmetric(residual_program(0, 4, 4))
    layer = program.ops[2]
    assert isinstance(layer, Linear) and layer.weight_zero is not None
    for zero, message in (
        (np.full_like(layer.weight_zero, 16), r"weight zero-points reach from 16 to 16, and 5 bits hold -16 to 15"),
        (layer.weight_zero[1:], r"its weight_zero is int8 of shape \(7,\)"),
        (layer.weight_zero.astype(np.int64), r"its weight_zero is int64"),
    ):
        ops = (*program.ops[:2], replace(layer, weight_zero=zero), *program.ops[3:])
        with pytest.raises(ArtifactError, match=message):
            json_from_program(replace(program, ops=ops))
