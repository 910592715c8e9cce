"""K-FAC against dense algebra: the factors by loops over samples, and one iteration where the Kronecker product is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of, point_of
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import mlopt
from mlopt.tensors import flatten, unflatten

RIDGE, DAMPING = 0.05, 0.1
ROWS = 6


class Pooled(nn.Module):
    """A linear layer at every position, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(input=inputs).mean(1)


class Twice(nn.Module):
    """A linear layer that is called twice, with and without tanh before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(inputs)))


class Aside(nn.Module):
    """A linear layer, and another one whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.aside = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.aside(inputs)
        return self.layer(inputs)


def squares(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    # Weights that shift the targets leave the Hessian a Kronecker product.
    return (outputs - weights.reshape(-1, *[1] * (outputs.dim() - 1)) * targets).square().mean()


def entropy(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (weights * cross_entropy(outputs, targets.argmax(1), reduction="none")).mean()


def weights_of(count: int) -> Tensor:
    return torch.linspace(0.5, 1.5, count, dtype=torch.float64)


def targets_of(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def problem_of(
    module: nn.Module,
    inputs: Tensor,
    estimator: mlopt.Estimator,
    loss: Any = squares,
    ridge: str = "loss",
    **level: Any,
) -> mlopt.Problem:
    """Return weights of samples over a module, with a ridge in the loss, in a regularizer or in the optimiser."""
    targets = targets_of(module(inputs).shape)

    def squared_size(x: nn.Module) -> Tensor:
        return 0.5 * RIDGE * sum(p.square().sum() for p in x.parameters())

    def inner(x: nn.Module, batch: Any, *, outer: nn.Module) -> Tensor:
        value = loss(x(inputs if batch is None else batch), targets, outer())
        return value + squared_size(x) if ridge == "loss" else value

    def outer(u: nn.Module, batch: Any, *, inner: nn.Module) -> Tensor:
        return inner(inputs).square().mean() + inner(inputs[:2]).sum()

    if ridge == "regularizer":
        level["regularizer"] = squared_size
    if ridge == "decay":
        level["optimizer"] = partial(SGD, lr=0.1, weight_decay=RIDGE)
    return mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(weights_of(len(inputs))), outer),
        mlopt.Level("inner", module, inner, estimator=estimator, **level),
    )


def matrix_of(problem: mlopt.Problem, damping: float = DAMPING, **options: Any) -> Tensor:
    """Return the matrix P of K-FAC on the inner level, the damping included."""
    point = point_of(problem)
    like = tuple(x.detach() for x in point.values["inner"])
    inverse, spent = mlopt.KFACPreconditioner(**options).at(point, "inner").prepare(lambda v: v, like, damping)
    assert spent == 0
    columns = [flatten(inverse(unflatten(row.to(like[0]), like))) for row in torch.eye(sum(x.numel() for x in like))]
    return torch.linalg.inv(torch.stack(columns, dim=1))


def exact_matrix(module: nn.Module, inputs: Tensor, loss: Any = squares, **options: Any) -> Tensor:
    return matrix_of(problem_of(module, inputs, mlopt.ConjugateGradient(), loss), draws=None, **options)


def places(module: nn.Module, layer: nn.Module) -> Tensor:
    """Return the places of a layer's weights and bias in a vector over a module, by rows of [weight, bias]."""
    start, own = 0, {}
    for parameter in module.parameters():
        own[parameter] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    parts = [own[p] for p in layer.parameters() if p in own]
    return torch.cat([x.reshape(len(x), -1) for x in parts], dim=1).reshape(-1)


def curvature_of(loss: Any, outputs: Tensor) -> Tensor:
    """Return the second derivative of a loss by each row of the outputs (rows, columns, columns), one by one."""
    targets, weights = targets_of(outputs.shape), weights_of(len(outputs))
    wide = outputs.detach().reshape(-1, outputs.shape[-1])

    def of_row(row: Tensor, k: int) -> Tensor:
        return loss(torch.cat([wide[:k], row[None], wide[k + 1 :]]).reshape(outputs.shape), targets, weights)

    return torch.stack([hessian(partial(of_row, k=k), wide[k]) for k in range(len(wide))])


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    dense = torch.kron(left, right)
    return dense + (RIDGE + DAMPING) * torch.eye(len(dense), dtype=torch.float64)


def with_one(vector: Tensor) -> Tensor:
    return torch.cat([vector, vector.new_ones(1)])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def made(module: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return module().double()


@pytest.mark.parametrize(
    ("module", "shape"), [(lambda: nn.Linear(4, 3), (20, 4)), (Pooled, (20, 5, 4))], ids=["linear", "pooled"]
)
def test_exact_kronecker_product_solves_in_one_iteration(module, shape):
    network, inputs = made(module), normal(*shape)
    preconditioner = mlopt.KFACPreconditioner(draws=None)
    estimator = mlopt.ConjugateGradient(iterations=1, preconditioner=preconditioner)
    result = mlopt.hypergradient(problem_of(network, inputs, estimator))
    exact = mlopt.hypergradient(problem_of(network, inputs, mlopt.Dense()))
    assert result.reports["inner"].residual < 1e-10
    torch.testing.assert_close(result.gradient["value"], exact.gradient["value"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ridge", ["loss", "regularizer", "decay"])
def test_factors_of_a_network_by_loops_over_weighted_samples(ridge):
    network, inputs = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), normal(ROWS, 4)
    own = matrix_of(problem_of(network, inputs, mlopt.ConjugateGradient(), entropy, ridge), draws=None)
    first, _, last = network
    bends = curvature_of(entropy, network(inputs))
    lefts = {first: torch.zeros(5, 5).double(), last: torch.zeros(3, 3).double()}
    rights = {first: torch.zeros(5, 5).double(), last: torch.zeros(6, 6).double()}
    for sample, bend in zip(inputs, bends, strict=True):
        hidden = first(sample).detach()
        slope = jacobian(lambda h: last(torch.tanh(h)), hidden)
        lefts[first] += slope.T @ bend @ slope
        lefts[last] += bend
        for layer, given in ((first, sample), (last, torch.tanh(hidden))):
            rights[layer] += with_one(given).outer(with_one(given)) / ROWS
    expected = torch.zeros_like(own)
    for layer in (first, last):
        k = places(network, layer)
        expected[k[:, None], k] = kronecker(lefts[layer], rights[layer])
    torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10)


def test_layer_that_is_used_twice():
    network, inputs = made(Twice), normal(ROWS, 3)
    left, right = torch.zeros(3, 3).double(), torch.zeros(4, 4).double()
    for sample, bend in zip(inputs, curvature_of(squares, network(inputs)), strict=True):
        hidden = network.layer(sample).detach()
        slope = jacobian(lambda h: network.layer(torch.tanh(h)), hidden)
        left += bend + slope.T @ bend @ slope
        for given in (with_one(sample), with_one(torch.tanh(hidden))):
            right += given.outer(given) / (2 * ROWS)
    k = places(network, network.layer)
    own = exact_matrix(network, inputs)[k[:, None], k]
    torch.testing.assert_close(own, kronecker(left, right), rtol=1e-8, atol=1e-10)


def test_outputs_with_a_row_for_each_position():
    network, inputs = made(lambda: nn.Linear(4, 3)), normal(ROWS, 2, 4)
    wide = torch.cat([inputs.reshape(-1, 4), torch.ones(2 * ROWS, 1).double()], dim=1)
    left = curvature_of(squares, network(inputs)).sum(0)
    k = places(network, network)
    expected = kronecker(left, wide.T @ wide / (2 * ROWS))
    torch.testing.assert_close(exact_matrix(network, inputs)[k[:, None], k], expected, rtol=1e-8, atol=1e-10)


def test_embedding_counts_its_rows():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens).mean(1)

    tokens = torch.tensor([[0, 1], [1, 1], [3, 0], [4, 4], [1, 3], [0, 0]])
    network = made(Words)
    # Each of the two positions has half of the derivative by the output.
    left = sum(2 * bend / 4 for bend in curvature_of(squares, network(tokens)))
    shares = torch.bincount(tokens.reshape(-1), minlength=5).double() / tokens.numel()
    expected = kronecker(shares.diag(), left)
    torch.testing.assert_close(exact_matrix(network, tokens), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True], ids=["norm", "bias"])
