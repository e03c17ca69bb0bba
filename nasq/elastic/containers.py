"""Containers: one of several branches, or the first of several blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from nasq.elastic.base import Condition, Container
from nasq.errors import InputError
from nasq.space import Choice, Option

__all__ = ["OneOf", "Repeat"]


class OneOf(Container):
    """Runs the branch that its choice names.

    Args:
        choice: The decision; its options name the branches.
        branches: One module per option. Options that are identifiers may be given as keywords instead.

    Raises:
        InputError: Branches and options do not name the same things.
    """

    layout = "parallel"

    def __init__(self, choice: Choice, branches: Mapping[Any, nn.Module] | None = None, **named: nn.Module) -> None:
        super().__init__()
        given: dict[Any, nn.Module] = {**(branches or {}), **named}
        if not isinstance(choice, Choice):
            raise InputError(f"OneOf was given {choice!r} as its choice. Give nasq.Choice(name, {tuple(given)}).")
        if set(given) != set(choice.options):
            raise InputError(
                f"OneOf({choice.name!r}) has the options {list(choice.options)} and branches for {list(given)}. "
                "Give exactly one branch per option."
            )
        self.choice = choice
        self.holds(choice)
        self.branches = nn.ModuleDict()
        self._keys: dict[Option, str] = {}
        for option in choice.options:
            key = self._keys[option] = _free_key(self.branches, option)
            self.branches[key] = given[option]

    def forward(self, *inputs: Any) -> Any:
        """Runs the active branch, or all of them in a mixture."""
        weights = self.mixture.get(self.choice.name)
        if weights is not None:
            return self.mixed(weights, [partial(branch, *inputs) for branch in self.branches.values()])
        return self.branches[self._keys[self.option(self.choice)]](*inputs)

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The branches, in the order of the options."""
        return [(f"branches.{key}", self.branches[key]) for key in self._keys.values()]

    def condition(self, index: int) -> Condition:
        """The branch's own option."""
        return ((self.choice.name, frozenset({self.choice.options[index]})),)

    def with_parts(self, parts: list[nn.Module]) -> OneOf:
        """The same decision among other branches."""
        return OneOf(self.choice, dict(zip(self.choice.options, parts, strict=True)))

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active branch, extracted."""
        return recurse(self.branches[self._keys[self.option(self.choice)]])


def _free_key(branches: nn.ModuleDict, option: Option) -> str:
    """The option as a name that torch's ModuleDict takes: no dot, no name of its own, none that is taken."""
    key = str(option).replace(".", "_")
    while not key or hasattr(branches, key):
        key += "_"
    return key


class Repeat(Container):
    """Runs the first ``depth`` of its blocks, one after the other.

    Args:
        blocks: The blocks of the deepest form; what lies behind it never runs and is left out.
        depth: How many run: an int or a choice of ints in ``1..len(blocks)`` (0 where the input may pass unchanged).

    Raises:
        InputError: A depth is not an int or more than there are blocks.
    """

    layout = "chain"

    def __init__(self, blocks: Sequence[nn.Module], depth: Choice | int | None = None) -> None:
        super().__init__()
        self.depth: Choice | int = len(blocks) if depth is None else depth
        options: tuple[Option, ...] = self.depth.options if isinstance(self.depth, Choice) else (self.depth,)
        for option in options:
            if not isinstance(option, int) or isinstance(option, bool) or not 0 <= option <= len(blocks):
                raise InputError(
                    f"the depth {option!r} is not a number of blocks from 0 to {len(blocks)}. Change the depth's "
                    "options or give more blocks."
                )
        self.blocks = nn.ModuleList(blocks[: max(option for option in options if isinstance(option, int))])
        if isinstance(self.depth, Choice):
            self.holds(self.depth)

    def active_depth(self) -> int:
        """Number of active blocks."""
        depth = self.option(self.depth) if isinstance(self.depth, Choice) else self.depth
        assert isinstance(depth, int)
        return depth

    def forward(self, x: Any) -> Any:
        """Runs the active blocks."""
        for index in range(self.active_depth()):
            x = self.blocks[index](x)
        return x

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The blocks."""
        return [(f"blocks.{index}", block) for index, block in enumerate(self.blocks)]

    def condition(self, index: int) -> Condition:
        """A depth that reaches the block."""
        if not isinstance(self.depth, Choice):
            return ()
        deep = frozenset(option for option in self.depth.options if isinstance(option, int) and option > index)
        return () if len(deep) == len(self.depth.options) else ((self.depth.name, deep),)

    def with_parts(self, parts: list[nn.Module]) -> Repeat:
        """The same depths of other blocks."""
        return Repeat(parts, self.depth)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active blocks, extracted, in sequence."""
        plain = nn.Sequential(*(recurse(self.blocks[index]) for index in range(self.active_depth())))
        plain.training = self.training  # of the sequence alone: each block keeps its own
        return plain
