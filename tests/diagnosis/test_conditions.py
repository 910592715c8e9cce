"""Diagnoses and checks of problems with levels that a residual defines."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from condition_cases import F64, equilibrium
from torch import Tensor
from torch.optim import SGD

import mlopt
from mlopt import Level, Problem
from mlopt.diagnosis.root import find_root
from mlopt.testing import quadratic, same, snapshot


def linear(matrix: Tensor, start: Tensor, **options: Any) -> Problem:
    given = {"residual": lambda x, batch, *, u: matrix @ x() - u(), "estimator": mlopt.GMRES()} | options
    return Problem(
        Level("u", mlopt.variables(torch.ones(2, dtype=F64)), lambda u, batch, *, x: x().square().sum()),
        Level("x", mlopt.variables(start), **given),
    )


MATRIX = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=F64)


def test_a_condition_at_its_solution_is_safe_and_nothing_moves() -> None:
    problem, _ = equilibrium()
    before = snapshot(problem)
    diagnosis = mlopt.diagnose(problem)
    assert same(before, snapshot(problem))
    found = diagnosis.levels["layer"]
    assert diagnosis.safe
    assert {kind: finding.severity for kind, finding in found.products.items()} == dict.fromkeys(found.products, "ok")
    assert {finding.severity for finding in found.findings} == {"ok"}
    assert (found.spectrum, found.solvers) == (None, {})
    assert "GMRES solves a system with it" in str(diagnosis)


def test_the_distance_from_the_solution_is_measured() -> None:
    start = torch.tensor([3.0, -1.0], dtype=F64)
    distance = float((torch.linalg.solve(MATRIX, torch.ones(2, dtype=F64)) - start).norm() / start.norm())
    text = str(mlopt.diagnose(linear(MATRIX, start)))
    assert "not stationary: residual of norm" in text
    assert f"its solution is about {distance:.1e} of its variables' norm" in text


def test_a_solver_that_does_not_converge_and_a_singular_condition_are_found() -> None:
    start = torch.ones(2, dtype=F64)
    slow = mlopt.diagnose(linear(MATRIX, start, estimator=mlopt.GMRES(iterations=1)))
    assert any("GMRES(iterations=1): it left a residual" in str(finding) for finding in slow.levels["x"].findings)
    singular = mlopt.diagnose(linear(torch.ones(2, 2, dtype=F64), torch.tensor([2.0, -1.0], dtype=F64)))
    findings = [str(finding) for finding in singular.levels["x"].findings if finding.severity != "ok"]
    assert any("numerically singular" in finding for finding in findings)


def test_an_estimator_that_leaves_the_response_out_is_found() -> None:
    found = mlopt.diagnose(linear(MATRIX, torch.ones(2, dtype=F64), estimator=mlopt.Identity(scale=0.0))).levels["x"]
    sentences = [finding.sentence for finding in found.findings if finding.severity == "warning"]
    assert any("Identity(scale=0.0): cannot fail, but leaves the response" in sentence for sentence in sentences)


def test_a_detach_in_a_residual_is_unsafe() -> None:
    problem = linear(
        MATRIX,
        torch.ones(2, dtype=F64),
        residual=lambda x, batch, *, u: MATRIX @ x() + x().detach() * x() - u(),
    )
    diagnosis = mlopt.diagnose(problem)
    assert not diagnosis.safe
    assert "derivatives of the residual differ from differences" in diagnosis.levels["x"].products["autograd"].sentence


def test_games_are_diagnosed() -> None:
    problem = Problem(
        Level("u", mlopt.variables(torch.ones(1, dtype=F64)), lambda u, batch, *, game: game["b"]().square().sum()),
        mlopt.game(
            "game",
            Level(
                "a",
                mlopt.variables(torch.ones(1, dtype=F64)),
                lambda a, batch, *, b, u: (a() * (a() + b() - u())).sum(),
            ),
            Level("b", mlopt.variables(torch.ones(1, dtype=F64)), lambda b, batch, *, a: (b() * (b() - a() - 1)).sum()),
            estimator=mlopt.GMRES(),
        ),
    )
    diagnosis = mlopt.diagnose(problem)
    products = diagnosis.levels["game"].products
    assert diagnosis.safe
    assert "torch.func cannot transform" in products["forward"].sentence
    assert products["finite_difference"].severity == "ok"


def test_the_resolving_oracle_follows_decay_and_batches() -> None:
    """Steps with decay end at (M + c) x = b u, and so does Newton's method."""
    problem = linear(
        MATRIX,
        torch.zeros(2, dtype=F64),
        residual=lambda x, batch, *, u: MATRIX @ x() - batch * u(),
        data=[torch.tensor(2.0, dtype=F64)],
        optimizer=partial(SGD, lr=0.1, weight_decay=0.5),
    )
    solution = torch.linalg.solve(MATRIX + 0.5 * torch.eye(2, dtype=F64), 2 * torch.ones(2, dtype=F64))
    problem["x"].module.value.data.copy_(solution)
    check = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-7)
    assert check.error < 1e-8
    assert check.moved["x"] < 1e-12


def test_the_resolving_oracle_follows_a_rotation() -> None:
    """No minimiser could: the residual points across the way to the solution."""
    rotation = torch.tensor([[0.1, 5.0], [-5.0, 0.1]], dtype=F64)
    check = mlopt.check_hypergradient(linear(rotation, torch.ones(2, dtype=F64)), oracle="resolve", tolerance=1e3)
    assert check.error_at_solution < 1e-8
    assert 0.1 < check.moved["x"] < 10.0


def test_newton_steps_are_halved_where_they_overshoot() -> None:
    """From 3, full steps for the arc tangent diverge."""
    state = [torch.tensor([3.0], dtype=F64)]

    def residual(x: Tensor) -> Tensor:
        state[0] = x
        return x.atan()

    root = find_root(residual, lambda x: -x.atan() * (1 + x.square()), state[0], tolerance=1e-14)
    assert abs(float(root.variables)) < 1e-13
    assert root.gradient_norm < 1e-13


def test_a_residual_without_a_root_ends_where_steps_stop_helping() -> None:
    root = find_root(
        lambda x: x.square() + 1, lambda x: -(x.square() + 1) / (2 * x), torch.tensor([2.0], dtype=F64), tolerance=1e-9
    )
    assert 1.0 <= root.gradient_norm < 1.1
    assert math.isfinite(float(root.variables))


@pytest.mark.parametrize("oracle", ["dense", "resolve"])
def test_a_wrong_estimator_is_found(oracle: str) -> None:
    problem, _ = equilibrium(estimator=mlopt.Identity())
    with pytest.raises(mlopt.DisagreementError):
        mlopt.check_hypergradient(problem, oracle=oracle)


@pytest.mark.parametrize(("shape", "followers"), [("nested", ["z"]), ("two", []), ("chain_of_three", [])])
def test_leader_and_follower_are_named(shape: str, followers: list[str]) -> None:
    """Two levels inside that refer to each other may have been meant as a game, which only the user knows."""
    diagnosis = mlopt.diagnose(quadratic(shape, mlopt.Dense()).problem)
    texts = {name: " ".join(finding.sentence for finding in found.findings) for name, found in diagnosis.levels.items()}
    assert [name for name, text in texts.items() if "is the leader" in text] == followers
