"""ParZC: features, the loss, the network, training, files and commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torch import Tensor

from nasq.errors import ArtifactError, InputError
from nasq.ranking import Passes
from nasq.ranking.features import Features, dagger, scaled
from nasq.ranking.kendall import diff_kendall, pairwise_loss
from nasq.ranking.mabn import MABN, BayesianLinear, MabnConfig
from nasq.ranking.nodes import NodeStatistics, from_text, node_statistics, to_text
from nasq.ranking.ranker import Ranker, RankerConfig, batches, fit
from nasq.run.ranker import apply_ranker, fit_ranker
from nasq.run.score import ScoreJob, run_score
from tests.proxies.nets import batch, built, mean_gradients, small, weights

QUICK = RankerConfig(epochs=5, members=2, width=16, depth=1, segments=2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nodes(count: int, seed: int = 0, places: int = 12) -> list[NodeStatistics]:
    """Subnets with layers at some of ``places``; layer 0 is always there."""
    draw = np.random.default_rng(seed)
    made: list[NodeStatistics] = []
    for _ in range(count):
        here = [0, *(at for at in range(1, places) if draw.random() < 0.7)]
        made.append({f"cells.{at}.conv": tuple(draw.gamma(2.0, size=3).tolist()) for at in here})
    return made


def test_statistics_of_a_network() -> None:
    model, images = built(small).double(), (batch()[0].double(), batch()[1])
    found = node_statistics(Passes(model, images))
    gradients = mean_gradients(model, images)
    assert list(found) == list(weights(model))
    for path, weight in weights(model).items():
        assert found[path][0] == pytest.approx(float(gradients[path].norm()))
        assert found[path][1] == pytest.approx(float((weight * gradients[path]).abs().mean().detach()))
    # Without its norms the network is a chain with one bias at the end: every layer before it carries the same flow.
    sums = [found[path][2] * weight.numel() for path, weight in weights(model).items()]
    assert sums[0] == pytest.approx(sums[1]) and sums[1] == pytest.approx(sums[2])
    back = from_text(to_text(found))
    assert list(back) == list(found) and back["0"] == pytest.approx(found["0"], rel=1e-4)
    assert math.isnan(from_text(to_text({"a": (math.nan, math.inf, 1.0)}))["a"][1])
    with pytest.raises(ArtifactError, match="cannot be read"):
        from_text("[1")


@pytest.mark.parametrize("kind", ["packed", "slots"])
def test_features(kind: str) -> None:
    subnets = nodes(20)
    features = Features.of(subnets, kind, magnitudes=False)  # type: ignore[arg-type]
    wanted = 3 * (12 if kind == "slots" else max(len(one) for one in subnets))
    assert features.length == wanted
    for one in subnets:
        vector = features.vector(one)
        assert vector.shape == (wanted,) and vector.min() == 0 and vector.max() == 1
        parts = vector.reshape(3, -1)
        assert (parts.max(1) == 1).all()
        if kind == "packed":
            assert not parts[:, len(one) :].any()
        else:
            absent = [at for at in range(12) if f"cells.{at}.conv" not in one]
            assert not parts[:, absent].any()
    bent = {path: (5 * a, 2 * b + 7, c) for path, (a, b, c) in subnets[0].items()}
    assert features.vector(bent) == pytest.approx(features.vector(subnets[0]))
    assert Features.from_json(json.loads(json.dumps(features.to_json()))) == features


def test_slots_are_in_the_network_s_order_and_magnitudes_are_kept() -> None:
    features = Features.of(nodes(30), "slots", magnitudes=True)
    assert features.slots[2] == "cells.2.conv" and features.slots[10] == "cells.10.conv" and features.length == 36 + 4
    sizes = np.array([features.vector(one)[-4:] for one in nodes(30)])
    assert sizes.mean(0) == pytest.approx(np.zeros(4), abs=1e-9) and sizes.std(0) == pytest.approx(np.ones(4))
    with pytest.raises(InputError, match=r"layer at 'cells.77.conv', where no subnet"):
        features.vector({"cells.77.conv": (1.0, 1.0, 1.0)})
    with pytest.raises(InputError, match="has 40 layers and the ranker knows"):
        Features.of(nodes(5), "packed").vector({str(at): (1.0, 1.0, 1.0) for at in range(40)})
    with pytest.raises(InputError, match="NaN or infinite"):
        scaled(np.array([1.0, math.nan]))
    assert not scaled(np.ones(3)).any()


def test_choices_stand_beside_the_statistics() -> None:
    """Two subnets whose layers look the same, and whose choices decide, are told apart by them alone."""
    cells = [{"op": option, "width": width} for option in ("skip", "none") for width in (8, 16)] * 5
    same = [nodes(1)[0]] * len(cells)
    worth = [float(cell["op"] == "skip") + 0.1 * (cell["width"] == 16) for cell in cells]
    features = Features.of(same, "slots", False, cells)  # type: ignore[arg-type]
    assert features.choices == (("op", ('"none"', '"skip"')), ("width", ("16", "8")))
    assert features.vector(same[0], {"op": "skip", "width": 16})[-4:].tolist() == [0, 1, 1, 0]
    assert features.vector(same[0], {"op": "new"})[-4:].tolist() == [0, 0, 0, 0]  # an inactive choice, a strange option
    assert Features.from_json(json.loads(json.dumps(features.to_json()))) == features
    config = RankerConfig(epochs=30, members=1, width=16, depth=1, segments=2, choices=True, learning_rate=1e-2)
    made = fit(same, worth, config=config, cells=cells)  # type: ignore[arg-type]
    predicted, _ = made.predict(same[:4], cells=cells[:4])  # type: ignore[arg-type]
    assert kendalltau(predicted, worth[:4]).statistic == 1
    with pytest.raises(InputError, match="looks at the subnets' choices and none were given"):
        made.predict(same[:4])
    with pytest.raises(InputError, match=r"choices are to be features .* no subnets were given"):
        fit(same, worth, config=config)
    with pytest.raises(InputError, match="3 cells were given for the statistics of 4 subnets"):
        made.predict(same[:4], cells=cells[:3])  # type: ignore[arg-type]


def test_scores_stand_beside_the_statistics_as_ranks(tmp_path: Path) -> None:
    """Subnets whose layers look the same are told apart by a score, and no monotone change of it matters."""
    same, drawn = [nodes(1)[0]] * 20, np.random.default_rng(0).permutation(20).astype(float)
    scores = [{"a": value, "b": 1.0} for value in drawn]
    features = Features.of(same, "slots", False, scores=scores)
    ranked = np.array([features.vector(same[0], scores=one)[-2:] for one in scores])
    assert (ranked[:, 1] == 0).all() and np.array_equal(ranked[:, 0].argsort(), drawn.argsort())
    assert ranked[:, 0].std() == pytest.approx(1, rel=0.01) and ranked[:, 0].mean() == pytest.approx(0)
    bent = [{"a": -math.inf if one["a"] == 0 else math.exp(one["a"]), "b": -7.0} for one in scores]
    other = Features.of(same, "slots", False, scores=bent)
    assert np.array_equal([other.vector(same[0], scores=one)[-2:] for one in bent], ranked)
    assert Features.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert other.vector(same[0], scores={"a": 1e9, "b": -8.0})[-2:] == pytest.approx([math.sqrt(3), -math.sqrt(3)])
    config = RankerConfig(epochs=30, members=1, width=16, depth=1, segments=2, scores=("a",), learning_rate=1e-2)
    made = fit(same[:15], drawn[:15], config=config, scores=scores[:15], known_scores=scores[15:])
    assert kendalltau(made.predict(same[15:], scores=scores[15:])[0], drawn[15:]).statistic > 0.7
    made.save(tmp_path)
    assert Ranker.load(tmp_path).config == config and Ranker.load(tmp_path).features == made.features
    with pytest.raises(
        InputError, match=r"the score 'a' is a feature, and of a subnet it is NaN or not there.*leave such"
    ):
        made.predict(same[:1], scores=[{"a": math.nan}])
    with pytest.raises(InputError, match="the score 'a' is a feature"):
        made.predict(same[:1])
    with pytest.raises(InputError, match="scores are to be features and none were given"):
        fit(same, drawn, config=config)
    with pytest.raises(InputError, match="2 scores were given for the statistics of 20 subnets"):
        fit(same, drawn, config=config, scores=scores[:2])


vectors = st.lists(st.floats(-5, 5), min_size=2, max_size=12).flatmap(
    lambda x: st.tuples(st.just(x), st.lists(st.floats(-5, 5), min_size=len(x), max_size=len(x)))
)


@settings(max_examples=50, deadline=None)
@given(vectors)
def test_diff_kendall_algebra(pair: tuple[list[float], list[float]]) -> None:
    x, y = (torch.tensor(one, dtype=torch.float64) for one in pair)
    value = float(diff_kendall(x, y))
    assert -1 < value < 1 or len(x) < 2
    assert float(diff_kendall(y, x)) == pytest.approx(value, abs=1e-12)
    assert float(diff_kendall(x + 3, y - 2)) == pytest.approx(value, abs=1e-9)
    assert float(diff_kendall(-x, y)) == pytest.approx(-value, abs=1e-12)
    slow, n = 0.0, len(x)
    for i in range(n):
        for j in range(n):
            sigma = lambda t: 1 / (1 + math.exp(-0.5 * t)) - 1 / (1 + math.exp(0.5 * t))  # noqa: E731
            slow += sigma(float(x[i] - x[j])) * sigma(float(y[i] - y[j]))
    released = slow / (n * (n - 1) / 2)  # all ordered pairs over the number of unordered ones
    assert released == pytest.approx(2 * value, abs=1e-9)


def test_diff_kendall_tends_to_tau_and_sorts() -> None:
    x, y = torch.randn(2, 20, generator=rng(), dtype=torch.float64)
    assert float(diff_kendall(x, y, 1e6)) == pytest.approx(kendalltau(x, y).statistic)
    assert float(diff_kendall(x, x, 1e6)) == pytest.approx(1)
    moved = x.clone().requires_grad_(True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(diff_kendall(moved, y), moved)
        moved = (moved + 2 * gradient).detach().requires_grad_(True)
    assert kendalltau(moved.detach(), y).statistic > 0.95 > kendalltau(x, y).statistic
    with pytest.raises(InputError, match=r"1 subnet.s. has no pairs"):
        diff_kendall(x[:1], y[:1])


def test_pairwise_loss_by_hand() -> None:
    x, y = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + 0) / 3
    assert float(pairwise_loss(x, y)) == pytest.approx(wanted)


def test_bayesian_linear() -> None:
    layer, x = BayesianLinear(6, 4, rng(), rho=0.0), torch.randn(1, 6, generator=rng(1))
    many = torch.stack([layer(x)[0] for _ in range(20_000)]).detach()
    sigma = torch.nn.functional.softplus(layer.rho.detach())
    assert torch.allclose(many.mean(0), (layer.mu @ x[0]).detach(), atol=0.06)
    assert torch.allclose(many.var(0), (sigma**2 @ x[0] ** 2), rtol=0.05)
    layer(x).sum().backward()
    assert layer.mu.grad is not None and layer.rho.grad is not None and bool((layer.rho.grad != 0).any())
    layer.noise = False
    assert torch.equal(layer(x), x @ layer.mu.T)
    quiet = BayesianLinear(6, 4, rng(), rho=-40.0)
    assert torch.allclose(quiet(x), x @ quiet.mu.T, atol=1e-6)


@pytest.mark.parametrize(("mixing", "meet"), [("tokens", True), ("channels", False)])
def test_segments_meet_where_tokens_are_mixed(mixing: str, meet: bool) -> None:
    network = MABN(MabnConfig(20, segments=4, width=8, depth=1, mixing=mixing), rng()).eval()  # type: ignore[arg-type]
    block = network.blocks[0]
    x = torch.randn(1, 4, 8, generator=rng(2))
    changed = x.clone()
    changed[0, 1] += torch.randn(8, generator=rng(3))  # a constant would be lost in the LayerNorm
    others = [0, 2, 3]
    difference = (block(changed) - block(x))[0, others].abs().max()
    assert bool(difference > 1e-6) == meet
    order = [2, 0, 3, 1]
    assert torch.allclose(block(x[:, order]), block(x)[:, order], atol=1e-6) != meet


def test_the_last_batch_has_a_pair() -> None:
    assert [len(one) for one in batches(21, 10, rng())] == [10, 11]
    assert sorted(torch.cat(batches(21, 10, rng())).tolist()) == list(range(21))


def synthetic(count: int, seed: int) -> tuple[list[NodeStatistics], np.ndarray, np.ndarray]:
    """Worth = a fixed random weighting of (scaled) snip by place."""
    subnets = nodes(count, seed)
    places = np.random.default_rng(99).normal(size=12)
    truth, plain = [], []
    for one in subnets:
        at = [int(path.split(".")[1]) for path in one]
        values = np.array([row[1] for row in one.values()])
        truth.append(float((scaled(values) * places[at]).sum()))
        plain.append(float(values.sum()))
    return subnets, np.array(truth), np.array(plain)


def test_it_learns_a_weighting_of_nodes() -> None:
    train, truth, _ = synthetic(200, 1)
    test, wanted, plain = synthetic(200, 2)
    ranker = fit(train, truth, config=RankerConfig(epochs=40, members=2, width=24, depth=1, segments=4))
    predicted, uncertain = ranker.predict(test)
    tau = kendalltau(predicted, wanted).statistic
    assert tau > 0.8 > kendalltau(plain, wanted).statistic + 0.4
    assert bool((uncertain >= 0).all()) and uncertain.max() > 0


def test_a_ranker_is_deterministic_and_survives_the_disk(tmp_path: Path) -> None:
    subnets, truth, _ = synthetic(24, 1)
    for draws in (0, 4):
        config = RankerConfig(epochs=3, members=2, width=16, depth=1, segments=2, draws=draws)
        ranker = fit(subnets, truth, "space", config)
        first, again = ranker.predict(subnets), fit(subnets, truth, "space", config).predict(subnets)
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[0], ranker.predict(subnets)[0])
        ranker.save(tmp_path / str(draws))
        loaded = Ranker.load(tmp_path / str(draws))
        assert np.array_equal(loaded.predict(subnets)[0], first[0]) and np.array_equal(
            loaded.predict(subnets)[1], first[1]
        )
        assert loaded.config == config and loaded.history == ranker.history


def test_ranker_refusals(tmp_path: Path) -> None:
    subnets, truth, _ = synthetic(10, 1)
    ranker = fit(subnets, truth, "abc", QUICK)
    with pytest.raises(InputError, match=r"fingerprint abc, and these scores are of xyz.*nasq ranker fit"):
        ranker.predict(subnets, "xyz")
    with pytest.raises(InputError, match="at least two subnets with different, finite targets"):
        fit(subnets, truth * 0, "", QUICK)
    with pytest.raises(InputError, match="the loss is 'tau'"):
        RankerConfig(loss="tau")
    with pytest.raises(InputError, match="batch=1"):
        RankerConfig(batch=1)
    ranker.save(tmp_path)
    (tmp_path / "ranker.safetensors").write_bytes(b"123")
    with pytest.raises(ArtifactError, match=r"holds no ranker that can be read: .* Make it again: nasq ranker fit"):
        Ranker.load(tmp_path)
    (tmp_path / "ranker.json").write_text("{}")
    with pytest.raises(ArtifactError, match="holds no ranker that can be read: 'schema' is missing"):
        Ranker.load(tmp_path)


def test_dagger() -> None:
    one: NodeStatistics = {str(at): (0.0, float(at + 1), 0.0) for at in range(6)}
    assert dagger(one, alpha=math.inf) == 21
    wanted = sum((math.sin(0.1 * at) + 1) / 2 * (at + 1) for at in range(6))
    assert dagger(one) == pytest.approx(wanted) and 0 <= dagger(one) <= 21


def test_files_from_scores_to_a_ranking(tmp_path: Path) -> None:
    job = ScoreJob("digits_mobile", ("params",), tmp_path / "s.csv", count=8, batch=8, nodes=True)
    run_score(job)
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["subnet", "accuracy"], *([row["subnet"], row["params"]] for row in rows)])
    facts = fit_ranker(tmp_path / "s.csv", tmp_path / "t.csv", tmp_path / "r", None, 5, QUICK)
    assert facts["trained_on"] == 5 and facts["tested_on"] == 3 and -1 <= facts["kendall"] <= 1
    assert apply_ranker(tmp_path / "r", tmp_path / "s.csv", tmp_path / "p.csv")["rows"] == 8
    with (tmp_path / "p.csv").open() as file:
        ranked = list(csv.DictReader(file))
    assert [row["subnet_id"] for row in ranked] == [row["subnet_id"] for row in rows]
    assert list(ranked[0])[3:] == ["parzc", "parzc_uncertainty"]
    by_score, wrong = (dataclasses.replace(QUICK, scores=(name,)) for name in ("params", "param"))
    fit_ranker(tmp_path / "s.csv", tmp_path / "t.csv", tmp_path / "by_score", None, 5, by_score)
    assert apply_ranker(tmp_path / "by_score", tmp_path / "s.csv", tmp_path / "b.csv")["rows"] == 8
    with pytest.raises(InputError, match=r"unknown score column 'param'. Did you mean 'params'"):
        fit_ranker(tmp_path / "s.csv", tmp_path / "t.csv", tmp_path / "r", None, 5, wrong)
    with pytest.raises(InputError, match=r"8 of 8 subnets .* and 9 were to be"):
        fit_ranker(tmp_path / "s.csv", tmp_path / "t.csv", tmp_path / "r", None, 9, QUICK)
    settings_file = tmp_path / "s.csv.json"
    settings_file.write_text(settings_file.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    with pytest.raises(InputError, match="Fit one on this space"):
        apply_ranker(tmp_path / "r", tmp_path / "s.csv", tmp_path / "q.csv")


def test_tensors_of_features_are_float32_in_a_network() -> None:
    network = MABN(MabnConfig(10), rng())
    made: Tensor = network(torch.rand(3, 10, generator=rng()))
    assert made.shape == (3,) and made.dtype == torch.float32
