"""The result of splitting: several supernets that share out one space and are used like one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.errors import ArtifactError, InputError
from nasq.files import read_json, write_json
from nasq.training.region import Region, Rows

if TYPE_CHECKING:
    from nasq.space import Option, SearchSpace
    from nasq.supernet import BNState, Supernet

__all__ = ["Forest", "WeightSets"]

_SCHEMA = 1


class WeightSets(nn.Module):
    """Several supernets of one space, of which each subnet uses exactly one; has the verbs of a supernet.

    Search, scoring and export see one space: ``activate`` switches to the weights that the subnet belongs to.

    Args:
        supernets: One per set of weights; all of the same space.

    Attributes:
        space: The whole space.

    Raises:
        InputError: There is none, or their spaces differ.
    """

    def __init__(self, supernets: Sequence[Supernet]) -> None:
        super().__init__()
        if not supernets:
            raise InputError("a forest needs at least one supernet; got none.")
        prints = {supernet.space.fingerprint for supernet in supernets}
        if len(prints) > 1:
            raise InputError(
                f"the supernets of a forest are of {len(prints)} different spaces; they have to be copies."
            )
        self.supernets = nn.ModuleList(supernets)
        self.space: SearchSpace = supernets[0].space
        self.current = 0

    @abstractmethod
    def indices(self, rows: Rows) -> NDArray[np.int64]:
        """Which supernet each of the canonical rows ``[n, choices]`` uses, ``[n]``."""

    def index(self, subnet: Mapping[str, Option]) -> int:
        """Which supernet a subnet uses."""
        return int(self.indices(self.space.to_rows([subnet]))[0])

    def supernet(self, index: int) -> Supernet:
        """One of the supernets."""
        found: Any = self.supernets[index]
        return found  # type: ignore[no-any-return]

    @property
    def module(self) -> nn.Module:
        """The network that is active now."""
        return self.supernet(self.current).module

    @contextmanager
    def activate(self, subnet: Mapping[str, Option], bn: BNState | None = None) -> Iterator[Supernet]:
        """Inside, ``subnet`` is active in its own supernet, and :meth:`forward` runs that one."""
        before, self.current = self.current, self.index(subnet)
        try:
            with self.supernet(self.current).activate(subnet, bn) as active:
                yield active
        finally:
            self.current = before

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The active subnet's output."""
        return self.supernets[self.current](*inputs, **options)

    def extract(self, subnet: Mapping[str, Option], bn: BNState | None = None) -> nn.Module:
        """See :meth:`nasq.Supernet.extract`."""
        return self.supernet(self.index(subnet)).extract(subnet, bn)

    def recalibrate(self, subnet: Mapping[str, Option], batches: Iterable[Tensor], **options: Any) -> BNState:
        """See :meth:`nasq.Supernet.recalibrate`."""
        return self.supernet(self.index(subnet)).recalibrate(subnet, batches, **options)

    @property
    def version(self) -> int:
        """Changes whenever a weight changes in place."""
        return sum(self.supernet(index).version for index in range(len(self.supernets)))

    def _describe(self) -> dict[str, Any]:
        """What :meth:`save` writes beside the weights."""
        return {"schema": _SCHEMA, "kind": type(self).__name__.lower(), "fingerprint": self.space.fingerprint}

    def save(self, directory: Path) -> None:
        """Writes every supernet to ``directory/leaf<i>`` and, last, ``forest.json``."""
        for index in range(len(self.supernets)):
            self.supernet(index).save(directory / f"leaf{index}")
        write_json(directory / "forest.json", self._describe())


class Forest(WeightSets):
    """Supernets whose regions share out the space.

    Args:
        regions: Of the leaves; every subnet has to be in exactly one.
        supernets: One per region.

    Raises:
        InputError: A region is missing or some subnets are in none or in several regions.
    """

    def __init__(self, regions: Sequence[Region], supernets: Sequence[Supernet]) -> None:
        super().__init__(supernets)
        if len(regions) != len(supernets):
            raise InputError(f"a forest needs one region per supernet; got {len(regions)} and {len(supernets)}.")
        self.regions = list(regions)
        self.indices(self.space.sample_batch(256, torch.Generator().manual_seed(0)))

    def indices(self, rows: Rows) -> NDArray[np.int64]:
        """Which leaf each of the canonical rows belongs to, ``[n]``."""
        inside = np.stack([region.holds(rows) for region in self.regions], axis=1)
        if not (inside.sum(1) == 1).all():
            wrong = int(np.flatnonzero(inside.sum(1) != 1)[0])
            raise InputError(
                f"the subnet {self.space.to_subnet(rows[wrong]).to_json()[:200]} belongs to {int(inside[wrong].sum())} "
                "leaves; the leaves' options have to share out those of each choice that is split."
            )
        found: NDArray[np.int64] = inside.argmax(1).astype(np.int64)
        return found

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "regions": [region.to_dict() for region in self.regions]}

    @classmethod
    def load(cls, directory: Path, supernets: Sequence[Supernet]) -> Forest:
        """Reads what :meth:`save` wrote into freshly built supernets, one per leaf.

        Raises:
            ArtifactError: The description is missing or corrupt, or of another space; or weights do not fit.
        """
        regions = read_regions(directory, supernets[0].space)
        for index, supernet in enumerate(supernets):
            supernet.load(directory / f"leaf{index}")
        return cls(regions, supernets)


def read_regions(directory: Path, space: SearchSpace) -> list[Region]:
    """The regions of a saved forest.

    Raises:
        ArtifactError: The description is missing or corrupt, or of another space.
    """
    path = directory / "forest.json"
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA or not isinstance(found.get("regions"), list):
        raise ArtifactError(f"{path} does not describe a forest. It is corrupt, or of another version of nasq.")
    if found.get("fingerprint") != space.fingerprint:
        raise ArtifactError(
            f"the forest in {directory} belongs to a space with fingerprint {found.get('fingerprint')}, this one is "
            f"{space.fingerprint}. Build the supernets with the same space and bits."
        )
    try:
        return [Region(space, allowed) for allowed in found["regions"]]
    except (InputError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} describes leaves that this space does not have: {error}") from error
