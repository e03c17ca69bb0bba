from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import generator, images, quantized_supernet, randomise, tiny, tiny_supernet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nasq
from nasq import BNState, Choice, Supernet, elastic
from nasq.errors import ArtifactError, InputError

BUILDERS = [tiny_supernet, quantized_supernet]


def snapshot(supernet: Supernet) -> dict[str, Any]:
    """Everything that must survive: weights, buffers, modes, momenta, what is active, gradients."""
    return {
        "state": {name: tensor.clone() for name, tensor in supernet.state_dict().items()},
        "buffers": {name: id(tensor) for name, tensor in supernet.named_buffers()},
        "modes": [module.training for module in supernet.modules()],
        "momenta": [module.momentum for module in supernet.modules() if hasattr(module, "momentum")],
        "active": dict(supernet.active),
        "grads": [parameter.grad is None for parameter in supernet.parameters()],
        "version": supernet.version,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    state = one["state"].keys() == other["state"].keys() and all(
        torch.equal(tensor, other["state"][name]) for name, tensor in one["state"].items()
    )
    return state and all(one[key] == other[key] for key in one if key != "state")


# Activation


def test_activate_is_the_only_mutation_and_restores() -> None:
    supernet = tiny_supernet()
    first, second = (supernet.space.sample(generator(seed)) for seed in (1, 2))
    assert supernet.active == {}
    with supernet.activate(first) as inside:
        assert inside is supernet and supernet.active == dict(first)
        with supernet.activate(second):
            assert supernet.active == dict(second)
        assert supernet.active == dict(first)
    assert supernet.active == {}
    supernet.activate(second)
    assert supernet.active == dict(second)


def test_activation_restores_after_an_error_statistics_included() -> None:
    supernet = tiny_supernet()
    subnet = supernet.space.sample(generator(1))
    bn = supernet.recalibrate(subnet, [images(8)])
    before = snapshot(supernet)
    with pytest.raises(ZeroDivisionError), supernet.activate(subnet, bn):
        assert torch.equal(supernet.module.stem_bn.running_mean[: subnet["width"]], bn.statistics["stem_bn"][0])
        raise ZeroDivisionError
    assert same(before, snapshot(supernet))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 5}, r"'width' has no option 5\. Allowed: 4, 6, 8"),
        ({"wdith": 4}, r"'wdith'.*Did you mean 'width'"),
        ({"block2.kernel": 3}, r"'block2\.kernel'.*active only if 'depth' is 3"),
        ({"kernel": None}, r"kernel"),
    ],
)
def test_what_is_no_member_is_named(change: dict[str, Any], message: str) -> None:
    supernet = tiny_supernet()
    subnet = dict(supernet.space.smallest()) | change
    for call in (supernet.activate, supernet.extract, lambda s: supernet.recalibrate(s, [images(2)])):
        before = snapshot(supernet)
        with pytest.raises(InputError, match=message):
            call(subnet)
        assert same(before, snapshot(supernet))


def test_a_missing_choice_is_named() -> None:
    supernet = tiny_supernet()
    subnet = {name: option for name, option in supernet.space.smallest().items() if name != "mix"}
    with pytest.raises(InputError, match=r"no option for the active choice 'mix'"):
        supernet.activate(subnet)


@pytest.mark.parametrize(
    "statistics",
    [
        {"stem_bn": (torch.zeros(4), torch.ones(4)), "nowhere": (torch.zeros(4), torch.ones(4))},
        {"pre_bn": (torch.zeros(4), torch.ones(4)), "stem_bn": (torch.zeros(99), torch.ones(99))},
        {"stem_bn": (torch.zeros(3), torch.ones(3))},
    ],
    ids=["unknown layer", "too many channels", "too few channels"],
)
def test_statistics_that_do_not_fit_are_refused_and_leave_everything(statistics: Any) -> None:
    """The statistics of another subnet are no statistics of this one."""
    supernet = tiny_supernet()
    subnet = supernet.space.smallest()
    before = snapshot(supernet)
    with pytest.raises(InputError, match=r"nowhere|stem_bn"):
        supernet.activate(subnet, BNState(statistics))
    assert same(before, snapshot(supernet))


def test_two_supernets_keep_their_own_active_options() -> None:
    one, other = tiny_supernet(), tiny_supernet()
    one.activate(one.space.smallest())
    assert other.active == {} and one.module.stem.active is one.active


def test_version_changes_with_the_weights_and_with_nothing_else() -> None:
    supernet = tiny_supernet()
    before = supernet.version
    subnet = supernet.space.sample(generator(0))
    supernet.recalibrate(subnet, [images(2)])
    supernet.extract(subnet)
    with supernet.activate(subnet), torch.no_grad():
        supernet(images(1))
    assert supernet.version == before
    torch.optim.SGD(supernet.parameters(), lr=0.1).step()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    supernet.train()(images(2)).sum().backward()
    optimizer.step()
    assert supernet.version != before
    after = supernet.version
    supernet.module.load_state_dict(tiny(3).state_dict())
    assert supernet.version != after


