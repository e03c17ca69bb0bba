from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from fake_supernet import FakeSpace, FakeSupernet, tiny_data

from nasq import Supernet
from nasq.data import AugmentPolicy, UniformSampler
from nasq.errors import ArtifactError, InputError, TrainingError
from nasq.quant import recompute
from nasq.training import Path, Sandwich, TrainConfig, Trainer, Uniform, checkpoint, cross_entropy, distillation, stream
from nasq.training.distribution import WeightDistribution

CONFIG = TrainConfig(epochs=4, batch_size=32, lr=0.05, bf16=False)
PLAIN = replace(CONFIG, momentum=0.0, weight_decay=0.0, warmup_epochs=0, scheduler="constant", clip_norm=None)
STILL = AugmentPolicy()


def _same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k not in {"seconds", "images_per_second"}} for event in history]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, optimizer="adam", lr=0.01, checkpoint_every=2),
        replace(CONFIG, optimizer="adamw", lr=0.01, sampler="uniform", distill=0.0, paths=2),
        replace(CONFIG, bf16=True, clip_norm=None, scheduler="constant", channels_last=True),
    ],
    ids=["sgd-sandwich", "adam", "adamw-uniform", "bf16"],
)
def test_resume_gives_the_same_bits(tmp_path: FilePath, config: TrainConfig) -> None:
    data = tiny_data()
    straight = FakeSupernet(seed=1, dropout=0.3)
    history = Trainer(straight, data, config).run()

    for until in (1, 3):
        assert len(Trainer(FakeSupernet(seed=until, dropout=0.3), data, config, tmp_path).run(until)) == until
        torch.rand(7)  # what the global stream does in between must not matter
    resumed = FakeSupernet(seed=123, dropout=0.3)
    trainer = Trainer(resumed, data, config, tmp_path)
    again = trainer.run()

    assert not _same(straight, FakeSupernet(seed=1, dropout=0.3))
    assert _same(straight, resumed)
    assert _timeless(again) == _timeless(history)
    finished = FakeSupernet(seed=9, dropout=0.3)
    assert len(Trainer(finished, data, config, tmp_path).run()) == 4
    assert _same(straight, finished)  # nothing is left to train: the weights are loaded


def test_running_in_pieces_without_a_directory_is_the_same() -> None:
    data, straight, pieces = tiny_data(), FakeSupernet(), FakeSupernet()
    Trainer(straight, data, CONFIG).run()
    trainer = Trainer(pieces, data, CONFIG)
    for until in (1, 3, 9):
        trainer.run(until)
    assert trainer.epoch == 4
    assert _same(straight, pieces)


def test_the_seed_decides_everything_and_global_state_is_left_alone() -> None:
    data, nets = tiny_data(), [FakeSupernet(dropout=0.3) for _ in range(3)]
    before = torch.get_rng_state()
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        net.eval()
        Trainer(net, data, replace(CONFIG, epochs=1, seed=seed, threads=2)).run()
        assert not net.training
        assert net.active == FakeSpace().largest()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1
    assert _same(nets[0], nets[1])
    assert not _same(nets[0], nets[2])


def test_parameters_that_are_never_used_stay_and_keep_no_state(tmp_path: FilePath) -> None:
    net = FakeSupernet()
    trainer = Trainer(net, tiny_data(), replace(CONFIG, epochs=1, weight_decay=0.1), tmp_path)
    trainer.run()
    assert net.never.tolist() == [1, 1]
    assert net.never not in trainer.optimizer.state
    other = Trainer(FakeSupernet(), tiny_data(), replace(CONFIG, epochs=1, weight_decay=0.1), tmp_path)
    other.run()
    assert other.supernet.never not in other.optimizer.state
    assert other.supernet.stem in other.optimizer.state


