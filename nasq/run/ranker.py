"""Fitting a ranker on a file of scores and a table, and applying it to another file of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasq.errors import InputError, choose_from
from nasq.files import read_json
from nasq.ranking.nodes import NodeStatistics
from nasq.ranking.ranker import Ranker, RankerConfig, fit
from nasq.ranking.table import Table
from nasq.run.score_file import ScoreFile, read_nodes, read_scores
from nasq.space import Subnet

__all__ = ["apply_ranker", "fit_ranker"]


@dataclass(frozen=True)
class _Scored:
    """What a file of scores says of its subnets that can be ranked."""

    rows: list[dict[str, str]]
    nodes: list[NodeStatistics]
    space: str
    columns: list[str]

    def scores(self, names: Sequence[str], at: Sequence[int] | None = None) -> list[dict[str, float]]:
        """Some columns of all rows, or of some; an empty cell is NaN.

        Raises:
            InputError: There is no such column.
        """
        for name in names:
            if name not in self.columns:
                raise choose_from("score column", name, self.columns, "The ranker learns from it; see 'nasq score'.")
        rows = self.rows if at is None else [self.rows[index] for index in at]
        return [{name: float(row[name] or "nan") for name in names} for row in rows]

    def cells(self, at: Sequence[int] | None = None) -> list[Subnet]:
        """The subnets themselves, or those of some rows."""
        rows = self.rows if at is None else [self.rows[index] for index in at]
        return [Subnet.from_json(row["subnet"]) for row in rows]


def _read(path: Path) -> _Scored:
    rows, columns = read_scores(path)
    nodes = read_nodes(path)
    settings = read_json(path.with_name(path.name + ".json"))
    missing = [row["subnet_id"] for row in rows if row["subnet_id"] not in nodes]
    if missing:
        raise InputError(
            f"{path} has no node-wise statistics of {missing[0]} ({len(missing)} in all). Make it with --nodes."
        )
    return _Scored(rows, [nodes[row["subnet_id"]] for row in rows], str(settings.get("fingerprint", "")), columns)


def _values(scored: _Scored, table: Table, metric: str | None) -> tuple[str, list[float]]:
    """The table's value of every row; NaN where it has none. Rows are found by official name, else by subnet."""
    name, found = table.column(metric)
    by_name = dict(zip(table.names, found.tolist(), strict=True)) if table.names else {}
    by_subnet = (
        {one.id: value for one, value in zip(table.subnets, found.tolist(), strict=True)} if table.subnets else {}
    )
    values = []
    for row in scored.rows:
        value = by_name.get(row["name"], math.nan) if row["name"] else math.nan
        values.append(by_subnet.get(Subnet.from_json(row["subnet"]).id, value))
    return name, values


def fit_ranker(
    scores: Path, table: Path, out: Path, metric: str | None, count: int | None, config: RankerConfig
) -> dict[str, Any]:
    """Trains on the rows of ``scores`` that ``table`` knows, and writes the ranker to the directory ``out``.

    Args:
        scores: A file of scores with node-wise statistics.
        table: What subnets are worth.
        out: A directory.
        metric: Column of the table; ``None``: its first.
        count: How many rows to train on, drawn from the seed; ``None``: all.
        config: Settings.

    Returns:
        Facts: numbers of training subnets, the metric, and Kendall's tau on the rows left out (``None`` without any).

    Raises:
        InputError: Fewer than two rows are in the table, or fewer than ``count``; or a score to learn from is not there.
    """
    from scipy.stats import kendalltau

    scored = _read(scores)
    name, values = _values(scored, Table.read(table), metric)
    known = [index for index, value in enumerate(values) if math.isfinite(value)]
    wanted = len(known) if count is None else count
    if not 2 <= wanted <= len(known):
        raise InputError(
            f"{len(known)} of {len(values)} subnets of {scores} have a value of {name!r} in {table}, and {wanted} were to be "
            "trained on. Allowed: 2 or more, and no more than there are."
        )
    order = np.random.default_rng(config.seed).permutation(known)
    train, rest = order[:wanted], order[wanted:]
    ranker = fit(
        [scored.nodes[at] for at in train], [values[at] for at in train], scored.space, config, scored.nodes,
        scored.cells(train.tolist()), scored.scores(config.scores, train.tolist()),
        scored.scores(config.scores, rest.tolist()),
    )  # fmt: skip
    ranker.save(out)
    tau = None
    if len(rest) > 1:
        predicted, _ = ranker.predict(
            [scored.nodes[at] for at in rest],
            cells=scored.cells(rest.tolist()),
            scores=scored.scores(config.scores, rest.tolist()),
        )
        tau = float(kendalltau(predicted, [values[at] for at in rest]).statistic)
    return {"ranker": str(out), "metric": name, "trained_on": int(wanted), "tested_on": len(rest), "kendall": tau}


def apply_ranker(directory: Path, scores: Path, out: Path) -> dict[str, Any]:
    """Writes a file of scores with the columns ``parzc`` and ``parzc_uncertainty`` for the subnets of ``scores``.

    Raises:
        InputError: The ranker was fitted on another space, or learned from a score that the file has not.
    """
    ranker, scored = Ranker.load(directory), _read(scores)
    predicted, uncertain = ranker.predict(
        scored.nodes, scored.space, scored.cells(), scored.scores(ranker.config.scores)
    )
    if out.exists():
        raise InputError(f"{out} exists. Give another --out.")
    file = ScoreFile(out, ["parzc", "parzc_uncertainty"], {"fingerprint": scored.space, "ranker": str(directory)})
    file.open()
    for row, value, spread in zip(scored.rows, predicted, uncertain, strict=True):
        values = {"parzc": float(value), "parzc_uncertainty": float(spread)}
        file.add(row["subnet_id"], row["name"], row["subnet"], values)
    return {"out": str(out), "rows": len(scored.rows)}
