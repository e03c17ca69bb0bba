from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from fake_supernet import tiny_data
from nasq.search_spaces.mobilenet_v3 import PHASES, MobileNetV3, mobilenet_v3
from torch import Tensor, nn

from nasq import Choice, SearchSpace, Supernet, elastic
from nasq.errors import InputError
from nasq.training import PathSampler, Phase, ProgressiveShrinking, TrainConfig, Trainer, stream

SPACE = SearchSpace(
    [
        Choice("a.kernel", (3, 5, 7)),
        Choice("a.width", (8, 16, 32)),
        Choice("b.kernel", (3, 5, 7)),
        Choice("b.op", ("conv", "skip"), ordered=False),
        Choice("bits", (2, 4, 8)),
    ]
)
OFA = (Phase("large", {}, 2), Phase("kernel", {"kernel": (3, 5, 7)}, 3), Phase("width", {"width": (16, 32)}, 1))


def sampler(*phases: Phase, **options: object) -> ProgressiveShrinking:
    return ProgressiveShrinking(SPACE, stream(0, "paths"), phases or OFA, **options)  # type: ignore[arg-type]


def seen(shrinking: ProgressiveShrinking, steps: int = 60) -> dict[str, set[object]]:
    found: dict[str, set[object]] = {name: set() for name in SPACE.names}
    for _ in range(steps):
        for path in shrinking.step():
            assert SPACE.contains(path.subnet) and shrinking.contains(path.subnet)
            for name, option in path.subnet.items():
                found[name].add(option)
    return found


def test_each_phase_allows_more() -> None:
    shrinking = sampler(largest=False)
    assert isinstance(shrinking, PathSampler)
    free = {"b.op": {"conv", "skip"}, "bits": {2, 4, 8}}
    assert seen(shrinking) == {"a.kernel": {7}, "b.kernel": {7}, "a.width": {32}, **free}
    shrinking.on_phase("kernel")
    assert seen(shrinking) == {"a.kernel": {3, 5, 7}, "b.kernel": {3, 5, 7}, "a.width": {32}, **free}
    shrinking.on_phase("width")
    assert seen(shrinking) == {"a.kernel": {3, 5, 7}, "b.kernel": {3, 5, 7}, "a.width": {16, 32}, **free}


def test_a_name_stands_for_one_choice_and_its_last_word_for_many() -> None:
    shrinking = sampler(Phase("one", {"a.kernel": (5, 7)}), Phase("all", {"kernel": (3, 5, 7)}), largest=False)
    found = seen(shrinking)
    assert found["a.kernel"] == {5, 7} and found["b.kernel"] == {7} and found["a.width"] == {8, 16, 32}
    shrinking.on_epoch(1)
    assert seen(shrinking)["b.kernel"] == {3, 5, 7}


def test_what_has_no_order_begins_with_its_default() -> None:
    found = seen(sampler(Phase("start"), Phase("operators", {"op": ("conv", "skip")}), largest=False))
    assert found["b.op"] == {"conv"}


def test_subnets_of_a_phase_are_drawn_uniformly() -> None:
    phases = Phase("kernel", {"kernel": (3, 5, 7), "width": (32,), "bits": (8,), "op": ("conv",)})
    shrinking = sampler(phases, paths=10, largest=False)
    counts: dict[str, int] = {}
    for path in (path for _ in range(90) for path in shrinking.step()):
        counts[path.subnet.id] = counts.get(path.subnet.id, 0) + 1
    # Chi-square, 8 degrees of freedom: above 26.1 in 1 of 1,000 fair draws.
    assert len(counts) == 9 and sum((count - 100) ** 2 / 100 for count in counts.values()) < 26.1


def test_epochs_begin_phases_once_and_in_order() -> None:
    begun: list[str] = []
    shrinking = sampler(on_begin=lambda phase: begun.append(phase.name))
    names = []
    for epoch in range(9):
        shrinking.on_epoch(epoch)
        shrinking.step()
        names.append(shrinking.phase.name)
    assert names == ["large"] * 2 + ["kernel"] * 3 + ["width"] * 4
    assert begun == ["large", "kernel", "width"]
    late: list[str] = []
    sampler(on_begin=lambda phase: late.append(phase.name)).on_epoch(4)
    assert late == ["large", "kernel"]


def test_the_largest_subnet_teaches() -> None:
    shrinking = sampler(paths=2)
    shrinking.on_phase("width")
    for _ in range(5):
        paths = shrinking.step()
        assert [path.role for path in paths] == ["largest", "random", "random"]
        assert paths[0].subnet == SPACE.largest()


def test_the_state_goes_on_where_it_was_and_begins_nothing_twice() -> None:
    shrinking = sampler(paths=2)
    shrinking.on_epoch(3)
    shrinking.step()
    state = shrinking.state_dict()
    after = [shrinking.step() for _ in range(4)]
    begun: list[str] = []
    other = ProgressiveShrinking(SPACE, stream(9, "x"), OFA, paths=2, on_begin=lambda phase: begun.append(phase.name))
    other.load_state_dict(state)
    other.on_epoch(4)
    assert begun == [] and other.phase.name == "kernel"
    assert [other.step() for _ in range(4)] == after
    other.on_epoch(5)
    assert begun == ["width"]


