from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import generator
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel
from nasq.elastic.transform import KernelTransforms
from nasq.errors import InputError

KERNEL = Choice("kernel", (3, 5, 7))


def depthwise(seed: int = 0) -> elastic.Conv2d:
    torch.manual_seed(seed)
    conv = elastic.Conv2d(4, 4, KERNEL, groups=4, bias=False, kernel_transform=True)
    assert conv.transforms is not None
    with torch.no_grad():
        for matrix in conv.transforms.parameters():
            matrix.add_(torch.randn(matrix.shape) * 0.1)
    return conv.eval()


def test_at_first_smaller_kernels_are_the_centre() -> None:
    torch.manual_seed(0)
    learned = elastic.Conv2d(4, 6, KERNEL, kernel_transform=True)
    plain = elastic.Conv2d(4, 6, KERNEL)
    plain.load_state_dict({name: value for name, value in learned.state_dict().items() if "transforms" not in name})
    for kernel in (3, 5, 7):
        learned.active = plain.active = {"kernel": kernel}
        assert torch.equal(learned.active_weight(), plain.active_weight())


def test_a_smaller_kernel_is_the_matrix_times_the_centre_of_the_next_larger() -> None:
    conv = depthwise()
    assert conv.transforms is not None
    large = conv.weight.detach().double().numpy()
    matrices = {name: value.detach().double().numpy() for name, value in conv.transforms.named_parameters()}
    assert {name: value.shape for name, value in matrices.items()} == {"7to5": (25, 25), "5to3": (9, 9)}
    wanted = {7: large}
    for small, size in ((5, 7), (3, 5)):
        made = np.zeros((4, 1, small, small))
        for channel in range(4):
            centre = wanted[size][channel, 0, 1:-1, 1:-1].reshape(-1)
            for row in range(small * small):
                product = sum(
                    matrices[f"{size}to{small}"][row, column] * centre[column] for column in range(small * small)
                )
                made[channel, 0, row // small, row % small] = product
        wanted[small] = made
    for kernel, weight in wanted.items():
        conv.active = {"kernel": kernel}
        assert np.abs(conv.active_weight().detach().numpy() - weight).max() < 1e-6


def test_all_matrices_on_the_way_learn() -> None:
    conv = depthwise()
    assert conv.transforms is not None
    for kernel, learning in ((7, set()), (5, {"7to5"}), (3, {"7to5", "5to3"})):
        conv.zero_grad(set_to_none=True)
        conv.active = {"kernel": kernel}
        conv(torch.randn(2, 4, 8, 8, generator=generator(0))).square().sum().backward()
        assert {name for name, value in conv.transforms.named_parameters() if value.grad is not None} == learning
        assert conv.weight.grad is not None


def test_extraction_folds_the_transform() -> None:
    supernet = Supernet(depthwise())
    x = torch.randn(2, 4, 9, 9, generator=generator(1))
    for kernel in (3, 5, 7):
        plain = supernet.extract({"kernel": kernel})
        assert [tuple(value.shape) for value in plain.parameters()] == [(4, 1, kernel, kernel)]
        with supernet.activate({"kernel": kernel}), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))
            assert torch.equal(plain(x), F.conv2d(x, supernet.module.active_weight(), padding=kernel // 2, groups=4))


def test_a_transform_costs_nothing_once_it_is_extracted() -> None:
    kernel = Choice("kernel", (3, 5, 7), default=3)
    model = CostModel(
        Supernet(elastic.Conv2d(2, 4, kernel, bias=False, kernel_transform=True)), torch.zeros(1, 2, 8, 8)
    )
    for size in (3, 5, 7):
        found = model.of({"kernel": size})
        assert found["params"] == 2 * 4 * size**2 and found["macs"] == 2 * 4 * size**2 * 64


@pytest.mark.parametrize("kernel", [3, Choice("one", (5,)), Choice("mixed", (2, 3)), Choice("text", ("a", "b"))])
def test_what_has_no_next_larger_kernel_is_refused(kernel: object) -> None:
    with pytest.raises(
        InputError, match=r"need a choice of at least two kernels that are all odd or all even, got .*leave"
    ):
        KernelTransforms(kernel)  # type: ignore[arg-type]
