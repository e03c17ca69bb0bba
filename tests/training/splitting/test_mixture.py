from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nasq.search_spaces.resnet_pooling import resnet_pooling
from scipy import stats
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.data import AugmentPolicy, DataSet, Split
from nasq.errors import ArtifactError, InputError
from nasq.training import TrainConfig, Trainer, stream
from nasq.training.splitting import Mixture, MixturePaths, validation_batches
from nasq.training.splitting.assignment import Configurations, balance, linear_temperature


class Net(nn.Module):
    """A kernel inside one branch of an operator, and a width: 2 x (2 + 1) = 6 subnets."""

    def __init__(self) -> None:
        super().__init__()
        width = Choice("width", (3, 6))
        self.stem = elastic.Conv2d(1, width, 3, padding="same")
        self.norm = elastic.BatchNorm2d(width)
        conv = elastic.Conv2d(width, width, Choice("kernel", (1, 3)), padding="same")
        self.op = elastic.OneOf(Choice("op", ("conv", "skip")), conv=conv, skip=nn.Identity())
        self.head = elastic.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


def _mixture(sets: int = 2, choices: Any = None) -> Mixture:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixture([Supernet(Net()) for _ in range(sets)], choices)


def _data() -> DataSet:
    generator = torch.Generator().manual_seed(0)

    def part(count: int, first: int) -> Split:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 60, (count, 1, 6, 6), generator=generator) + 45 * labels[:, None, None, None]
        return Split(images.to(torch.uint8), labels, torch.arange(first, first + count))

    return DataSet.from_splits("toy", ["a", "b", "c", "d"], part(64, 0), part(16, 64), part(16, 80))


CONFIG = TrainConfig(epochs=3, batch_size=16, sampler="uniform", distill=0.0, warmup_epochs=0.0, bf16=False)


def _trainer(mixture: Mixture, directory: Path | None = None, **options: Any) -> Trainer:
    data = _data()
    paths = MixturePaths(mixture, stream(0, "paths"), CONFIG.epochs, validation_batches(data, 8), **options)
    return Trainer(mixture, data, CONFIG, directory, path_sampler=paths, augment=AugmentPolicy())


def test_configurations_are_the_members_of_the_published_space() -> None:
    space = Supernet(resnet_pooling()).space
    found = Configurations(space)
    assert len(found) == 36
    # Option 0 is "pool": exactly two of nine places, each pair of places once.
    assert {tuple(np.flatnonzero(row == 0)) for row in found.rows} == set(combinations(range(9), 2))


def test_configurations_follow_the_conditions_of_the_space() -> None:
    space = Supernet(Net()).space
    assert len(Configurations(space)) == space.size == 6
    named = Configurations(space, ["op"])
    rows = space.sample_batch(50, torch.Generator().manual_seed(0))
    assert len(named) == 2
    operators = [space.to_subnet(row)["op"] for row in rows]
    assert [("conv", "skip")[index] for index in named.indices(rows)] == operators


@pytest.mark.parametrize("temperature", [1.0, 20.0, 100.0])
def test_a_balanced_matrix_has_even_columns_and_whole_rows(temperature: float) -> None:
    accuracies = np.random.default_rng(1).uniform(0.4, 0.9, (30, 4))
    weights = np.exp(temperature * accuracies)
    shares = weights / weights.sum(1, keepdims=True)
    for marginal in balance(accuracies, temperature):
        shares = shares / marginal
        shares = shares / shares.sum(1, keepdims=True)
    np.testing.assert_allclose(shares.sum(1), 1)
    mean = shares.mean(0)
    assert abs((mean * np.log(mean * 4)).sum()) <= 1e-4
    np.testing.assert_allclose(mean, 0.25, atol=0.01)


def test_balancing_leaves_equal_accuracies_alone_and_does_not_know_names() -> None:
    assert balance(np.full((7, 3), 0.5), 100.0) == []
    assert balance(np.random.default_rng(0).random((5, 1)), 50.0) == []  # one set: all ones
    accuracies = np.random.default_rng(2).random((9, 3))
    order = [2, 0, 1]
    plain, permuted = balance(accuracies, 10.0), balance(accuracies[:, order], 10.0)
    for one, other in zip(plain, permuted, strict=True):
        np.testing.assert_allclose(one[order], other)
    with pytest.raises(InputError, match="no balance of 2 sets"):
        balance(np.array([[1.0, 0.0]] * 3), 1e4)


