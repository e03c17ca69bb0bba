"""A zero-cost proxy on the architecture of a run's subnets: what a cascade and an assisted search go by."""

from __future__ import annotations

import hashlib

import torch

from nasq.errors import InputError
from nasq.ranking import score
from nasq.ranking.proxy import PoolProxy, Proxy, load_proxy
from nasq.run.assemble import Workshop, build_network
from nasq.run.score import fresh
from nasq.space import Subnet
from nasq.supernet import Supernet
from nasq.training import stream

__all__ = ["ArchitectureScore", "single_proxy"]


def single_proxy(name: str, key: str) -> Proxy:
    """An installed proxy that scores one network at a time.

    Args:
        name: Of the proxy.
        key: Of the configuration, for messages.

    Raises:
        InputError: There is none of that name, or it compares candidates with each other.
    """
    proxy = load_proxy(name)
    if isinstance(proxy, PoolProxy):
        raise InputError(
            f"{key} is {name!r}, which compares candidates with each other; here a score of one is needed. Take another: "
            "nasq proxies."
        )
    return proxy


class ArchitectureScore:
    """The score of a subnet's float architecture with initial weights of its own; bits have no influence.

    Args:
        workshop: Its network, data and seed decide the scores; the supernet's weights do not.
        proxy: See :func:`single_proxy`.
        images: Training images that it sees.
    """

    def __init__(self, workshop: Workshop, proxy: Proxy, images: int) -> None:
        data = workshop.data
        self._seed, self._proxy = workshop.config.seed, proxy
        self._plain = Supernet(build_network(workshop.config, data))
        at = torch.randperm(len(data.train), generator=stream(self._seed, "proxy images"))[:images]
        self._batch = (data.normalise(data.train.images[at]).cpu(), data.train.labels[at].cpu())

    def architecture(self, subnet: Subnet) -> Subnet:
        """The choices that are not about quantization."""
        return Subnet({name: option for name, option in subnet.items() if name in self._plain.space.positions})

    def __call__(self, subnet: Subnet) -> float:
        """The score; equal architectures have equal ones."""
        architecture = self.architecture(subnet)
        model = self._plain.extract(architecture)
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{architecture.id}".encode()).digest()[:7], "little")
        fresh(model, seed)
        values = score([self._proxy], model, self._batch, generator=torch.Generator().manual_seed(seed))
        return values[self._proxy.name]
