"""Targets within 5% of their limit: the parts of the sections that are measured again, and the figures of all runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from benchmarks.hypergrad.bar import near
from benchmarks.hypergrad.repeats import repeat, runs_of
from benchmarks.hypergrad.sections import accuracy
from benchmarks.hypergrad.workers import LIBRARIES as NAMES
from benchmarks.hypergrad.workers import Part, Workplace

CASE = "MLP 64-256-10"
TIME = f"2 ConjugateGradient, 10 iterations, {CASE}: time relative to the best equally accurate library <= 0.9"
NOWHERE = {name: "/nowhere/python" for name in NAMES if name != "mlopt"}


def rows(time: float, *, section: str = "accuracy") -> list[dict[str, Any]]:
    """Return the rows of mlopt at a time, and of another library at 10."""
    common = {"section": section, "estimator": "ConjugateGradient", "case": CASE, "iterations": 10, "error": 1e-3}
    return [common | {"library": name, "time": t, "memory": 1.0} for name, t in (("mlopt", time), ("boat", 10.0))]


@pytest.mark.parametrize(("time", "close"), [(8.5, False), (8.56, True), (9.44, True), (9.5, False)])
def test_times_within_five_percent_of_their_limit_are_near(time: float, close: bool) -> None:
    """The memory, which is at its limit, is not: it is the same in every run."""
    expected = {TIME: ("accuracy", Part(CASE, "ConjugateGradient", 10))}
    assert near(rows(time)) == (expected if close else {})


def test_a_near_target_is_run_three_times_and_keeps_its_first_figure() -> None:
    times, asked = iter((9.2, 8.9)), []

    def section(place: Any) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "section"} for row in rows(next(times))]

    def workplace(parts: Collection[Part]) -> Workplace:
        asked.append(set(parts))
        return Workplace(NOWHERE | {"mlopt": "/nowhere/python"}, "cpu", True, parts)

    first = rows(9.1)
    again = repeat(first, {"accuracy": section}, workplace)
    assert asked == [{Part(CASE, "ConjugateGradient", 10)}] * 2
    assert runs_of(first + again) == [(TIME, ["0.91", "0.92", "0.89"], "met in 1 of 3")]
    assert runs_of(first) == []


def test_a_part_of_a_section_has_only_its_rows() -> None:
    part = Part("quadratic, condition 100", "Neumann", 10)
    with Workplace(NOWHERE, "cpu", True, [part]) as place:
        measured = accuracy.run(place)
    assert {(row["case"], row["estimator"].split()[0], row["iterations"]) for row in measured} == {part}
    assert len(measured) == 2  # live and compiled products


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (Part(), True),
        (Part("a"), True),
        (Part("a", "Neumann", 10), True),
        (Part("b"), False),
        (Part("a", "MINRES"), False),
        (Part("a", "Neumann", 100), False),
    ],
)
def test_none_in_a_part_stands_for_all(part: Part, wanted: bool) -> None:
    place = Workplace(NOWHERE | {"mlopt": "/nowhere/python"}, "cpu", True, [part])
    with place:
        assert place.wants("a", "Neumann compiled", 10) is wanted
        assert place.wants("a") is (part.case != "b")
