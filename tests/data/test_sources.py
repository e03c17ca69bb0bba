from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nasq.data.folder
from nasq.data import NAMES, DataSet, load
from nasq.errors import InputError, MissingPackageError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def _indices(data: DataSet) -> list[set[int]]:
    found = []
    for part in SPLITS:
        indices = getattr(data, part).indices
        assert len(indices.unique()) == len(indices)
        found.append(set(indices.tolist()))
    return found


def _assert_disjoint(data: DataSet, total: int) -> None:
    train, validation, test = _indices(data)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert train | validation | test == set(range(total))


def test_digits_are_three_disjoint_stratified_parts(digits: DataSet) -> None:
    assert [len(getattr(digits, part)) for part in SPLITS] == [1078, 360, 359]
    _assert_disjoint(digits, 1797)
    everything = torch.cat([getattr(digits, part).labels for part in SPLITS]).bincount()
    for part in SPLITS:
        counts = getattr(digits, part).labels.bincount()
        assert (counts / counts.sum() - everything / 1797).abs().max() < 0.005
    assert digits.input_shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")


def test_digits_are_read_without_their_file_too(digits: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    again = load("digits")
    for part in SPLITS:
        one, other = getattr(digits, part), getattr(again, part)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert digits.classes == again.classes and digits.fingerprint == again.fingerprint


def test_digits_pixels_are_the_documented_map(digits: DataSet) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    table = [(255 * level + 8) // 16 for level in range(17)]
    assert table[0] == 0
    assert table[16] == 255
    assert len(set(table)) == 17
    for part in SPLITS:
        split = getattr(digits, part)
        for at in range(0, len(split), 97):
            raw = source.images[split.indices[at]]
            assert split.images[at, 0].tolist() == [[table[int(level)] for level in row] for row in raw]
            assert split.labels[at] == source.target[split.indices[at]]


def test_the_seed_moves_validation_and_never_test(digits: DataSet) -> None:
    other, again = load("digits", seed=1), load("digits", seed=0)
    assert again.fingerprint == digits.fingerprint != other.fingerprint
    assert torch.equal(other.test.indices, digits.test.indices)
    assert torch.equal(other.test.images, digits.test.images)
    assert not torch.equal(other.validation.indices, digits.validation.indices)
    smaller = load("digits", validation=100)
    assert len(smaller.validation) == 100
    assert torch.equal(smaller.test.indices, digits.test.indices)
    assert len(load("digits", validation=0.5).validation) == 719


def test_another_test_part_can_be_drawn(digits: DataSet) -> None:
    other = load("digits", test_seed=5)
    assert len(other.test) == len(digits.test)
    assert not torch.equal(other.test.indices, digits.test.indices)
    train, validation, test = _indices(other)
    assert not (train | validation) & test and len(train | validation | test) == 1797


def test_images_can_be_resized(digits: DataSet) -> None:
    larger = load("digits", image_size=(12, 16))
    assert larger.input_shape == (1, 12, 16)
    assert larger.train.images.dtype == torch.uint8
    assert torch.equal(larger.train.labels, digits.train.labels)
    assert abs(larger.mean[0] - digits.mean[0]) < 0.02
    assert torch.equal(load("digits", image_size=8).train.images, digits.train.images)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("digits", "docstrings")])
def test_what_lies_on_disk_needs_a_root(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' is read from disk.*--data-root DIR.*--download"):
        load(name)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"'{name}' is not below {tmp_path}: .* is missing.*--download"):
        load(name, root=tmp_path)


def test_files_that_torchvision_refuses_are_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a batch")
    with pytest.raises(InputError, match=r"torchvision cannot read 'cifar10' from .*not found or corrupted.*Remove"):
        load("cifar10", root=tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0")
    with pytest.raises(InputError, match="torchvision cannot read 'fashion_mnist'"):
        load("fashion_mnist", root=tmp_path)


def _idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_fashion_mnist_keeps_its_own_test_part(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (size, 28, 28)) for part, size in (("train", 60), ("t10k", 20))}
    for part, pixels in images.items():
        _idx(raw / f"{part}-images-idx3-ubyte", pixels)
        _idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(pixels)) % 10)
    data = load("fashion_mnist", root=tmp_path, validation=10)
    assert [len(getattr(data, part)) for part in SPLITS] == [50, 10, 20]
    _assert_disjoint(data, 80)
    assert data.input_shape == (1, 28, 28)
    assert np.array_equal(data.test.images[:, 0].numpy(), images["t10k"])
    assert np.array_equal(data.train.images[:, 0].numpy(), images["train"][data.train.indices.numpy()])
    assert data.validation.labels.bincount().tolist() == [1] * 10
    assert data.classes[0] == "T-shirt/top"


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("NASQ_DATA"), reason="set NASQ_DATA to the directory of the public data sets")
def test_cifar10() -> None:
    data = load("cifar10", root=os.environ["NASQ_DATA"])
    assert [len(getattr(data, part)) for part in SPLITS] == [45_000, 5_000, 10_000]
    _assert_disjoint(data, 60_000)
    for part, size in zip(SPLITS, (4_500, 500, 1_000), strict=True):
        assert getattr(data, part).labels.bincount().tolist() == [size] * 10
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=1e-3)
    assert data.classes[:2] == ("airplane", "automobile")


def _image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def _folder(root: Path, sizes: dict[str, int], shade: int = 0) -> None:
    for label, (name, count) in enumerate(sizes.items()):
        for i in range(count):
            _image(root / name / f"{i:02}.png", (10 * label + shade, i * 5, 200 + i))


