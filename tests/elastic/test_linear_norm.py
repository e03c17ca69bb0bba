from __future__ import annotations

import itertools

import pytest
import torch
from networks import generator, images
from torch import nn

from nasq import Choice
from nasq.elastic import BatchNorm2d, Linear, batch_norms, extract, share_active

FEATURES, OUT = Choice("features", (3, 5)), Choice("out", (2, 7))


def test_linear_equals_torch_with_weights_cut_by_hand() -> None:
    linear = Linear(FEATURES, OUT * 2)
    active = share_active(linear)
    for features, out in itertools.product((3, 5), (2, 7)):
        active.update(features=features, out=out)
        wanted = nn.Linear(features, 2 * out)
        with torch.no_grad():
            wanted.weight.copy_(torch.stack([linear.weight[row, :features] for row in range(2 * out)]))
            wanted.bias.copy_(linear.bias[: 2 * out])
        x = torch.randn(2, 4, features, generator=generator(1))
        plain = extract(linear)
        assert isinstance(plain, nn.Linear)
        assert torch.equal(linear(x), wanted(x)) and torch.equal(plain(x), wanted(x))
        assert (plain.in_features, plain.out_features) == (features, 2 * out)
        assert linear.cost_parameters(linear.value) == sum(p.numel() for p in plain.parameters())


def test_linear_without_bias_and_its_gradient() -> None:
    linear = Linear(FEATURES, OUT, bias=False)
    share_active(linear).update(features=3, out=2)
    linear(torch.ones(1, 3)).sum().backward()
    assert linear.bias is None and linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, torch.nn.functional.pad(torch.ones(2, 3), (0, 2, 0, 5)))
    assert extract(linear).bias is None


def pair(count: int, **options: object) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """An elastic norm of 6 channels with ``count`` active ones, and torch's with the same numbers."""
    norm = BatchNorm2d(Choice("width", (4, 6)), **options)
    rng = generator(0)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.2)
    share_active(norm)["width"] = count
    theirs = nn.BatchNorm2d(count, **options)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            source = norm.state_dict()[name]
            tensor.copy_(source[:count] if source.ndim else source)
    return norm, theirs


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_equals_torchs_in_both_modes(count: int, momentum: float | None, affine: bool) -> None:
    ours, theirs = pair(count, momentum=momentum, affine=affine, eps=1e-3)
    untouched = {name: tensor[count:].clone() for name, tensor in ours.state_dict().items() if tensor.ndim}
    for step in range(3):
        x = images(5, step, shape=(count, 3, 4)) * 2 + 1
        assert torch.equal(ours.train()(x), theirs.train()(x))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
        assert torch.equal(extract(ours)(x), theirs(x))
    assert torch.equal(ours.running_mean[:count], theirs.running_mean)
    assert torch.equal(ours.running_var[:count], theirs.running_var)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 3
    for name, tensor in untouched.items():
        assert torch.equal(ours.state_dict()[name][count:], tensor), name


def test_extracted_norm_owns_its_numbers() -> None:
    ours, theirs = pair(4)
    plain = extract(ours)
    assert isinstance(plain, nn.BatchNorm2d)
    ours.train()(images(4, shape=(4, 3, 3)))
    with torch.no_grad():
        ours.weight.zero_()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    assert ours.cost_parameters(ours.value) == sum(p.numel() for p in plain.parameters()) == 8
    assert BatchNorm2d(4, affine=False).cost_parameters(int) == 0


def test_batch_norms_are_found_elastic_or_plain_but_not_those_without_statistics() -> None:
    net = nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU())
    assert [path for path, _ in batch_norms(net)] == ["0", "1"]
