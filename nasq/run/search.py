"""The search stage: integer accuracy on validation images against costs, under hard constraints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasq.cost import COSTS
from nasq.data import Split
from nasq.deploy import onnx
from nasq.deploy.bench import bench
from nasq.deploy.runtimes import OnnxRuntime
from nasq.errors import ArtifactError, InputError, choose_from
from nasq.files import read_json, write_json
from nasq.quant import freeze
from nasq.run.assemble import Workshop, recalibration_images
from nasq.run.cascade import cascade_of, require_cascade
from nasq.run.directory import RunDirectory
from nasq.run.latency import predicted_latency
from nasq.run.sharing import Crew, SearchOptions, shared_study
from nasq.search import (
    Algorithm,
    Constraint,
    Explanation,
    Goal,
    Measure,
    Objective,
    ObjectiveEvaluator,
    Record,
    Study,
    explain,
    front,
    load_results,
    measures,
    parse_constraints,
    pick,
    transferred,
    uniform_starts,
)
from nasq.search.algorithms import make_algorithm
from nasq.search.cascade import Cascade
from nasq.search.workers import Dispatcher
from nasq.space import Subnet
from nasq.supernet import BNState

__all__ = [
    "Evaluation",
    "best_record",
    "constraints_of",
    "evaluator_of",
    "explanation",
    "require_objectives",
    "search",
    "search_results",
]


class Evaluation:
    """Integer accuracy of subnets with BatchNorm statistics of their own.

    What it returns is what the exported file reaches on the same images: both run the same integers.

    Args:
        workshop: With trained weights.
    """

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        settings = workshop.config.search
        data = workshop.data
        device = next(workshop.supernet.parameters()).device
        images = recalibration_images(workshop.config, data, settings.recalibration_images).to(device)
        self.batches = [data.normalise(part) for part in torch.split(images, settings.batch_size)]
        self._statistics: dict[tuple[str, int], BNState] = {}

    def statistics(self, subnet: Subnet) -> BNState:
        """The subnet's BatchNorm statistics; kept for the present weights."""
        key = (subnet.id, self.workshop.supernet.version)
        if key not in self._statistics:
            self._statistics[key] = self.workshop.supernet.recalibrate(subnet, self.batches)
        return self._statistics[key]

    def integers(self, subnet: Subnet, split: Split, statistics: BNState | None = None) -> Tensor:
        """The final container integers ``[N, classes]`` of every image of a split, uint8; by default with its statistics."""
        supernet, data = self.workshop.supernet, self.workshop.data
        device = self.batches[0].device
        supernet.eval()
        with supernet.activate(subnet, statistics or self.statistics(subnet)):
            parts = [
                self.workshop.network.integers(data.normalise(images.to(device)))
                for images, _ in split.batches(self.workshop.config.search.batch_size)
            ]
        return torch.cat(parts)

    def accuracy(self, subnet: Subnet, split: Split | None = None) -> float:
        """Share of images classified right, 0..1; on the validation split by default. Ties go to the lower class."""
        split = split or self.workshop.data.validation
        classes = np.argmax(self.integers(subnet, split).cpu().numpy(), axis=1)
        return float((classes == split.labels.cpu().numpy()).mean())

    def latency(self, subnet: Subnet) -> float:
        """Median milliseconds of the subnet's file in the runtime, for ``search.latency_batch`` images."""
        workshop = self.workshop
        supernet, data, config = workshop.supernet, workshop.data, workshop.config
        supernet.eval()
        with supernet.activate(subnet, self.statistics(subnet)):
            program = freeze(workshop.network)
        runtime = OnnxRuntime(onnx.export(program), config.bench.threads, workshop.network.target.session)
        images = data.normalise(data.validation.images[: config.search.latency_batch]).cpu().numpy()
        return bench({"file": runtime.run}, images, repeats=config.bench.repeats)["file"].median


def _measures(workshop: Workshop) -> dict[str, Measure]:
    return measures(workshop.costs.evaluate, {name: _UNITS.get(name, "") for name in COSTS})


_UNITS = {"bytes": "B"}
_ACCURACY, _LATENCY, _PREDICTED = "accuracy", "latency", "predicted_latency"