def test_the_temperature_grows_linearly() -> None:
    assert [linear_temperature(epoch, 4) for epoch in range(4)] == [1.0, 34.0, 67.0, 100.0]
    assert linear_temperature(0, 1) == 1.0


def test_a_step_changes_the_set_that_was_drawn_alone() -> None:
    mixture = _mixture(3)
    trainer = _trainer(mixture)
    sampler: Any = trainer.path_sampler
    sampler.on_epoch(0)
    for _ in range(4):
        before = [copy.deepcopy(mixture.supernet(index).state_dict()) for index in range(3)]
        (path,) = sampler.step()
        chosen = mixture.drawn
        assert chosen is not None and path.role == f"set{chosen}" and mixture.index(path.subnet) == chosen
        trainer.optimizer.zero_grad()
        with mixture.activate(path.subnet):
            loss = mixture(torch.randn(8, 1, 6, 6)).square().mean()
            loss.backward()
        sampler.observe(path, loss.detach(), mixture)
        trainer.optimizer.step()
        assert mixture.drawn is None
        for index in range(3):
            after = mixture.supernet(index).state_dict()
            assert all(torch.equal(after[k], v) for k, v in before[index].items()) == (index != chosen)


def test_running_accuracies_stay_between_what_was_seen_and_count_visits() -> None:
    mixture = _mixture()
    seen: list[float] = []
    trainer = _trainer(mixture, decay=0.5)
    sampler: Any = trainer.path_sampler
    inner = sampler.observe

    def observe(path: Any, loss: Tensor, supernet: nn.Module) -> None:
        chosen = mixture.drawn
        index = int(mixture.configurations.indices(mixture.space.to_rows([path.subnet]))[0])
        before = sampler.accuracies.copy()
        inner(path, loss, supernet)
        seen.append(2 * sampler.accuracies[index, chosen] - before[index, chosen])  # the accuracy of this batch
        before[index, chosen] = sampler.accuracies[index, chosen]
        np.testing.assert_array_equal(before, sampler.accuracies)

    sampler.observe = observe
    history = trainer.run()
    assert len(seen) == 12 and sampler.visits.sum() == 12
    np.testing.assert_allclose(np.array(seen) * 8, np.round(np.array(seen) * 8), atol=1e-9)  # eighths: 8 images
    assert sampler.accuracies.min() >= min([1.0, *seen]) and sampler.accuracies.max() <= 1
    assert set(history[-1]["losses"]) <= {"set0", "set1"}


def test_draws_follow_the_balanced_probabilities() -> None:
    mixture = _mixture(3, ["op"])
    sampler = MixturePaths(mixture, stream(3, "paths"), 2, validation_batches(_data(), 4))
    sampler.accuracies = np.array([[0.9, 0.8, 0.85], [0.7, 0.9, 0.8]])
    sampler.on_epoch(1)
    wanted = sampler.probabilities()
    assert wanted[0].argmax() != wanted[1].argmax()
    np.testing.assert_array_equal(mixture.assignment, wanted.argmax(1))
    sampler._heat, sampler._marginals = 10.0, balance(sampler.accuracies, 10.0)
    wanted = sampler.probabilities()
    for _ in range(900):
        sampler.step()
    for counts, row in zip(sampler.visits, wanted, strict=True):
        assert stats.chisquare(counts, row * counts.sum()).pvalue > 1e-3
    assert stats.chisquare(sampler.visits.sum(0)).pvalue > 1e-3


