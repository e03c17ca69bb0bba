"""Scoring one model with several proxies: independence, determinism, the guard, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nasq import plugins
from nasq.errors import InputError
from nasq.ranking import Batch, Needs, Proxy, expand, score
from nasq.ranking.copies import private_copy, untouched
from tests.proxies.nets import Attentive, Mixed, batch, built, small

EVERY = expand([plugins.load("proxies", name)() for name in plugins.installed("proxies")])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_score_does_not_depend_on_what_else_is_asked() -> None:
    model, given = built(small), batch(8)
    together = score(EVERY, model, given)
    backwards = score(EVERY[::-1], model, given)
    for proxy in EVERY:
        alone = score([proxy], model, given)[proxy.name]
        assert together[proxy.name] == pytest.approx(alone, rel=1e-5), proxy.name
        assert backwards[proxy.name] == pytest.approx(alone, rel=1e-5), proxy.name


def test_the_generator_decides_and_advances_by_one_draw() -> None:
    model, given = built(small), batch(4)
    drawing = [proxy for proxy in EVERY if proxy.name in {"zen", "meco", "linear_regions", "az_expressivity"}]
    rng = generator(3)
    first = score(drawing, model, given, generator=rng)
    assert first == score(drawing, model, given, generator=generator(3))
    second = score(drawing, model, given, generator=rng)
    assert all(first[name] != second[name] for name in first)
    after = generator(3)
    torch.randint(2**62, (2,), generator=after)
    assert torch.equal(rng.get_state(), after.get_state())


def test_shared_observations_take_one_forward_pass() -> None:
    class Counting(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return self.inner(x)

    names = {"grad_norm", "snip", "plain", "fisher", "grasp", "jacov", "epe_nas", "naswot"}
    asked = [proxy for proxy in EVERY if proxy.name in names]
    score(asked, built(Counting), batch())
    assert len(asked) == 8 and Counting.calls == 1


def test_dropout_and_other_training_behaviour_are_off() -> None:
    model = nn.Sequential(*list(built(small))[:-1], nn.Dropout(0.5), list(built(small))[-1])
    chosen = [proxy for proxy in EVERY if proxy.name in {"gradsign", "snip"}]
    assert score(chosen, model.train(), batch()) == score(chosen, built(small), batch())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).relu().mean((2, 3))
        return features, self.head(features)


def test_which_element_of_a_tuple() -> None:
    chosen = [proxy for proxy in EVERY if proxy.name in {"gradsign", "snip", "naswot"}]
    message = r"returns a tuple of 2 \(0: \[6, 4\], 1: \[6, 5\]\), and output=None .*output=INDEX"
    with pytest.raises(InputError, match=message):
        score(chosen[1:], built(Pair), batch())
    assert score(chosen, built(Pair), batch(), output=1)["snip"] > 0
    with pytest.raises(InputError, match="output=7"):
        score(chosen, built(Pair), batch(), output=7)
    with pytest.raises(
        InputError, match=r"returns one tensor \[6, 5\], and output=1 chooses among several\. Leave it out"
    ):
        score(chosen, built(small), batch(), output=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [((batch()[0], None), "'snip' needs labels and the batch has none"),
     ((batch()[0], torch.zeros(3).long()), r"labels are \[3\] for 6 images")],
    ids=["none", "count"],
)  # fmt: skip
def test_labels_that_are_missing(given: Batch, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score([plugins.load("proxies", "snip")()], built(small), given)


def test_an_unknown_proxy_has_a_nearest_name() -> None:
    with pytest.raises(InputError, match=r"unknown proxy 'gradsing'. Did you mean 'gradsign'"):
        plugins.load("proxies", "gradsing")


def test_a_batch_of_one_on_maps_of_one_pixel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(InputError, match=r"single value per channel .* a batch of one. Give more images, or larger"):
        score([plugins.load("proxies", "snip")()], model, batch(1))


def test_logits_that_are_none() -> None:
    with pytest.raises(InputError, match=r"output is \[6, 4, 6, 6\], and proxies with labels need logits"):
        score([plugins.load("proxies", "snip")()], nn.Conv2d(3, 4, 3), batch())


def test_nan_is_reported() -> None:
    model = built(small)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    found = score([proxy for proxy in EVERY if proxy.name in {"snip", "l2_norm", "jacov"}], model, batch())
    assert all(math.isnan(one) for one in found.values())


def damage_weight(model: nn.Module) -> None:
    model[0].weight.data.add_(1)


def damage_buffer(model: nn.Module) -> None:
    model[1].num_batches_tracked += 1


def damage_grad(model: nn.Module) -> None:
    model[0].weight.grad = torch.zeros_like(model[0].weight)


def damage_hook(model: nn.Module) -> None:
    model[2].register_forward_hook(lambda *_: None)


def damage_random(model: nn.Module) -> None:
    torch.rand(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_weight, "0.weight"), (damage_buffer, "1.num_batches_tracked"), (damage_grad, "gradient of 0.weight"),
     (damage_hook, "mode or the hooks of 2"), (lambda model: model.eval(), "mode or the hooks of the model"),
     (damage_random, "global random stream"), (lambda model: model.append(nn.ReLU()), "its submodules"),
     (lambda model: model[0].weight.requires_grad_(False), "requires_grad of 0.weight")],
    ids=["weight", "buffer", "grad", "hook", "mode", "random", "module", "requires_grad"],
)  # fmt: skip
def test_the_guard_sees_every_change(damage: object, message: str) -> None:
    class Bad(Proxy):
        name, needs, reference = "bad", Needs(), "test"

        def score(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> float:
            damage(model)  # type: ignore[operator]
            return 0.0

    with torch.random.fork_rng(), pytest.raises(InputError, match=f"scoring changed .*{message}"):
        score([Bad()], built(small), batch())


def test_the_guard_lets_nan_weights_be() -> None:
    model = built(small)
    with torch.no_grad():
        model[0].weight[0] = math.nan
    with untouched(model):
        pass


def test_attention_written_out_computes_the_same() -> None:
    model, (x, _) = built(Attentive), batch()
    torch.testing.assert_close(private_copy(model)(x), model.eval()(x))
    assert copy.deepcopy(model).attention.in_proj_weight.shape == (24, 8)


def test_a_mixed_network_scores_finite_with_everything() -> None:
    found = score(EVERY, built(Mixed), batch(16, side=12))
    assert all(math.isfinite(one) for one in found.values()), found
