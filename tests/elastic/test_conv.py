from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from networks import images
from torch import Tensor, nn

from nasq import Choice
from nasq.elastic import Conv2d, extract, share_active
from nasq.errors import InputError

WIDTH, OUT = Choice("width", (4, 8)), Choice("out", (4, 8))
KERNEL, STRIDE, GROUPS = Choice("kernel", (1, 3, 5)), Choice("stride", (2, 1)), Choice("groups", (1, 2, 4))


def by_hand(conv: Conv2d, given: dict[str, int]) -> nn.Conv2d:
    """torch's convolution with the weights cut by hand: first outputs, first inputs of a group, centre of the kernel."""
    i, o, k, s, g = (given[name] for name in ("width", "out", "kernel", "stride", "groups"))
    largest = conv.weight.shape[-1]
    begin = (largest - k) // 2
    made = nn.Conv2d(i, o, k, s, padding=conv.dilation * (k // 2), dilation=conv.dilation, groups=g)
    weight = torch.empty(o, i // g, k, k)
    for a, b, c, d in itertools.product(range(o), range(i // g), range(k), range(k)):
        weight[a, b, c, d] = conv.weight[a, b, begin + c, begin + d]
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(torch.stack([conv.bias[a] for a in range(o)]))
    return made


@pytest.mark.parametrize("dilation", [1, 2])
def test_equals_torch_with_weights_cut_by_hand(dilation: int) -> None:
    conv = Conv2d(WIDTH, OUT, KERNEL, STRIDE, groups=GROUPS, dilation=dilation)
    active = share_active(conv)
    for options in itertools.product((4, 8), (4, 8), (1, 3, 5), (2, 1), (1, 2, 4)):
        given = dict(zip(("width", "out", "kernel", "stride", "groups"), options, strict=True))
        active.clear()
        active.update(given)
        wanted = by_hand(conv, given)
        x = images(2, shape=(given["width"], 7, 9))
        assert torch.equal(conv(x), wanted(x)), given
        plain = extract(conv)
        assert isinstance(plain, nn.Conv2d) and plain.groups == given["groups"]
        assert torch.equal(plain.weight, wanted.weight) and torch.equal(plain.bias, wanted.bias)
        assert torch.equal(plain(x), wanted(x)), given
        assert sum(p.numel() for p in plain.parameters()) == conv.cost_parameters(conv.value)


def test_depthwise_follows_its_channels() -> None:
    hidden = Choice("expand", (1, 2)) * Choice("width", (3, 5))
    conv = Conv2d(hidden, hidden, 3, groups=hidden, bias=False)
    active = share_active(conv)
    assert conv.weight.shape == (10, 1, 3, 3)
    for expand, width in itertools.product((1, 2), (3, 5)):
        active.update(expand=expand, width=width)
        channels = expand * width
        x = images(2, shape=(channels, 6, 6))
        alone = [nn.functional.conv2d(x[:, c : c + 1], conv.weight[c : c + 1], padding=1) for c in range(channels)]
        torch.testing.assert_close(conv(x), torch.cat(alone, 1), rtol=1e-6, atol=1e-6)


def test_padding_in_pixels_and_same() -> None:
    fixed, same = Conv2d(3, 4, 4, padding=1), Conv2d(3, 4, KERNEL, dilation=3)
    x = images(1, shape=(3, 16, 16))
    assert fixed(x).shape[2:] == (15, 15)
    for kernel in (1, 3, 5):
        share_active(same)["kernel"] = kernel
        assert same(x).shape[2:] == (16, 16)


def test_only_the_active_slice_gets_a_gradient() -> None:
    conv = Conv2d(WIDTH, OUT, KERNEL)
    share_active(conv).update(width=4, out=4, kernel=3)
    conv(images(2, shape=(4, 6, 6))).square().sum().backward()
    assert conv.weight.grad is not None and conv.bias is not None and conv.bias.grad is not None
    inside = torch.zeros_like(conv.weight, dtype=torch.bool)
    inside[:4, :4, 1:4, 1:4] = True
    assert (conv.weight.grad[~inside] == 0).all() and (conv.weight.grad[inside] != 0).all()
    assert (conv.bias.grad[4:] == 0).all() and (conv.bias.grad[:4] != 0).all()


def test_extraction_owns_its_weights() -> None:
    conv = Conv2d(4, OUT, KERNEL)
    plain = extract(conv)
    x = images(1, shape=(4, 6, 6))
    before: Tensor = plain(x)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(1)
    assert torch.equal(plain(x), before)
    assert not {p.untyped_storage().data_ptr() for p in plain.parameters()} & {
        p.untyped_storage().data_ptr() for p in conv.parameters()
    }


def test_weights_begin_as_torchs_do() -> None:
    torch.manual_seed(3)
    ours = Conv2d(8, 16, 3, groups=2)
    torch.manual_seed(3)
    theirs = nn.Conv2d(8, 16, 3, groups=2)
    assert torch.equal(ours.weight, theirs.weight) and ours.bias is not None and torch.equal(ours.bias, theirs.bias)
    assert float(ours.weight.detach().abs().max()) <= 1 / math.sqrt(4 * 9)


@pytest.mark.parametrize("training", [True, False])
def test_extraction_keeps_the_mode(training: bool) -> None:
    assert extract(Conv2d(3, 4, 3).train(training)).training is training


# What the docstring says is refused has to be refused when the layer is made, not when an option is drawn in training.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 4}, r"odd kernel"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": Choice("kernel", (3, 4))}, r"odd kernel"),
        ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}, r"groups"),
        ({"in_channels": 4, "out_channels": 3, "kernel_size": 3, "groups": 2}, r"groups"),
        ({"in_channels": 4, "out_channels": 3, "kernel_size": 3, "padding": "valid"}, r"padding 'valid' is neither"),
    ],
)
def test_what_can_never_work_is_refused_when_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Conv2d(**arguments)


def test_active_options_that_do_not_fit_are_refused() -> None:
    conv = Conv2d(Choice("width", (4, 6)), 4, 3, groups=4)
    share_active(conv)["width"] = 6
    with pytest.raises(InputError, match=r"6 input and 4 output channels, which 4 groups do not divide"):
        conv(images(1, shape=(6, 4, 4)))
