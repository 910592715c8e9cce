"""The named estimators that take products with the Hessian: each a linear solver paired with a kind of products."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal, final

import attrs

from .. import linear
from ..errors import EstimatorError
from ..problem import Point
from ..validation import batches_or_none, boolean, is_whole, must_be, one_of
from .implicit import Implicit, require_compiled
from .kfac import KFACPreconditioner
from .products import PRODUCTS

__all__ = [
    "GMRES",
    "MINRES",
    "ConjugateGradient",
    "Dense",
    "LinearSolve",
    "Neumann",
    "Nystrom",
]


_count_or_all = must_be(lambda value: value == "all" or is_whole(value, 1), 'a whole number >= 1, or "all"')


def _require_data(estimator: Implicit, attribute: attrs.Attribute[Any], value: object) -> None:
    if value != 1 and estimator.curvature_data is None:
        raise EstimatorError(
            f"curvature_batches={value!r} without batches for the Hessian; give curvature_data, such as the level's own loader"
        )


@attrs.frozen(kw_only=True)
class _HessianProducts(Implicit):
    """The options of every estimator that takes products with the Hessian."""

    products: str = attrs.field(default="autograd", validator=one_of(*PRODUCTS))
    compile: bool = attrs.field(default=False, validator=[boolean, require_compiled])
    curvature_data: Iterable[Any] | None = attrs.field(default=None, validator=batches_or_none, repr=False)
    curvature_batches: int | Literal["all"] = attrs.field(
        default=1, validator=[_count_or_all, _require_data], repr=False
    )

    def __attrs_post_init__(self) -> None:
        _ = self.solver  # it checks its arguments


@final
@attrs.frozen(kw_only=True)
class LinearSolve(_HessianProducts):
    """Solve H q = v by any linear solver, such as one of your own.

    Args:
        solver: the linear solver.
        warm_start: inside `solve`, start from the q of the previous outer step.
        products: "autograd", "forward", "finite_difference" or, for a level without levels inside, "gauss_newton".
        compile: let torch.compile compile products with the loss; for "autograd" and "forward" products. The first call takes
            seconds to minutes. Compiled products are compared with live ones at first use and now and then.
        curvature_data: batches for H, of their own size; the level's batch if None.
        curvature_batches: number of them over which H is averaged in each pullback, or "all" for one epoch, in the memory of
            one. Batches count equally, whatever their size; regularizers count once.

    Raises:
        EstimatorError: `curvature_data` is given to a solver that takes no product with H.

    Example:
        >>> print(mlopt.LinearSolve(solver=mlopt.linear.MINRES(iterations=5), products="forward"))
        MINRES(iterations=5) with forward products
    """

    solver: linear.LinearSolver = attrs.field(
        validator=must_be(
            lambda value: isinstance(value, linear.LinearSolver), "a linear solver, such as mlopt.linear.MINRES()"
        )
    )
    warm_start: bool = attrs.field(default=False, validator=boolean)

    def __attrs_post_init__(self) -> None:
        if self.curvature_data is not None and isinstance(self.solver, linear.AssumedInverse):
            raise EstimatorError(
                f"curvature_data with {self.solver}, which takes no product with the Hessian; leave it out"
            )


@final
@attrs.frozen(kw_only=True)
class Neumann(_HessianProducts):
    """Approximate the inverse Hessian by a truncated Neumann series: q = alpha sum_{j=0}^{K} (I - alpha H)^j v.

    Args:
        iterations: K, the number of products with H.
        step_size: alpha, below 2 / lambda_max(H); if None, ten power iterations find a safe one, at ten products.
        rtol: stop when ||v - H q|| <= rtol ||v||.
        damping: added to the diagonal of H.
        warm_start: inside `solve`, start from the q of the previous outer step.
        products: as in `LinearSolve`.
        compile: as in `LinearSolve`.
        curvature_data: as in `LinearSolve`.
        curvature_batches: as in `LinearSolve`.

    Source: Lorraine et al. 2020 (arXiv 1911.02590). One iteration with a warm start is the q update of SOBA (Dagreou et al.
    2022, arXiv 2201.13409).

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Neumann(iterations=20)).problem
        >>> mlopt.hypergradient(problem).reports["y"].residual < 0.01
        True
    """

    iterations: int = 10
    step_size: float | None = None
    rtol: float = 0.0
    damping: float = 0.0
    warm_start: bool = attrs.field(default=False, validator=boolean)

    @cached_property
    def solver(self) -> linear.Neumann:
        return linear.Neumann(
            iterations=self.iterations, step_size=self.step_size, rtol=self.rtol, damping=self.damping
        )


@final
@attrs.frozen(kw_only=True)
class ConjugateGradient(_HessianProducts):
    """Solve H q = v by conjugate gradients, for a positive definite Hessian H.

    Args:
        iterations: the most iterations, one product with H each.
        rtol: stop when ||v - H q|| <= rtol ||v||.
        damping: added to the diagonal of H.
        preconditioner: `mlopt.KFACPreconditioner()`, or one that knows products only, such as
            `mlopt.linear.NystromPreconditioner(rank=5)`.
        negative_curvature: the reaction to a direction in which H is not positive definite: "stop", "raise" or "continue".
        warm_start: inside `solve`, start from the q of the previous outer step.
        history: inside `solve`, the number of pairs (d, H d) of earlier solves to keep, two vectors each; 0 for none. They start
            and precondition the solve of the next outer step (see `mlopt.linear.History`). While H changes slowly, the start
            meets a tolerance of about 1%, and its product with H, which includes the mixed product, is the only one.
        products: as in `LinearSolve`.
        compile: as in `LinearSolve`.
        curvature_data: as in `LinearSolve`.
        curvature_batches: as in `LinearSolve`.

    Source: Pedregosa 2016 (arXiv 1602.02355); Rajeswaran et al. 2019 (arXiv 1909.04630).

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> problem = logistic_regression(mlopt.ConjugateGradient(iterations=3)).problem
        >>> mlopt.hypergradient(problem).reports["regression"].converged
        True
    """

    iterations: int = 10
    rtol: float = 1e-10
    damping: float = 0.0
    preconditioner: linear.Preconditioner | None = None
    negative_curvature: str = "stop"
    warm_start: bool = attrs.field(default=False, validator=boolean)
    history: int = attrs.field(default=0, validator=must_be(lambda value: is_whole(value, 0), "a whole number >= 0"))

    @cached_property
    def solver(self) -> linear.ConjugateGradient:
        return linear.ConjugateGradient(
            iterations=self.iterations,
            rtol=self.rtol,
            damping=self.damping,
            preconditioner=self.preconditioner,
            negative_curvature=self.negative_curvature,
        )

    def solver_at(self, point: Point, level: str) -> linear.ConjugateGradient:
        if not isinstance(self.preconditioner, KFACPreconditioner):
            return self.solver
        return attrs.evolve(self.solver, preconditioner=self.preconditioner.at(point, level))


@final
@attrs.frozen(kw_only=True)
class MINRES(_HessianProducts):
    """Solve H q = v by minimal residuals, for a Hessian H that may be indefinite.

    Args:
        iterations: the most iterations, one product with H each.
        rtol: stop when ||v - H q|| <= rtol ||v||.
        damping: added to the diagonal of H.
        warm_start: inside `solve`, start from the q of the previous outer step.
        joint: solve the conditions of a nested level and of the levels inside it as one symmetric system, so that the products
            of nested levels add up and do not multiply. Not next to `damping` or `warm_start`.
        products: as in `LinearSolve`.
        compile: as in `LinearSolve`.
        curvature_data: as in `LinearSolve`.
        curvature_batches: as in `LinearSolve`.

    Source: Paige & Saunders 1975, SIAM Journal on Numerical Analysis 12(4).

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> problem = logistic_regression(mlopt.MINRES(iterations=3)).problem
        >>> mlopt.hypergradient(problem).reports["regression"].converged
        True
    """

    iterations: int = 10
    rtol: float = 1e-10
    damping: float = 0.0
    warm_start: bool = attrs.field(default=False, validator=boolean)
    joint: bool = attrs.field(default=False, validator=boolean)

    @cached_property
    def solver(self) -> linear.MINRES:
        return linear.MINRES(iterations=self.iterations, rtol=self.rtol, damping=self.damping)


@final
@attrs.frozen(kw_only=True)
class GMRES(_HessianProducts):
    """Solve F_x^T q = v by generalised minimal residuals, for a level with a residual F; or H q = v, for one with a loss.

    It needs no symmetric matrix. For a Hessian, `MINRES` takes the same steps in less memory. Where it stagnates on a residual,
    conjugate gradients on the normal equations F_x F_x^T q = F_x v take over, and the report says so.

    Args:
        iterations: the most iterations, one product each; and the most of the normal equations, two products each.
        restart: the number of iterations after which the basis, a vector for each, is dropped; None to keep it.
        rtol: stop when ||v - F_x^T q|| <= rtol ||v||.
        damping: added to the diagonal of the matrix.
        warm_start: inside `solve`, start from the q of the previous outer step.
        products: "autograd", "forward" or "finite_difference"; for a level with a loss also "gauss_newton".
        compile: as in `LinearSolve`.
        curvature_data: as in `LinearSolve`.

    Source: Saad & Schultz 1986, SIAM Journal on Scientific and Statistical Computing 7(3).

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [-1.0, 2.0]])
        >>> problem = mlopt.Problem(
        ...     mlopt.Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x().sum()),
        ...     mlopt.Level("x", mlopt.variables(torch.zeros(2)), residual=lambda x, batch, *, u: matrix @ x() - u(),
        ...                 estimator=mlopt.GMRES(iterations=2)),
        ... )
        >>> mlopt.hypergradient(problem).gradient["value"]  # matrix^-T (1, 1)
        tensor([0.6000, 0.2000])
    """

    iterations: int = 30
    restart: int | None = None
    rtol: float = 1e-10
    damping: float = 0.0
    warm_start: bool = attrs.field(default=False, validator=boolean)

    @cached_property
    def solver(self) -> linear.GMRES:
        return linear.GMRES(iterations=self.iterations, restart=self.restart, rtol=self.rtol, damping=self.damping)


@final
@attrs.frozen(kw_only=True)
class Nystrom(_HessianProducts):
    """Solve (H + damping I) q = v with a low-rank approximation of H, from products with random probes.

    Args:
        rank: the number of probes, one product with H each.
        damping: added to the diagonal of H; above zero.
        rtol: the solution counts as converged if ||v - (H + damping I) q|| <= rtol ||v||.
        seed: of the probes.
        products: as in `LinearSolve`.
        compile: as in `LinearSolve`.
        curvature_data: as in `LinearSolve`.
        curvature_batches: as in `LinearSolve`.

    Source: Hataya & Yamada 2023 (arXiv 2302.09726).

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Nystrom(rank=5, damping=0.1)).problem
        >>> mlopt.hypergradient(problem).reports["y"].converged
        True
    """

    rank: int = 10
    damping: float = 1e-2
    rtol: float = 1e-3
    seed: int = 0

    @cached_property
    def solver(self) -> linear.Nystrom:
        return linear.Nystrom(rank=self.rank, damping=self.damping, rtol=self.rtol, seed=self.seed)


@final
@attrs.frozen(kw_only=True)
class Dense(_HessianProducts):
    """Write H out and factorise it: exact, for levels of few variables; the oracle for other estimators.

    Args:
        damping: added to the diagonal of H.
        limit: the most variables of the level.
        products: as in `LinearSolve`.
        compile: as in `LinearSolve`.
        curvature_data: as in `LinearSolve`.
        curvature_batches: as in `LinearSolve`.

    Example:
        >>> from mlopt.testing import quadratic
        >>> case = quadratic("two", mlopt.Dense())
        >>> case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8
        True
    """

    damping: float = 0.0
    limit: int = 5_000

    @cached_property
    def solver(self) -> linear.Dense:
        return linear.Dense(damping=self.damping, limit=self.limit)
