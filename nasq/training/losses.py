"""What a subnet is trained to do: fit the labels, and a larger subnet's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nasq.errors import InputError
from nasq.training.guidance import HIGH
from nasq.training.paths import LARGEST, Path

__all__ = ["PathLoss", "cross_entropy", "distillation", "teachers"]


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Mean cross entropy against ``(1 - e) onehot(label) + e / classes`` (Szegedy et al., 2016).

    Args:
        logits: ``[n, classes]``.
        labels: int64 ``[n]``.
        label_smoothing: ``e``, 0 to below 1.
        weights: ``[n]``, what each sample's loss is multiplied by before the mean over ``n``; ``None`` for ones.

    Returns:
        0-d, in nats.
    """
    if weights is None:
        return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (losses * weights).mean()


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch; no gradient to the teacher.

    The factor ``T^2`` keeps the gradient's size when the temperature changes (Hinton et al., 2015, section 2).

    Args:
        student: Logits ``[n, classes]``.
        teacher: Logits ``[n, classes]``.
        temperature: ``T``, above 0.
        weights: As in :func:`cross_entropy`.

    Returns:
        0-d, in nats; 0 where both give the same probabilities.

    Raises:
        InputError: The temperature is not above 0, or the shapes differ.
    """
    if not temperature > 0:
        raise InputError(f"temperature is {temperature!r}; allowed: a number above 0")
    if student.shape != teacher.shape:
        raise InputError(
            f"student and teacher logits have shapes {list(student.shape)} and {list(teacher.shape)}; "
            "both subnets must have the same outputs"
        )
    wanted = torch.log_softmax(teacher.detach() / temperature, dim=1)
    given = torch.log_softmax(student / temperature, dim=1)
    losses = functional.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
    if weights is not None:
        losses = losses * weights
    return losses.mean() * temperature**2


@dataclass(frozen=True)
class PathLoss:
    """The loss of one path: ``lam * distillation + (1 - lam) * cross entropy``, or cross entropy without a teacher.

    Args:
        distill: ``lam``, 0 to 1.
        temperature: Of the distillation.
        label_smoothing: Of the cross entropy.
    """

    distill: float = 0.5
    temperature: float = 1.0
    label_smoothing: float = 0.0

    def __call__(
        self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The 0-d loss of ``logits`` ``[n, classes]``; ``teacher`` are the logits that teach it, or ``None``."""
        if teacher is None or self.distill == 0:
            return cross_entropy(logits, labels, self.label_smoothing, weights)
        taught = distillation(logits, teacher, self.temperature, weights)
        if self.distill == 1:
            return taught
        return self.distill * taught + (1 - self.distill) * cross_entropy(logits, labels, self.label_smoothing, weights)


def teachers(paths: Sequence[Path]) -> list[int | None]:
    """For each path of a step the index of the earlier path that teaches it.

    Behind a high subnet (:class:`~nasq.training.guidance.Guidance`) each is taught by the one before it; behind the
    largest one (a sandwich) all are taught by the largest; otherwise none is.
    """
    if paths and paths[0].role == HIGH:
        return [None, *range(len(paths) - 1)]
    first = next((i for i, path in enumerate(paths) if path.role == LARGEST), None)
    return [first if first is not None and i > first else None for i in range(len(paths))]
