"""Every proxy against an independent slow reference, a closed form or a property it must have."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from nasq.proxies._scaled import Scaling, log_scale
from nasq.proxies.alive_params import AliveParams
from nasq.proxies.az_nas import AzNas, Expressivity, Progressivity, Trainability
from nasq.proxies.epe_nas import EpeNas
from nasq.proxies.fisher import Fisher
from nasq.proxies.grad_norm import GradNorm
from nasq.proxies.gradsign import GradSign
from nasq.proxies.grasp import Grasp
from nasq.proxies.jacov import Jacov
from nasq.proxies.l2_norm import L2Norm
from nasq.proxies.linear_regions import LinearRegions
from nasq.proxies.meco import Meco, MecoStable, smallest_eigenvalue
from nasq.proxies.naswot import Naswot
from nasq.proxies.ntk import Ntk
from nasq.proxies.plain import Plain
from nasq.proxies.snip import Snip
from nasq.proxies.swap import TABLE, Swap, _Patterns
from nasq.proxies.synflow import Synflow
from nasq.proxies.synflow_bn import SynflowBN
from nasq.proxies.te_nas import TeNas
from nasq.proxies.vote import Vote
from nasq.proxies.zen import Zen
from nasq.proxies.zico import Zico
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.errors import InputError
from nasq.ranking import PassProxy, Proxy, ranks, score, score_pool
from nasq.ranking.batched import FASTER
from tests.proxies.nets import Batch, Gaps, Mixed, batch, built, mean_gradients, small, weights

GRADIENT = [GradNorm(), Snip(), Plain(), Fisher(), Grasp()]


def value(proxy: Proxy, model: nn.Module, given: Batch, **options: object) -> float:
    return score([proxy], model, given, **options)[proxy.name]  # type: ignore[arg-type]


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b, bias=bias), *([nn.ReLU()] if index < len(sizes) - 2 else [])]
    return nn.Sequential(*layers)


def deep(given: Batch) -> Batch:
    return given[0].double(), given[1]


def test_gradient_sums() -> None:
    model, given = built(Mixed).double(), deep(batch())
    found = mean_gradients(model, given)
    own = weights(model)
    assert value(GradNorm(), model, given) == pytest.approx(sum(float(one.norm()) for one in found.values()))
    wanted = sum(float((own[path] * one).abs().sum()) for path, one in found.items())
    assert value(Snip(), model, given) == pytest.approx(wanted)
    wanted = sum(float((own[path] * one).sum()) for path, one in found.items())
    assert value(Plain(), model, given) == pytest.approx(wanted)
    assert value(L2Norm(), model, given) == pytest.approx(sum(float(one.detach().norm()) for one in own.values()))


def test_plain_of_a_homogeneous_layer_is_the_inner_product_of_output_and_gradient() -> None:
    model, given = built(lambda: mlp(12, 5, bias=False)).double(), deep(batch(4, side=2))
    out = model(given[0]).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(out, given[1]), out)
    assert value(Plain(), model, given) == pytest.approx(float((out * gradient).sum()))


def test_grasp_equals_a_finite_difference_of_gradients() -> None:
    model, given = (
        built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))).double(),
        deep(batch(5, side=2)),
    )
    g = mean_gradients(model, given)
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for path, weight in weights(moved).items():
                weight += sign * 1e-4 * g[path]
        sides.append(mean_gradients(moved, given))
    wanted = -sum(
        float((weight * (sides[0][path] - sides[1][path]) / 2e-4).sum()) for path, weight in weights(model).items()
    )
    assert value(Grasp(), model, given) == pytest.approx(wanted, rel=1e-5)


def test_fisher_of_a_linear_layer_and_its_fan_in() -> None:
    model, given = built(lambda: mlp(12, 5)).double(), deep(batch(4, side=2))
    out = model(given[0]).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(out, given[1]), out)
    assert value(Fisher(), model, given) == pytest.approx(float((0.5 * (out * gradient).square().mean(0) * 12).sum()))


def test_fisher_of_a_network_with_operations_in_place() -> None:
    model, given = built(Mixed).double(), deep(batch())
    copied, kept = copy.deepcopy(model).train(), list[tuple[nn.Module, Tensor]]()

    def hook(module: nn.Module, _: object, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append((module, output))
        return output.clone()

    for module in copied.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    F.cross_entropy(copied(given[0]), given[1]).backward()
    total = 0.0
    for module, output in kept:
        assert output.grad is not None
        product = output * output.grad
        per_image = product.sum((2, 3)) if product.ndim == 4 else product.sum(1) if product.ndim == 3 else product
        total += float((0.5 * per_image.square().mean(0) * module.weight[0].numel()).sum())  # type: ignore[index, union-attr, operator]
    assert value(Fisher(), model, given) == pytest.approx(total)


@pytest.mark.parametrize("proxy", GRADIENT[:3], ids=lambda proxy: proxy.name)
def test_scaling_a_linear_layer(proxy: PassProxy) -> None:
    """Twice the weight and half the input is the same function: gradients halve, weight times gradient stays."""
    model, given = built(lambda: mlp(12, 5, bias=False)).double(), deep(batch(4, side=2))
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[1].weight *= 2
    factor = {"grad_norm": 0.5, "snip": 1.0, "plain": 1.0}[proxy.name]
    halved = (given[0] / 2, given[1])
    assert value(proxy, scaled, halved) == pytest.approx(factor * value(proxy, model, given))


def test_parts_of_a_batch_give_the_same_where_nothing_couples_them() -> None:
    model, given = built(lambda: Mixed(norms=False)).double(), deep(batch(7))
    for proxy in [*GRADIENT[:4], Jacov(), EpeNas(), Naswot()]:
        assert value(proxy, model, given, chunk=3) == pytest.approx(value(proxy, model, given), rel=1e-9), proxy.name
    with pytest.raises(InputError, match="cannot be made in parts"):
        value(Grasp(), model, given, chunk=3)
    with pytest.raises(InputError, match=r"7 images, which BatchNorm couples.* of 3. It needs about \d+ MiB"):
        value(Snip(), built(Mixed), batch(7), chunk=3)


def test_jacov_against_the_definition_and_its_maximum() -> None:
    model, given = built(Mixed).double(), deep(batch(6))
    copied, x = copy.deepcopy(model).train(), given[0].clone().requires_grad_(True)
    copied(x).sum().backward()
    assert x.grad is not None
    matrix = np.corrcoef(x.grad.flatten(1).numpy())
    eigenvalues = np.linalg.eigvals(matrix).real + 1e-5
    assert value(Jacov(), model, given) == pytest.approx(-float(np.sum(np.log(eigenvalues) + 1 / eigenvalues)))
    assert value(Jacov(), model, given) <= -6 * (math.log(1 + 1e-5) + 1 / (1 + 1e-5))
    twins = (torch.cat([given[0][:5], given[0][:1]]), given[1])
    assert value(Jacov(), model, twins) < value(Jacov(), model, given) - 1000


def test_jacov_of_a_constant_gradient_is_nan() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    nn.init.zeros_(model[1].weight)
    assert math.isnan(value(Jacov(), model, batch(4, side=2)))


def test_epe_nas_against_the_definition() -> None:
    model, given = built(Mixed).double(), deep(batch(8))
    given = (given[0], torch.tensor([0, 1, 0, 2, 1, 0, 3, 1]))
    copied, x = copy.deepcopy(model).train(), given[0].clone().requires_grad_(True)
    copied(x).sum().backward()
    assert x.grad is not None
    rows, total = x.grad.flatten(1).numpy(), 0.0
    for label in range(4):
        own = rows[given[1].numpy() == label]
        total += abs(float(np.sum(np.log(np.abs(np.corrcoef(own)) + 1e-5))))
    assert value(EpeNas(), model, given) == pytest.approx(total)


def test_epe_nas_with_many_outputs_compares_classes() -> None:
    model, given = built(lambda: mlp(12, 8, 101)).double(), deep(batch(6, side=2))
    given = (given[0], torch.tensor([0, 0, 0, 5, 5, 5]))
    x = given[0].clone().requires_grad_(True)
    model(x).sum().backward()
    assert x.grad is not None
    rows = x.grad.flatten(1).numpy()
    sums = [float(np.sum(np.log(np.abs(np.corrcoef(part)) + 1e-5))) / 3 for part in (rows[:3], rows[3:])]
    assert value(EpeNas(), model, given) == pytest.approx(abs(sums[0] - sums[1]))


def test_naswot_against_the_definition() -> None:
    model, given = built(lambda: mlp(12, 16, 9, 5)).double(), deep(batch(5, side=2))
    first = model[1](given[0].flatten(1))
    second = model[3](first.relu())
    codes = torch.cat([first > 0, second > 0], 1).double()
    k = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert bool((k.diagonal() == 25).all())
    assert value(Naswot(), model, given) == pytest.approx(float(torch.linalg.slogdet(k)[1]))
    twins = (torch.cat([given[0][:4], given[0][:1]]), given[1])
    assert value(Naswot(), model, twins) == -math.inf
    with pytest.raises(InputError, match="network ran none"):
        value(Naswot(), built(lambda: mlp(12, 5)), batch(4, side=2))


def test_synflow_is_conserved_along_a_chain() -> None:
    """Without biases every layer's sum is the output R, so the score is layers x R."""
    model = built(lambda: mlp(12, 16, 9, 5, bias=False)).double()
    y = torch.ones(1, 12, dtype=torch.float64)
    for layer in (model[1], model[3], model[5]):
        y = y @ layer.weight.detach().abs().T
    found = value(Synflow(), model, deep(batch(2, side=2)))
    assert found == pytest.approx(math.log(3 * float(y.sum())))
    assert found == value(Synflow(), model, deep(batch(2, seed=9, side=2)))
    with torch.no_grad():
        model[3].weight *= -7
    assert value(Synflow(), model, deep(batch(2, side=2))) == pytest.approx(found + math.log(7))


