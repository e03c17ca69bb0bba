"""GradSign and the per-sample gradients behind it, against a loop over samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from nasq.proxies.gradsign import GradSign
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.errors import InputError
from nasq.quant import quantize
from nasq.ranking import layers_of, score
from nasq.ranking.batched import Geometry, sample_gradients
from nasq.ranking.copies import private_copy
from nasq.ranking.per_sample import stream_gradients
from nasq.ranking.untrained import calibrate_untrained
from tests.networks import images, quantized
from tests.proxies.nets import Attentive, Batch, Gaps, Mixed, batch, built, one_at_a_time, small


def gradsign(model: nn.Module, given: Batch, **options: object) -> float:
    return score([GradSign()], model, given, **options)["gradsign"]  # type: ignore[arg-type]


def summed(rows: dict[str, Tensor]) -> float:
    return float(sum(one.sign().sum(0).abs().sum() for one in rows.values()))


def streamed(model: nn.Module, given: Batch, chunk: int, room: int | None = None) -> dict[str, Tensor]:
    copied = private_copy(model)
    layers = layers_of(copied)
    for weight in layers.values():
        weight.requires_grad_(True)
    found = {path: torch.zeros(len(given[0]), *weight.shape, dtype=weight.dtype) for path, weight in layers.items()}

    def take(path: str, gradients: Tensor, at: slice) -> None:
        found[path][at] = gradients

    signal = lambda logits, at: F.cross_entropy(logits, given[1][at], reduction="sum")  # noqa: E731
    stream_gradients(copied, layers, given[0], signal, take, chunk, room)
    return found


@pytest.mark.parametrize("net", [Mixed, Attentive])
@pytest.mark.parametrize(("chunk", "room"), [(1, None), (4, None), (6, None), (4, 1), (6, 4000)])
def test_per_sample_gradients_equal_one_pass_per_sample(net: type[nn.Module], chunk: int, room: int | None) -> None:
    model, (x, y) = built(net).double(), batch()
    given = (x.double(), y)
    wanted, found = one_at_a_time(model, given), streamed(model, given, chunk, room)
    assert wanted.keys() == found.keys()
    for path, one in wanted.items():
        torch.testing.assert_close(found[path], one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [Mixed, Attentive, Gaps])
def test_the_score_equals_the_loop(net: type[nn.Module]) -> None:
    model, (x, y) = built(net), batch(9)
    exact = summed(one_at_a_time(model.double(), (x.double(), y)))
    assert gradsign(model.double(), (x.double(), y)) == exact
    assert gradsign(model.float(), (x, y)) == pytest.approx(exact, rel=1e-3)


GEOMETRIES = [
    (kernel, stride, padding, dilation, groups)
    for kernel, stride, padding, dilation, groups in itertools.product(
        [(1, 1), (3, 3), (2, 5)], [(1, 1), (2, 1)], [(0, 0), (1, 2)], [(1, 1), (2, 1)], [1, 2, 4]
    )
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_gradient_of_every_convolution(geometry: tuple[tuple[int, int], ...]) -> None:
    kernel, stride, padding, dilation, groups = geometry
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, 7, 8, generator=rng, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *kernel, generator=rng, dtype=torch.float64, requires_grad=True)  # type: ignore[operator, call-overload, misc]
    made = F.conv2d(a, weight, None, stride, padding, dilation, groups)  # type: ignore[call-overload]
    g = torch.randn(made.shape, generator=rng, dtype=torch.float64)
    found = sample_gradients(a, g, weight.detach(), Geometry(stride, padding, dilation, groups))  # type: ignore[arg-type]
    for index in range(len(a)):
        one = F.conv2d(a[index : index + 1], weight, None, stride, padding, dilation, groups)  # type: ignore[call-overload]
        (wanted,) = torch.autograd.grad(one, weight, g[index : index + 1])
        torch.testing.assert_close(found[index], wanted, rtol=1e-10, atol=1e-12)
    # float32 goes another way on a CPU
    single = sample_gradients(
        a.float(), g.float(), weight.detach().float(), Geometry(stride, padding, dilation, groups)
    )  # type: ignore[arg-type]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-4)


def test_branches_that_no_image_reaches_have_no_gradient() -> None:
    """Their convolutions are not computed image by image; their biases and what follows them are."""
    for cut in (False, True):
        model, (x, y) = built(lambda cut=cut: Gaps(cut)).double(), batch()
        with torch.no_grad():
            model.empty[2].bias.fill_(0.5)
        given = (x.double(), y)
        wanted, found = one_at_a_time(model, given), streamed(model, given, 4)
        assert not wanted["empty.1"].any() and wanted["after"].any() and wanted["body.0.1"].any() == (not cut)
        for path, one in wanted.items():
            torch.testing.assert_close(found[path], one, rtol=1e-9, atol=1e-12)


def test_one_sample_counts_the_weights_that_have_a_gradient() -> None:
    model, given = built(Mixed), batch(1)
    assert gradsign(model, given) == sum(int((one != 0).sum()) for one in one_at_a_time(model, given).values())


def test_equal_samples_agree_fully() -> None:
    model, (x, y) = built(Mixed).double(), batch(1)
    many = (x.double().expand(5, -1, -1, -1), y.expand(5))
    assert gradsign(model, many) == 5 * gradsign(model, (x.double(), y))


def test_bounds_order_and_loss_scale() -> None:
    model, (x, y) = built(Mixed).double(), batch(6)
    value = gradsign(model, (x.double(), y))
    assert value == int(value) and 0 <= value <= 6 * sum(one.numel() for one in layers_of(model).values())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert gradsign(model, (x.double()[order], y[order])) == value
    counts = one_at_a_time(model, (x.double(), y))
    assert summed({path: -3.5 * one for path, one in counts.items()}) == value


def test_opposite_gradients_cancel() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    x = torch.ones(2, 1, 1, 2)
    # With equal logits the gradient is (p - onehot) x: +-0.5 x, of opposite signs for the two labels.
    assert gradsign(model, (x, torch.tensor([0, 1]))) == 0
    assert gradsign(model, (x, torch.tensor([0, 0]))) == 2 * 4


def test_a_hand_computed_softmax() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    x = torch.tensor([[1.0, -1.0], [1.0, 2.0], [-3.0, 0.0]]).reshape(3, 1, 1, 2)
    # signs of row 0 of the gradient (class 0): label 0 -> -x, label 1 -> +x
    # sample 0, label 0: (-, +); sample 1, label 1: (+, +); sample 2, label 0: (+, 0): sums 1 and 2; row 1 is the opposite
    assert gradsign(model, (x, torch.tensor([0, 1, 0]))) == 2 * (1 + 2)


def test_an_unused_layer_and_frozen_norms_change_nothing() -> None:
    model, given = built(Mixed), batch()
    value = gradsign(model, given)
    model.extra = nn.Conv2d(3, 3, 3)
    model.bn0.weight.requires_grad_(False)
    model.stem.weight.requires_grad_(False)
    assert gradsign(model, given) == value


def test_batchnorm_over_the_batch_is_another_score() -> None:
    """The documented choice: the batched pass normalises every sample by its own statistics."""
    model, (x, y) = built(Mixed).double().train(), batch(6)
    rows = []
    for index in range(6):
        model.zero_grad()
        F.cross_entropy(model(x.double()), y, reduction="none")[index].backward()
        rows.append(model.stem.weight.grad.clone())
    own = one_at_a_time(model, (x.double(), y))["stem"]
    assert float((torch.stack(rows) - own).abs().max()) > 1e-4
    assert score([GradSign("running")], model, (x.double(), y)) != score([GradSign()], model, (x.double(), y))


def test_quantized_networks_are_seen_through_their_quantizers() -> None:
    scores = {}
    for bits in (2, 4, 8):
        given = (images(6, 3), torch.tensor([0, 1, 2, 3, 4, 0]))
        network = quantize(built(small), images(1), weight_bits=(bits,), activation_bits=(bits,))
        calibrate_untrained(network, given[0])
        model = Supernet(network).extract({})
        # In float64, where rounding does not move values from one step of a grid to the next.
        exact = (given[0].double(), given[1])
        scores[bits] = gradsign(model.double(), exact)
        assert scores[bits] == summed(one_at_a_time(model, exact))
    assert len(set(scores.values())) == 3


def test_a_network_with_choices_is_refused() -> None:
    with pytest.raises(InputError, match=r"still holds choices .*supernet.extract\(subnet\)"):
        gradsign(quantized(), (images(2), torch.tensor([0, 1])))


def test_errors() -> None:
    with pytest.raises(InputError, match="needs labels and the batch has none"):
        gradsign(built(Mixed), (batch()[0], None))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"single value per channel .* one sample at a time"):
        gradsign(nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)), batch())
    with pytest.raises(InputError, match="labels go from 0 to 9 and the network has 5 outputs"):
        gradsign(built(Mixed), (batch()[0], torch.tensor([0, 9, 1, 2, 3, 4])))
    with pytest.raises(InputError, match=r"norm='batch'. Allowed: 'sample', 'running'"):
        GradSign("batch")  # type: ignore[arg-type]
