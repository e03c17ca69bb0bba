"""Tracing: from any module that holds elastic layers to a :class:`~nasq.elastic.graph.Graph`.

torch.fx runs the network's own Python code once with proxies. Ours carry the example's value, so that shapes are real
integers and code that looks at them traces as well. Elastic layers, containers and torch's own layers are leaves.

The batch size is the one number of a shape that must stay free. It travels as a marked int, and a reshape that begins
with it is recorded as "keep the batch". The tracer's users check the result on another batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from nasq.elastic.base import Container, Misfit, evaluating
from nasq.elastic.call_parts import drop_expansions, keep_rows
from nasq.elastic.decompose import select_before_permuting
from nasq.elastic.derived import derived_from_parameters
from nasq.elastic.graph import Graph, Kind, Node
from nasq.elastic.kinds import kind_of_call, kind_of_module
from nasq.elastic.slicing import is_split
from nasq.elastic.tracer import ValueTracer, join, run_leaf, sources_of
from nasq.errors import InputError

__all__ = ["trace"]


def _parts(container: Container, path: str, inputs: Sequence[Any], makers: Sequence[str]) -> tuple[Graph, ...]:
    graphs = []
    for index, (name, part) in enumerate(container.parts()):
        if container.layout == "chain":
            graphs.append(trace(part, *inputs, path=join(path, name), makers=makers))
            inputs, makers = [part(*inputs)], [join(path, name)]
            continue
        seen, made = container.inputs_of(index, inputs), container.inputs_of(index, makers)
        graphs.append(trace(part, *seen, path=join(path, name), makers=made))
    return tuple(graphs)


def _node(found: fx.Node, tracer: ValueTracer, known: dict[fx.Node, Node]) -> Node:
    value = tracer.values[found]
    shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    if found.op == "placeholder":
        return Node("input", found.name, tracer.path or "input", (), shape)
    called = str(found.target) if isinstance(found.target, str) else getattr(found.target, "__name__", "?")
    if found.op == "get_attr":
        # A parameter, buffer or constant has no batch dimension; parameters are costs.
        attributes = {"call": called} | ({"parameter": value} if isinstance(value, nn.Parameter) else {})
        # A parameter that begins with 1 is one tensor for all of the batch.
        whole = isinstance(value, nn.Parameter) and value.ndim > 1 and value.shape[0] == 1
        kind: Kind = "parameter" if whole else "other"
        shape = tuple(value.shape[1:]) if whole else tuple(value.shape)
        return Node(kind, found.name, join(tracer.path, called), (), shape, None, attributes)
    sources = sources_of(found)
    inputs = tuple(known[source] for source in sources)
    if found.op != "call_module":
        kind, attributes = kind_of_call(found, sources, tracer.values)
        return Node(kind, found.name, join(tracer.path, found.name), inputs, shape, None, attributes | {"call": called})
    module, path = tracer.root.get_submodule(called), join(tracer.path, called)
    kind, attributes = kind_of_module(module)
    parts: tuple[Graph, ...] = ()
    if isinstance(module, Container):
        parts = _parts(module, path, [tracer.values[x] for x in sources], [tracer.makers[x] for x in sources])
    return Node(kind, found.name, path, inputs, shape, module, attributes | {"call": called}, parts)


def _whole(module: nn.Module, tracer: ValueTracer) -> Graph:
    """A leaf as a graph of its own: a branch may be a single layer, which torch.fx cannot enter."""
    path, examples, makers = tracer.path, [x for x, _ in tracer.examples], [maker for _, maker in tracer.examples]
    tracer.current = (path, module, tuple(examples), makers)
    value = run_leaf(module, tuple(examples), {}, path, makers)
    sources = tuple(
        Node("input", f"input_{i}", path or "input", (), tuple(x.shape[1:])) for i, x in enumerate(examples)
    )
    kind, attributes = kind_of_module(module)
    parts = _parts(module, path, examples, makers) if isinstance(module, Container) else ()
    attributes["call"] = type(module).__name__
    node = Node(kind, "output_0", path, sources, tuple(value.shape[1:]), module, attributes, parts)
    return Graph([*sources, node], node)


def _needed(graph: fx.Graph, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """The nodes that the output depends on, and the inputs that are tensors."""
    inputs = {node for node in graph.nodes if node.op == "placeholder" and isinstance(values[node], Tensor)}
    needed = inputs | {node for node in graph.nodes if node.op == "output"}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


@contextlib.contextmanager
def _as_it_was(root: nn.Module) -> Iterator[None]:
    """Takes back what torch.fx (constants) or a forward (``self.last = x``) writes on the modules."""
    before = [(module, dict(vars(module))) for module in root.modules()]
    # Dictionaries of a module's own may be caches, in which a forward keeps what must not outlive the trace.
    caches = [
        (value, dict(value))
        for _, attributes in before
        for name, value in attributes.items()
        if type(value) is dict and not name.startswith("_")
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for cache, content in caches:
            cache.clear()
            cache.update(content)


def trace(module: nn.Module, *examples: Tensor, path: str = "", makers: Sequence[str] = ()) -> Graph:
    """Traces ``module`` on example inputs ``[N, ...]``, in evaluation mode, with its active options.

    Args:
        module: Any network; left as it was.
        examples: One tensor per input of ``forward``; an input with a default may stay away.
        path: Path of ``module`` in the whole network; prefixes the paths of the nodes.
        makers: Path of the layer that made each example, for messages.

    Raises:
        InputError: The code cannot be traced (it fails, or its control flow depends on values), a layer does not fit
            its input (both layers named), or it returns something else than one tensor. Names the module.
    """
    tracer = ValueTracer(examples, path, makers or [path or "input"] * len(examples))
    with _as_it_was(module), evaluating(module), torch.no_grad():
        try:
            if tracer.is_leaf_module(module, path):
                return _whole(module, tracer)
            graph = tracer.trace(module)
        except InputError as error:
            if isinstance(error, Misfit):  # inside a container: its parts name both layers
                raise _untraceable(module, tracer, error) from error
            raise
        except Exception as error:  # whatever a user's forward raises
            raise _untraceable(module, tracer, error) from error
        return _assemble(module, graph, tracer)


def _untraceable(module: nn.Module, tracer: ValueTracer, error: Exception) -> InputError:
    at, last, args, makers = tracer.current
    if isinstance(last, Container):
        _parts(last, at, args, makers)  # raises at the part that failed, by its own path
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    where = f" (at {at!r})" if at != tracer.path else ""
    return InputError(
        f"the network's part {tracer.path or type(module).__name__!r} cannot be traced: {reason}{where}. Its forward may "
        "depend on shapes but not on the values of tensors; what is a choice belongs into OneOf or Repeat."
    )


def _mark_overwriting(graph: fx.Graph, tracer: ValueTracer, known: dict[fx.Node, Node]) -> None:
    """Notes on operations that change their input in place that it is read again behind them."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for source, by in tracer.overwritten.items():
        behind = [user for user in source.users if order[user] > order.get(by, len(order))]
        if behind and by in known:
            known[by].attributes["overwrites"] = True