def test_synflow_against_a_plain_double_pass() -> None:
    model = built(Mixed)
    copied = copy.deepcopy(model).double()
    for name in ("bn0", "bn1"):
        setattr(copied, name, nn.Identity())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.abs_()
    copied(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
    total = sum(float((one * one.grad).abs().sum()) for one in weights(copied).values() if one.grad is not None)
    assert value(Synflow(), model, batch()) == pytest.approx(math.log(total))


def test_synflow_does_not_overflow() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(80))
            self.head = nn.Linear(3, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).relu()
            return self.head(x.mean((2, 3)))

    model = built(Deep)
    small_value = value(Synflow(), model, batch(1, side=4))
    with torch.no_grad():
        for layer in model.layers:
            layer.weight *= 1e9
    large = value(Synflow(), model, batch(1, side=4))
    assert math.isfinite(large) and large > 1500 > math.log(torch.finfo(torch.float64).max) > small_value
    # Where the shortcut no longer matters, every layer's factor is one factor of the result.
    with torch.no_grad():
        for layer in model.layers:
            layer.weight *= 10
    assert value(Synflow(), model, batch(1, side=4)) == pytest.approx(large + 80 * math.log(10), rel=1e-9)


def test_synflow_of_a_network_that_lets_nothing_through() -> None:
    model = built(lambda: mlp(12, 5, bias=False))
    nn.init.zeros_(model[1].weight)
    assert value(Synflow(), model, batch(1, side=2)) == -math.inf


