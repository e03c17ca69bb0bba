"""Which part of PA&DA raises the variance of the gradient, computed exactly on the space of digits_ranking.

With 256 paths and 100 training images nothing has to be drawn. At frozen weights, for a distribution ``p`` over paths,
the reweighted gradient of a path on all images has the variance ``sum_a n_a^2 / (N^2 p_a) - |mean|^2``, where ``n_a``
is the norm of the path's gradient; the same holds for images, with the gradients of single images (BatchNorm statistics
of all images fixed, which makes them independent) and the mean over some paths. A line of a table is the variance over
that of uniform draws: below 1 is a gain. The best that is possible, ``p`` in proportion to ``n``, stands beside what is
estimated:

* the statistics that the training has when an epoch begins (*stale*), and the same statistics measured at these very weights
  over all paths or images (*fresh*);
* mixed with the uniform distribution as published (``1 - epoch / epochs`` of it), half, or not at all;
* paths: with the norm of the whole gradient in place of that of the weights which an option owns, and with a floor.

*As drawn* is what the next epoch of the training will use. ``--training whole`` trains with ``importance_whole``, a moving
average and ``importance_keep``; ``uniform`` draws uniformly, and its statistics are those of uniform draws.

Usage: ``python -m scripts.benchmarks.importance_exact [--epochs 120] [--every 30] [--seed 0] [--training whole]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nasq import Subnet
from nasq.data.importance import ImportanceSampler, linear_smoothing, logit_gradient_norm, smoothed
from nasq.training import ImportancePaths, TrainConfig, Trainer, stream
from nasq.training.paths import RANDOM, Path
from scripts.reproduce.digits_ranking import BATCH, DECAY, LR, MOMENTUM, OPERATORS, build, images, subnets

SOME = 12
"""Paths over which the variance that comes from images is averaged."""


class Watched(ImportanceSampler):
    """An importance sampler beside which another one sees the same and forgets nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept = ImportanceSampler(*args, **options)

    def observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        super().observe(indices, logits, labels)
        self.kept.observe(indices, logits, labels)


