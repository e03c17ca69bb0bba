"""What must not be read or written: damaged files, hostile documents and arrays, programs that do not hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import numpy as safetensors

from nasq.deploy import bundle
from nasq.deploy.layers import accumulator_bound
from nasq.deploy.program_json import json_from_program, program_from_json
from nasq.errors import ArtifactError
from nasq.quant.program import Conv, Linear, Program, Tensor
from tests.deploy.programs import Maker, residual_program

Document = dict[str, Any]


def reseal(directory: Path) -> None:
    """Makes the checksums right again, as somebody who tampers would."""
    names = [entry.name for entry in directory.iterdir() if entry.is_file() and entry.name != "checksums.json"]
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    (directory / "checksums.json").write_text(json.dumps({"algorithm": "sha256", "files": digests}))


def edit(directory: Path, change: Callable[[Document], Any]) -> None:
    path = directory / "subnet.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    reseal(directory)


def edit_arrays(directory: Path, change: Callable[[dict[str, NDArray[Any]]], Any]) -> None:
    path = directory / "model.safetensors"
    arrays = {name: array.copy() for name, array in safetensors.load_file(path).items()}
    change(arrays)
    path.write_bytes(safetensors.save(arrays))
    reseal(directory)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "bundle", residual_program(0, 3, 5), {"README.md": b"# a card\n"})
    return tmp_path / "bundle"


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("name", ["subnet.json", "model.safetensors", "README.md"])
def test_a_changed_file_is_named(name: str, directory: Path) -> None:
    path = directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for function in (bundle.verify_files, bundle.read):
        with pytest.raises(ArtifactError, match=f"{name} does not match its checksum"):
            function(directory)


@pytest.mark.parametrize("name", ["subnet.json", "model.safetensors", "README.md", "checksums.json"])
def test_a_missing_file_is_named(name: str, directory: Path) -> None:
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        bundle.read(directory)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"checksums\.json is missing"):
        bundle.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a list of checksums"),
        ('{"algorithm": "crc32", "files": {}}', "is not a list of checksums"),
        ('{"algorithm": "sha256", "files": {}, "more": 1}', "is not a list of checksums"),
        ('{"algorithm": "sha256", "files": {}}', "does not list subnet.json; the bundle is incomplete"),
        ('{"algorithm": "sha256", "files": {"a.txt": "12"}}', "holds no SHA-256 for 'a.txt'"),
        ('{"algorithm": "sha256", "files": {"a.txt": "1", "a.txt": "1"}}', "duplicate key 'a.txt'"),
        ('{"algorithm": "sha256", "files": {"checksums.json": "1"}}', "cannot hold its own checksum"),
    ],
)
def test_checksums_that_cannot_be_used(text: str, message: str, directory: Path) -> None:
    (directory / "checksums.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        bundle.verify_files(directory)


PATHS = [
    ("/etc/passwd", "is an absolute path"),
    ("C:\\\\weights", "is an absolute path"),
    ("\\\\\\\\server\\\\share", "is an absolute path"),
    ("../other/model.safetensors", "leads out of the bundle"),
    ("a/../../b", "leads out of the bundle"),
    ("..\\\\b", "leads out of the bundle"),
    ("sub/model.safetensors", "is not a plain file name"),
    (".hidden", "is not a plain file name"),
    ("", "is not a plain file name"),
    ("a\\u0000b", "is not a plain file name"),
    ("x" * 200, "is not a plain file name"),
]


@pytest.mark.parametrize(("name", "message"), PATHS)
def test_paths_that_leave_the_bundle_are_refused(name: str, message: str, directory: Path) -> None:
    plain = json.loads(f'"{name}"')
    with pytest.raises(ArtifactError, match=f"{message}.*; it is refused"):
        bundle.add_file(directory, plain, b"x")
    with pytest.raises(ArtifactError, match=message):
        bundle.write(directory.parent / "new", residual_program(0, 4, 4), {plain: b"x"})
    text = (directory / "checksums.json").read_text()
    edit(directory, lambda document: document["weights"].update(file=plain))
    with pytest.raises(ArtifactError, match=message):
        bundle.read(directory)
    (directory / "checksums.json").write_text(text.replace('"README.md"', f'"{name}"'))
    with pytest.raises(ArtifactError, match=message):
        bundle.verify_files(directory)
    assert not (directory.parent / "new").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "subnet.json", "README.md", "checksums.json"])
def test_links_are_refused(name: str, directory: Path) -> None:
    (directory / name).rename(directory.parent / "outside")
    (directory / name).symlink_to(directory.parent / "outside")
    with pytest.raises(ArtifactError, match=f"{name} is a symbolic link; links in a bundle are not followed"):
        bundle.read(directory)


def test_directories_in_the_place_of_files_are_refused(directory: Path) -> None:
    (directory / "README.md").unlink()
    (directory / "README.md").mkdir()
    with pytest.raises(ArtifactError, match=r"README\.md is not a regular file"):
        bundle.read(directory)


# ---------------------------------------------------------------------------------------------------- hostile documents


def op(document: Document, kind: str) -> Document:
    return next(entry for entry in document["ops"] if entry["op"] == kind)


def place(document: Document, path: str) -> Document:
    """The object at ``path``, which begins with an operation's index or kind, or with ``weights``."""
    found: Any = document
    for part in filter(None, path.split(".")):
        if found is document and part != "weights":
            found = document["ops"][int(part)] if part.isdigit() else op(document, part)
        else:
            found = found[part]
    assert isinstance(found, dict)
    return found


