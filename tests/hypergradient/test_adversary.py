"""Law 7 on drawn problems that mix traps: a hypergradient is right, refused with a sentence, or reported as doubtful."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import torch
from adversary_cases import ALONE, NESTED, SHAPES, LevelTraps, Spec, specs
from adversary_problems import Case, UnsolvedError, Verdict, tolerance, verdict
from core_cases import drawn
from hypothesis import HealthCheck, assume, given, settings

import mlopt


def attempt(spec: Spec) -> tuple[Case | None, Verdict]:
    """Return the case, None if its problem is refused, and the verdict."""
    try:
        case = Case(spec)
    except (UnsolvedError, torch.linalg.LinAlgError):
        assume(False)
    except mlopt.MloptError as error:
        return None, verdict(None, error)
    return case, verdict(case)


def hold(spec: Spec, outcomes: Counter[str]) -> None:
    """Check one problem."""
    _, seen = attempt(spec)
    outcomes[seen.kind] += 1
    traps = ", ".join(spec.traps) or "no trap"
    assert seen.kind not in ("wrong", "raw"), (
        f"{seen.kind}: {traps}; {spec.estimator} with {spec.products} products, shape {spec.shape!r}, {spec.net} network: "
        f"{seen.sentence or f'off by {seen.error:.1e}, without a word'}"
    )
    # A problem without traps is ordinary: it must work, and raise no alarm.
    assert spec.traps or seen.kind == "right", f"{seen.kind} without a trap: {seen.sentence}"


def hold_all(examples: int, shapes: Sequence[str], *, fresh: bool = False) -> None:
    """Check drawn problems: the same ones each time, or fresh ones."""
    outcomes: Counter[str] = Counter()

    @settings(
        drawn(examples),
        derandomize=not fresh,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(spec=specs(shapes))
    def check(spec: Spec) -> None:
        hold(spec, outcomes)

    check()
    print(dict(outcomes))
    assert outcomes["right"] > examples // 4
    assert outcomes["refused"] + outcomes["doubtful"] > 0


def test_a_drawn_problem_is_right_refused_or_doubtful() -> None:
    hold_all(150, [shape for shape in SHAPES if shape not in NESTED])


def test_a_drawn_nested_problem_is_right_refused_or_doubtful() -> None:
    hold_all(25, NESTED)


@pytest.mark.slow
def test_a_thousand_drawn_problems_are_right_refused_or_doubtful() -> None:
    hold_all(1_000, tuple(SHAPES), fresh=True)


@functools.cache
def of_trap(trap: str) -> tuple[Case | None, Verdict]:
    """Return the first case of a trap that has a reference, and its verdict."""
    for seed in range(1, 100):
        try:
            case = Case(attrs.evolve(ALONE[trap], seed=seed))
        except (UnsolvedError, torch.linalg.LinAlgError):
            continue
        except mlopt.MloptError as error:
            return None, verdict(None, error)
        return case, verdict(case)
    raise AssertionError("no case of this trap has a reference")


@pytest.mark.parametrize("trap", ALONE)
def test_a_trap_alone_is_right_refused_or_doubtful(trap: str) -> None:
    _, seen = of_trap(trap)
    assert seen.kind not in ("wrong", "raw"), f"{seen.kind}, off by {seen.error}: {seen.sentence}"


@pytest.mark.parametrize("trap", ALONE)
def test_the_doctor_calls_no_wrong_hypergradient_safe(trap: str) -> None:
    case, seen = of_trap(trap)
    if case is None or (seen.error is not None and seen.error <= tolerance(case.spec)):
        return
    try:
        diagnosis = mlopt.diagnose(case.problem)
    except mlopt.MloptError:
        return
    assert not diagnosis.safe, f"safe, but {seen.kind}, off by {seen.error}: {seen.sentence}\n{diagnosis}"


def test_zeros_without_storage_do_not_end_the_process() -> None:
    """Forward mode has zeros without storage, and kernels below functorch's transforms read past them (torch 2.13)."""
    code = (
        "import torch; torch.set_default_dtype(torch.float64); torch.set_num_threads(1)\n"
        "from adversary_cases import LevelTraps, Spec\n"
        "from adversary_problems import Case, verdict\n"
        "middle, inner = LevelTraps(optimizer='adam', made=True, eps=0.01), LevelTraps(optimizer='adam')\n"
        "options = dict(shape='nested_referred', net='layer_norm', activation='elu', estimator='cg', products='forward')\n"
        "print(verdict(Case(Spec(seed=4582, middle=middle, inner=inner, uneven=True, **options))).kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stderr


def test_a_mask_that_the_first_column_does_not_show_is_in_doubt() -> None:
    """Differences of a dense solve are verified along a full direction; the first one, a unit vector, decides their steps."""
    inner = LevelTraps(optimizer="adam", frozen=True, hook=True)
    middle = LevelTraps(optimizer="adam", regularizer=True)
    spec = Spec(shape="chain", net="mlp", products="finite_difference", middle=middle, inner=inner, mapping=True)
    assert attempt(spec)[1].kind == "doubtful"


def test_a_stopped_gradient_that_the_first_direction_hardly_meets_is_in_doubt() -> None:
    """One random direction more shows it: along the first, the discrepancy is below what is certain."""
    middle, inner = LevelTraps(optimizer="adam"), LevelTraps(stop_outer=True)
    spec = Spec(seed=101, shape="nested_referred", activation="elu", estimator="cg", middle=middle, inner=inner)
    assert attempt(spec)[1].kind == "doubtful"


def test_a_stopped_gradient_of_a_level_outside_a_nest_is_in_doubt() -> None:
    """The term of a multiplier differentiates products of the level inside, whose own are verified for that."""
    middle, inner = LevelTraps(frozen=True), LevelTraps(stop_outer=True)
    for estimator in ("minres", "cg"):
        spec = Spec(shape="nested_referred", estimator=estimator, middle=middle, inner=inner)
        assert attempt(spec)[1].kind == "doubtful"
