"""Rules: graphs of four vertices, where validity, canonical forms and counts are known by trying everything."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from networks import images
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.errors import ArtifactError, InputError
from nasq.quant import quantize
from nasq.space import SearchSpace, SpaceRules, Subnet

EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
OPERATORS = ("none", "a", "b")


def edge(i: int, j: int) -> Choice:
    return Choice(f"edge{i}{j}", (0, 1))


def operator(vertex: int) -> Choice:
    return Choice(f"op{vertex}", OPERATORS, default="a")


class Graphs(SpaceRules):
    """Input 0, output 3, inner vertices 1 and 2 with an operator; at most ``most`` edges; dead vertices have none.

    Equal up to swapping the inner vertices; written down one row at a time.
    """

    def __init__(self, most: int = 6) -> None:
        self.name = f"graphs({most})"
        self.most = most
        self.choices = (*(edge(*pair) for pair in EDGES), operator(1), operator(2))
        self.size = len(self.members())

    def one(self, row: Any) -> tuple[int, ...] | None:
        """The canonical form of one row, or ``None``: dead edges cut, then the smaller of both orders."""
        alive = {pair for pair, on in zip(EDGES, row[:6], strict=True) if on}
        if len(alive) > self.most:
            return None
        before = None
        while before != alive:
            before = alive
            alive = {
                (i, j) for i, j in alive
                if (i == 0 or any(b == i for _, b in alive)) and (j == 3 or any(a == j for a, _ in alive))
            }  # fmt: skip
        if not alive:
            return None
        used = {vertex for pair in alive for vertex in pair}
        operators = {vertex: int(row[5 + vertex]) if vertex in used else 0 for vertex in (1, 2)}
        if any(operators[vertex] == 0 for vertex in used & {1, 2}):
            return None
        same = [self.row(alive, operators)]
        if (1, 2) not in alive:
            swap = {0: 0, 1: 2, 2: 1, 3: 3}
            same.append(self.row({(swap[i], swap[j]) for i, j in alive}, {swap[v]: o for v, o in operators.items()}))
        return max(same)

    @staticmethod
    def row(alive: set[tuple[int, int]], operators: dict[int, int]) -> tuple[int, ...]:
        return (*(int(pair in alive) for pair in EDGES), operators[1], operators[2])

    def valid(self, rows: Any) -> Any:
        return np.array([self.one(row) is not None for row in rows], dtype=bool)

    def canonical(self, rows: Any) -> Any:
        return np.array([self.one(row) for row in rows], dtype=np.int16).reshape(-1, 8)

    def members(self) -> Any:
        every = itertools.product(*[range(2)] * 6, range(3), range(3))
        return np.array(sorted({found for row in every if (found := self.one(row)) is not None}), dtype=np.int16)


RULES = Graphs()


def space(rules: SpaceRules = RULES, bits: bool = True) -> SearchSpace:
    """The graphs, a width beside them, and bits inside the operators."""
    choices = [Choice("width", (4, 8)), *rules.choices]
    conditions = {}
    for vertex in (1, 2):
        choice = Choice(f"bits{vertex}", (2, 4, 8))
        choices.append(choice)
        conditions[choice.name] = [((f"op{vertex}", frozenset({"a"})),)]
    return SearchSpace(choices[::-1], conditions, name="graphs", rules=rules) if bits else SearchSpace(
        [Choice("width", (4, 8)), *rules.choices], rules=rules
    )  # fmt: skip


def every_subnet(found: SearchSpace) -> set[Subnet]:
    """All canonical subnets, by trying every combination."""
    rows = np.array(list(itertools.product(*(range(size) for size in found.sizes))), dtype=np.int16)
    settled, member = found.settle(rows)
    return {Subnet(s) for s in found.to_subnets(np.unique(settled[member], axis=0))}


def test_size_counts_what_trying_everything_finds() -> None:
    for found in (space(), space(bits=False), space(Graphs(4))):
        assert found.size == len(every_subnet(found))
    assert space(bits=False).size == 2 * RULES.size


@pytest.mark.parametrize(
    "allowed", [{"edge03": (0,)}, {"op1": ("a",)}, {"width": (8,)}, {"op2": ("none", "b"), "edge12": (0,)}]
)
def test_a_restricted_space_holds_the_canonical_subnets_with_these_options(allowed: dict[str, Any]) -> None:
    whole = space()
    part = whole.restrict(allowed)
    kept = {s for s in every_subnet(whole) if all(s[name] in options for name, options in allowed.items())}
    assert every_subnet(part) == kept and part.size == len(kept) < whole.size
    for subnet in part.to_subnets(part.sample_batch(50, np.random.default_rng(0))):
        assert subnet in kept and whole.contains(subnet)


def test_parts_partition_the_space() -> None:
    whole = space()
    parts = [whole.restrict({"edge12": (option,)}) for option in (0, 1)]
    assert sum(part.size for part in parts) == whole.size


def test_samples_mutants_children_and_neighbours_are_canonical_members() -> None:
    whole, rng = space(), np.random.default_rng(3)
    members = every_subnet(whole)
    rows = whole.sample_batch(300, rng)
    mutants = whole.mutate(rows, rng, 0.2)
    for found in (rows, mutants, whole.crossover(rows[:150], rows[150:], rng)):
        assert set(whole.to_subnets(found)) <= members
        assert (whole.canonical(found) == found).all()
    assert (mutants != rows).any(axis=1).all()
    near = list(whole.neighbours(whole.to_subnet(rows[0])))
    assert len(set(near)) == len(near) and set(near) <= members - {whole.to_subnet(rows[0])}


def test_sampling_reaches_every_class() -> None:
    found = space(bits=False)
    seen = set(found.to_subnets(found.sample_batch(6000, np.random.default_rng(0))))
    assert seen == every_subnet(found)


def test_the_default_and_the_extremes_are_members() -> None:
    found = space(Graphs(4))
    for subnet in (found.default(), found.smallest(), found.largest()):
        assert found.contains(subnet)
    assert found.largest()["width"] == 8 and found.smallest()["width"] == 4
    assert sum(int(found.largest()[f"edge{i}{j}"]) for i, j in EDGES) == 4
    assert found.largest() == space(Graphs(4)).largest()


def test_encoding_tells_canonical_subnets_apart() -> None:
    whole = space()
    codes = whole.encode(sorted(every_subnet(whole), key=Subnet.to_json))
    assert len(np.unique(codes, axis=0)) == whole.size


def straight(**options: Any) -> dict[str, Any]:
    return {"width": 4, **{f"edge{i}{j}": 0 for i, j in EDGES}, "op1": "none", "op2": "none", **options}


def test_a_subnet_by_another_name_is_not_canonical() -> None:
    whole = space()
    second = straight(edge02=1, edge23=1, op2="b")
    assert whole.canonical(second) == whole.canonical(straight(edge01=1, edge13=1, op1="b"))
    other = second if whole.canonical(second) != second else straight(edge01=1, edge13=1, op1="b")
    assert not whole.contains(other) and whole.contains(whole.canonical(other))
    with pytest.raises(InputError, match=r"not the canonical one .* rules 'graphs\(6\)': there, '(edge|op)\d+' is"):
        whole.validate(other)


def test_an_invalid_subnet_is_refused_with_the_rules_name() -> None:
    with pytest.raises(InputError, match=r'"edge03":0.*is not valid by the rules \'graphs\(6\)\''):
        space().validate(straight())
    rows, member = space(bits=False).settle(np.zeros((2, 9), dtype=np.int16))
    assert not member.any() and rows.shape == (2, 9)


class Never(Graphs):
    def valid(self, rows: Any) -> Any:
        return np.zeros(len(rows), dtype=bool)


def test_a_sampler_that_finds_nothing_gives_up_with_the_rate() -> None:
    with pytest.raises(
        InputError, match=r"'graphs\(6\)' accepted 0 of 101000 random subnets \(a rate of 0\), and 1 were"
    ):
        space(Never()).sample(torch.Generator().manual_seed(0))


def test_a_mutation_that_finds_no_other_subnet_stays() -> None:
    found = space(bits=False)
    only = found.canonical(straight(edge03=1))
    alone = found.restrict({name: (option,) for name, option in only.items()})
    assert alone.size == 1 and alone.mutate(only, np.random.default_rng(0), 1.0) == only
    assert alone.crossover(only, only, np.random.default_rng(0)) == only and not list(alone.neighbours(only))


def test_json_names_the_rules_and_reads_back_with_them() -> None:
    whole = space()
    again = SearchSpace.from_json(whole.to_json(), rules=Graphs())
    assert again == whole and again.size == whole.size and pickle.loads(pickle.dumps(whole)) == whole
    assert copy.deepcopy(whole).fingerprint == whole.fingerprint != space(Graphs(5)).fingerprint
    with pytest.raises(ArtifactError, match=r"written with the rules 'graphs\(6\)', and None were given"):
        SearchSpace.from_json(whole.to_json())
    with pytest.raises(ArtifactError, match=r"rules 'graphs\(6\)', and 'graphs\(4\)' were given"):
        SearchSpace.from_json(whole.to_json(), rules=Graphs(4))


def test_rules_need_choices_that_every_subnet_has() -> None:
    with pytest.raises(InputError, match=r"about the choice 'edge01', which is absent"):
        SearchSpace([Choice("width", (4, 8))], rules=RULES)
    with pytest.raises(InputError, match=r"about the choice 'op2', which is conditional"):
        SearchSpace(RULES.choices, {"op2": [(("op1", frozenset({"a"})),)]}, rules=RULES)


def test_rules_that_return_nonsense_are_named() -> None:
    class Wrong(Graphs):
        def valid(self, rows: Any) -> Any:
            return np.ones((len(rows), 2), dtype=bool)

    with pytest.raises(InputError, match=r"valid\(\) of the rules 'graphs\(6\)' returned bool of shape"):
        space(Wrong()).sample(np.random.default_rng(0))


def test_sizes_of_parts_need_members() -> None:
    class Silent(Graphs):
        members_known = True

        def members(self) -> Any:
            return Graphs.members(self) if not hasattr(self, "size") else SpaceRules.members(self)

    rules = Silent()
    assert space(rules, bits=False).size == 2 * rules.size
    with pytest.raises(InputError, match=r"do not list their members.*Implement SpaceRules\.members"):
        _ = space(rules, bits=False).restrict({"edge03": (1,)}).size


class Cell(nn.Module):
    """A network whose two operators must differ."""

    def __init__(self) -> None:
        super().__init__()
        self.one = elastic.OneOf(Choice("one", ("conv", "skip")), conv=elastic.Conv2d(3, 3, 1), skip=nn.Identity())
        self.two = elastic.OneOf(Choice("two", ("conv", "skip")), conv=elastic.Conv2d(3, 3, 3), skip=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))

    def space_rules(self) -> SpaceRules:
        return Differ(self.one.choice, self.two.choice)


class Differ(SpaceRules):
    def __init__(self, *choices: Choice) -> None:
        self.name, self.choices, self.size = "differ", choices, 2

    def valid(self, rows: Any) -> Any:
        return rows[:, 0] != rows[:, 1]

    def members(self) -> Any:
        return np.array([[0, 1], [1, 0]], dtype=np.int16)


def test_rules_are_read_off_the_module_and_survive_quantization() -> None:
    supernet = Supernet(nn.Sequential(Cell(), nn.Flatten(), elastic.Linear(192, 3)))
    assert supernet.space.rules is not None and supernet.space.size == 2
    network = quantize(Cell(), images(1), weight_bits=(4, 8), activation_bits=(8,), first_last_bits=None)
    joint = Supernet(network).space
    assert joint.rules is not None and joint.rules.name == "differ" and joint.size == 4
    assert all(s["one"] != s["two"] for s in joint.to_subnets(joint.sample_batch(20, np.random.default_rng(0))))
    with pytest.raises(InputError, match="not valid by the rules 'differ'"):
        supernet.activate({"one": "conv", "two": "conv"})
    assert len(Supernet(supernet.extract(supernet.space.default())).space) == 0


def test_two_sets_of_rules_are_refused() -> None:
    class Other(Cell):
        def space_rules(self) -> SpaceRules:
            found = super().space_rules()
            found.name = "other"
            return found

    with pytest.raises(InputError, match=r"'1' has the rules 'other', and another part of the network has 'differ'"):
        Supernet(nn.Sequential(Cell(), Other()))