def test_phases_that_make_no_sense_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"the phases are named \[\]. Give at least one phase, each with a name of its own"
    ):
        ProgressiveShrinking(SPACE, stream(0, "paths"), [])
    with pytest.raises(InputError, match=r"the phases are named \['a', 'a'\]"):
        sampler(Phase("a"), Phase("a"))
    with pytest.raises(InputError, match=r"phase 'a' lasts 0 epochs. Give at least 1"):
        sampler(Phase("a", {}, 0))
    with pytest.raises(InputError, match=r"dimension of the phase 'a'.*kernels.*kernel"):
        sampler(Phase("a", {"kernels": (3,)}))
    with pytest.raises(InputError, match=r"'a.kernel' has no option 4"):
        sampler(Phase("a", {"kernel": (4, 7)}))
    with pytest.raises(InputError, match=r"phase 'a' allows \[3, 5\] for 'a.kernel' and forbids \[7\], allowed before"):
        sampler(Phase("a", {"kernel": (3, 5)}))
    with pytest.raises(InputError, match=r"phase 'b' allows \[3, 7\] for 'a.kernel' and forbids \[5\]"):
        sampler(Phase("a", {"kernel": (5, 7)}), Phase("b", {"kernel": (3, 7)}))
    with pytest.raises(InputError, match=r"phase.*wide.*width"):
        sampler().on_phase("wide")
    with pytest.raises(InputError, match=r"the phases large, kernel, width, and these are other"):
        sampler(Phase("other")).load_state_dict(sampler().state_dict())


def test_the_published_phases_of_once_for_all() -> None:
    supernet = Supernet(mobilenet_v3())
    shrinking = ProgressiveShrinking(supernet.space, stream(0, "paths"), [Phase(*phase) for phase in PHASES])
    # Kernels at full depth; then depths of at least 3, then all; then expansions of at least 4, then all.
    per_stage = [3**4, sum(3**d for d in (3, 4)), sum(3**d for d in (2, 3, 4)), sum(6**d for d in (2, 3, 4)),
                 sum(9**d for d in (2, 3, 4))]  # fmt: skip
    assert [space.size for space in shrinking.spaces] == [25 * size**5 for size in per_stage]
    assert shrinking.spaces[-1].size == supernet.space.size


class Tiny(nn.Module):
    """Stem, one inner width that can be sorted, head; for images ``[N, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        width = Choice("width", (4, 8))
        self.stem = elastic.Conv2d(1, width, Choice("kernel", (1, 3)))
        self.norm = elastic.BatchNorm2d(width)
        self.project = elastic.Conv2d(width, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.project(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def training(directory: FilePath | None, begun: list[str], seed: int) -> tuple[Supernet, Trainer]:
    torch.manual_seed(seed)
    net = Tiny()
    supernet = Supernet(net)

    def begin(phase: Phase) -> None:
        begun.append(phase.name)
        if phase.name == "width":
            elastic.sort_channels([net.stem, net.norm], [net.project], optimizer=trainer.optimizer)

    phases = [Phase("large"), Phase("kernel", {"kernel": (1, 3)}), Phase("width", {"width": (4, 8)}, 2)]
    shrinking = ProgressiveShrinking(supernet.space, stream(0, "paths"), phases, on_begin=begin)
    config = TrainConfig(epochs=4, batch_size=32, lr=0.05, bf16=False)
    trainer = Trainer(supernet, tiny_data(), config, directory, path_sampler=shrinking)
    return supernet, trainer


def test_a_training_with_sorting_is_resumed_to_the_same_bits(tmp_path: FilePath) -> None:
    begun: list[str] = []
    straight, trainer = training(None, begun, 1)
    trainer.run()
    assert begun == ["large", "kernel", "width"]
    parts: list[list[str]] = [[], [], []]
    for seed, until in enumerate((1, 3, 4)):
        resumed, trainer = training(tmp_path, parts[seed], seed + 1)
        trainer.run(until)
    assert parts == [["large"], ["kernel", "width"], []]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_mobilenet_is_sorted_where_the_first_phase_cuts_its_channels() -> None:
    net = mobilenet_v3(num_classes=4, width=0.25, kernels=(3, 5), expansions=(3, 4, 6), depths=(1, 2), stages=2)
    assert isinstance(net, MobileNetV3)
    order: list[bool] = []

    def begin(phase: Phase) -> None:
        if phase.name.startswith("expand"):
            net.sort_channels(fixed=() if phase.name == "expand 1" else (4,))
        weight = net.stages[0].blocks[0].project[0].weight.detach().abs().sum((0, 2, 3))
        order.append(bool(weight.diff().max() <= 0))

    phases = [
        Phase("depth", {"depth": (1, 2)}),
        Phase("expand 1", {"expand": (4, 6)}),
        Phase("expand 2", {"expand": (3, 4, 6)}),
    ]
    shrinking = ProgressiveShrinking(Supernet(net).space, stream(0, "paths"), phases, on_begin=begin)
    for epoch in range(3):
        shrinking.on_epoch(epoch)
        assert len(shrinking.step()) == 2
    assert order == [False, True, True]
