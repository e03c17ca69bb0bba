from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import generator, images, quantized
from torch import Tensor, nn

from nasq import Choice, Supernet
from nasq.elastic import share_active
from nasq.quant import fake
from nasq.quant.arithmetic import STEP_FLOOR
from nasq.quant.calibration import initialise_weight
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer


def weight(seed: int = 0, shape: tuple[int, ...] = (6, 4, 3, 3)) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * 0.1


def signs(seed: int = 0, count: int = 6) -> Tensor:
    return torch.where(torch.rand(count, generator=generator(seed)) < 0.5, -1.0, 1.0)


def form_of(channels: int | None, bits: int, symmetric: bool, seed: int = 0) -> WeightForm:
    form = WeightForm(channels, bits, symmetric)
    rng = generator(seed)
    with torch.no_grad():
        form.log_step.copy_(torch.log(torch.rand(form.log_step.shape, generator=rng) * 0.1 + 0.3 / 2**bits))
        if form.zeta is not None:
            form.zeta.copy_(torch.randn(form.zeta.shape, generator=rng) * 2)
    return form


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_and_fake_weights_are_one_thing(bits: int, channels: int | None, symmetric: bool) -> None:
    """``fake = sign * step * integers``, and symmetric integers are legal with their sign in them, -2^(b-1) included."""
    for seed in range(8):
        form, w, sign = form_of(channels, bits, symmetric, seed), weight(seed), signs(seed)
        column = sign.reshape(-1, 1, 1, 1)
        integers = form.integers(w, sign).detach()
        step = form.step(6).detach().reshape(-1, 1, 1, 1)
        assert torch.equal(form.fake(w, sign).detach(), column * integers * step)
        assert torch.equal(integers, integers.round())
        if symmetric:
            assert form.low <= float(integers.min()) and float(integers.max()) <= form.high
            wanted = (w * column / step).double().round().clamp(form.low, form.high)
            assert torch.equal(integers.double(), wanted)
        else:
            assert float(integers.max() - integers.min()) <= 2 * (2**bits - 1)


def test_the_sign_enters_before_rounding_so_the_lowest_integer_stays_legal() -> None:
    form = WeightForm(None, 4, True)
    w = torch.tensor([[8.0], [-8.0]])
    assert form.integers(w, torch.tensor([-1.0, -1.0])).flatten().tolist() == [-8, 7]
    assert form.fake(w, torch.tensor([-1.0, -1.0])).flatten().tolist() == [8.0, -7.0]
    assert form.fake(w).flatten().tolist() == [7.0, -8.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_slices_of_the_steps_follow_slices_of_the_channels(symmetric: bool) -> None:
    form, w = form_of(6, 4, symmetric), weight()
    whole = form.fake(w)
    for channels in (1, 3, 6):
        assert torch.equal(form.fake(w[:channels]), whole[:channels])
        assert torch.equal(form.step(channels), form.step(6)[:channels])
        cut = form.sliced(channels)
        assert torch.equal(cut.fake(w[:channels]), whole[:channels])
        assert cut.log_step.untyped_storage().data_ptr() != form.log_step.untyped_storage().data_ptr()


def test_steps_are_positive_and_floored() -> None:
    form = WeightForm(3, 4, True)
    with torch.no_grad():
        form.log_step.copy_(torch.tensor([-1000.0, 0.0, 3.0]))
    assert form.step(3)[0].item() == STEP_FLOOR == 2.0**-24 and form.step(3)[1].item() == 1.0


@pytest.mark.parametrize("bits", range(2, 9))
def test_ranges_of_activations(bits: int) -> None:
    signed, unsigned = ActivationForm(bits, True, True).grid(), ActivationForm(bits, False, True).grid()
    asymmetric = ActivationForm(bits, True, False)
    assert (signed.low, signed.high, signed.zero_point) == (128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1), 128)
    assert (unsigned.low, unsigned.high, unsigned.zero_point) == (0, 2**bits - 1, 0)
    assert asymmetric.zeta is not None
    for zeta, zero in ((-3.0, 0), (0.4, 0), (2.0**bits, 2**bits - 1), (1.6, 2), (1.5, 2), (0.5, 0)):
        with torch.no_grad():
            asymmetric.zeta.fill_(zeta)
        assert asymmetric.grid().fixed()[1] == zero
        real = asymmetric.fake(torch.zeros(1), asymmetric.grid())
        assert real.item() == 0.0