# Recalibration


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("training", [True, False])
def test_recalibration_leaves_everything_untouched(build: Callable[[], Supernet], training: bool) -> None:
    supernet = build()
    supernet.train(training)
    supernet.module.stem_bn.train(not training)
    supernet.module.wide_bn.momentum = None
    before = snapshot(supernet)
    for seed in range(3):
        supernet.recalibrate(supernet.space.sample(generator(seed)), [images(4), images(3)])
        assert same(before, snapshot(supernet))


def test_recalibration_restores_after_an_error() -> None:
    supernet = tiny_supernet().train()
    before = snapshot(supernet)

    def batches() -> Any:
        yield images(4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        supernet.recalibrate(supernet.space.smallest(), batches())
    assert same(before, snapshot(supernet))


def by_hand(model: nn.Module, batches: list[Tensor], **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean over batches of each norm's batch mean and unbiased variance, of its real inputs, layer after layer exact."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = []
    for name, module in norms:
        module.train()

        def look(module: nn.Module, given: Any, name: str = name) -> None:
            x = given[0].double()
            flat = x.transpose(0, 1).flatten(1)
            found.setdefault(name, []).append((flat.mean(1), flat.var(1, unbiased=True)))

        hooks.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        for batch in batches:
            model(batch, **options)
    for hook in hooks:
        hook.remove()
    return {name: tuple(torch.stack(each).mean(0) for each in zip(*seen, strict=True)) for name, seen in found.items()}


@pytest.mark.parametrize("build", BUILDERS)
def test_recalibrated_statistics_are_the_mean_over_batches_by_hand(build: Callable[[], Supernet]) -> None:
    supernet = build()
    options = {"mode": "fake"} if build is quantized_supernet else {}
    batches = [images(6, 1), images(6, 2), images(4, 3)]
    for seed in range(4):
        subnet = supernet.space.sample(generator(seed))
        state = supernet.recalibrate(subnet, iter(batches))
        model = supernet.extract(subnet).eval()
        wanted = by_hand(model, batches, **options)
        assert len(state.statistics) == len(wanted) > 5
        # The extracted model's paths differ inside containers; the order of execution is the same.
        ours = sorted(state.statistics.values(), key=lambda pair: float(pair[0].sum()))
        theirs = sorted(wanted.values(), key=lambda pair: float(pair[0].sum()))
        for (mean, var), (mean_by_hand, var_by_hand) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mean.double(), mean_by_hand, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(var.double(), var_by_hand, rtol=1e-4, atol=1e-5)


def test_statistics_hold_the_active_channels_of_the_norms_that_ran() -> None:
    supernet = tiny_supernet()
    subnet = supernet.space.smallest().updated({"mix": "skip"})
    state = supernet.recalibrate(subnet, [images(4)])
    assert "rest.blocks.0.bn" in state.statistics and "rest.blocks.2.bn" not in state.statistics
    assert not any(path.startswith("mix") for path in state.statistics)
    assert state.statistics["stem_bn"][0].shape == (subnet["width"],) and state.statistics["wide_bn"][0].shape == (6,)


def test_recalibration_is_repeatable_and_does_not_depend_on_former_statistics() -> None:
    supernet = tiny_supernet()
    subnet = supernet.space.sample(generator(3))
    first = supernet.recalibrate(subnet, [images(8)])
    randomise(supernet, 9)
    supernet.module.load_state_dict({**supernet.module.state_dict(), **{
        name: tensor for name, tensor in tiny().state_dict().items() if "running" not in name
    }})  # fmt: skip
    second = supernet.recalibrate(subnet, [images(8)])
    for path, (mean, var) in first.statistics.items():
        assert torch.equal(mean, second.statistics[path][0]) and torch.equal(var, second.statistics[path][1])


def test_extraction_with_statistics_holds_them() -> None:
    supernet = tiny_supernet()
    subnet = supernet.space.sample(generator(5))
    bn = supernet.recalibrate(subnet, [images(16)])
    plain = supernet.extract(subnet, bn)
    assert torch.equal(plain.stem_bn.running_var, bn.statistics["stem_bn"][1])
    with supernet.activate(subnet, bn), torch.no_grad():
        assert torch.equal(plain(images(3)), supernet(images(3)))
    assert not torch.equal(plain(images(3)), supernet.extract(subnet)(images(3)))


@pytest.mark.parametrize("batches", [[], iter(())])
def test_recalibration_without_a_batch_is_refused(batches: Any) -> None:
    """Empty statistics would evaluate the subnet with those of all subnets mixed."""
    supernet = tiny_supernet()
    with pytest.raises(InputError, match=r"batch"):
        supernet.recalibrate(supernet.space.smallest(), batches)


def test_a_network_without_norms_recalibrates_to_nothing() -> None:
    supernet = Supernet(nn.Sequential(elastic.Conv2d(3, Choice("w", (2, 4)), 1)))
    assert supernet.recalibrate({"w": 2}, [images(1)]).statistics == {}


# Files


@pytest.mark.parametrize("build", BUILDERS)
def test_save_and_load(build: Callable[..., Supernet], tmp_path: Path) -> None:
    one, other = build(seed=1), build(seed=2)
    one.save(tmp_path / "deep" / "down")
    other.load(tmp_path / "deep" / "down")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    subnet = one.space.sample(generator(0))
    with one.activate(subnet), other.activate(subnet), torch.no_grad():
        assert torch.equal(one(images(2)), other(images(2)))
    assert {path.name for path in (tmp_path / "deep" / "down").iterdir()} == {"weights.safetensors", "supernet.json"}


def test_shared_and_sliced_tensors_are_saved_whole(tmp_path: Path) -> None:
    conv = elastic.Conv2d(3, 3, 1)
    supernet = Supernet(nn.Sequential(conv, conv).to(memory_format=torch.channels_last))
    supernet.save(tmp_path)
    wanted = supernet(images(1)).detach()
    with torch.no_grad():
        conv.weight.zero_()
    supernet.load(tmp_path)
    assert torch.equal(supernet(images(1)), wanted)


def damaged(directory: Path, how: str) -> None:
    weights, description = directory / "weights.safetensors", directory / "supernet.json"
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "header":
        weights.write_bytes(b"\xff" * 16 + data[16:])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "missing weights":
        weights.unlink()
    elif how == "missing json":
        description.unlink()
    elif how == "a tensor less":
        tensors = load_file(weights)
        tensors.pop("stem.weight")
        save_file(tensors, weights)
    elif how == "another shape":
        tensors = load_file(weights)
        tensors["stem.weight"] = torch.zeros(1)
        save_file(tensors, weights)
    else:
        description.write_text(how)


@pytest.mark.parametrize("how", [
    "truncated", "header", "empty", "missing weights", "missing json", "a tensor less", "another shape",
    "{", "[]", "null", "{}", '{"schema": 1}', '{"schema": 1, "fingerprint": 3, "fingerprint": 4}',
])  # fmt: skip
def test_damaged_files_are_refused_and_change_nothing(how: str, tmp_path: Path) -> None:
    one, other = tiny_supernet(1), tiny_supernet(2)
    one.save(tmp_path)
    damaged(tmp_path, how)
    before = snapshot(other)
    with pytest.raises(ArtifactError, match=str(tmp_path.name)):
        other.load(tmp_path)
    assert same(before, snapshot(other))


def test_another_schema_is_named(tmp_path: Path) -> None:
    supernet = tiny_supernet()
    supernet.save(tmp_path)
    found = json.loads((tmp_path / "supernet.json").read_text())
    (tmp_path / "supernet.json").write_text(json.dumps(found | {"schema": 99}))
    with pytest.raises(ArtifactError, match=r"schema 99; this version of nasq reads 1\. Update nasq"):
        supernet.load(tmp_path)


def test_another_space_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    one, other = tiny_supernet(), quantized_supernet()
    one.save(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        other.load(tmp_path)
    assert one.space.fingerprint in str(caught.value) and other.space.fingerprint in str(caught.value)


# A user's own loop


def test_a_few_lines_of_ones_own_train_a_supernet() -> None:
    supernet, rng = tiny_supernet().train(), generator(0)
    optimizer = torch.optim.Adam(supernet.parameters(), lr=0.02)
    y = torch.arange(32) % 5
    x = images(32, 1) * 0.3 + (y.reshape(-1, 1, 1, 1) - 2) * torch.tensor([1.0, -0.5, 0.2]).reshape(1, 3, 1, 1)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout draws from torch's own generator
        for _ in range(150):
            optimizer.zero_grad()
            with supernet.activate(supernet.space.sample(rng)):
                loss = nn.functional.cross_entropy(supernet(x), y)
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and supernet.active == {}


def test_the_public_names() -> None:
    assert nasq.Supernet is Supernet and nasq.BNState is BNState


def test_plain_layers_refuse_a_wrong_shape_by_name_as_well() -> None:
    """What torch itself refuses comes as an InputError that says the shape; other errors pass unchanged."""
    supernet = Supernet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), "plain")
    for shape in ((1, 4, 8, 8), (1, 192), (1, 3, 1, 1)):
        message = (
            rf"the network 'plain' cannot run on an input of shape {re.escape(str(list(shape)))}: .*Give inputs of"
        )
        with pytest.raises(InputError, match=message):
            supernet(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="Input type") as found:
        supernet(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert not isinstance(found.value, InputError)
