"""Scores and rankings: what a proxy is, and what every score has to be compared with."""

from nasq.ranking.proxy import Batch, Needs, Proxy

__all__ = ["Batch", "Needs", "Proxy"]
