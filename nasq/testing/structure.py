"""Checks of the search space itself: no network runs."""

from __future__ import annotations

import itertools
import pickle

import numpy as np

from nasq.errors import InputError
from nasq.space import SearchSpace, Subnet
from nasq.testing.subject import Subject, expect, shown

__all__ = ["arrays_and_subnets", "canonical_form", "choices", "encoding", "json_round_trip", "sampling", "size_of"]

ROWS = 500


def size_of(space: SearchSpace) -> int | None:
    """The number of canonical subnets, or ``None`` where the rules cannot list their members."""
    try:
        return space.size
    except InputError:
        return None


def choices(subject: Subject) -> str:
    """Two builds have one space, whose corners are members, and which refuses what is no option."""
    space, again = subject.space, type(subject.supernet)(subject.build(1), subject.name).space
    expect(space == again, "two calls of the factory build different spaces. Choices may not depend on chance.")
    size = size_of(space)
    expect(size is None or size >= 1, f"the space holds {size} subnets.")
    for label, subnet in (("default", space.default()), ("smallest", space.smallest()), ("largest", space.largest())):
        expect(space.contains(subnet), f"its {label} subnet {shown(subnet)} is no member.")
    default = space.default()
    for choice in space.choices:
        wrong = {**default, choice.name: "no such option"}
        expect(not space.contains(wrong), f"it contains a subnet with the option 'no such option' of {choice.name!r}.")
    return f"{len(space)} choices, the same in two builds"


def json_round_trip(subject: Subject) -> str:
    """Spaces and subnets survive JSON and pickle."""
    space = subject.space
    again = SearchSpace.from_json(space.to_json(), rules=space.rules)
    expect(again == space and again.fingerprint == space.fingerprint, "the space read from its JSON is another one.")
    expect(pickle.loads(pickle.dumps(space)) == space, "the unpickled space is another one.")
    for subnet in subject.subnets:
        read = Subnet.from_json(subnet.to_json())
        expect(
            read == subnet and read.id == subnet.id, f"the subnet {shown(subnet)} read from its JSON is another one."
        )
    return f"the space and {len(subject.subnets)} subnets"


def sampling(subject: Subject) -> str:
    """What is sampled, mutated, crossed and next to it stays inside."""
    space, rng = subject.space, np.random.default_rng(subject.seed)
    rows = space.sample_batch(ROWS, rng)
    groups = {
        "sampled": rows,
        "mutated": space.mutate(rows, rng, 0.3),
        "crossed": space.crossover(rows, rows[::-1], rng),
    }
    for what, found in groups.items():
        for subnet in dict.fromkeys(space.to_subnets(found)):
            expect(space.contains(subnet), f"the {what} subnet {shown(subnet)} is no member.")
    for subnet in subject.subnets[:3]:
        for near in itertools.islice(space.neighbours(subnet), 50):
            expect(
                space.contains(near) and near != subnet, f"{shown(near)} is no other member next to {shown(subnet)}."
            )
    if any(len(choice.options) > 1 for choice in space.choices):
        moved = (groups["mutated"] != rows).any(axis=1).mean()
        expect(moved > 0.5, f"mutation changed only {moved:.0%} of {ROWS} subnets.")
    return f"{ROWS} sampled, mutated and crossed"


def canonical_form(subject: Subject) -> str:
    """The canonical form of a canonical subnet is itself, and rows of any option settle to it."""
    space, rng = subject.space, np.random.default_rng(subject.seed + 1)
    drawn = rng.integers(0, space.sizes, size=(ROWS, len(space))).astype(np.int16)
    once, member = space.settle(drawn)
    once = once[member]
    twice = space.canonical(once)
    wrong = np.flatnonzero((once != twice).any(axis=1))
    expect(
        not len(wrong),
        f"canonical() is not idempotent: {[shown(s) for s in space.to_subnets(once[wrong[:1]])]} becomes another one.",
    )
    inactive = ~space.active(once)
    default = np.array([choice.index(choice.default) for choice in space.choices])
    expect((np.where(inactive, once, default) == default).all(), "an inactive choice does not have its default.")
    for subnet in subject.subnets:
        expect(space.canonical(subnet) == subnet, f"the canonical form of {shown(subnet)} is another subnet.")
    return f"{len(once)} rows"


def encoding(subject: Subject) -> str:
    """Different canonical subnets have different codes of one length."""
    space, rng = subject.space, np.random.default_rng(subject.seed + 2)
    found = dict.fromkeys(space.to_subnets(space.sample_batch(ROWS, rng)))
    found |= dict.fromkeys(itertools.islice(space.neighbours(space.default()), 200))
    codes = space.encode(list(found))
    expect(codes.shape == (len(found), int(space.sizes.sum())), f"codes have the shape {codes.shape}.")
    distinct = len(np.unique(codes, axis=0)) if codes.size else 1
    expect(distinct == len(found), f"{len(found)} different subnets have only {distinct} different codes.")
    return f"{len(found)} different subnets"


def arrays_and_subnets(subject: Subject) -> str:
    """Rows and subnets are two views of one thing."""
    space, rng = subject.space, np.random.default_rng(subject.seed + 3)
    rows = space.sample_batch(ROWS, rng)
    subnets = space.to_subnets(rows)
    expect((space.to_rows(subnets) == rows).all(), "rows of subnets of rows are other rows.")
    expect((space.encode(rows) == space.encode(subnets)).all(), "rows and their subnets have different codes.")
    for index, subnet in enumerate(subnets[:50]):
        expect(space.to_subnet(rows[index]) == subnet, f"row {index} alone is another subnet than {shown(subnet)}.")
    return f"{ROWS} rows"