def test_synflow_bn_keeps_batchnorm() -> None:
    model = built(small)
    assert value(SynflowBN(), model, batch()) != value(Synflow(), model, batch())


def test_zico_against_the_definition_and_loss_scale() -> None:
    model, given = built(Mixed).double(), deep(batch(8))
    halves = [mean_gradients(model, (given[0][at], given[1][at])) for at in (slice(0, 4), slice(4, 8))]
    total = 0.0
    for path in halves[0]:
        a, b = (one[path] for one in halves)
        std, mean = ((a - b) / 2).abs(), (a.abs() + b.abs()) / 2
        if bool((std > 0).any()):
            total += math.log(float((mean[std > 0] / std[std > 0]).sum()))
    assert value(Zico(), model, given) == pytest.approx(total)
    with pytest.raises(InputError, match="'zico' splits the batch into 2 and it has 1"):
        value(Zico(), built(lambda: mlp(12, 5)), batch(1, side=2))


def test_ntk_of_a_linear_model() -> None:
    """For f = W x the kernel is outputs x X X^T."""
    model, given = built(lambda: mlp(12, 5)).double(), deep(batch(4, side=2))
    x = given[0].flatten(1)
    values = torch.linalg.eigvalsh(5 * x @ x.T)
    assert value(Ntk(), model, given) == pytest.approx(-float(values[-1] / values[0]))
    assert value(Ntk(), model, (x.new_ones(3, 3, 2, 2), given[1][:3])) == -math.inf


