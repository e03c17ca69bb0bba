from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.errors import InputError, TrainingError
from nasq.quant import calibrate, quantize
from nasq.training import PathSampler, stream
from nasq.training.importance import ImportancePaths
from nasq.training.paths import Path

OPERATORS = ("none", "conv1", "conv3")


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Cells(nn.Module):
    """Two cells that share the choices of two edges, behind a layer of elastic width and blocks of elastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.width = Choice("width", (2, 4, 8))
        self.stem = elastic.Conv2d(3, self.width, 3, padding="same")
        self.back = elastic.Conv2d(self.width, 4, 1)
        self.edges = nn.ModuleList()
        for _cell in range(2):
            for edge in range(2):
                branches = {
                    "none": Zero(), "conv1": elastic.Conv2d(4, 4, 1), "conv3": elastic.Conv2d(4, 4, 3, padding="same"),
                }  # fmt: skip
                self.edges.append(elastic.OneOf(Choice(f"edge{edge}", OPERATORS), branches))
        self.deep = elastic.Repeat([elastic.Conv2d(4, 4, 1) for _ in range(3)], Choice("depth", (1, 3)))
        self.head = elastic.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.stem(x))
        for edge in self.edges:
            x = x + edge(x)
        return self.head(self.deep(x).mean((2, 3)))


def _supernet(seed: int = 0) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Supernet(Cells())


def _sampler(supernet: Supernet, **options: object) -> ImportancePaths:
    return ImportancePaths(supernet, stream(0, "paths"), 10, **options)  # type: ignore[arg-type]


def _backward(supernet: Supernet, path: Path, scale: float = 1.0) -> Tensor:
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    supernet.zero_grad(set_to_none=True)
    with supernet.activate(path.subnet):
        loss = nn.functional.cross_entropy(supernet(x), torch.arange(6) % 5) * scale
        loss.backward()
    return loss.detach()


def _norm(*gradients: Tensor | None) -> float:
    return sum(float(gradient.double().norm()) for gradient in gradients if gradient is not None)


def _path(supernet: Supernet, **changes: object) -> Path:
    subnet = {"width": 4, "edge0": "conv1", "edge1": "conv3", "depth": 1, **changes}
    return Path(supernet.space.canonical(subnet), "random")  # type: ignore[arg-type]


def test_operator_norms_are_those_of_the_gradients_summed_over_cells() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet, decay=0.0)
    path = _path(supernet)
    sampler.observe(path, _backward(supernet, path), supernet)
    cells = supernet.module
    wanted = {  # by hand, from .grad: weight and bias of the operator in both cells
        ("edge0", "conv1"): [cells.edges[0], cells.edges[2]],
        ("edge1", "conv3"): [cells.edges[1], cells.edges[3]],
    }
    for (name, option), edges in wanted.items():
        slow = sum(_norm(e.branches[option].weight.grad, e.branches[option].bias.grad) for e in edges)
        assert float(sampler.norms[sampler._places[name, option]]) == pytest.approx(slow, rel=1e-5)
    # Options that are not in the path keep their statistic.
    for name, option in (("edge0", "conv3"), ("edge0", "none"), ("edge1", "conv1"), ("depth", 3)):
        assert float(sampler.norms[sampler._places[name, option]]) == 0


def test_sized_options_are_measured_per_active_element() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet, decay=0.0)
    for width in (2, 4, 8):
        path = _path(supernet, width=width)
        sampler.observe(path, _backward(supernet, path), supernet)
        slow = 0.0
        stem, back = supernet.module.stem, supernet.module.back
        for gradients, active in (
            ((stem.weight.grad, stem.bias.grad), width * 3 * 9 + width),
            ((back.weight.grad, back.bias.grad), width * 4 + 4),
        ):
            squares = sum(float(gradient.double().square().sum()) for gradient in gradients)
            slow += math.sqrt(squares / active)
        assert float(sampler.norms[sampler._places["width", width]]) == pytest.approx(slow, rel=1e-5)


def test_a_depth_is_measured_on_the_blocks_it_switches_on() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet, decay=0.0)
    path = _path(supernet, depth=3)
    sampler.observe(path, _backward(supernet, path), supernet)
    slow = 0.0
    for block in supernet.module.deep.blocks[1:]:
        squares = sum(float(p.grad.double().square().sum()) for p in block.parameters())
        slow += math.sqrt(squares / 20)  # 4 x 4 weights and 4 biases
    assert float(sampler.norms[sampler._places["depth", 3]]) == pytest.approx(slow, rel=1e-5)


def test_tied_positions_share_one_distribution_averaged_over_the_path() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet, shared=True)
    path = _path(supernet, edge1="conv1")
    sampler.observe(path, _backward(supernet, path), supernet)
    edges = supernet.module.edges
    total = sum(_norm(e.branches["conv1"].weight.grad, e.branches["conv1"].bias.grad) for e in edges)
    # Two edges have the operator; the first value of an epoch is halved, as in the released code.
    assert float(sampler.norms[sampler._places["edge0", "conv1"]]) == pytest.approx(total / 2 / 2, rel=1e-5)
    sampler.on_epoch(5)
    assert sampler.distribution("edge0") == sampler.distribution("edge1")
    assert sampler.distribution("edge0")["none"] == pytest.approx(0.5 / 3)


def test_bit_widths_are_measured_on_the_layer_that_they_round() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    network = quantize(net, torch.zeros(1, 3, 6, 6), weight_bits=(2, 8), activation_bits=(8,))
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    calibrate(network, x)
    supernet = Supernet(network)
    sampler = _sampler(supernet, decay=0.0)
    (name,) = supernet.space.names
    for bits in (2, 8):
        path = Path(supernet.space.canonical({name: bits}), "random")
        supernet.zero_grad(set_to_none=True)
        with supernet.activate(path.subnet):
            supernet(x).square().mean().backward()
        sampler.observe(path, torch.zeros(()), supernet)
        layer = network.get_submodule(name.removesuffix(".weight_bits"))
        assert float(sampler.norms[sampler._places[name, bits]]) == pytest.approx(
            _norm(layer.weight.grad, layer.bias.grad), rel=1e-5
        )


def test_scaling_the_loss_changes_no_distribution() -> None:
    found = []
    for scale in (1.0, 64.0):
        supernet = _supernet()
        sampler = _sampler(supernet)
        for option in OPERATORS:
            path = _path(supernet, edge0=option)
            sampler.observe(path, _backward(supernet, path, scale), supernet)
        sampler.on_epoch(8)
        found.append(sampler.probabilities)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_distributions_are_uniform_at_first_and_where_nothing_is_known() -> None:
    sampler = _sampler(_supernet())
    for epoch in (0, 9):
        sampler.on_epoch(epoch)
        assert sampler.distribution("edge0") == pytest.approx(dict.fromkeys(OPERATORS, 1 / 3))


def test_an_option_with_larger_gradients_becomes_more_likely_and_none_dies() -> None:
    supernet = _supernet()
    with torch.no_grad():  # what follows conv3 amplifies; so its gradient is larger
        for edge in (0, 2):
            supernet.module.edges[edge].branches["conv1"].weight.mul_(0.01)
    sampler = _sampler(supernet, floor=0.3)
    for option in ("conv1", "conv3"):
        path = _path(supernet, edge0=option)
        sampler.observe(path, _backward(supernet, path), supernet)
    sampler.on_epoch(9)
    p = sampler.distribution("edge0")
    assert p["conv3"] > p["conv1"] > p["none"]
    assert p["none"] == pytest.approx(0.7 * 0.1 / 3 + 0.3 / 3)
    assert sum(p.values()) == pytest.approx(1)


def test_paths_follow_the_distribution() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet)
    sampler.norms[sampler._places["edge0", "conv1"]] = 3.0
    sampler.norms[sampler._places["edge0", "conv3"]] = 1.0
    sampler.on_epoch(5)
    p = sampler.distribution("edge0")
    assert p == pytest.approx({"none": 0.5 / 3, "conv1": 0.375 + 0.5 / 3, "conv3": 0.125 + 0.5 / 3})
    counts = Counter(sampler.step()[0].subnet["edge0"] for _ in range(1500))
    # Chi-square, 2 degrees of freedom: above 13.8 in 1 of 1,000 draws.
    assert sum((counts[o] - 1500 * p[o]) ** 2 / (1500 * p[o]) for o in OPERATORS) < 13.8


def test_weights_make_the_mean_over_paths_that_of_uniform_sampling() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet, reweight=True)
    sampler.norms[sampler._places["edge0", "conv1"]] = 3.0
    sampler.norms[sampler._places["depth", 3]] = 1.0
    sampler.on_epoch(8)
    value = {"none": 1.0, "conv1": 5.0, "conv3": -2.0}
    drawn = [sampler.step()[0] for _ in range(4000)]
    mean = sum(path.weight * value[path.subnet["edge0"]] for path in drawn) / len(drawn)
    assert mean == pytest.approx(sum(value.values()) / 3, abs=0.2)
    p, q = sampler.distribution("edge0"), sampler.distribution("depth")
    for path in drawn[:20]:
        wanted = 1 / (3 * p[path.subnet["edge0"]]) / (2 * q[path.subnet["depth"]])
        assert path.weight == pytest.approx(wanted)  # edge1 and width are still uniform: factors of one


def test_a_weighted_loss_gives_the_statistic_of_the_loss_itself() -> None:
    supernet = _supernet()
    plain, weighted = _sampler(supernet, decay=0.0), _sampler(supernet, decay=0.0)
    path = _path(supernet)
    plain.observe(path, _backward(supernet, path), supernet)
    weighted.observe(path._replace(weight=7.0), _backward(supernet, path, 7.0), supernet)
    torch.testing.assert_close(plain.norms, weighted.norms)


def test_a_real_moving_average_survives_epochs() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet, decay=0.9)
    path = _path(supernet)
    sampler.observe(path, _backward(supernet, path), supernet)
    first = float(sampler.norms[sampler._places["edge0", "conv1"]])
    sampler.on_epoch(1)
    sampler.observe(path, _backward(supernet, path, 2.0), supernet)
    assert float(sampler.norms[sampler._places["edge0", "conv1"]]) == pytest.approx(0.9 * first + 0.1 * 2 * first)


def test_the_state_goes_on_where_it_was() -> None:
    supernet = _supernet()
    sampler = _sampler(supernet)
    assert isinstance(sampler, PathSampler)
    for _ in range(4):
        (path,) = sampler.step()
        sampler.observe(path, _backward(supernet, path), supernet)
    sampler.on_epoch(6)
    state = sampler.state_dict()
    other = ImportancePaths(supernet, stream(77, "paths"), 10)
    other.load_state_dict(state)
    assert [other.step() for _ in range(5)] == [sampler.step() for _ in range(5)]


def test_bad_input_is_named() -> None:
    supernet = _supernet()
    with pytest.raises(InputError, match="epochs is 0; allowed: 1 or more"):
        ImportancePaths(supernet, stream(0, "paths"), 0)
    with pytest.raises(InputError, match=r"floor is 1\.5; allowed: 0 to 1"):
        _sampler(supernet, floor=1.5)
    with pytest.raises(InputError, match=r"share of importance in epoch 0 is -1\.0"):
        _sampler(supernet, importance=lambda epoch, epochs: -1.0).on_epoch(0)
    sampler = _sampler(supernet)
    sampler.norms[sampler._places["edge0", "conv1"]] = math.inf
    with pytest.raises(TrainingError, match="gradient norm of 'edge0' = 'conv1' is not finite in epoch 3"):
        sampler.on_epoch(3)


class Branches(nn.Module):
    """One choice, one of whose operators has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        branches = {"none": nn.Identity(), "wide": nn.Linear(4, 4), "relu": nn.ReLU()}
        self.op = elastic.OneOf(Choice("op", tuple(branches)), branches)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(torch.relu(self.stem(x))))


