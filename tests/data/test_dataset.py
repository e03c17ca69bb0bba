from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nasq.data import DataSet, Split
from nasq.errors import InputError


def _split(n: int, seed: int, shape: tuple[int, ...] = (3, 5, 4)) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(n) % 3)


def _data(**splits: Split) -> DataSet:
    parts = {"train": _split(20, 0), "validation": _split(7, 1), "test": _split(5, 2), **splits}
    return DataSet.from_splits("mine", ["a", "b", "c"], **parts)


def test_statistics_are_those_of_the_train_split_in_float64() -> None:
    data = _data()
    x = data.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, x.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, x.std((0, 2, 3)), rtol=1e-12)
    other = _data(validation=_split(9, 8), test=_split(9, 9))
    assert (other.mean, other.std) == (data.mean, data.std)


def test_normalise_is_three_fp32_steps_to_the_bit() -> None:
    data = _data()
    images = data.test.images
    mean = np.array(data.mean, dtype=np.float32)[:, None, None]
    std = np.array(data.std, dtype=np.float32)[:, None, None]
    expected = (images.numpy().astype(np.float32) / np.float32(255) - mean) / std
    assert data.normalise(images).dtype == torch.float32
    assert np.array_equal(data.normalise(images).numpy(), expected)
    assert images.dtype == torch.uint8
    x = data.normalise(data.train.images)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_normalise_first_used_in_inference_mode_still_works_in_training() -> None:
    data = _data(train=_split(20, 77))
    with torch.inference_mode():
        data.normalise(data.test.images)
    weight = torch.ones(1, requires_grad=True)
    (data.normalise(data.test.images) * weight).sum().backward()
    assert weight.grad is not None


def test_batches_are_in_order_and_complete() -> None:
    split = _split(10, 0)
    batches = list(split.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), split.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    with pytest.raises(InputError, match="batch_size is 0; allowed: 1 or more"):
        split.batches(0)


def test_fingerprint_sees_every_change() -> None:
    base = _data()
    assert len(base.fingerprint) == 16
    assert _data().fingerprint == base.fingerprint
    pixel = base.train.images.clone()
    pixel[3, 1, 2, 2] ^= 1
    labels = base.test.labels.clone()
    labels[0] = 2
    changed = [
        _data(train=replace(base.train, images=pixel)),
        _data(test=replace(base.test, labels=labels)),
        _data(validation=base.test, test=base.validation),
        _data(train=replace(base.train, indices=torch.arange(20))),
        _data(
            train=Split(base.train.images.transpose(2, 3).contiguous(), base.train.labels),
            validation=_split(7, 1, (3, 4, 5)),
            test=_split(5, 2, (3, 4, 5)),
        ),
        DataSet.from_splits("mine", ["a", "b", "d"], base.train, base.validation, base.test),
    ]
    prints = [data.fingerprint for data in changed]
    assert len({base.fingerprint, *prints}) == 7


def test_to_moves_all_splits_and_keeps_the_rest() -> None:
    data = _data()
    moved = data.to("meta")
    assert {split.images.device.type for split in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert moved.train.labels.device.type == "meta"
    assert (moved.fingerprint, moved.mean, moved.classes) == (data.fingerprint, data.mean, data.classes)
    assert data.input_shape == moved.input_shape == (3, 5, 4)


def test_bad_splits_are_named() -> None:
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"uint8 \[N, C, H, W\]; got torch.float32"):
        Split(images.float(), labels)
    with pytest.raises(InputError, match=r"labels of a split are int64 \[2\], one per image; got torch.int64 \[3\]"):
        Split(images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"indices of a split are int64 \[2\]"):
        Split(images, labels, torch.zeros(2))
    with pytest.raises(InputError, match="the test split of 'mine' is empty"):
        _data(test=Split(torch.zeros(0, 3, 5, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(InputError, match=r"images of 'mine' are \[1, 4, 4\], its training images \[3, 5, 4\]"):
        _data(validation=Split(images, labels))
    with pytest.raises(InputError, match="test split of 'mine' has a label 7; allowed: 0 to 2"):
        _data(test=replace(_split(3, 0), labels=torch.tensor([0, 7, 1])))
    with pytest.raises(InputError, match="has a label -1"):
        _data(train=replace(_split(3, 0), labels=torch.tensor([0, -1, 1])))
    with pytest.raises(InputError, match="channel 1 of the training images of 'mine' is constant"):
        constant = _split(6, 0)
        constant.images[:, 1] = 3
        _data(train=constant)
    with pytest.raises(InputError, match=r"takes uint8 images \[n, 3, H, W\]; got torch.uint8 \[2, 1, 4, 4\]"):
        _data().normalise(images)