def constraints_of(workshop: Workshop) -> list[Constraint]:
    """The run's hard constraints."""
    return parse_constraints(workshop.config.search.constraints, _measures(workshop))


def explanation(workshop: Workshop, others: Sequence[str] = ()) -> Explanation | None:
    """How much of the space survives the run's constraints, or ``others``; ``None`` without constraints."""
    constraints = parse_constraints(others, _measures(workshop)) if others else constraints_of(workshop)
    if not constraints:
        return None
    return explain(workshop.supernet.space, constraints, np.random.default_rng(workshop.config.seed))


def require_objectives(workshop: Workshop) -> None:
    """Refuses objectives that cannot be searched for.

    Raises:
        InputError: None, an unknown one (the nearest is suggested), or one that is there twice.
    """
    names = workshop.config.search.objectives
    allowed = [_ACCURACY, *_measures(workshop)]
    if workshop.network.target.runtime == "onnxruntime":
        allowed.append(_LATENCY)
    if workshop.config.search.latency_table is not None:
        allowed.append(_PREDICTED)
    if not names:
        raise InputError(f"search.objectives is empty; give at least one of {', '.join(allowed)}.")
    for name in names:
        if name not in allowed:
            raise choose_from("objective", name, allowed)
        if names.count(name) > 1:
            raise InputError(f"search.objectives holds {name!r} twice; name each objective once.")
    if workshop.config.search.algorithm == "nsga3" and len(names) < 2:
        raise InputError(
            f"search.algorithm is 'nsga3', for several objectives, and there is only {names[0]!r}. Take nsga2."
        )
    if workshop.config.search.cascade.levels:
        require_cascade(workshop)


def _objectives(workshop: Workshop, evaluation: Evaluation) -> list[Objective]:
    require_objectives(workshop)
    known = _measures(workshop)
    measured = {
        _ACCURACY: Objective(_ACCURACY, "", "maximize", evaluation.accuracy),
        _LATENCY: Objective(_LATENCY, "ms", "minimize", evaluation.latency),
    }
    table = workshop.config.search.latency_table
    if table is not None:
        predicted = predicted_latency(workshop, evaluation, table)
        measured[_PREDICTED] = Objective(_PREDICTED, "ms", "minimize", predicted)
    return [
        measured.get(name) or Objective(name, known[name].unit, "minimize", known[name].function, on="rows")
        for name in workshop.config.search.objectives
    ]


def evaluator_of(workshop: Workshop, evaluation: Evaluation) -> tuple[list[Objective], ObjectiveEvaluator | Cascade]:
    """The objectives of a run, and what gives its subnets their values."""
    objectives = _objectives(workshop, evaluation)
    measures = list(_measures(workshop).values())
    if workshop.config.search.cascade.levels:
        return objectives, cascade_of(workshop, evaluation, objectives, measures)
    return objectives, ObjectiveEvaluator(workshop.supernet.space, objectives, measures)


def _warm_start(run: RunDirectory, workshop: Workshop, other: Path | None) -> list[Subnet]:
    """The subnets of another run's front that a search began with, or begins with now; feasible ones only.

    Raises:
        InputError: The search began already, from other subnets; or nothing of the other run can be used.
    """
    file = run.search / "warm_start.json"
    kept = [Subnet(one) for one in read_json(file)["subnets"]] if file.exists() else []
    if other is None:
        return kept
    goals, records = search_results(RunDirectory.open(other))
    found = transferred(
        workshop.supernet.space, constraints_of(workshop), [one.subnet for one in front(records, goals)]
    )
    if (run.search / "state.json").exists():
        if found != kept:
            began = f"from {len(kept)} subnets of {read_json(file)['run']}" if kept else "without a warm start"
            raise InputError(
                f"the search in {run.search} began {began}. Go on without --warm-start, or begin another run."
            )
    else:
        write_json(file, {"run": str(other), "subnets": [dict(subnet) for subnet in found]})
        run.tell({"event": "search.warm_start", "run": str(other), "subnets": len(found)})
    return found


