"""The search stage: integer accuracy on validation images against costs, under hard constraints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nasq.cost import COSTS
from nasq.errors import ArtifactError, InputError, choose_from
from nasq.files import read_json, write_json
from nasq.run.assemble import Workshop
from nasq.run.assist import assist_of, require_assist
from nasq.run.cascade import cascade_of, require_cascade
from nasq.run.directory import RunDirectory
from nasq.run.evaluation import Evaluation
from nasq.run.fidelity import PartialValues
from nasq.run.kept import KeptValues
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
from nasq.search.algorithms.generational import Common
from nasq.search.cascade import Cascade
from nasq.search.objectives import Direction
from nasq.search.workers import Dispatcher
from nasq.space import Subnet

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


def _measures(workshop: Workshop) -> dict[str, Measure]:
    return measures(workshop.costs.evaluate, {name: _UNITS.get(name, "") for name in COSTS})


_UNITS = {"bytes": "B"}
_LARGER = {"compression"}
"""Costs of which more is better."""
_DIRECTIONS = "Give the name alone: accuracy and compression are maximized, everything else is minimized."
_ACCURACY, _LATENCY, _PREDICTED = "accuracy", "latency", "predicted_latency"


def constraints_of(workshop: Workshop) -> list[Constraint]:
    """The run's hard constraints."""
    return _limits(workshop, workshop.config.search.constraints)


def _limits(workshop: Workshop, texts: Sequence[str]) -> list[Constraint]:
    """Constraints on costs; refuses one that no network keeps."""
    found = parse_constraints(texts, _measures(workshop))
    for limit in found:
        if limit.upper is not None and limit.upper < 0:
            raise InputError(
                f"the limit {str(limit)!r} leaves nothing: {limit.name} is never negative. Give a positive limit, such "
                f"as '{limit.name}<=20k'."
            )
    return found


def explanation(workshop: Workshop, others: Sequence[str] = ()) -> Explanation | None:
    """How much of the space survives the run's constraints, or ``others``; ``None`` without constraints."""
    constraints = _limits(workshop, others or workshop.config.search.constraints)
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
            raise choose_from("objective", name, allowed, _DIRECTIONS)
        if names.count(name) > 1:
            raise InputError(f"search.objectives holds {name!r} twice; name each objective once.")
    if workshop.config.search.algorithm == "nsga3" and len(names) < 2:
        raise InputError(
            f"search.algorithm is 'nsga3', for several objectives, and there is only {names[0]!r}. Take nsga2."
        )
    if workshop.config.search.cascade.levels:
        require_cascade(workshop)
    require_assist(workshop, _measures(workshop))
    if workshop.config.search.settings:
        _require_settings(workshop)


def _require_settings(workshop: Workshop) -> None:
    """Refuses settings that the algorithm would refuse after the training."""
    search = workshop.config.search
    goals = [Objective(name, "", "maximize", lambda subnet: 0.0) for name in search.objectives]
    own = sorted(search.settings.keys() & Common.__annotations__.keys())
    if own:
        raise InputError(
            f"search.settings holds {own[0]!r}, which is no setting of one algorithm. Give search.population, search.batch, "
            "seed, search.uniform_starts or search.assist."
        )
    try:
        make_algorithm(
            search.algorithm, workshop.supernet.space, goals, partial=lambda subnet, fidelity: {}, **search.settings
        )
    except (InputError, TypeError) as error:
        raise InputError(f"search.settings do not suit {search.algorithm!r}: {error}") from error


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
    return [measured.get(name) or _cost_objective(known[name]) for name in workshop.config.search.objectives]


def _cost_objective(cost: Measure) -> Objective:
    direction: Direction = "maximize" if cost.name in _LARGER else "minimize"
    return Objective(cost.name, cost.unit, direction, cost.function, on="rows")


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
    run: RunDirectory,
    workshop: Workshop,
    evaluation: Evaluation,
    objectives: Sequence[Objective],
    first: Sequence[Subnet],
) -> Algorithm:
    settings = workshop.config.search
    space, constraints = workshop.supernet.space, constraints_of(workshop)
    population = min(settings.population, settings.evaluations)
    starts = uniform_starts(space, constraints) if settings.uniform_starts else []
    kept = KeptValues(run.search / "partial.jsonl", f"{len(workshop.data.validation)} validation images")
    return make_algorithm(
        settings.algorithm,
        space,
        objectives,
        constraints,
        population=population,
        batch=settings.batch,
        partial=PartialValues(evaluation, objectives, kept, run.tell),
        assist=assist_of(workshop, _measures(workshop), run.search),
        seed=workshop.config.seed,
        initial=[*dict.fromkeys([*first, *starts])][:population],
        **settings.settings,
    )


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
        algorithm = _algorithm(run, workshop, evaluation, objectives, first)
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