def test_folder_with_its_own_parts(tmp_path: Path) -> None:
    for shade, part in enumerate(("train", "val", "test")):
        _folder(tmp_path / part, {"cat": 4 - shade, "dog": 3}, shade)
    data = load("image_folder", root=tmp_path, image_size=(6, 8))
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 6, 8)
    assert [len(getattr(data, part)) for part in SPLITS] == [7, 6, 5]
    _assert_disjoint(data, 18)
    assert data.train.images[:, 0, 0, 0].tolist() == [0] * 4 + [10] * 3
    assert data.test.images[:, 0, 0, 0].tolist() == [2] * 2 + [12] * 3
    assert data.train.images[:, 1, 3, 3].tolist() == [0, 5, 10, 15, 0, 5, 10]  # in the order of the names
    with pytest.raises(InputError, match=r"validation is 0\.1, but 'image_folder' at this root has a validation part"):
        load("image_folder", root=tmp_path, image_size=6, validation=0.1)


def test_folder_without_parts_is_split_like_digits(tmp_path: Path) -> None:
    _folder(tmp_path, {"cat": 20, "dog": 30})
    data, other = (load("image_folder", root=tmp_path, image_size=4, seed=seed) for seed in (0, 1))
    assert [len(getattr(data, part)) for part in SPLITS] == [36, 4, 10]
    _assert_disjoint(data, 50)
    assert data.test.labels.bincount().tolist() == [4, 6]
    assert torch.equal(other.test.indices, data.test.indices)
    assert not torch.equal(other.validation.indices, data.validation.indices)


def test_folder_with_train_and_test_only(tmp_path: Path) -> None:
    _folder(tmp_path / "train", {"cat": 20, "dog": 20})
    _folder(tmp_path / "test", {"dog": 2}, shade=100)
    data = load("image_folder", root=tmp_path, image_size=4)
    assert [len(getattr(data, part)) for part in SPLITS] == [36, 4, 2]
    assert data.test.labels.tolist() == [1, 1]
    assert data.test.images[0, 0, 0, 0] == 100
    _assert_disjoint(data, 42)


def test_images_become_upright_rgb_cropped_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (255, 0, 0)
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    Image.fromarray(wide).save(path)
    turned = Image.fromarray(wide.transpose(1, 0, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "a" / "2.png", exif=exif)
    for mode, name in (("L", "3.png"), ("P", "4.gif"), ("RGBA", "5.png"), ("1", "6.png")):
        _image(tmp_path / "a" / name, (255, 255, 255), mode=mode)
    _folder(tmp_path, {"b": 6})
    (tmp_path / "a" / "notes.txt").write_text("passed over")
    _image(tmp_path / "a" / ".hidden.png", (1, 2, 3))
    (tmp_path / ".git").mkdir()
    data = load("image_folder", root=tmp_path, image_size=10, validation=2)
    images = {
        int(i): image
        for part in SPLITS
        for i, image in zip(getattr(data, part).indices, getattr(data, part).images, strict=True)
    }
    assert len(images) == 12
    for at in (0, 1):
        assert (images[at].float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 8, at
    for at in (2, 3, 4, 5):
        assert images[at].unique().tolist() == [255]


def test_unreadable_files_are_named_all_at_once(tmp_path: Path) -> None:
    _folder(tmp_path, {"cat": 5, "dog": 20})
    for i in range(12):
        (tmp_path / "dog" / f"broken{i:02}.png").write_bytes(b"\x89PNG\r\n")
    truncated = tmp_path / "cat" / "01.png"
    truncated.write_bytes(truncated.read_bytes()[:40])
    with pytest.raises(InputError) as caught:
        load("image_folder", root=tmp_path, image_size=4)
    text = str(caught.value)
    assert text.startswith(f"13 images cannot be read: {truncated} (")
    assert "broken08.png" in text
    assert "broken09.png" not in text
    assert "and 3 more. Repair or remove them" in text


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image_size is needed by 'image_folder'"):
        load("image_folder", root=tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path / 'no'} is not a directory"):
        load("image_folder", root=tmp_path / "no", image_size=4)
    with pytest.raises(InputError, match="holds 0 class folders; one folder per class, two or more"):
        load("image_folder", root=tmp_path, image_size=4)
    _folder(tmp_path / "train", {"cat": 3, "dog": 3})
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(InputError, match=r"emu holds no image; allowed endings: \.bmp"):
        load("image_folder", root=tmp_path, image_size=4)
    (tmp_path / "train" / "emu").rmdir()
    _folder(tmp_path / "val", {"fox": 1})
    with pytest.raises(InputError, match=r"fox is a class that the training part does not have; .* are cat, dog"):
        load("image_folder", root=tmp_path, image_size=4)


def test_more_images_than_memory_are_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path, {"cat": 3, "dog": 3})
    fake = SimpleNamespace(sysconf=lambda name: 1 if name == "SC_PAGE_SIZE" else 500, cpu_count=os.cpu_count)
    monkeypatch.setattr(nasq.data.folder, "os", fake)
    with pytest.raises(InputError, match=r"6 images of 8x8 pixels take .* more than half of this machine's"):
        load("image_folder", root=tmp_path, image_size=8)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"data set 'cifar'. Did you mean 'cifar10'\? Allowed: cifar10, cifar100"):
        load("cifar")
    for seed in (-1, 1.0, True):
        with pytest.raises(InputError, match=rf"seed is {seed!r}; allowed: an integer from 0"):
            load("digits", seed=seed)  # type: ignore[arg-type]
    for size in (0, (8, 8, 8), (8, 5000), (8, 1.5)):
        with pytest.raises(InputError, match=r"image_size is .*; allowed: a side or \(height, width\)"):
            load("digits", image_size=size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="validation is 2000; allowed"):
        load("digits", validation=2000)


def test_a_missing_package_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match="pip install scikit-learn"):
        load("digits")
