"""Commands that score subnets without training them, and that learn to rank from a few trained ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from nasq.cli.output import Json, Output, Quiet
from nasq.cli.progress import TerminalBar
from nasq.errors import InputError, NasqError

__all__ = ["add_commands"]


ranker_app = typer.Typer(no_args_is_help=True, help="Learn to rank subnets from node-wise statistics (ParZC).")

EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""


class ScoreProgress(TerminalBar):
    """Rows, rate and time left: a bar on a terminal, a line now and then elsewhere."""

    counted = True

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.began: tuple[float, int] | None = None
        self.said = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Told after every row."""
        import time

        now = time.perf_counter()
        if self.began is None:
            self.began = now, done
            if self.bar is not None:
                self.bar.add_task("score", total=total, completed=done, rate="")
            return
        began, before = self.began
        rate = (done - before) / max(now - began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, rate=f"{rate:.2f} subnets/s")
        elif now - self.said > EVERY or done == total:
            self.said = now
            self.output.log(
                f"{now - began:6.0f} s  {done}/{total} subnets, {rate:.2f}/s, {(total - done) / rate:.0f} s left"
            )


def _bits(text: str | None, option: str) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InputError(f"{option} is {text!r}. Give whole numbers with commas between them, such as 2,4,8.") from None


def score(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="An installed search space.")],
    out: Annotated[Path, typer.Option(metavar="FILE.csv", help="Continued where it holds the same settings.")],
    proxy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="'nasq proxies' lists them; repeatable.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many subnets, at random.")] = None,
    subnets: Annotated[Path | None, typer.Option(metavar="FILE", help="Subnets or official names instead.")] = None,
    data: Annotated[str | None, typer.Option(metavar="NAME", help="A data set; default: the space's own.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where the images are.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    inherit: Annotated[bool, typer.Option("--inherit", help="Weights of one supernet, not initialised anew.")] = False,
    weight_bits: Annotated[str | None, typer.Option(metavar="2,4,8", help="Quantize the space first.")] = None,
    activation_bits: Annotated[str | None, typer.Option(metavar="2,4,8")] = None,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Also the node-wise statistics that ParZC learns from.")
    ] = False,
    output_index: Annotated[int | None, typer.Option("--output", help="Which element of a tuple.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="At most so many images at once.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score subnets with zero-cost proxies: a CSV that is valid at any moment and goes on after a kill."""
    from nasq.run.score import ScoreJob, run_score

    output = Output(json, quiet)
    job = ScoreJob(
        space, tuple(proxy or ()), out, count, subnets, data, data_root, batch, seed, inherit,
        _bits(weight_bits, "--weight-bits"), _bits(activation_bits, "--activation-bits"), nodes, output_index, chunk,
    )  # fmt: skip
    with ScoreProgress(output) as progress:
        if workers > 1 and "RANK" not in os.environ:
            _share(workers)
        facts = run_score(job, progress)
    for name, bad in facts["not_finite"].items():
        output.log(f"{name}: {bad} of {facts['rows']} values are NaN or infinite")
    output.result(facts, f"scores           {facts['out']} ({facts['rows']} of {facts['of']} subnets)")


def _share(workers: int) -> None:
    """Runs this very command in several processes, each with its share; this one then finishes the file."""
    command = [sys.executable, "-c", "from nasq.cli.main import main; main()", *sys.argv[1:], "--quiet"]
    started = []
    for rank in range(workers):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [one.wait() for one in started]
    if any(codes):
        raise NasqError(
            f"{sum(map(bool, codes))} of {workers} processes failed; what they wrote is kept. Run it again."
        )


@ranker_app.command("fit")
def ranker_fit(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.csv", help="Made by 'nasq score --nodes'.")],
    table: Annotated[Path, typer.Argument(metavar="TABLE.csv", help="What subnets are worth.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the ranker goes.")],
    metric: Annotated[str | None, typer.Option(help="Column of the table; default: its first.")] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Train on so many of them; the rest tests.")] = None,
    features: Annotated[str, typer.Option(help="slots, or packed as in the paper.")] = "slots",
    loss: Annotated[str, typer.Option(help="kendall, pairwise, mse, or several with a plus.")] = "kendall",
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    members: Annotated[int, typer.Option(min=1, help="Networks of the ensemble.")] = 3,
    choices: Annotated[bool, typer.Option("--choices", help="Also learn from the subnets' choices.")] = False,
    proxy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Also learn from the rank by this column; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn to rank from the node-wise statistics of subnets that a table knows."""
    from nasq.ranking.ranker import RankerConfig
    from nasq.run.ranker import fit_ranker

    config = RankerConfig(
        kind=features,  # type: ignore[arg-type]
        loss=loss,
        epochs=epochs,
        members=members,
        seed=seed,
        choices=choices,
        scores=tuple(dict.fromkeys(proxy or ())),
    )
    facts = fit_ranker(scores, table, out, metric, count, config)
    tau = "" if facts["kendall"] is None else f", Kendall {facts['kendall']:.3f} on the other {facts['tested_on']}"
    Output(json, quiet).result(facts, f"ranker           {out} (trained on {facts['trained_on']} subnets{tau})")


@ranker_app.command("apply")
def ranker_apply(
    ranker: Annotated[Path, typer.Argument(metavar="RANKER", help="Made by 'nasq ranker fit'.")],
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES.csv", help="Made by 'nasq score --nodes' on the same space.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.csv")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank subnets with a fitted ranker: a file of scores with a score and its uncertainty."""
    from nasq.run.ranker import apply_ranker

    facts = apply_ranker(ranker, scores, out)
    Output(json, quiet).result(facts, f"scores           {facts['out']} ({facts['rows']} subnets)")


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands to the program."""
    app.command()(score)
    app.add_typer(ranker_app, name="ranker")