def test_gradients_of_the_paths_are_summed() -> None:
    data = tiny_data(n=16)
    config = replace(PLAIN, epochs=1, batch_size=16, distill=0.5, label_smoothing=0.1, channels_last=False)
    net = FakeSupernet(dropout=0.0)
    start = copy.deepcopy(net)
    Trainer(net, data, config, augment=STILL).run()

    paths = Sandwich(FakeSpace(), stream(0, "paths"), 1).step()
    order = UniformSampler(16, stream(0, "data")).indices(0)
    images, labels = data.normalise(data.train.images[order]), data.train.labels[order]
    start.train()
    teacher: torch.Tensor | None = None
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in start.named_parameters()}
    for path in paths:
        start.zero_grad()
        with start.activate(path.subnet):
            logits = start(images)
        loss = cross_entropy(logits, labels, 0.1)
        if teacher is None:
            teacher = logits.detach()
        else:
            loss = 0.5 * distillation(logits, teacher) + 0.5 * loss
        loss.backward()
        for name, p in start.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad.double()
    for (name, moved), before in zip(net.named_parameters(), start.parameters(), strict=True):
        wanted = before.double() - 0.05 * expected[name]
        torch.testing.assert_close(moved.double(), wanted, rtol=0, atol=1e-7, msg=name)


def test_clipping_bounds_the_whole_step() -> None:
    def moved(clip: float | None) -> float:
        net = FakeSupernet(dropout=0.0)
        before = [p.detach().clone() for p in net.parameters()]
        config = replace(PLAIN, epochs=1, batch_size=96, clip_norm=clip)
        history = Trainer(net, tiny_data(), config, augment=STILL).run()
        norms.append(history[0]["gradient_norm"])
        return torch.stack([(a - b).norm() for a, b in zip(net.parameters(), before, strict=True)]).norm().item() / 0.05

    norms: list[float] = []
    free = moved(None)
    assert free == pytest.approx(norms[0], rel=1e-3)
    assert moved(free / 4) == pytest.approx(free / 4, rel=1e-3)
    assert moved(free * 4) == pytest.approx(free, rel=1e-3)
    assert norms == pytest.approx([free] * 3, rel=1e-3)  # reported before clipping


def test_events_and_history() -> None:
    events, steps = [], []
    trainer = Trainer(
        FakeSupernet(), tiny_data(), CONFIG, on_event=events.append, on_step=lambda i, n: steps.append((i, n))
    )
    history = trainer.run()
    assert [event["event"] for event in events] == ["start"] + ["epoch"] * 4
    assert events[0]["steps_per_epoch"] == 3
    assert events[0]["parameters"] == sum(p.numel() for p in FakeSupernet().parameters())
    assert events[1:] == history
    assert [event["epoch"] for event in history] == [1, 2, 3, 4]
    assert steps == [(1, 3), (2, 3), (3, 3)] * 4
    for event in history:
        assert set(event["losses"]) == set(event["accuracy"]) == {"largest", "random", "smallest"}
        assert event["loss"] == pytest.approx(sum(event["losses"].values()) / 3)
        assert event["images_per_second"] > 0
    assert history[0]["lr"] == pytest.approx(CONFIG.lr)  # the warm-up of one epoch ends at the top


@pytest.mark.parametrize("augment", [None, STILL])
def test_it_learns(augment: AugmentPolicy | None) -> None:
    config = replace(CONFIG, epochs=40, batch_size=32, lr=0.1)
    history = Trainer(FakeSupernet(dropout=0.0), tiny_data(n=320, name="other"), config, augment=augment).run()
    assert history[0]["accuracy"]["largest"] < 0.3
    assert history[-1]["accuracy"]["largest"] > 0.5
    assert history[-1]["loss"] < history[0]["loss"]


def test_forward_passes_forget_quantized_activations() -> None:
    class Watched(FakeSupernet):
        def forward(self, x: torch.Tensor, mode: str | None = None) -> torch.Tensor:
            seen.append(recompute.active())
            return super().forward(x, mode)

    seen: list[bool] = []
    Trainer(Watched(), tiny_data(), replace(CONFIG, epochs=1)).run()
    assert seen and all(seen) and not recompute.active()


