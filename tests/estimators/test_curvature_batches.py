"""The Hessian as a mean over batches: equal to that of the whole, in the memory of one."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import mlopt
from mlopt.testing import same, snapshot, stateful_problem

KINDS = ("autograd", "forward", "finite_difference", "gauss_newton")
SOLVERS: dict[str, Any] = {
    "dense": mlopt.Dense,
    "conjugate_gradient": partial(mlopt.ConjugateGradient, iterations=5),
    "minres": partial(mlopt.MINRES, iterations=5),
    "neumann": partial(mlopt.Neumann, iterations=5, step_size=0.1),
    "nystrom": partial(mlopt.Nystrom, rank=3, damping=0.1),
}


def squared(module: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return (module(inputs).squeeze(1) - targets).square().mean()


def logistic(module: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return nn.functional.softplus(-targets.sign() * module(inputs).squeeze(1)).mean()


def ridge(module: nn.Module, *, decay: nn.Module) -> Tensor:
    return (decay().exp() * module.weight.square()).sum()


def outer(decay: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
    inputs, targets = batch
    return (model(inputs).squeeze(1) - targets).square().mean()


def problem_of(estimator: mlopt.Estimator, loss: Any = logistic, seed: int = 0) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(seed)
    held_out, training = (rows(count, generator) for count in (7, 5))
    torch.manual_seed(seed)
    level = partial(mlopt.Level, regularizer=ridge, data=[training], estimator=estimator)
    return mlopt.Problem(
        mlopt.Level("decay", mlopt.variables(torch.zeros(3)), outer, data=[held_out], optimizer=partial(SGD, lr=0.1)),
        level("model", nn.Linear(3, 1), loss, optimizer=partial(SGD, lr=0.01, weight_decay=0.3)),
    )


def rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, generator=generator), torch.randn(count, generator=generator)


def pieces(whole: tuple[Tensor, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.chunk(count) for tensor in whole), strict=True))


@pytest.mark.parametrize("products", KINDS)
@drawn(8)
@given(seed=seeds, solver=st.sampled_from(sorted(SOLVERS)), everything=st.booleans())
def test_a_loader_of_ten_batches_equals_the_whole(products: str, seed: int, solver: str, everything: bool) -> None:
    """Regularizer and decay count once. On a quadratic loss, differences are exact to rounding over their step."""
    whole = rows(40, torch.Generator().manual_seed(seed))
    loss = squared if products == "finite_difference" else logistic
    make = partial(SOLVERS[solver], products=products)
    expected = gradient_of(problem_of(make(curvature_data=[whole]), loss, seed), seed=1)
    loader = make(curvature_data=pieces(whole, 10), curvature_batches="all" if everything else 10)
    value = gradient_of(problem_of(loader, loss, seed), seed=1)
    assert distance(value, expected) < (1e-7 if products == "finite_difference" else 1e-10)
    first = make(curvature_data=pieces(whole, 10))
    assert distance(gradient_of(problem_of(first, loss, seed), seed=1), expected) > 1e-6


def test_batches_of_unequal_size_count_equally() -> None:
    """With d2 of the loss 2 A^T A / n on each batch, H is the mean of these, not that of the rows."""
    large, small = (rows(count, torch.Generator().manual_seed(count)) for count in (30, 2))
    problem = problem_of(mlopt.Dense(curvature_data=[large, small], curvature_batches=2), squared)
    model, (inputs, targets) = problem["model"].module, problem["decay"].data[0]

    def augmented(a: Tensor) -> Tensor:
        return torch.cat([a, torch.ones(len(a), 1)], 1)

    x = torch.cat([model.weight[0], model.bias]).detach()
    v = 2 * augmented(inputs).T @ (augmented(inputs) @ x - targets) / len(targets)
    hessian = sum(augmented(a).T @ augmented(a) / len(a) for a, _ in (large, small)) + 0.3 * torch.eye(4)
    hessian[:3, :3] += 2 * torch.eye(3)
    expected = -2 * x[:3] * torch.linalg.solve(hessian, v)[:3]
    assert distance(gradient_of(problem), expected) < 1e-10


def test_a_condition_is_a_mean_over_batches_too() -> None:
    """With F = (mean A) x - u, the mixed product is -I and u_bar = (mean A)^-T v."""
    matrices = torch.eye(3) + 0.3 * torch.randn(10, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def residual(x: nn.Module, batch: Tensor, *, u: nn.Module) -> Tensor:
        return batch.mean(0) @ x() - u()

    rule = mlopt.Dense(curvature_data=list(matrices), curvature_batches="all")
    x = mlopt.variables(torch.arange(1.0, 4.0))
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.zeros(3)), lambda u, batch, *, x: x().square().sum() / 2),
        mlopt.Level("x", x, residual=residual, data=[matrices[0]], estimator=rule),
    )
    expected = torch.linalg.solve(matrices.flatten(0, 1).mean(0).mT, x.value.detach())
    assert distance(gradient_of(problem), expected) < 1e-10


class Memory(TorchDispatchMode):
    """The largest number of bytes, of results of operations, that are alive at the same time; views have none."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in tensors(result)):
            if storage._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak(products: str, count: int) -> int:
    whole = rows(count * 50, torch.Generator().manual_seed(0))
    estimator = mlopt.ConjugateGradient(
        iterations=2, products=products, curvature_data=pieces(whole, count), curvature_batches="all"
    )
    problem = problem_of(estimator)
    mlopt.hypergradient(problem)  # verifies the products
    gc.collect()
    gc.disable()
    try:
        with Memory() as memory:
            mlopt.hypergradient(problem)
    finally:
        gc.enable()
    return memory.peak