def test_other_variables_have_the_mean_of_the_diagonal(frozen):
    """LayerNorm, or the bias beside a frozen weight; for one sample, random signs of rows make no difference."""
    network = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    inputs, (first, *_) = normal(1, 4), network
    first.weight.requires_grad_(not frozen)
    own = exact_matrix(network, inputs, entropy)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in network.parameters() if p.requires_grad]
    (bend,) = curvature_of(entropy, network(inputs))
    for name in ["1.weight", "1.bias"] + ["0.bias"] * frozen:
        value = network.get_parameter(name).detach()
        slope = jacobian(lambda x, n=name: torch.func.functional_call(network, {n: x}, inputs)[0], value)
        mean = (slope.T @ bend @ slope).diag().mean()
        at = sum(sizes[: names.index(name)])
        block = own[at : at + value.numel()]
        expected = torch.zeros_like(block)
        expected[:, at : at + value.numel()] = (mean + RIDGE + DAMPING) * torch.eye(value.numel()).double()
        torch.testing.assert_close(block, expected, rtol=1e-8, atol=1e-10)


def test_layer_whose_output_is_not_used_has_the_ridge_alone():
    network, inputs = made(Aside), normal(ROWS, 4)
    own, k = exact_matrix(network, inputs), places(network, network.aside)
    torch.testing.assert_close(own[k[:, None], k], (RIDGE + DAMPING) * torch.eye(10).double(), rtol=1e-8, atol=1e-10)
    plain = nn.Linear(4, 3).double()
    plain.load_state_dict(network.layer.state_dict())
    torch.testing.assert_close(own[:15, :15], exact_matrix(plain, inputs), rtol=1e-8, atol=1e-10)


