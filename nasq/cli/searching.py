"""The commands of a search: ``search``, ``worker`` and ``pick``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasq.cli.output import Json, Output, Quiet

__all__ = ["add_commands"]

RunPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="NASQ_STORAGE",
        help="Such as postgresql://user@host/name; default: the run's own journal.",
    ),
]
Study = Annotated[str | None, typer.Option(metavar="NAME", help="The study in the storage; default: DIR's name.")]


def search(
    directory: RunPath,
    explain: Annotated[bool, typer.Option("--explain", help="Only say how much survives the constraints.")] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="With --explain: instead of the run's constraints; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes on this machine that evaluate.")] = 0,
    storage: Storage = None,
    study: Study = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Wait for workers of other machines: nasq worker --storage URL.")
    ] = False,
    warm_start: Annotated[Path | None, typer.Option(metavar="RUN", help="Begin with the front of another run.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search the trained supernet of a run."""
    output = Output(json, quiet)
    if explain:
        _explain(directory, limit or [], output)
        return
    if limit:
        raise typer.BadParameter(
            "it needs --explain; a run's own constraints are in its config.yaml.", param_hint="--limit"
        )
    from nasq.cli.progress import RunProgress
    from nasq.cli.showing import show_run
    from nasq.run.directory import RunDirectory
    from nasq.run.flow import open_workshop, stage
    from nasq.run.sharing import SearchOptions

    options = SearchOptions(workers, storage, study, remote, warm_start)
    with RunProgress(output) as progress:
        opened = RunDirectory.open(directory, progress.event)
        with opened:
            stage(opened, open_workshop(opened), "search", progress.step, options)
    show_run(opened, output)


def _explain(directory: Path, limits: list[str], output: Output) -> None:
    from nasq.run.assemble import assemble
    from nasq.run.directory import RunDirectory
    from nasq.run.search import explanation

    found = explanation(assemble(RunDirectory.open(directory).config()), limits)
    output.result(None if found is None else found.to_json(), "no constraints" if found is None else found.text())
    if found is not None and not found.feasible:
        raise typer.Exit(2)


def worker(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="The run, or its copy on this machine.")
    ] = None,
    storage: Storage = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="The study in the storage; default: the only one.")
    ] = None,
    patience: Annotated[float, typer.Option(min=1, help="Seconds to wait for a silent search or storage.")] = 300.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate subnets of a search that runs here or on another machine, until it is finished."""
    from nasq.run.worker import join_study, serve

    output = Output(json, quiet)
    joined, run = join_study(directory, storage, study)
    output.log(f"working for {joined.name!r} with the weights in {run.path}")
    count = serve(
        joined, run, lambda event: output.log(f"{event['subnet']}: {event['seconds']:.2f} s"), patience=patience
    )
    output.result({"study": joined.name, "evaluated": count}, f"evaluated        {count} subnets of {joined.name}")


def pick(
    directory: RunPath,
    limit: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Such as 'bitops<=2M'; repeatable.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Such as 20k.")] = None,
    max_bitops: Annotated[str | None, typer.Option(help="Such as 5M.")] = None,
    max_macs: Annotated[str | None, typer.Option(help="Such as 5M.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Such as 100k.")] = None,
    max_latency_ms: Annotated[str | None, typer.Option(help="Where latency was an objective, such as 0.5.")] = None,
    at_knee: Annotated[bool, typer.Option("--knee", help="The knee of the front, not its most accurate end.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The best evaluated subnet within limits, without searching again."""
    from nasq.errors import InputError
    from nasq.run.directory import RunDirectory
    from nasq.run.search import search_results
    from nasq.search import COST_UNITS, parse_bound, pick_knee
    from nasq.search import pick as pick_record

    output = Output(json, quiet)
    goals, records = search_results(RunDirectory.open(directory))
    limits = {
        "bytes": max_bytes, "bitops": max_bitops, "macs": max_macs, "params": max_params, "latency": max_latency_ms,
    }  # fmt: skip
    texts = [*(limit or []), *(f"{name}<={value}" for name, value in limits.items() if value is not None)]
    known = records[0].values if records else {}
    if max_latency_ms is not None and "latency" not in known:
        other = "--limit 'predicted_latency<=...'" if "predicted_latency" in known else "another limit"
        raise InputError(
            f"the search in {directory} did not measure latency: it is none of its objectives. Give {other}, or search "
            "with latency in search.objectives."
        )
    bounds = [parse_bound(text, known) for text in texts]
    record = (pick_knee if at_knee else pick_record)(records, goals, bounds)
    units = {**COST_UNITS, **{goal.name: goal.unit for goal in goals}}
    rows: list[dict[str, object]] = [
        {"name": name, "value": value, "unit": units.get(name, "")} for name, value in record.values.items()
    ]
    output.table(rows, title=f"subnet {record.subnet.id}",
                 value={"id": record.subnet.id, "subnet": dict(record.subnet), "values": dict(record.values)})  # fmt: skip


def add_commands(app: typer.Typer) -> None:
    """Registers the commands."""
    for command in (search, worker, pick):
        app.command()(command)