REMOVED = object()
DOCUMENTS: list[tuple[str, Document, str]] = [
    ("", {"schema": 2}, r"has schema 2; the installed nasq reads up to 1\. Update nasq .*pip install -U nasq"),
    ("", {"schema": 0}, "has the schema 0"),
    ("", {"schema": "1"}, "has the schema '1'"),
    ("", {"schema": True}, "has the schema True"),
    ("", {"format": "other"}, "is not a subnet: its format is not 'nasq-subnet'"),
    ("", {"more": 1}, "unknown key 'more'"),
    ("1", {"activation": "relu"}, r"unknown key 'ops\.1\.conv\.activation'"),
    ("1.output", {"axis": 0}, r"unknown key 'ops\.1\.conv\.output\.axis'"),
    ("1", {"op": "gelu"}, "unknown operation 'gelu'. Allowed: input, conv, linear"),
    ("1", {"groups": REMOVED}, r"ops\.1\.conv\.groups: field required"),
    ("", {"target": REMOVED}, "target: field required"),
    ("", {"add": "all"}, "add: input should be 'both' or 'one'; given: 'all'"),
    ("1.output", {"scale": "0.5"}, r"output\.scale: input should be a valid number; given: '0\.5'"),
    ("1", {"groups": 1.0}, r"groups: input should be a valid integer; given: 1\.0"),
    ("1", {"wide": 0}, "wide: input should be a valid boolean"),
    ("1", {"stride": [1, 1, 1]}, "stride: list should have at most 2 items"),
    ("1", {"stride": [1, -1]}, "stride.1: input should be greater than or equal to 0"),
    ("1", {"stride": [1, 0]}, r"stride \(1, 0\).*not allowed: at least 1"),
    ("1", {"dilation": [9, 9]}, r"a window of \(19, 19\) does not fit a map of \(14, 14\)"),
    ("1", {"padding": [2**30, 2**30], "stride": [2**30, 2**30]}, "is too large: at most 2"),
    ("1", {"groups": 0}, r"8 output channels cannot be divided into 0 groups"),
    ("1", {"groups": 3}, r"8 output channels cannot be divided into 3 groups"),
    ("1", {"groups": 2}, r"2 groups of weights \(8, 3, 3, 3\) cannot take 3 channels"),
    ("weights", {"file": "README.md"}, r"keeps its weights in 'README\.md'"),
    ("weights", {"scales": "w0"}, "weights.scales: input should be 'scales'"),
    ("weights", {"shifts": "shifts"}, r"the tensor 'shifts' is missing in model\.safetensors"),
    ("1.weight", {"tensor": "w1"}, "has its weights at 'w1' and channel 0; in order they are at 'w0'"),
    ("2.weight", {"first": 0}, "in order they are at 'w1' and 8"),
    ("1.weight", {"bits": 4}, r"the tensor 'w0' is uint8 of shape \(216,\).*needs uint8 of shape \(112,\)"),
    ("1.weight", {"bits": 9}, "weight.bits: input should be less than or equal to 8"),
    ("1.weight", {"signed": False}, "weight.signed: input should be True"),
    ("1.weight", {"axis": 1}, "weight.axis: input should be 0"),
    ("1.weight", {"shape": [8, 27]}, "its weights are int8 of shape .8, 27.; allowed: int8 of rank 4"),
    ("1.weight", {"shape": [8, 3, 9, 1]}, r"it makes shape \(8, 6, 14\) and says .* \(8, 12, 12\)"),
    ("1.output", {"scale": 0.0}, r"the scale 0\.0 is not allowed: it has to be finite and above 0"),
    ("1.output", {"scale": -0.5}, r"the scale -0\.5 is not allowed"),
    ("1.output", {"scale": 0.1}, r"fp32 does not hold the scale 0\.1"),
    ("1.output", {"scale": 1e300}, "fp32 does not hold the scale"),
    ("1.output", {"scale": 10**400}, "conv.output.scale"),
    ("1.output", {"bits": 9}, "9 bits are not allowed: 1 to 8"),
    ("1.output", {"high": 32}, r"the range \[0, 32\] with zero-point 0 does not fit 5 bits\. Allowed"),
    ("1.output", {"low": 9, "high": 8}, r"the range \[9, 8\]"),
    ("1.output", {"low": -1}, r"the range \[-1, 31\]"),
    ("1.output", {"zero_point": 32}, r"with zero-point 32 does not fit 5 bits"),
    ("1.output", {"zero_point": 256}, r"with zero-point 256"),
    ("1.output", {"low": 112, "high": 144, "zero_point": 128}, r"within \[112, 143\] with zero-point 128"),
    ("1.output", {"shape": [8, 12, 11]}, r"it makes shape \(8, 12, 12\) and says .*\(8, 12, 11\)"),
    ("0.output", {"shape": [3, 0, 12]}, r"the shape \(3, 0, 12\) is not allowed"),
    ("0.output", {"shape": []}, r"the shape \(\) is not allowed"),
    ("0.output", {"shape": [2**30, 2**30, 2**30]}, "is not allowed: every size is at least 1"),
    ("0.output", {"shape": [108, 4]}, r"needs an input of shape \(channels, height, width\), not \(108, 4\)"),
    ("2.output", {"name": "conv_1"}, "two operations make a tensor called 'conv_1'"),
    ("2.output", {"name": ""}, "operation 2 makes a tensor called ''"),
    ("2.output", {"name": "a\nb"}, r"operation 2 makes a tensor called 'a\\nb'"),
    ("2", {"inputs": ["conv_9"]}, "conv 'conv_2' reads 'conv_9', which no operation before it makes"),
    ("2", {"inputs": ["conv_2"]}, "reads 'conv_2', which no operation before it makes"),
    ("2", {"inputs": []}, "it reads 0 tensors; allowed: 1"),
    ("add", {"inputs": ["conv_3"]}, "it reads 1 tensors; allowed: 2"),
    ("add", {"inputs": ["conv_3", "input"]}, r"its inputs have different shapes: \(8, 12, 12\), \(3, 12, 12\)"),
    ("add.output", {"scale": 2.0 ** (-140)}, "too far apart for fp32"),
    ("1.output", {"scale": 2.0 ** (-149)}, "the multiplier of channel 0 overflows fp32"),
    ("", {"ops": []}, "the tensor 'w0' is unknown"),
    ("reshape.output", {"shape": [17]}, r"\(16, 1, 1\) cannot be reshaped to \(17,\)"),
    ("reshape.output", {"scale": 0.5}, "it keeps its input's scale and zero-point"),
    ("reshape.output", {"high": 30}, "and nothing clips here; add a clip"),
    ("avg_pool", {"kernel": [7, 6]}, r"a window of \(7, 6\) does not fit a map of \(6, 6\)"),
    ("linear", {"inputs": ["avg_pool_12"]}, r"weights of shape \(10, 16\) cannot take an input of shape"),
]


