"""Law 1: every exact estimator agrees with the closed form, on every shape of problem."""

from __future__ import annotations

import pytest
import torch
from core_cases import PRODUCTS, conjugate_gradient, drawn, gradient_of, seeds
from hypothesis import given
from hypothesis import strategies as st

import mlopt
from mlopt.testing import SHAPES, ClosedForm, ladder, logistic_regression, quadratic

NESTED = [name for name in SHAPES if name.startswith("nested")]
FLAT = [name for name in SHAPES if name not in NESTED]
TWICE = [name for name in NESTED if "twice" in name]
SINGLE = [name for name in SHAPES if name not in TWICE]


def exact(products: str) -> st.SearchStrategy[mlopt.Estimator]:
    """Draw an exact estimator."""
    rtol = 1e-9 if products == "finite_difference" else 1e-13
    minres = mlopt.MINRES(iterations=200, rtol=rtol, products=products)
    preconditioned = mlopt.ConjugateGradient(
        iterations=200, rtol=rtol, preconditioner=mlopt.linear.NystromPreconditioner(rank=2), products=products
    )
    return st.sampled_from([mlopt.Dense(products=products), conjugate_gradient(products), minres, preconditioned])


def draw_case(data: st.DataObject, shape: str, products: str) -> ClosedForm:
    """Draw a quadratic problem, with an exact estimator for each level: a problem may mix them."""
    estimators = {name: data.draw(exact(products), label=name) for name in SHAPES[shape]}
    return quadratic(
        shape,
        estimators,
        seed=data.draw(seeds, label="seed"),
        # A product with a Hessian two nestings deep takes thousands of products with the innermost: keep those small.
        size=1 if shape in TWICE else data.draw(st.integers(1, 3 if shape in FLAT else 2), label="size"),
        condition=data.draw(st.floats(1.5, 30.0), label="condition"),
    )


def error(case: ClosedForm, level: str | None = None) -> float:
    """Return the relative error of the hypergradient."""
    return case.error(mlopt.hypergradient(case.problem, level=level).gradient)


@pytest.mark.parametrize("shape", SINGLE)
@drawn(15)
@given(data=st.data())
def test_autograd_products_agree_with_the_closed_form(shape: str, data: st.DataObject) -> None:
    assert error(draw_case(data, shape, "autograd")) < 1e-8


@pytest.mark.parametrize("shape", TWICE)
@drawn(4)
@given(data=st.data())
def test_autograd_products_agree_with_the_closed_form_when_nested_twice(shape: str, data: st.DataObject) -> None:
    assert error(draw_case(data, shape, "autograd")) < 1e-8


@pytest.mark.parametrize("shape", FLAT)
@drawn(6)
@given(data=st.data())
def test_forward_products_agree_with_the_closed_form(shape: str, data: st.DataObject) -> None:
    assert error(draw_case(data, shape, "forward")) < 1e-8


@pytest.mark.parametrize(("shape", "seed"), [*((shape, 1) for shape in SINGLE if shape in NESTED), ("nested_twice", 0)])
def test_forward_products_agree_with_the_closed_form_when_nested(shape: str, seed: int) -> None:
    """Each case takes seconds, so none is drawn."""
    assert error(quadratic(shape, mlopt.Dense(products="forward"), seed=seed, size=1)) < 1e-8


@pytest.mark.parametrize("shape", FLAT)
@drawn(15)
@given(data=st.data())
def test_differences_agree_with_the_closed_form(shape: str, data: st.DataObject) -> None:
    assert error(draw_case(data, shape, "finite_difference")) < 1e-8


@pytest.mark.parametrize("shape", [name for name in SINGLE if name in NESTED])
@drawn(6)
@given(data=st.data())
def test_differences_agree_with_the_closed_form_when_nested(shape: str, data: st.DataObject) -> None:
    """In differences of differences, rounding of 1e-16 is divided by the step of 1e-5 twice."""
    assert error(draw_case(data, shape, "finite_difference")) < 5e-5