def test_configurations_that_conflict_find_different_sets() -> None:
    """Two groups of configurations, each good in the set that it was last trained in: they part."""
    mixture = _mixture(2)
    group = (mixture.configurations.rows[:, 0] == 0).astype(int)
    rng = np.random.default_rng(0)
    owner = [0, 1]  # which group a set was last trained on
    sampler = MixturePaths(mixture, stream(1, "paths"), 60, validation_batches(_data(), 4))
    for epoch in range(60):
        sampler.on_epoch(epoch)
        for _ in range(20):
            index = int(rng.integers(len(group)))
            chosen = int(rng.choice(2, p=sampler.probabilities()[index]))
            right = 0.9 if owner[chosen] == group[index] else 0.6
            owner[chosen] = int(group[index])
            entry = sampler.accuracies[index, chosen]
            sampler.accuracies[index, chosen] = 0.9 * entry + 0.1 * right
    sampler.settle()
    sides = [set(mixture.assignment[group == side]) for side in (0, 1)]
    assert len(sides[0]) == len(sides[1]) == 1 and sides[0] != sides[1]


def test_killed_and_run_again_it_is_the_same_mixture(tmp_path: Path) -> None:
    whole = _mixture()
    wanted = _trainer(whole)
    wanted.run()
    _trainer(_mixture(), tmp_path).run(1)
    again = _mixture()
    trainer = _trainer(again, tmp_path)
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    for one, other in zip((wanted.path_sampler,), (trainer.path_sampler,), strict=True):
        assert isinstance(one, MixturePaths) and isinstance(other, MixturePaths)
        np.testing.assert_array_equal(one.accuracies, other.accuracies)
        np.testing.assert_array_equal(one.visits, other.visits)


def test_it_is_used_like_one_supernet_and_comes_back_from_disk(tmp_path: Path) -> None:
    mixture = _mixture(2, ["op"])
    mixture.assign(np.array([1, 0]))
    x = torch.randn(4, 1, 6, 6)
    for subnet in (mixture.space.smallest(), mixture.space.largest()):
        own = mixture.supernet(1 if subnet["op"] == "conv" else 0)
        bn = mixture.recalibrate(subnet, [x])
        mixture.eval()
        with mixture.activate(subnet, bn), own.activate(subnet, bn), torch.no_grad():
            assert torch.equal(mixture(x), own(x))
    mixture.save(tmp_path)
    loaded = Mixture.load(tmp_path, [Supernet(Net()) for _ in range(2)])
    np.testing.assert_array_equal(loaded.assignment, [1, 0])
    assert loaded.configurations.choices == ("op",)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in mixture.state_dict().items())
    with pytest.raises(ArtifactError, match="does not fit 1 supernets"):
        Mixture.load(tmp_path, [Supernet(Net())])
    (tmp_path / "forest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="does not describe a mixture"):
        Mixture.load(tmp_path, [Supernet(Net()) for _ in range(2)])


def test_bad_numbers_are_named() -> None:
    mixture = _mixture()
    draw = validation_batches(_data(), 4)
    with pytest.raises(InputError, match="decay is 1; allowed: 0 to below 1"):
        MixturePaths(mixture, stream(0, "paths"), 2, draw, decay=1)
    with pytest.raises(InputError, match="temperature in epoch 0 is 0"):
        MixturePaths(mixture, stream(0, "paths"), 2, draw, temperature=lambda epoch, epochs: 0).on_epoch(0)
    with pytest.raises(InputError, match="one number from 0 to 1 for each of 6 configurations"):
        mixture.assign(np.zeros(3))
    space = Supernet(resnet_pooling()).space
    lonely = Configurations(space, ["block1.pool"])  # beside two default pools, a third one is not allowed
    with pytest.raises(InputError, match=r"is of no configuration of block1.pool"):
        lonely.indices(space.sample_batch(64, torch.Generator().manual_seed(0)))
    big = Supernet(
        nn.Sequential(*(elastic.OneOf(Choice(f"c{i}", ("a", "b")), a=nn.ReLU(), b=nn.Identity()) for i in range(17)))
    )
    with pytest.raises(InputError, match="17 choices have 131,072 combinations; allowed are 65,536"):
        Configurations(big.space)
    state = MixturePaths(mixture, stream(0, "paths"), 2, draw).state_dict()
    with pytest.raises(InputError, match="6 configurations in 2 sets; these are 6 in 3"):
        MixturePaths(_mixture(3), stream(0, "paths"), 2, draw).load_state_dict(state)
