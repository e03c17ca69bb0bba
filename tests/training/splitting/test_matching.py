from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.errors import InputError, TrainingError
from nasq.space import SearchSpace, SpaceRules
from nasq.training.splitting.matching import gradient_distances

OPERATORS = ("none", "one", "three", "same")


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Cell(nn.Module):
    """Two edges in a row with four operators each; ``same`` is ``three`` with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.width = Choice("width", (2, 4))
        self.edges = nn.ModuleList()
        for name in ("a", "b"):
            three = nn.Conv2d(4, 4, 3, padding=1)
            branches = {"none": Zero(), "one": nn.Conv2d(4, 4, 1), "three": three, "same": copy.deepcopy(three)}
            self.edges.append(elastic.OneOf(Choice(name, OPERATORS), branches))
        self.wide = elastic.Conv2d(4, self.width, 1)
        self.head = elastic.Linear(self.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for edge in self.edges:
            x = x + torch.tanh(edge(x)) if edge is self.edges[0] else edge(x)
        return self.head(torch.tanh(self.wide(x)).mean((2, 3)))


def _supernet(dtype: torch.dtype = torch.float32) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Supernet(Cell().to(dtype))


def _batch(repetition: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(repetition)
    x = torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (8,), generator=generator)


def _context(supernet: Supernet, repetition: int):
    return supernet.space.sample(torch.Generator().manual_seed(100 + repetition))


def _distances(supernet: Supernet, repetitions: int = 3, **options):
    return gradient_distances(supernet, _batch, lambda r: _context(supernet, r), repetitions=repetitions, **options)


def _slow(edge: str, repetitions: int) -> np.ndarray:
    """The same in float64, option by option, on concatenated gradients of everything but the edge's operators."""
    supernet = _supernet(torch.float64)
    own = f"module.edges.{'ab'.index(edge)}."
    total = np.zeros((4, 4))
    for repetition in range(repetitions):
        x, y = _batch(repetition, torch.float64)
        vectors = []
        for option in OPERATORS:
            net = copy.deepcopy(supernet).train()
            with net.activate({**_context(supernet, repetition), edge: option}):
                nn.functional.cross_entropy(net(x), y).backward()
            shared = {name: p.grad for name, p in net.named_parameters() if not name.startswith(own)}
            vectors.append(shared)
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors):
                both = [name for name in one if one[name] is not None and other[name] is not None]
                g, h = (torch.cat([v[name].flatten() for name in both]) for v in (one, other))
                norms = float(g.norm() * h.norm())
                total[i, j] += (1 - float(g @ h) / (norms + 1e-6)) if norms > 0 else 1.0
    np.fill_diagonal(total, 0)
    return total / repetitions


@pytest.mark.parametrize("edge", ["a", "b"])
def test_distances_equal_a_slow_loop_in_float64(edge: str) -> None:
    supernet = _supernet()
    found = _distances(supernet).distances[edge]
    np.testing.assert_allclose(found, _slow(edge, 3), atol=1e-5)
    assert (found == found.T).all() and (np.diag(found) == 0).all()
    assert found.min() >= 0 and found.max() <= 2


def test_equal_operators_have_no_distance() -> None:
    matrix = _distances(_supernet()).distances["b"]
    same, three = OPERATORS.index("same"), OPERATORS.index("three")
    # Not quite zero: the published 1e-6 beside the product of two small norms.
    assert matrix[same, three] == pytest.approx(0, abs=1e-4)
    assert matrix[same, OPERATORS.index("one")] > 1e-3


def test_an_operator_that_cuts_the_network_shares_only_what_still_learns() -> None:
    # Behind "none" on the last edge only the head has a gradient of its own.
    matrix = _distances(_supernet(), choices=["b"]).distances["b"]
    assert matrix[OPERATORS.index("none")].max() <= 2
    assert np.isfinite(matrix).all()


def test_widths_are_compared_on_the_slice_that_both_use() -> None:
    supernet = _supernet()
    x, y = _batch(0)
    context = dict(_context(supernet, 0))
    gradients = []
    for width in (2, 4):
        net = copy.deepcopy(supernet).train()
        with net.activate({**context, "width": width}):
            nn.functional.cross_entropy(net(x), y).backward()
        wide, head = net.module.wide, net.module.head
        parts = [wide.weight.grad[:2], wide.bias.grad[:2], head.weight.grad[:, :2], head.bias.grad]
        rest = [p.grad for name, p in net.module.named_parameters() if not name.startswith(("wide", "head"))]
        gradients.append([part for part in (*parts, *rest)])
    pairs = [(a.flatten().double(), b.flatten().double()) for a, b in zip(*gradients, strict=True) if a is not None]
    g, h = (torch.cat(list(part)) for part in zip(*pairs, strict=True))
    slow = 1 - float(g @ h) / float(g.norm() * h.norm())
    found = _distances(supernet, repetitions=1, choices=["width"]).distances["width"]
    assert found[0, 1] == pytest.approx(slow, abs=1e-5)


def test_one_context_is_shared_by_all_choices() -> None:
    # 1 for the context, 3 more for each edge, 1 more for the width.
    assert _distances(_supernet(), repetitions=4).passes == 4 * (1 + 3 + 3 + 1)


def test_nothing_is_touched() -> None:
    supernet = _supernet()
    supernet.eval()
    supernet.module.head.bias.grad = torch.ones(3)
    before = copy.deepcopy(supernet.state_dict())
    state = torch.get_rng_state()
    _distances(supernet)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in supernet.modules())
    assert [name for name, p in supernet.named_parameters() if p.grad is not None] == ["module.head.bias"]
    assert torch.equal(supernet.module.head.bias.grad, torch.ones(3))
    assert not supernet.active


def test_bad_input_is_named() -> None:
    supernet = _supernet()
    with pytest.raises(InputError, match="repetitions is 0; allowed: 1 or more"):
        _distances(supernet, repetitions=0)
    narrow = supernet.space.restrict({"a": ("one",)})
    with pytest.raises(InputError, match="'a' has one option left, 'one': there is nothing to split"):
        _distances(supernet, choices=["a"], space=narrow)
    with torch.no_grad():
        supernet.module.stem[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan while options are compared"):
        _distances(supernet)


def test_choices_under_rules_are_refused() -> None:
    class Distinct(SpaceRules):
        name = "distinct"
        size = 12

        def __init__(self, choices: tuple[Choice, ...]) -> None:
            self.choices = choices

        def valid(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, 0] != rows[:, 1]

    supernet = _supernet()
    plain = supernet.space
    ruled = SearchSpace(plain.choices, name="ruled", rules=Distinct((plain["a"], plain["b"])))
    with pytest.raises(InputError, match=r"'a' is under the rules 'distinct'.*Choose another choice"):
        _distances(supernet, choices=["a"], space=ruled)


def test_a_choice_that_is_never_active_is_named() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = elastic.Conv2d(2, 2, Choice("kernel", (1, 3)))
            self.op = elastic.OneOf(Choice("op", ("skip", "conv")), skip=nn.Identity(), conv=conv)
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.op(x).mean((2, 3)))

    supernet = Supernet(Inner())
    context = supernet.space.canonical({"op": "skip"})
    with pytest.raises(InputError, match="'kernel' was active in none of 2 contexts"):
        gradient_distances(supernet, _batch, lambda r: context, ["kernel"], repetitions=2)
