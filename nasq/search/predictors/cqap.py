"""CQAP: the conditional quantization-aware accuracy predictor of EQ-Net (Xu et al., ICCV 2023, section 3.5).

A multilayer perceptron on the one-hot code of a subnet. The code is the space's own, so the predictor serves every space
that can be encoded: bits, forms (the condition), widths, operators.

Beyond the paper: in front of the perceptron stands a linear part, fitted in closed form, and choices of numbers have
cumulative codes. Most of what bits cost is a sum over layers, which a few hundred pairs tell a linear part and not a
perceptron of 200,000 weights; the perceptron learns what is left. Where that predicts the pairs held out no worse, the
linear part may not let a larger number lower the value: noise would otherwise make some layers look better with fewer bits,
and a search finds all of them at once. ``CQAP(space, linear=False)`` is the published predictor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.errors import ArtifactError, InputError
from nasq.files import write_bytes
from nasq.search.objectives import Objective, Rows
from nasq.search.predictors.pairs import Pairs
from nasq.search.predictors.quality import quality

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["CQAP", "Fit"]

_DECAYS = tuple(10.0**power for power in np.arange(-1, 3.5, 0.5))
"""Tried for the linear part."""


@dataclass(frozen=True)
class Fit:
    """How a predictor is trained. The defaults are the released code's, but for ``held_out`` and ``batch_size``.

    Attributes:
        epochs: Passes over the pairs.
        lr, weight_decay: Of Adam.
        batch_size: Pairs per step; the released code takes 256 of 6,400 pairs.
        held_out: Share of the pairs given that chooses the epoch whose weights are kept (the released code chooses on the
            pairs that it reports on).
        seed: Decides the weights at the start, the split and the order.
    """

    epochs: int = 100
    lr: float = 4e-4
    weight_decay: float = 1e-5
    batch_size: int = 32
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0 or not 0 < self.held_out < 1:
            raise InputError(
                f"a predictor's fit is {self}; epochs and batch_size must be at least 1, lr above 0, and held_out between "
                "0 and 1."
            )


class _Network(nn.Module):
    """A linear part and a perceptron that adds what it misses."""

    def __init__(self, inputs: int, hidden: int, layers: int, linear: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise([inputs, *[hidden] * layers]):
            parts += [nn.Linear(before, after), nn.ReLU()]
        self.deep = nn.Sequential(*parts)
        self.last = nn.Linear(hidden if layers else inputs, 1, bias=False)
        self.linear = nn.Linear(inputs, 1) if linear else None

    def forward(self, codes: Tensor) -> Tensor:
        deep: Tensor = self.last(self.deep(codes))
        return deep if self.linear is None else deep + self.linear(codes)

    def start(self, codes: Tensor, values: Tensor, decay: float, rising: NDArray[np.bool_] | None) -> None:
        """Begins at the ridge regression of ``values [n]``: the perceptron adds nothing yet.

        The weights of the codes that are ``rising`` are 0 or more; ``None``: all are free.
        """
        if self.linear is None:
            return
        x, y = codes.double(), values.double()
        centre = x.mean(0)
        weights = _ridge(x - centre, y - y.mean(), decay, rising)
        with torch.no_grad():
            self.linear.weight.copy_(weights[None])
            self.linear.bias.copy_(y.mean() - centre @ weights)
            nn.init.zeros_(self.last.weight)
        self.linear.requires_grad_(False)


def _ridge(x: Tensor, y: Tensor, decay: float, rising: NDArray[np.bool_] | None) -> Tensor:
    """Weights ``[inputs]`` with the smallest ``|x w - y|^2 + decay |w|^2``, those that are ``rising`` not negative."""
    gram = x.T @ x + decay * torch.eye(x.shape[1], dtype=x.dtype)
    if rising is None:
        solved: Tensor = torch.linalg.solve(gram, x.T @ y)
        return solved
    from scipy.optimize import nnls

    # The same minimum from the triangle of the Gram matrix; what is free is a difference of two parts.
    root = torch.linalg.cholesky(gram, upper=True)
    target = torch.linalg.solve_triangular(root.T, (x.T @ y)[:, None], upper=False).flatten()
    free = torch.from_numpy(~rising)
    found = torch.from_numpy(nnls(torch.cat([root, -root[:, free]], 1).numpy(), target.numpy(), maxiter=10_000)[0])
    weights = found[: len(root)].clone()
    weights[free] -= found[len(root) :]
    return weights


class CQAP:
    """Predicts a number of a subnet from its code.

    Seven hidden layers of 200 units with ReLU and a linear output without bias, as released. Values are standardised
    for the training (the released code learns accuracies from 0 to 1 as they are).

    Args:
        space: Whose subnets.
        hidden, layers: Width and number of hidden layers.
        linear: Whether a linear part, fitted first, stands beside the perceptron, and numbers have cumulative codes.
    """

    def __init__(self, space: SearchSpace, hidden: int = 200, layers: int = 7, linear: bool = True) -> None:
        self.space, self.hidden, self.layers, self.linear = space, hidden, layers, linear
        self.mean, self.std = 0.0, 0.0
        self.network = self._build(0)

    def _build(self, seed: int) -> _Network:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _Network(int(self.space.sizes.sum()), self.hidden, self.layers, self.linear)

    def _codes(self, rows: Rows) -> Tensor:
        codes = self.space.encode(rows)
        if self.linear:
            ends = np.cumsum(self.space.sizes)
            for choice, begin, end in zip(self.space.choices, ends - self.space.sizes, ends, strict=True):
                if choice.ordered:  # "at least this option": neighbours share most of their code
                    codes[:, begin:end] = codes[:, begin:end][:, ::-1].cumsum(1)[:, ::-1]
        return torch.from_numpy(codes)

    def _start(self, codes: Tensor, wanted: Tensor, held: Tensor, truth: Tensor) -> None:
        """Chooses the linear part's decay, and whether numbers may only raise the value, on the pairs that were held out."""
        if not self.linear:
            return
        ways = list(itertools.product((self._rising(), None), _DECAYS))
        errors = []
        for rising, decay in ways:
            self.network.start(codes, wanted, decay, rising)
            with torch.no_grad():
                errors.append(float(F.mse_loss(self.network(held).flatten(), truth)))
        rising, decay = ways[int(np.argmin(errors))]
        self.network.start(codes, wanted, decay, rising)

    def _rising(self) -> NDArray[np.bool_]:
        """Which codes say "at least this option" of a number."""
        return np.concatenate([np.full(len(choice.options), choice.ordered) for choice in self.space.choices])

    def fit(self, pairs: Pairs, how: Fit | None = None) -> float:
        """Learns pairs from the start; returns the root mean squared error on the pairs held out, in their unit.

        Loss: smooth L1, as released.

        Raises:
            InputError: There are too few pairs, or their values are all equal.
        """
        how = how or Fit()
        rng = np.random.default_rng(how.seed)
        held, kept = pairs.split(how.held_out, rng)
        if np.ptp(kept.values) == 0:
            raise InputError(f"all {len(kept)} values are {kept.values[0]}: there is nothing to predict.")
        self.mean, self.std = float(kept.values.mean()), float(kept.values.std())
        self.network = self._build(how.seed)
        codes, held_codes = self._codes(kept.rows), self._codes(held.rows)
        wanted, truth = (torch.from_numpy((part.values - self.mean) / self.std).float() for part in (kept, held))
        self._start(codes, wanted, held_codes, truth)
        free = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(free, how.lr, weight_decay=how.weight_decay)
        best, weights = math.inf, self.network.state_dict()
        if self.linear:
            best = self._error(held_codes, held)
            weights = {name: value.clone() for name, value in weights.items()}
        for _ in range(how.epochs):
            order = torch.from_numpy(rng.permutation(len(kept)))
            for at in torch.split(order, how.batch_size):
                optimizer.zero_grad()
                F.smooth_l1_loss(self.network(codes[at]).flatten(), wanted[at]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            error = self._error(held_codes, held)
            if error < best:
                best = error
                weights = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(weights)
        return best

    @torch.no_grad()
    def _predict(self, codes: Tensor) -> NDArray[np.float64]:
        values = self.network(codes).flatten().double().numpy()
        return np.asarray(values * self.std + self.mean, dtype=np.float64)

    def _error(self, codes: Tensor, pairs: Pairs) -> float:
        return float(np.sqrt(np.mean((self._predict(codes) - pairs.values) ** 2)))

    def __call__(self, rows: Rows) -> NDArray[np.float64]:
        """The predicted values ``[n]`` of rows ``[n, choices]``.

        Raises:
            InputError: The predictor has learned nothing yet.
        """
        if not self.std > 0:
            raise InputError("the predictor has learned nothing yet. Call fit, or load.")
        return self._predict(self._codes(rows))

    def objective(self, name: str = "predicted_accuracy", unit: str = "%") -> Objective:
        """The prediction as something to maximise."""
        return Objective(name, unit, "maximize", self, on="rows")

    def kendall(self, pairs: Pairs) -> float:
        """Kendall's tau-b on ``pairs``."""
        return quality(self(pairs.rows), pairs.values).kendall

    def save(self, path: Path) -> None:
        """Writes the weights to a ``.safetensors`` file, atomically."""
        meta = {"space": self.space.fingerprint, "mean": repr(self.mean), "std": repr(self.std)}
        write_bytes(path, save_tensors(dict(self.network.state_dict()), meta))

    def load(self, path: Path) -> None:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: The file is missing or damaged, or of another space or size.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
            if meta.get("space") != self.space.fingerprint:
                raise ArtifactError(
                    f"{path} belongs to a space with fingerprint {meta.get('space')}, this one's is "
                    f"{self.space.fingerprint}. Fit the predictor again."
                )
            self.network.load_state_dict(load_tensors(path.read_bytes()))
            self.mean, self.std = float(meta["mean"]), float(meta["std"])
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path} cannot be read as a predictor: {str(error).splitlines()[0]}.") from error
