"""Tracing: from any module that holds elastic layers to a :class:`~nasq.elastic.graph.Graph`.

torch.fx runs the network's own Python code once with proxies. Ours carry the example's value, so that shapes are real
integers and code that looks at them traces as well. Elastic layers, containers and torch's own layers are leaves.

The batch size is the one number of a shape that must stay free. It travels as a marked int, and a reshape that begins
with it is recorded as "keep the batch". The tracer's users check the result on another batch size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nasq.elastic.base import Container, ElasticModule, evaluating
from nasq.elastic.conv import Conv2d
from nasq.elastic.graph import Graph, Kind, Node
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d
from nasq.errors import InputError

__all__ = ["trace"]


class _Batch(int):
    """The batch dimension of a shape."""


def _shape(value: Tensor) -> tuple[int, ...]:
    return (_Batch(value.shape[0]), *value.shape[1:]) if value.ndim else ()


class _ValueProxy(fx.Proxy):
    """A proxy that knows the example's value, so that shapes and lengths are real numbers."""

    tracer: _ValueTracer

    @property
    def value(self) -> Any:
        return self.tracer.values[self.node]

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return _shape(self.value)
        if name in {"ndim", "dtype", "device", "is_cuda"}:
            return getattr(self.value, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self.value))])


class _ValueTracer(fx.Tracer):
    """Records the graph and the value of every node."""

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__(autowrap_modules=())
        self.values: dict[fx.Node, Any] = {}
        self.examples = iter(examples)
        self.running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ElasticModule) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if kind == "call_method" and target in {"size", "dim", "ndimension", "numel"}:
            return self._measure(target, args[0].value, *args[1:])
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        # torch.fx intercepts every module call and attribute while it traces, ours included.
        self.running = True
        try:
            self.values[proxy.node] = self._run(proxy.node)
        finally:
            self.running = False
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    @staticmethod
    def _measure(method: str, value: Tensor, *args: Any) -> Any:
        if method == "size":
            return _shape(value)[args[0]] if args else _shape(value)
        return getattr(value, method)(*args)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.examples, None)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: self.values[other])
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert node.op == "call_function" and callable(node.target)
        return node.target(*args, **kwargs)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _max_pool(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, **_: Any
) -> tuple[Kind, dict[str, Any]]:
    if _pair(dilation) != (1, 1) or ceil_mode:
        return "other", {}
    kernel = _pair(kernel_size)
    return "max_pool", {"kernel": kernel, "stride": _pair(stride or kernel), "padding": _pair(padding)}


def _avg_pool(
    kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, *_: Any, **__: Any
) -> tuple[Kind, dict[str, Any]]:
    if _pair(padding) != (0, 0) or ceil_mode:
        return "other", {}
    kernel = _pair(kernel_size)
    return "avg_pool", {"kernel": kernel, "stride": _pair(stride or kernel)}


def _global_pool(output_size: Any, **_: Any) -> tuple[Kind, dict[str, Any]]:
    return ("avg_pool", {"kernel": None}) if output_size in (1, (1, 1), [1, 1]) else ("other", {})