def test_a_negative_offset_stays_negative() -> None:
    """Property 6: nothing takes the absolute value of an offset; it is learned in both directions."""
    form = ActivationForm(4, True, False)
    assert form.zeta is not None
    with torch.no_grad():
        form.zeta.fill_(9.0)
        form.log_step.fill_(-2.0)
    x = torch.randn(500, generator=generator(0)) - 2
    before = -float(form.grid().step) * form.grid().fixed()[1]
    form.fake(x, form.grid()).square().sum().backward()
    assert before < 0 and -float(form.grid().step) * form.grid().fixed()[1] == before
    # Most values lie below the range: the loss falls if the range moves down, so the zero-point has to rise or fall with
    # the sign of its own gradient, not of its absolute value.
    assert form.zeta.grad is not None and form.zeta.grad.item() != 0
    outside = torch.where(x < -9 * form.grid().step.detach(), 1.0, 0.0) - torch.where(
        x > 6 * form.grid().step.detach(), 1.0, 0.0
    )
    y = form.fake(x, form.grid()).detach()
    wanted = (2 * y * outside.abs() * -form.grid().step.detach()).sum() / (500 * 15) ** 0.5
    torch.testing.assert_close(form.zeta.grad, wanted, rtol=1e-4, atol=1e-4)


def test_switching_bits_and_back_reproduces_the_outputs() -> None:
    quantizer, w = WeightQuantizer("w", 6, (2, 4, 8), ("tensor", "channel"), ("symmetric", "asymmetric")), weight()
    initialise_weight(quantizer, w)
    active = share_active(quantizer)
    first = {}
    for _ in range(2):
        for key in quantizer.forms:
            grain, symmetry, bits = key.split("_")
            active.update({"w.weight_granularity": grain, "w.weight_symmetry": symmetry, "w.weight_bits": int(bits)})
            assert quantizer.form() is quantizer.forms[key] and quantizer.form().bits == int(bits)
            assert quantizer.form().granularity == grain and quantizer.form().symmetric == (symmetry == "symmetric")
            y = quantizer.form().fake(w).detach()
            assert torch.equal(first.setdefault(key, y), y)
    assert len({y.sum().item() for y in first.values()}) == len(first) == 12


def test_a_single_option_is_no_choice_and_a_choice_ties() -> None:
    fixed = ActivationQuantizer("a", True, (4,), ("symmetric",))
    assert fixed.own_choices == () and fixed.form().bits == 4
    everywhere = Choice("bits", (2, 8))
    tied = [ActivationQuantizer(path, True, everywhere, ("symmetric",)) for path in "ab"]
    supernet = Supernet(nn.ModuleList(tied))
    assert supernet.space.names == ("bits",)
    with supernet.activate({"bits": 2}):
        assert [quantizer.form().bits for quantizer in tied] == [2, 2]
    assert ActivationQuantizer("a", False, (4,), ("symmetric", "asymmetric")).own_choices == ()


