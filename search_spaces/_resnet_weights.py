"""Published weights for the ResNets of :mod:`nasq.search_spaces.resnet`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nasq.errors import ArtifactError

__all__ = ["load_weights"]

_CONV = re.compile(r"^layer(\d+)\.(\d+)\.")


def load_weights(network: nn.Module, weights: Path | str | Mapping[str, Tensor]) -> None:
    """Loads published weights into the largest subnet.

    Args:
        network: A ``CifarResNet`` or an ``ImageNetResNet``, elastic or not; it must hold the blocks and widths that the
            weights are for.
        weights: A ``.npz`` file of plain arrays, or a state dict. Names are the usual ones: ``conv1``, ``bn1``,
            ``layer{s}.{i}.conv{j}``, ``layer{s}.{i}.bn{j}`` and ``linear`` (CIFAR) or ``layer{s}.{i}.downsample.{j}``
            and ``fc`` (torchvision's ResNet-50). Counters of batches are not needed.

    Raises:
        ArtifactError: The file cannot be read, or names or shapes do not fit; names the first that does not.
    """
    given = _read(Path(weights)) if isinstance(weights, Path | str) else weights
    state = {_CONV.sub(r"layer\1.blocks.\2.", name): value for name, value in given.items()}
    own = network.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name.endswith("num_batches_tracked"):
            continue
        found = tuple(state[name].shape) if name in state else None
        wanted = tuple(own[name].shape) if name in own else None
        if found != wanted:
            raise ArtifactError(
                f"the weights do not fit {type(network).__name__}: {name!r} has the shape {_shape(found)} in them and "
                f"{_shape(wanted)} here. Build the network with the depth, widths and classes they were trained with."
            )
    network.load_state_dict({**own, **state})


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (it is absent)" if shape is None else str(list(shape))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read as a .npz file of plain arrays: {error}.") from error
