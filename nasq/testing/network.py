"""Checks of the float supernet: activate, extract, recalibrate, costs, files, refusals."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nasq.cost import CostModel, counted_macs
from nasq.elastic import batch_norms
from nasq.errors import InputError
from nasq.supernet import Supernet
from nasq.testing.subject import ConformanceError, Subject, expect, shown

__all__ = ["costs", "difference", "extraction", "gradients", "recalibration", "save_and_load", "wrong_inputs"]


def difference(found: Tensor, wanted: Tensor) -> str:
    """How two tensors differ, for a message; empty where they are equal bit for bit."""
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    if torch.equal(found, wanted):
        return ""
    wrong = found != wanted
    largest = (found.double() - wanted.double()).abs().max().item()
    return f"{int(wrong.sum())} of {wrong.numel()} numbers differ, by up to {largest:.3g}"


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _unchanged(before: dict[str, Tensor], module: nn.Module, what: str) -> None:
    for name, tensor in module.state_dict().items():
        expect(torch.equal(tensor, before[name]), f"{what} changed {name!r} of the supernet.")


def gradients(subject: Subject) -> str:
    """Subnets compute finite numbers and can be trained."""
    supernet, x = subject.supernet, subject.inputs(2)
    tried = subject.subnets[:3]
    for subnet in tried:
        with supernet.activate(subnet):
            y = supernet(x)
            expect(isinstance(y, Tensor), f"the network returns {type(y).__name__} instead of one tensor.")
            expect(len(y) == len(x), f"it gives {len(y)} outputs for {len(x)} inputs.")
            expect(bool(y.isfinite().all()), f"the subnet {shown(subnet)} computes NaN or infinite numbers.")
            loss = y.square().mean()
            if any(parameter.requires_grad for parameter in supernet.parameters()):
                loss.backward()
        moved = [p.grad for p in supernet.parameters() if p.grad is not None]
        expect(moved, f"no parameter of the subnet {shown(subnet)} gets a gradient.")
        expect(all(bool(g.isfinite().all()) for g in moved), f"the subnet {shown(subnet)} has gradients that are NaN.")
        supernet.zero_grad(set_to_none=True)
    return f"{len(tried)} subnets"


def extraction(subject: Subject) -> str:
    """The extracted plain model computes what the activated supernet does, bit for bit, and has weights of its own."""
    supernet, x = subject.supernet, subject.inputs(2)
    before = _state(supernet)
    for subnet in subject.subnets:
        with supernet.activate(subnet), torch.no_grad():
            wanted = supernet(x)
        plain = supernet.extract(subnet).eval()
        with torch.no_grad():
            expect_same(plain(x), wanted, f"the extracted subnet {shown(subnet)}")
            for parameter in plain.parameters():
                parameter.fill_(float("nan"))
        _unchanged(before, supernet, f"extracting {shown(subnet)} and overwriting the extracted weights")
    return f"{len(subject.subnets)} subnets, bit for bit"


def expect_same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raises unless two tensors are equal bit for bit."""
    text = difference(found, wanted)
    expect(not text, f"{what} does not compute what the activated supernet does: {text}.")


def recalibration(subject: Subject) -> str:
    """Statistics of a subnet leave the supernet as it was, and travel into the extracted model."""
    supernet, x = subject.supernet, subject.inputs(2)
    if not list(batch_norms(supernet.module)):
        return "no BatchNorm to recalibrate"
    before, tried = _state(supernet), subject.subnets[:4]
    for subnet in tried:
        statistics = supernet.recalibrate(subnet, [subject.inputs(8, 2), subject.inputs(8, 3)])
        _unchanged(before, supernet, f"recalibrating {shown(subnet)}")
        with supernet.activate(subnet, statistics), torch.no_grad():
            wanted = supernet(x)
        _unchanged(before, supernet, f"activating {shown(subnet)} with statistics")
        with torch.no_grad():
            expect_same(
                supernet.extract(subnet, statistics).eval()(x), wanted, f"{shown(subnet)} extracted with statistics"
            )
    return f"{len(tried)} subnets"


def costs(subject: Subject) -> str:
    """Parameters and multiply-adds are those of the extracted model by torch's counters, in both forms."""
    supernet, example = subject.supernet, subject.inputs(1)
    model = CostModel(supernet, example)
    rows = supernet.space.to_rows(subject.subnets)
    found = model.evaluate(rows)
    for index, subnet in enumerate(subject.subnets):
        plain = supernet.extract(subnet).eval()
        counted = {"params": sum(p.numel() for p in plain.parameters()), "macs": counted_macs(plain, example)}
        for cost, wanted in counted.items():
            given = int(found[cost][index])
            expect(
                given == wanted, f"{cost} of the subnet {shown(subnet)} are {given}, and {wanted} by torch's counters."
            )
        alone = model.of(subnet)
        many = {cost: values[index].item() for cost, values in found.items()}
        expect(alone == many, f"the costs of {shown(subnet)} alone are {alone}, and {many} among others.")
    return f"{len(subject.subnets)} subnets, exact"


def save_and_load(subject: Subject) -> str:
    """Another build of the space loads the weights and computes the same."""
    supernet, x = subject.supernet, subject.inputs(2)
    other = Supernet(subject.build(1), subject.name).eval()
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        supernet.save(Path(scratch))
        other.load(Path(scratch))
    for subnet in subject.subnets[:2]:
        with supernet.activate(subnet), other.activate(subnet), torch.no_grad():
            text = difference(other(x), supernet(x))
        expect(not text, f"after save and load into another build, {shown(subnet)} computes something else: {text}.")
    return "into another build"


def wrong_inputs(subject: Subject) -> str:
    """An input of another size, and an option outside the space, are refused by name."""
    channels, *rest = subject.input_shape
    wrong = torch.zeros(1, channels + 1, *rest)
    for taken in (partial(CostModel, subject.supernet), subject.supernet):
        try:
            taken(wrong)
        except InputError:
            continue
        except Exception as error:
            raise ConformanceError(
                f"an input of shape {list(wrong.shape)} raises {type(error).__name__} instead of an InputError: {error}"
            ) from error
        raise ConformanceError(f"an input of shape {list(wrong.shape)} is taken, and {channels} channels are meant.")
    for choice in subject.space.choices[:1]:
        try:
            subject.supernet.activate({**subject.space.default(), choice.name: "no such option"})
        except InputError as error:
            expect(choice.name in str(error), f"the refusal of a wrong option does not name {choice.name!r}: {error}")
        else:
            raise ConformanceError(f"activate() takes the option 'no such option' for {choice.name!r}.")
    return "refused"