def test_ntk_of_a_convolutional_network() -> None:
    model, given = built(Mixed).double(), deep(batch(5))
    rows = []
    for x in given[0]:
        copied = copy.deepcopy(model).train()
        copied(x[None]).sum().backward()
        parts = [one.grad.flatten() for one in weights(copied).values() if one.grad is not None]
        rows.append(torch.cat(parts))
    stack = torch.stack(rows)
    values = torch.linalg.eigvalsh(stack @ stack.T)
    assert value(Ntk(), model, given) == pytest.approx(-float(values[-1] / values[0]), rel=1e-6)


def test_linear_regions_of_one_layer() -> None:
    """A line crosses the hyperplane of a unit at most once: with points enough, one region more than sign changes."""
    model, given = built(lambda: mlp(12, 64, 5)), batch(2, side=2)
    few, many = (value(LinearRegions(4, points), model, given) for points in (2, 200))
    assert few == many and 1 < many <= 65
    assert value(LinearRegions(2), built(lambda: mlp(12, 256, 5)), given) > many


def test_swap_bounds() -> None:
    model, given = built(small), batch(5)
    found = value(Swap(samples=3, repeats=2), model, given)
    assert 1 < found <= 2**3
    assert value(Swap(samples=5, repeats=1), model, given) <= min(2 * 6 * 64, 2**5)
    flat = (given[0] * 0, given[1])
    constant = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert value(Swap(repeats=2), constant, flat) == 1
    thousands = sum(one.numel() for one in model.parameters()) / 1000
    assert value(Swap(3, 2, thousands, 1.0), model, given) == found
    assert value(Swap(3, 2, thousands + 1, 1.0), model, given) == pytest.approx(found * math.exp(-1))
    with pytest.raises(InputError, match="Give both"):
        Swap(mu=1.0)
    with pytest.raises(InputError, match="Allowed: 1 to 62"):
        Swap(samples=63)


@pytest.mark.parametrize("samples", [5, TABLE + 2])
def test_patterns_are_counted_as_a_set_does(samples: int) -> None:
    rng = torch.Generator().manual_seed(0)
    found, wanted = _Patterns(samples, torch.device("cpu")), set()
    for units in (40, 9):
        states = torch.rand(samples, units, 1, generator=rng) > 0.5
        states[:, 3] = states[:, 2]
        found.add(states)
        wanted |= {tuple(column) for column in states.flatten(1).T.tolist()}
    assert found.count() == len(wanted) and found.units == 49


def test_alive_params_counts_what_the_loss_depends_on() -> None:
    model, given = built(Mixed), batch()
    found = mean_gradients(model, given)
    assert value(AliveParams(), model, given) == sum(int((one != 0).sum()) for one in found.values())
    assert 0 < value(AliveParams(), model, given) <= sum(one.numel() for one in found.values()) - 16  # unused.weight
    one = (given[0][:1], given[1][:1])
    plain = built(lambda: Mixed(norms=False))
    assert value(AliveParams(), plain, one) == value(GradSign(), plain, one)
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = math.nan
    assert math.isnan(value(AliveParams(), model, given))


