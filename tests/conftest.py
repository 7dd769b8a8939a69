"""What all tests share: one thread, fixed seeds, and the two schedules."""

import pytest
import torch

from ddpm_lib import Schedule

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20200619)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.fixture(scope="session")
def linear() -> Schedule:
    """The paper's schedule."""
    return Schedule.linear(1000)


@pytest.fixture(scope="session")
def cosine() -> Schedule:
    return Schedule.cosine(1000)
