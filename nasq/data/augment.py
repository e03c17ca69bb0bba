"""Random changes of training images, a whole batch at a time on the device that holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from nasq.errors import InputError

if TYPE_CHECKING:
    from nasq.data.dataset import DataSet

__all__ = ["Augment", "AugmentPolicy", "training_views"]


@dataclass(frozen=True)
class AugmentPolicy:
    """Which random changes are made. All lengths are shares of the image's side; the default changes nothing.

    Raises:
        InputError: A value outside its range.
    """

    flip: bool = False
    """Mirror left to right with probability 1/2."""
    rotate: float = 0.0
    """Turn by up to this many degrees either way, 0 to 180."""
    shift: float = 0.0
    """Move by up to this share of the side in each direction, to parts of a pixel (bilinear), 0 to 0.5."""
    crop: float = 0.0
    """Pad every side by this share (rounded to pixels, with 0) and crop the original size at random, 0 to 0.5."""
    cutout: float = 0.0
    """Set a square of this side to 0, its centre anywhere in the image, 0 to 1 (DeVries & Taylor, 2017)."""

    def __post_init__(self) -> None:
        for name, highest in (("rotate", 180.0), ("shift", 0.5), ("crop", 0.5), ("cutout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                raise InputError(f"augmentation {name} is {value!r}; allowed: a number from 0 to {highest:g}")

    @classmethod
    def for_data(cls, name: str) -> AugmentPolicy:
        """The usual policy of a data set that :func:`nasq.data.load` knows; no change at all for any other name."""
        return _USUAL.get(name, cls())

    @property
    def changes_nothing(self) -> bool:
        """Whether every change is switched off."""
        return not any(getattr(self, item.name) for item in fields(self))


_USUAL = {
    # A mirrored digit or letter is another sign, so no flip. An eighth of 8 pixels is one pixel.
    "digits": AugmentPolicy(rotate=10.0, shift=0.125),
    "cifar10": AugmentPolicy(flip=True, crop=0.125),
    "cifar100": AugmentPolicy(flip=True, crop=0.125),
    "fashion_mnist": AugmentPolicy(flip=True, crop=2 / 28),
    "image_folder": AugmentPolicy(flip=True, crop=0.125),
}


class Augment:
    """Applies a policy to batches; each image gets its own draw.

    What is drawn depends on the generator's state and the batch size alone, not on the device of the images.

    Args:
        policy: What to do.
        generator: The stream to draw from; on a CPU it serves images on any device.
    """

    def __init__(self, policy: AugmentPolicy, generator: torch.Generator) -> None:
        self.policy = policy
        self.generator = generator

    def __call__(self, images: Tensor, of: int | None = None, first: int = 0) -> Tensor:
        """Returns a changed copy of ``images``: uint8 ``[n, C, H, W]`` in and out, on their device.

        Args:
            images: What to change.
            of, first: They are ``images[first : first + n]`` of a batch of ``of``, and change as they would in it.

        Raises:
            InputError: ``images`` is not uint8 with four axes.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise InputError(f"augmentation takes uint8 [n, C, H, W]; got {images.dtype} {list(images.shape)}")
        policy = self.policy
        if policy.changes_nothing:
            return images
        # All numbers in one draw: one transfer, and the same stream whichever changes are switched on.
        count = len(images) if of is None else of
        drawn = torch.rand(count, 8, generator=self.generator, device=self.generator.device)[
            first : first + len(images)
        ]
        # To a device the numbers are sent without waiting for it; from one, they have to be waited for.
        drawn = drawn.to(images.device, non_blocking=images.device.type == "cuda")
        flip, angle, shift_y, shift_x, crop_y, crop_x, cut_y, cut_x = drawn.unbind(1)
        if policy.flip:
            images = torch.where((flip < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
        if policy.rotate or policy.shift:
            turn = (2 * angle - 1) * math.radians(policy.rotate)
            images = _moved(images, turn, (2 * shift_y - 1) * policy.shift, (2 * shift_x - 1) * policy.shift)
        if policy.crop:
            images = _cropped(images, policy.crop, crop_y, crop_x)
        if policy.cutout:
            images = _cut(images, policy.cutout, cut_y, cut_x)
        return images


def _moved(images: Tensor, turn: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Turns by ``turn`` radians about the centre, then moves by shares of the side; each argument is ``[n]``."""
    height, width = images.shape[2:]
    cos, sin = turn.cos(), turn.sin()
    # affine_grid maps output to input positions, in units of half a side: the ratio keeps a turn a turn in pixels.
    rows = [
        torch.stack([cos, sin * (height / width), -2 * right], 1),
        torch.stack([-sin * (width / height), cos, -2 * down], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.round_().clamp_(0, 255).to(torch.uint8)


def _cropped(images: Tensor, share: float, at_y: Tensor, at_x: Tensor) -> Tensor:
    height, width = images.shape[2:]
    pad_y, pad_x = round(share * height), round(share * width)
    padded = functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    # Every possible crop is a view of the padded batch; one gather picks each image's.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top = (at_y * (2 * pad_y + 1)).long()
    left = (at_x * (2 * pad_x + 1)).long()
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _cut(images: Tensor, share: float, at_y: Tensor, at_x: Tensor) -> Tensor:
    inside = []
    for size, at in ((images.shape[2], at_y), (images.shape[3], at_x)):
        side = round(share * size)
        first = (at * size).long() - side // 2
        along = torch.arange(size, device=images.device) - first.unsqueeze(1)
        inside.append((along >= 0) & (along < side))
    hole = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill(hole.unsqueeze(1), 0)


def training_views(data: DataSet, count: int, order: torch.Generator, changes: torch.Generator) -> Tensor:
    """Random training images as training sees them: each once, changed by the usual policy of the data set.

    BatchNorm statistics belong to what training sees: on weights trained with padded crops, statistics of whole images
    cost some per cent of accuracy.

    Args:
        data: Whose training images.
        count: How many; all of them where there are fewer.
        order: Draws which images.
        changes: Draws how they are changed.

    Returns:
        uint8 ``[n, C, H, W]``.
    """
    at = torch.randperm(len(data.train), generator=order)[:count]
    return Augment(AugmentPolicy.for_data(data.name), changes)(data.train.images[at.to(data.train.images.device)])
