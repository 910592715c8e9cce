"""K-FAC against dense algebra: where the Kronecker product is exact, one iteration solves the system."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlopt

RIDGE = 0.05


class Pooled(nn.Module):
    """A linear layer at every position, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).mean(1)


def _problem(module: nn.Module, inputs: Tensor, loss: object, estimator: mlopt.Estimator) -> mlopt.Problem:
    torch.manual_seed(1)
    weights = mlopt.variables(torch.rand(len(inputs), dtype=torch.float64) + 0.5)
    targets = torch.randn(len(inputs), 3, dtype=torch.float64)

    def inner(x, batch, *, outer):
        ridge = sum(p.square().sum() for p in x.parameters())
        return loss(x(inputs), targets, outer()) + 0.5 * RIDGE * ridge

    def outer(u, batch, *, inner):
        return inner(inputs).square().mean() + inner(inputs[:2]).sum()

    return mlopt.Problem(mlopt.Level("outer", weights, outer), mlopt.Level("inner", module, inner, estimator=estimator))


def _squares(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    # Weights that shift the targets leave the Hessian a Kronecker product.
    return (outputs - weights[:, None] * targets).square().mean()


def _entropy(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (weights * cross_entropy(outputs, targets.argmax(1), reduction="none")).mean()


@pytest.mark.parametrize(
    ("module", "shape"), [(lambda: nn.Linear(4, 3), (20, 4)), (Pooled, (20, 5, 4))], ids=["linear", "pooled"]
)
def test_exact_kronecker_product_solves_in_one_iteration(module, shape):
    torch.manual_seed(0)
    network, inputs = module().double(), torch.randn(*shape, dtype=torch.float64)
    preconditioner = mlopt.KFACPreconditioner(draws=None)
    estimator = mlopt.ConjugateGradient(iterations=1, preconditioner=preconditioner)
    result = mlopt.hypergradient(_problem(network, inputs, _squares, estimator))
    exact = mlopt.hypergradient(_problem(network, inputs, _squares, mlopt.Dense()))
    assert result.reports["inner"].residual < 1e-10
    torch.testing.assert_close(result.gradient["value"], exact.gradient["value"], rtol=1e-9, atol=1e-12)


def test_inverse_of_dense_kronecker_product_with_weighted_samples():
    torch.manual_seed(0)
    network, inputs = nn.Linear(4, 3).double(), torch.randn(20, 4, dtype=torch.float64)
    problem = _problem(network, inputs, _entropy, mlopt.Dense())
    weights = problem["outer"].module.value.detach()
    seen = []

    class Spy(mlopt.linear.LinearSolver):
        damping = 0.0

        def _solve(self, matvec, rhs, size, initial):
            return mlopt.linear.LinearSolution(value=seen[0].prepare(matvec, rhs, 0.1)[0](rhs))

    class Estimator(mlopt.Implicit):
        products = "autograd"
        solver = Spy()

        def solver_at(self, point, level):
            seen[:] = [mlopt.KFACPreconditioner(draws=None).at(point, level)]
            return self.solver

    solved = mlopt.hypergradient(_problem(network, inputs, _entropy, Estimator()))

    wide = torch.cat([inputs, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    probabilities = network(inputs).softmax(1).detach()
    left = sum(w / 20 * (p.diag() - p.outer(p)) for w, p in zip(weights, probabilities, strict=True))
    dense = torch.kron(left, wide.T @ wide / 20) + (RIDGE + 0.1) * torch.eye(15, dtype=torch.float64)

    variables = list(network.parameters())
    cotangent = torch.autograd.grad(network(inputs).square().mean() + network(inputs[:2]).sum(), variables)
    q = torch.linalg.solve(dense, torch.cat([cotangent[0], cotangent[1][:, None]], dim=1).reshape(-1)).reshape(3, 5)
    torch.manual_seed(1)
    torch.rand(20, dtype=torch.float64)
    labels = torch.randn(20, 3, dtype=torch.float64).argmax(1)
    residuals = (probabilities - nn.functional.one_hot(labels, 3)) / 20
    expected = -(residuals * (wide @ q.T)).sum(1)
    torch.testing.assert_close(solved.gradient["value"], expected, rtol=1e-9, atol=1e-12)


def test_bare_solver_refuses_kfac():
    solver = mlopt.linear.ConjugateGradient(preconditioner=mlopt.KFACPreconditioner())
    with pytest.raises(mlopt.EstimatorError, match="pass it to the estimator"):
        solver.solve(lambda v: v, (torch.ones(2),))
