"""The static comparison: whatever is changed in a file, it is found, and named."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.deploy import readback
from nasq.deploy.onnx import export
from nasq.deploy.runtimes import run_cut
from nasq.errors import ArtifactError
from nasq.quant.program import Program
from tests.deploy.programs import KINDS, random_input, random_program, residual_program

PROGRAM = random_program(2, len(KINDS))
MODEL = onnx.load_model_from_string(export(PROGRAM))
PLAIN = onnx.load_model_from_string(export(PROGRAM, packed=False))


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin


def findings(model: onnx.ModelProto, program: Program = PROGRAM) -> list[str]:
    """What is found in a file; one that is not even valid is refused, which is as good."""
    try:
        return [str(found) for found in readback.compare(readback.read(model.SerializeToString()), program)]
    except ArtifactError as error:
        return [str(error)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("packed", [True, False])
def test_what_was_exported_is_what_is_read(seed: int, packed: bool) -> None:
    program = random_program(seed, len(KINDS))
    file = readback.read(export(program, packed=packed))
    assert readback.compare(file, program) == ()
    assert len(file.layers) == len(program.ops)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_changed_bit_in_any_initialiser_is_found(data: st.DataObject) -> None:
    model = copy_of(data.draw(st.sampled_from([MODEL, PLAIN])))
    value = data.draw(st.sampled_from(list(model.graph.initializer)))
    raw = bytearray(value.raw_data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    value.raw_data = bytes(raw)
    assert findings(model) != []


@pytest.mark.parametrize("index", range(len(MODEL.graph.node)))
def test_one_dropped_node_is_found(index: int) -> None:
    model = copy_of(MODEL)
    node = model.graph.node.pop(index)
    for other in model.graph.node:
        for place, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[place] = node.input[0]
    assert findings(model) != []


@pytest.mark.parametrize("index", [i for i, node in enumerate(MODEL.graph.node) if node.attribute])
def test_one_dropped_or_changed_attribute_is_found(index: int) -> None:
    for place, attribute in enumerate(MODEL.graph.node[index].attribute):
        dropped, changed = copy_of(MODEL), copy_of(MODEL)
        del dropped.graph.node[index].attribute[place]
        twin = changed.graph.node[index].attribute[place]
        twin.i += 1
        if twin.ints:
            twin.ints[0] += 1
        # A default may be left out: the kernel shape of a pool is the only one that is written and has none.
        assert findings(changed) != [], attribute.name
        assert findings(dropped) != [] or attribute.name == "kernel_shape", attribute.name


def first(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def swap(model: onnx.ModelProto) -> None:
    node = first(model, "Add")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def further_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("q1", onnx.TensorProto.UINT8, ["n", 8, 10, 10]))


def other_output(model: onnx.ModelProto) -> None:
    further_output(model)
    del model.graph.output[1]


def float_relu(model: onnx.ModelProto) -> None:
    conv = first(model, "Conv")
    model.graph.node.insert(
        list(model.graph.node).index(conv) + 1, onnx.helper.make_node("Relu", [conv.output[0]], ["relu"])
    )
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] == conv.output[0]:
            node.input[0] = "relu"


def other_pool(model: onnx.ModelProto) -> None:
    node = first(model, "MaxPool")
    node.op_type = "AveragePool"


def custom_domain(model: onnx.ModelProto) -> None:
    first(model, "Concat").domain = "com.example"


def second_domain(model: onnx.ModelProto) -> None:
    custom_domain(model)
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (swap, "inputs is"),
        (other_output, "the graph's outputs is"),
        (further_output, "the graph's outputs is integers, output, q1, the bundle says"),
        (float_relu, "operator is Relu, the bundle says Conv"),
        (other_pool, "the number of layers|operator is"),
        (custom_domain, r"not a valid ONNX file: .*com\.example"),
        (second_domain, "functions or another domain, the bundle says standard ONNX operators only"),
    ],
)
def test_changed_structure_is_found(change: Callable[[onnx.ModelProto], None], text: str) -> None:
    model = copy_of(MODEL)
    change(model)
    assert re.search(text, "; ".join(findings(model)))


def test_a_finding_names_layer_element_and_both_values() -> None:
    model = copy_of(PLAIN)
    names = {node.output[0]: node for node in model.graph.node}
    conv = first(model, "Conv")
    weight = next(value for value in model.graph.initializer if value.name == names[conv.input[1]].input[1])
    scales = onnx.numpy_helper.to_array(weight).copy()
    before = scales[3]
    scales[3] = np.nextafter(before, np.float32(1))
    weight.CopyFrom(onnx.numpy_helper.from_array(scales, weight.name))
    found = findings(model)
    assert found[0] == (
        f"layer {conv.name!r}: weight scale[3] is {scales[3].item()!r} (1 differ), the bundle says {before.item()!r}"
    )
    assert found[1].startswith(f"layer {conv.name!r}: bias scale[3] is")


def test_every_layer_can_be_cut_out_and_computes_the_same() -> None:
    program = residual_program(1, 3, 5)
    file = readback.read(export(program))
    x = random_input(program, 4, 0)
    values = {"input": x}
    for index, layer in enumerate(file.layers):
        values[layer.output] = run_cut(file.cut(index), {name: values[name] for name in layer.inputs})
    whole = run_cut(file.cut(len(file.layers) - 1, first=0), {"input": x})
    np.testing.assert_array_equal(values["integers"], whole)
    assert whole.shape == (4, 10)


def test_what_is_no_onnx_file_is_refused() -> None:
    with pytest.raises(ArtifactError, match="not a valid ONNX file"):
        readback.read(b"\x08\xff\xff\xff not a model")


def test_data_outside_the_file_is_refused() -> None:
    model = copy_of(MODEL)
    value = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(value, "../../etc/passwd")
    with pytest.raises(ArtifactError, match=f"initialiser {value.name!r} lies outside the file"):
        readback.read(model.SerializeToString())
