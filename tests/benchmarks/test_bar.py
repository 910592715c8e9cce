"""The targets of the benchmark, judged on invented rows: met, missed or not measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hypergrad.__main__ import _parser
from benchmarks.hypergrad.bar import bar
from benchmarks.hypergrad.figures import draw

CASE = "logistic regression"


def row(library: str, estimator: str, **measured: Any) -> dict[str, Any]:
    return {
        "section": "accuracy",
        "library": library,
        "estimator": estimator,
        "case": CASE,
        "iterations": 10,
        **measured,
    }


def verdicts(rows: list[dict[str, Any]], start: str) -> list[bool | None]:
    return [met for target, _, met in bar(rows) if target.startswith(start)]


def test_without_rows_no_target_is_judged() -> None:
    assert {met for _, _, met in bar([])} == {None}


@pytest.mark.parametrize(("error", "met"), [(1e-9, True), (1e-7, False), (math.nan, False)])
def test_one_wrong_exact_estimator_misses_the_target(error: float, met: bool) -> None:
    right = row("mlopt", "Dense", dtype="float64", error=1e-12)
    other = row("mlopt", "Converged ConjugateGradient", dtype="float64", error=error)
    assert verdicts([right, other], "1 exact estimators: largest error in float64") == [met]


def test_only_equally_accurate_libraries_are_compared() -> None:
    ours = row("mlopt", "ConjugateGradient", error=1e-2, time=10.0, memory=2.0)
    wrong = row("betty", "ConjugateGradient", error=2.0, time=1.0, memory=0.1)
    broken = row("betty_head", "ConjugateGradient", error=math.nan, time=1.0, memory=0.1)
    right = row("boat", "ConjugateGradient", error=1e-2, time=12.0, memory=1.0)
    assert verdicts([ours, wrong, broken, right], "2 ConjugateGradient,") == [True, False]
    assert verdicts([ours, wrong, broken], "2 ConjugateGradient,") == [None, None]
    # An estimator of mlopt that solves with another matrix is not compared either.
    other = row("mlopt", "ConjugateGradient Gauss-Newton", error=0.9, time=1.0, memory=0.1)
    assert verdicts([ours, other, right], "2 ConjugateGradient,") == [True, False]


def test_the_fastest_estimator_must_meet_the_memory_target_too() -> None:
    slow = row("mlopt", "Neumann differences", error=0.5, time=50.0, memory=0.5)
    fast = row("mlopt", "Neumann", error=0.5, time=9.0, memory=3.0)
    peer = row("hypertorch", "Neumann", error=0.5, time=10.0, memory=1.0)
    assert verdicts([slow, fast, peer], "2 Neumann,") == [True, False]
    assert verdicts([slow, fast | {"memory": 1.0}, peer], "2 Neumann,") == [True, True]


def test_live_and_compiled_products_are_judged_apart() -> None:
    def of(library: str, estimator: str, time: float) -> dict[str, Any]:
        return row(library, estimator, error=1e-2, time=time, memory=1.0)

    live, peer = of("mlopt", "ConjugateGradient", 8.5), of("boat", "ConjugateGradient", 10.0)
    compiled = of("mlopt", "ConjugateGradient compiled", 7.0)
    assert verdicts([live, compiled, peer], "2 ConjugateGradient") == [True, True, True, True]
    assert verdicts([live | {"time": 9.1}, compiled, peer], "2 ConjugateGradient") == [False, True, True, True]
    assert verdicts([live, compiled | {"time": 7.6}, peer], "2 ConjugateGradient") == [True, True, False, True]
    assert verdicts([live, peer], "2 ConjugateGradient compiled") == [None, None]


@pytest.mark.parametrize(("ratio", "error", "met"), [(3.1, 5e-3, True), (2.9, 5e-3, False), (9.0, 5e-2, None)])
def test_only_loops_within_the_tracking_error_count(ratio: float, error: float, met: bool | None) -> None:
    ours = row("mlopt", "CG warm", section="loop", error=error) | {"best peer / this": ratio}
    assert verdicts([ours], "3 loop") == [met]


def test_one_estimator_must_meet_all_targets_of_the_identity() -> None:
    def of(library: str, estimator: str, time: float, error: float) -> dict[str, Any]:
        return row(library, estimator, section="identity", time=time, error=error, deviation=0.1, bfloat16=0.01)

    betty = of("betty", "FiniteDifference", 2.0, 1e-4) | {"deviation": 20.0}
    fast, precise = of("mlopt", "FiniteDifference", 1.0, 1e-4), of("mlopt", "Identity forward", 3.0, 1e-7)
    assert verdicts([betty, fast, precise], "4") == [True, False, True, True]
    assert verdicts([betty, fast, precise | {"time": 1.89}], "4") == [True] * 4


def test_unrolling_is_judged_at_the_largest_common_number_of_steps() -> None:
    def of(library: str, steps: int, memory: float, time: float) -> dict[str, Any]:
        return row(library, "Unrolled", section="unroll", memory=memory, time=time) | {"iterations": steps}

    rows = [of("mlopt", 10, 9.0, 9.0), of("mlopt", 100, 10.0, 200.0), of("torchopt", 10, 1.0, 1.0)]
    rows += [of("torchopt", 100, 50.0, 160.0), of("higher", 100, 60.0, 150.0)]
    assert verdicts(rows, "5") == [True, True, False, False]


def test_the_ladder_is_judged_by_the_slowest_estimator() -> None:
    rows = [
        row("mlopt", name, section="ladder", rungs=8) | {"time / one rung": t} for name, t in (("a", 5.0), ("b", 11.0))
    ]
    assert verdicts(rows[:1], "6") == [True]
    assert verdicts(rows, "6") == [False]


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    rows = [row("mlopt", "Neumann", error=0.1, time=5.0) | {"iterations": k} for k in (10, 100)]
    rows.append(row("mlopt", "Dense", section="ladder", rungs=1) | {"time / one rung": 1.0})
    rows.append(row("higher", "Unrolled", section="unroll", memory=3.0))
    files = draw(rows, tmp_path / "figures")
    case = "logistic_regression"
    names = [f"error_time_{case}.png", f"error_iterations_{case}.png", "ladder.png", "unroll_memory.png"]
    assert [file.name for file in files] == names
    assert all(file.stat().st_size > 10_000 for file in files)


def test_an_unknown_library_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--peer", "nobody=python"])
    assert "hypertorch" in capsys.readouterr().err