def _from_module(module: nn.Module) -> tuple[Kind, dict[str, Any]]:
    if isinstance(module, Container):
        return "container", {}
    if isinstance(module, (Conv2d, nn.Conv2d)):
        return ("conv", {}) if getattr(module, "padding_mode", "zeros") == "zeros" else ("other", {})
    if isinstance(module, (Linear, nn.Linear)):
        return "linear", {}
    if isinstance(module, (BatchNorm2d, nn.BatchNorm2d)):
        return "norm", {}
    if isinstance(module, nn.ReLU6):
        return "relu6", {}
    if isinstance(module, nn.ReLU):
        return "relu", {}
    if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return "identity", {}
    if isinstance(module, nn.MaxPool2d):
        return _max_pool(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    if isinstance(module, nn.AvgPool2d):
        return _avg_pool(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _global_pool(module.output_size)
    if isinstance(module, nn.Flatten):
        return ("reshape", {}) if (module.start_dim, module.end_dim) == (1, -1) else ("other", {})
    return "other", {}


_FUNCTIONS: dict[Any, Callable[..., tuple[Kind, dict[str, Any]]] | Kind] = {
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    F.dropout: "identity",
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _global_pool,
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
    "contiguous": "identity",
}


def _is_flatten(node: fx.Node, before: Any, after: Any) -> bool:
    """Whether a view, reshape or flatten keeps the batch and joins everything behind it."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in {"flatten", "view", "reshape"} or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if after.ndim != 2 or after.shape[0] != before.shape[0]:
        return False
    args = node.args[1:]
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    first = sizes[0] if sizes else node.kwargs.get("start_dim")
    return bool(first == 1 if name == "flatten" else isinstance(first, _Batch) or first == -1)


def _is_spatial_mean(node: fx.Node, before: Any) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name != "mean" or not isinstance(before, Tensor) or before.ndim != 4:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and sorted(int(d) % 4 for d in dims if isinstance(d, int)) == [2, 3]


def _classify(node: fx.Node, tracer: _ValueTracer, sources: list[fx.Node]) -> tuple[Kind, dict[str, Any]]:
    """The kind of an operation that is no module."""
    after = tracer.values[node]
    before = tracer.values[sources[0]] if sources else None
    if _is_flatten(node, before, after):
        return "reshape", {}
    if _is_spatial_mean(node, before):
        return "avg_pool", {"kernel": None, "squeeze": after.ndim == 2}
    if node.target is torch.cat and all(isinstance(source, fx.Node) for source in sources):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return ("concat", {}) if dim == 1 else ("other", {})
    rule = _FUNCTIONS.get(node.target)
    if rule is None:
        return "other", {}
    if rule == "add":
        same = len(sources) == 2 and all(tracer.values[source].shape == after.shape for source in sources)
        return ("add", {}) if same and "alpha" not in node.kwargs else ("other", {})
    if isinstance(rule, str):
        return rule, {}
    return rule(*node.args[1:], **{key: value for key, value in node.kwargs.items() if key != "input"})


def _parts(container: Container, path: str, inputs: list[Tensor]) -> tuple[Graph, ...]:
    graphs = []
    for name, part in container.parts():
        graphs.append(trace(part, *inputs, path=f"{path}.{name}"))
        if container.layout == "chain":
            inputs = [part(*inputs)]
    return tuple(graphs)


def _node(found: fx.Node, tracer: _ValueTracer, known: dict[fx.Node, Node], prefix: str) -> Node:
    value = tracer.values[found]
    sources = list(found.all_input_nodes)
    inputs = tuple(known[source] for source in sources)
    shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    module: nn.Module | None = None
    if found.op == "placeholder":
        return Node("input", found.name, prefix or "input", (), shape)
    path = f"{prefix}.{found.name}" if prefix else found.name
    if found.op == "call_module":
        module = tracer.root.get_submodule(str(found.target))
        path = f"{prefix}.{found.target}" if prefix else str(found.target)
        kind, attributes = _from_module(module)
    elif found.op == "get_attr":
        kind, attributes = "other", {}
    else:
        kind, attributes = _classify(found, tracer, sources)
    attributes["call"] = str(found.target) if isinstance(found.target, str) else getattr(found.target, "__name__", "?")
    parts: tuple[Graph, ...] = ()
    if isinstance(module, Container):
        parts = _parts(module, path, [tracer.values[source] for source in sources])
    return Node(kind, found.name, path, inputs, shape, module, attributes, parts)


def _whole(module: nn.Module, examples: tuple[Tensor, ...], path: str) -> Graph:
    """A leaf as a graph of its own: a branch may be a single layer, which torch.fx cannot enter."""
    value = module(*examples)
    sources = tuple(
        Node("input", f"input_{i}", path or "input", (), tuple(x.shape[1:])) for i, x in enumerate(examples)
    )
    kind, attributes = _from_module(module)
    parts = _parts(module, path, list(examples)) if isinstance(module, Container) else ()
    attributes["call"] = type(module).__name__
    node = Node(kind, "output_0", path, sources, tuple(value.shape[1:]), module, attributes, parts)
    return Graph([*sources, node], node)


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on, and the inputs."""
    needed = {node for node in graph.nodes if node.op in {"output", "placeholder"}}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def trace(module: nn.Module, *examples: Tensor, path: str = "") -> Graph:
    """Traces ``module`` on example inputs ``[N, ...]``, in evaluation mode, with its active options.

    Args:
        module: Any network; left as it was.
        examples: One tensor per input of ``forward``.
        path: Path of ``module`` in the whole network; prefixes the paths of the nodes.

    Raises:
        InputError: The code cannot be traced (its control flow depends on values), or it returns something else than
            one tensor. Names the module.
    """
    with evaluating(module), torch.no_grad():
        tracer = _ValueTracer(examples)
        if tracer.is_leaf_module(module, path):
            return _whole(module, examples, path)
        try:
            graph = tracer.trace(module)
        except (fx.proxy.TraceError, TypeError) as error:
            raise InputError(
                f"the network's part {path or type(module).__name__!r} cannot be traced: {error}. Its forward may depend "
                "on shapes but not on values; split what does into a module of its own."
            ) from error
        return _assemble(module, graph, tracer, path)


def _assemble(module: nn.Module, graph: fx.Graph, tracer: _ValueTracer, path: str) -> Graph:
    """Our graph from torch.fx's, without what the output does not depend on."""
    needed = _needed(graph)
    known: dict[fx.Node, Node] = {}
    for found in graph.nodes:
        if found not in needed or (found.op == "placeholder" and tracer.values[found] is None):
            continue
        if found.op == "output":
            if not isinstance(found.args[0], fx.Node):
                raise InputError(
                    f"{path or type(module).__name__!r} returns {found.args[0]!r}, not one tensor. Wrap the network so "
                    "that it returns the tensor to be used."
                )
            return Graph(list(known.values()), known[found.args[0]])
        known[found] = _node(found, tracer, known, path)
    raise AssertionError("a traced graph has an output")
