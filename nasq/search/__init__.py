"""Searching a space under hard constraints: objectives, constraints, algorithms, studies and what they found."""

from __future__ import annotations

from nasq.search.algorithm import Algorithm
from nasq.search.algorithms import NSGA2, Generational, RandomSearch
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
    "COST_UNITS",
    "NSGA2",
    "Algorithm",
    "Bound",
    "Constraint",
    "Evaluator",
    "Example",
    "Explanation",
    "Generational",
    "Goal",
    "Measure",
    "Objective",
    "ObjectiveEvaluator",
    "RandomSearch",
    "Record",
    "RecordFile",
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
