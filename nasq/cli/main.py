"""The command line. Commands are thin: they read options, call the library, and hand the result to the output."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nasq.cli.output import Json, Output, Quiet
from nasq.cli.process import Interrupted, interrupt, open_closed_streams, refused_by_system, what_goes_on
from nasq.errors import InputError, NasqError
from nasq.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="nasq",
    help="Neural architecture search with quantization supernets, exported bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"nasq {__version__}\n")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Neural architecture search with quantization supernets, exported bit for bit."""


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="A configuration file.")] = None,
    preset: Annotated[str | None, typer.Option(help="A configuration that comes with nasq, such as digits.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory; default runs/NAME.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    data_root: Annotated[Path | None, typer.Option(help="Where the images are (data.root).")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow downloading the images.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Scale images to this side (data.image_size).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole flow: check the target, train, search, export, benchmark, report."""
    from nasq.run.config import load_config

    output = Output(json, quiet)
    changes = list(set_ or [])
    if data_root is not None:
        quoted = str(data_root.resolve()).replace("'", "''")
        changes.append(f"data.root='{quoted}'")
    if download:
        changes.append("data.download=true")
    if image_size is not None:
        changes.append(f"data.image_size={image_size}")
    if config is None and preset is None:
        if resume and out is not None:
            config = _kept_configuration(out)
        else:
            preset = "digits"
            output.log("no configuration given: taking --preset digits")
    settings = load_config(config, preset, changes)
    directory = out or Path("runs") / (preset if config is None else config.stem)  # type: ignore[operator]
    from nasq.cli.progress import RunProgress
    from nasq.run.directory import RunDirectory

    with RunProgress(output) as progress:
        made = RunDirectory.create(directory, settings, resume, progress.event)
        from nasq.run.flow import prepare, run_flow

        workshop = prepare(settings)
        with made:
            facts = run_flow(made, progress.step, workshop)
    output.result(facts, _ending(facts))


def _kept_configuration(directory: Path) -> Path:
    """Where the run to go on with keeps its configuration; a mistyped directory is no reason to begin another run."""
    config = directory / "config.yaml"
    if not config.exists():
        raise InputError(
            f"{directory} holds no run to go on with: config.yaml is missing. Give the directory of a run, or a "
            "configuration (CONFIG.yaml or --preset NAME) to begin one there."
        )
    return config


def _ending(facts: dict[str, Any]) -> str:
    sizes = facts.get("sizes", {})
    ratio = sizes.get("ratio model.safetensors")
    smaller = f" ({1 / ratio:.1f}x smaller than fp32)" if ratio else ""
    lines = [
        f"best subnet      {facts['subnet']}",
        f"test accuracy    {100 * facts['test_accuracy']:.2f} % (exported file, {facts['test_images']} images)",
        f"size             {facts['weights_bytes'] / 1000:.1f} kB weights{smaller}, {facts['onnx_bytes'] / 1000:.1f} kB ONNX",
    ]
    if "latency_ms" in facts:
        where = f"{facts['latency_runtime']}, batch {facts['latency_batch']}"
        lines.append(f"latency          {facts['latency_ms']:.3f} ms ({where})")
    return "\n".join([*lines, f"best bundle      {facts['best']}", f"report           {facts['report']}"])


def _stage(directory: Path, name: str, output: Output) -> Any:
    from nasq.cli.progress import RunProgress
    from nasq.run.directory import RunDirectory
    from nasq.run.flow import open_workshop, stage

    with RunProgress(output) as progress:
        opened = RunDirectory.open(directory, progress.event)
        with opened:
            workshop = open_workshop(opened)
            return opened, stage(opened, workshop, name, progress.step)


@app.command()
def train(directory: RunPath, json: Json = False, quiet: Quiet = False) -> None:
    """Train the supernet of a run, or go on training it."""
    output = Output(json, quiet)
    opened, _ = _stage(directory, "train", output)
    output.result({"supernet": str(opened.supernet)}, f"supernet         {opened.supernet}")


@app.command()
def split(directory: RunPath, json: Json = False, quiet: Quiet = False) -> None:
    """Split the supernet of a run where its options disagree, and train the parts."""
    output = Output(json, quiet)
    opened, _ = _stage(directory, "split", output)
    output.result({"forest": str(opened.forest)}, f"forest           {opened.forest}")


@app.command("export")
def export_(directory: RunPath, json: Json = False, quiet: Quiet = False) -> None:
    """Export the best subnets of a run, each through the parity gate."""
    output = Output(json, quiet)
    _, made = _stage(directory, "export", output)
    rows = [
        {"subnet": one.subnet.id, "validation": one.validation, "differing": one.report.differing,
         "of": one.report.total, "bundle": str(one.directory)}
        for one in made
    ]  # fmt: skip
    output.table(rows)


@app.command()
def finetune(
    directory: RunPath,
    subnet: Annotated[
        str | None, typer.Option(metavar="ID", help="An evaluated subnet; default: the best one.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one subnet of a run on alone, taught by the largest one, and export it."""
    from nasq.run.finetune import finetune as tune

    output = Output(json, quiet)
    changes = {key: value for key, value in (("epochs", epochs), ("lr", lr)) if value is not None}
    found = _worked(directory, output, lambda run, workshop, step: tune(run, workshop, None, subnet, changes, step))
    lines = [
        f"subnet           {found['id']}",
        f"validation       {100 * found['validation_before']:.2f} % before, {100 * found['validation_after']:.2f} % after",
        f"test accuracy    {100 * found['test_accuracy']:.2f} % (exported file)",
        f"bundle           {directory / found['bundle']}" + ("  (now best/)" if found["best"] else ""),
    ]
    output.result(found, "\n".join(lines))


def _worked(directory: Path, output: Output, work: Any) -> Any:
    """What ``work(run, workshop, on_step)`` returns for a run whose supernet is trained, its lock held."""
    from nasq.cli.progress import RunProgress
    from nasq.run.directory import RunDirectory
    from nasq.run.flow import open_workshop
    from nasq.run.train import require_trained

    with RunProgress(output) as progress, RunDirectory.open(directory, progress.event) as opened:
        require_trained(opened)
        return work(opened, open_workshop(opened), progress.step)


@app.command()
def bench(
    directory: RunPath,
    table: Annotated[
        bool, typer.Option("--table", help="Measure a per-layer latency table for search instead.")
    ] = False,
    subnets: Annotated[int, typer.Option(min=8, help="Subnets that the table is made of.")] = 24,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Time image files to classes instead.")] = False,
    baseline: Annotated[
        Path | None, typer.Option(help="A former bench.json: fail where something became slower.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="With --baseline: slower by this share is still the same.")] = 0.1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the best exported subnet of a run beside its fp32 form."""
    from nasq.cli import benching

    output = Output(json, quiet)
    if table:
        benching.show_table(_worked(directory, output, lambda run, shop, _: benching.table(run, shop, subnets)), output)
        return
    if end_to_end:
        benching.show_end_to_end(
            _worked(directory, output, lambda run, shop, _: benching.end_to_end(run, shop)), output
        )
        return
    before = benching.read_baseline(baseline, tolerance)
    _, found = _stage(directory, "bench", output)
    if before is not None:
        if benching.show_changes(before, found, tolerance, output):
            raise typer.Exit(1)
        return
    benching.show_rows(found, output)


@app.command()
def report(directory: RunPath, json: Json = False, quiet: Quiet = False) -> None:
    """Write report.html of a run, as far as it has come."""
    from nasq.run.directory import RunDirectory
    from nasq.run.summary import report as write

    output = Output(json, quiet)
    path = write(RunDirectory.open(directory))
    output.result({"report": str(path)}, f"report           {path}")


def _require_bundle(path: Path) -> None:
    """Refuses what is no bundle at all; a damaged one is for its reader to name."""
    if not path.is_dir():
        raise InputError(f"there is no directory {str(path)!r}. Give a bundle, such as RUN/best, or a run's directory.")
    if (path / "config.yaml").exists():
        raise InputError(f"{path} is a run, not a bundle. Its best bundle is {path / 'best'}.")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="An exported bundle.")],
    images: Annotated[int, typer.Option(min=1, help="How many random inputs to compare on.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Repeat the parity check of a bundle on this machine, in a child process with limits."""
    import numpy as np

    from nasq.deploy import bundle as bundles
    from nasq.deploy import sandbox

    output = Output(json, quiet)
    _require_bundle(bundle)
    program = bundles.read(bundle)
    spec = program.ops[0].output
    low, high = ((bound - spec.zero_point) * spec.scale for bound in (spec.low, spec.high))
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(low, high, (images, *spec.shape)).astype(np.float32)
    found = sandbox.check(bundle, inputs)
    output.result(found.to_json(), found.summary())
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|RUN", help="A bundle or a run directory.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a bundle or a run holds."""
    output = Output(json, quiet)
    if (path / "config.yaml").exists():
        from nasq.cli.showing import show_run
        from nasq.run.directory import RunDirectory

        show_run(RunDirectory.open(path), output)
        return
    from nasq.cli.showing import show_bundle

    _require_bundle(path)
    show_bundle(path, output)


def _register() -> None:
    """Commands that list what is installed live in a module of their own."""
    from nasq.cli.listing import add_commands
    from nasq.cli.scoring import add_commands as add_score_commands
    from nasq.cli.searching import add_commands as add_search_commands
    from nasq.cli.tables import add_commands as add_table_commands

    add_commands(app)
    add_search_commands(app)
    add_score_commands(app)
    add_table_commands(app)


_register()


def main() -> None:
    """Entry point: one clear line for what nasq refuses, exit code 1 (failed) or 2 (bad input)."""
    before = signal.signal(signal.SIGINT, interrupt)
    open_closed_streams()
    try:
        app(standalone_mode=True)
    except NasqError as error:
        sys.stderr.write(f"nasq: {error}\n")
        raise SystemExit(error.exit_code) from None
    except Interrupted:
        sys.stderr.write(f"nasq: interrupted{what_goes_on(sys.argv[1:])}\n")
        raise SystemExit(130) from None
    except OSError as error:
        line = refused_by_system(error)
        if not line:
            raise
        sys.stderr.write(f"nasq: {line}\n")
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGINT, before)