@pytest.mark.parametrize(("path", "values", "message"), DOCUMENTS)
def test_documents_that_do_not_hold(path: str, values: Document, message: str, directory: Path) -> None:
    def change(document: Document) -> None:
        target = place(document, path)
        target.update(values)
        for key in [key for key, value in values.items() if value is REMOVED]:
            del target[key]

    edit(directory, change)
    bundle.verify_files(directory)
    with pytest.raises(ArtifactError, match=message):
        bundle.read(directory)


def test_the_order_of_operations_is_checked(directory: Path) -> None:
    document, arrays = json_from_program(residual_program(0, 4, 4))
    ops = document["ops"]
    second = {**ops[0], "output": {**ops[0]["output"], "name": "x"}}
    for changed_ops, message in (
        ([ops[0], second, *ops[1:]], "input 'x': a program has one input only, and it comes first"),
        (ops[1:], "the first operation has to be the input"),
        ([*ops[:2], ops[3], ops[2], *ops[4:]], "in order they are at"),
        ([*ops[:3], ops[4], *ops[5:]], "has its weights at"),
    ):
        with pytest.raises(ArtifactError, match=message):
            program_from_json({**document, "ops": changed_ops}, arrays)


def test_max_pool_and_concat_are_checked(tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0))
    maker.max_pool(maker.input((2, 6, 6)), (2, 2), (2, 2), (0, 0))
    maker.concat(["input", "input"])
    bundle.write(tmp_path / "b", maker.program())
    for kind, changed, message in (
        ("max_pool", {"padding": [2, 0]}, r"its padding \(2, 0\) is more than half of its kernel \(2, 2\)"),
        ("concat", {"inputs": ["input", "max_pool_1"]}, r"only the channels of joined tensors may differ"),
        ("concat", {"inputs": []}, "it reads 0 tensors; allowed: 1 or more"),
    ):
        document, arrays = json_from_program(maker.program())
        op(document, kind).update(changed)
        with pytest.raises(ArtifactError, match=message):
            program_from_json(document, arrays)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 1, "schema": 1', "duplicate key 'schema'"),
        ('"scale": 0.0', '"scale": NaN, "old": 0.0', "NaN is not JSON"),
        ('"scale": 0.0', '"scale": 1e999, "old": 0.0', "scale: input should be a finite number"),
        ('"nasq-subnet"', '"nasq-subnet', "cannot be read as JSON"),
        ('"meta": {', '"meta": ' + "[" * 100_000 + ', "x": {', "cannot be read as JSON"),
    ],
)
def test_text_that_is_not_strict_json(old: str, new: str, message: str, directory: Path) -> None:
    path = directory / "subnet.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    reseal(directory)
    with pytest.raises(ArtifactError, match=message):
        bundle.read(directory)