def test_mode_is_passed_only_where_it_is_set() -> None:
    for mode in (None, "float"):
        net = FakeSupernet()
        Trainer(net, tiny_data(), replace(CONFIG, epochs=1), mode=mode).run()
        assert set(net.modes) == {mode}


def test_a_split_smaller_than_a_batch_is_one_batch_and_the_rest_of_an_epoch_is_left_out() -> None:
    assert Trainer(FakeSupernet(), tiny_data(n=20), CONFIG).steps_per_epoch == 1
    assert Trainer(FakeSupernet(), tiny_data(n=20), CONFIG).batch_size == 20
    assert Trainer(FakeSupernet(), tiny_data(n=95), CONFIG).steps_per_epoch == 2


def test_channels_last_and_bf16_compute_nearly_the_same() -> None:
    losses = []
    for changes in ({}, {"channels_last": True}, {"bf16": True}):
        config = replace(PLAIN, epochs=1, **{"channels_last": False, **changes})
        losses.append(Trainer(FakeSupernet(dropout=0.0), tiny_data(), config, augment=STILL).run()[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=2e-2)
    assert losses[2] != losses[0]


class Importance:
    """Draws with replacement, in proportion to a running statistic; learns from what it is shown."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.statistic = torch.ones(n)
        self.seen: list[torch.Tensor] = []

    def indices(self, epoch: int) -> torch.Tensor:
        return torch.multinomial(self.statistic, len(self.statistic), replacement=True, generator=self.generator)

    def weights(self, indices: torch.Tensor) -> torch.Tensor:
        return self.statistic.mean() / self.statistic[indices]

    def observe(self, indices: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        assert not logits.requires_grad
        self.seen.append(indices)
        one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
        self.statistic[indices] = (self.statistic[indices] + (logits.softmax(1) - one_hot).norm(dim=1)) / 2

    def state_dict(self) -> dict[str, Any]:
        return {"statistic": self.statistic, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.statistic = state["statistic"]
        self.generator.set_state(state["generator"])


class GradientWatcher(Uniform):
    """Keeps a running gradient norm of the operator's weights, as importance sampling of paths does."""

    def __init__(self, space: FakeSpace, generator: torch.Generator) -> None:
        super().__init__(space, generator, 1)
        self.norm: dict[str, float] = {}
        self.epochs: list[int] = []

    def observe(self, path: Path, loss: torch.Tensor, supernet: torch.nn.Module) -> None:
        assert loss.dim() == 0
        assert not loss.requires_grad
        gradient = supernet.mix.grad
        assert (gradient is not None) == (path.subnet.op == "conv")
        if gradient is not None:
            self.norm[path.subnet.id] = float(gradient.norm())

    def on_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norm": self.norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.norm = dict(state["norm"])


def test_importance_samplers_fit_the_interfaces_and_resume(tmp_path: FilePath) -> None:
    config = replace(CONFIG, sampler="uniform", distill=0.0)

    def make(directory: FilePath | None = None) -> Trainer:
        return Trainer(
            FakeSupernet(),
            tiny_data(),
            config,
            directory,
            data_sampler=Importance(96, stream(0, "data")),
            path_sampler=GradientWatcher(FakeSpace(), stream(0, "paths")),
        )

    straight = make()
    straight.run()
    assert len(straight.data_sampler.seen) == 12
    assert straight.path_sampler.epochs == [0, 1, 2, 3]
    make(tmp_path).run(until=1)
    resumed = make(tmp_path)
    resumed.run()
    assert resumed.path_sampler.epochs == [1, 2, 3]
    assert _same(straight.supernet, resumed.supernet)
    assert torch.equal(straight.data_sampler.statistic, resumed.data_sampler.statistic)
    assert straight.path_sampler.norm == resumed.path_sampler.norm


def test_samplers_that_give_nothing_are_named() -> None:
    few = UniformSampler(10, stream(0, "data"))
    with pytest.raises(InputError, match=r"gave 10 samples for epoch 0, less than a batch of 32; .* has, 96"):
        Trainer(FakeSupernet(), tiny_data(), CONFIG, data_sampler=few).run()
    none = Uniform(FakeSpace(), stream(0, "paths"))
    none.paths = 0
    with pytest.raises(InputError, match="path sampler gave no subnet"):
        Trainer(FakeSupernet(), tiny_data(), CONFIG, path_sampler=none).run()


class Exploding(FakeSupernet):
    """The smallest subnet's output becomes NaN after some forward passes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        logits = super().forward(x, mode)
        broken = len(self.modes) > self.after and self.active == self.space.smallest()
        return logits * float("nan") if broken else logits


def test_a_nan_loss_names_the_subnet_and_keeps_the_checkpoint(tmp_path: FilePath) -> None:
    data = tiny_data()
    good = FakeSupernet()
    Trainer(good, data, CONFIG, tmp_path / "good").run(until=2)
    net = Exploding(after=2 * 3 * 3)  # two epochs of three steps of three paths
    trainer = Trainer(net, data, CONFIG, tmp_path / "run")
    text = r"loss of subnet skip2 \(smallest\) is nan in epoch 3, step 1 of 3; the weights were not moved.*" + (
        r"run is kept\. Train anew with a lower lr \(now 0\.05\)"
    )
    with pytest.raises(TrainingError, match=text):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), net.parameters(), strict=True))
    after = FakeSupernet(seed=3)
    assert Trainer(after, data, CONFIG, tmp_path / "run").run(until=0)[-1]["epoch"] == 2
    assert _same(good, after)
    net.after = 10**9  # the same trainer goes on from its checkpoint, not from the broken epoch
    trainer.run()
    straight = FakeSupernet()
    Trainer(straight, data, CONFIG).run()
    assert _same(straight, net)


def test_a_nan_gradient_with_a_finite_loss_is_caught_before_the_weights_move() -> None:
    net = FakeSupernet()
    before = copy.deepcopy(net)

    def loss(logits: torch.Tensor, *rest: object) -> torch.Tensor:
        return (logits * 0).sqrt().sum()

    with pytest.raises(TrainingError, match=r"gradient is not finite after the subnets conv8 \(largest\), .*smallest"):
        Trainer(net, tiny_data(), CONFIG, loss=loss).run()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), net.parameters(), strict=True))


def test_another_data_set_is_refused_with_both_fingerprints(tmp_path: FilePath) -> None:
    data, other = tiny_data(), tiny_data(seed=1)
    Trainer(FakeSupernet(), data, CONFIG, tmp_path).run(until=1)
    with pytest.raises(InputError, match=rf"data set changed.*{data.fingerprint}.*{other.fingerprint}"):
        Trainer(FakeSupernet(), other, CONFIG, tmp_path).run()


def test_other_settings_are_refused_by_name(tmp_path: FilePath) -> None:
    Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path).run(until=1)
    changed = replace(CONFIG, lr=0.1, epochs=5)
    with pytest.raises(InputError, match=r"other settings: epochs was 4, is 5; lr was 0\.05, is 0\.1\. Set them back"):
        Trainer(FakeSupernet(), tiny_data(), changed, tmp_path).run()
    with pytest.raises(InputError, match=r"augment\.rotate was 10\.0, is 0\.0; .*mode was None, is 'float'"):
        Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path, "float", augment=STILL).run()
    with pytest.raises(InputError, match="path_sampler was 'Sandwich', is 'Uniform'"):
        sampler = Uniform(FakeSpace(), stream(0, "paths"))
        Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path, path_sampler=sampler).run()
    assert len(Trainer(FakeSupernet(), tiny_data(), replace(CONFIG, checkpoint_every=3), tmp_path).run(until=2)) == 2


def test_another_teacher_or_penalty_is_refused(tmp_path: FilePath) -> None:
    def teacher(seed: int) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))

    def shrink() -> torch.Tensor:
        return 0 * net.stem.square().sum()

    net = FakeSupernet()
    Trainer(net, tiny_data(), CONFIG, tmp_path, teacher=teacher(0), penalty=shrink).run(until=1)
    same = teacher(0)
    same[2].running_mean += 1  # statistics may be measured anew; the weights decide
    assert len(Trainer(net, tiny_data(), CONFIG, tmp_path, teacher=same, penalty=shrink).run(until=2)) == 2
    with pytest.raises(InputError, match=r"teacher was 'Sequential \w{16}', is 'Sequential \w{16}'\. Set them back"):
        Trainer(net, tiny_data(), CONFIG, tmp_path, teacher=teacher(1), penalty=shrink).run()
    with pytest.raises(InputError, match=r"penalty was 'shrink', is None; teacher was 'Sequential \w{16}', is None"):
        Trainer(net, tiny_data(), CONFIG, tmp_path).run()


def test_a_penalty_of_the_settings_is_told_from_another_one(tmp_path: FilePath) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    config = replace(CONFIG, sampler="uniform", distill=0.0, kurtosis=0.015)
    Trainer(Supernet(net), tiny_data(), config, tmp_path).run(until=1)
    given = WeightDistribution(net, 0.0, 0.015)
    assert len(Trainer(Supernet(net), tiny_data(), config, tmp_path, penalty=given).run(until=2)) == 2
    with pytest.raises(InputError, match=r"penalty was None, is 'WeightDistribution\(skewness=1, kurtosis=0\.015\)'"):
        Trainer(Supernet(net), tiny_data(), config, tmp_path, penalty=WeightDistribution(net)).run()


def test_a_setting_that_is_new_had_its_default(tmp_path: FilePath) -> None:
    Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path).run(until=1)
    tensors, meta = checkpoint.load(tmp_path / "checkpoint")
    for name in ("importance_whole", "lr", "teacher"):
        del meta["setup"][name]
    checkpoint.save(tmp_path / "checkpoint", tensors, meta)
    assert len(Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path).run(until=2)) == 2  # CONFIG.lr is the default
    with pytest.raises(InputError, match="importance_whole was False, is True"):
        Trainer(FakeSupernet(), tiny_data(), replace(CONFIG, importance_whole=True), tmp_path).run()


def test_another_space_or_network_is_refused(tmp_path: FilePath) -> None:
    Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path).run(until=1)
    net = FakeSupernet()
    net.space.widths = (2, 6, 8)
    with pytest.raises(InputError, match=r"settings: space was '\w{16}', is '\w{16}'"):
        Trainer(net, tiny_data(), CONFIG, tmp_path).run()
    wider = FakeSupernet()
    wider.head = torch.nn.Linear(8, 11)
    with pytest.raises(InputError, match=r"another network: 2 of its tensors.*'head\.weight'"):
        Trainer(wider, tiny_data(), CONFIG, tmp_path).run()
    more = FakeSupernet()
    more.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match=r"another network: 1 of its tensors.*'extra'"):
        Trainer(more, tiny_data(), CONFIG, tmp_path).run()


def test_a_corrupt_checkpoint_stops_the_resume(tmp_path: FilePath) -> None:
    Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path).run(until=2)
    newest = tmp_path / "checkpoint.1.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"truncated.*cp .*checkpoint\.0\.json"):
        Trainer(FakeSupernet(), tiny_data(), CONFIG, tmp_path).run()
    (tmp_path / "checkpoint.json").write_bytes((tmp_path / "checkpoint.0.json").read_bytes())
    resumed, straight = FakeSupernet(), FakeSupernet()
    Trainer(resumed, tiny_data(), CONFIG, tmp_path).run()
    Trainer(straight, tiny_data(), CONFIG).run()
    assert _same(resumed, straight)


def test_your_own_loop_needs_no_trainer() -> None:
    net, data = FakeSupernet(), tiny_data()
    sampler = Sandwich(net.space, stream(0, "paths"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net.stem.detach().clone()
    for images, labels in data.train.batches(32):
        optimizer.zero_grad()
        for path in sampler.step():
            with net.activate(path.subnet):
                torch.nn.functional.cross_entropy(net(data.normalise(images)), labels).backward()
        optimizer.step()
    assert not torch.equal(net.stem, before)
