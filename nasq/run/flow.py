"""The whole flow: check, train, search, export, bench, report; every stage goes on where it was."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, cast

import torch

from nasq.errors import ArtifactError, InputError, TargetError
from nasq.files import read_json, write_json
from nasq.run.assemble import Workshop, assemble, build_network
from nasq.run.bench import bench
from nasq.run.check import check_target, require_passed
from nasq.run.config import RunConfig
from nasq.run.directory import RunDirectory
from nasq.run.export import export, export_subnet
from nasq.run.finetune import finetune
from nasq.run.latency import table_for
from nasq.run.ranks import train_in_ranks
from nasq.run.search import Evaluation, explanation, require_objectives, search
from nasq.run.sharing import SearchOptions
from nasq.run.summary import facts, report
from nasq.run.train import OnStep, load_trained, require_plan, require_trained, split, train, trained
from nasq.search import Record, infeasible
from nasq.supernet import Supernet
from nasq.targets import load as load_target
from nasq.training.distributed import World

__all__ = ["STAGES", "open_workshop", "prepare", "run_flow", "stage"]

STAGES = ("check", "train", "split", "search", "export", "finetune", "bench", "report")


@contextlib.contextmanager
def _timed(run: RunDirectory, name: str) -> Iterator[None]:
    run.tell({"event": "stage.started", "stage": name})
    began = time.perf_counter()
    yield
    run.tell({"event": "stage.done", "stage": name, "seconds": round(time.perf_counter() - began, 3)})


def prepare(config: RunConfig) -> Workshop:
    """Builds a run's objects, with initial weights, and refuses what could not work; writes nothing.

    Raises:
        InputError: An unknown name, a device that is not there, constraints that nothing survives.
    """
    _require_alone()
    _require_device(config.device)
    _require_exportable(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    workshop = assemble(config)
    require_objectives(workshop)
    if config.search.latency_table is not None:
        table_for(config, config.search.latency_table)  # training takes hours, and the search would refuse it then
    require_plan(workshop)
    found = explanation(workshop)
    if found is not None and not found.feasible:
        raise infeasible(found)
    return workshop


def _require_alone() -> None:
    """Refuses to run several times at once, as torchrun would have it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and World.current().size == 1:
        raise InputError(
            f"torchrun started this command {count} times, and a run starts the processes of its training itself. Start it "
            f"once, with --set processes={count}."
        )


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".") + "."  # torch goes on for a screen
        raise InputError(f"the device {name!r} cannot be used: {reason} Allowed on every machine: cpu.") from error


def _require_exportable(config: RunConfig) -> None:
    """Refuses what only the export at the end of a run would refuse."""
    if (
        "asymmetric" in config.quantization.weight_symmetry
        and "asymmetric" in load_target(config.target).weight_symmetry
    ):
        raise TargetError(
            f"the target {config.target!r} takes asymmetric weights, but a run exports ONNX files, which do not hold "
            "them. Leave 'asymmetric' out of quantization.weight_symmetry, or take the target 'onnxruntime-cpu'."
        )


def open_workshop(run: RunDirectory, workshop: Workshop | None = None) -> Workshop:
    """The run's objects (``workshop`` where they are made already), with trained weights where there are some."""
    workshop = workshop or prepare(run.config())
    _require_same_data(run, workshop)
    if trained(run):
        load_trained(run, workshop)
    return workshop


def _require_same_data(run: RunDirectory, workshop: Workshop) -> None:
    """Refuses images other than those that the run began with; a new run notes which those are."""
    path, data = run.path / "data.json", workshop.data
    now = {"name": data.name, "fingerprint": data.fingerprint}
    if not path.exists():
        write_json(path, now)
    elif (before := read_json(path)) != now:
        raise InputError(
            f"the data set changed: the run in {run.path} began with {before}, and now it is {now}. Restore the images, or "
            "begin another run: --out."
        )