def test_a_huge_document_is_refused_before_it_is_parsed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_SUBNET", 1000)
    with pytest.raises(ArtifactError, match=r"subnet\.json has \d+ bytes; allowed: 1000"):
        bundle.read(directory)


# ----------------------------------------------------------------------------------------------------- hostile arrays


def put(name: str, index: int, value: float) -> Callable[[dict[str, NDArray[Any]]], None]:
    def change(arrays: dict[str, NDArray[Any]]) -> None:
        arrays[name][index] = value

    return change


ARRAYS: list[tuple[Callable[[dict[str, NDArray[Any]]], Any], str]] = [
    (lambda a: a.pop("w3"), r"the tensor 'w3' is missing in model\.safetensors"),
    (lambda a: a.update(x=np.zeros(1, np.uint8)), r"the tensor 'x' is unknown in model\.safetensors"),
    (lambda a: a.update(w0=a["w0"][:-1]), r"'w0' is uint8 of shape \(215,\); subnet\.json needs .* \(216,\)"),
    (lambda a: a.update(w0=a["w0"].reshape(8, 27)), r"of shape \(8, 27\)"),
    (lambda a: a.update(scales=a["scales"].astype(np.int32)), "the tensor 'scales' is int32 of shape"),
    (lambda a: a.update(biases=a["biases"].astype(np.float32)), "the tensor 'biases' is float32 of shape"),
    (lambda a: a.update(biases=a["biases"].astype(np.int64)), "the tensor 'biases' .* has the type 'I64'"),
    (lambda a: a.update(w0=a["w0"].view(np.int8)), "the tensor 'w0' in .* has the type 'I8'. Allowed: F32, I32, U8"),
    (put("scales", 10, np.nan), "conv 'conv_2': the weight scale nan of channel 2 is not allowed"),
    (put("scales", 10, np.inf), "the weight scale inf of channel 2"),
    (put("scales", 0, 0.0), r"the weight scale 0\.0 of channel 0"),
    (put("scales", 0, -1.0), r"the weight scale -1\.0 of channel 0"),
    (put("biases", 3, 2**31 - 1), r"accumulator and bias of channel 3 may reach \d+, beyond int32"),
    (put("biases", 3, -(2**31)), r"accumulator and bias of channel 3 may reach \d+, beyond int32"),
    (put("biases", 3, 2**24 + 1), r"of channel 3 may reach 16777217, beyond 2\^24, but .* not marked as wide"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ARRAYS)
def test_arrays_that_do_not_hold(change: Callable[[Any], Any], message: str, directory: Path) -> None:
    edit_arrays(directory, change)
    with pytest.raises(ArtifactError, match=message):
        bundle.read(directory)


def test_bits_between_channels_are_refused(tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0))
    maker.conv(maker.input((1, 4, 4)), 2, 3, weight_bits=3)
    bundle.write(tmp_path / "b", maker.program())
    edit_arrays(tmp_path / "b", lambda arrays: arrays.update(w0=arrays["w0"] | np.uint8(0x80)))
    with pytest.raises(ArtifactError, match=r"the weights of 'conv_1' \('w0'\): a bit behind the last .* is not zero"):
        bundle.read(tmp_path / "b")


