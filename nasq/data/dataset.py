"""Data sets as they are used here: three splits of uint8 images in memory, and how they become network input.

Shapes: ``N`` images, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nasq.errors import InputError

__all__ = ["DataSet", "Split"]

FINGERPRINT_DIGITS = 16


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``, indices into the data set's ``classes``.
        indices: int64 ``[N]``, which images of the source these are, or ``None`` where that is not known.

    Raises:
        InputError: A type or a size is not as above.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise InputError(
                f"images of a split are uint8 [N, C, H, W]; got {self.images.dtype} {list(self.images.shape)}"
            )
        for name, tensor in (("labels", self.labels), ("indices", self.indices)):
            if tensor is not None and (tensor.dtype != torch.int64 or tuple(tensor.shape) != (len(self.images),)):
                raise InputError(
                    f"{name} of a split are int64 [{len(self.images)}], one per image; "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Split:
        """The same split with images and labels on ``device``; the indices stay where they are."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields ``(images uint8 [n, C, H, W], labels int64 [n])`` in order; the last batch may be smaller.

        Raises:
            InputError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; allowed: 1 or more")
        return (
            (self.images[at : at + batch_size], self.labels[at : at + batch_size])
            for at in range(0, len(self), batch_size)
        )


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in memory: three splits that share no image, and the statistics of the training split.

    Make one with :func:`nasq.data.load`, or from your own tensors with :meth:`from_splits`.

    Args:
        name: What the data set is called.
        classes: The name of every class; a label is an index into it.
        train: What training sees.
        validation: What search selects on.
        test: What is read once, at the end.
        mean: Per channel, of ``pixel / 255`` over the training split.
        std: Per channel, the standard deviation (not Bessel-corrected) of the same.
        fingerprint: 16 hex digits that change with any pixel, any label and any move between splits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @classmethod
    def from_splits(cls, name: str, classes: Sequence[str], train: Split, validation: Split, test: Split) -> DataSet:
        """Makes a data set of three splits: checks that they agree and derives the statistics and the fingerprint.

        Raises:
            InputError: A split is empty, sizes disagree, a label has no class, or a channel is constant.
        """
        splits = {"train": train, "validation": validation, "test": test}
        for part, split in splits.items():
            _check_split(name, part, split, tuple(train.images.shape[1:]), len(classes))
        mean, std = channel_statistics(train.images)
        if min(std) == 0:
            raise InputError(
                f"channel {std.index(0)} of the training images of {name!r} is constant; "
                "it cannot be normalised and carries no information: leave it out"
            )
        return cls(name, tuple(classes), train, validation, test, mean, std, _fingerprint(classes, splits))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> DataSet:
        """The same data set with its images and labels on ``device``."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Turns pixels into network input: ``(x / 255 - mean) / std`` per channel.

        Each of the three steps is rounded to fp32, with ``mean`` and ``std`` rounded to fp32 first, so that the
        result is the same bits on every device and can be recomputed by whoever feeds an exported file.

        Args:
            images: uint8 ``[n, C, H, W]``, on any device.

        Returns:
            fp32 ``[n, C, H, W]`` on the same device.

        Raises:
            InputError: ``images`` is not uint8 with this data set's channels.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != len(self.mean):
            raise InputError(
                f"normalise takes uint8 images [n, {len(self.mean)}, H, W]; got {images.dtype} {list(images.shape)}"
            )
        levels, mean, std = _affine(self.mean, self.std, images.device)
        return images.float().div_(levels).sub_(mean).div_(std)


@functools.lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # 255 is a tensor on the device: CUDA turns a division by a number into a product with its reciprocal, which
    # rounds differently. Outside inference mode, or the first caller would decide what later callers may do with it.
    with torch.inference_mode(False):
        shift = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        scale = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)
        return torch.full((1,), 255.0, device=device), shift, scale


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of ``images / 255``, from exact integer counts.

    Args:
        images: uint8 ``[N, C, H, W]``, ``N`` at least 1.

    Returns:
        ``(mean, std)``, each of ``C`` numbers in units of the full pixel range.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        # A histogram has no rounding to lose, needs no float copy of the images, and gives the same on any device.
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double().cpu()
        share = counts / counts.sum()
        mean = float((share * levels).sum())
        means.append(mean)
        stds.append(0.0 if int((counts > 0).sum()) == 1 else math.sqrt(float((share * (levels - mean) ** 2).sum())))
    return tuple(means), tuple(stds)


def _check_split(name: str, part: str, split: Split, shape: tuple[int, ...], classes: int) -> None:
    if len(split) == 0:
        raise InputError(f"the {part} split of {name!r} is empty; every split needs at least one image")
    if tuple(split.images.shape[1:]) != shape:
        raise InputError(
            f"the {part} images of {name!r} are {list(split.images.shape[1:])}, its training images {list(shape)}; "
            "all splits must have one size"
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"the {part} split of {name!r} has a label {low if low < 0 else high}; "
            f"allowed: 0 to {classes - 1}, an index into its {classes} classes"
        )


def _fingerprint(classes: Sequence[str], splits: dict[str, Split]) -> str:
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for part, split in splits.items():
        digest.update(f"{part} {list(split.images.shape)}".encode())
        for tensor in (split.images, split.labels, split.indices):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]
