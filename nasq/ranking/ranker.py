"""ParZC: learns to rank subnets from their node-wise statistics and a few trained ones.

An ensemble of :class:`~nasq.ranking.mabn.MABN`, each trained with DiffKendall on the same subnets from other weights. A
prediction is the mean over the ensemble and over draws of the Bayesian weights; its uncertainty is the deviation over both.

Differences from the released code: tokens are mixed (there no segment sees another before the final mean); the loss is the
i < j form; a last batch of one subnet joins the one before (it has no pair); slots beside packed order; several networks.
The optional graph-transformer branch of the paper is not here: the slots say where a statistic was measured, and the subnets'
choices and the scores of proxies may stand beside the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nasq.errors import ArtifactError, InputError, TrainingError
from nasq.files import read_json, write_bytes, write_json
from nasq.ranking.features import Features, Scores
from nasq.ranking.kendall import diff_kendall, pairwise_loss
from nasq.ranking.mabn import MABN, MabnConfig
from nasq.ranking.nodes import NodeStatistics
from nasq.space import Option

__all__ = ["Ranker", "RankerConfig", "fit"]

Floats = NDArray[np.float64]
_SCHEMA = 1


@dataclass(frozen=True)
class RankerConfig:
    """How a ranker is made and trained.

    Attributes:
        kind: Features, ``"slots"`` or ``"packed"``.
        magnitudes: Whether magnitudes are features too.
        choices: Whether the subnets' choices, one-hot, are features too.
        loss: ``"kendall"``, ``"pairwise"``, ``"mse"``, or two of them with a plus.
        epochs: Passes over the training subnets; ParZC 200 for NAS-Bench-201.
        batch: Subnets of a step; ParZC 10.
        learning_rate: Of Adam, annealed to 0 by a cosine; ParZC 1e-4 with a width of 512.
        weight_decay: ParZC 1e-3.
        members: Networks of the ensemble.
        draws: Of the Bayesian weights, in a prediction; 0 takes their means.
        seed: Of everything.
        segments, width, depth, dropout, mixing: See :class:`~nasq.ranking.mabn.MabnConfig`.
        scores: Names of the scores that are features too, by their ranks.
    """

    kind: Literal["packed", "slots"] = "slots"
    magnitudes: bool = True
    loss: str = "kendall"
    epochs: int = 100
    batch: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    members: int = 3
    draws: int = 0
    seed: int = 0
    segments: int = 8
    width: int = 64
    depth: int = 2
    dropout: float = 0.0
    mixing: Literal["tokens", "channels"] = "tokens"
    choices: bool = False
    scores: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))  # JSON has lists only
        unknown = set(self.loss.split("+")) - {"kendall", "pairwise", "mse"}
        if self.kind not in {"packed", "slots"}:
            raise InputError(f"the features are {self.kind!r}. Allowed: 'slots', or 'packed' as in the paper.")
        if unknown:
            raise InputError(
                f"the loss is {self.loss!r}. Allowed: kendall, pairwise, mse, or several with a plus between."
            )
        if min(self.epochs, self.members) < 1 or self.batch < 2 or self.draws < 0:
            raise InputError(
                f"epochs={self.epochs}, members={self.members}, batch={self.batch}, draws={self.draws}. Allowed: 1 or "
                "more, 1 or more, 2 or more, 0 or more."
            )


@dataclass(frozen=True)
class Ranker:
    """A trained ranker.

    Attributes:
        space: Fingerprint of the space it was trained on.
        features: How a subnet becomes a vector.
        config: How it was made.
        networks: The ensemble.
        history: Mean loss of the last epoch, by member.
    """

    space: str
    features: Features
    config: RankerConfig
    networks: list[MABN]
    history: list[float] = field(default_factory=list)

    def predict(
        self,
        subnets: Sequence[NodeStatistics],
        space: str | None = None,
        cells: Sequence[Mapping[str, Option]] = (),
        scores: Sequence[Scores] = (),
    ) -> tuple[Floats, Floats]:
        """Scores ``[n]`` (larger is better) and their uncertainty ``[n]``, in units of the training targets' deviation.

        Args:
            subnets: Node-wise statistics, made as those of the training subnets.
            space: Fingerprint of their space, to be checked.
            cells: The subnets themselves, in the same order; needed where their choices are features.
            scores: Their scores by name, in the same order; needed where scores are features.

        Raises:
            InputError: They are of another space, or ``cells`` or ``scores`` are missing.
        """
        if space is not None and space != self.space:
            raise InputError(
                f"the ranker was fitted on a space with the fingerprint {self.space}, and these scores are of {space}. Fit "
                "one on this space: 'nasq ranker fit'."
            )
        x = _inputs(self.features, subnets, cells, scores)
        found = np.array([row for network in self.networks for row in self._draws(network, x)])
        return found.mean(0), found.std(0)

    @torch.no_grad()
    def _draws(self, network: MABN, x: Tensor) -> Iterator[Floats]:
        network.eval()
        network.set_noise(self.config.draws > 0)
        seeds = torch.Generator().manual_seed(self.config.seed)
        for layer in (network.before, network.after):
            layer.generator = seeds  # predictions do not depend on what was predicted before
        for _ in range(max(1, self.config.draws)):
            yield network(x).double().numpy()

    def save(self, directory: Path) -> None:
        """Writes ``ranker.safetensors`` and ``ranker.json`` into ``directory``, atomically each."""
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, network in enumerate(self.networks)
            for name, value in network.state_dict().items()
        }
        write_bytes(directory / "ranker.safetensors", save_tensors(tensors))
        write_json(directory / "ranker.json", {
            "schema": _SCHEMA, "space": self.space, "features": self.features.to_json(), "config": asdict(self.config),
            "history": self.history,
        })  # fmt: skip

    @classmethod
    def load(cls, directory: Path) -> Ranker:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: A file is missing, damaged or of a newer schema.
        """
        found = read_json(directory / "ranker.json")
        try:
            if found["schema"] != _SCHEMA:
                raise ArtifactError(f"{directory} has schema {found['schema']}; this version of nasq reads {_SCHEMA}.")
            features, config = Features.from_json(found["features"]), RankerConfig(**found["config"])
            networks = [_network(features, config, index) for index in range(config.members)]
            tensors = load_tensors((directory / "ranker.safetensors").read_bytes())
            for index, network in enumerate(networks):
                own = {name.partition(".")[2]: one for name, one in tensors.items() if name.startswith(f"{index}.")}
                network.load_state_dict(own)
            return cls(str(found["space"]), features, config, networks, [float(one) for one in found["history"]])
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
            if isinstance(error, ArtifactError):
                raise
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise ArtifactError(
                f"{directory} holds no ranker that can be read: {reason}. Make it again: nasq ranker fit"
            ) from error