def _check(run: RunDirectory, workshop: Workshop) -> None:
    """Refuses a space that the target cannot run, before anything is trained; notes what survives the constraints."""
    found = explanation(workshop)
    if found is not None:
        write_json(run.search / "explanation.json", found.to_json())
    if not workshop.config.check_target or (run.path / "check.json").exists():
        return
    # A workshop of its own: the check calibrates step sizes, and training starts from untouched ones.
    other = assemble(workshop.config)
    images = other.data.normalise(other.data.train.images[:64])
    plain = Supernet(build_network(other.config, other.data))
    result = check_target(cast(Supernet, other.supernet), images, plain)
    require_passed(result)
    facts_of_check = {
        "target": result.target, "subnets": result.subnets, "differing": result.differing, "total": result.total,
        "layers": len(result.layers), "speedup": result.speedup, "removed": list(result.removed),
    }  # fmt: skip
    write_json(run.path / "check.json", facts_of_check)
    run.tell({"event": "check.done", **facts_of_check})


def _search(run: RunDirectory, workshop: Workshop, options: SearchOptions | None = None) -> None:
    evaluation = Evaluation(workshop)

    def keep(record: Record) -> None:
        # best/ is always the best so far, through the gate like every other bundle.
        export_subnet(workshop, evaluation, record.subnet, run.best)

    front = search(run, workshop, evaluation, keep, options)
    write_json(run.search / "front.json", [record.subnet.id for record in front])


def stage(
    run: RunDirectory,
    workshop: Workshop,
    name: str,
    on_step: OnStep | None = None,
    options: SearchOptions | None = None,
) -> Any:
    """Runs one stage on a run directory whose lock is held; returns what the stage returns. ``options`` are the search's."""
    if name in ("search", "export", "finetune", "bench"):
        require_trained(run)
        if workshop.config.split.epochs and not _done(run, "split"):
            raise ArtifactError(f"the supernet in {run.path} is not split yet. Split it first: nasq split {run.path}")
    with _timed(run, name):
        if name == "check":
            return _check(run, workshop)
        if name in ("train", "split") and workshop.config.processes > 1:
            return train_in_ranks(run, workshop.config, name, on_step)
        if name == "train":
            return train(run, workshop, on_step)
        if name == "split":
            return split(run, workshop, on_step)
        if name == "search":
            return _search(run, workshop, options)
        if name == "export":
            return export(run, workshop, Evaluation(workshop))
        if name == "finetune":
            return finetune(run, workshop, on_step=on_step)
        if name == "bench":
            return bench(run, workshop)
        assert name == "report"
        return report(run)


def _done(run: RunDirectory, name: str) -> bool:
    marks = {
        "train": run.supernet / "supernet.json", "split": run.forest / "forest.json", "search": run.search / "front.json",
        "export": run.exports / "index.json", "finetune": run.path / "finetune" / "index.json",
        "bench": run.path / "bench.json",
    }  # fmt: skip
    return name in marks and marks[name].exists()


def _wanted(run: RunDirectory, workshop: Workshop, name: str) -> bool:
    """Whether a run as a whole has this stage to do."""
    if name == "check":
        return not _done(run, "train")
    if name == "finetune":
        return workshop.config.finetune is not None
    return name != "split" or bool(workshop.config.split.epochs)


def run_flow(run: RunDirectory, on_step: OnStep | None = None, workshop: Workshop | None = None) -> dict[str, Any]:
    """Runs every stage that is not done yet.

    Args:
        run: Its lock is held by the caller.
        on_step: Called with ``(phase, steps done, steps)`` while training.
        workshop: What :func:`prepare` made of the run's configuration; ``None`` makes it here.

    Returns:
        The numbers the run ends with; see :func:`nasq.run.summary.facts`.
    """
    workshop = open_workshop(run, workshop)
    for name in STAGES:
        if not _done(run, name) and _wanted(run, workshop, name):
            stage(run, workshop, name, on_step)
        if name in ("train", "split"):
            load_trained(run, workshop)
    found = facts(run)
    write_json(run.path / "summary.json", found)
    return found
