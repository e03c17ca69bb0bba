"""Is a space deployable on a target? Found out before anything is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasq.deploy import bundle, onnx, parity
from nasq.deploy.bench import bench_bundle
from nasq.deploy.layer_times import layer_times
from nasq.errors import TargetError
from nasq.quant import QuantizedNetwork, calibrate, freeze
from nasq.quant.program import Add, Conv, Linear
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.space import Choice, Subnet
from nasq.supernet import Supernet

__all__ = ["LayerForm", "TargetCheck", "check_target"]


@dataclass(frozen=True)
class LayerForm:
    """One layer of the tried subnets.

    Attributes:
        path, kind: Which layer, and its operation.
        integer: Whether the runtime runs it as an integer kernel, in every subnet tried.
        exact: Whether it computes the reference's integers, in every subnet tried.
        speedup: fp32 time over integer time of the layer alone, batch 1, in the largest subnet that has it; ``None``
            where it was not timed.
    """

    path: str
    kind: str
    integer: bool
    exact: bool
    speedup: float | None = None


@dataclass(frozen=True)
class TargetCheck:
    """What trying a space on a target showed.

    Attributes:
        target, space: Names.
        subnets: How many untrained subnets were exported and run.
        differing, total: Final integers that differ from the reference.
        layers: Every layer of those subnets.
        removed: What the target does not allow, with reasons.
        slow: What runs, but slower than fp32, as the target's data say.
        speedup: Median fp32 time over median int8 time of the largest subnet in the runtime, batch 1.
        failures: Why a tried subnet would not pass the gate of an export, one sentence each.
        missed: Options of layers (``choice=option``) that no tried subnet has.
    """

    target: str
    space: str
    subnets: int
    differing: int
    total: int
    layers: tuple[LayerForm, ...]
    removed: tuple[str, ...]
    slow: tuple[str, ...]
    speedup: float | None
    failures: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every tried subnet would pass the gate of an export."""
        return not self.failures


MOST = 16
"""At most so many subnets are tried, unless more are asked for."""
_DRAWN = 512


def _subnets(supernet: Supernet, count: int, seed: int) -> tuple[list[Subnet], tuple[str, ...]]:
    """The largest and the smallest subnet, and random ones: those that together reach every form of every layer.

    Returns:
        At least ``count`` subnets, and the options of layers (``choice=option``) that none of them has. Bits are left
        out: they change numbers, and no kernel.
    """
    space = supernet.space
    drawn = space.sample_batch(_DRAWN, torch.Generator().manual_seed(seed))
    rows = np.concatenate([space.to_rows([space.largest(), space.smallest()]), drawn])
    forms = [column for column, name in enumerate(space.names) if name not in _bit_choices(supernet)]
    active = space.active(rows)[:, forms]
    options = [len(space.choices[column].options) for column in forms]
    first = np.concatenate([[0], np.cumsum(options)]).astype(np.int64)
    # One column per option of a form: whether the subnet has it.
    has = np.zeros((len(rows), first[-1]), dtype=bool)
    for place, column in enumerate(forms):
        has[np.flatnonzero(active[:, place]), first[place] + rows[active[:, place], column]] = True
    chosen = [0, 1]
    while len(chosen) < max(count, MOST):
        new = (has & ~has[chosen].any(0)).sum(1)
        best = int(new.argmax())
        if not new[best] and len(chosen) >= count:
            break
        chosen.append(best if new[best] else 2 + len(chosen))
    missed = np.flatnonzero(~has[chosen].any(0))
    places = [int(np.searchsorted(first, one, side="right")) - 1 for one in missed]
    named = (
        f"{space.names[forms[place]]}={space.choices[forms[place]].options[one - first[place]]}"
        for place, one in zip(places, missed, strict=True)
    )
    return space.to_subnets(rows[chosen]), tuple(named)


def _bit_choices(supernet: Supernet) -> set[str]:
    """Names of the choices that only say how many bits a tensor has."""
    quantizers = (one for one in supernet.module.modules() if isinstance(one, ActivationQuantizer | WeightQuantizer))
    decided = (quantizer.decisions["bits"] for quantizer in quantizers)
    return {choice.name for choice in decided if isinstance(choice, Choice)}