def test_shifts_out_of_int8_are_refused(tmp_path: Path) -> None:
    program = residual_program(0, 4, 4)
    ops = [
        replace(op, shift=op.shift + np.uint8(8 - op.weight_bits)) if isinstance(op, Linear) else op
        for op in program.ops
    ]
    bundle.write(tmp_path / "b", replace(program, ops=tuple(ops)))
    edit_arrays(tmp_path / "b", put("shifts", 8, 5))
    with pytest.raises(ArtifactError, match=r"a shift of 5 takes weights of 4 bits out of int8\. Allowed: at most 4"):
        bundle.read(tmp_path / "b")


def header(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def with_header(data: bytes, changed: bytes) -> bytes:
    return len(changed).to_bytes(8, "little") + changed + data[8 + len(header(data)) :]


def moved(data: bytes) -> bytes:
    """Leaves a gap in front of the last tensor."""
    entries = json.loads(header(data))
    last = max(entries.values(), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [last["data_offsets"][0] + 8, last["data_offsets"][1] + 8]
    return with_header(data, json.dumps(entries).encode()) + bytes(8)


FILES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: b"", "says that its header has 0 bytes, of 0 in the file"),
    (lambda data: data[:5], "of 5 in the file"),
    (lambda data: b"\xff" * 8 + data[8:], "says that its header has 18446744073709551615 bytes"),
    (lambda data: data[:40], "it is truncated or corrupt"),
    (lambda data: data[:-1], "not a valid safetensors file"),
    (lambda data: data + b"\0", "not a valid safetensors file"),
    (moved, "not a valid safetensors file"),
    (lambda data: with_header(data, b"{" + header(data)), "the header of model.safetensors is not JSON"),
    (lambda data: with_header(data, b"[]"), "not a valid safetensors file"),
    (lambda data: with_header(data, b'{"a": 1}'), "the tensor 'a' in model.safetensors has the type 1"),
    (lambda data: with_header(data, header(data).replace(b'"w1"', b'"w0"')), "duplicate key 'w0'"),
    (lambda data: with_header(data, header(data).replace(b'"F32"', b'"F33"')), "has the type 'F33'"),
    (
        lambda data: with_header(data, header(data).replace(b'"shape":[216]', b'"shape":[999]')),
        "not a valid safetensors",
    ),
    (lambda data: with_header(data, b'{"__metadata__":{"a":"b"},' + header(data)[1:]), "'__metadata__'"),
]