def _inputs(
    features: Features,
    subnets: Sequence[NodeStatistics],
    cells: Sequence[Mapping[str, Option]],
    scores: Sequence[Scores],
) -> Tensor:
    """Feature vectors ``[n, D]``."""
    for what, given in (("cells", cells), ("scores", scores)):
        if len(given) not in {0, len(subnets)}:
            raise InputError(
                f"{len(given)} {what} were given for the statistics of {len(subnets)} subnets. Give one for each."
            )
    nothing = [None] * len(subnets)
    rows = zip(subnets, cells or nothing, scores or nothing, strict=True)
    return torch.tensor(np.stack([features.vector(*one) for one in rows]), dtype=torch.float32)


def _network(features: Features, config: RankerConfig, member: int) -> MABN:
    rng = torch.Generator().manual_seed(config.seed * 1000 + member)
    sizes = MabnConfig(features.length, config.segments, config.width, config.depth, config.dropout, config.mixing)
    return MABN(sizes, rng)


def batches(count: int, size: int, rng: torch.Generator) -> list[Tensor]:
    """A permutation in batches of ``size``; a last one of a single element joins the one before, as it has no pair."""
    parts = list(torch.randperm(count, generator=rng).split(size))  # type: ignore[no-untyped-call]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _loss(name: str, predicted: Tensor, wanted: Tensor) -> Tensor:
    terms = {
        "kendall": lambda: -diff_kendall(predicted, wanted),
        "pairwise": lambda: pairwise_loss(predicted, wanted),
        "mse": lambda: (predicted - wanted).square().mean(),
    }
    return torch.stack([terms[one]() for one in name.split("+")]).sum()


def _train(network: MABN, x: Tensor, y: Tensor, config: RankerConfig, member: int) -> float:
    rng = torch.Generator().manual_seed(config.seed * 1000 + member + 500)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    network.train()
    network.set_noise(True)
    last = math.nan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))  # dropout
        for _ in range(config.epochs):
            losses = []
            for at in batches(len(x), config.batch, rng):
                loss = _loss(config.loss, network(x[at]), y[at])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
            schedule.step()
            last = sum(losses) / len(losses)
    if not math.isfinite(last):
        raise TrainingError(f"the ranker's loss became {last}. Lower the learning rate ({config.learning_rate}).")
    return last


def fit(
    subnets: Sequence[NodeStatistics],
    targets: Sequence[float] | Floats,
    space: str = "",
    config: RankerConfig | None = None,
    known: Sequence[NodeStatistics] = (),
    cells: Sequence[Mapping[str, Option]] = (),
    scores: Sequence[Scores] = (),
    known_scores: Sequence[Scores] = (),
) -> Ranker:
    """Trains a ranker.

    Args:
        subnets: Node-wise statistics of the training subnets.
        targets: What they are worth, larger is better; standardised here.
        space: Fingerprint of the space, checked when it is applied.
        config: Settings.
        known: Further subnets without targets; they only make sure that all places of the space are among the slots.
        cells: The training subnets themselves, in the order of ``subnets``; needed where their choices are features.
        scores: Of the training subnets, by name, in their order; needed where scores are features.
        known_scores: Of further subnets without targets, so that ranks are those among many.

    Raises:
        InputError: Fewer than two subnets, targets that are all the same or not finite.
        TrainingError: The loss became NaN.
    """
    config = config or RankerConfig()
    values = np.asarray(targets, dtype=np.float64)
    if len(values) < 2 or len(values) != len(subnets) or not np.isfinite(values).all() or values.std() == 0:
        raise InputError(
            f"a ranker learns from at least two subnets with different, finite targets; given {len(subnets)} subnets and "
            f"{len(values)} targets from {values.min(initial=math.inf):g} to {values.max(initial=-math.inf):g}."
        )
    if config.choices and not cells:
        raise InputError("choices are to be features (choices=True) and no subnets were given. Give them: cells=[...].")
    if config.scores and not scores:
        raise InputError("scores are to be features and none were given. Give those of every subnet: scores=[...].")
    ranked = [{name: one.get(name, math.nan) for name in config.scores} for one in (*scores, *known_scores)]
    features = Features.of(
        [*subnets, *known],
        config.kind,
        config.magnitudes,
        cells if config.choices else (),
        ranked if config.scores else (),
    )
    x = _inputs(features, subnets, cells, scores)
    y = torch.tensor((values - values.mean()) / values.std(), dtype=torch.float32)
    networks = [_network(features, config, member) for member in range(config.members)]
    history = [_train(network, x, y, config, member) for member, network in enumerate(networks)]
    return Ranker(space, features, config, networks, history)
