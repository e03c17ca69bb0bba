"""Data importance: samples whose loss gradient is large are drawn more often.

Source: the data side of PA&DA (Lu et al., CVPR 2023, arXiv 2302.14772) as its released code computes it; the statistic
is the bound of Katharopoulos & Fleuret (ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nasq.data.samplers import check_samples
from nasq.errors import InputError

__all__ = ["ImportanceSampler", "draw", "fold", "linear_smoothing", "logit_gradient_norm", "smoothed"]


def logit_gradient_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Norm of the cross-entropy's gradient with respect to each sample's logits: ``||softmax(z) - onehot(y)||``.

    Args:
        logits: ``[n, classes]``.
        labels: int64 ``[n]``.

    Returns:
        ``[n]``, from 0 (the prediction is one-hot and right) to ``sqrt(2)``.
    """
    gradient = logits.softmax(1)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    norms: Tensor = gradient.norm(dim=1)
    return norms


def linear_smoothing(epoch: int, epochs: int) -> float:
    """The published schedule ``epoch / epochs``: uniform in the first epoch, never quite without a uniform part."""
    return epoch / epochs


def smoothed(statistics: Tensor, importance: float) -> Tensor:
    """``importance * statistics / sum + (1 - importance) / n``, in float64; uniform where all statistics are 0.

    Args:
        statistics: Not negative, ``[..., n]``; each row is one distribution.
        importance: 0 (uniform) to 1.
    """
    values = statistics.double()
    total = values.sum(-1, keepdim=True)
    even = torch.full_like(values, 1 / values.shape[-1])
    shares = torch.where(total > 0, values / total.clamp_min(torch.finfo(torch.float64).tiny), even)
    mixed = importance * shares + (1 - importance) * even
    return mixed / mixed.sum(-1, keepdim=True)


def draw(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws with replacement, int64 ``[count]``, by inverting the cumulative distribution in float64."""
    edges = probabilities.double().cumsum(0)
    points = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device).to(edges) * edges[-1]
    return torch.searchsorted(edges, points, right=True).clamp_(max=len(edges) - 1)


def fold(running: Tensor, seen: Tensor, at: Tensor, values: Tensor) -> None:
    """Folds new values into running averages of factor one half, in place and in the order given.

    The first value of an entry is taken as it is, each further one as ``(running + value) / 2``. An entry may occur
    several times in ``at``; the result is that of a loop, without one.

    Args:
        running: ``[n]``; meaningful where ``seen``.
        seen: bool ``[n]``.
        at: int64 ``[m]``.
        values: ``[m]``.
    """
    order = torch.argsort(at, stable=True)
    at, values = at[order], values[order]
    entries, place, counts = torch.unique_consecutive(at, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    behind = ends[place] - 1 - torch.arange(len(at), device=at.device)  # values of the same entry that come later
    first = (behind == counts[place] - 1) & ~seen[at]
    weight = torch.where(first, 0.5**behind, 0.5 ** (behind + 1)).to(running.dtype)
    start = torch.where(
        seen[entries],
        running[entries] * 0.5 ** counts.to(running.dtype),
        torch.zeros_like(entries, dtype=running.dtype),
    )
    # CUDA adds in any order: in float64 that leaves no trace in the fp32 result.
    kind = torch.float64 if values.device.type == "cuda" else running.dtype
    added = start.to(kind).index_add(0, place, values.to(kind) * weight.to(kind))
    running[entries] = added.to(running.dtype)
    seen[entries] = True


class ImportanceSampler:
    """Draws samples with replacement, in proportion to how much their loss still moves the logits.

    The first epoch visits every sample once. From then on epoch ``e`` draws from
    ``importance(e) * D / sum(D) + (1 - importance(e)) / n``, where ``D`` are the averages of factor one half of
    :func:`logit_gradient_norm` over the epoch before. Nothing is read back from the device but the statistics, once
    per epoch.

    As published, the loss is not reweighted, which biases training towards hard samples; ``reweight`` makes the
    gradient unbiased again. As published, a sample that was not drawn in an epoch counts as 0 in the next; ``keep``
    lets it keep its last average instead.

    Args:
        n: Number of samples.
        generator: The stream to draw from; its state is part of the sampler's.
        epochs: Of the whole training, for the schedule.
        device: Where logits come from.
        importance: ``(epoch, epochs)`` to 0..1; the published schedule by default.
        reweight: Whether :meth:`weights` gives ``1 / (n p)``.
        keep: Whether samples that were not drawn keep what is known of them.

    Raises:
        InputError: ``n`` or ``epochs`` is below 1.
    """

    def __init__(
        self,
        n: int,
        generator: torch.Generator,
        epochs: int,
        *,
        device: torch.device | str = "cpu",
        importance: Callable[[int, int], float] = linear_smoothing,
        reweight: bool = False,
        keep: bool = False,
    ) -> None:
        for name, value in (("n", n), ("epochs", epochs)):
            if value < 1:
                raise InputError(f"an importance sampler needs {name} of 1 or more; got {name} = {value}")
        self.n, self.generator, self.epochs = n, generator, epochs
        self.importance, self.reweight, self.keep = importance, reweight, keep
        self.running = torch.zeros(n, device=device)
        self.seen = torch.zeros(n, dtype=torch.bool, device=device)
        self.probabilities: Tensor | None = None

    def indices(self, epoch: int) -> Tensor:
        """The epoch's ``n`` draws; a permutation while nothing is known yet.

        Raises:
            InputError: The schedule gives something outside 0..1.
        """
        known = self._statistics()
        if known is None:
            self.probabilities = None
            return torch.randperm(self.n, generator=self.generator, device=self.generator.device).cpu()
        share = self.importance(epoch, self.epochs)
        if not 0 <= share <= 1:
            raise InputError(f"the share of importance in epoch {epoch} is {share}; allowed: 0 to 1")
        self.probabilities = smoothed(known, share)
        return draw(self.probabilities, self.n, self.generator)

    def _statistics(self) -> Tensor | None:
        running, seen = self.running.clone().cpu(), self.seen.cpu()
        if not bool(seen.any()):
            return None
        if not bool(torch.isfinite(running).all()):
            raise InputError("the importance of a sample is not finite: the network's logits were NaN or infinite")
        if not self.keep:
            self.running.zero_()
            self.seen.zero_()
        return running

    def weights(self, indices: Tensor) -> Tensor | None:
        """``1 / (n p)`` of every sample, fp32; ``None`` without reweighting or where draws are uniform."""
        if not self.reweight or self.probabilities is None:
            return None
        return (1 / (self.n * self.probabilities[indices])).float()

    def observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Updates the statistics of a batch."""
        at = indices.to(self.running.device, non_blocking=True)
        fold(self.running, self.seen, at, logit_gradient_norm(logits.detach(), labels))

    def state_dict(self) -> dict[str, Any]:
        """Statistics, distribution, and the state of the generator."""
        state = {"n": self.n, "running": self.running.clone().cpu(), "seen": self.seen.clone().cpu()}
        more = {} if self.probabilities is None else {"probabilities": self.probabilities}
        return {**state, **more, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            InputError: The state is that of another number of samples.
        """
        check_samples(state, self.n)
        self.running.copy_(state["running"])
        self.seen.copy_(state["seen"])
        self.probabilities = state.get("probabilities")
        self.generator.set_state(state["generator"])
