"""Small bundles and the ways in which :mod:`scripts.benchmarks.fuzz_bundles` damages them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, parity, storage
from nasq.errors import require
from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Input, Linear, Op, Program, Reshape, Table, Tensor

Rng = np.random.Generator
Document = dict[str, Any]


# -- the originals ----------------------------------------------------------------------------------------------------


def _tensor(name: str, shape: tuple[int, ...], scale: float, bits: int, unsigned: bool = True) -> Tensor:
    low, high = (0, (1 << bits) - 1) if unsigned else (128 - (1 << (bits - 1)), 127 + (1 << (bits - 1)))
    return Tensor(name, shape, float(np.float32(scale)), 0 if unsigned else 128, low, high, bits)


def _layer(
    kind: type[Linear], rng: Rng, source: str, out: Tensor, shape: tuple[int, ...], bits: int, **own: Any
) -> Linear:
    half = 1 << (bits - 1)
    return kind(
        (source,), out, out.name, rng.integers(-half, half, shape).astype(np.int8), bits,
        np.zeros(shape[0], np.uint8), rng.uniform(0.01, 0.03, shape[0]).astype(np.float32),
        rng.integers(-40, 40, shape[0]).astype(np.int32), False, **own,
    )  # fmt: skip


def original(seed: int) -> Program:
    """A small network with every common kind of operation; 2-, 3-, 5- and 8-bit weights."""
    rng = np.random.default_rng(seed)
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    t = {
        "in": _tensor("in", (3, 8, 8), 1 / 255, 8), "a": _tensor("a", (4, 8, 8), 0.02, 5),
        "b": _tensor("b", (4, 8, 8), 0.05, 4, False), "s": _tensor("s", (4, 8, 8), 0.06, 6, False),
        "c": _tensor("c", (4, 8, 8), 0.06, 6, False), "f": _tensor("f", (4, 8, 8), 0.04, 7),
        "j": _tensor("j", (8, 8, 8), 0.06, 8, False), "p": _tensor("p", (8, 1, 1), 0.03, 8, False),
        "r": _tensor("r", (8,), 0.03, 8, False), "o": _tensor("o", (10,), 0.05, 8, False),
    }  # fmt: skip
    t["c"] = replace(t["c"], low=128)
    ops: list[Op] = [
        Input((), t["in"], "input"),
        _layer(Conv, rng, "in", t["a"], (4, 3, 3, 3), 8, **plain),
        _layer(Conv, rng, "a", t["b"], (4, 4, 3, 3), (2, 3, 5)[seed % 3], **plain),
        Add(("b", "a"), t["s"], "s"),
        Clip(("s",), t["c"], "c"),
        Table(("c",), t["f"], "f", np.clip(np.arange(256) // 2, 0, 127).astype(np.uint8)),
        Concat(("f", "b"), t["j"], "j"),
        AvgPool(("j",), t["p"], "p", (8, 8), (8, 8)),
        Reshape(("p",), t["r"], "r"),
        _layer(Linear, rng, "r", t["o"], (10, 8), 8),
    ]
    return Program(tuple(ops), "onnxruntime-cpu", meta={"space": "fuzz", "note": "free"})


def images(count: int = 4) -> NDArray[np.float32]:
    """Random inputs of :func:`original`."""
    return np.random.default_rng(0).uniform(0, 1, (count, 3, 8, 8)).astype(np.float32)


# -- mutations --------------------------------------------------------------------------------------------------------


def _flip(data: bytes, rng: Rng) -> bytes:
    """Changes, drops, repeats or inserts a few bytes."""
    at = int(rng.integers(len(data)))
    size = int(rng.integers(1, 9))
    kind = rng.integers(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.bytes(size) + data[at + size :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + rng.bytes(size) + data[at:]
    return data[:at] + data[max(0, at - size) :]


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 9, 255, 256, 1 << 31, 1 << 63, 10**30, -0.0, 1e-45, 1e-30, 1e38, 0.5, float("inf"), float("nan"),
    "", "t9", "../canary", "/etc/passwd", "conv", "a\u0000b", [], {}, [1, 2], [1 << 28, 1 << 28], {"tensor": "w0"},
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(found for key, part in parts for found in _places(part, (*at, key)))] if at else [
        found for key, part in parts for found in _places(part, (key,))
    ]  # fmt: skip


def _change_json(document: Document, rng: Rng) -> Document:
    """Replaces, nudges, removes, repeats or swaps one value anywhere."""
    places = _places(document)
    *path, last = places[int(rng.integers(len(places)))]
    inner: Any = document
    for key in path:
        inner = inner[key]
    value, kind = inner[last], int(rng.integers(6))
    if kind == 0 and isinstance(value, int) and not isinstance(value, bool):
        inner[last] = value + int(rng.choice([-1, 1, 2]))
    elif kind == 1 and isinstance(value, float):
        inner[last] = float(np.nextafter(np.float32(value), np.float32(np.inf)))
    elif kind == 2 and isinstance(inner, dict):
        del inner[last]
    elif kind == 3 and isinstance(inner, list):
        inner.insert(int(rng.integers(len(inner) + 1)), json.loads(json.dumps(value)))
    elif kind == 4 and isinstance(inner, list):
        other = int(rng.integers(len(inner)))
        inner[last], inner[other] = inner[other], inner[last]
    else:
        inner[last] = ODD[int(rng.integers(len(ODD)))]
    return document


def _document(directory: Path, rng: Rng) -> None:
    path = directory / bundle.SUBNET
    document = _change_json(json.loads(path.read_text()), rng)
    path.write_text(json.dumps(document, indent=1))


def _duplicate_key(directory: Path, rng: Rng) -> None:
    """The same key twice: which one counts depends on the reader."""
    path = directory / bundle.SUBNET
    lines = path.read_text().splitlines()
    at = int(rng.choice([i for i, line in enumerate(lines) if '"op":' in line]))
    lines[at] = lines[at].replace('"inputs"', '"path": "other", "inputs"', 1)
    path.write_text("\n".join(lines))


def _bytes_of(name: str) -> Callable[[Path, Rng], None]:
    def change(directory: Path, rng: Rng) -> None:
        path = directory / name
        path.write_bytes(_flip(path.read_bytes(), rng))

    return change


def _deep(directory: Path, rng: Rng) -> None:
    (directory / bundle.SUBNET).write_text("[" * 100_000 if rng.integers(2) else '{"a":' * 100_000)


def _split(data: bytes) -> tuple[Document, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _weights(directory: Path, rng: Rng) -> None:
    """Changes the numbers behind the header: the file stays well-formed."""
    path = directory / bundle.WEIGHTS
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    at = int(rng.integers(header, len(data)))
    data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(data))


def _header(directory: Path, rng: Rng) -> None:
    """Offsets, shapes, types and names of the safetensors header; gaps, overlaps, and sizes that lie."""
    path = directory / bundle.WEIGHTS
    head, body = _split(path.read_bytes())
    text = json.dumps(_change_json(head, rng)).encode()
    size = len(text) if rng.integers(4) else int(rng.choice([0, 7, 1 << 20, 1 << 40, (1 << 64) - 1]))
    path.write_bytes(struct.pack("<Q", size) + text + body + b"\0" * int(rng.integers(3)))


def _special_scale(directory: Path, rng: Rng) -> None:
    """NaN, infinite, zero, negative and tiny scales."""
    path = directory / bundle.WEIGHTS
    head, body = _split(path.read_bytes())
    begin, end = head["scales"]["data_offsets"]
    scales = np.frombuffer(body[begin:end], "<f4").copy()
    scales[rng.integers(len(scales))] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.01, 1e-45, 3e38])
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body[:begin] + scales.tobytes() + body[end:])


def _model(directory: Path, rng: Rng) -> None:
    """One structural change of the ONNX graph."""
    path = directory / parity.MODEL
    model = require("onnx").load_model_from_string(path.read_bytes())
    MODEL_CHANGES[int(rng.integers(len(MODEL_CHANGES)))](model, rng)
    path.write_bytes(model.SerializeToString())


def _tensor_bits(model: Any, rng: Rng) -> None:
    value = model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
    if value.raw_data:
        data = bytearray(value.raw_data)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        value.raw_data = bytes(data)


def _tensor_form(model: Any, rng: Rng) -> None:
    value = model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
    kind = rng.integers(3)
    if kind == 0:
        value.data_type = int(rng.integers(0, 24))
    elif kind == 1 and len(value.dims):
        value.dims[int(rng.integers(len(value.dims)))] = int(rng.choice([-1, 0, 1, 1 << 31, 1 << 62]))
    else:
        value.dims.append(int(rng.choice([1, 2, 1 << 40])))


def _external(model: Any, rng: Rng) -> None:
    """Data outside the file, where a careless reader would look."""
    value = model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
    value.data_location = 1
    entry = value.external_data.add()
    entry.key, entry.value = "location", str(rng.choice(["../canary", "canary", "/etc/hostname", "subnet.json"]))
    if rng.integers(2):
        value.ClearField("raw_data")


def _control_flow(model: Any, rng: Rng) -> None:
    helper = require("onnx").helper
    kind = str(rng.choice(["If", "Loop", "Scan"]))
    body = helper.make_graph([], "body", [], [])
    names = {"If": ("then_branch", "else_branch")}.get(kind, ("body",))
    node = helper.make_node(kind, [model.graph.input[0].name], ["odd"], **dict.fromkeys(names, body))
    model.graph.node.insert(int(rng.integers(len(model.graph.node) + 1)), node)


def _bomb(model: Any, rng: Rng) -> None:
    """A small file that asks for much memory or time."""
    onnx_ = require("onnx")
    size = onnx_.numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "bomb.size")
    model.graph.initializer.append(size)
    kind = str(rng.choice(["ConstantOfShape", "Expand", "Tile", "RandomNormal"]))
    inputs = {"ConstantOfShape": ["bomb.size"], "RandomNormal": []}.get(
        kind, [model.graph.initializer[0].name, "bomb.size"]
    )
    extra = {"shape": [1 << 20, 1 << 20]} if kind == "RandomNormal" else {}
    model.graph.node.append(onnx_.helper.make_node(kind, inputs, ["bomb"], **extra))
    if rng.integers(2):
        model.graph.output.append(onnx_.helper.make_tensor_value_info("bomb", 1, None))


def _nodes(model: Any, rng: Rng) -> None:
    """Removes, repeats, swaps or renames nodes and what they read."""
    nodes = model.graph.node
    at, other = (int(rng.integers(len(nodes))) for _ in range(2))
    kind = rng.integers(5)
    if kind == 0:
        del nodes[at]
    elif kind == 1:
        nodes.append(nodes[at])
    elif kind == 2:
        nodes[at].op_type = str(rng.choice(["Relu", "Identity", "Conv", "Foo", "Clip"]))
    elif kind == 3 and len(nodes[at].input):
        nodes[at].input[int(rng.integers(len(nodes[at].input)))] = nodes[other].output[0]
    else:
        nodes[at].domain = str(rng.choice(["com.microsoft", "odd.domain"]))


def _attributes(model: Any, rng: Rng) -> None:
    held = [item for node in model.graph.node for item in node.attribute]
    item = held[int(rng.integers(len(held)))]
    item.i += int(rng.choice([-1, 1, 1 << 40]))
    if len(item.ints):
        item.ints[int(rng.integers(len(item.ints)))] += int(rng.choice([-1, 1, 1 << 30]))


def _interface(model: Any, rng: Rng) -> None:
    """Inputs, outputs, functions, versions."""
    onnx_ = require("onnx")
    kind = rng.integers(5)
    if kind == 0:
        first = model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
        model.graph.input.append(onnx_.helper.make_tensor_value_info(first.name, first.data_type, list(first.dims)))
    elif kind == 1:
        del model.graph.output[int(rng.integers(len(model.graph.output)))]
    elif kind == 2:
        model.opset_import[0].version = int(rng.choice([1, 7, 99, 1 << 40]))
    elif kind == 3:
        model.functions.append(onnx_.helper.make_function("odd", "f", [], [], [], []))
    else:
        model.graph.initializer.append(model.graph.initializer[int(rng.integers(len(model.graph.initializer)))])


MODEL_CHANGES = (
    _tensor_bits, _tensor_bits, _tensor_form, _external, _control_flow, _bomb, _nodes, _nodes, _attributes, _interface,
)  # fmt: skip


def _strange_file(directory: Path, rng: Rng) -> None:
    """A link, a pipe, a directory or nothing where a file should be; names that lead elsewhere."""
    name = str(rng.choice([bundle.SUBNET, bundle.WEIGHTS, parity.MODEL, storage.CHECKSUMS]))
    path, kind = directory / name, rng.integers(5)
    if kind == 4:
        sums = directory / storage.CHECKSUMS
        listed = json.loads(sums.read_text())
        outside = str(
            rng.choice(["../canary", "/etc/hostname", "a/../../canary", "..\\canary", "c:canary", ".", "", "a\u0000"])
        )
        listed["files"][outside] = "0" * 64
        sums.write_text(json.dumps(listed))
        return
    path.unlink()
    if kind == 0:
        path.symlink_to(directory.parent / "canary")
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()


MUTATIONS: tuple[tuple[str, Callable[[Path, Rng], None], int], ...] = (
    ("values in subnet.json", _document, 30), ("a repeated key", _duplicate_key, 2), ("deep nesting", _deep, 1),
    ("bytes of subnet.json", _bytes_of(bundle.SUBNET), 6), ("bytes of model.safetensors", _bytes_of(bundle.WEIGHTS), 8),
    ("weights, scales, biases", _weights, 14), ("safetensors header", _header, 12), ("special scales", _special_scale, 4),
    ("bytes of model.onnx", _bytes_of(parity.MODEL), 10), ("the ONNX graph", _model, 30), ("strange files", _strange_file, 6),
)  # fmt: skip


def reseal(directory: Path) -> None:
    """Checksums that fit what is there now."""
    sums = directory / storage.CHECKSUMS
    if sums.is_symlink() or not sums.is_file():
        return
    listed = json.loads(sums.read_text())
    for name in listed["files"]:
        path = directory / name if name.isprintable() else directory
        if not path.is_symlink() and path.is_file() and path.resolve().is_relative_to(directory.resolve()):
            listed["files"][name] = storage.digest(path.read_bytes())
    sums.write_text(json.dumps(listed))


def mutate(source: Path, into: Path, seed: int, resealed: bool) -> str:
    """Copies a bundle and changes one or two places; returns what was changed."""
    rng = np.random.default_rng([seed, 17])
    shutil.copytree(source, into)
    weights = np.array([weight for _, _, weight in MUTATIONS], float)
    count = 1 + int(rng.integers(4) == 0)
    chosen = [MUTATIONS[int(i)] for i in rng.choice(len(MUTATIONS), count, p=weights / weights.sum())]
    for _, change, _ in sorted(chosen, key=lambda one: one[1] is _strange_file):  # nobody here may open a pipe
        with contextlib.suppress(Exception):  # the second change may not apply to what the first left
            change(into, rng)
    if resealed:
        reseal(into)
    return " + ".join(name for name, _, _ in chosen)
