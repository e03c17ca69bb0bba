"""From a configuration to its objects: data, network, quantized supernet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from nasq import plugins
from nasq.cost import CostModel
from nasq.data import Augment, AugmentPolicy, DataSet, Split, training_views
from nasq.data import load as load_data
from nasq.elastic.base import evaluating
from nasq.elastic.read import read_space
from nasq.errors import InputError
from nasq.quant import QuantizedNetwork, quantize
from nasq.run.config import RunConfig
from nasq.space import Option
from nasq.supernet import BNState, Supernet
from nasq.targets import load as load_target
from nasq.training.splitting import WeightSets
from nasq.training.streams import stream

__all__ = ["Workshop", "assemble", "build_network", "recalibration_images"]


@dataclass
class Workshop:
    """What the stages of a run work with.

    Attributes:
        config: Of the run.
        data: Its images.
        supernet: The quantized supernet, or the forest that it was split into.
        costs: Its cost model.
    """

    config: RunConfig
    data: DataSet
    supernet: Supernet | WeightSets
    costs: CostModel

    @property
    def network(self) -> QuantizedNetwork:
        """The supernet's network; of a forest, that of the active subnet."""
        assert isinstance(self.supernet.module, QuantizedNetwork)
        return self.supernet.module

    def float_subnet(self, subnet: Mapping[str, Option], bn: BNState) -> nn.Module:
        """The subnet's architecture with the supernet's weights, without quantization."""
        plain = Supernet(build_network(self.config, self.data))
        with self.supernet.activate(subnet):  # of a forest, the weights that the subnet belongs to
            state = self.network.state_dict()
        plain.module.load_state_dict({name: state[name] for name in plain.module.state_dict()})
        chosen = {name: option for name, option in subnet.items() if name in plain.space.positions}
        return plain.extract(chosen, bn).eval()


def _factory(config: RunConfig) -> Callable[..., nn.Module]:
    factory = plugins.load("search_spaces", config.space)
    return cast("Callable[..., nn.Module]", factory)


def build_network(config: RunConfig, data: DataSet) -> nn.Module:
    """The search space's network for the data's classes and channels, with weights drawn from the run's seed.

    A factory that has a parameter ``image_size`` gets the data's.
    """
    factory = _factory(config)
    offered: dict[str, Any] = {"num_classes": len(data.classes), "in_channels": data.input_shape[0]}
    if "image_size" in inspect.signature(factory).parameters:
        rows, columns = data.input_shape[1:]
        offered["image_size"] = rows if rows == columns else (rows, columns)
    arguments = {**offered, **config.space_arguments}
    seed = int(torch.randint(2**62, (), generator=stream(config.seed, "initialisation")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return factory(**arguments)
        except TypeError as error:
            raise InputError(f"the search space {config.space!r} refuses its arguments: {error}.") from error


def load_images(config: RunConfig) -> DataSet:
    """The run's images: those the configuration names, or the space's own."""
    data = config.data
    name = data.name or plugins.space_info(_factory(config)).data
    return load_data(name, data.root, data.download, data.seed, data.validation, data.image_size, data.test_seed)


def _with_views(data: DataSet, views: int) -> DataSet:
    """Adds ``views - 1`` augmented copies of every validation image, the same ones in every run.

    The best of many subnets classify all of a few hundred images right; shifted and turned copies still tell them apart.
    """
    augment = Augment(AugmentPolicy.for_data(data.name), stream(0, "validation views"))
    split = data.validation
    copies = [split.images, *(augment(split.images) for _ in range(views - 1))]
    return replace(data, validation=Split(torch.cat(copies), split.labels.repeat(views)))


def recalibration_images(config: RunConfig, data: DataSet, count: int) -> torch.Tensor:
    """The training images of BatchNorm statistics, uint8 ``[count, C, H, W]``: the same ones for every subnet of a run.

    They are drawn at random and augmented as in training, from streams of the run's seed; without
    ``data.recalibration_augment`` they are the first ones as they are.
    """
    if not config.data.recalibration_augment:
        return data.train.images[:count]
    order, changes = (stream(config.seed, f"recalibration {what}") for what in ("order", "images"))
    return training_views(data, count, order, changes)


def assemble(config: RunConfig) -> Workshop:
    """Builds everything a run's stages need; the weights are the initial ones."""
    load_target(config.target)
    data = _with_views(load_images(config), config.data.validation_views)
    network = build_network(config, data)
    options = config.quantization.model_dump(exclude={"calibration_images"})
    example = torch.zeros(1, *data.input_shape)
    _require_outputs(config, network, example, len(data.classes))
    supernet = Supernet(quantize(network, example, config.target, **options), name=config.space)
    return Workshop(config, data, supernet, CostModel(supernet))


def _require_outputs(config: RunConfig, network: nn.Module, example: torch.Tensor, classes: int) -> None:
    """Refuses a network that does not run on an image of the data, or does not give one number per class."""
    read_space(network)  # choices that disagree are named as such, and not by what they do to sizes
    with evaluating(network), torch.no_grad():
        try:
            made = network(example)
        except InputError:
            raise
        except Exception as error:  # whatever a user's forward raises
            line = next(iter(str(error).splitlines()), "")
            raise InputError(
                f"the search space {config.space!r} does not run on one image of the data, of shape {list(example.shape)}: "
                f"{type(error).__name__}: {line.rstrip('.')}. Its network has to take one tensor of that shape; a factory "
                "that has the parameters in_channels and image_size is told the data's."
            ) from error
    if not isinstance(made, torch.Tensor):
        raise InputError(
            f"the search space {config.space!r} gives a {type(made).__name__} for one image. Its network has to return one "
            "tensor, the logits: return the others from a network around it."
        )
    shape = tuple(made.shape)
    if shape != (1, classes):
        raise InputError(
            f"the search space {config.space!r} gives outputs of shape {list(shape)} for one image; the data set has "
            f"{classes} classes, so [1, {classes}] is needed. Change space_arguments, or the data set."
        )
