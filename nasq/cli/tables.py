"""Commands around ground truth: tables of subnets whose worth is known, and what scores are worth against them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasq.cli.output import Json, Output, Quiet
from nasq.cli.table_build import build

if TYPE_CHECKING:
    from nasq.ranking.audit_seeds import SeedsAudit
    from nasq.ranking.audits import Audit
    from nasq.ranking.statistics import Estimate
    from nasq.ranking.table import Table

__all__ = ["add_commands"]

Space = Annotated[str | None, typer.Option(help="Their search space: translates names, counts params and FLOPs.")]

table_app = typer.Typer(no_args_is_help=True, help="Ground truth: convert published tables, or train your own.")


@table_app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="nas-bench-101, nas-bench-201, nas-bench-macro or csv.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published file.")],
    out: Annotated[Path, typer.Option(metavar="TABLE.csv", help="Where to write; .csv.gz compresses.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a published table to CSV: one row per subnet, one column per metric."""
    from nasq.ranking.table_import import import_table

    output = Output(json, quiet)
    table = import_table(kind, file)
    table.write(out)
    facts = {"table": str(out), "subnets": len(table), "metrics": list(table.metrics)}
    output.result(
        facts, f"table            {out}\nsubnets          {len(table)}\nmetrics          {', '.join(table.metrics)}"
    )


def audit(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.csv...", help="Scores: one column per score, larger is better; one file per seed."
        ),
    ],
    table: Annotated[Path, typer.Option(metavar="TABLE.csv", help="The ground truth.")],
    metric: Annotated[str | None, typer.Option(help="Column of the table; default its first.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with scatter pictures.")] = None,
    space: Space = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="The metric is better where it is smaller.")] = False,
    top: Annotated[list[int] | None, typer.Option(min=1, help="Best scores for the regret; default 1, 10.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap behind the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare scores with a table: rank correlations with 95 % intervals, regret, beside params and FLOPs."""
    from nasq.files import write_text
    from nasq.ranking.audit_seeds import over_seeds
    from nasq.ranking.audits import audit as compare
    from nasq.ranking.table import Table

    output = Output(json, quiet)
    scores, truth = [Table.read(file) for file in files], Table.read(table)
    more = [_of_space(space, one) if space is not None else {} for one in scores]
    options: dict[str, Any] = {"minimize": minimize, "top": top, "resamples": resamples, "seed": seed}
    audits = [compare(one, truth, metric, **options, **own) for one, own in zip(scores, more, strict=True)]
    found = over_seeds(audits)
    if html is not None:
        from nasq.report.audit import audit_page, scatters

        pictures = scatters(scores, truth, metric, more[0].get("network"), more[0].get("space"))
        write_text(html, audit_page(found, pictures, f"{files[0].stem} against {table.stem}"))
        output.log(f"page             {html}")
    if len(audits) == 1:
        show(audits[0], output)
    else:
        _show_seeds(found, output)


def rank_supernet(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose supernet is trained.")],
    table: Annotated[Path, typer.Option(metavar="TABLE.csv", help="The ground truth.")],
    metric: Annotated[str | None, typer.Option(help="Column of the table; default its first.")] = None,
    count: Annotated[int | None, typer.Option(min=5, help="So many random rows of the table; default all.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap behind the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank a table's subnets by their accuracy with a supernet's weights, on validation images, and audit the ranking."""
    from nasq.ranking.table import Table
    from nasq.run.directory import RunDirectory
    from nasq.run.flow import open_workshop
    from nasq.run.table_rank import rank_supernet as rank
    from nasq.run.train import require_trained

    output = Output(json, quiet)
    truth = Table.read(table)
    with RunDirectory.open(directory) as run:
        require_trained(run)
        workshop = open_workshop(run)

        def tell(done: int, total: int) -> None:
            if done % 50 == 0 or done == total:
                output.log(f"{done} of {total} subnets")

        found, _ = rank(run, workshop, truth, metric, count, tell, resamples=resamples, seed=seed)
    show(found, output)


def _of_space(name: str, scores: Table) -> dict[str, Any]:
    """The space's network, and what the scored subnets cost in it."""
    import torch

    from nasq import plugins
    from nasq.cost import CostModel
    from nasq.supernet import Supernet

    factory = plugins.load("search_spaces", name)
    shape = plugins.space_info(factory).input_shape
    supernet = Supernet(factory(), name)
    rows = supernet.space.to_rows(scores.members(supernet.module, supernet.space))
    costs = CostModel(supernet, torch.zeros(1, *shape)).evaluate(rows)
    return {"network": supernet.module, "space": supernet.space,
            "costs": {"params": costs["params"].astype(float), "flops": costs["macs"].astype(float)}}  # fmt: skip


def show(found: Audit, output: Output) -> None:
    """Prints an audit: a row per score, and what it adds to the baselines."""
    rows: list[dict[str, object]] = []
    for score in found.scores:
        row: dict[str, object] = {"score": score.name}
        row |= {name: _interval(score.coefficients[name]) for name in ("kendall", "spearman")}
        row |= {f"regret@{k}": f"{value:.4g}" for k, value in score.regret.items()}
        row["top 10 %"] = f"{score.precision[0.1]:.2f}" if 0.1 in score.precision else "-"
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    filled = [{column: row.get(column, "-") for column in columns} for row in rows]
    output.table(filled, title=f"{found.subnets} subnets against {found.metric}", value=found.to_json())
    if output.as_json:
        return
    for line in _remarks(found):
        output.log(line)


def _show_seeds(found: SeedsAudit, output: Output) -> None:
    """Prints an audit over seeds: a row per score, means and deviations."""
    rows: list[dict[str, object]] = []
    for score in found.audits[0].scores:
        row: dict[str, object] = {"score": score.name}
        for key, mean in found.mean[score.name].items():
            defined = mean == mean
            row[key] = f"{mean:.3f} ± {found.deviation[score.name][key]:.3f}" if defined else "undefined"
        rows.append(row)
    first = found.audits[0]
    title = f"{first.subnets} subnets against {first.metric}, mean ± standard deviation over {len(found.audits)} seeds"
    output.table(rows, title=title, value=found.to_json())


def _interval(estimate: Estimate) -> str:
    if estimate.value != estimate.value:
        return "undefined"
    return f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _remarks(found: Audit) -> list[str]:
    lines = []
    if found.unmatched:
        lines.append(f"{found.unmatched} scored subnets are not in the table, or their {found.metric} is not known")
    lines += [f"{score.name}: {score.missing} scores are NaN and left out" for score in found.scores if score.missing]
    if found.missing_baselines:
        lines.append(f"no {' and no '.join(found.missing_baselines)} to compare with: name the search space, --space")
    for score in found.scores:
        for name, gain in score.beyond.items():
            verdict = "not separated from" if not gain.separated else "above" if gain.value > 0 else "BELOW"
            lines.append(f"{score.name}: Kendall {verdict} {name} by {_interval(gain)}")
    return lines


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands to the program."""
    table_app.command("build")(build)
    app.add_typer(table_app, name="table")
    app.command()(audit)
    app.command("rank-supernet")(rank_supernet)
