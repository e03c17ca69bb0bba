"""Random small spaces for property tests, and a slow reference for what is active in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from nasq.space import Choice, Condition, Option, SearchSpace

OPTIONS: tuple[tuple[Option, ...], ...] = (
    (1,),
    (3, 5),
    (2, 4, 8),
    ("conv", "pool"),
    (False, True),
    (0.5, 1),
    ("a", "b", "c"),
)


@st.composite
def search_spaces(draw: st.DrawFn, most: int = 6) -> SearchSpace:
    """Up to ``most`` choices, given in any order; later ones are often conditional on earlier ones, whole paths."""
    choices: list[Choice] = []
    conditions: dict[str, list[Condition]] = {}
    for index in range(draw(st.integers(0, most))):
        options = draw(st.sampled_from(OPTIONS))
        choice = Choice(f"c{index}", options, default=draw(st.sampled_from(options)), ordered=draw(st.booleans()))
        uses = [_path(draw, choices, conditions) for _ in range(draw(st.integers(0, 3)))] if choices else []
        choices.append(choice)
        if uses:
            conditions[choice.name] = uses
    return SearchSpace(draw(st.permutations(choices)), conditions)


def _path(draw: st.DrawFn, choices: list[Choice], conditions: dict[str, list[Condition]]) -> Condition:
    parent = draw(st.sampled_from(choices))
    kept = frozenset(draw(st.lists(st.sampled_from(parent.options), min_size=1)))
    above = draw(st.sampled_from(conditions.get(parent.name, [()])))
    return (*above, (parent.name, kept))


def active_names(space: SearchSpace, options: dict[str, Option]) -> set[str]:
    """The active choices, by the definition, one subnet at a time."""
    active: set[str] = set()
    for choice in space.choices:
        uses = space.conditions.get(choice.name, [()])
        if any(all(parent in active and options[parent] in allowed for parent, allowed in use) for use in uses):
            active.add(choice.name)
    return active


def every_subnet(space: SearchSpace) -> Iterator[dict[str, Option]]:
    """The canonical subnet of every combination of options: repeats, where choices are inactive."""
    for combination in itertools.product(*(choice.options for choice in space.choices)):
        options = dict(zip(space.names, combination, strict=True))
        active = active_names(space, options)
        yield {name: option for name, option in options.items() if name in active}


def nest(stages: int = 5, blocks: int = 4) -> SearchSpace:
    """Depths over blocks, operators inside them, and six choices inside one operator."""
    choices: list[Choice] = []
    conditions: dict[str, list[Condition]] = {}
    for stage in range(stages):
        depth = Choice(f"s{stage}.depth", range(1, blocks + 1))
        choices.append(depth)
        for block in range(blocks):
            path: Condition = ((depth.name, frozenset(range(block + 1, blocks + 1))),)
            operator = Choice(f"s{stage}.b{block}.op", ("conv", "pool", "skip"))
            choices.append(operator)
            conditions[operator.name] = [path]
            inner: Condition = (*path, (operator.name, frozenset({"conv"})))
            for name, options in (
                ("kernel", (3, 5, 7)),
                ("expand", (1, 3, 6)),
                *((f"bits{i}", range(2, 9)) for i in range(4)),
            ):
                choice = Choice(f"s{stage}.b{block}.{name}", options)
                choices.append(choice)
                conditions[choice.name] = [inner]
    return SearchSpace(choices, conditions, name="nest")