def test_whole_gradients_give_the_distribution_of_least_variance() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        supernet = Supernet(Branches())
    sampler = _sampler(supernet, whole=True, decay=0.5, importance=lambda epoch, epochs: 1.0)
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    gradients: dict[str, Tensor] = {}
    for option in ("none", "wide", "relu", "wide"):
        path = Path(supernet.space.canonical({"op": option}), "random")
        supernet.zero_grad(set_to_none=True)
        with supernet.activate(path.subnet):
            loss = nn.functional.cross_entropy(supernet(x), y)
            loss.backward()
        zeros = [torch.zeros_like(p) if p.grad is None else p.grad for p in supernet.parameters()]
        gradients[option] = torch.cat([gradient.flatten() for gradient in zeros]).double()
        sampler.observe(path, loss.detach(), supernet)
    sampler.on_epoch(1)
    found = sampler.distribution("op")
    norms = {option: float(gradient.norm()) for option, gradient in gradients.items()}
    assert found == pytest.approx({option: norm / sum(norms.values()) for option, norm in norms.items()}, rel=1e-5)
    assert found["none"] > 0.1  # as published it would have nothing

    def variance(shares: dict[str, float]) -> float:
        """Of the reweighted gradient of one draw, by its definition."""
        mean = sum(gradients.values()) / 3
        return sum(shares[o] * float((gradients[o] / (3 * shares[o]) - mean).square().sum()) for o in gradients)

    even = dict.fromkeys(gradients, 1 / 3)
    assert variance(found) < variance(even)
    for option in gradients:
        nearby = {**found, option: found[option] * 1.05}
        total = sum(nearby.values())
        assert variance({o: share / total for o, share in nearby.items()}) > variance(found)


def test_an_option_whose_paths_were_not_seen_counts_like_the_others() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        supernet = Supernet(Branches())
    sampler = _sampler(supernet, whole=True, importance=lambda epoch, epochs: 1.0)
    sampler.norms[sampler._places["op", "none"]] = 4.0
    sampler.norms[sampler._places["op", "wide"]] = 1.0
    sampler.on_epoch(1)
    root = math.sqrt(2.5)  # the norms are squares: their mean, and the root of it
    assert sampler.distribution("op") == pytest.approx(
        {"none": 2 / (3 + root), "wide": 1 / (3 + root), "relu": root / (3 + root)}
    )
