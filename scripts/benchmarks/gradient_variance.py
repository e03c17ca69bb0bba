"""How noisy the training gradient is along a training, with uniform sampling and with PA&DA, on the space of digits_ranking.

After every few epochs the weights are frozen and the variance of the gradient over its squared mean is measured:

* in the supernet that trains with uniform sampling, for uniform draws;
* in the one that trains with PA&DA, for uniform draws and for its own draws, reweighted so that the mean stays the same.
  Both at the same weights: the difference is what the sampling does, and not where it has led. Beside it the bias of the
  unweighted form, which is what PA&DA trains with as published.

Usage: ``python -m scripts.benchmarks.gradient_variance [--epochs 200] [--every 40] [--most 0.5] [--whole] [--seed 0]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nasq.data.importance import ImportanceSampler, draw
from nasq.space import Option
from nasq.training import ImportancePaths, TrainConfig, Trainer, stream
from nasq.training.variance import GradientVariance, gradient_variance
from scripts.reproduce.digits_ranking import BATCH, DECAY, LR, MOMENTUM, build, images

Batch = tuple[Tensor, Tensor, Tensor | None]


def _trainer(options: argparse.Namespace, **settings: Any) -> Trainer:
    config = TrainConfig.from_dict({
        "epochs": options.epochs, "batch_size": BATCH, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "distill": 0.0,
        "warmup_epochs": 0.0, "bf16": False, "channels_last": False, "seed": options.seed, "sampler": "uniform", **settings,
    })  # fmt: skip
    supernet, data = build(options.seed), images()
    if config.sampler == "uniform":
        return Trainer(supernet, data, config)

    def share(epoch: int, epochs: int) -> float:
        return float(options.most * epoch / epochs)

    paths = ImportancePaths(
        supernet, stream(options.seed, "paths"), options.epochs, shared=not options.whole, importance=share,
        floor=options.floor, whole=options.whole, decay=0.95 if options.whole else None,
    )  # fmt: skip
    samples = ImportanceSampler(
        len(data.train), stream(options.seed, "data"), options.epochs, importance=share, keep=options.whole
    )
    return Trainer(supernet, data, config, path_sampler=paths, data_sampler=samples)


def _batches(trainer: Trainer, generator: torch.Generator, probabilities: Tensor | None) -> Callable[[], Batch]:
    count = len(trainer.split)

    def drawn() -> Batch:
        shares = torch.full((count,), 1 / count, dtype=torch.float64) if probabilities is None else probabilities
        at = draw(shares, BATCH, generator)
        weights = None if probabilities is None else (1 / (count * shares[at])).float()
        return trainer.data.normalise(trainer.split.images[at]), trainer.split.labels[at], weights

    return drawn


def measured(trainer: Trainer, own: bool, options: argparse.Namespace) -> GradientVariance:
    """The variance at the present weights, for uniform draws or for the trainer's own ones."""
    generator = stream(options.seed, "measure")
    sampler, space = trainer.path_sampler, trainer.supernet.space
    known: Any = getattr(trainer.data_sampler, "probabilities", None)

    def path() -> tuple[Mapping[str, Option], float]:
        if not own:
            return space.sample(generator), 1.0
        assert isinstance(sampler, ImportancePaths)
        subnet = sampler.step()[0].subnet
        return subnet, sampler.weight(subnet)

    before = sampler.state_dict()
    found = gradient_variance(
        trainer.supernet,
        path,
        _batches(trainer, generator, known if own else None),
        path_count=options.paths,
        batch_count=4,
    )
    sampler.load_state_dict(before)
    return found


def _cells(one: GradientVariance) -> str:
    return f"{one.path:.2f} | {one.data:.2f} | {one.total:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--paths", type=int, default=48)
    parser.add_argument("--most", type=float, default=1.0, help="share of importance that the schedule ends with")
    parser.add_argument(
        "--floor", type=float, default=0.0, help="least probability of an option, as a share of uniform"
    )
    parser.add_argument(
        "--whole", action="store_true", help="importance_whole with a moving average per layer, and importance_keep"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = _trainer(options)
    learning = _trainer(options, sampler="importance", data_sampler="importance")
    write: Callable[[str], int] = sys.stdout.write
    write("| epoch | uniform training: path | data | total | PA&DA training, uniform draws: path | data | total | "
          "own draws, reweighted: path | data | total | bias, unweighted |\n|" + "---|" * 11 + "\n")  # fmt: skip
    for epoch in range(options.every, options.epochs + 1, options.every):
        plain.run(epoch)
        learning.run(epoch)
        one, two, three = (
            measured(plain, False, options),
            measured(learning, False, options),
            measured(learning, True, options),
        )
        write(f"| {epoch} | {_cells(one)} | {_cells(two)} | {_cells(three)} | {three.bias:.2f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
