"""Fixtures of the tests of the recipes. As a conftest, this file puts its folder on the path of the folders below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from command_cases import Case


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: if other processes compute too, several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def molecules(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from command_cases import molecules

    return molecules(tmp_path_factory.mktemp("molecules"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from command_cases import text

    return text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=["molecules", "text"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)
