"""Tensors that a network computes from its parameters alone: reshaped scales, looked-up position tables.

While a network is traced, operations that read no input are put together: the graph holds one node for their result, as if
it were a parameter. It is computed anew whenever it is read, so training and loading weights reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nasq.elastic.base import ElasticModule
from nasq.elastic.token_kinds import Batch

__all__ = ["Derived", "derived_from_parameters"]


@dataclass(frozen=True)
class _Result:
    """The result of an earlier step, among the arguments of a later one."""

    step: int


@dataclass(frozen=True)
class _Step:
    """A tensor of the network's (``value``), or a call on earlier results."""

    value: Tensor | None = None
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


class Derived(nn.Module):
    """Calling it gives the tensor ``[1, ...]``; it refers to the network's parameters and has none of its own.

    Args:
        steps: What is computed, in order; the last result is the tensor.
        ndim: Number of dimensions of the tensors it meets, batch included.
    """

    def __init__(self, steps: list[_Step], ndim: int) -> None:
        super().__init__()
        self.steps, self.ndim = steps, ndim

    def forward(self) -> Tensor:
        """The tensor, with dimensions of 1 in front as broadcasting adds them, at least one for the batch."""
        results: list[Any] = []
        for step in self.steps:
            results.append(step.value if step.value is not None else _call(step, results))
        made = results[-1]
        assert isinstance(made, Tensor)
        missing = self.ndim - made.ndim
        if missing <= 0:
            return made if made.ndim > 1 and made.shape[0] == 1 else made.unsqueeze(0)
        return made.reshape(*[1] * missing, *made.shape)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those it refers to, for counting; they are registered elsewhere."""
        for step in self.steps:
            if isinstance(step.value, nn.Parameter):
                yield step.value
            elif isinstance(step.target, nn.Module):
                yield from step.target.parameters()


def _call(step: _Step, results: list[Any]) -> Any:
    args, kwargs = _filled((step.args, dict(step.kwargs or {})), results)
    if isinstance(step.target, str):
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


def _filled(value: Any, results: list[Any]) -> Any:
    if isinstance(value, _Result):
        return results[value.step]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, results) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, results) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_filled(item, results) for item in (value.start, value.stop, value.step)))
    return value


def _reads_batch(node: fx.Node) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda item: found.append(item) or item)  # type: ignore[func-returns-value]
    return any(isinstance(item, Batch) for item in found)


def _may_join(node: fx.Node, root: nn.Module, constant: set[fx.Node]) -> bool:
    """Whether a node reads nothing but parameters."""
    if node.op == "get_attr":
        return True
    if not node.all_input_nodes or not all(source in constant for source in node.all_input_nodes):
        return False
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not any(isinstance(part, ElasticModule) for part in module.modules())
    return node.op in {"call_function", "call_method"} and not _reads_batch(node)


def derived_from_parameters(
    graph: fx.Graph, root: nn.Module, values: Mapping[fx.Node, Any], needed: set[fx.Node]
) -> tuple[dict[fx.Node, Derived], set[fx.Node]]:
    """The nodes whose tensors follow from parameters alone and are read by others, and all that takes part in them.

    A parameter that is read as it is, and begins with 1, is left to itself.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node in needed and _may_join(node, root, constant):
            constant.add(node)
    ends: dict[fx.Node, Derived] = {}
    for node in graph.nodes:
        read = node in constant and any(user in needed and user not in constant for user in node.users)
        value = values.get(node)
        if not read or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.op == "get_attr" and value.ndim > 1 and value.shape[0] == 1 and isinstance(value, nn.Parameter):
            continue
        met = [
            values[user].ndim for user in node.users if isinstance(values.get(user), Tensor) and user not in constant
        ]
        ends[node] = Derived(_steps(node, root, values), max(met, default=0))
    inner = {node for node in constant if node not in ends and any(user in constant for user in node.users)}
    inner = {node for node in inner if all(user in constant or user not in needed for user in node.users)}
    return ends, inner


def _with_results(value: Any, places: Mapping[fx.Node, _Result]) -> Any:
    """Arguments in which nodes are replaced by the results of steps."""
    if isinstance(value, fx.Node):
        return places[value]
    if isinstance(value, (tuple, list)):
        return type(value)([_with_results(item, places) for item in value])
    if isinstance(value, dict):
        return {key: _with_results(item, places) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_with_results(item, places) for item in (value.start, value.stop, value.step)))
    return value


def _steps(end: fx.Node, root: nn.Module, values: Mapping[fx.Node, Any]) -> list[_Step]:
    places: dict[fx.Node, _Result] = {}
    steps: list[_Step] = []

    def add(node: fx.Node) -> None:
        if node in places:
            return
        for source in node.all_input_nodes:
            add(source)
        args, kwargs = _with_results((node.args, dict(node.kwargs)), places)
        if node.op == "get_attr":
            steps.append(_Step(values[node]))
        else:
            target = root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            steps.append(_Step(None, target, tuple(args), dict(kwargs)))
        places[node] = _Result(len(steps) - 1)

    with torch.no_grad():
        add(end)
    return steps
