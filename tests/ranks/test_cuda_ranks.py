"""Two processes on one GPU, which exchange values by gloo, are equal to one process on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import process_cases
import pytest
from cuda_cases import DEVICE, needs_cuda
from process_cases import EQUAL
from processes import in_processes

import mlopt

pytestmark = needs_cuda

#: Without Nystrom, whose random vectors are those of the device.
NAMES = [
    name for name in EQUAL if name.startswith(("flat", "nested", "mixture", "run")) and not name.endswith("nystrom")
]
#: Sums of double precision in another order, over the step of differences or amplified by a solver's condition.
TOLERANCE, AMPLIFIED = 1e-8, 1e-5
LONG = ("differences", "value function", "sama", "history", "run")


def evaluate(names: list[str]) -> dict[str, Any]:
    """Return the outcome of each case in this process, with all levels on the device."""
    mlopt.Level = partial(mlopt.Level, device=DEVICE)  # type: ignore[misc, assignment]
    outcomes = {name: process_cases.outcome(EQUAL[name]) for name in names}
    return {
        name: {key: value.cpu() for key, value in outcome.items()} if isinstance(outcome, dict) else outcome
        for name, outcome in outcomes.items()
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(2, evaluate, NAMES, folder=tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_on_a_gpu_are_equal_to_one_on_the_cpu(two: list[Any], name: str) -> None:
    alone = EQUAL[name](None)
    for outcome in (own[name] for own in two):
        assert isinstance(outcome, dict), outcome
        assert outcome.keys() == alone.keys()
        for key, value in alone.items():
            gap = (outcome[key] - value).nan_to_num().norm() / value.nan_to_num().norm().clamp_min(1e-3)
            assert float(gap) <= (AMPLIFIED if any(word in name for word in LONG) else TOLERANCE), (key, float(gap))