@pytest.mark.parametrize("products", KINDS)
def test_the_memory_is_that_of_one_batch(products: str) -> None:
    few, many = peak(products, 2), peak(products, 20)
    assert many == few
    assert few > 50 * 8  # an activation of one batch was counted


def shuffled(count: int = 12, batch: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(count, torch.Generator().manual_seed(3))), batch, shuffle=True)


def test_the_products_of_a_pullback_see_the_same_batches_and_the_next_one_others() -> None:
    """Ten products at one point: without common batches, the solve of a system that changes would not converge."""
    estimator = mlopt.ConjugateGradient(iterations=10, curvature_data=shuffled(), curvature_batches=2)
    problem = problem_of(estimator)
    first, second = (mlopt.hypergradient(problem) for _ in range(2))
    assert first.reports["model"].residual < 1e-10
    assert first.reports["model"].converged
    assert distance(second.gradient["value"], first.gradient["value"]) > 1e-4


def test_the_dense_oracle_uses_the_same_batches() -> None:
    estimator = mlopt.ConjugateGradient(iterations=10, curvature_data=shuffled(), curvature_batches="all")
    assert mlopt.check_hypergradient(problem_of(estimator), tolerance=1e-8).error < 1e-8


@pytest.mark.parametrize("products", KINDS[:3])
def test_nothing_moves(products: str) -> None:
    rule = mlopt.Neumann(
        iterations=2, step_size=0.1, products=products, curvature_data=[None] * 3, curvature_batches="all"
    )
    before = snapshot(problem := stateful_problem(rule))
    mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))


@pytest.mark.parametrize("count", [2, "all"])
def test_a_resumed_run_takes_the_batches_of_one_that_was_not_stopped(count: Any, tmp_path: Any) -> None:
    def run(steps: int, folder: str, *, resume: bool = False) -> Tensor:
        estimator = mlopt.ConjugateGradient(iterations=3, curvature_data=shuffled(), curvature_batches=count)
        problem, saving = problem_of(estimator), mlopt.Checkpoints(tmp_path / folder, every=1)
        mlopt.solve(problem, steps, seed=0, checkpoint=saving, resume=resume, progress=False)
        return problem["decay"].module.value.detach()

    whole = run(5, "whole")
    run(2, "stopped")
    assert torch.equal(run(5, "stopped", resume=True), whole)


def test_an_epoch_begins_with_the_call_and_a_repeated_solve_sees_it_again() -> None:
    stream = mlopt.problem.Stream("a", list(range(5)), 0, torch.device("cpu"))
    assert (stream.take(2), stream.take("all"), stream.take(3)) == ((0, 1), (0, 1, 2, 3, 4), (0, 1, 2))
    with stream.recording() as recorded:
        taken = stream.take("all"), stream.take(2)
    with stream.replaying(recorded):
        assert (stream.take("all"), stream.take(2)) == taken
    other = mlopt.problem.Stream("a", list(range(5)), 0, torch.device("cpu"))
    other.load_state_dict(stream.state_dict())
    assert other.take(2) == stream.take(2)
    with pytest.raises(mlopt.ProblemError, match="hold no batch"):
        mlopt.problem.Stream("a", [], 0, torch.device("cpu")).take("all")


def test_wrong_counts_are_refused() -> None:
    for count in (0, 1.5, "some", True):
        with pytest.raises(mlopt.ArgumentError, match=r"curvature_batches=.* whole number >= 1, or \"all\""):
            mlopt.Dense(curvature_data=[None], curvature_batches=count)
    with pytest.raises(mlopt.EstimatorError, match=r"curvature_batches=3 without batches .* give curvature_data"):
        mlopt.Dense(curvature_batches=3)
