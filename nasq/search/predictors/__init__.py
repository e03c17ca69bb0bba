"""Predictors of accuracy: trained on pairs from the supernet, they stand in for it while a search explores."""

from __future__ import annotations

from nasq.search.predictors.cqap import CQAP, Fit
from nasq.search.predictors.genetic import predictor_search
from nasq.search.predictors.pairs import Pairs, generate_pairs
from nasq.search.predictors.quality import Quality, quality
from nasq.search.predictors.transition import TransitionSampler, TransitionTable

__all__ = [
    "CQAP",
    "Fit",
    "Pairs",
    "Quality",
    "TransitionSampler",
    "TransitionTable",
    "generate_pairs",
    "predictor_search",
    "quality",
]
