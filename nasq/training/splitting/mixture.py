"""A balanced mixture of supernets: every configuration learns which of several sets of weights suits it.

Source: Balanced Mixture of SuperNets (Javan Roshtkhari et al., AutoML 2023, arXiv 2306.11982), as its released code computes
it. Where gradient matching cuts the space along one choice after another, here the assignment is free: configurations that
disturb each other drift to different weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.errors import ArtifactError, InputError
from nasq.files import read_json
from nasq.space.random import as_numpy
from nasq.training.paths import Path as TrainingPath
from nasq.training.splitting.assignment import (
    Configurations,
    Floats,
    balance,
    linear_temperature,
    replayed,
    row_softmax,
)
from nasq.training.splitting.forest import WeightSets

if TYPE_CHECKING:
    from nasq.data import DataSet
    from nasq.supernet import Supernet
    from nasq.training.region import Rows

__all__ = ["Mixture", "MixturePaths", "validation_batches"]

Batch = tuple[Tensor, Tensor]


class Mixture(WeightSets):
    """Several supernets of one space and an assignment of configurations to them; used like one supernet.

    Args:
        supernets: One per set of weights, of the same space.
        choices: Names of the choices that decide; ``None``: every subnet is a configuration of its own.

    Attributes:
        configurations: What is assigned.
        assignment: Which supernet each configuration uses, int64 ``[configurations]``; at first dealt out in turn.
        drawn: While a step trains, the supernet that was drawn for it; otherwise ``None``.
    """

    def __init__(self, supernets: Sequence[Supernet], choices: Sequence[str] | None = None) -> None:
        super().__init__(supernets)
        self.configurations = Configurations(self.space, choices)
        self.assignment: NDArray[np.int64] = np.arange(len(self.configurations)) % len(supernets)
        self.drawn: int | None = None

    def indices(self, rows: Rows) -> NDArray[np.int64]:
        """Which supernet each canonical row ``[n, choices]`` uses."""
        found = self.configurations.indices(rows)
        return self.assignment[found] if self.drawn is None else np.full(len(found), self.drawn, dtype=np.int64)

    def assign(self, assignment: NDArray[np.integer[Any]]) -> None:
        """Sets which supernet each configuration uses.

        Raises:
            InputError: It has another length, or names a supernet that is not there.
        """
        found = np.asarray(assignment, dtype=np.int64)
        if found.shape != (len(self.configurations),) or not ((found >= 0) & (found < len(self.supernets))).all():
            raise InputError(
                f"an assignment is one number from 0 to {len(self.supernets) - 1} for each of "
                f"{len(self.configurations)} configurations; got shape {list(found.shape)}."
            )
        self.assignment = found

    def _describe(self) -> dict[str, Any]:
        named = list(self.configurations.choices)
        return {**super()._describe(), "choices": named, "assignment": self.assignment.tolist()}

    @classmethod
    def load(cls, directory: Path, supernets: Sequence[Supernet]) -> Mixture:
        """Reads what :meth:`save` wrote into freshly built supernets.

        Raises:
            ArtifactError: The description is missing or corrupt, or of another space or number of supernets.
        """
        path = directory / "forest.json"
        found = read_json(path)
        if not isinstance(found, dict) or found.get("kind") != "mixture" or not isinstance(found.get("choices"), list):
            raise ArtifactError(f"{path} does not describe a mixture. It is corrupt, or of another version of nasq.")
        if found.get("fingerprint") != supernets[0].space.fingerprint:
            raise ArtifactError(
                f"the mixture in {directory} belongs to a space with fingerprint {found.get('fingerprint')}, this one is "
                f"{supernets[0].space.fingerprint}. Build the supernets with the same space and bits."
            )
        for index, supernet in enumerate(supernets):
            supernet.load(directory / f"leaf{index}")
        try:
            mixture = cls(supernets, found["choices"])
            mixture.assign(np.array(found["assignment"]))
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} does not fit {len(supernets)} supernets of this space: {error}") from error
        return mixture


def validation_batches(
    data: DataSet, batch_size: int, device: torch.device | str = "cpu"
) -> Callable[[torch.Generator], Batch]:
    """Random batches of the validation images, normalised: what :class:`MixturePaths` judges its draws by."""
    split = data.validation.to(device)

    def draw(generator: torch.Generator) -> Batch:
        at = torch.randint(len(split), (min(batch_size, len(split)),), generator=generator).to(split.images.device)
        return data.normalise(split.images[at]), split.labels[at]

    return draw


class MixturePaths:
    """One random subnet per step, trained in a set of weights that is drawn by how well they went together so far.

    After the step's backward pass the same subnet is evaluated in the same set on one validation batch (BatchNorm by the
    batch, as published), and ``W <- decay W + (1 - decay) accuracy``. Give it to a :class:`nasq.training.Trainer` together
    with the mixture; a step's role names the set. Each set gets one in ``sets`` of the updates: train so many times longer
    where sets should see as much as one supernet.

    Differences from the released code: the accuracy is that before the step's weights move, not after; all sets share one
    optimizer and schedule, which leaves sets alone that a step did not use.

    Args:
        mixture: What is trained; its assignment is brought up to date in every epoch.
        generator: The stream to draw from; its state is part of the sampler's.
        epochs: Of the whole training, for the temperature.
        validation: Draws ``(inputs [n, ...], labels [n])``; see :func:`validation_batches`.
        decay: Of the running accuracies, 0 to below 1; published: 0.9 (ResNet-20), 0.95 (ResNet-18).
        temperature: ``(epoch, epochs)`` to a number above 0.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        mixture: Mixture,
        generator: torch.Generator,
        epochs: int,
        validation: Callable[[torch.Generator], Batch],
        *,
        decay: float = 0.9,
        temperature: Callable[[int, int], float] = linear_temperature,
    ) -> None:
        if epochs < 1:
            raise InputError(f"epochs is {epochs}; allowed: 1 or more")
        if not 0 <= decay < 1:
            raise InputError(f"decay is {decay}; allowed: 0 to below 1")
        self.mixture, self.generator, self.epochs, self.validation = mixture, generator, epochs, validation
        self.decay, self.temperature = decay, temperature
        shape = (len(mixture.configurations), len(mixture.supernets))
        self.accuracies: Floats = np.ones(shape)
        self.visits: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self._heat, self._marginals = 1.0, list[Floats]()

    def probabilities(self) -> Floats:
        """``p(set | configuration)``, ``[configurations, sets]``: the epoch's balance on the accuracies of now."""
        return replayed(row_softmax(self._heat * self.accuracies), self._marginals)

    def step(self) -> list[TrainingPath]:
        """One path; the mixture uses the set that was drawn for it until :meth:`observe`."""
        rng = as_numpy(self.generator)
        rows = self.mixture.space.sample_batch(1, rng)
        index = int(self.mixture.configurations.indices(rows)[0])
        shares = replayed(row_softmax(self._heat * self.accuracies[index : index + 1]), self._marginals)[0]
        chosen = int(rng.choice(len(shares), p=shares / shares.sum()))
        self.visits[index, chosen] += 1
        self.mixture.drawn = chosen
        return [TrainingPath(self.mixture.space.to_subnet(rows[0]), f"set{chosen}")]

    @torch.no_grad()
    def observe(self, path: TrainingPath, loss: Tensor, supernet: nn.Module) -> None:
        """Evaluates the path in the set that trained it, on one validation batch."""
        assert self.mixture.drawn is not None
        images, labels = self.validation(self.generator)
        index = int(self.mixture.configurations.indices(self.mixture.space.to_rows([path.subnet]))[0])
        with self.mixture.activate(path.subnet):
            right = float((self.mixture(images).argmax(1) == labels).double().mean())
        entry = self.accuracies[index, self.mixture.drawn]
        self.accuracies[index, self.mixture.drawn] = self.decay * entry + (1 - self.decay) * right
        self.mixture.drawn = None

    def on_epoch(self, epoch: int) -> None:
        """Balances the sets at the epoch's temperature, and assigns every configuration its likeliest set.

        Raises:
            InputError: The schedule gives no number above 0, or no balance is found.
        """
        heat = self.temperature(epoch, self.epochs)
        if not heat > 0:
            raise InputError(f"the temperature in epoch {epoch} is {heat}; allowed: a number above 0")
        self._heat, self._marginals = heat, balance(self.accuracies, heat)
        self.mixture.drawn = None
        self.settle()

    def settle(self) -> None:
        """Assigns every configuration its likeliest set as of now; call it once more when the training is done."""
        self.mixture.assign(self.probabilities().argmax(1))

    def on_phase(self, name: str) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Accuracies, visits, the epoch's balance, and the state of the generator."""
        sets = self.accuracies.shape[1]
        marginals = np.array(self._marginals, dtype=np.float64).reshape(-1, sets)
        return {
            "accuracies": torch.from_numpy(self.accuracies.copy()), "visits": torch.from_numpy(self.visits.copy()),
            "heat": float(self._heat), "marginals": torch.from_numpy(marginals), "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            InputError: The state is that of other configurations or another number of sets.
        """
        found = state["accuracies"].numpy()
        if found.shape != self.accuracies.shape:
            raise InputError(
                f"the state is that of {found.shape[0]} configurations in {found.shape[1]} sets; these are "
                f"{self.accuracies.shape[0]} in {self.accuracies.shape[1]}."
            )
        self.accuracies, self.visits = found.copy(), state["visits"].numpy().copy()
        self._heat, self._marginals = float(state["heat"]), list(state["marginals"].numpy())
        self.generator.set_state(state["generator"])
        self.settle()
