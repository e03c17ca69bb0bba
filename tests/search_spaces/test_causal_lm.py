"""The small language model: causality, its two inputs, sizes, and LLM-QFA from training to search."""

from __future__ import annotations

import re

import nasq.search_spaces.causal_lm as family
import pytest
import torch
from nasq.search_spaces.causal_lm import causal_lm
from networks import generator
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.plugins import space_info
from nasq.quant.adapters import adapter_parameters, bits_of, separate_bits

TINY = space_info(causal_lm).tiny
VOCABULARY = TINY["num_classes"]


def tokens(count: int, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=generator(seed))


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = causal_lm(**TINY)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(index)))
    return Supernet(network, "causal_lm").eval()


@torch.no_grad()
def test_a_logit_depends_on_its_own_and_earlier_tokens_alone(supernet: Supernet) -> None:
    x = tokens(3)
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCABULARY
    found, other = supernet.module.logits(x), supernet.module.logits(changed)
    assert torch.equal(found[:, :4], other[:, :4])
    assert not torch.equal(found[:, 4:], other[:, 4:])


@torch.no_grad()
def test_one_hot_images_and_shorter_texts_give_the_same(supernet: Supernet) -> None:
    x = tokens(3)
    images = F.one_hot(x, VOCABULARY).float().unsqueeze(1)
    assert torch.equal(supernet(x), supernet(images))
    every = supernet.module.logits(x)
    torch.testing.assert_close(supernet(x), every[:, -1])
    torch.testing.assert_close(supernet(x[:, :3]), every[:, 2])


def test_extract_is_bit_exact_and_costs_equal_counters(supernet: Supernet) -> None:
    x = F.one_hot(tokens(2), VOCABULARY).float().unsqueeze(1)
    model = CostModel(supernet, x)
    for subnet in supernet.space.to_subnets(supernet.space.sample_batch(8, generator(1))):
        plain = supernet.extract(subnet)
        with supernet.activate(subnet):
            assert torch.equal(supernet(x), plain(x))
        assert 2 * model.of(subnet)["macs"] == counted_macs(plain, x)
        assert model.of(subnet)["params"] == sum(parameter.numel() for parameter in plain.parameters())


def test_the_docstring_gives_the_sizes() -> None:
    said = family.__doc__ or ""
    space = Supernet(causal_lm()).space
    assert f"{space.size:,} architectures" in said
    deepest = Supernet(separate_bits(Supernet(causal_lm()).extract(space.largest()), where=("blocks.*",))).space
    found = re.search(r"3\^(\d+) = ([\d.]+e\d+)", said)
    assert found is not None and deepest.size == 3 ** int(found[1])
    assert f"{deepest.size:.2e}" == found[2].replace("e", "e+")


def loss_of(network: nn.Module, batch: Tensor) -> Tensor:
    logits = network.logits(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def count_up(count: int, seed: int) -> Tensor:
    """Texts that count up from a random token: one look at the last token is enough."""
    start = torch.randint(VOCABULARY, (count, 1), generator=generator(seed))
    return (start + torch.arange(7)) % VOCABULARY


def test_from_training_to_few_bits() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        supernet = Supernet(causal_lm(**TINY))
    plain = supernet.extract(supernet.space.largest()).train()
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01)
    for step in range(60):
        optimizer.zero_grad()
        loss_of(plain, count_up(32, step)).backward()
        optimizer.step()
    test = count_up(64, 999)
    full = loss_of(plain, test).item()
    assert full < 0.3
    low = Supernet(separate_bits(plain, (2, 4), group=8, rank=2, where=("blocks.*",)))
    two = dict.fromkeys(low.space.names, 2)
    with low.activate(two):
        before = loss_of(low.module, test).item()
    optimizer = torch.optim.AdamW(adapter_parameters(low), 0.01)
    for step in range(40):
        optimizer.zero_grad()
        with low.activate(two):
            loss_of(low.module, count_up(32, 100 + step)).backward()
        optimizer.step()
    with low.activate(two):
        after = loss_of(low.module, test).item()
    assert full < after < before
    row = low.space.to_rows([two])
    assert bits_of(low, low.space, row).tolist() == [2.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: causal_lm(in_channels=3), "asked for 3 channels; a text has 1"),
        (lambda: causal_lm(**TINY)(tokens(1, 9)), "9 tokens were given to a network whose context is 6"),
        (lambda: causal_lm(**TINY)(torch.zeros(1, 2, 6, 12)), r"a text was given as \[1, 2, 6, 12\]"),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
