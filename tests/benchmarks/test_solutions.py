"""The problems of `benchmarks.solutions`: their exact derivatives are those of re-solved values, and mlopt meets them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.solutions import problems, with_mlopt
from benchmarks.solutions.__main__ import table


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_exact_derivatives_are_those_of_resolved_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, direction = problems.data(name), np.random.default_rng(1).standard_normal(20)
    _, gradient = problems.exact(name)
    values = []
    for sign in (1, -1):
        displaced = arrays | {"u": arrays["u"] + sign * 1e-5 * direction}
        monkeypatch.setattr(problems, "data", lambda _, displaced=displaced: displaced)
        values.append(problems.exact(name)[0])
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient @ direction, rel=1e-6)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_mlopt_meets_them(name: str) -> None:
    value, gradient = getattr(with_mlopt, name)(problems.data(name))
    exact, derivative = problems.exact(name)
    assert value == pytest.approx(exact, rel=1e-7)
    assert np.linalg.norm(gradient - derivative) < 1e-6 * np.linalg.norm(derivative)


def test_times_are_shown_relative_to_mlopt() -> None:
    rows = [
        {"library": library, "problem": name, "lines": 3, "error": 1e-9, "seconds": seconds}
        for name in problems.PROBLEMS
        for library, seconds in (("mlopt", 2.0), ("other", 3.0))
    ]
    assert [*table(rows).columns[-1].cells] == ["1.00", "1.50"] * len(problems.PROBLEMS)