def test_differences_nested_twice_are_reported_as_coarse() -> None:
    """Rounding leaves two digits in three nested differences, and the report says so."""
    case = quadratic("nested_twice", mlopt.Dense(products="finite_difference"), seed=1, size=1)
    result = mlopt.hypergradient(case.problem)
    assert error(case) < 0.2
    assert "expect errors of several per cent" in " ".join(
        r for report in result.reports.values() for r in report.remarks
    )


@pytest.mark.parametrize("products", ["autograd", "forward"])
@drawn(6)
@given(data=st.data())
def test_a_long_neumann_series_agrees_with_the_closed_form(products: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(["two", "chain_of_three", "chain_with_shortcuts", "diamond"]), label="shape")
    neumann = mlopt.Neumann(iterations=300, rtol=1e-12, products=products)
    case = quadratic(shape, neumann, seed=data.draw(seeds), condition=data.draw(st.floats(1.2, 2.5)))
    assert error(case) < 1e-8


@drawn(6)
@given(seed=seeds, outer=st.booleans())
def test_a_long_neumann_series_agrees_with_the_closed_form_when_nested(seed: int, outer: bool) -> None:
    neumann, dense = mlopt.Neumann(iterations=300, rtol=1e-12), mlopt.Dense()
    estimators = {"y": neumann, "z": dense} if outer else {"y": dense, "z": neumann}
    assert error(quadratic("nested_and_referred_to", estimators, seed=seed, condition=1.5)) < 1e-8


@drawn(15)
@given(rungs=st.integers(1, 4), seed=seeds)
def test_a_ladder_of_diamonds(rungs: int, seed: int) -> None:
    assert error(quadratic(ladder(rungs), mlopt.Dense(), seed=seed, size=1)) < 1e-8


@pytest.mark.parametrize(
    ("shape", "level"), [("nested", "y"), ("nested_with_two_inside", "y"), ("nested_twice", "x"), ("nested_twice", "y")]
)
@drawn(15)
@given(data=st.data())
def test_the_total_gradient_of_a_middle_level(shape: str, level: str, data: st.DataObject) -> None:
    """The middle level is off its solution; the closed form only needs the levels inside it at theirs."""
    estimator, seed = data.draw(exact("autograd")), data.draw(seeds)
    case = quadratic(shape, estimator, seed=seed, size=1, level=level)
    assert error(case, level) < 1e-8


@drawn(15)
@given(data=st.data())
def test_the_total_gradient_of_a_middle_level_is_zero_at_its_solution(data: st.DataObject) -> None:
    case = quadratic("nested", mlopt.Dense(), seed=data.draw(seeds))
    assert gradient_of(case.problem, level="y").norm() < 1e-12
    assert gradient_of(case.problem).norm() > 1e-3


@pytest.mark.parametrize(
    ("products", "tolerance"), [("autograd", 1e-8), ("forward", 1e-8), ("finite_difference", 1e-6)]
)
@drawn(15)
@given(data=st.data())
def test_logistic_regression_with_sample_weights(products: str, tolerance: float, data: st.DataObject) -> None:
    case = logistic_regression(
        data.draw(exact(products)),
        seed=data.draw(seeds),
        samples=data.draw(st.integers(4, 20)),
        features=data.draw(st.integers(1, 5)),
        ridge=data.draw(st.floats(0.05, 1.0)),
    )
    assert error(case) < tolerance


def test_all_products_are_known_here() -> None:
    from mlopt.estimators.products import PRODUCTS as KNOWN

    # Gauss-Newton is a different matrix, with separate tests.
    assert set(KNOWN) == {*PRODUCTS, "gauss_newton"}


def test_the_loss_is_reported_without_a_graph() -> None:
    case = logistic_regression(mlopt.Dense())
    result = mlopt.hypergradient(case.problem)
    batch, beta = case.problem["weights"].data[0], case.problem["regression"].module.value
    assert not result.loss.requires_grad
    # Two formulas: their rounding differs, and depends on the kernels of the processor.
    expected = torch.log1p(torch.exp(-(batch @ beta))).mean().item()
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