@pytest.mark.parametrize(("change", "message"), FILES)
def test_safetensors_files_that_do_not_hold(change: Callable[[bytes], bytes], message: str, directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    reseal(directory)
    with pytest.raises(ArtifactError, match=message):
        bundle.read(directory)


def test_a_large_header_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_HEADER", 100)
    with pytest.raises(ArtifactError, match=r"says that its header has \d+ bytes.*Allowed: up to 100"):
        bundle.read(directory)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_byte_is_lost_the_error_is_clear(seed: int, directory: Path) -> None:
    """Random damage behind right checksums: either refused as an artifact, or a valid program."""
    rng = np.random.default_rng(seed)
    originals = {name: (directory / name).read_bytes() for name in ("subnet.json", "model.safetensors")}
    refused = 0
    for _ in range(60):
        name = sorted(originals)[rng.integers(2)]
        data = bytearray(originals[name])
        place = int(rng.integers(min(len(data), 1500)))
        data[place] = rng.integers(256)
        for other, original in originals.items():
            (directory / other).write_bytes(bytes(data) if other == name else original)
        reseal(directory)
        try:
            bundle.read(directory)
        except ArtifactError:
            refused += 1
    assert refused > 20


# --------------------------------------------------------------------------------------------------- refused on writing


def changed(program: Program, index: int, **values: Any) -> Program:
    ops = list(program.ops)
    ops[index] = replace(ops[index], **values)
    return replace(program, ops=tuple(ops))


def test_programs_that_do_not_hold_are_not_written(tmp_path: Path) -> None:
    program = residual_program(0, 4, 4)
    layer = program.ops[2]
    assert isinstance(layer, Conv)
    wrong: Mapping[str, Program] = {
        r"conv 'conv_2': the weight 8 in channel 0 does not fit 4 bits: -8 to 7": changed(
            program, 2, weight=np.full_like(layer.weight, 8)
        ),
        r"its bias is int64 of shape \(8,\); allowed: int32": changed(program, 2, bias=layer.bias.astype(np.int64)),
        r"its shift is uint8 of shape \(7,\)": changed(program, 2, shift=layer.shift[1:]),
        r"its weights are int16": changed(program, 2, weight=layer.weight.astype(np.int16)),
        r"weights of 0 bits are not allowed": changed(program, 2, weight_bits=0),
        r"unknown rule for sums 'all'": replace(program, add="all"),
        r"meta cannot be written as JSON": replace(program, meta={"x": float("nan")}),
        r"meta cannot be written as JSON: Object of type": replace(program, meta={"x": np.zeros(1)}),
    }
    for message, bad in wrong.items():
        with pytest.raises(ArtifactError, match=message):
            bundle.write(tmp_path / "b", bad)
    assert not list(tmp_path.iterdir())


def test_the_accumulator_bound_is_reached_and_not_passed() -> None:
    rng = np.random.default_rng(0)
    for zero, low, high in ((0, 0, 255), (128, 0, 255), (7, 0, 15), (128, 120, 135), (3, 3, 15)):
        source = Tensor("x", (20,), 1.0, zero, low, high, 8)
        weight = rng.integers(-128, 128, (6, 20)).astype(np.int8)
        shift = np.zeros(6, np.uint8)
        layer = Linear(("x",), source, "", weight, 8, shift, np.ones(6, np.float32), np.zeros(6, np.int32), False)
        most = np.where(weight > 0, high - zero, low - zero)
        least = np.where(weight > 0, low - zero, high - zero)
        reached = np.maximum(abs((weight.astype(int) * most).sum(1)), abs((weight.astype(int) * least).sum(1)))
        assert np.array_equal(accumulator_bound(layer, source), reached)


def test_a_wide_layer_has_to_say_so(tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0))
    maker.reshape(maker.input((1200, 1, 1)), (1200,))
    maker.linear("reshape_1", 3, weight_bits=8)
    layer = maker.ops[-1]
    assert isinstance(layer, Linear)
    layer = replace(layer, weight=np.full_like(layer.weight, 127), wide=True)
    maker.ops[-1] = layer
    bundle.write(tmp_path / "b", maker.program())
    found = bundle.read(tmp_path / "b").ops[-1]
    assert isinstance(found, Linear)
    assert found.wide
    maker.ops[-1] = replace(layer, wide=False)
    with pytest.raises(ArtifactError, match=r"linear 'linear_2': .* may reach 38862000, beyond 2\^24"):
        bundle.write(tmp_path / "b", maker.program())
