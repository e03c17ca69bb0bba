from __future__ import annotations

import math

import pytest
import torch

from nasq.data import NAMES, Augment, AugmentPolicy
from nasq.errors import InputError


def _augment(seed: int = 0, **policy: float) -> Augment:
    return Augment(AugmentPolicy(**policy), torch.Generator().manual_seed(seed))


def _images(n: int = 32, shape: tuple[int, ...] = (3, 10, 12), seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


ALL = {"flip": True, "rotate": 20.0, "shift": 0.1, "crop": 0.2, "cutout": 0.3}


@pytest.mark.parametrize("policy", [{name: value} for name, value in ALL.items()] + [ALL])
def test_shape_type_and_input_are_kept_and_the_seed_decides(policy: dict[str, float]) -> None:
    images = _images()
    before = images.clone()
    augment = _augment(**policy)
    first, second = augment(images), augment(images)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(images, before)
    assert not torch.equal(first, second)
    assert torch.equal(first, _augment(**policy)(images))
    assert not torch.equal(first, _augment(1, **policy)(images))


def test_the_default_changes_nothing_and_draws_nothing() -> None:
    images, augment = _images(), _augment()
    before = augment.generator.get_state()
    assert torch.equal(augment(images), images)
    assert torch.equal(augment.generator.get_state(), before)


def test_flip_mirrors_half_of_the_images_exactly() -> None:
    images = _images(400)
    changed = _augment(flip=True)(images)
    mirrored = (changed == images.flip(-1)).flatten(1).all(1)
    same = (changed == images).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert 150 < int(mirrored.sum()) < 250


def test_crop_is_one_of_the_windows_of_the_padded_image_all_alike() -> None:
    images = _images(600, (2, 6, 5))
    changed = _augment(crop=0.2)(images)  # one pixel on each side
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    counts = torch.zeros(3, 3)
    for image, source in zip(changed, padded, strict=True):
        found = [(y, x) for y in range(3) for x in range(3) if torch.equal(image, source[:, y : y + 6, x : x + 5])]
        assert len(found) == 1
        counts[found[0]] += 1
    # Chi-square, 8 degrees of freedom: above 26.1 in 1 of 1,000 fair draws.
    assert ((counts - 600 / 9) ** 2 / (600 / 9)).sum() < 26.1


def test_cutout_is_a_square_of_zeros_in_each_image() -> None:
    images = _images(300, (2, 10, 10))
    changed = _augment(cutout=0.4)(images)
    areas = set()
    for image, source in zip(changed, images, strict=True):
        hole = (image != source).any(0)
        ys, xs = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        inside = image[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        assert int(inside.sum()) == 0
        assert int(hole.sum()) == len(ys) * len(xs)
        assert 2 <= len(ys) <= 4
        assert 2 <= len(xs) <= 4
        areas.add((len(ys), len(xs)))
    assert (4, 4) in areas  # whole, and cut at a border
    assert len(areas) == 9


def test_a_shift_moves_the_centre_of_mass_within_its_limit() -> None:
    images = torch.zeros(200, 1, 17, 17, dtype=torch.uint8)
    images[:, :, 8, 8] = 200
    changed = _augment(shift=0.2)(images).double()[:, 0]
    grid = torch.arange(17.0, dtype=torch.float64) - 8
    mass = changed.sum((1, 2))
    down = (changed.sum(2) * grid).sum(1) / mass
    right = (changed.sum(1) * grid).sum(1) / mass
    for moved in (down, right):
        assert moved.abs().max() <= 0.2 * 17 + 0.05
        assert moved.abs().max() > 2.5
        assert moved.mean().abs() < 0.6
    assert (mass - 200).abs().max() <= 2  # bilinear weights sum to one, up to rounding of four pixels


@pytest.mark.parametrize(("height", "width"), [(21, 21), (15, 31)])
def test_a_turn_keeps_distances_and_stays_within_its_angle(height: int, width: int) -> None:
    images = torch.zeros(100, 1, height, width, dtype=torch.uint8)
    images[:, :, height // 2 - 5, width // 2] = 240  # five pixels above the centre
    changed = _augment(rotate=60.0)(images).double()[:, 0]
    mass = changed.sum((1, 2))
    up = height // 2 - (changed.sum(2) * torch.arange(height)).sum(1) / mass
    right = (changed.sum(1) * torch.arange(width)).sum(1) / mass - width // 2
    assert (torch.hypot(up, right) - 5).abs().max() < 0.35
    angles = torch.atan2(right, up) * 180 / math.pi
    assert angles.abs().max() <= 62
    assert angles.min() < -40
    assert angles.max() > 40


def test_all_values_stay_in_range_and_constant_images_stay_constant_inside() -> None:
    white = torch.full((64, 1, 16, 16), 255, dtype=torch.uint8)
    changed = _augment(rotate=10.0, shift=0.1)(white)
    assert changed[:, :, 6:10, 6:10].unique().tolist() == [255]  # interpolation neither over- nor undershoots


def test_the_usual_policies() -> None:
    assert not AugmentPolicy.for_data("digits").flip
    assert AugmentPolicy.for_data("digits").rotate > 0
    assert AugmentPolicy.for_data("cifar10") == AugmentPolicy(flip=True, crop=0.125)
    for name in NAMES:
        # Text has no images to change.
        assert AugmentPolicy.for_data(name).changes_nothing == (name == "docstrings")
    assert AugmentPolicy.for_data("somebody else's").changes_nothing


def test_bad_input_is_named() -> None:
    bad = (("rotate", 181, "180"), ("shift", -0.1, "0.5"), ("crop", 4, "0.5"), ("cutout", True, "1"))
    for name, value, highest in bad:
        with pytest.raises(InputError, match=rf"augmentation {name} is {value}; allowed: a number from 0 to {highest}"):
            AugmentPolicy(**{name: value})
    with pytest.raises(InputError, match=r"uint8 \[n, C, H, W\]; got torch.float32 \[32, 3, 10, 12\]"):
        _augment(flip=True)(_images().float())
