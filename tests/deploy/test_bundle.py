"""Bundles: the round trip, the size law, replacement as a whole, and everything that must not be read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nasq.deploy import bundle, storage
from nasq.deploy.program_json import json_from_program, program_from_json
from nasq.errors import ArtifactError, InputError, NasqError
from nasq.quant.program import Input, Linear, Program, Tensor
from nasq.run.export import keep_best
from tests.deploy.programs import Maker, random_program, residual_program

Document = dict[str, Any]


def assert_same(first: Program, second: Program) -> None:
    """Equal to the last bit and type, arrays included."""
    assert (first.target, first.add, first.meta) == (second.target, second.add, second.meta)
    assert len(first.ops) == len(second.ops)
    for a, b in zip(first.ops, second.ops, strict=True):
        assert type(a) is type(b)
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype
                assert x.tobytes() == y.tobytes()
                assert x.shape == y.shape
            else:
                assert x == y
                assert type(x) is type(y)


def test_readers_see_whole_bundles_while_a_writer_replaces_them(tmp_path: Path) -> None:
    program = residual_program(0, 3, 5)
    bundle.write(tmp_path / "b", program, {"README.md": b"0"})
    done, read, failed = threading.Event(), [0], list[str]()

    def look() -> None:
        while not done.is_set():
            try:
                bundle.read(tmp_path / "b")
                bundle.verify_files(tmp_path / "b")
                read[0] += 1
            except NasqError as error:
                failed.append(str(error))

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(25):
            bundle.add_file(tmp_path / "b", "README.md", str(turn).encode())
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not failed and read[0] > 0
    assert (tmp_path / "b" / "README.md").read_bytes() == b"24"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_reading_again_ends_where_the_directory_stays_the_same(tmp_path: Path) -> None:
    calls = []

    def read() -> int:
        calls.append(1)
        raise ArtifactError("damaged")

    with pytest.raises(ArtifactError, match="damaged"):
        storage.steady(tmp_path, read)
    assert len(calls) == 1


def test_the_best_bundle_is_a_copy_of_what_belongs_to_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    bundle.write(source, residual_program(0, 3, 5), {"README.md": b"# a card\n"})
    (source / ".DS_Store").write_bytes(b"?")  # what is not the bundle's is neither copied nor in the way
    (source / "notes").mkdir()
    keep_best(SimpleNamespace(best=tmp_path / "best"), source)  # type: ignore[arg-type]
    assert bundle.verify_files(tmp_path / "best") == bundle.verify_files(source)
    assert sorted(entry.name for entry in (tmp_path / "best").iterdir()) == [
        "README.md", "checksums.json", "model.safetensors", "subnet.json",
    ]  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "bundle", residual_program(0, 3, 5), {"README.md": b"# a card\n"})
    return tmp_path / "bundle"


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("seed", range(12))
def test_what_is_read_is_what_was_written(seed: int, tmp_path: Path) -> None:
    program = random_program(seed, size=14)
    bundle.write(tmp_path / "b", program)
    assert_same(bundle.read(tmp_path / "b"), program)
    document, arrays = json_from_program(program)
    assert_same(program_from_json(json.loads(json.dumps(document)), arrays), program)


def test_equal_programs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        bundle.write(tmp_path / name, random_program(5))
    for name in ("subnet.json", "model.safetensors", "checksums.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_scales_keep_every_bit(tmp_path: Path) -> None:
    program = residual_program(0, 4, 4)
    scales = np.random.default_rng(0).integers(0x33800000, 0x3F800000, len(program.ops)).astype(np.uint32)
    values = [float(value) for value in scales.view(np.float32)]
    made = Maker(np.random.default_rng(0))
    made.input((1, 1, 1))
    for value in values:
        last = made.ops[-1].output.name
        made.conv(last, 1, 1, bits=8)
        made.ops[-1] = replace(made.ops[-1], output=replace(made.ops[-1].output, scale=value))
    bundle.write(tmp_path / "b", made.program())
    assert [op.output.scale for op in bundle.read(tmp_path / "b").ops[1:]] == values


def test_the_files_of_a_bundle(directory: Path) -> None:
    assert sorted(entry.name for entry in directory.iterdir()) == [
        "README.md", "checksums.json", "model.safetensors", "subnet.json"
    ]  # fmt: skip
    assert [entry.name for entry in directory.parent.iterdir()] == ["bundle"]
    digests = bundle.verify_files(directory)
    assert digests == {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("README.md", "model.safetensors", "subnet.json")
    }
    assert (directory.stat().st_mode & 0o777, (directory / "subnet.json").stat().st_mode & 0o777) == (0o755, 0o644)


@pytest.mark.parametrize(("weight_bits", "channels"), [(2, 8), (3, 8), (5, 13), (8, 8), (4, 64)])
def test_weights_take_their_bits_and_hardly_more(weight_bits: int, channels: int, tmp_path: Path) -> None:
    program = residual_program(0, weight_bits, 4, channels=channels)
    bundle.write(tmp_path / "b", program)
    layers = [op for op in program.ops if isinstance(op, Linear)]
    packed = sum(len(op.weight) * ceil(op.weight_bits * op.weight[0].size / 8) for op in layers)
    rest = sum(4 * op.weight_scale.size + 4 * op.bias.size for op in layers)
    size = (tmp_path / "b" / "model.safetensors").stat().st_size
    assert packed + rest < size <= 1.01 * (packed + rest) + 4096


@pytest.mark.parametrize(
    ("bits", "weights", "packed"),
    [
        (2, [[1, -2, 0, -1, 1], [0, 0, -2, 1, -1]], "c9016003"),
        (3, [[3, -4, -1], [1, 2, -3]], "e3015101"),
        (5, [[15, -16], [1, -2]], "0f02c103"),
        (7, [[63, -64, 5], [-1, 0, 1]], "3f60017f4000"),
    ],
)
def test_the_bytes_of_a_file_never_change(bits: int, weights: list[list[int]], packed: str, tmp_path: Path) -> None:
    """Whole files of one layer, written out by hand: the header's arrays in order, then their little-endian bytes."""
    values = np.array(weights, np.int8)
    source = Tensor("in", (values.shape[1],), 0.5, 0, 0, 255, 8)
    made = Tensor("out", (2,), 0.25, 128, 0, 255, 8)
    scale, bias = np.array([0.5, 1.0], np.float32), np.array([-1, 258], np.int32)
    layer = Linear(("in",), made, "layer", values, bits, np.zeros(2, np.uint8), scale, bias, False)
    bundle.write(tmp_path / "b", Program((Input((), source, "input"), layer), "onnxruntime-cpu"))
    data = (tmp_path / "b" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    found = {name: body[slice(*entry["data_offsets"])].hex() for name, entry in header.items()}
    assert found == {"w0": packed, "scales": "0000003f0000803f", "biases": "ffffffff02010000"}
    assert {name: entry["dtype"] for name, entry in header.items()} == {"w0": "U8", "scales": "F32", "biases": "I32"}
    assert len(body) == len(packed) // 2 + 16


def test_shifts_are_stored_only_where_there_are_any(tmp_path: Path) -> None:
    plain = residual_program(0, 4, 4)
    _, arrays = json_from_program(plain)
    assert set(arrays) == {"scales", "biases", *(f"w{i}" for i in range(9))}
    ops = [
        replace(op, shift=op.shift + np.uint8(op.weight_bits == 4)) if isinstance(op, Linear) else op
        for op in plain.ops
    ]
    shifted = replace(plain, ops=tuple(ops))
    _, arrays = json_from_program(shifted)
    assert arrays["shifts"].dtype == np.uint8
    bundle.write(tmp_path / "b", shifted)
    assert_same(bundle.read(tmp_path / "b"), shifted)


def test_a_program_without_layers(tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0))
    maker.max_pool(maker.input((1, 4, 4)), (2, 2), (2, 2), (0, 0))
    bundle.write(tmp_path / "b", maker.program())
    assert_same(bundle.read(tmp_path / "b"), maker.program())


