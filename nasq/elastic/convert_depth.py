"""Residual blocks that may be left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasq.elastic.base import Condition, Container, evaluating
from nasq.elastic.graph import Graph, Node
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.space import Choice

__all__ = ["Droppable", "Run", "residual_runs"]


class Droppable(Container):
    """A block that runs where a depth reaches it, and passes its input on where it does not.

    Args:
        block: One input, and an output of its shape.
        depth: How many blocks of the stage run.
        index: The block runs where ``depth > index``.
    """

    layout = "chain"

    def __init__(self, block: nn.Module, depth: Choice, index: int) -> None:
        super().__init__()
        self.block, self.depth, self.index = block, depth, index
        self.holds(depth)

    def runs(self) -> bool:
        """Whether the block is active."""
        depth = self.option(self.depth)
        assert isinstance(depth, int)
        return depth > self.index

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, or its input."""
        return self.block(x) if self.runs() else x

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The block."""
        return [("block", self.block)]

    def condition(self, index: int) -> Condition:
        """A depth that reaches the block."""
        deep = frozenset(option for option in self.depth.options if isinstance(option, int) and option > self.index)
        return ((self.depth.name, deep),)

    def with_parts(self, parts: list[nn.Module]) -> Droppable:
        """The same decision on another block."""
        return Droppable(parts[0], self.depth, self.index)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The extracted block, or an identity."""
        return recurse(self.block) if self.runs() else nn.Identity()


@dataclass(frozen=True)
class Run:
    """Residual blocks that follow each other in one parent, and may be left out from the last one on.

    Attributes:
        parent: Path of the module that holds them.
        paths: Of the blocks, in order.
        entry: Whether a block of the parent runs before them that always stays.
        name: Of the depth: the parent's path, with the first block's where the parent has several runs.
    """

    parent: str
    paths: tuple[str, ...]
    entry: bool
    name: str

    def depth(self) -> Choice | None:
        """How many blocks run, the one before them included; ``None`` where there is no choice."""
        first = int(self.entry)
        options = tuple(range(max(first, 1), first + len(self.paths) + 1))
        return Choice(f"{self.name}.depth", options) if len(options) > 1 else None


@dataclass(frozen=True)
class _Call:
    """One call of a module: one tensor in, one tensor out."""

    path: str
    module: nn.Module
    x: Tensor
    y: Tensor

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


def _calls(root: nn.Module, example: Tensor) -> list[_Call]:
    """The calls of every module that holds others and runs once, in order."""
    found: list[_Call] = []
    times: dict[str, int] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            times[path] = times.get(path, 0) + 1
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                found.append(_Call(path, module, args[0], output))

        return hook

    hooks = [
        module.register_forward_hook(watch(path), with_kwargs=True)
        for path, module in root.named_modules()
        if path and next(module.children(), None) is not None
    ]
    try:
        with evaluating(root), torch.no_grad():
            root(example)
    finally:
        for handle in hooks:
            handle.remove()
    return [call for call in found if times[call.path] == 1]


def _is_residual(graph: Graph) -> bool:
    """Whether the output is a sum, perhaps with an activation, one side of which is the input itself."""
    end = graph.output
    while end.kind in {"identity", "relu", "relu6", "unary"} and len(end.inputs) == 1:
        end = end.inputs[0]
    return end.kind == "add" and any(_source(node).kind == "input" for node in end.inputs)


def _source(node: Node) -> Node:
    while node.kind == "identity":
        node = node.inputs[0]
    return node


def _may_go(call: _Call) -> bool:
    if isinstance(call.module, nn.Sequential) or call.x.shape != call.y.shape:
        return False
    try:
        return _is_residual(trace(call.module, call.x))
    except InputError:  # what cannot be traced alone is no block
        return False


def residual_runs(root: nn.Module, example: Tensor) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs of residual blocks that may be left out, and the blocks of the same class that may not, with the reason.

    Args:
        root: A plain network.
        example: An input ``[N, ...]``.
    """
    calls = _calls(root, example)
    blocks: dict[str, _Call] = {}
    for call in sorted(calls, key=lambda one: one.path.count(".")):  # outermost first
        if not any(call.path.startswith(f"{path}.") for path in blocks) and _may_go(call):
            blocks[call.path] = call
    classes = {(call.parent, type(call.module)) for call in blocks.values()}
    siblings = [call for call in calls if (call.parent, type(call.module)) in classes]
    stays = [(call.path, _why(call)) for call in siblings if call.path not in blocks]
    runs: list[Run] = []
    for parent in dict.fromkeys(call.parent for call in siblings):
        runs += _runs_of(parent, [call.path for call in siblings if call.parent == parent], blocks)
    return runs, stays


def _why(call: _Call) -> str:
    if call.x.shape != call.y.shape:
        return f"it makes {list(call.y.shape[1:])} from {list(call.x.shape[1:])}"
    return "its output is not the sum of its input and something else"


def _runs_of(parent: str, paths: list[str], blocks: dict[str, _Call]) -> list[Run]:
    found: list[tuple[tuple[str, ...], bool]] = []
    run: list[str] = []
    entry = False
    for path in [*paths, ""]:
        if path in blocks:
            run.append(path)
            continue
        if run:
            found.append((tuple(run), entry))
            run = []
        entry = True
    many = len(found) > 1 or not parent
    return [Run(parent, run, entry, run[0] if many else parent) for run, entry in found]
