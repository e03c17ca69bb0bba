"""Searching a space under hard constraints: objectives, constraints, algorithms, studies and what they found."""

from __future__ import annotations

from nasq.search.algorithm import Algorithm
from nasq.search.algorithms import (
    ALGORITHMS,
    NSGA2,
    NSGA3,
    Assist,
    FullFidelity,
    Generational,
    GeneticAlgorithm,
    Hyperband,
    LocalSearch,
    OptunaSearch,
    PredictorGuided,
    RandomSearch,
    RegularizedEvolution,
    Reinforce,
    make_algorithm,
)
from nasq.search.evaluator import Evaluator, ObjectiveEvaluator
from nasq.search.explain import Example, Explanation, Survival, explain, infeasible, wilson
from nasq.search.feasible import Sampling, sample_feasible
from nasq.search.objectives import (
    COST_UNITS,
    Bound,
    Constraint,
    Goal,
    Measure,
    Objective,
    format_number,
    measures,
    parse_bound,
    parse_constraints,
    parse_number,
)
from nasq.search.pareto import hypervolume, knee
from nasq.search.results import Record, RecordFile, front, hypervolumes, pick, pick_knee
from nasq.search.squeeze import squeeze, squeezed_rows, uniform_bits, uniform_starts
from nasq.search.study import Study, StudyResult, load_results
from nasq.search.warm import transferred

__all__ = [
    "ALGORITHMS",
    "COST_UNITS",
    "NSGA2",
    "NSGA3",
    "Algorithm",
    "Assist",
    "Bound",
    "Constraint",
    "Evaluator",
    "Example",
    "Explanation",
    "FullFidelity",
    "Generational",
    "GeneticAlgorithm",
    "Goal",
    "Hyperband",
    "LocalSearch",
    "Measure",
    "Objective",
    "ObjectiveEvaluator",
    "OptunaSearch",
    "PredictorGuided",
    "RandomSearch",
    "Record",
    "RecordFile",
    "RegularizedEvolution",
    "Reinforce",
    "Sampling",
    "Study",
    "StudyResult",
    "Survival",
    "explain",
    "format_number",
    "front",
    "hypervolume",
    "hypervolumes",
    "infeasible",
    "knee",
    "load_results",
    "make_algorithm",
    "measures",
    "parse_bound",
    "parse_constraints",
    "parse_number",
    "pick",
    "pick_knee",
    "sample_feasible",
    "squeeze",
    "squeezed_rows",
    "transferred",
    "uniform_bits",
    "uniform_starts",
    "wilson",
]