def test_alive_params_leaves_out_a_branch_that_is_never_switched_on() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.a(x) + self.c(self.b(x).relu())).mean((2, 3)))

    model = built(Branches).double()
    assert value(AliveParams(), model, deep(batch())) == 3 * 81 + 15
    with torch.no_grad():
        model.b.bias.fill_(-1e6)
    assert value(AliveParams(), model, deep(batch())) == 81 + 15


def test_the_faster_pooling_is_the_same_function_twice_differentiable() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fast = lambda x: FASTER[F.avg_pool2d](x, 3, 1, 1, False, False)  # noqa: E731
    torch.testing.assert_close(fast(x), F.avg_pool2d(x, 3, 1, 1, False, False))
    torch.testing.assert_close(fast(x.float()), F.avg_pool2d(x.float(), 3, 1, 1, False, False))
    square = lambda x: fast(x * x)  # noqa: E731  # whose second derivative is not 0
    assert torch.autograd.gradcheck(square, (x,)) and torch.autograd.gradgradcheck(square, (x,))


def test_a_network_whose_input_is_cut_off_has_scores_that_say_so() -> None:
    """A cell without a path: its outputs are constant. No proxy may fail, since a sweep over a space meets such cells."""
    model, given = built(lambda: Gaps(cut=True)), batch()
    proxies = [Jacov(), EpeNas(), Zen(), Ntk(2), GradNorm(), Grasp(), Naswot(), Expressivity(), Trainability()]
    found = score(proxies, model, given)
    assert math.isnan(found["jacov"]) and math.isnan(found["epe_nas"])
    assert found["zen"] == found["ntk"] == found["naswot"] == found["az_trainability"] == -math.inf
    assert math.isfinite(found["grad_norm"] + found["grasp"] + found["az_expressivity"])
    with torch.no_grad():
        for module in (model.after, *(block[1] for block in model.body)):
            module.bias.zero_()
    assert value(Synflow(), model, given) == value(SynflowBN(), model, given) == -math.inf


def test_synflow_adds_zeros_of_any_scale() -> None:
    huge = torch.full((2, 3), 1e20, dtype=torch.float64)
    with Scaling():
        grown = F.linear(F.linear(huge, huge.new_full((3, 3), 1e20)), huge.new_full((3, 3), 1e300))
        nothing = F.relu(F.linear(F.linear(huge, huge.new_full((3, 3), 1e20)), huge.new_full((3, 3), -1e300)))
        assert log_scale(grown) > 700 and log_scale(nothing) == log_scale(grown)
        twice, kept = nothing + nothing, huge + nothing
    assert torch.equal(twice, torch.zeros_like(huge))
    assert torch.equal(kept, huge) and log_scale(kept) == 0


def test_relus_of_one_input_count_as_often_as_they_run() -> None:
    class Twice(nn.Module):
        def __init__(self, apart: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.head, self.apart = nn.Linear(4, 5), apart

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = (x.clone() if self.apart else x).relu() + self.second(x).relu_().relu()
            return self.head((x.relu() + y).mean((2, 3)))

    one, two = built(lambda: Twice(False)), built(lambda: Twice(True))
    proxies = [Naswot(), Swap(samples=4, repeats=2)]
    assert score(proxies, one, batch()) == score(proxies, two, batch())


def test_meco_eigenvalues() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 5, 5))
    wanted = np.linalg.eigvalsh(np.corrcoef(features.reshape(6, -1)))[0]
    assert smallest_eigenvalue(torch.tensor(features)) == pytest.approx(wanted)
    copies = torch.tensor(features)[[0, 0, 1]]
    assert smallest_eigenvalue(copies) == pytest.approx(0, abs=1e-9)
    assert smallest_eigenvalue(torch.ones(3, 4, 4)) == 0.0


