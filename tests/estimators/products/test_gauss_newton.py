"""Gauss-Newton products, against J^T (d2 loss / d outputs2) J written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy

import mlopt
from mlopt.tensors import flatten, unflatten
from mlopt.testing import logistic_regression, quadratic

SAMPLES, CLASSES = 7, 3


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def cleaning(seed: int, estimator: mlopt.Estimator, loss: Callable[..., Tensor] | None = None) -> mlopt.Problem:
    """Return sample weights over a small network, with a decay that the loss reads off the parameters."""
    model = network(seed)
    inputs, labels = torch.randn(SAMPLES, 2), torch.randint(CLASSES, (SAMPLES,))

    def training(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        losses = cross_entropy(module(inputs), labels, reduction="none")
        return (weights().sigmoid() * losses).mean() + 0.05 * sum(p.square().sum() for p in module.parameters())

    def validation(weights: nn.Module, batch: Any, *, classifier: nn.Module) -> Tensor:
        return cross_entropy(classifier(inputs.flip(0)), labels)

    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.randn(SAMPLES)), validation),
        mlopt.Level("classifier", model, loss or training, estimator=estimator),
    )


def written_out(problem: mlopt.Problem) -> Tensor:
    """Return the matrix, from Jacobians of torch.func."""
    level = problem["classifier"]
    shapes = level.parameters
    inputs, labels = (cell.cell_contents for cell in _cells(level.loss, "inputs", "labels"))
    weights = problem["weights"].module.value.detach().sigmoid()

    def outputs(flat: Tensor) -> Tensor:
        named = dict(zip(level.parameter_names, unflatten(flat, shapes), strict=True))
        return functional_call(level.module, named, (inputs,)).reshape(-1)

    def loss(flat: Tensor) -> Tensor:
        return (weights * cross_entropy(flat.reshape(SAMPLES, CLASSES), labels, reduction="none")).mean()

    at = flatten([p.detach() for p in shapes])
    jacobian = jacrev(outputs)(at)
    return jacobian.T @ hessian(loss)(outputs(at)) @ jacobian + 0.1 * torch.eye(len(at))


def _cells(function: Any, *names: str) -> list[Any]:
    return [function.__closure__[function.__code__.co_freevars.index(name)] for name in names]


@drawn(6)
@given(seed=seeds)
def test_the_product_is_that_of_the_matrix(seed: int) -> None:
    problem = cleaning(seed, mlopt.Dense(products="gauss_newton"))
    matrix = written_out(problem)
    rule = problem["classifier"].estimator.linearize(point_of(problem), "classifier")
    vector = torch.randn(len(matrix))
    parameters = problem["classifier"].parameters
    for _ in range(2):  # the second one walks the graphs that the first one left
        product = rule.product({"classifier": unflatten(vector, parameters)}, ["classifier"])["classifier"]
        assert distance(flatten(product), matrix @ vector) < 1e-12


@drawn(4)
@given(seed=seeds)
def test_the_hypergradient_has_the_matrix_in_place_of_the_hessian_and_the_exact_mixed_product(seed: int) -> None:
    gradient = gradient_of(cleaning(seed, mlopt.Dense(products="gauss_newton")))
    problem = cleaning(seed, mlopt.Dense())
    exact = problem["classifier"].estimator.linearize(point_of(problem), "classifier")
    parameters = problem["classifier"].parameters
    outer = problem["weights"].loss(problem["weights"].module, None, classifier=problem["classifier"].module)
    cotangent = flatten(torch.autograd.grad(outer, parameters))
    q = torch.linalg.solve(written_out(problem), cotangent)
    mixed = exact.product({"classifier": unflatten(q, parameters)}, ["weights"])["weights"]
    assert distance(gradient, -flatten(mixed)) < 1e-9
    assert distance(gradient, gradient_of(problem)) > 1e-3


@drawn(6)
@given(seed=seeds)
def test_it_is_positive_where_the_hessian_is_not(seed: int) -> None:
    """Conjugate gradients then run to the end; with the decay, the least curvature is that of the decay."""
    gauss = mlopt.hypergradient(cleaning(seed, mlopt.Dense(products="gauss_newton"))).reports["classifier"]
    assert gauss.curvature[0] > 0.1 - 1e-9
    assert gauss.remarks == ()


def test_a_linear_model_has_no_curvature_of_its_own() -> None:
    case = logistic_regression(mlopt.ConjugateGradient(iterations=50, products="gauss_newton"))
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-12


def test_outputs_in_a_structure_changed_in_place_and_used_twice() -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, CLASSES)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.layer(x), "inputs": x, "name": "twofold"}

    torch.manual_seed(0)
    module, inputs, labels = Twofold(), torch.randn(SAMPLES, 2), torch.randint(CLASSES, (SAMPLES,))

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        one, two = module(inputs), module(inputs.flip(0))
        assert one["name"] == "twofold"
        logits = one["logits"].mul_(2.0)
        return (weights() * cross_entropy(logits + two["logits"], labels, reduction="none")).mean() + (
            module.layer.weight.square().sum() + module.layer.bias.square().sum()
        )

    def outer(weights: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
        return model.layer(inputs).square().mean()

    def problem(products: str) -> mlopt.Problem:
        return mlopt.Problem(
            mlopt.Level("weights", mlopt.variables(torch.ones(SAMPLES)), outer),
            mlopt.Level("model", module, loss, estimator=mlopt.Dense(products=products)),
        )

    # The outputs are linear in the variables, so that the matrix is the Hessian.
    assert distance(gradient_of(problem("gauss_newton")), gradient_of(problem("autograd"))) < 1e-12


def test_a_loss_that_does_not_call_the_module_is_refused() -> None:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return module[0].weight.square().sum() * weights().sum()

    with pytest.raises(mlopt.EstimatorError, match=r"level 'classifier': .* its loss never calls it"):
        mlopt.hypergradient(cleaning(0, mlopt.Dense(products="gauss_newton"), loss))


def test_outputs_that_are_fed_back_are_refused() -> None:
    recurrent = nn.Linear(2, 2)

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return module(module(weights())).square().sum()

    problem = mlopt.Problem(
        mlopt.Level(
            "weights", mlopt.variables(torch.ones(1, 2)), lambda weights, batch, *, model: model.weight.square().sum()
        ),
        mlopt.Level("model", recurrent, loss, estimator=mlopt.Dense(products="gauss_newton")),
    )
    with pytest.raises(mlopt.EstimatorError, match="feeds outputs of Linear back into it"):
        mlopt.hypergradient(problem)


def test_a_level_with_levels_inside_is_refused() -> None:
    estimators = {"y": mlopt.Dense(products="gauss_newton"), "z": mlopt.Dense()}
    with pytest.raises(mlopt.EstimatorError, match=r"level 'y': products='gauss_newton' .* 'z' lies inside it"):
        mlopt.hypergradient(quadratic("nested", estimators).problem)


def test_a_level_inside_another_may_have_it() -> None:
    """A quadratic's module returns its variables, so that the matrix is the Hessian."""
    case = quadratic("nested", {"y": mlopt.Dense(), "z": mlopt.Dense(products="gauss_newton")})
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-10