def _of_elements(node: fx.Node, tracer: ValueTracer) -> bool:
    """Whether an operation with one input works on every element alone."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return kind_of_module(tracer.root.get_submodule(str(node.target)))[0] in _ELEMENTWISE
    if node.op not in {"call_function", "call_method"}:
        return False
    return kind_of_call(node, sources_of(node), tracer.values)[0] in _ELEMENTWISE


_ELEMENTWISE = frozenset({"relu", "relu6", "unary", "identity"})


def _assemble(module: nn.Module, graph: fx.Graph, tracer: ValueTracer) -> Graph:
    """Our graph from torch.fx's, without what the output does not depend on."""
    select_before_permuting(graph, tracer.values, tracer.makers)
    drop_expansions(graph, tracer.values)
    keep_rows(graph, tracer.values, tracer.makers, lambda node: _of_elements(node, tracer))
    needed = _needed(graph, tracer.values)
    derived, inner = derived_from_parameters(graph, module, tracer.values, needed)
    known: dict[fx.Node, Node] = {}
    for found in graph.nodes:
        if found not in needed or found in inner:
            continue
        if found in derived:
            path, tensor = join(tracer.path, found.name), derived[found]
            tracer.values[found] = tensor()
            known[found] = Node(
                "parameter", found.name, path, (), tuple(tensor().shape[1:]), tensor, {"call": found.name}
            )
            continue
        if found.op == "output":
            if not isinstance(found.args[0], fx.Node) or not isinstance(tracer.values[found.args[0]], Tensor):
                raise InputError(
                    f"{tracer.path or type(module).__name__!r} returns {found.args[0]!r}, not one tensor. Wrap the "
                    "network so that it returns the tensor to be used."
                )
            _mark_overwriting(graph, tracer, known)
            return Graph(list(known.values()), known[found.args[0]])
        if is_split(found, tracer.values[found]):
            known[found] = known[found.all_input_nodes[0]]
            continue
        known[found] = _node(found, tracer, known)
    raise AssertionError("a traced graph has an output")
