"""The model card of a bundle: where the subnet comes from, what its file reaches, what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from nasq.deploy.engines import ENGINES
from nasq.deploy.parity import ParityReport
from nasq.run.assemble import Workshop
from nasq.space import Subnet
from nasq.version import __version__

__all__ = ["accuracy_interval", "card", "with_latency"]

LATENCY = "## Latency"
_Z = 1.959963984540054  # of a two-sided 95 % interval


def accuracy_interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927, eq. 7): it stays within 0 and 1 and is right for few images.

    Args:
        accuracy: Share of images classified right, 0..1.
        count: Of independent images.
    """
    scale = _Z * _Z / count
    centre = (accuracy + scale / 2) / (1 + scale)
    half = _Z * sqrt(accuracy * (1 - accuracy) / count + scale / (4 * count)) / (1 + scale)
    return max(0.0, centre - half), min(1.0, centre + half)


def card(
    workshop: Workshop,
    subnet: Subnet,
    costs: Mapping[str, float],
    report: ParityReport,
    training: Sequence[str] = (),
) -> str:
    """The card as Markdown.

    Args:
        workshop: Of the run.
        subnet: Exported.
        costs: Of it, by name.
        report: What the gate found.
        training: Further sentences on how the weights came about.
    """
    config, data = workshop.config, workshop.data
    rows = "\n".join(f"| {name} | {value:,.4g} |" for name, value in costs.items())
    choices = "\n".join(f"| {name} | {option} |" for name, option in subnet.items())
    return f"""# Subnet {subnet.id} of {config.space}

Searched and exported by nasq {__version__} for the target `{config.target}`.
Space: `{config.space}`, fingerprint {workshop.supernet.space.fingerprint}.

## Accuracy

{_accuracy(workshop, report)}

## Training

{_training(config.warmup, config.train, config.seed, training)}

## Input and output

Input: fp32 `[N, {", ".join(map(str, data.input_shape))}]`, `(pixel / 255 - mean) / std` with
mean {list(data.mean)} and std {list(data.std)}. Output: one number per class, in the order
{", ".join(map(str, data.classes[:20]))}{", ..." if len(data.classes) > 20 else ""}.

## Costs

| cost | value |
|---|---|
{rows}

## Choices

| choice | option |
|---|---|
{choices}

## Parity

{report.summary()}
"""


def _accuracy(workshop: Workshop, report: ParityReport) -> str:
    data, views = workshop.data, workshop.config.data.validation_views
    what = (
        f"the {len(data.validation)} validation images of `{data.name}` (fingerprint {data.fingerprint}; {views} view(s) of "
        "each)"
    )
    if report.accuracy is None:
        return f"Not measured on {what}."
    low, high = accuracy_interval(report.accuracy, max(1, len(data.validation) // views))
    return (
        f"This file on {what}: {100 * report.accuracy:.2f} %, 95 % interval {100 * low:.2f} to {100 * high:.2f} %. "
        "The search selected on these images, so the figure is optimistic."
    )


def _training(warmup: Mapping[str, Any] | None, train: Mapping[str, Any], seed: int, more: Sequence[str]) -> str:
    lines = ["Weights shared with all subnets of the space, BatchNorm statistics its own."]
    if warmup is not None:
        lines.append(f"Float supernet: `{json.dumps(dict(warmup))}`.")
    lines.append(f"Quantized supernet: `{json.dumps(dict(train))}`; seed {seed}. What is not named has nasq's default.")
    return "\n".join([*lines, *more])


_PART_OF = {"inductor": "torch"}
"""Runtimes that another package ships, whose version is theirs."""


def with_latency(text: str, report: Mapping[str, Any]) -> str:
    """A card with the latencies of a benchmark (``bench.json``), which replace older ones."""
    where = report["environment"]
    rows = "\n".join(
        f"| {row['candidate']} | {row['batch']} | {row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f}) "
        f"| {row['p95']:.3f} |"
        for row in report["rows"]
    )
    used = [name for name in ENGINES if any(row["candidate"].startswith(f"{name} ") for row in report["rows"])]
    versions = where["versions"]
    runtimes = ", ".join(f"{name} {versions.get(name, versions.get(_PART_OF.get(name), '?'))}" for name in used)
    begin = text.partition(f"\n{LATENCY}\n")[0].rstrip("\n")
    return f"""{begin}

{LATENCY}

On {where["cpu"]} ({where["cores"]} cores), {where["threads"]} thread(s), {where["system"]},
{runtimes}; energy {where.get("energy", "not measured")}:

| candidate | batch | median ms (95 % interval) | p95 ms |
|---|---|---|---|
{rows}
"""
