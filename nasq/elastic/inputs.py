"""A node that reads some of several earlier outputs, each through an edge of its own: the nodes of DARTS cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from torch import nn

from nasq.elastic.base import Condition, Container
from nasq.errors import InputError
from nasq.space import Choice, Option

__all__ = ["InputChoice", "Pick", "input_options", "inputs_named"]

_T = TypeVar("_T")


def input_options(count: int, k: int = 2) -> tuple[str, ...]:
    """The options of a choice of ``k`` out of ``count`` inputs: ``("0+1", "0+2", "1+2")`` for 2 out of 3.

    Raises:
        InputError: There are not ``k`` inputs.
    """
    if not 1 <= k <= count:
        raise InputError(f"{k} of {count} inputs cannot be chosen. Choose from 1 to {count} of them.")
    return tuple("+".join(map(str, found)) for found in combinations(range(count), k))


def inputs_named(option: Option) -> tuple[int, ...]:
    """The positions of the inputs that an option of :func:`input_options` names."""
    return tuple(map(int, str(option).split("+")))


class PickedEdge(nn.Module):
    """What is left of a :class:`Pick`: one edge behind one of several inputs."""

    def __init__(self, index: int, edge: nn.Module) -> None:
        super().__init__()
        self.index, self.edge = index, edge

    def forward(self, *inputs: Any) -> Any:
        """Runs the edge on its input."""
        return self.edge(inputs[self.index])


class Pick(Container):
    """The chosen input at one position of a choice of inputs, sent through that input's own edge.

    Args:
        choice: Its options are some of :func:`input_options`.
        position: Which of an option's inputs, from 0.
        edges: The edge of every input that can stand at this position, by the input's position.
    """

    layout = "parallel"

    def __init__(self, choice: Choice, position: int, edges: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.choice, self.position = choice, position
        self.holds(choice)
        self.indices = tuple(edges)
        self.edges = nn.ModuleDict({str(index): edge for index, edge in edges.items()})

    def active_index(self) -> int:
        """The position of the chosen input."""
        return inputs_named(self.option(self.choice))[self.position]

    def forward(self, *inputs: Any) -> Any:
        """The chosen input, through its edge."""
        weights = self.mixture.get(self.choice.name)
        if weights is None:
            index = self.active_index()
            return self.edges[str(index)](inputs[index])
        return self.mixed(weights, [partial(self.edges[str(i)], inputs[i]) for i in self.indices])

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The edges."""
        return [(f"edges.{index}", self.edges[str(index)]) for index in self.indices]

    def condition(self, index: int) -> Condition:
        """The options that name this edge's input at this position."""
        wanted = self.indices[index]
        options = frozenset(one for one in self.choice.options if inputs_named(one)[self.position] == wanted)
        return ((self.choice.name, options),)

    def inputs_of(self, index: int, inputs: Sequence[_T]) -> Sequence[_T]:
        """Each edge sees its own input alone."""
        return [inputs[self.indices[index]]]

    def with_parts(self, parts: list[nn.Module]) -> Pick:
        """The same choice among other edges."""
        return Pick(self.choice, self.position, dict(zip(self.indices, parts, strict=True)))

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active edge, extracted, behind its input."""
        index = self.active_index()
        return PickedEdge(index, recurse(self.edges[str(index)])).train(self.training)


class InputChoice(nn.Module):
    """The sum of ``k`` of several inputs, each sent through an edge of its own.

    A node of a DARTS cell (Liu et al. 2019) reads two of the outputs before it, and every such edge has an operator: the
    edges are :class:`OneOf` modules. What is on an edge that is not chosen is inactive, so the number of subnets is that of
    the paper: ``C(n, 2) * operators^2`` for a node with ``n`` outputs before it. Edges share their weights among all
    choices that use them.

    Args:
        choice: Which inputs: its options are some of :func:`input_options`, such as ``"0+2"``.
        edges: One module per input, or ``None`` for nothing on any edge.
        k: How many are chosen; the number of inputs is then that of the edges, or of the largest option.

    Shape:
        ``forward(*inputs)``: tensors of one shape behind the edges, one per edge; the sum has that shape.

    Raises:
        InputError: An option does not name ``k`` different edges, in order.
    """

    def __init__(self, choice: Choice, edges: Sequence[nn.Module] | None = None, k: int = 2) -> None:
        super().__init__()
        count = _count(choice) if edges is None else len(edges)
        allowed = input_options(count, k)
        for option in choice.options:
            if option not in allowed:
                listed = ", ".join(allowed[:4]) + (", ..." if len(allowed) > 4 else "")
                raise InputError(
                    f"the choice {choice.name!r} has the option {option!r}, which does not name {k} of {count} inputs. "
                    f"Take the options of input_options({count}, {k}): {listed}."
                )
        modules = [nn.Identity() for _ in range(count)] if edges is None else edges
        named = [inputs_named(option) for option in choice.options]
        self.picks = nn.ModuleList(
            Pick(choice, place, {index: modules[index] for index in sorted({one[place] for one in named})})
            for place in range(k)
        )

    def forward(self, *inputs: Any) -> Any:
        """The sum of the chosen inputs behind their edges."""
        total = self.picks[0](*inputs)
        for pick in list(self.picks)[1:]:
            total = total + pick(*inputs)
        return total


def _count(choice: Choice) -> int:
    return 1 + max(int(part) for option in choice.options for part in str(option).split("+") if part.isdigit())
