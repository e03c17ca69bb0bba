"""What an ONNX file must not hold, looked at before anything else reads it: nasq writes plain graphs, nothing more.

Refused are control flow and subgraphs, functions, training information, data outside the file, sparse or repeated
initialisers, tensors in attributes, and more than one input: each is a way to make a reader loop, to read other files, or
to show one number to a checker and another to a runtime. What a plain graph computes is compared elsewhere
(:mod:`nasq.deploy.readback`).
"""

from __future__ import annotations

from typing import Any

from nasq.errors import ArtifactError, require

__all__ = ["screen"]

MAX_PARTS = 1 << 18  # nodes, or initialisers; a network of 1,000 layers has about 8,000 nodes


def screen(model: Any) -> None:
    """Refuses what no file of nasq's holds.

    Args:
        model: An ``onnx.ModelProto``.

    Raises:
        ArtifactError: Names what was found.
    """
    graph = model.graph
    for what, parts in (("functions", model.functions), ("training information", model.training_info),
                        ("sparse initialisers", graph.sparse_initializer)):  # fmt: skip
        if len(parts):
            raise _refused(f"{len(parts)} {what}")
    if max(len(graph.node), len(graph.initializer)) > MAX_PARTS:
        raise _refused(f"{len(graph.node)} nodes and {len(graph.initializer)} initialisers (allowed: {MAX_PARTS} each)")
    for node in graph.node:
        _screen_node(node)
    _screen_initializers(graph)


def _screen_node(node: Any) -> None:
    kinds = require("onnx").AttributeProto
    plain = {kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS}
    for item in node.attribute:
        if item.type in (kinds.GRAPH, kinds.GRAPHS):
            raise _refused(f"control flow: the {node.op_type} node {node.output[:1]} has a graph of its own")
        if item.type not in plain or item.ref_attr_name:
            kind = kinds.AttributeType.Name(item.type)
            raise _refused(f"an attribute {item.name!r} of type {kind} at the {node.op_type} node {node.output[:1]}")


def _screen_initializers(graph: Any) -> None:
    names = [value.name for value in graph.initializer]
    for value in graph.initializer:
        if value.external_data or value.data_location:
            raise ArtifactError(f"the initialiser {value.name!r} lies outside the file, which must hold all its data.")
    made = [*names, *(value.name for value in graph.input), *(name for node in graph.node for name in node.output)]
    if len(set(made)) != len(made):
        twice = next(name for name in made if made.count(name) > 1)
        raise _refused(f"two tensors called {twice!r}")
    if len(graph.input) != 1:
        raise _refused(f"{len(graph.input)} inputs instead of one")


def _refused(what: str) -> ArtifactError:
    return ArtifactError(f"the ONNX file is refused: it holds {what}, and no file that nasq writes does.")