def test_extracted_forms_are_copies() -> None:
    quantizer = WeightQuantizer("w", 6, (2, 4), ("channel",), ("symmetric", "asymmetric"))
    initialise_weight(quantizer, weight())
    share_active(quantizer).update({"w.weight_bits": 4, "w.weight_symmetry": "asymmetric"})
    copied: Any = quantizer.extract(lambda part: part)
    assert isinstance(copied, WeightForm) and copied.bits == 4 and not copied.symmetric
    before = copied.fake(weight()).detach()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.zero_()
    assert torch.equal(copied.fake(weight()), before)
    activation = ActivationQuantizer("a", True, (2, 4), ("symmetric",))
    assert activation.extract(lambda part: part) is not activation.form()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_unused_forms_get_no_gradient_and_stay_bit_exact(optimizer: Any) -> None:
    """Also behind steps in which they were used: momentum and weight decay do not reach them."""
    network = quantized(weight_granularity=("tensor", "channel"), activation_symmetry=("symmetric", "asymmetric"))
    supernet = Supernet(network).train()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    tuner = optimizer(supernet.parameters(), lr=0.01, weight_decay=0.1, **options)
    for seed in range(3):
        # The first steps give momentum to other forms.
        before = {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}
        tuner.zero_grad(set_to_none=True)
        with supernet.activate(supernet.space.sample(generator(seed))):
            supernet(images(4)).square().sum().backward()
            used = {
                id(parameter)
                for module in supernet.modules() if isinstance(module, (WeightQuantizer, ActivationQuantizer))
                for parameter in module.form().parameters()
            }  # fmt: skip
        tuner.step()
        unused = [
            (name, parameter) for name, parameter in supernet.named_parameters()
            if ".forms." in name and id(parameter) not in used
        ]  # fmt: skip
        assert len(unused) > 100
        for name, parameter in unused:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    moved = [n for n, p in supernet.named_parameters() if ".forms." in n and not torch.equal(p, before[n])]
    assert moved


def test_parameters_exist_before_an_optimizer_is_built() -> None:
    network = quantized()
    before = {id(parameter) for parameter in network.parameters()}
    supernet = Supernet(network).train()
    for seed in range(3):
        with supernet.activate(supernet.space.sample(generator(seed))):
            supernet(images(2)).sum().backward()
    assert {id(parameter) for parameter in network.parameters()} == before


def test_gradient_scales_of_steps() -> None:
    """LSQ: one over the root of (weights per step times the largest integer); EQ-Net's released code divides otherwise."""
    w = torch.randn(6, 4, 3, 3, generator=generator(0))
    gradients = []
    for released in (False, True):
        form = WeightForm(6, 4, True, released)
        with torch.no_grad():
            form.log_step.fill_(-2.0)
        form.fake(w).sum().backward()
        gradients.append(form.log_step.grad)
        assert form.sliced(3).released is released
    assert gradients[0] is not None and gradients[1] is not None
    assert fake.released_scale(w, 7) == pytest.approx(2 / (7 * 6 * 9) ** 0.5)
    assert fake.gradient_scale(36, 7) == pytest.approx(1 / (7 * 36) ** 0.5)
    torch.testing.assert_close(gradients[1] / gradients[0], torch.full((6,), 2 * (36 / 54) ** 0.5))
    network = quantized(weight_granularity=("tensor", "channel"), released_gradient=True)
    assert all(
        form.released for form in network.modules() if isinstance(form, WeightForm) and form.log_step.requires_grad
    )


def test_forms_may_be_tied_over_the_whole_network() -> None:
    """EQ-Net's evaluation: granularity and symmetry are one choice each for all layers."""
    grain = Choice("granularity", ("tensor", "channel"), ordered=False)
    kind = Choice("symmetry", ("symmetric", "asymmetric"), ordered=False)
    network = quantized(weight_granularity=grain, weight_symmetry=kind, activation_symmetry=kind, target="generic")
    supernet = Supernet(network)
    assert {name for name in supernet.space.names if "granularity" in name or "symmetry" in name} == {
        "granularity", "symmetry",
    }  # fmt: skip
    with supernet.activate({**supernet.space.default(), "granularity": "channel", "symmetry": "asymmetric"}):
        forms = [module.form() for module in network.modules() if isinstance(module, WeightQuantizer)]
    assert all(form.granularity == "channel" and not form.symmetric for form in forms)
    with pytest.raises(ValueError, match="choice 'symmetry' has an option that target 'onnxruntime-cpu' refuses"):
        quantized(weight_symmetry=kind)
