"""The tracer: torch.fx with proxies that carry the example's value, so that shapes are real integers."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from nasq.elastic.base import ElasticModule
from nasq.elastic.conv import Conv2d
from nasq.elastic.decompose import function_parts, is_known_leaf, module_parts
from nasq.elastic.graph import disagreement
from nasq.elastic.kinds import Batch, kind_of_module
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d

__all__ = ["ValueTracer", "join", "run_leaf", "sources_of"]


def _shape(value: Tensor) -> tuple[int, ...]:
    return (Batch(value.shape[0]), *value.shape[1:]) if value.ndim else ()


def join(prefix: str, name: str) -> str:
    """The path of ``name`` inside ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that ``node`` reads, in order; one that it reads twice is there twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


class _ValueProxy(fx.Proxy):
    """A proxy that knows the example's value, so that shapes and lengths are real numbers."""

    tracer: ValueTracer

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


class ValueTracer(fx.Tracer):
    """Records the graph and the value of every node.

    Args:
        examples: The inputs.
        path: Path of the traced module in the whole network.
        makers: Path of the layer that made each input, for messages.

    Attributes:
        values: The value of every node.
        makers: The path of the layer that made it.
        overwritten: The operation that last changed a node's value in place.
        current: What runs: its path, the module if it is one, its inputs and their makers.
    """

    def __init__(self, examples: Sequence[Tensor], path: str, makers: Sequence[str]) -> None:
        super().__init__(autowrap_modules=())
        self.values: dict[fx.Node, Any] = {}
        self.makers: dict[fx.Node, str] = {}
        self.path = path
        self.examples = list(zip(examples, makers, strict=True))
        self.running = False
        self.own: set[int] = set()
        self.overwritten: dict[fx.Node, fx.Node] = {}
        self.current: tuple[str, nn.Module | None, tuple[Any, ...], list[str]] = (path, None, (), [])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Elastic layers, containers, torch's own layers, and those of timm that compute what torch's do."""
        if isinstance(m, ElasticModule) or is_known_leaf(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that knows its value."""
        return _ValueProxy(node, self)

    @contextlib.contextmanager
    def _for_real(self) -> Iterator[None]:
        # torch.fx intercepts every module call and attribute while it traces, ours included.
        before, self.running = self.running, True
        try:
            yield
        finally:
            self.running = before

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Records an operation and runs it; sizes are answered at once."""
        if kind == "placeholder" and not self.examples and not target.startswith("*"):
            if not args:
                raise fx.proxy.TraceError(
                    f"no example was given for its input {target!r}. A network is quantized and exported with one input: "
                    "join several tensors along the channels, and take them apart in forward"
                )
            return args[0]
        if kind == "call_method" and target in {"size", "dim", "ndimension", "numel"}:
            return self._measure(target, args[0].value, *args[1:], **kwargs)
        if kind == "call_method" and target in {"item", "tolist", "numpy"}:
            raise fx.proxy.TraceError(f"it reads a tensor's values with {target}()")
        parts = function_parts(target) if kind in {"call_function", "call_method"} and not self.running else None
        if parts is not None:
            made = parts(*args, **kwargs)
            if made is not NotImplemented:
                return made
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        read = [(source, self.values[source]) for source in sources_of(proxy.node)]
        before = [value._version if isinstance(value, Tensor) else 0 for _, value in read]
        with self._for_real():
            self.values[proxy.node] = self._run(proxy.node)
        for (source, value), version in zip(read, before, strict=True):
            if isinstance(value, Tensor) and value._version != version:
                self.overwritten[source] = proxy.node
        return proxy

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        """Records a node; tensors of the module itself only pass here."""
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if kind == "get_attr":
            with self._for_real():
                self.values[node] = operator.attrgetter(target)(self.root)
            self.makers[node] = join(self.path, target)
        return node

    def create_arg(self, a: Any) -> Any:
        """Records an argument; NumPy's whole numbers (``np.prod(x.shape[1:])``) are Python's."""
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def _is_new(self, module: nn.Module) -> bool:
        """Whether the forward made the module: it has no path in the network.

        Raises:
            fx.proxy.TraceError: It has weights, which are other ones in every call.
        """
        if not self.own:
            self.own = {id(known) for known in self.root.modules()}
        if id(module) in self.own:
            return False
        if next(module.parameters(), None) is not None:
            raise fx.proxy.TraceError(f"its forward makes a {type(module).__name__}: make it in __init__")
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Records a call of the network's; runs one of ours."""
        if self.running or self._is_new(m):
            return forward(*args, **kwargs)
        if (parts := module_parts(m)) is None:
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        return parts(lambda x: self.create_proxy("call_module", path, (x,), {}), m, *args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Records an access of the network's; gives the value to ours."""
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    @staticmethod
    def _measure(method: str, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if method == "size":
            dim = args[0] if args else kwargs.get("dim")
            return _shape(value) if dim is None else _shape(value)[dim]
        return getattr(value, method)(*args, **kwargs)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.values[node]
        if node.op == "placeholder":
            return self._next_example(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: self.values[other])
        makers = [self.makers[source] for source in sources_of(node)]
        path = join(self.path, str(node.target) if node.op == "call_module" else node.name)
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        self.current = (path, module, args, makers)
        makes = kind_of_module(module)[0] in {"conv", "linear", "container"} if module is not None else len(makers) > 1
        self.makers[node] = path if makes or not makers else makers[0]
        if module is not None:
            return run_leaf(module, args, kwargs, path, makers)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert node.op == "call_function" and callable(node.target)
        return node.target(*args, **kwargs)

    def _next_example(self, node: fx.Node) -> Any:
        name = str(node.target)
        if not name.startswith("*"):
            value, self.makers[node] = self.examples.pop(0)
            return value
        if self.examples:
            raise fx.proxy.TraceError(f"it takes {name}: give each input a name")
        self.makers[node] = ""
        return {} if name.startswith("**") else ()


def run_leaf(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str, makers: list[str]) -> Any:
    """Runs a leaf; where it cannot take its input, the error names both layers."""
    x = args[0] if args else None
    wanted = _input_size(module)
    if wanted is not None and isinstance(x, Tensor) and x.ndim > 1:
        what, size, dim = wanted
        if x.shape[dim] != size:
            raise disagreement(path, what, size, makers[0], x.shape[dim])
    if isinstance(module, nn.BatchNorm2d):  # without what a subclass adds, which is recorded by itself
        return nn.BatchNorm2d.forward(module, *args, **kwargs)
    if isinstance(module, nn.LayerNorm):
        return nn.LayerNorm.forward(module, *args, **kwargs)
    return module(*args, **kwargs)


def _input_size(module: nn.Module) -> tuple[str, int, int] | None:
    """What a layer needs of its input: the name of the size, the size, its dimension."""
    if isinstance(module, Conv2d):
        return "input channels", module.value(module.in_channels), 1
    if isinstance(module, nn.Conv2d):
        return "input channels", module.in_channels, 1
    if isinstance(module, Linear):
        return "input features", module.value(module.in_features), -1
    if isinstance(module, nn.Linear):
        return "input features", module.in_features, -1
    if isinstance(module, BatchNorm2d):
        return "channels", module.active_channels(), 1
    return ("channels", module.num_features, 1) if isinstance(module, nn.BatchNorm2d) else None