# -------------------------------------------------------------------------------------------------- adding, replacing


def test_files_are_added_with_their_checksums(directory: Path) -> None:
    bundle.add_file(directory, "parity.json", b"{}")
    bundle.add_file(directory, "README.md", b"another")
    assert set(bundle.verify_files(directory)) == {"README.md", "model.safetensors", "parity.json", "subnet.json"}
    assert (directory / "README.md").read_bytes() == b"another"
    assert_same(bundle.read(directory), residual_program(0, 3, 5))


def test_nothing_is_added_to_a_damaged_bundle(directory: Path) -> None:
    (directory / "README.md").write_bytes(b"# A card\n")
    with pytest.raises(ArtifactError, match=r"README\.md does not match its checksum"):
        bundle.add_file(directory, "parity.json", b"{}")
    assert not (directory / "parity.json").exists()


@pytest.mark.parametrize("name", ["subnet.json", "model.safetensors", "checksums.json"])
def test_files_that_nasq_writes_cannot_be_added(name: str, directory: Path) -> None:
    with pytest.raises(InputError, match=f"{name} cannot be added to a bundle"):
        bundle.add_file(directory, name, b"")
    with pytest.raises(InputError, match="cannot be added"):
        bundle.write(directory, residual_program(0, 4, 4), {name: b""})


