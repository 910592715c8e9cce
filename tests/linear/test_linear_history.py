"""Sequences of systems that change slowly, solved with a history; compared with dense matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import pytest
import torch
from core_cases import distance, drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mlopt
from mlopt import linear
from mlopt.linear.history import History
from mlopt.tensors import Tensors, flatten, unflatten

SHAPES = [(3, 4), (), (7,)]
SIZE = sum(math.prod(shape) for shape in SHAPES)
LIKE = tuple(torch.zeros(shape) for shape in SHAPES)
SOLVER = linear.ConjugateGradient(iterations=60, rtol=1e-2)


def sequence(seed: int, speed: float, condition: float, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positive definite matrices and right-hand sides that rotate and grow by about `speed` in each step."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    turn = torch.randn(SIZE, SIZE, generator=generator) / math.sqrt(SIZE)
    turn = torch.linalg.matrix_exp(speed * (turn - turn.T) / 2)
    eigenvalues = condition ** torch.linspace(0, 1, SIZE)
    right, other = torch.randn(2, SIZE, generator=generator)
    for step in range(steps):
        yield (basis * eigenvalues) @ basis.T, right + math.sin(speed * step) * other
        basis = turn @ basis
        eigenvalues = eigenvalues * (1 + speed / 4)


def solve(
    matrix: Tensor, right: Tensor, initial: History | None, solver: linear.LinearSolver = SOLVER
) -> linear.LinearSolution:
    """Solve a system, and hold the reported residual and products against the true ones."""
    count = 0

    def matvec(vector: Tensors) -> Tensors:
        nonlocal count
        count += 1
        return unflatten(matrix @ flatten(vector), vector)

    solution = solver.solve(matvec, unflatten(right, LIKE), initial=initial)
    damped = matrix + solver.damping * torch.eye(SIZE)
    true = float((right - damped @ flatten(solution.value)).norm() / right.norm())
    assert solution.residual == pytest.approx(true, rel=1e-6, abs=1e-12)
    assert solution.products == count
    assert solution.converged is (true <= solver.rtol)
    return solution


@drawn(25)
@given(
    seed=seeds,
    speed=st.floats(0, 1e-3),
    condition=st.floats(1, 300),
    limit=st.integers(10, 30),
    damping=st.sampled_from([0.0, 0.5]),
)
def test_residuals_hold_and_products_fall_to_one(
    seed: int, speed: float, condition: float, limit: int, damping: float
) -> None:
    solver = attrs.evolve(SOLVER, damping=damping)
    history, products = History(limit=limit), []
    for matrix, right in sequence(seed, speed, condition, 40):
        solution = solve(matrix, right, history, solver)
        assert solution.converged
        assert solution.history is not None
        history = solution.history
        products.append(solution.products)
    assert sum(products[20:]) / 20 <= 1.25


@drawn(15)
@given(seed=seeds, speed=st.floats(0.1, 2.0), limit=st.integers(1, 10))
def test_a_fast_sequence_costs_no_more_than_the_steps_from_zero(seed: int, speed: float, limit: int) -> None:
    """A start that is worse than zero is dropped; the only price is its product."""
    history = History(limit=limit)
    for matrix, right in sequence(seed, speed, 100.0, 12):
        solution = solve(matrix, right, history)
        assert solution.converged
        assert solution.products <= 1.5 * solve(matrix, right, None).products + 3
        assert solution.history is not None
        history = solution.history


def matrix_of(history: History) -> Tensor:
    return torch.stack([history.precondition((unit,))[0] for unit in torch.eye(SIZE)], dim=1)


@drawn(15)
@given(seed=seeds, limit=st.integers(1, 25), speed=st.sampled_from([0.0, 0.05]))
def test_the_approximate_inverse_is_that_of_block_bfgs(seed: int, limit: int, speed: float) -> None:
    """P = D G^-1 D^T + c (I - D G^-1 Y^T) (I - Y G^-1 D^T), for G = (D^T Y + Y^T D) / 2 of the pairs kept."""
    history = History(limit=limit)
    for matrix, right in sequence(seed, speed, 50.0, 3):
        following = solve(matrix, right, history, linear.ConjugateGradient(iterations=9, rtol=1e-3)).history
        assert following is not None
        history = following
    d, y = history.directions[0].T, history.images[0].T
    inverse = torch.linalg.inv((d.T @ y + y.T @ d) / 2)
    rest = torch.eye(SIZE) - d @ inverse @ y.T
    expected = d @ inverse @ d.T + rest @ rest.T / y[:, 0].square().sum()
    assert d.shape[1] <= limit
    got = matrix_of(history)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh((got + got.T) / 2).min() > 0
    if speed == 0.0:
        assert torch.allclose(got @ y, d, rtol=1e-7, atol=1e-9)
        assert torch.allclose(matrix @ d, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("curvature", [-1.0, 0.0, math.nan, math.inf])
def test_a_pair_without_positive_finite_curvature_is_not_kept(curvature: float) -> None:
    units = torch.eye(SIZE)
    pairs = [((units[0],), (2.0 * units[0],)), ((units[1],), (curvature * units[1],)), ((units[2],), (4.0 * units[2],))]
    history = History(limit=5).after(None, (units[0],), (units[0],), (units[0],), pairs)
    (directions,), (images,) = history.directions, history.images
    torch.testing.assert_close(directions, torch.stack([units[2] / 2, units[0] / math.sqrt(2)]))
    torch.testing.assert_close(images, torch.stack([units[2] * 2, units[0] * math.sqrt(2)]))


def test_at_negative_curvature_the_history_keeps_the_directions_before_it() -> None:
    diagonal = torch.tensor([-1.0, *torch.linspace(1, 3, SIZE - 1)])
    right = torch.cat([torch.tensor([1e-3]), torch.ones(SIZE - 1)])
    solution = linear.ConjugateGradient(iterations=40, rtol=1e-12).solve(
        lambda v: unflatten(diagonal * flatten(v), v), unflatten(right, LIKE), initial=History()
    )
    assert "negative curvature" in solution.remark
    assert solution.history is not None
    d, y = solution.history.directions[0], solution.history.images[0]
    assert 0 < len(d) <= solution.iterations
    assert (d * y).sum(1).min() > 0


def test_the_newest_pairs_are_kept() -> None:
    units = torch.eye(SIZE)
    pairs = [((unit,), (3.0 * unit,)) for unit in units[:6]]
    history = History(limit=4).after(None, (units[0],), (units[0],), (units[0],), pairs)
    assert history.directions[0].argmax(1).tolist() == [5, 4, 3, 2]


@pytest.mark.parametrize("limit", [1, 20])
def test_a_reversed_right_hand_side_starts_at_zero(limit: int) -> None:
    (matrix, right), *_ = sequence(0, 0.0, 50.0, 1)
    history = solve(matrix, right, History(limit=limit)).history
    assert history is not None
    # Without pairs, the start for the opposite right-hand side is the solution, whose residual is twice that of zero.
    bare = attrs.evolve(history, directions=(), images=())
    solution, cold = solve(matrix, -right, bare), solve(matrix, -right, None)
    assert solution.products == cold.products + 1
    assert all(map(torch.equal, solution.value, cold.value))


@pytest.mark.parametrize("scale", [0.0, 1e-200])
def test_a_right_hand_side_out_of_range_leaves_no_history(scale: float) -> None:
    (matrix, right), *_ = sequence(0, 0.0, 50.0, 1)
    history = solve(matrix, right, History()).history
    solution = SOLVER.solve(
        lambda v: unflatten(matrix @ flatten(v), v), unflatten(scale * right, LIKE), initial=history
    )
    assert solution.history is None
    value = flatten(solution.value)
    assert distance(matrix @ (value / scale), right) <= 1e-2 if scale else not value.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_dtypes_keep_pairs_in_single_precision(dtype: torch.dtype) -> None:
    history, products = History(limit=20), []
    rtol = 1e-2 if dtype == torch.float32 else 5e-2
    solver = linear.ConjugateGradient(iterations=60, rtol=rtol)
    for matrix, right in sequence(3, 1e-3, 20.0, 30):
        matrix, right = matrix.float(), right.float()

        def matvec(vector: Tensors, matrix: Tensor = matrix) -> Tensors:
            return tuple(x.to(dtype) for x in unflatten(matrix @ flatten(vector).float(), vector))

        like = tuple(x.to(dtype) for x in LIKE)
        solution = solver.solve(matvec, unflatten(right.to(dtype), like), initial=history)
        assert solution.history is not None
        history = solution.history
        assert {x.dtype for x in solution.value} == {dtype}
        assert {x.dtype for x in (*history.directions, *history.images)} == {torch.float32}
        assert distance(matrix @ flatten(solution.value).float(), right.to(dtype).float()) <= 1.5 * rtol
        products.append(solution.products)
    assert sum(products[10:]) / 20 <= 1.5


def test_vectors_of_two_dtypes_are_kept_apart() -> None:
    """Pairs of a level whose variables have several dtypes: the same solutions as in one."""
    single, mixed = History(), History()
    like = tuple(x.double() if k else x.float() for k, x in enumerate(LIKE))
    for matrix, right in sequence(5, 1e-3, 20.0, 10):
        first = solve(matrix, right, single)

        def matvec(vector: Tensors, matrix: Tensor = matrix) -> Tensors:
            wide = tuple(x.double() for x in vector)
            return tuple(p.to(x) for p, x in zip(unflatten(matrix @ flatten(wide), wide), vector, strict=True))

        parts = tuple(x.to(y) for x, y in zip(unflatten(right, LIKE), like, strict=True))
        second = SOLVER.solve(matvec, parts, initial=mixed)
        assert first.history is not None
        assert second.history is not None
        single, mixed = first.history, second.history
        assert [x.dtype for x in mixed.directions] == [torch.float32, torch.float64, torch.float64]
        assert second.products == first.products
        assert distance(torch.cat([x.reshape(-1).double() for x in second.value]), flatten(first.value)) < 1e-5


def test_variables_at_a_bound_stay_out_of_the_solve() -> None:
    """The restricted history solves the restricted systems, also if the mask changes."""
    history = History()
    for step, (matrix, right) in enumerate(sequence(7, 1e-3, 20.0, 12)):
        free = (torch.arange(SIZE) % 5 != (step // 6)).double()
        restricted = free[:, None] * matrix * free + torch.diag(1 - free)
        solution = solve(restricted, free * right, history.restricted(unflatten(free, LIKE)))
        assert not (flatten(solution.value) * (1 - free)).any()
        assert solution.converged
        assert solution.history is not None
        history = solution.history


def test_solvers_without_a_history_refuse_one() -> None:
    for solver in (linear.MINRES(), linear.Neumann(), linear.GMRES()):
        with pytest.raises(mlopt.ArgumentError, match="keeps no history"):
            solver.solve(lambda v: v, (torch.ones(2),), initial=History())
