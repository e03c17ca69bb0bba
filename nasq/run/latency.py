"""Latency tables of a run's space, and the objective that is predicted from one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nasq.deploy.latency_table import LatencyTable, build
from nasq.errors import ArtifactError, InputError
from nasq.quant import freeze
from nasq.quant.program import Program
from nasq.run.assemble import Workshop
from nasq.run.config import RunConfig
from nasq.run.directory import RunDirectory
from nasq.space import Subnet

if TYPE_CHECKING:
    from nasq.run.evaluation import Evaluation

__all__ = ["TABLE", "make_table", "predicted_latency", "table_for"]

TABLE = "latency_table.json"


def _frozen(workshop: Workshop, evaluation: Evaluation, subnet: Subnet) -> Program:
    workshop.supernet.eval()
    with workshop.supernet.activate(subnet, evaluation.statistics(subnet)):
        return freeze(workshop.network)


def make_table(run: RunDirectory, workshop: Workshop, evaluation: Evaluation, subnets: int = 24) -> LatencyTable:
    """Measures the layers of random subnets, and whole subnets; writes ``latency_table.json`` in the run.

    Args:
        subnets: How many are drawn, the largest and the smallest beside them. Half of them are measured as a whole: every
            other one of these is fitted, and the error is that on those between.

    Raises:
        InputError: Fewer than eight subnets.
    """
    if subnets < 8:
        raise InputError(f"a latency table of {subnets} subnets cannot be tested; draw 8 or more.")
    space, config = workshop.supernet.space, workshop.config
    rows = space.sample_batch(subnets, np.random.default_rng(config.seed))
    drawn = [*space.to_subnets(rows), space.largest(), space.smallest()]
    programs = [_frozen(workshop, evaluation, subnet) for subnet in drawn]
    images = workshop.data.normalise(workshop.data.validation.images[: config.search.latency_batch]).cpu().numpy()
    table = build(
        programs, config.search.latency_batch, config.bench.threads, calibrated_on=subnets // 2,
        repeats=config.bench.repeats, images=images,
    )  # fmt: skip
    table.save(run.path / TABLE)
    assert table.fit is not None
    run.tell({"event": "bench.table", "rows": len(table.rows), "median_error": table.fit.median_error})
    return table


def table_for(config: RunConfig, path: Path) -> LatencyTable:
    """The table in a file, where it suits a run.

    Raises:
        InputError: The table is for another target, batch size or number of threads.
        ArtifactError: It is missing or damaged.
    """
    if not path.exists():
        raise ArtifactError(f"search.latency_table {path} is missing. A trained run makes one: nasq bench RUN --table")
    table = LatencyTable.load(path)
    wanted = {"target": config.target, "batch": config.search.latency_batch, "threads": config.bench.threads}
    for name, value in wanted.items():
        if getattr(table, name) != value:
            raise InputError(
                f"the latency table {path} was made for {name} {getattr(table, name)!r}, this run has {value!r}. Make one "
                "for it: nasq bench RUN --table"
            )
    return table


def predicted_latency(workshop: Workshop, evaluation: Evaluation, path: Path) -> Callable[[Subnet], float]:
    """Milliseconds of a subnet by a table; a layer that the table lacks is measured when it is met.

    Raises:
        InputError, ArtifactError: See :func:`table_for`.
    """
    table = table_for(workshop.config, path)

    def milliseconds(subnet: Subnet) -> float:
        program = _frozen(workshop, evaluation, subnet)
        table.measure(program)
        return table.predict(program)

    return milliseconds