def test_meco_counts_containers_and_its_stable_form_does_not() -> None:
    model = built(small)
    nested = nn.Sequential(nn.Sequential(*list(model)[:3]), *list(model)[3:])
    assert value(Meco(), nested, batch()) > value(Meco(), model, batch())
    assert value(MecoStable(), nested, batch()) == value(MecoStable(), model, batch())
    assert 0 <= value(MecoStable(), model, batch()) <= 2
    both = score([Meco(), MecoStable()], model, batch())
    assert both == {"meco": value(Meco(), model, batch()), "meco_stable": value(MecoStable(), model, batch())}


def test_zen_draws_its_own_weights() -> None:
    model, given = built(small), batch()
    found = value(Zen(), model, given)
    other = built(small, seed=5)
    assert value(Zen(), other, given) == found
    assert value(Zen(), model, given, generator=torch.Generator().manual_seed(7)) != found
    with pytest.raises(InputError, match="track_running_stats=True"):
        value(Zen(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), given)


def test_zen_without_norms_by_hand() -> None:
    """One convolution of one weight: f(a) - f(a + 0.01 b) = 0.01 w b."""
    model, given = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)), (torch.zeros(4, 1, 6, 6), torch.zeros(4).long())
    found = value(Zen(), model, given)
    # |w| and the mean of |b| over 36 pixels: log(0.01 * 36 * 0.8 * |w|) up to the draw
    assert found == pytest.approx(math.log(0.01 * 36 * math.sqrt(2 / math.pi)), abs=4)


def test_az_nas_parts() -> None:
    class Net(nn.Module):
        def __init__(self, count: int, identity: bool = False) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.body = nn.Sequential(
                *(nn.Sequential(nn.Identity() if identity else nn.Conv2d(6, 6, 3, padding=1)) for _ in range(count))
            )
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x)).mean((2, 3)))

    given = batch()
    assert value(Trainability(), built(lambda: Net(2, identity=True)), given) == -math.inf
    assert value(Progressivity(), built(lambda: Net(2, identity=True)), given) == 0
    assert 0 < value(Expressivity(), built(lambda: Net(1)), given) <= math.log(6)
    assert value(Trainability(), built(lambda: Net(3)), given) <= 0


def test_az_nas_depends_on_ranks_only() -> None:
    rng = np.random.default_rng(0)
    parts = {part.name: rng.normal(size=9) for part in AzNas().parts}
    bent = {name: np.exp(3 * one) for name, one in parts.items()}
    assert np.array_equal(AzNas().combine(parts), AzNas().combine(bent))
    best = {name: np.arange(9.0) for name in parts}
    assert AzNas().combine(best)[8] == 0 and AzNas().combine(best)[0] == pytest.approx(4 * math.log(1 / 9))


def test_te_nas_and_vote() -> None:
    values = {"ntk": np.array([-3.0, -1.0, -2.0]), "linear_regions": np.array([5.0, 9.0, 7.0])}
    assert TeNas().combine(values).tolist() == [2, 6, 4]
    votes = {"synflow": np.array([3.0, 2, 1]), "jacov": np.array([3.0, 1, 2]), "snip": np.array([1.0, 3, 2])}
    assert Vote().combine(votes).tolist() == [2, 1, 0]
    votes["snip"][1] = math.nan
    assert np.isnan(Vote().combine(votes)).tolist() == [False, True, False]


def test_ranks() -> None:
    assert ranks([3.0, 1.0, 1.0, -math.inf]).tolist() == [4, 2.5, 2.5, 1]
    found = ranks([3.0, math.nan, 1.0])
    assert found[[0, 2]].tolist() == [2, 1] and math.isnan(found[1])


def test_a_pool() -> None:
    models = [built(small, seed) for seed in range(3)]
    found = score_pool([Vote(), GradNorm()], models, batch())
    assert list(found) == ["synflow", "jacov", "snip", "grad_norm", "vote"]
    assert sorted(found["vote"].tolist()) != [0, 0, 0] and found["vote"].sum() == 3
    alone = [score([GradNorm()], model, batch())["grad_norm"] for model in models]
    assert found["grad_norm"].tolist() == alone
    with pytest.raises(InputError, match="'vote' compares candidates"):
        Vote().score(models[0], batch())
