"""Vectors on several devices, and tensors made while another device is the default one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from core_cases import flat
from torch import Tensor

import mlopt
from mlopt.tensors import dot, norm
from mlopt.testing import quadratic


@pytest.mark.parametrize("measure", [norm, lambda a: dot(a, a)], ids=["norm", "dot"])
def test_a_vector_on_two_devices_has_its_number_on_the_first(measure: Callable[[list[Tensor]], Tensor]) -> None:
    """Meta tensors stand for those of a second device; they hold no values."""
    assert measure([torch.ones(2, device="meta"), torch.ones(3)]).device.type == "meta"


def test_other_errors_are_not_taken_for_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "stack", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        norm([torch.ones(2), torch.ones(3)])


@pytest.fixture
def device_reset() -> Iterator[None]:
    yield
    torch.set_default_device(None)


CASES: dict[str, Callable[[mlopt.Problem], Any]] = {
    "hypergradient": lambda problem: flat(mlopt.hypergradient(problem, seed=0).gradient).tolist(),
    "solve": lambda problem: mlopt.solve(problem, steps=2, progress=False).history[-1]["x/loss"],
    "check": lambda problem: mlopt.check_hypergradient(problem, tolerance=1e9).rows[-1].oracle,
    "resolve": lambda problem: mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e9).rows[0].oracle,
    "diagnose": lambda problem: mlopt.diagnose(problem).levels["y"].spectrum.low,
}
RULES = {
    "autograd": mlopt.ConjugateGradient(iterations=50),
    "forward": mlopt.ConjugateGradient(iterations=50, products="forward"),
    "finite differences": mlopt.ConjugateGradient(iterations=50, products="finite_difference", rtol=1e-6),
}


@pytest.mark.usefixtures("device_reset")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ["two", "nested"])
def test_the_default_device_does_not_matter(shape: str, case: str, rule: str) -> None:
    """A tensor that the library made on `meta` would raise when it is read."""
    expected, problem = CASES[case](quadratic(shape, RULES[rule]).problem), quadratic(shape, RULES[rule]).problem
    torch.set_default_device("meta")
    assert CASES[case](problem) == pytest.approx(expected, rel=1e-9)
