"""``nasq table build``: trains subnets alone, with several processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nasq.cli.output import Json, Output, Quiet
from nasq.errors import InputError, NasqError, choose_from

__all__ = ["build"]

KEYS = ("data", "device", "seed", "space_arguments", "threads", "train")
"""What of a run's configuration a table's trainings have."""


def build(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="An installed search space.")],
    out: Annotated[
        Path, typer.Option(metavar="TABLE.csv", help="The table; the work lies beside it, in TABLE.csv.work.")
    ],
    count: Annotated[int | None, typer.Option(min=1, help="So many random subnets; without it, all of them.")] = None,
    subnets: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="A file that names the subnets.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each subnet.")] = 1,
    train_images: Annotated[float | None, typer.Option(help="A share of the training images, or how many.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of a run: data.root, train.epochs, ..."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train subnets alone and write what they are worth; killed at any moment, the same command goes on.

    The same command on several machines that share the directory divides the work among them.
    """
    from nasq.run.config import load_config

    output = Output(json, quiet)
    if count is not None and subnets is not None:
        raise InputError("--count and --subnets were both given. Give one of them.")
    if out.is_dir():
        raise InputError(f"{out} is a directory, and the table goes to a file. Give another: --out FILE.csv.")
    _require_keys(set_ or [])
    changes = [f"space={space}", *(set_ or [])]
    if workers > 1 and not any(change.startswith("threads=") for change in changes):
        changes.append("threads=1")
    load_config(None, None, changes)
    images = int(train_images) if train_images is not None and train_images >= 1 else train_images
    order: dict[str, Any] = {"directory": Path(f"{out}.work"), "changes": changes, "count": count, "file": subnets,
                             "seeds": seeds, "images": images}  # fmt: skip
    opened = _open(order, None)
    total = len(opened.jobs)
    if workers == 1:
        opened.listener = _told(output, opened, total)
        opened.work()
    else:
        _share(order, workers, opened, output)
    missing = total - opened.done()
    table = opened.table()
    table.write(out)
    failed = opened.failed()
    for line in failed:
        output.log(f"failed: {line}")
    if missing:
        output.log(
            f"{missing} of {total} trainings are not done: another process is at them. Run the command again later."
        )
    facts = {
        "table": str(out),
        "subnets": len(table),
        "trainings": total - missing,
        "missing": missing,
        "failed": failed,
    }
    output.result(
        facts, f"table            {out}\nsubnets          {len(table)}\ntrainings        {total - missing} of {total}"
    )


def _require_keys(changes: Sequence[str]) -> None:
    """Refuses settings of a search: a table's trainings have none, so they would be ignored."""
    for change in changes:
        key = change.partition("=")[0].partition(".")[0].strip()
        if "=" in change and key not in KEYS:
            raise choose_from("setting of 'nasq table build'", key, KEYS, f"It was in --set {change!r}.")


def _open(order: dict[str, Any], listener: Callable[[Any], None] | None) -> Any:
    from nasq.run.config import load_config
    from nasq.run.table_build import Selection, TableBuild

    config = load_config(None, None, order["changes"])
    return TableBuild(
        order["directory"], config, Selection(order["count"], order["file"]), order["seeds"], order["images"], listener
    )


def _told(output: Output, opened: Any, total: int) -> Callable[[Any], None]:
    def tell(event: Any) -> None:
        shown = f"{100 * event['valid_acc']:.2f} %" if "valid_acc" in event else "failed"
        output.log(f"{opened.done()} of {total}: {event['subnet']}, seed {event['seed']}, validation {shown}")

    return tell


def _work(order: dict[str, Any]) -> None:
    """In a process of its own."""
    import sys

    try:
        _open(order, None).work()
    except NasqError as error:
        sys.stderr.write(f"nasq: {error}\n")
        raise SystemExit(error.exit_code) from None


def _share(order: dict[str, Any], workers: int, opened: Any, output: Output) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(order,), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    before = -1
    while any(process.is_alive() for process in processes):
        done = opened.done()
        if done != before:
            output.log(f"{done} of {len(opened.jobs)} trainings")
            before = done
        time.sleep(0.5)
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise NasqError(
            f"{len(codes)} of {workers} workers ended with the exit code {codes[0]}. What they finished is kept; run the "
            "command again."
        )
