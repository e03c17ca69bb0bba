"""``timm``: any model of pytorch-image-models by its name, such as ``timm:resnet18`` or ``timm:vit_tiny_patch16_224``.

Source: pytorch-image-models (R. Wightman, 2019), which names the paper of each model. Size: 1 before ``quantize``, which
makes the bits of every convolution and linear layer choices; with ``width``, ``kernel`` or ``depth`` the size of what
:func:`nasq.elastic.convert` finds. Default data: ``cifar10``. Weights are random unless a checkpoint is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nasq import elastic
from nasq.errors import ArtifactError, InputError, require
from nasq.plugins import search_space

__all__ = ["timm"]


def _unknown(model: str, names: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return InputError(
        f"timm has no model {model!r}.{guess} It has {len(names)}; timm.list_models('*part of a name*') lists them."
    )


def _sized(library: Any, model: str, image_size: int | Sequence[int] | None) -> dict[str, Any]:
    """The argument that gives a model its image size, where its position tables depend on it."""
    if image_size is None:
        return {}
    size = image_size if isinstance(image_size, int) else tuple(image_size)
    return {"img_size": size} if library.get_pretrained_cfg(model).fixed_input_size else {}


def _created(library: Any, model: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        made = library.create_model(model, pretrained=pretrained, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        if not pretrained:
            raise InputError(f"timm cannot build {model!r} with {dict(arguments)}: {line}.") from error
        raise InputError(
            f"the pretrained weights of {model!r} cannot be had: {line}. They are downloaded; without a network, give a "
            "file: checkpoint=PATH."
        ) from error
    assert isinstance(made, nn.Module)
    return made


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; nothing in it is executed."""
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a corrupt file makes torch raise almost anything
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"the checkpoint {path} cannot be read: {line[:200]}.") from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ArtifactError(f"the checkpoint {path} holds no tensors by name. Save model.state_dict().")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _load(network: nn.Module, path: Path) -> None:
    """Loads all weights of a checkpoint; a classifier for other classes is an error that says what to do."""
    tensors = _read(path)
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in own | given if own.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise ArtifactError(
            f"the checkpoint {path} does not fit: {name!r} has the shape {given.get(name, 'absent')} in the file and "
            f"{own.get(name, 'absent')} in the model ({len(wrong)} differ). Name the file's own number of classes in "
            "checkpoint_classes, and the model's own arguments."
        )
    network.load_state_dict(tensors)


@search_space(
    source="pytorch-image-models (Wightman 2019)",
    data="cifar10",
    input_shape=(3, 32, 32),
    argument="MODEL",
    tiny={"model": "test_efficientnet"},
)
def timm(
    model: str = "resnet18",
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    checkpoint_classes: int | None = None,
    width: Sequence[float] | None = None,
    kernel: bool = False,
    depth: bool = False,
    round_to: int = 8,
    **variant: Any,
) -> nn.Module:
    """A model of timm, in the form that nasq traces.

    Args:
        model: Its name.
        num_classes: Number of outputs; 0 gives features.
        in_channels: Channels of the input.
        image_size: Rows and columns of the input, for models that depend on it.
        pretrained: Whether timm downloads its published weights.
        checkpoint: A local file instead: ``.safetensors``, or what ``torch.save(model.state_dict())`` wrote.
        checkpoint_classes: Number of classes of the checkpoint, where it is not ``num_classes``; its classifier is then
            replaced by a new one.
        width, kernel, depth, round_to: What :func:`nasq.elastic.convert` makes elastic beside the bits.
        variant: Any argument of the model itself.

    Raises:
        InputError: timm has no such model, refuses the arguments, or cannot download the weights.
        ArtifactError: The checkpoint cannot be read or does not fit; names the first tensor.
    """
    library = require("timm")
    if not library.is_model(model):
        raise _unknown(model, library.list_models())
    arguments = {"in_chans": in_channels, **_sized(library, model, image_size), **variant}
    if checkpoint is None:
        network = _created(library, model, pretrained, {"num_classes": num_classes, **arguments})
    else:
        network = _created(library, model, False, {"num_classes": checkpoint_classes or num_classes, **arguments})
        _load(network, Path(checkpoint))
        if checkpoint_classes not in (None, num_classes):
            network.reset_classifier(num_classes)  # type: ignore[operator]
    network = elastic.simplify(network)
    if width is None and not kernel and not depth:
        return network
    side = image_size or library.get_pretrained_cfg(model).input_size[1:]
    rows, columns = (side, side) if isinstance(side, int) else side
    example = torch.zeros(1, in_channels, rows, columns)
    return elastic.convert(network, example, width=width or (), kernel=kernel, depth=depth, round_to=round_to)
