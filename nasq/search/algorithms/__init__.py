"""Search algorithms behind one ask/tell interface; each resumes exactly, and none asks for a subnet twice."""

from __future__ import annotations

from nasq.search.algorithms.assist import Assist
from nasq.search.algorithms.evolution import NSGA2, NSGA3, GeneticAlgorithm, RegularizedEvolution
from nasq.search.algorithms.factory import ALGORITHMS, make_algorithm
from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.generational import Generational
from nasq.search.algorithms.hyperband import FullFidelity, Hyperband, MultiFidelity
from nasq.search.algorithms.local_search import LocalSearch
from nasq.search.algorithms.optuna_search import OptunaSearch
from nasq.search.algorithms.predictor_guided import PredictorGuided
from nasq.search.algorithms.random_search import RandomSearch
from nasq.search.algorithms.reinforce import Reinforce

__all__ = [
    "ALGORITHMS",
    "NSGA2",
    "NSGA3",
    "Assist",
    "FullFidelity",
    "Generational",
    "GeneticAlgorithm",
    "Hyperband",
    "LocalSearch",
    "MultiFidelity",
    "OptunaSearch",
    "PredictorGuided",
    "RandomSearch",
    "RegularizedEvolution",
    "Reinforce",
    "fitness",
    "make_algorithm",
]
