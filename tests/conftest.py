from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A test asserts no time: on a busy machine an example may take long.
settings.register_profile("nasq", deadline=None)
settings.load_profile("nasq")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors of the tests are tiny, and test workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
