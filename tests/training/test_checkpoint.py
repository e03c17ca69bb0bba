from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nasq.files
from nasq.errors import ArtifactError, InputError
from nasq.training import checkpoint


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint"


def _save(prefix: Path, value: int) -> None:
    checkpoint.save(prefix, {"a": torch.full((3,), float(value))}, {"epoch": value})


def _value(prefix: Path) -> tuple[float, int]:
    tensors, meta = checkpoint.load(prefix)
    return tensors["a"][0].item(), meta["epoch"]


def test_round_trip_of_all_kinds_of_tensors(prefix: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "transposed": base.t(),
        "tied": base,
        "again": base,
        "part": base[1],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "bytes": torch.Generator().manual_seed(1).get_state(),
        "bf16": torch.randn(3).bfloat16(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "wants": torch.randn(2, requires_grad=True),
    }
    checkpoint.save(prefix, tensors, {"x": [1, None, "ä", 0.1]})
    loaded, meta = checkpoint.load(prefix)
    assert meta == {"x": [1, None, "ä", 0.1]}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].nan_to_num(7.0), tensor.detach().nan_to_num(7.0)), name


def test_the_newest_is_loaded_and_two_are_kept(prefix: Path) -> None:
    for value in range(4):
        _save(prefix, value)
        assert _value(prefix) == (value, value)
    names = sorted(path.name for path in prefix.parent.iterdir())
    assert names == [
        "checkpoint.0.json",
        "checkpoint.0.safetensors",
        "checkpoint.1.json",
        "checkpoint.1.safetensors",
        "checkpoint.json",
    ]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("saves", [0, 1, 2, 3])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_killed_at_any_write_the_former_checkpoint_is_whole(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, saves: int, writes: int
) -> None:
    for value in range(saves):
        _save(prefix, value)
    done = 0

    def killing(real):
        def write(path: Path, data: object) -> None:
            nonlocal done
            if done == writes:
                raise _Killed
            done += 1
            real(path, data)

        return write

    with monkeypatch.context() as patched:
        for name in ("write_bytes", "write_json"):
            patched.setattr(checkpoint, name, killing(getattr(nasq.files, name)))
        with pytest.raises(_Killed):
            _save(prefix, 99)
    assert checkpoint.exists(prefix) == (saves > 0)
    if saves:
        assert _value(prefix) == (saves - 1, saves - 1)
    _save(prefix, 100)
    assert _value(prefix) == (100, 100)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_damage_is_named_with_the_way_back(prefix: Path) -> None:
    _save(prefix, 1)
    _save(prefix, 2)
    newest = prefix.with_name("checkpoint.1.safetensors")
    keep = newest.read_bytes()
    way_back = rf"go on from it with 'cp {prefix.parent}/checkpoint\.0\.json {prefix}\.json'"
    newest.write_bytes(keep[:-1])
    with pytest.raises(ArtifactError, match=rf"checkpoint\.1\.safetensors is truncated.*{way_back}"):
        checkpoint.load(prefix)
    newest.write_bytes(keep)
    _flip(newest, -1)
    with pytest.raises(ArtifactError, match=rf"is corrupt: its SHA-256.*{way_back}"):
        checkpoint.load(prefix)
    newest.unlink()
    with pytest.raises(ArtifactError, match=rf"checkpoint\.1\.safetensors is missing.*{way_back}"):
        checkpoint.load(prefix)
    shutil.copy(prefix.with_name("checkpoint.0.json"), prefix.with_name("checkpoint.json"))
    assert _value(prefix) == (1, 1)


def test_a_lost_or_broken_pointer_names_the_newest_whole_one(prefix: Path) -> None:
    _save(prefix, 1)
    _save(prefix, 2)
    pointer = prefix.with_name("checkpoint.json")
    text = pointer.read_text()
    pointer.unlink()
    assert checkpoint.exists(prefix)
    with pytest.raises(ArtifactError, match=r"checkpoint\.json is missing.*'cp \S+checkpoint\.1\.json"):
        checkpoint.load(prefix)
    pointer.write_text(text[:50])
    with pytest.raises(ArtifactError, match=r"corrupt or truncated.*'cp \S+checkpoint\.1\.json"):
        checkpoint.load(prefix)
    pointer.write_text(text.replace('"epoch": 2', '"epoch": 3'))
    with pytest.raises(ArtifactError, match=r"checksum does not fit.*'cp \S+checkpoint\.1\.json"):
        checkpoint.load(prefix)
    pointer.write_text('["a list"]')
    with pytest.raises(ArtifactError, match="is not the manifest of a checkpoint"):
        checkpoint.load(prefix)


def test_without_another_whole_one_it_says_to_start_again(prefix: Path) -> None:
    with pytest.raises(ArtifactError, match=r"checkpoint\.json is missing.*No other checkpoint is whole: remove"):
        checkpoint.load(prefix)
    _save(prefix, 1)
    prefix.with_name("checkpoint.0.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"No other checkpoint is whole: remove .* train again from the start"):
        checkpoint.load(prefix)


def test_a_newer_schema_says_to_upgrade(prefix: Path) -> None:
    _save(prefix, 1)
    pointer = prefix.with_name("checkpoint.json")
    manifest = json.loads(pointer.read_text())
    pointer.write_text(json.dumps({**manifest, "schema": 2}))
    with pytest.raises(ArtifactError, match=r"schema 2; this nasq reads 1 and older.*upgrade") as caught:
        checkpoint.load(prefix)
    assert "cp " not in str(caught.value)


def test_every_flipped_bit_of_the_tensors_is_seen(prefix: Path) -> None:
    _save(prefix, 1)
    path = prefix.with_name("checkpoint.0.safetensors")
    for at in range(0, path.stat().st_size, 7):
        _flip(path, at)
        with pytest.raises(ArtifactError, match="corrupt"):
            checkpoint.load(prefix)
        _flip(path, at)
    assert _value(prefix) == (1, 1)


_numbers = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
_plain = st.recursive(
    st.none() | st.booleans() | _numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(_plain)
def test_pack_and_unpack_are_inverse(plain: object) -> None:
    tensor = torch.arange(3)
    tensors, rest = checkpoint.pack({"plain": plain, "deep": [{"t": tensor}, tensor + 1]}, "state")
    back = checkpoint.unpack(tensors, json.loads(json.dumps(rest)))
    assert back["plain"] == plain
    assert back["deep"][0]["t"].tolist() == [0, 1, 2]
    assert back["deep"][1].tolist() == [1, 2, 3]
    assert set(tensors) == {"state/deep/0/t", "state/deep/1"}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": {"b": {1, 2}}}, r"the state 's/a/b' is \{1, 2\} of type set"),
        ({"x": float("nan")}, "the state 's/x' is nan of type float"),
        ({1: 2}, "the state 's' has the key 1; allowed: texts"),
        ({"$tensor": 1}, r"has the key '\$tensor'"),
        ({"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, "two tensors that would be called 's/a/b'"),
    ],
)
def test_what_cannot_be_packed_is_named(state: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        checkpoint.pack(state, "s")


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(ArtifactError, match="no tensor 's/a'"):
        checkpoint.unpack({}, {"a": {"$tensor": "s/a"}})