class Study:
    """One training and what is known of its gradients.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        config = TrainConfig.from_dict({
            "epochs": options.epochs, "batch_size": BATCH, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY,
            "distill": 0.0, "warmup_epochs": 0.0, "bf16": False, "channels_last": False, "seed": options.seed,
            "sampler": "importance", "data_sampler": "importance",
        })  # fmt: skip
        self.supernet, self.data = build(options.seed), images()
        share: Callable[[int, int], float] = linear_smoothing
        if options.training == "uniform":
            share = lambda epoch, epochs: 0.0  # noqa: E731
        whole = options.training == "whole"
        self.paths = ImportancePaths(
            self.supernet, stream(options.seed, "paths"), options.epochs, shared=not whole, importance=share,
            whole=whole, decay=0.95 if whole else None,
        )  # fmt: skip
        self.samples = Watched(
            len(self.data.train), stream(options.seed, "data"), options.epochs, importance=share, keep=whole
        )
        self.trainer = Trainer(self.supernet, self.data, config, path_sampler=self.paths, data_sampler=self.samples)
        self.x, self.y = self.data.normalise(self.data.train.images), self.data.train.labels
        self.subnets = subnets(self.supernet)
        self.rows = torch.tensor([[OPERATORS.index(str(option)) for option in one.values()] for one in self.subnets])

    # -- paths -------------------------------------------------------------------------------------------------------

    def path_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Squared gradient norms of all paths ``[256]``, that of their mean, and mean owned norms by operator ``[4]``."""
        watcher = ImportancePaths(self.supernet, torch.Generator(), 1, shared=True, decay=0.0)
        squares, mean = [], torch.zeros(())
        owned, seen = torch.zeros(len(OPERATORS)), torch.zeros(len(OPERATORS))
        self.supernet.train()
        for subnet in self.subnets:
            gradient = self._gradient(subnet, self.x, self.y, None)
            squares.append(gradient @ gradient)
            mean = mean + gradient / len(self.subnets)
            watcher.norms.zero_()
            watcher.observe(Path(subnet, RANDOM), torch.zeros(()), self.supernet)
            owned += watcher.norms
            seen += watcher.norms > 0
        return torch.stack(squares), mean @ mean, owned / seen.clamp_min(1)

    def _gradient(self, subnet: Subnet, x: Tensor, y: Tensor, bn: Any) -> Tensor:
        self.supernet.zero_grad(set_to_none=True)
        with self.supernet.activate(subnet, bn):
            functional.cross_entropy(self.supernet(x), y).backward()  # type: ignore[no-untyped-call]
        parts = [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.supernet.parameters()
        ]
        return torch.cat(parts).double()

    def product(self, layers: Sequence[Tensor] | Tensor) -> Tensor:
        """Probability of each path ``[256]`` from one distribution for all layers, or one per layer."""
        each = [layers] * self.rows.shape[1] if isinstance(layers, Tensor) else layers
        return torch.stack([one.double()[self.rows[:, index]] for index, one in enumerate(each)]).prod(0)

    def best_product(self, squares: Tensor) -> Tensor:
        """The best distribution that draws every layer apart, by coordinate descent."""
        layers = [
            torch.full((len(OPERATORS),), 1 / len(OPERATORS), dtype=torch.float64) for _ in range(self.rows.shape[1])
        ]
        for _ in range(100):
            for index in range(len(layers)):
                others = self.product([torch.ones_like(one) if at == index else one for at, one in enumerate(layers)])
                sums = torch.zeros(len(OPERATORS), dtype=torch.float64).index_add_(
                    0, self.rows[:, index], squares / others
                )
                layers[index] = sums.sqrt() / sums.sqrt().sum()
        return self.product(layers)

    def whole(self, squares: Tensor) -> list[Tensor]:
        """By layer and operator: root mean square of the whole gradient's norm, as shares."""
        found = []
        for index in range(self.rows.shape[1]):
            sums = torch.zeros(len(OPERATORS), dtype=torch.float64).index_add_(0, self.rows[:, index], squares)
            found.append(sums.sqrt() / sums.sqrt().sum())
        return found

    def next_paths(self) -> list[Tensor]:
        """What the next epoch draws each layer from."""
        before = self.paths.state_dict()
        before = {**before, "probabilities": before["probabilities"].clone()}
        self.paths.on_epoch(self.trainer.epoch)
        found = [torch.tensor(list(self.paths.distribution(name).values())) for name in self.subnets[0]]
        self.paths.load_state_dict(before)
        return found

    def path_lines(self, share: float) -> dict[str, float]:
        """Variance over that of uniform paths."""
        stale = self.paths.norms.clone()
        squares, mean, fresh = self.path_gradients()
        count = len(squares)

        def variance(p: Tensor) -> float:
            return float((squares / (count**2 * p)).sum() - mean)

        even = variance(torch.full((count,), 1 / count, dtype=torch.float64))
        lines = {"as drawn": self.product(self.next_paths())}
        if not self.paths.whole:
            lines |= {
                "owned, stale, as published": self.product(smoothed(stale, share)),
                "owned, stale, half uniform": self.product(smoothed(stale, min(share, 0.5))),
                "owned, stale, floor 0.5": self.product(0.5 * smoothed(stale, share) + 0.5 / len(OPERATORS)),
            }
        lines |= {
            "owned, fresh, as published": self.product(smoothed(fresh, share)),
            "owned, fresh, half uniform": self.product(smoothed(fresh, 0.5)),
            "whole, fresh, per layer": self.product(self.whole(squares)),
            "best product": self.best_product(squares),
            "best": squares.sqrt() / squares.sqrt().sum(),
        }
        return {name: variance(p) / even for name, p in lines.items()}

    # -- images ------------------------------------------------------------------------------------------------------

    def image_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared gradient norm of each image over some paths ``[n]``, that of their mean, and their mean statistic."""
        chosen = torch.randperm(len(self.subnets), generator=stream(self.options.seed, "some"))[:SOME].tolist()
        squares, fresh = torch.zeros(len(self.x), dtype=torch.float64), torch.zeros(len(self.x))
        mean = torch.zeros(())
        for at in chosen:
            subnet = self.subnets[at]
            bn = self.supernet.recalibrate(subnet, [self.x])
            self.supernet.eval()
            each = torch.stack(
                [self._gradient(subnet, x[None], y[None], bn) for x, y in zip(self.x, self.y, strict=True)]
            )
            squares += each.square().sum(1) / len(chosen)
            mean = mean + each.mean(0).square().sum() / len(chosen)
            with torch.no_grad(), self.supernet.activate(subnet, bn):
                fresh += logit_gradient_norm(self.supernet(self.x), self.y) / len(chosen)
        return squares, mean, fresh

    def image_lines(self, share: float) -> dict[str, float]:
        """Variance over that of uniform images."""
        stale, kept = self.samples.running.clone(), self.samples.kept.running.clone()
        squares, mean, fresh = self.image_gradients()
        count = len(squares)

        def variance(p: Tensor) -> float:
            return float((squares / (count**2 * p)).sum() - mean)

        even = variance(torch.full((count,), 1 / count, dtype=torch.float64))
        drawn = self.samples.importance(self.trainer.epoch, self.options.epochs)
        lines = {
            "as drawn": smoothed(stale, drawn),
            "logits, stale, as published": smoothed(stale, share),
            "logits, stale, half uniform": smoothed(stale, min(share, 0.5)),
            "logits, kept, as published": smoothed(kept, share),
            "logits, kept, half uniform": smoothed(kept, min(share, 0.5)),
            "logits, fresh, as published": smoothed(fresh, share),
            "logits, fresh, half uniform": smoothed(fresh, 0.5),
            "logits, fresh, not mixed": smoothed(fresh, 1.0),
            "best": squares.sqrt() / squares.sqrt().sum(),
        }
        return {name: variance(p) / even for name, p in lines.items()}


def table(title: str, found: Mapping[int, Mapping[str, float]]) -> str:
    """Markdown: a line per distribution, a column per epoch."""
    epochs = list(found)
    lines = [f"| {title} | " + " | ".join(f"epoch {epoch}" for epoch in epochs) + " |", "|---|" + "---|" * len(epochs)]
    for name in found[epochs[0]]:
        lines.append(f"| {name} | " + " | ".join(f"{found[epoch][name]:.3g}" for epoch in epochs) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--every", type=int, default=30)
    parser.add_argument(
        "--training", choices=("pa-da", "whole", "uniform"), default="pa-da", help="whose weights and statistics"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options)
    paths: dict[int, dict[str, float]] = {}
    pictures: dict[int, dict[str, float]] = {}
    for epoch in range(options.every, options.epochs, options.every):
        study.trainer.run(epoch)
        paths[epoch] = study.path_lines(epoch / options.epochs)
        pictures[epoch] = study.image_lines(epoch / options.epochs)
        sys.stderr.write(f"epoch {epoch}: {paths[epoch]} {pictures[epoch]}\n")
    sys.stdout.write(table("paths", paths) + "\n\n" + table("images", pictures) + "\n")


if __name__ == "__main__":
    main()