def _algorithm(
    workshop: Workshop, evaluation: Evaluation, objectives: Sequence[Objective], first: Sequence[Subnet] = ()
) -> Algorithm:
    settings = workshop.config.search
    space, constraints = workshop.supernet.space, constraints_of(workshop)
    population = min(settings.population, settings.evaluations)
    starts = uniform_starts(space, constraints) if settings.uniform_starts else []
    return make_algorithm(
        settings.algorithm,
        space,
        objectives,
        constraints,
        population=population,
        batch=settings.batch,
        partial=_partly(workshop, evaluation, objectives),
        seed=workshop.config.seed,
        initial=[*dict.fromkeys([*first, *starts])][:population],
    )


def _partly(
    workshop: Workshop, evaluation: Evaluation, objectives: Sequence[Objective]
) -> Callable[[Subnet, float], dict[str, float]]:
    """Values at a fidelity: accuracy on evenly spaced validation images, that share of them; all else as always."""
    validation, space = workshop.data.validation, workshop.supernet.space

    def values(subnet: Subnet, fidelity: float) -> dict[str, float]:
        chosen = torch.linspace(0, len(validation) - 1, max(1, round(fidelity * len(validation)))).long()
        part = Split(validation.images[chosen], validation.labels[chosen])
        rows = space.to_rows([subnet])
        cheap = {one.name: float(one.measure(rows)[0]) for one in objectives if one.on == "rows"}
        costly = {one.name: one.evaluate(subnet) for one in objectives if one.on != "rows" and one.name != _ACCURACY}
        if not any(one.name == _ACCURACY for one in objectives):
            return {**cheap, **costly}
        return {**cheap, **costly, _ACCURACY: evaluation.accuracy(subnet, part)}

    return values


def search(
    run: RunDirectory,
    workshop: Workshop,
    evaluation: Evaluation | None = None,
    on_better: Callable[[Record], None] | None = None,
    options: SearchOptions | None = None,
) -> tuple[Record, ...]:
    """Searches, or goes on; ``search/subnets.csv`` is current after each evaluation. Returns the front.

    Args:
        run: Its lock is held by the caller.
        workshop: With trained weights.
        evaluation: Of these weights.
        on_better: Called with the best subnet so far when a generation begins and it is another one than before.
        options: Workers, storage, warm start.

    Raises:
        InfeasibleError: The constraints leave nothing; says how much survives each of them.
    """
    options = options or SearchOptions()
    evaluation = evaluation or Evaluation(workshop)
    objectives, evaluator = evaluator_of(workshop, evaluation)
    first = _warm_start(run, workshop, options.warm_start)
    shared = shared_study(run, workshop, objectives, evaluator.names, options)
    told: list[str] = []

    def listen(event: Mapping[str, Any]) -> None:
        run.tell(event)
        if on_better is None or event["event"] != "search.generation" or not study.records:
            return
        best = best_record(objectives, study.records)
        if told[-1:] != [best.subnet.id]:
            told.append(best.subnet.id)
            on_better(best)

    with contextlib.ExitStack() as stack:
        dispatcher = None
        if options.shared_work:
            crew = stack.enter_context(Crew(run, shared.name, options, run.tell))
            dispatcher = stack.enter_context(
                Dispatcher(
                    shared, workshop.supernet.space, constraints_of(workshop), evaluator.known, check=crew.dead,
                    on_event=run.tell,
                )
            )  # fmt: skip
        algorithm = _algorithm(workshop, evaluation, objectives, first)
        study = Study(run.search, algorithm, evaluator, listen, shared=shared, dispatcher=dispatcher)
        return study.run(workshop.config.search.evaluations).front


def search_results(run: RunDirectory) -> tuple[tuple[Goal, ...], tuple[Record, ...]]:
    """Goals and every evaluated subnet of a run.

    Raises:
        ArtifactError: Nothing was searched.
    """
    if not (run.search / "state.json").exists():
        raise ArtifactError(f"{run.path} holds no search. Search first: nasq search {run.path}")
    return load_results(run.search)


def best_record(goals: Sequence[Goal], records: Sequence[Record]) -> Record:
    """The best by the first goal; ties go to the next goals."""
    return pick(records, goals)
