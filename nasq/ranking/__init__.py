"""Scores and rankings: what a proxy is, and what every score has to be compared with."""

from nasq.ranking.audits import Audit, ScoreAudit, audit
from nasq.ranking.capture import Recorder, Repeats, layers_of
from nasq.ranking.copies import quantized_weights
from nasq.ranking.observations import OBSERVATIONS
from nasq.ranking.passes import Passes
from nasq.ranking.proxy import Batch, Needs, PassProxy, PoolProxy, Proxy, load_proxy, ranks
from nasq.ranking.scoring import combine, expand, score, score_pool
from nasq.ranking.table import Table
from nasq.ranking.table_names import OfficialNames, from_official_name, official_name

__all__ = [
    "OBSERVATIONS", "Audit", "Batch", "Needs", "OfficialNames", "PassProxy", "Passes", "PoolProxy", "Proxy", "Recorder",
    "Repeats", "ScoreAudit", "Table", "audit", "combine", "expand", "from_official_name", "layers_of", "load_proxy",
    "official_name", "quantized_weights", "ranks", "score", "score_pool",
]  # fmt: skip
