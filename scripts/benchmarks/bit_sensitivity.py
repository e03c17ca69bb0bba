"""What single stages of ResNet-20 gain or lose from other bits than the rest, in a supernet of eq_net_resnet20_cifar10.

From uniform ``--base`` bits, the weights or the activations of a stage (``layer1`` to ``layer3``), or with ``--each`` of
single layers, are put to other bits, and the Kullback-Leibler divergence from the float network's outputs is measured on the
same augmented validation images. It has much less noise than accuracy: it moves with every image, and all subnets see the
same ones. What a mixture can gain at equal average bits is bounded by what these moves gain and cost.

Usage::

    python -m scripts.benchmarks.bit_sensitivity --data DIR --weights resnet20.npz --out RUNS
        [--each layer3.*weight_bits=2] [--mix layer1.*weight_bits=4,layer3.blocks.0.conv1.weight_bits=2] [--test]

``--each`` measures one move per choice that the pattern names, ``--mix`` one subnet; ``--test`` adds its test accuracy.
Rows are kept in ``RUNS/ROW-.../sensitivity.jsonl`` and not measured twice.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasq.data import training_views
from nasq.errors import InputError
from nasq.files import append_line
from nasq.space import Subnet
from nasq.training import stream
from scripts.reproduce import eq_net_resnet20_cifar10 as eq_net

STAGES = ("layer1", "layer2", "layer3")
KINDS = ("weight", "activation")
RECALIBRATION_IMAGES = 1024


class Meter:
    """Divergence of subnets from the float network on one fixed set of images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = eq_net.load_data(options.data)
        self.supernet, _ = eq_net.trained(options.row, options, self.data)
        self.supernet.eval()
        self.costs = eq_net.costs_of(self.supernet)
        self.batches = list(eq_net.recalibration(self.data, RECALIBRATION_IMAGES))
        validation = replace(self.data, train=self.data.validation)
        views = training_views(validation, options.images, stream(0, "order"), stream(0, "changes"))
        self.images = self.data.normalise(views).contiguous(memory_format=torch.channels_last)
        self.taught = self._outputs(eq_net.float_network(options.weights)).log_softmax(1)

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> Tensor:
        return torch.cat([network(part) for part in self.images.split(250)])

    def row(self, name: str, changes: dict[str, int]) -> dict[str, Any]:
        """One subnet: the base with some choices at other bits."""
        subnet = Subnet({**eq_net.uniform(self.supernet, self.options.base), **changes})
        bn = self.supernet.recalibrate(subnet, self.batches)
        with self.supernet.activate(subnet, bn):
            own = self._outputs(self.supernet).log_softmax(1)
        divergence = nn.functional.kl_div(own, self.taught, reduction="batchmean", log_target=True)
        rows = self.supernet.space.to_rows([subnet])
        bits = {kind: float(self.costs[f"average_{kind}_bits"].function(rows)[0]) for kind in KINDS}
        found: dict[str, Any] = {"name": name, "base": self.options.base, "divergence": float(divergence), **bits}
        if self.options.test:
            all_batches = list(eq_net.recalibration(self.data))
            found["test"] = eq_net.accuracy(self.supernet, subnet, self.data, self.data.test, all_batches, "cpu")
        return found


def named(names: tuple[str, ...], text: str) -> dict[str, int]:
    """``pattern=bits`` to the choices that it names."""
    pattern, _, bits = text.partition("=")
    found = fnmatch.filter(names, pattern)
    if not found or not bits.isdigit():
        raise InputError(f"{text!r} names no choice and its bits. Give PATTERN=BITS, as in layer1.*weight_bits=4.")
    return dict.fromkeys(found, int(bits))


def moves(names: tuple[str, ...], options: argparse.Namespace) -> Iterator[tuple[str, dict[str, int]]]:
    """What is measured: name and changes."""
    yield "base", {}
    if options.mix:
        mixed: dict[str, int] = {}
        for text in options.mix.split(","):
            mixed.update(named(names, text))
        yield options.mix, mixed
    elif options.each:
        yield from ((f"{name}={bits}", {name: bits}) for name, bits in named(names, options.each).items())
    else:
        for pattern in ["*", *(f"{stage}.*" for stage in STAGES)]:
            for kind in KINDS:
                for bits in (2, 4, 8):
                    text = f"{pattern}{kind}_bits={bits}"
                    yield text, named(names, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "weights", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--row", choices=tuple(eq_net.ROWS), default="elastic")
    parser.add_argument("--setting", choices=tuple(eq_net.SETTINGS), default="short")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=int, default=3, help="bits of everything that is not moved")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--each", default=None, help="PATTERN=BITS")
    parser.add_argument("--mix", default=None, help="PATTERN=BITS,PATTERN=BITS,...")
    parser.add_argument("--test", action="store_true", help="test accuracy as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    meter = Meter(options)
    path = eq_net.place(options.row, options) / "sensitivity.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["name"], one["base"], "test" in one): one for one in known}
    for name, changes in moves(meter.supernet.space.names, options):
        key = (name, options.base, options.test)
        if key not in done:
            done[key] = meter.row(name, changes)
            append_line(path, json.dumps(done[key]))
        one, base = done[key], done["base", options.base, options.test]
        test = f" test {one['test']:.2f} %" if options.test else ""
        sys.stdout.write(
            f"{name:56} weights {one['weight']:.3f} activations {one['activation']:.3f} "
            f"divergence {one['divergence']:.4f} ({one['divergence'] - base['divergence']:+.4f}){test}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