def test_replacing_removes_the_former_files_and_keeps_strangers(directory: Path) -> None:
    (directory / "notes.txt").write_text("mine")
    (directory / "plots").mkdir()
    (directory / "plots" / "a.txt").write_text("mine too")
    program = residual_program(1, 4, 4)
    bundle.write(directory, program)
    assert_same(bundle.read(directory), program)
    assert sorted(entry.name for entry in directory.iterdir()) == [
        "checksums.json", "model.safetensors", "notes.txt", "plots", "subnet.json"
    ]  # fmt: skip
    assert (directory / "plots" / "a.txt").read_text() == "mine too"
    assert [entry.name for entry in directory.parent.iterdir()] == ["bundle"]


def test_a_directory_that_is_no_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"exists and is not a bundle; it is left alone\. Choose another directory"):
        bundle.write(tmp_path, residual_program(0, 4, 4))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file; a bundle needs a directory"):
        bundle.write(tmp_path / "thesis.tex", residual_program(0, 4, 4))


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        bundle.write(target, residual_program(0, 4, 4))
        assert_same(bundle.read(target), residual_program(0, 4, 4))


def test_a_link_to_a_bundle_stays_a_link(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(directory)
    program = residual_program(1, 4, 4)
    bundle.write(tmp_path / "best", program)
    assert (tmp_path / "best").is_symlink()
    assert_same(bundle.read(directory), program)
    assert_same(bundle.read(tmp_path / "best"), program)


@pytest.mark.parametrize("failing", ["make", "flush", "move the old one", "move the new one"])
def test_a_failure_leaves_the_old_bundle(failing: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse_new(source: Path, target: Path) -> None:
        refuse() if ".nasq-new-" in str(source) else rename(source, target)

    module, name, fake = {
        "make": (tempfile, "mkdtemp", refuse),
        "flush": (os, "fsync", refuse),
        "move the old one": (os, "rename", refuse),
        "move the new one": (os, "rename", refuse_new),
    }[failing]
    monkeypatch.setattr(module, name, fake)
    with pytest.raises(NasqError, match=r"No space left on device\. What was there before is untouched"):
        bundle.write(directory, residual_program(1, 4, 4))
    monkeypatch.undo()
    assert_same(bundle.read(directory), residual_program(0, 3, 5))
    assert [entry.name for entry in directory.parent.iterdir()] == ["bundle"]


def test_a_reader_that_restores_the_old_bundle_does_not_stop_the_writer(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    restored: list[dict[str, str]] = []

    def disturbed(source: Path, target: Path) -> None:
        if ".nasq-new-" in str(source) and not restored:
            restored.append(bundle.verify_files(directory))
        rename(source, target)

    monkeypatch.setattr(os, "rename", disturbed)
    bundle.write(directory, residual_program(1, 4, 4))
    assert restored
    assert_same(bundle.read(directory), residual_program(1, 4, 4))
    assert [entry.name for entry in directory.parent.iterdir()] == ["bundle"]


CRASH = """
import os, sys
from pathlib import Path
import numpy as np
from nasq.deploy import bundle
from nasq.errors import ArtifactError
from tests.deploy.programs import residual_program

calls = ["open", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "chmod"]
old, new = (residual_program(seed, 4, 4, channels=2, image=(6, 6)) for seed in (0, 1))
directory = Path(sys.argv[1]) / "bundle"
bundle.write(directory, old, {"README.md": b"old"})
outcomes = []
for step in range(200):
    child = os.fork()
    if child == 0:
        left = step
        def dying(call):
            def made(*args, **kwargs):
                global left
                left -= 1
                if left < 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return made
        for name in calls:
            setattr(os, name, dying(getattr(os, name)))
        bundle.write(directory, new, {"README.md": b"new"})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = bundle.read(directory).ops[1].bias
    card = (directory / "README.md").read_bytes()
    assert np.array_equal(found, (old if card == b"old" else new).ops[1].bias)
    outcomes.append(card.decode())
    bundle.write(directory, old, {"README.md": b"old"})
    assert os.listdir(sys.argv[1]) == ["bundle"], os.listdir(sys.argv[1])
    if os.waitstatus_to_exitcode(status) == 0:
        break
print(*outcomes)
"""


def test_killed_at_any_step_there_is_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert outcomes == ["old"] * outcomes.count("old") + ["new"] * outcomes.count("new")
    assert outcomes.count("old") >= 15
    assert outcomes.count("new") >= 2
