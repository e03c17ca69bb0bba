"""The reference against loops over exact fractions, one operation at a time and whole programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nasq.deploy import bundle, reference, reference_ops
from nasq.deploy.reference import Reference
from nasq.errors import ArtifactError, InputError
from nasq.quant.packing import pack
from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Linear, MaxPool, Op, Program, Reshape, Tensor
from tests.deploy.programs import KINDS, Maker, random_input, random_program, residual_program


def fp32(value: Fraction) -> Fraction:
    """The nearest fp32 number, ties to even, by the definition: 24 bits, exponents from -149 on."""
    if value == 0:
        return value
    exponent = max(-149, abs(value.numerator).bit_length() - value.denominator.bit_length() - 24)
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


def exact(number: Any) -> Fraction:
    return Fraction(float(number))


def clip(value: int, made: Tensor) -> int:
    return max(made.low, min(made.high, value))


# One output of one operation, in fractions; `q` are nested integers of one image, `at` is the place in the output.
def slow_conv(op: Conv, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    out, row, column = at
    narrow = op.weight.shape[1]
    first = out // (op.weight.shape[0] // op.groups) * narrow
    acc = 0
    for c, i, j in product(range(narrow), range(op.weight.shape[2]), range(op.weight.shape[3])):
        y = row * op.stride[0] - op.padding[0] + i * op.dilation[0]
        x = column * op.stride[1] - op.padding[1] + j * op.dilation[1]
        if 0 <= y < q[0].shape[1] and 0 <= x < q[0].shape[2]:
            acc += (
                (int(q[0][first + c, y, x]) - made[0].zero_point)
                * int(op.weight[out, c, i, j])
                * 2 ** int(op.shift[out])
            )
    return slow_requantize(op, acc, out, made[0])


def slow_linear(op: Linear, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    values = [(int(value) - made[0].zero_point) * int(w) for value, w in zip(q[0], op.weight[at[0]], strict=True)]
    return slow_requantize(op, sum(values) << int(op.shift[at[0]]), at[0], made[0])


def slow_requantize(op: Linear, acc: int, out: int, source: Tensor) -> int:
    multiplier = fp32(fp32(exact(source.scale) * exact(op.weight_scale[out])) / exact(op.output.scale))
    steps = round(fp32(fp32(Fraction(acc + int(op.bias[out]))) * multiplier))
    return clip(steps + op.output.zero_point, op.output)


def slow_add(op: Add, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    (a, b), (q_a, q_b) = made, (int(value[at]) for value in q)
    r_a, r_b = (fp32(exact(source.scale) / exact(op.output.scale)) for source in made)
    f = fp32(op.output.zero_point - fp32(r_a * a.zero_point + fp32(r_b * b.zero_point)))
    return clip(round(fp32(q_a * r_a + fp32(q_b * r_b + f))), op.output)


def slow_avg_pool(op: AvgPool, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    channel, row, column = at
    total = 0
    for i, j in product(range(op.kernel[0]), range(op.kernel[1])):
        total += int(q[0][channel, row * op.stride[0] + i, column * op.stride[1] + j]) - made[0].zero_point
    count = op.kernel[0] * op.kernel[1]
    if op.kernel == made[0].shape[1:]:
        ratio = fp32(exact(made[0].scale) / fp32(exact(op.output.scale) * count))
    else:
        ratio = fp32(fp32(exact(made[0].scale) * fp32(Fraction(1, count))) / exact(op.output.scale))
    return clip(round(fp32(fp32(Fraction(total)) * ratio)) + op.output.zero_point, op.output)


def slow_max_pool(op: MaxPool, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    channel, row, column = at
    found = []
    for i, j in product(range(op.kernel[0]), range(op.kernel[1])):
        y, x = row * op.stride[0] - op.padding[0] + i, column * op.stride[1] - op.padding[1] + j
        if 0 <= y < q[0].shape[1] and 0 <= x < q[0].shape[2]:
            found.append(int(q[0][channel, y, x]))
    return max(found)


def slow_reshape(op: Reshape, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    index = 0
    for place, size in zip(at, op.output.shape, strict=True):
        index = index * size + place
    places: list[int] = []
    for size in reversed(made[0].shape):
        index, place = divmod(index, size)
        places.insert(0, place)
    return int(q[0][tuple(places)])


def slow_clip(op: Clip, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    return clip(int(q[0][at]), op.output)


def slow_concat(op: Concat, q: list[NDArray[Any]], made: list[Tensor], at: tuple[int, ...]) -> int:
    channel = at[0]
    for values, source in zip(q, made, strict=True):
        if channel < source.shape[0]:
            value = int(values[channel, at[1], at[2]])
            if (source.scale, source.zero_point) == (op.output.scale, op.output.zero_point):
                return clip(value, op.output)
            real = fp32(exact(source.scale) * (value - source.zero_point))
            return clip(round(fp32(real / exact(op.output.scale))) + op.output.zero_point, op.output)
        channel -= source.shape[0]
    raise AssertionError("no such channel")


SLOW: dict[type[Op], Callable[..., int]] = {
    Conv: slow_conv, Linear: slow_linear, Add: slow_add, AvgPool: slow_avg_pool, MaxPool: slow_max_pool,
    Reshape: slow_reshape, Clip: slow_clip, Concat: slow_concat,
}  # fmt: skip


def slow_step(op: Op, program: Program, values: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """One operation on image 0 of ``values``, element by element."""
    made = [program.tensor(name) for name in op.inputs]
    q = [values[name][0] for name in op.inputs]
    result = np.zeros(op.output.shape, np.int64)
    for at in np.ndindex(*op.output.shape):
        result[at] = SLOW[type(op)](op, q, made, at)
    return result


def slow_input(tensor: Tensor, x: NDArray[np.float32]) -> NDArray[Any]:
    steps = [round(fp32(exact(value) / exact(tensor.scale))) + tensor.zero_point for value in x.ravel()]
    return np.array([clip(step, tensor) for step in steps]).reshape(x.shape)


def open_program(program: Program, directory: Path) -> Reference:
    bundle.write(directory / "bundle", program)
    return Reference(directory / "bundle")


@pytest.mark.parametrize("seed", range(20))
def test_every_operation_equals_the_loops_over_fractions(seed: int, tmp_path: Path) -> None:
    program = random_program(seed, size=len(KINDS), channels=4, image=(9, 8))
    executor = open_program(program, tmp_path)
    x = random_input(program, 1, seed)
    values = executor.run(x, every=True)
    assert np.array_equal(values["input"][0], slow_input(program.ops[0].output, x[0]))
    for index, op in enumerate(program.ops[1:], start=1):
        wanted = slow_step(op, program, values)
        assert np.array_equal(values[op.output.name][0], wanted), op.output.name
        alone = executor.step(index, {name: values[name] for name in op.inputs})
        assert np.array_equal(alone[0], wanted), op.output.name


def test_the_programs_of_these_tests_hold_every_operation_with_its_variants() -> None:
    ops = [op for seed in range(20) for op in random_program(seed, size=len(KINDS), channels=4, image=(9, 8)).ops]
    assert {type(op) for op in ops} >= set(SLOW)
    convs = [op for op in ops if isinstance(op, Conv)]
    assert any(op.groups == op.weight.shape[0] > 1 for op in convs)
    assert any(1 < op.groups < op.weight.shape[0] for op in convs)
    assert any(max(op.stride) > 1 for op in convs)
    assert any(max(op.dilation) > 1 for op in convs)
    assert any(op.shift.any() for op in convs)
    assert any(op.weight.shape[2] != op.weight.shape[3] for op in convs)
    zeros = {(op.output.zero_point == 128, op.output.low == op.output.zero_point) for op in ops}
    assert len(zeros) == 4


@pytest.mark.parametrize("seed", range(8))
def test_a_step_takes_integers_that_the_program_would_not_make(seed: int, tmp_path: Path) -> None:
    """A runtime that lost a clip hands over anything in 0..255."""
    maker = Maker(np.random.default_rng(seed))
    last = maker.conv(maker.input((2, 3, 3)), 2, 3, padding=(1, 1))
    other = maker.conv("input", 2, 1)
    name = [
        lambda: maker.add(last, other),
        lambda: maker.concat([last, other]),
        lambda: maker.avg_pool(last, (3, 3), (1, 1)),
        lambda: maker.conv(last, 4, (2, 3), groups=2, padding=(1, 0)),
    ][seed % 4]()
    program = maker.program()
    op = program.ops[-1]
    given_ = {key: maker.rng.integers(0, 256, (1, *maker.shape(key))) for key in op.inputs}
    result = open_program(program, tmp_path).step(len(program.ops) - 1, given_)
    assert op.output.name == name
    assert np.array_equal(result[0], slow_step(op, program, given_))


def test_wide_accumulators_are_exact(tmp_path: Path) -> None:
    """Beyond 2^24 fp32 would lose the last bits before the one rounding that is meant."""
    maker = Maker(np.random.default_rng(3))
    maker.reshape(maker.input((1200, 1, 1)), (1200,))
    maker.linear("reshape_1", 5, weight_bits=8, bits=8, form="signed")
    layer = maker.ops[-1]
    assert isinstance(layer, Linear)
    assert layer.wide
    weight = maker.rng.integers(100, 128, (5, 1200)).astype(np.int8)
    # A large bias brings the accumulator back, so that its last bits show in the output.
    q = {"reshape_1": maker.rng.integers(200, 256, (1, 1200))}
    bias = np.array(-(q["reshape_1"] @ weight.astype(np.int64).T)[0] + [-300, -9, 0, 7, 300], np.int32)
    assert (abs(bias) > 1 << 24).all()
    scale = np.full(5, layer.output.scale / maker.tensors["input"].scale / 4, np.float32)
    maker.ops[-1] = replace(layer, weight=weight, bias=bias, weight_scale=scale)
    found = open_program(maker.program(), tmp_path).step(2, q)[0]
    assert np.array_equal(found, slow_step(maker.ops[-1], maker.program(), q))
    assert found.tolist() == [128 - 75, 128 - 2, 128, 128 + 2, 128 + 75]


@pytest.mark.parametrize("seed", range(4))
def test_ties_round_to_even(seed: int, tmp_path: Path) -> None:
    """Scales that are powers of two put every second value on a tie."""
    maker = Maker(np.random.default_rng(seed))
    maker.input((4, 6, 6))
    maker.conv("input", 4, 1, bits=8, form="asymmetric")
    [
        lambda: maker.add("conv_1", "input", bits=8, form="signed"),
        lambda: maker.avg_pool("conv_1", (2, 2), (1, 1), bits=8),
        lambda: maker.concat(["conv_1", "input"], bits=8),
        lambda: maker.conv("conv_1", 3, 1, bits=8, form="signed"),
    ][seed]()
    powers = {"input": 0.5, "conv_1": 0.25}
    ops = [replace(op, output=replace(op.output, scale=powers.get(op.output.name, 1.0))) for op in maker.ops]
    weight_scale = np.array([0.5, 0.125, 0.0625], np.float32)
    if isinstance(ops[-1], Conv):
        ops[-1] = replace(ops[-1], weight_scale=weight_scale, bias=np.array([1, -7, 0], np.int32))
    program = Program(ops, "generic")
    executor = open_program(program, tmp_path)
    q = {name: maker.rng.integers(0, 256, (1, *maker.shape(name))) for name in ops[-1].inputs}
    assert np.array_equal(executor.step(2, q)[0], slow_step(ops[-1], program, q))
    x = (np.arange(-5, 139, dtype=np.float32) / 4).reshape(1, 4, 6, 6).astype(np.float32)
    wanted = slow_input(ops[0].output, x[0])
    assert np.array_equal(executor.run(x, every=True)["input"][0], wanted)
    assert wanted.ravel()[5:16].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=300, deadline=None)
@given(q=st.integers(0, 255), r=finite, c=finite)
def test_fma_rounds_once(q: int, r: float, c: float) -> None:
    found = reference_ops.fma(np.array([float(q)]), np.float32(r), np.array([c], np.float32))[0]
    assert exact(found) == fp32(q * exact(r) + exact(c))


@settings(max_examples=300, deadline=None)
@given(
    q=st.integers(1, 255),
    mantissa=st.integers(2**23, 2**24 - 1),
    shift=st.integers(20, 60),
    sign=st.sampled_from([1, -1]),
)
def test_fma_rounds_once_where_the_sum_needs_more_than_53_bits(q: int, mantissa: int, shift: int, sign: int) -> None:
    """Products next to a tie of the sum: where rounding twice goes wrong."""
    r = np.float32(sign * mantissa * 2.0**-shift)
    for c in (np.float32(2**24 + 2), np.float32(3 * 2.0**23), np.float32(2.0**-40)):
        found = reference_ops.fma(np.float64(q), r, c)
        assert exact(found) == fp32(q * exact(r) + exact(c))


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_twice_would_be_wrong(sign: int) -> None:
    """77 * 13944699 = 2^30 - 1: the sum lies 2^-54 below a tie of fp32, which float64 rounds to the tie."""
    q, r, c = 77, np.float32(sign * 13944699 * 2.0**-54), np.float32(sign * (1 + 2.0**-23))
    twice = np.float32(np.float64(q) * np.float64(r) + np.float64(c))
    once = reference_ops.fma(np.float64(q), r, c)
    assert exact(once) == fp32(q * exact(r) + exact(c)) == exact(c)
    assert twice != once


@pytest.mark.parametrize("bits", range(1, 9))
def test_its_unpacking_equals_what_was_packed(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for shape in ((3, 5), (2, 3, 3, 3), (4, 1), (1, 64)):
        values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
        assert np.array_equal(reference._unpack(pack(values, bits), list(shape), bits), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_of_images_change_nothing(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = residual_program(0, bits, bits)
    executor = open_program(program, tmp_path)
    x = random_input(program, 7, 0)
    whole = executor.run(x, every=True)
    assert np.array_equal(executor.run(x), whole[program.output.name])
    monkeypatch.setattr(reference, "BLOCK", 1)
    parts = executor.run(x, every=True)
    assert list(parts) == [op.output.name for op in program.ops]
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)
    for index, op in enumerate(program.ops[1:], start=1):
        assert np.array_equal(executor.step(index, {name: whole[name] for name in op.inputs}), whole[op.output.name])


def test_results_are_containers_within_their_ranges(tmp_path: Path) -> None:
    program = random_program(11, size=12)
    for name, value in open_program(program, tmp_path).run(random_input(program, 5, 1), every=True).items():
        tensor = program.tensor(name)
        assert value.dtype == np.uint8
        assert value.shape == (5, *tensor.shape)
        assert tensor.low <= value.min() <= value.max() <= tensor.high


def test_the_class_is_the_first_of_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = open_program(residual_program(1, 4, 4), tmp_path)
    integers = np.array([[1, 7, 7], [3, 2, 1], [0, 0, 0]], np.uint8)
    monkeypatch.setattr(executor, "run", lambda x: integers)
    assert executor.predict(np.zeros(1, np.float32)).tolist() == [1, 0, 0]


def test_names_and_kinds_follow_the_program(tmp_path: Path) -> None:
    program = random_program(2, size=9)
    executor = open_program(program, tmp_path)
    assert executor.names == tuple(op.output.name for op in program.ops)
    assert executor.sources == tuple(op.inputs for op in program.ops)
    assert executor.kinds[0] == "input"
    assert executor.kinds[-3:] == ("avg_pool", "reshape", "linear")


def test_it_loads_neither_torch_nor_the_rest_of_nasq(tmp_path: Path) -> None:
    bundle.write(tmp_path / "bundle", residual_program(0, 4, 4))
    script = (
        "import sys, numpy\nfrom pathlib import Path\nfrom nasq.deploy.reference import Reference\n"
        "y = Reference(Path(sys.argv[1])).run(numpy.zeros((1, 3, 12, 12), 'float32'))\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'safetensors', 'nasq'}\n"
        "print(y.shape, sorted(m for m in sys.modules if m.split('.')[0] in heavy))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    allowed = {
        "nasq",
        "nasq.deploy",
        "nasq.deploy.reference",
        "nasq.deploy.reference_ops",
        "nasq.deploy.reference_functions",
        "nasq.errors",
        "nasq.version",
    }
    shape, _, modules = done.stdout.partition(") ")
    assert shape == "(1, 10"
    found = set(json.loads(modules.replace("'", '"')))
    assert "nasq.deploy.reference" in found
    assert found <= allowed


@pytest.fixture
def executor(tmp_path: Path) -> Reference:
    return open_program(residual_program(0, 4, 4), tmp_path)


def test_inputs_that_cannot_be_used_are_refused(executor: Reference) -> None:
    good = np.zeros((2, 3, 12, 12), np.float32)
    with pytest.raises(InputError, match=r"float32 of shape \(N, 3, 12, 12\).*given: float64"):
        executor.run(good.astype(np.float64))
    with pytest.raises(InputError, match=r"given: float32 of shape \(2, 3, 12, 11\)"):
        executor.run(good[..., 1:])
    with pytest.raises(InputError, match="N at least 1"):
        executor.run(good[:0])
    good[1, 2, 3, 4] = np.nan
    with pytest.raises(InputError, match="NaN or infinities"):
        executor.run(good)


def test_steps_that_cannot_be_made_are_refused(executor: Reference) -> None:
    x = np.zeros((1, 3, 12, 12), np.uint8)
    with pytest.raises(InputError, match=r"no operation 0 to step\. Allowed: 1 to 14"):
        executor.step(0, {})
    with pytest.raises(InputError, match=r"the integers of 'input' are needed\. Given: x"):
        executor.step(1, {"x": x})
    with pytest.raises(InputError, match=r"'input' has to be integers of shape \(N, 3, 12, 12\)"):
        executor.step(1, {"input": x.astype(np.float32)})
    with pytest.raises(InputError, match=r"reach from -1 to 0\. Allowed: 0 to 255"):
        executor.step(1, {"input": x.astype(np.int64) - np.eye(12, dtype=np.int64)})
    index = executor.kinds.index("add")
    first, second = (np.zeros((n + 1, 8, 12, 12), np.uint8) for n in range(2))
    names = executor.sources[index]
    with pytest.raises(InputError, match="different numbers of images"):
        executor.step(index, dict(zip(names, (first, second), strict=True)))


def edit(directory: Path, change: Callable[[Any], None]) -> None:
    document = json.loads((directory / "subnet.json").read_text())
    change(document)
    (directory / "subnet.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "not of schema 1"),
        (lambda d: d["ops"][1].update(op="gelu"), "unknown operation 'gelu'. Allowed: an input, then add"),
        (lambda d: d.update(ops=d["ops"][1:]), "cannot be executed: no input|KeyError"),
        (lambda d: d.update(ops=[]), "cannot be executed: no input"),
        (lambda d: d.update(add="two"), "adds by the rule 'two'"),
        (lambda d: d["ops"][2]["inputs"].append("input"), "adds by the rule 'both'"),
        (lambda d: d["ops"][1].pop("output"), "does not hold what its subnet.json needs: KeyError"),
        (lambda d: d["ops"][1]["weight"].update(tensor="w99"), "w99"),
        (lambda d: d["ops"][1]["weight"].update(first=10**6), "needs 8 scales and biases"),
        (lambda d: d["ops"][1]["weight"].update(bits=7), "cannot reshape"),
    ],
)
def test_documents_that_it_cannot_execute_are_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    bundle.write(tmp_path / "b", residual_program(0, 4, 4))
    edit(tmp_path / "b", change)
    with pytest.raises(ArtifactError, match=message):
        Reference(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"U8"', b'"X8"'),
        lambda data: data.replace(b'"data_offsets"', b'"data_offsetz"'),
        lambda data: data.replace(b'"I32"', b'"F32"').replace(b'"biases"', b'"scales"'),
    ],
)
def test_damaged_weights_are_refused(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", residual_program(0, 4, 4))
    path = tmp_path / "b" / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        Reference(tmp_path / "b")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"subnet\.json cannot be read"):
        Reference(tmp_path)
