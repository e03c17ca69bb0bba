"""Weight steps per group of inputs: against slow loops in float64, whole numbers and exact fractions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import generator, images
from torch import Tensor, nn

import nasq
from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel
from nasq.deploy import bundle, onnx, parity, readback
from nasq.deploy.reference import Reference
from nasq.elastic import Segments, share_active
from nasq.errors import ArtifactError, InputError, TargetError
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.quant.calibration import initialise_weight
from nasq.quant.fake import gradient_scale
from nasq.quant.forms import WeightForm
from nasq.quant.input_groups import InputGroups, Slices, count_groups, group_size
from nasq.quant.operations import GROUP_UNIT
from nasq.quant.producers import LayerProducer
from nasq.quant.program import Linear
from nasq.quant.quantizers import WeightQuantizer
from nasq.space import SearchSpace

FEATURES = (11,)
BOTH = ("symmetric", "asymmetric")


class Joined(nn.Module):
    """Linear layers of elastic widths: one that is sliced, and one that reads a concatenation, inside whose parts it is."""

    def __init__(self) -> None:
        super().__init__()
        hidden, left, right = Choice("hidden", (5, 9, 12)), Choice("left", (3, 6)), Choice("right", (2, 7))
        self.stem = elastic.Linear(11, hidden)
        self.left = elastic.Linear(hidden, left)
        self.right = elastic.Linear(hidden, right, bias=False)
        self.head = elastic.Linear(Segments(left, right), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def network(seed: int = 0, **options: Any) -> QuantizedNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Joined()
    options = {"weight_bits": (2, 4, 8), "activation_bits": (4, 8), "weight_granularity": ("group4",), **options}
    made = quantize(net, images(1, shape=FEATURES), "generic", first_last_bits=None, **options)
    calibrate(made, images(32, seed + 1, FEATURES))
    return made.eval()


def weight(rows: int = 6, columns: int = 11, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * torch.rand(rows, columns, generator=generator(7))


def form_of(bits: int, symmetric: bool, size: int = 4, seed: int = 0) -> WeightForm:
    form = WeightForm(6, bits, symmetric, groups=InputGroups.of(size, 11))
    with torch.no_grad():
        form.log_step.copy_(
            torch.log(torch.rand(form.log_step.shape, generator=generator(seed)) * 0.5 + 0.1) - bits / 2
        )
        if form.zeta is not None:
            form.zeta.copy_(torch.randn(form.zeta.shape, generator=generator(seed)) * 2)
    return form


def slow(
    form: WeightForm, w: Tensor, sign: Tensor, owners: list[int], rows: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Integers minus zero-points, and their real values, one weight after the other."""
    integers, real = np.zeros(w.shape, np.int64), np.zeros(w.shape)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            at = (rows[o], owners[i])
            step = np.float32(np.exp(float(form.log_step[at].detach().double())))
            value, way = np.float32(w[o, i]), int(sign[o])
            if form.zeta is None:
                q = min(max(int(np.rint(np.float32(way * value) / step)), form.low), form.high)
            else:
                zero = min(max(int(np.rint(float(form.zeta[at].detach()))), form.low), form.high)
                q = way * (min(max(int(np.rint(value / step)) + zero, form.low), form.high) - zero)
            integers[o, i], real[o, i] = q, way * q * float(step)
    return integers, real


