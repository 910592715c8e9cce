"""Named estimators as values: classes, fields, printed form, equality and copies."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch

import mlopt
from mlopt import linear
from mlopt.solving.compatibility import describe, require_compatible
from mlopt.testing import quadratic

SOLVERS = {
    mlopt.Identity: linear.Identity,
    mlopt.FiniteDifference: linear.Identity,
    mlopt.Neumann: linear.Neumann,
    mlopt.ConjugateGradient: linear.ConjugateGradient,
    mlopt.MINRES: linear.MINRES,
    mlopt.Nystrom: linear.Nystrom,
    mlopt.Dense: linear.Dense,
}
#: A value other than the default for every argument of a solver.
OTHER_VALUES = {
    "scale": 0.5,
    "iterations": 3,
    "rank": 3,
    "limit": 3,
    "seed": 3,
    "step_size": 0.5,
    "rtol": 0.5,
    "damping": 0.5,
    "preconditioner": linear.NystromPreconditioner(rank=3),
    "negative_curvature": "raise",
}
#: Estimators with arguments other than the defaults, and how they print.
PRINTED = [
    (mlopt.Identity(), "Identity() with autograd products"),
    (mlopt.Identity(streamed=True, products="forward"), "Identity() with forward products, streamed"),
    (mlopt.FiniteDifference(), "Identity() with finite_difference products"),
    (mlopt.Identity(scale=0.1), "Identity(scale=0.1) with autograd products"),
    (mlopt.FiniteDifference(scale=0.1), "Identity(scale=0.1) with finite_difference products"),
    (mlopt.SAMA(), "Identity() with finite_difference products, adapted"),
    (mlopt.Neumann(), "Neumann(iterations=10) with autograd products"),
    (
        mlopt.Neumann(iterations=3, step_size=0.1, rtol=0.5, warm_start=True),
        "Neumann(iterations=3, step_size=0.1, rtol=0.5) with autograd products, warm start",
    ),
    (
        mlopt.ConjugateGradient(iterations=4, damping=0.1, negative_curvature="raise", curvature_data=[None]),
        "ConjugateGradient(iterations=4, damping=0.1, negative_curvature='raise') with autograd products, curvature data",
    ),
    (
        mlopt.ConjugateGradient(rtol=0.01, history=5),
        "ConjugateGradient(iterations=10, rtol=0.01) with autograd products, history of 5 pairs",
    ),
    (
        mlopt.ConjugateGradient(preconditioner=mlopt.KFACPreconditioner(draws=None)),
        "ConjugateGradient(iterations=10, preconditioner=KFACPreconditioner(draws=None, seed=0)) with autograd products",
    ),
    (
        mlopt.MINRES(products="forward", compile=True, warm_start=True),
        "MINRES(iterations=10) with forward products, compiled, warm start",
    ),
    (
        mlopt.Nystrom(products="gauss_newton", seed=3, damping=0.5),
        "Nystrom(rank=10, damping=0.5, seed=3) with gauss_newton products",
    ),
    (mlopt.Dense(limit=7), "Dense(damping=0.0, limit=7) with autograd products"),
    (
        mlopt.LinearSolve(solver=linear.MINRES(iterations=5), products="forward"),
        "MINRES(iterations=5) with forward products",
    ),
]
each = pytest.mark.parametrize("estimator", [estimator for estimator, _ in PRINTED], ids=repr)
KINDS = sorted({type(estimator) for estimator, _ in PRINTED}, key=lambda kind: kind.__name__)


@each
def test_it_is_an_instance_of_its_class_and_of_no_other(estimator: mlopt.Implicit) -> None:
    assert isinstance(estimator, mlopt.Implicit)
    assert [kind for kind in KINDS if isinstance(estimator, kind)] == [type(estimator)]
    assert not isinstance(estimator, linear.LinearSolver)


@pytest.mark.parametrize(("estimator", "text"), PRINTED)
def test_printed_form(estimator: mlopt.Implicit, text: str) -> None:
    assert str(estimator) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_are_the_documented_arguments(kind: type[Any]) -> None:
    section = inspect.getdoc(kind).partition("Args:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^ {4}(\w+): ", section, re.MULTILINE)
    fields = [field.name for field in attrs.fields(kind)]
    assert set(documented) == set(fields)
    parameters = inspect.signature(kind).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(fields)
    assert len(parameters) == len(fields)


@pytest.mark.parametrize("kind", SOLVERS)
def test_defaults_are_those_of_the_linear_solver(kind: type[Any]) -> None:
    assert kind().solver == SOLVERS[kind]()


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_argument_of_the_solver_reaches_it(kind: type[Any]) -> None:
    names = [field.name for field in attrs.fields(SOLVERS[kind])]
    estimator = kind(**{name: OTHER_VALUES[name] for name in names})
    for name in names:
        assert getattr(estimator, name) == OTHER_VALUES[name]
        assert getattr(estimator.solver, name) == OTHER_VALUES[name]
        assert f"{name}={OTHER_VALUES[name]!r}" in repr(estimator)


@each
def test_equality_and_copies(estimator: mlopt.Implicit) -> None:
    copies = [copy.copy(estimator), copy.deepcopy(estimator), attrs.evolve(estimator)]
    copies.append(pickle.loads(pickle.dumps(estimator)))
    for other in copies:
        assert other == estimator
        assert type(other) is type(estimator)
        assert str(other) == str(estimator)
    assert all(other != estimator for other, _ in PRINTED if other is not estimator)


@pytest.mark.parametrize("kind", [*(kind for kind in SOLVERS if kind is not mlopt.FiniteDifference), mlopt.SAMA])
def test_evolve_checks_and_leaves_the_original(kind: type[Any]) -> None:
    estimator = kind()
    changed = attrs.evolve(estimator, products="forward")
    assert changed.products == "forward"
    assert changed != estimator
    assert estimator == kind()
    with pytest.raises(ValueError, match=f"{kind.__name__}: products='reverse'"):
        attrs.evolve(estimator, products="reverse")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        estimator.products = "forward"


@pytest.mark.parametrize(
    "kind",
    [
        *KINDS,
        *SOLVERS.values(),
        mlopt.Unrolled,
        mlopt.ValueFunction,
        mlopt.RealSteps,
        mlopt.KFACPreconditioner,
        linear.NystromPreconditioner,
    ],
    ids=lambda kind: f"{kind.__module__}.{kind.__name__}",
)
def test_arguments_are_keyword_only(kind: type[Any]) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        kind(10)


def test_evolve_reaches_the_solver() -> None:
    estimator = attrs.evolve(mlopt.ConjugateGradient(iterations=3), iterations=5)
    assert estimator.solver == linear.ConjugateGradient(iterations=5)
    assert estimator.solver is estimator.solver  # made and checked once
    with pytest.raises(ValueError, match="ConjugateGradient: iterations=0"):
        attrs.evolve(estimator, iterations=0)


def test_a_base_class_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        mlopt.Implicit()  # type: ignore[abstract]
    with pytest.raises(mlopt.ArgumentError, match=r"LinearSolve: solver=.*; it must be a linear solver"):
        mlopt.LinearSolve(solver=mlopt.MINRES())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (mlopt.Neumann, "warm_start", "no"),
        (mlopt.ConjugateGradient, "warm_start", None),
        (mlopt.MINRES, "warm_start", 1),
        (mlopt.ValueFunction, "warm_start", "no"),
        (mlopt.Identity, "streamed", "no"),
        (mlopt.Dense, "compile", "no"),
        (mlopt.Dense, "curvature_data", 3),
        (mlopt.Dense, "curvature_data", torch.ones(2)),
        (mlopt.Dense, "curvature_data", iter([torch.ones(2)])),
        (partial(mlopt.Checkpoints, "folder"), "greater_is_better", "no"),
    ],
)
def test_switches_and_data_are_checked(kind: Callable[..., Any], option: str, value: object) -> None:
    with pytest.raises(
        mlopt.ArgumentError, match=f"{option}=.*; it must be (True or False|batches that can be iterated)"
    ):
        kind(**{option: value})


def test_options_exist_only_where_they_have_a_meaning() -> None:
    for kind, option in [
        (mlopt.Identity, "warm_start"),
        (mlopt.Identity, "curvature_data"),
        (mlopt.Dense, "streamed"),
        (mlopt.Dense, "warm_start"),
        (mlopt.SAMA, "streamed"),
        (mlopt.FiniteDifference, "products"),
    ]:
        with pytest.raises(TypeError, match=option):
            kind(**{option: True})


def test_a_checkpoint_describes_the_estimator_by_its_printed_form() -> None:
    def description(estimator: mlopt.Estimator) -> dict[str, Any]:
        case = quadratic("two", estimator).problem
        optimizers = {level.name: torch.optim.SGD(level.parameters, lr=0.1) for level in case}
        return describe(case, optimizers, dict.fromkeys(optimizers), lookahead=False)

    there = description(mlopt.MINRES(iterations=5))
    require_compatible(description(mlopt.LinearSolve(solver=linear.MINRES(iterations=5))), there)
    with pytest.warns(
        mlopt.CheckpointWarning, match=r"estimator of level 'y' was MINRES\(iterations=5\) with autograd"
    ):
        require_compatible(description(mlopt.MINRES(iterations=6)), there)