def check_target(
    supernet: Supernet, images: torch.Tensor, plain: Supernet | None = None, subnets: int = 4, seed: int = 0
) -> TargetCheck:
    """Exports untrained subnets, runs their files and compares them with the reference.

    Args:
        supernet: Of a quantized network; left with step sizes calibrated on ``images``.
        images: Normalised inputs ``[N, ...]``.
        plain: The same space before quantization; with it the largest subnet is timed against its fp32 form.
        subnets: How many to try at least: the largest, the smallest, and random ones; up to 16 where that many are
            needed to reach every branch and every form of every layer.
        seed: Of the random ones.
    """
    network = supernet.module
    assert isinstance(network, QuantizedNetwork)
    target = network.target
    calibrate(network, images)
    layers: dict[str, LayerForm] = {}
    failures: list[str] = []
    differing = total = 0
    speedup = None
    runs = target.runtime != "reference"
    supernet.eval()
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        tried, missed = _subnets(supernet, subnets, seed)
        for index, subnet in enumerate(tried):
            directory = Path(scratch) / str(index)
            bn = supernet.recalibrate(subnet, [images])
            with supernet.activate(subnet, bn):
                program = freeze(network)
            if not runs:  # the target is the integer reference itself
                counted = [op for op in program.ops if isinstance(op, (Conv, Linear, Add))]
                layers.update({op.path: LayerForm(op.path, type(op).__name__, True, True) for op in counted})
                continue
            bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
            report = parity.check(directory, images.cpu().numpy())
            differing, total = differing + report.differing, total + report.total
            failures += report.failures(trained=False)
            timed = layer_times(directory, skip=layers) if target.runtime == "onnxruntime" else []
            _merge(layers, program.ops, report, {one.path: one.speedup for one in timed})
            if index == 0 and plain is not None:
                speedup = _speedup(directory, plain, images)
    return TargetCheck(
        target.name, supernet.space.name, len(tried), differing, total, tuple(layers.values()),
        tuple(dict.fromkeys(str(removal) for removal in network.removed)),
        tuple(f"{feature}: {sentence}" for feature, sentence in target.slow.items()), speedup,
        tuple(dict.fromkeys(failures)), missed,
    )  # fmt: skip


def _merge(
    layers: dict[str, LayerForm], ops: Sequence[Any], report: parity.ParityReport, speedups: Mapping[str, float]
) -> None:
    exact = {layer.path: layer.passed for layer in report.layers}
    floating = set(report.coverage.floats)
    for op in ops:
        if not isinstance(op, (Conv, Linear, Add)) and exact.get(op.path, True):
            continue
        before = layers.get(op.path)
        integer = op.path not in floating and (before is None or before.integer)
        same = exact.get(op.path, True) and (before is None or before.exact)
        speedup = speedups.get(op.path) if before is None else before.speedup
        layers[op.path] = LayerForm(op.path, type(op).__name__, integer, same, speedup)


def _speedup(directory: Path, plain: Supernet, images: torch.Tensor) -> float:
    """Median fp32 time over median int8 time in the runtime, batch 1, one thread."""
    model = plain.extract(plain.space.largest()).eval()
    found = bench_bundle(directory, model, (1,), 1, images=images.cpu().numpy(), warmup=3, repeats=20)
    times = {row.candidate: row.median for row in found.rows}
    shipped = next(name for name in times if name.endswith(" int8"))
    return times[shipped.replace("int8", "fp32")] / times[shipped]


def require_passed(found: TargetCheck) -> None:
    """Raises where a space is not deployable on its target.

    Raises:
        TargetError: Names the first layer and what is wrong with it.
    """
    if found.passed:
        return
    wrong = [layer for layer in found.layers if not layer.exact] or [one for one in found.layers if not one.integer]
    reason = found.failures[0]
    if wrong:
        what = (
            "computes other integers than the reference" if not wrong[0].exact else "does not run as an integer kernel"
        )
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        reason = f"the {wrong[0].kind} {wrong[0].path!r} {what}{more}. {reason}"
    raise TargetError(
        f"the space {found.space!r} cannot be shipped to the target {found.target!r}: {reason} Replace the layer, or "
        "choose another target: 'nasq targets' lists them."
    )


def noise(shape: Sequence[int], count: int, seed: int = 0) -> torch.Tensor:
    """Inputs for a check without data: standard normal ``[count, *shape]``."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32))
