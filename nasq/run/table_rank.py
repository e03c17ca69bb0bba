"""How well a run's supernet ranks subnets whose worth is known: accuracies with inherited weights, on validation images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasq.cost import CostModel
from nasq.errors import ArtifactError
from nasq.files import append_line, sha256
from nasq.ranking.audits import Audit, audit
from nasq.ranking.table import Table
from nasq.run.assemble import Workshop, build_network
from nasq.run.directory import RunDirectory
from nasq.run.search import Evaluation
from nasq.space import SearchSpace, Subnet
from nasq.supernet import Supernet
from nasq.training.splitting import WeightSets

__all__ = ["rank_supernet", "with_largest_bits"]

OnSubnet = Callable[[int, int], None]


def with_largest_bits(space: SearchSpace, architecture: Subnet) -> Subnet:
    """The subnet of a quantized space with this architecture; what it does not decide is at its last or usual option.

    Raises:
        InputError: The architecture is not in the space.
    """
    options = {
        choice.name: choice.options[-1] if choice.ordered and choice.is_size else choice.default
        for choice in space.choices
    }
    return space.canonical(Subnet({**options, **architecture}))


def rank_supernet(
    run: RunDirectory,
    workshop: Workshop,
    table: Table,
    metric: str | None = None,
    count: int | None = None,
    on_subnet: OnSubnet | None = None,
    **options: Any,
) -> tuple[Audit, Table]:
    """Evaluates the subnets of a table with the run's trained weights, and audits the accuracies.

    Every accuracy is that of the integer form on the run's validation images, with BatchNorm statistics of the subnet's own;
    a table of architectures is evaluated at the largest bits; of a forest, each with the weights of its leaf, named in the
    column ``leaf``. What is evaluated is kept in ``RUN/ranking``: a later call with the same weights goes on there.

    Args:
        run: Its lock is held by the caller.
        workshop: The run's objects with trained weights.
        table: Official names or subnets of the space, with their metrics.
        metric: What to compare with; the table's first metric without a name.
        count: So many random rows of the table (by the run's seed); ``None`` for all.
        on_subnet: Called with ``(done, all)``.
        options: For :func:`nasq.ranking.audit`.

    Returns:
        The audit, and the scores: a column ``inherited``, in %; of a forest also ``leaf``, which is not audited.

    Raises:
        InputError: A subnet of the table is not in the space (says which).
    """
    table.column(metric)
    network = build_network(workshop.config, workshop.data)
    plain = Supernet(network, workshop.config.space)
    if count is not None and count < len(table):
        rng = np.random.default_rng([workshop.config.seed, count])
        table = table.rows(np.sort(rng.choice(len(table), count, replace=False)))
    quantized = workshop.supernet.space
    if table.subnets and any(name not in plain.space.positions for name in table.subnets[0]):
        members = table.members(network, quantized)  # its rows decide bits as well
        architectures = [Subnet({n: o for n, o in one.items() if n in plain.space.positions}) for one in members]
    else:
        architectures = table.members(network, plain.space)
        members = [with_largest_bits(quantized, one) for one in architectures]
    values = _evaluated(run, workshop, members, on_subnet)
    scores = Table({"inherited": values}, table.names, table.subnets, "the supernet")
    rows = plain.space.to_rows(architectures)
    costs = CostModel(plain, torch.zeros(1, *workshop.data.input_shape)).evaluate(rows)
    found = audit(
        scores,
        table,
        metric,
        costs={"params": costs["params"].astype(float), "flops": costs["macs"].astype(float)},
        **options,
    )
    if isinstance(workshop.supernet, WeightSets):
        leaves = workshop.supernet.indices(quantized.to_rows(members))
        scores = Table({**scores.metrics, "leaf": leaves.astype(float)}, table.names, table.subnets, scores.source)
    scores.write(run.path / "ranking" / "scores.csv")
    return found, scores


def _evaluated(
    run: RunDirectory, workshop: Workshop, members: list[Subnet], on_subnet: OnSubnet | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Accuracies in %, those of an earlier call with the same weights included."""
    version = _version(run)
    views = "-augmented" if workshop.config.data.recalibration_augment else ""
    file = run.path / "ranking" / f"inherited-{version}{views}.jsonl"
    known = _known(file)
    evaluation = Evaluation(workshop)
    for done, subnet in enumerate(members, 1):
        if subnet.id not in known:
            known[subnet.id] = 100 * evaluation.accuracy(subnet)
            append_line(file, json.dumps({"subnet": subnet.id, "accuracy": known[subnet.id]}))
        if on_subnet is not None:
            on_subnet(done, len(members))
    return np.array([known[subnet.id] for subnet in members])


def _version(run: RunDirectory) -> str:
    """Of the weights that are evaluated: the supernet's, or those of all leaves of its forest."""
    if not (run.forest / "forest.json").exists():
        return sha256(run.supernet / "weights.safetensors")[:16]
    files = [run.forest / "forest.json", *sorted(run.forest.glob("leaf*/weights.safetensors"))]
    together = hashlib.sha256("".join(sha256(file) for file in files).encode())
    return f"forest-{together.hexdigest()[:16]}"


def _known(file: Path) -> dict[str, float]:
    """What is evaluated; a last line that a kill cut short is taken off."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {str(row["subnet"]): float(row["accuracy"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: {error}. Delete it; the subnets are evaluated again.") from error
