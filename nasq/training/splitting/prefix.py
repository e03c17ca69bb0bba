"""Computing once what passes have in common: the modules that run before the first one that differs.

Where every layer has a choice of its own, two options of a late layer share nearly all of the forward pass. The outputs
before it are kept from the pass of the context, with their graph, and given again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nasq.elastic.base import elastic_modules

__all__ = ["Prefix"]


@dataclass
class _Call:
    """One call of a module: when it began and ended, what it gave, and how often that was changed in place by then."""

    began: int
    ended: int = -1
    output: Any = None
    version: int = 0

    @property
    def usable(self) -> bool:
        """Whether the output can be given again: a tensor that nobody has changed in place since."""
        return isinstance(self.output, Tensor) and self.output._version == self.version


class Prefix:
    """What the modules of a network gave in one pass.

    A backward pass through kept outputs needs their graph: call ``backward(retain_graph=True)`` in both passes.

    Args:
        network: Any module; left as it was after each ``with`` statement.
    """

    def __init__(self, network: nn.Module) -> None:
        self.modules = [module for module in network.modules() if module is not network]
        self.around: dict[int, list[int]] = {}
        for module in network.modules():
            for inner in module.modules():
                if inner is not module:
                    self.around.setdefault(id(inner), []).append(id(module))
        self.holders: dict[str, list[int]] = {}
        for _, module in elastic_modules(network):
            for choice in module.own_choices:
                self.holders.setdefault(choice.name, []).append(id(module))
        self.calls: dict[int, list[_Call]] = {}
        self._clock = 0

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Inside, a pass is recorded; it replaces what was recorded before."""
        self.calls.clear()
        handles = []

        def began(module: nn.Module, inputs: Any) -> None:
            self._clock += 1
            self.calls.setdefault(id(module), []).append(_Call(self._clock))

        def ended(module: nn.Module, inputs: Any, output: Any) -> None:
            self._clock += 1
            call = self.calls[id(module)][-1]
            call.ended, call.output = self._clock, output
            call.version = output._version if isinstance(output, Tensor) else 0

        try:
            for module in self.modules:
                handles += [module.register_forward_pre_hook(began), module.register_forward_hook(ended)]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _first(self, changed: Set[str]) -> int:
        """When the first module that holds a changed choice began; 0 where none did."""
        times = [
            call.began
            for name in changed
            for holder in self.holders.get(name, [])
            for call in self.calls.get(holder, [])
        ]
        return min(times, default=0)

    def done(self, changed: Set[str]) -> list[nn.Module]:
        """The outermost modules whose only call ended before a changed choice was met, and can be given again."""
        first = self._first(changed)

        def before(key: int) -> bool:
            calls = self.calls.get(key, [])
            return len(calls) == 1 and 0 < calls[0].ended < first

        return [
            module
            for module in self.modules
            if before(id(module))
            and not any(before(outer) for outer in self.around[id(module)])
            and self.calls[id(module)][0].usable
            and "forward" not in vars(module)
        ]

    @contextlib.contextmanager
    def reuse(self, changed: Set[str]) -> Iterator[int]:
        """Inside, modules that ran before the first one with a changed choice give what they gave.

        Args:
            changed: Names of all choices whose option differs from the recorded pass.

        Yields:
            How many modules are not computed again.
        """
        kept = self.done(changed)
        try:
            for module in kept:
                vars(module)["forward"] = _giving(self.calls[id(module)][0].output)
            yield len(kept)
        finally:
            for module in kept:
                del vars(module)["forward"]


def _giving(output: Tensor) -> Callable[..., Tensor]:
    return lambda *inputs, **options: output