def test_convolution_counts_as_other_variables():
    network = made(lambda: nn.Sequential(nn.Conv1d(2, 2, 3, bias=False), nn.Flatten(), nn.Linear(4, 3)))
    block = exact_matrix(network, normal(ROWS, 2, 4))[:12, :12]
    torch.testing.assert_close(block, block[0, 0] * torch.eye(12).double(), rtol=1e-8, atol=1e-10)
    assert block[0, 0] > RIDGE + DAMPING


def test_draws_are_fixed_by_the_seed_and_right_on_average():
    problem = problem_of(made(lambda: nn.Linear(4, 3)), normal(ROWS, 4), mlopt.ConjugateGradient(), entropy)
    exact = matrix_of(problem, draws=None)
    assert torch.equal(matrix_of(problem), matrix_of(problem))
    assert distance(matrix_of(problem, seed=1), matrix_of(problem)) > 0.01
    means = {draws: sum(matrix_of(problem, draws=draws, seed=s) for s in range(100)) / 100 for draws in (1, 4)}
    assert distance(means[1], exact) < 0.05
    assert distance(means[4], exact) < 0.025


def test_factors_are_those_of_the_first_curvature_batch():
    """The product is exact there, so one iteration solves the system of that batch."""
    preconditioner = mlopt.KFACPreconditioner(draws=None)
    batches = [normal(2, ROWS, 4)[k] for k in range(2)]
    estimator = mlopt.ConjugateGradient(iterations=1, preconditioner=preconditioner, curvature_data=batches[1:])
    problem = problem_of(made(lambda: nn.Linear(4, 3)), 0.3 * batches[0], estimator, data=[batches[0]])
    assert mlopt.hypergradient(problem).reports["inner"].residual < 1e-10


class Projected(SGD):
    """Gradient descent on variables that are not negative."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for variable in group["params"]:
                variable.data.clamp_(min=0.0)


def test_variables_held_at_a_bound():
    def build(estimator: mlopt.Estimator) -> mlopt.Problem:
        network = made(lambda: nn.Linear(4, 3))
        network.weight.data.clamp_(min=0.0)
        return problem_of(network, normal(ROWS, 4), estimator, entropy, optimizer=partial(Projected, lr=0.1))

    rule = mlopt.ConjugateGradient(iterations=60, rtol=1e-12, preconditioner=mlopt.KFACPreconditioner())
    held = gradient_of(build(mlopt.Dense()))
    free = gradient_of(problem_of(made(lambda: nn.Linear(4, 3)), normal(ROWS, 4), mlopt.Dense(), entropy))
    assert distance(held, free) > 0.01
    assert distance(gradient_of(build(rule)), held) < 1e-9


@pytest.mark.parametrize(("products", "tolerance"), [("autograd", 0.05), ("finite_difference", 0.2)])
def test_half_precision(products, tolerance):
    exact, inputs = made(lambda: nn.Linear(4, 3)).bfloat16(), normal(ROWS, 4).bfloat16()

    def solved(dtype: torch.dtype, **options: Any) -> Tensor:
        rule = mlopt.ConjugateGradient(iterations=10, damping=0.5, products=products, **options)
        return gradient_of(problem_of(exact.to(dtype), inputs.to(dtype), rule))

    reference = solved(torch.float64)
    half = solved(torch.bfloat16, preconditioner=mlopt.KFACPreconditioner(draws=None))
    assert distance(half, reference) < tolerance


def test_preconditioner_saves_iterations_where_inputs_are_ill_conditioned():
    inputs = normal(100, 12) * torch.logspace(0, 1.5, 12, dtype=torch.float64)
    counts = []
    for preconditioner in (None, mlopt.KFACPreconditioner()):
        rule = mlopt.ConjugateGradient(iterations=500, rtol=1e-6, preconditioner=preconditioner)
        problem = problem_of(made(lambda: nn.Linear(12, 3)), inputs, rule)
        report = mlopt.hypergradient(problem).reports["inner"]
        assert report.converged
        counts.append(report.iterations)
    assert counts[1] < 0.5 * counts[0]
