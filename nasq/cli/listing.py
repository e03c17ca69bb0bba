"""Commands that list what is installed: spaces, proxies, targets, and the state of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasq.cli.output import Json, Output, Quiet
from nasq.errors import InputError, TargetError

if TYPE_CHECKING:
    from nasq.space import Choice, SearchSpace

__all__ = ["add_commands"]


targets_app = typer.Typer(invoke_without_command=True, help="Targets, and whether a space can be shipped to one.")


def _space_row(name: str) -> dict[str, Any]:
    from nasq import plugins
    from nasq.elastic.read import read_space_of

    factory = plugins.load("search_spaces", name)
    info = plugins.space_info(factory)
    size = None if info.argument else read_space_of(factory, name).size
    shown = f"{name}:{info.argument}" if info.argument else name
    return {"name": shown, "size": size, "data": info.data, "source": info.source}


def _rows(names: Iterable[str], row: Callable[[str], dict[str, Any]], output: Output) -> list[dict[str, Any]]:
    """A row for each name; what a broken package installs is named on stderr, and the others are listed."""
    found = []
    for name in names:
        try:
            found.append(row(name))
        except InputError as error:
            output.log(f"nasq: {error}")
    return found


def spaces(
    name: Annotated[str | None, typer.Argument(help="Show the choices of one space.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the installed search spaces, or the choices of one."""
    from nasq import plugins

    output = Output(json, quiet)
    if name is None:
        rows = _rows(plugins.installed("search_spaces"), _space_row, output)
        shown = [{**row, "size": _scientific(row["size"])} for row in rows]
        output.table(shown, value=rows)
        return
    from nasq.elastic.read import read_space_of

    factory = plugins.load("search_spaces", name)
    space, info = read_space_of(factory, name), plugins.space_info(factory)
    rows = [_choice_row(space, choice) for choice in space.choices]
    output.table(rows, title=f"{name}: {_scientific(space.size)} subnets before bits")
    if not json:
        for label, text in (
            ("source", info.source), ("published", info.published), ("data", info.data),
            ("rules", space.rules.name if space.rules else ""), ("no integer form", info.float_only),
        ):  # fmt: skip
            if text:
                output.log(f"{label}: {text}")


def _choice_row(space: SearchSpace, choice: Choice) -> dict[str, Any]:
    return {
        "choice": choice.name,
        "count": len(choice.options),
        "options": " ".join(map(str, choice.options)),
        "default": str(choice.default),
        "only if": space.when(choice.name),
    }


def _scientific(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size:,}" if size < 10**9 else f"{float(size):.2e}"


def proxies(json: Json = False, quiet: Quiet = False) -> None:
    """List the installed zero-cost proxies."""
    from nasq import plugins

    output = Output(json, quiet)
    output.table(_rows(plugins.installed("proxies"), _proxy_row, output))


def _proxy_row(name: str) -> dict[str, Any]:
    from nasq.ranking import load_proxy

    proxy = load_proxy(name)
    needs = [text for text, needed in (("data", proxy.needs.data), ("labels", proxy.needs.labels)) if needed]
    return {"name": name, "needs": ", ".join(needs) or "nothing", "reference": proxy.reference}


@targets_app.callback()
def targets(context: typer.Context, json: Json = False, quiet: Quiet = False) -> None:
    """List the targets."""
    if context.invoked_subcommand is not None:
        return
    from nasq import targets as known

    rows = []
    for name in known.names():
        target = known.load(name)
        bits = "-".join(map(str, sorted({min(target.weight_bits), max(target.weight_bits)})))
        rows.append({"name": name, "runtime": target.runtime, "bits": bits, "sums": target.add,
                     "here": target.unusable() or "yes", "description": target.description})  # fmt: skip
    Output(json, quiet).table(rows)


@targets_app.command("check")
def check(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="An installed search space.")],
    target: Annotated[str, typer.Option(help="Which target.")] = "onnxruntime-cpu",
    subnets: Annotated[int, typer.Option(min=2, help="How many untrained subnets to export and run.")] = 4,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export untrained subnets of a space, run them, and say per layer what the target does with it."""
    from nasq import plugins
    from nasq import targets as known

    output = Output(json, quiet)
    if reason := known.load(target).unusable():
        raise TargetError(f"the target {target!r} cannot be checked here: {reason}.")
    factory = plugins.load("search_spaces", space)
    import torch

    from nasq.quant import quantize
    from nasq.run.check import check_target, noise, require_passed
    from nasq.supernet import Supernet

    shape = plugins.space_info(factory).input_shape
    every = ("symmetric", "asymmetric")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = factory()
    supernet = Supernet(
        quantize(network, torch.zeros(1, *shape), target, weight_symmetry=every, activation_symmetry=every), space
    )
    found = check_target(supernet, noise(shape, 64), Supernet(network), subnets)
    rows: list[dict[str, object]] = [
        {"layer": one.path, "kind": one.kind, "kernel": "integer" if one.integer else "float",
         "integers": "equal" if one.exact else "DIFFER",
         "vs fp32": "" if one.speedup is None else f"{one.speedup:.2f}x" + (" (slower)" if one.speedup < 1 else "")}
        for one in found.layers
    ]  # fmt: skip
    output.table(
        rows,
        title=f"{space} on {target}: {found.differing} of {found.total} final integers differ",
        value=_plain(found),
    )
    if not json:
        notes = {"removed": found.removed, "slow": found.slow, "not tried": found.missed}
        for text in (f"{note}: {one}" for note, texts in notes.items() for one in texts):
            output.log(text)
        if found.speedup is not None:
            output.log(f"largest subnet, batch 1, one thread: {found.speedup:.2f}x the speed of fp32")
    require_passed(found)


def _plain(found: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "passed": found.passed}


def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """What is installed, what this machine can do, and what to install for more."""
    from nasq.cli.doctor import findings

    rows = findings()
    Output(json, quiet).table(rows)
    if any(row["state"] == "missing" for row in rows):
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands to the program."""
    app.command()(spaces)
    app.command()(proxies)
    app.add_typer(targets_app, name="targets")
    app.command()(doctor)
