"""One rank of a data-parallel training, told by the variables that torchrun sets: rank_worker.py DIR."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nasq import Choice, Supernet, elastic
from nasq.data import DataSet, Split
from nasq.errors import InputError
from nasq.training import TrainConfig, Trainer
from nasq.training.distributed import World, process_group

SANDWICH = TrainConfig(epochs=2, batch_size=16, lr=0.05, bf16=False, warmup_epochs=0.5)
LEARNING = replace(SANDWICH, epochs=3, sampler="importance", data_sampler="importance", distill=0.0, reweight=True)


class Net(nn.Module):
    """In float64 and without BatchNorm, whose statistics would be those of a rank's part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        width = Choice("width", (3, 6))
        self.stem = elastic.Conv2d(1, width, 3)
        branches = {
            "skip": nn.Identity(),
            "one": elastic.Conv2d(width, width, 1),
            "three": elastic.Conv2d(width, width, 3),
        }
        self.op = elastic.OneOf(Choice("op", ("skip", "one", "three")), branches)
        self.head = elastic.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.op(torch.relu(self.stem(x.double())))).mean((2, 3)))


def build() -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Supernet(Net()).double()


def data() -> DataSet:
    generator = torch.Generator().manual_seed(0)

    def part(count: int, first: int) -> Split:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator) + 45 * labels[:, None, None, None]
        return Split(images.to(torch.uint8), labels, torch.arange(first, first + count))

    return DataSet.from_splits("digits", ["a", "b", "c", "d"], part(64, 0), part(16, 64), part(16, 80))


def run(config: TrainConfig, directory: Path | None = None, until: int | None = None) -> tuple[Trainer, dict[str, Any]]:
    """A training, and what it drew and told."""
    seen: dict[str, Any] = {"paths": [], "indices": [], "events": []}
    trainer = Trainer(build(), data(), config, directory, on_event=seen["events"].append)
    step, indices = trainer.path_sampler.step, trainer.data_sampler.indices

    def stepped() -> Any:
        paths = step()
        seen["paths"] += [path.subnet.id for path in paths]
        return paths

    def drawn(epoch: int) -> Tensor:
        found = indices(epoch)
        seen["indices"].append(found.tolist())
        return found

    trainer.path_sampler.step, trainer.data_sampler.indices = stepped, drawn  # type: ignore[method-assign]
    trainer.run(until)
    return trainer, seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with process_group() as world:
        count, reduce = 0, distributed.all_reduce

        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            nonlocal count
            count += tensor.numel() > 3  # the sums of an epoch's losses have three numbers
            return reduce(tensor, *args, **options)

        distributed.all_reduce = counted
        trainer, seen = run(SANDWICH)
        messages = count
        again, _ = run(SANDWICH)
        learnt, paths = run(LEARNING, out / "from_two", until=1)
        resumed, rest = run(LEARNING, out / "from_one")
        try:
            Trainer(build(), data(), replace(SANDWICH, batch_size=15))
            refused = ""
        except InputError as error:
            refused = str(error)
        states = {"sandwich": trainer, "again": again, "learnt": learnt, "resumed": resumed}
        torch.save({name: one.supernet.state_dict() for name, one in states.items()}, out / f"{world.rank}.pt")
        told = {"messages": messages, "steps": 2 * trainer.steps_per_epoch, "refused": refused}
        facts = {**told, "world": world.size, "seen": seen, "paths": paths, "rest": rest}
        (out / f"{world.rank}.json").write_text(json.dumps(facts))
    assert World.current() == World()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