@given(st.integers(1, 9), st.integers(1, 40), st.data())
@settings(max_examples=25, deadline=None)
def test_spreading_equals_a_loop(size: int, inputs: int, data: st.DataObject) -> None:
    groups = InputGroups.of(size, inputs)
    values = torch.arange(2.0 * len(groups.sizes)).reshape(2, -1)
    kept = sorted(data.draw(st.sets(st.integers(0, inputs - 1), min_size=1)))
    first = data.draw(st.integers(1, inputs))
    for places, columns in ((range(first), None), (kept, torch.tensor(kept))):
        wanted = [[float(row[i // size]) for i in places] for row in values]
        assert groups.spread(values, len(places), columns).tolist() == wanted
        ids, sizes = groups.active(len(places), columns)
        owners = [i // size for i in places]
        assert torch.arange(len(groups.sizes))[ids].tolist() == sorted(set(owners))
        assert sizes == tuple(owners.count(owner) for owner in sorted(set(owners)))
        # What is left is cut again in the same way.
        again = InputGroups(size, sizes)
        assert again.spread(values[:, ids], len(places)).tolist() == wanted


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_and_fake_weights_equal_a_loop(bits: int, symmetric: bool) -> None:
    form, w = form_of(bits, symmetric), weight()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    columns, rows = torch.tensor([0, 2, 3, 8, 9]), torch.tensor([1, 2, 5])
    for part, kept, chosen in (
        (None, range(11), range(6)),
        (None, range(6), range(4)),  # the second group is cut, the third drops out
        (Slices(rows, columns), columns.tolist(), rows.tolist()),
    ):
        cut = w[list(chosen)][:, list(kept)]
        integers, real = slow(form, cut, sign[list(chosen)], [i // 4 for i in kept], list(chosen))
        found = form.integers(cut, sign[list(chosen)], part=part)
        assert found.tolist() == integers.tolist()
        torch.testing.assert_close(
            form.fake(cut, sign[list(chosen)], part=part).double(), torch.tensor(real), rtol=2e-7, atol=0
        )
        alone = form.sliced(len(chosen), part)
        assert alone.integers(cut, sign[list(chosen)]).tolist() == integers.tolist()
        assert alone.granularity == form.granularity == "group4"


def test_a_group_that_is_cut_keeps_its_step() -> None:
    form, w = form_of(4, True), weight()
    whole = form.fake(w)
    for rows in (1, 4, 6):
        for columns in (1, 4, 5, 9, 11):
            assert torch.equal(form.fake(w[:rows, :columns]), whole[:rows, :columns])


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_lsq_per_group(symmetric: bool) -> None:
    """``sum (rne(v) - v)`` inside the range and the bound outside, times the step (it is learned as a logarithm)."""
    form, w = form_of(3, symmetric), weight().requires_grad_()
    g = torch.randn(6, 11, generator=generator(3))
    (form.fake(w) * g).sum().backward()
    scale = gradient_scale(6 * 11 // 18, form.high)
    wanted = torch.zeros(6, 3, dtype=torch.float64)
    for o in range(6):
        for i in range(11):
            step = float(form.log_step[o, i // 4].detach().double().exp())
            zero = 0.0 if form.zeta is None else float(form.zeta[o, i // 4].detach().round().clamp(form.low, form.high))
            v, low, high = float(w[o, i].detach()) / step, form.low - zero, form.high - zero
            inside = low < v < high
            part = round(v) - v if inside else (low if v <= low else high)
            wanted[o, i // 4] += float(g[o, i]) * part * step * scale
            assert float(w.grad[o, i]) == (float(g[o, i]) if inside else 0.0)
    torch.testing.assert_close(form.log_step.grad.double(), wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_multipliers_are_whole_and_the_largest_is_the_unit() -> None:
    form = form_of(4, True)
    step, real = form.step(6).double(), form.log_step.double().exp().float().double()
    factors, sizes = form.multipliers(6)
    assert factors is not None and sizes == (4, 4, 3)
    for o in range(6):
        assert float(step[o]) == float(real[o].max()) and float(factors[o].max()) == GROUP_UNIT
        for k in range(3):
            assert float(factors[o, k]) == round(float(real[o, k]) / float(step[o]) * 2**22)
    first, sizes = form.multipliers(2, inputs=3)
    assert first is not None and first.tolist() == [[GROUP_UNIT], [GROUP_UNIT]] and sizes == (3,)
    form.log_step[0, 0] = -100.0  # floored
    floored = form.multipliers(6)[0]
    assert floored is not None and float(floored[0, 0]) == round(2.0**-24 / float(form.step(6)[0]) * 2**22) >= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_calibration_searches_every_group_alone(symmetric: bool) -> None:
    w = weight(seed=4)
    kinds = ("symmetric",) if symmetric else ("asymmetric",)
    quantizer = WeightQuantizer("w", 6, (2, 3, 4, 6), ("channel", "group4"), kinds, inputs=11)
    initialise_weight(quantizer, w)
    active = share_active(quantizer)
    for bits in (2, 3, 4, 6):
        error = {}
        for grain in ("channel", "group4"):
            active.update({"w.weight_granularity": grain, "w.weight_bits": bits})
            form = quantizer.form()
            error[grain] = float((form.fake(w).detach() - w).double().abs().pow(2.4).mean())
        assert error["group4"] <= error["channel"]
        for o in range(6):
            for k in range(3):
                x = w[o, 4 * k : 4 * k + 4].double().numpy()
                losses = [_loss(x, form, symmetric, 1 - 0.01 * i) for i in range(80)]
                found = _error(x, form, float(form.log_step[o, k].detach().double().exp()), _zero(form, o, k))
                assert found <= min(losses) * (1 + 1e-3) + 1e-9


def _zero(form: WeightForm, o: int, k: int) -> float:
    return 0.0 if form.zeta is None else float(form.zeta[o, k].detach().round().clamp(form.low, form.high))


def _error(x: np.ndarray, form: WeightForm, step: float, zero: float) -> float:
    q = np.clip(np.rint(x / step) + zero, form.low, form.high) - zero
    return float((np.abs(q * step - x) ** 2.4).mean())


def _loss(x: np.ndarray, form: WeightForm, symmetric: bool, factor: float) -> float:
    top, bottom = max(x.max(), 0.0), min(x.min(), 0.0)
    levels = form.high - form.low
    if symmetric:
        return _error(x, form, factor * 2 * max(top, -bottom) / levels, 0.0)
    step = factor * (top - bottom) / levels
    return _error(x, form, step, float(np.clip(np.rint(form.low - factor * bottom / step), form.low, form.high)))


def executed(op: Linear, x: np.ndarray, source: Any) -> np.ndarray:
    """A group-wise layer by `docs/integer_arithmetic.md`, in Python's whole numbers."""
    made = op.output
    result = np.zeros((len(x), len(op.weight)), np.int64)
    ratio = (np.float32(source.scale) * op.weight_scale) / np.float32(made.scale)
    for n in range(len(x)):
        for o in range(len(op.weight)):
            total, i = int(op.bias[o]) << 22, 0
            for k, size in enumerate(op.sizes):
                zero = 0 if op.weight_zero is None else int(op.weight_zero[o, k])
                acc = 0
                for _ in range(size):
                    acc += (int(x[n, i]) - source.zero_point) * ((int(op.weight[o, i]) - zero) << int(op.shift[o]))
                    i += 1
                total += acc * int(op.multipliers[o, k])
            steps = np.rint(np.float32(total / 2**22) * ratio[o])
            result[n, o] = min(max(int(steps) + made.zero_point, made.low), made.high)
    return result


@pytest.mark.parametrize("symmetry", [*BOTH, "powers of two"])
def test_every_implementation_computes_the_same_integers(symmetry: str, tmp_path: Path) -> None:
    powers = symmetry not in BOTH
    kinds = BOTH[:1] if powers else (symmetry,)
    supernet = Supernet(network(weight_symmetry=kinds, activation_symmetry=BOTH, power_of_two_steps=powers))
    x = images(9, 5, FEATURES)
    for seed in range(2):
        subnet = supernet.space.sample(generator(seed))
        with supernet.activate(subnet):
            wanted, program = supernet.module.integers(x), freeze(supernet.module)
        assert torch.equal(supernet.extract(subnet).eval().integers(x), wanted)
        layers = [op for op in program.ops if isinstance(op, Linear)]
        assert len(layers) == 4 and all(op.wide and op.multipliers is not None for op in layers)
        assert not powers or all((np.log2(op.multipliers) % 1 == 0).all() for op in layers)
        bundle.write(tmp_path / "b", program)
        again = bundle.read(tmp_path / "b")
        for one, other in zip(layers, [op for op in again.ops if isinstance(op, Linear)], strict=True):
            assert np.array_equal(one.multipliers, other.multipliers) and one.sizes == other.sizes
            assert one.weight_zero is None or np.array_equal(one.weight_zero, other.weight_zero)
        reference = Reference(tmp_path / "b")
        every = reference.run(x.numpy(), every=True)
        assert np.array_equal(every[program.output.name], wanted.numpy())
        assert torch.equal(nasq.load(tmp_path / "b").integers(x), wanted)
        bundle.add_file(tmp_path / "b", parity.MODEL, onnx.export(program))
        report = parity.check(tmp_path / "b", x.numpy())
        assert report.passed and report.differing == 0 and not report.findings, report.summary()
        for op in layers:
            source = program.tensor(op.inputs[0])
            assert np.array_equal(executed(op, every[source.name].astype(np.int64), source), every[op.output.name])


def test_large_layers_sum_exactly() -> None:
    """8-bit weights of 700 inputs, some groups a thousand times finer than others: far beyond what fp32 sums."""
    net = nn.Sequential(nn.Linear(700, 3))
    with torch.no_grad():
        net[0].weight *= torch.logspace(-3, 0, 700)
    made = quantize(net, images(1, shape=(700,)), "generic", weight_granularity=("group64",), first_last_bits=8)
    calibrate(made, images(16, 1, (700,)))
    made.eval()
    program, x = freeze(made), images(5, 2, (700,)) * 3
    op = program.ops[1]
    assert isinstance(op, Linear) and op.multipliers is not None
    assert op.sizes == (64,) * 10 + (60,) and int(op.multipliers.min()) < 2**14
    first = program.ops[0].output
    q = np.clip(np.rint(x.numpy() / np.float32(first.scale)) + first.zero_point, first.low, first.high)
    assert np.array_equal(executed(op, q, first), made.integers(x).numpy())


def test_training_computes_what_evaluation_does() -> None:
    """Without BatchNorm the fake form is the integer one, but for ties."""
    made = network(weight_symmetry=BOTH)
    supernet, x, wrong, total = Supernet(made), images(64, 3, FEATURES), 0, 0
    for seed in range(4):
        with supernet.activate(supernet.space.sample(generator(seed))):
            value = made.run(x, "integer")
            real = made(x, "fake").detach()
        assert value.grid is not None
        step, zero = value.grid.fixed()
        steps = real.double() / step + zero
        wrong += int((steps.round() != value.data.double()).sum())
        total += steps.numel()
    assert wrong <= max(1, total // 1000)


def test_slices_of_the_steps_follow_slices_of_the_channels_in_a_network() -> None:
    """Integers of every subnet are those of the largest one's weights, at the places that its sizes take."""
    for options in ({"weight_granularity": ("group4",)}, {"weight_granularity": ("channel",)}):
        made = network(weight_bits=(4,), **options)
        supernet = Supernet(made)
        producers = {module.path: module for module in made.modules() if isinstance(module, LayerProducer)}

        def integers(subnet: Any, path: str, supernet: Supernet = supernet, producers: Any = producers) -> Tensor:
            with supernet.activate(subnet):
                producer = producers[path]
                w = producer.layer.active_weight()
                return producer.weight_quantizer.form().integers(
                    w, torch.ones(len(w)), part=producer.weight_quantizer.part()
                )

        sizes = {"hidden": 9, "left": 3, "right": 2}
        largest = supernet.space.largest()
        small = {**largest, **sizes}
        assert torch.equal(integers(small, "left"), integers(largest, "left")[:3, :9])
        assert torch.equal(integers(small, "head"), integers(largest, "head")[:, [0, 1, 2, 6, 7]])
        plain = supernet.extract(small)
        forms = [module for module in plain.modules() if isinstance(module, WeightForm)]
        with supernet.activate(small):
            assert torch.equal(plain.eval().integers(images(3)[:, 0, 0, :1].repeat(1, 11)),
                               made.integers(images(3)[:, 0, 0, :1].repeat(1, 11)))  # fmt: skip
        assert len(forms) == 4


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_steps_of_joined_outputs_follow_their_places(kind: str) -> None:
    """The first channels inside each segment, not the first of all: their steps are the same in every width."""
    joined = Segments(Choice("left", (2, 4)), Choice("right", (1, 3)))
    if kind == "linear":
        net: nn.Module = nn.Sequential(elastic.Linear(5, joined), nn.ReLU(), elastic.Linear(joined, 3))
        shape: tuple[int, ...] = (5,)
    else:
        net, shape = nn.Sequential(elastic.Conv2d(2, joined, 1), nn.ReLU(), elastic.Conv2d(joined, 3, 1)), (2, 4, 4)
    made = quantize(net, images(1, shape=shape), "generic", weight_bits=(3,), first_last_bits=None)
    with torch.no_grad():
        made.get_parameter("0.weight").mul_(torch.arange(1.0, 8).reshape(-1, *[1] * (3 if kind == "conv" else 1)))
    calibrate(made, images(16, 1, shape))
    supernet, x = Supernet(made.eval()), images(3, 2, shape)
    producer = next(module for module in made.modules() if isinstance(module, LayerProducer) and module.path == "0")
    found = {}
    for name, subnet in (
        ("large", supernet.space.largest()),
        ("small", {**supernet.space.largest(), "left": 2, "right": 1}),
    ):
        with supernet.activate(subnet):
            w, quantizer = producer.layer.active_weight(), producer.weight_quantizer
            found[name] = quantizer.form().fake(w, part=quantizer.part()).detach()
            assert torch.equal(supernet.extract(subnet).eval().integers(x), made.integers(x))
    assert torch.equal(found["small"], found["large"][[0, 1, 4]])


def test_a_changed_multiplier_changes_what_the_reference_computes_and_the_file_is_no_longer_the_bundles(
    tmp_path: Path,
) -> None:
    made, x = network(weight_bits=(8,), activation_bits=(8,)), images(16, 5, FEATURES)
    program = freeze(made)
    place = next(index for index, op in enumerate(program.ops) if isinstance(op, Linear))
    op = program.ops[place]
    assert isinstance(op, Linear) and op.multipliers is not None
    factors = op.multipliers.copy()
    factors[:, 0] = np.maximum(factors[:, 0] // 2, 1)
    ops = [*program.ops[:place], replace(op, multipliers=factors), *program.ops[place + 1 :]]
    bundle.write(tmp_path / "b", replace(program, ops=ops))
    findings = readback.compare(readback.read(onnx.export(program)), bundle.read(tmp_path / "b"))
    assert findings and all(finding.field.startswith("multipliers[") for finding in findings)
    assert not np.array_equal(Reference(tmp_path / "b").run(x.numpy()), made.integers(x).numpy())


def test_costs_count_the_scales_of_the_groups() -> None:
    supernet = Supernet(network(weight_granularity=("tensor", "group4", "group5")))
    rows = supernet.space.sample_batch(12, generator(0))
    found = CostModel(supernet).evaluate(rows)["bytes"]
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        with supernet.activate(subnet):
            program = freeze(supernet.module)
        wanted = 0
        for op in program.ops:
            if isinstance(op, Linear):
                out, inputs = op.weight.shape
                wanted += out * (-(-inputs * op.weight_bits // 8) + 8 + 4 * len(op.sizes))
        assert int(found[index]) == wanted


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_counting_groups_equals_a_loop(parts: list[tuple[int, int]], group: int) -> None:
    sizes = Segments(*(Choice(f"c{index}", (0, top)) for index, (_, top) in enumerate(parts)))
    active = {f"c{index}": min(size, top) for index, (size, top) in enumerate(parts)}
    offset, touched = 0, set()
    for index, (_, top) in enumerate(parts):
        touched |= {(offset + place) // group for place in range(active[f"c{index}"])}
        offset += top
    assert int(count_groups(sizes, group, lambda part: active[part.name])) == len(touched)


# -- what cannot be


def test_convolutions_keep_the_other_granularities() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3))
    made = quantize(net, images(1), "generic", weight_granularity=("channel", "group32"))
    space = Supernet(made).space
    assert [name for name in space.names if "granularity" in name] == ["3.weight_granularity", "5.weight_granularity"]
    assert space["3.weight_granularity"].options == ("channel", "group32")
    (removal,) = made.removed
    assert str(removal).startswith("a convolution does not take weight scales per group of 32 inputs: groups of inputs")
    calibrate(made, images(8))
    made.eval()
    with pytest.raises(InputError, match=r"the layer '0' is a convolution.*Give 'channel' or 'tensor' as well"):
        quantize(net, images(1), "generic", weight_granularity=("group32",))
    tied = Choice("grain", ("channel", "group32"), ordered=False)
    with pytest.raises(InputError, match=r"choice 'grain' ties.*'group32', which the convolution '0' cannot take"):
        quantize(net, images(1), "generic", weight_granularity=tied)
    outside = quantize(net, images(1), "generic", weight_granularity=("group32", "channel"), where=("5",))
    forms = {m.layer: m.form().granularity for m in outside.modules() if isinstance(m, WeightQuantizer)}
    assert sorted(forms.values()) == ["channel", "group32", "group32"]


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu", "tensorrt", "inductor-x86"])
def test_targets_without_a_kernel_refuse_groups(target: str) -> None:
    found = nasq.targets.load(target)
    kept, gone = found.allow("weight_granularity", ("channel", "group32"))
    assert kept == ("channel",) and "scaled once per output channel" in gone[0].reason
    with pytest.raises(
        TargetError, match=r"cannot run weight scales per group of 32 inputs.*Allowed weight_granularity"
    ):
        found.allow("weight_granularity", ("group32",))
    grains = [Choice(f"{path}.weight_granularity", ("channel", "group4"), ordered=False) for path in ("left", "head")]
    space = SearchSpace([*grains, Choice("width", (8, 16))])
    left, removed = found.restrict(space)
    assert [removal.choice for removal in removed] == ["left.weight_granularity", "head.weight_granularity"]
    assert str(removed[0]).startswith(
        f"left.weight_granularity: {target} does not take weight scales per group of 4 inputs"
    )
    assert left["head.weight_granularity"].options == ("channel",) and left["width"].options == (8, 16)
    with pytest.raises(TargetError, match=r"the choice 'left\.weight_granularity' keeps no option.*Allowed"):
        found.restrict(space.restrict({"left.weight_granularity": ("group4",)}))


def test_names_of_granularities() -> None:
    assert [group_size(name) for name in ("group32", "group1", "channel", "group", "group0", 8)] == [32, 1, *[None] * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, d: a["g0"].__setitem__(0, 0), r"multipliers reach from 0 to .*Allowed: 1 to 2\^22"),
        (lambda a, d: a["g0"].__setitem__(0, 2**22 + 1), r"to 4194305\. Allowed: 1 to 2\^22"),
        (lambda a, d: a.pop("g0"), "the tensor 'g0' is missing"),
        (lambda a, d: d["weight"]["groups"].update(tensor="g7"), "multipliers at 'g7'; in order they are at 'g0'"),
        (lambda a, d: d["weight"]["groups"].update(sizes=[4, 4, 4]), "its groups have 12 inputs, and it reads 11"),
        (lambda a, d: d["weight"]["groups"].update(sizes=[4, 7, 0]), "none may be empty"),
        (lambda a, d: d["weight"]["groups"].update(sizes=[4, 7]), "the tensor 'g0' is int32 of shape"),
        (lambda a, d: d.update(wide=False), "groups of inputs have scales of their own: allowed in linear layers"),
    ],
)
def test_hostile_bundles_are_refused(change: Any, message: str) -> None:
    document, arrays = bundle.json_from_program(freeze(network()))
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(arrays, next(op for op in document["ops"] if op["op"] == "linear"))
    with pytest.raises(ArtifactError, match=message):
        bundle.program_from_json(document, arrays)
