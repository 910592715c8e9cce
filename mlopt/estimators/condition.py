"""The derivative of a solution that a residual defines: nonsymmetric systems with transposed products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import attrs

from ..errors import NonFiniteError
from ..linear import AssumedInverse, LinearSolution, LinearSolver, Matrix, MatVec
from ..problem import Block, Bounds, FixedPoint, Linearization, Objective, Point, Report, ResidualTerm, Term, Vectors
from ..tensors import Tensors, add, norm, scale, zeros_like
from .products import MeanSecondDerivatives, Product, SecondDerivatives, on_batches
from .recording import doubt_unsteady, record, recorded_product

__all__ = ["Condition"]


class Condition(Linearization):
    """The condition F(x, u) = 0 of a level at a point, and its derivative.

    With x*(u) its solution, F_x dx + F_u du = 0. So a cotangent v on x* becomes u_bar = -F_u^T q with F_x^T q = v, and a tangent
    du becomes the t with F_x t = -F_u du. Transposed products are one walk through the graph of F, which is traced once and kept.
    The decay of the level's optimiser is a part of F, since its steps end where F and the decay cancel.

    Args:
        point: the point.
        name: the level.
        estimator: the estimator, as it prints.
        solver: the linear solver.
        product: the kind of products.
        warm_start: True if a run starts each solve of F_x^T q = v from the q of the previous outer step.

    Example:
        >>> class Exact(mlopt.Estimator):  # for levels with a residual alone
        ...     needs_loss = ""
        ...     def linearize(self, point, level):
        ...         return mlopt.estimators.Condition(
        ...             point, level, estimator="Exact()", solver=mlopt.linear.Dense(), product=AutogradProduct
        ...         )
        >>> from mlopt.estimators.products import AutogradProduct
        >>> problem = mlopt.Problem(
        ...     mlopt.Level("u", mlopt.variables(torch.ones(1)), lambda u, batch, *, x: x().sum()),
        ...     mlopt.Level("x", mlopt.variables(torch.ones(1)), residual=lambda x, _, *, u: 2 * x() - u(), estimator=Exact()),
        ... )
        >>> mlopt.hypergradient(problem).gradient["value"]
        tensor([0.5000])

    Source: Bai, Kolter & Koltun 2019 (arXiv 1909.01377), theorem 1, for a fixed point; Blondel et al. 2022 (arXiv 2105.15183).
    """

    def __init__(
        self,
        point: Point,
        name: str,
        *,
        estimator: str,
        solver: LinearSolver,
        product: Callable[[Term], Product],
        warm_start: bool = False,
    ) -> None:
        self.point, self.name, self._solver, self._warm_start = point, name, solver, warm_start
        self._level = level = point.problem[name]
        self.arguments = point.problem.graph[name].arguments
        self.blocks = (name,)
        self.report = Report(estimator=estimator)
        self._fixed = fixed = FixedPoint.of(level, point)
        self._decay = fixed.terms(name, point)
        term = ResidualTerm(point, level, sign=fixed.sign)
        self._row: Block = term.multiplier
        self._derivatives = SecondDerivatives(Objective((term,)), product)
        self._curvature: SecondDerivatives | MeanSecondDerivatives = self._derivatives
        if batches := point.curvature_batches.get(name):
            residual_on = partial(ResidualTerm, point, level, sign=fixed.sign)
            self._curvature = on_batches(level, batches, residual_on, (), product)
        if fixed.doubt and not isinstance(self._solver, AssumedInverse):
            self.report.doubt(fixed.doubt)

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        if self.name not in cotangent:
            return {argument: zeros_like(self.point.values[argument]) for argument in wanted}
        initial = self.point.warm_start(self.name) if self._warm_start else None
        solution = self._solve(Matrix(self._transposed, self._along), cotangent[self.name], initial)
        if self._warm_start and any(bool(x.any()) for x in solution):
            self.point.keep_warm(self.name, solution, self.report.residual)
        pulled = recorded_product(self.report, self._derivatives, {self._row: solution}, wanted)
        return {block: scale(-1.0, vectors) for block, vectors in pulled.items()}

    def pushforward(self, tangent: Vectors) -> dict[Block, Tensors]:
        """Return the tangent of the solution for a tangent on the arguments: the transpose of `pullback`."""
        moved = recorded_product(self.report, self._derivatives, tangent, [self._row])
        return {self.name: self.respond(moved[self._row])} if moved else {}

    def respond(self, change: Tensors) -> Tensors:
        """Return -F_x^-1 times a change of F: the first-order change of the solution."""
        return scale(-1.0, self._solve(Matrix(self._along, self._transposed), change, None))

    def _solve(self, matvec: MatVec, load: Tensors, initial: Tensors | None) -> Tensors:
        try:
            solution = self._bounds.solve(self._solver, matvec, tuple(load), initial)
        except NonFiniteError as error:
            raise NonFiniteError(f"level {self.name!r}: {error}") from error
        record(self.report, _without_curvature(solution))
        return solution.value

    def _transposed(self, q: Tensors) -> Tensors:
        """Return F_x^T q, on the curvature batch if there is one."""
        return self._decayed(recorded_product(self.report, self._curvature, {self._row: q}, [self.name])[self.name], q)

    def _along(self, t: Tensors) -> Tensors:
        """Return F_x t, on the curvature batch if there is one."""
        return self._decayed(recorded_product(self.report, self._curvature, {self.name: t}, [self._row])[self._row], t)

    def _decayed(self, product: Tensors, vector: Tensors) -> Tensors:
        """Return a product, and that of the decay, which is diagonal."""
        for term in self._decay:
            product = add(product, term.product({self.name: vector})[self.name])
        return product

    @cached_property
    def _bounds(self) -> Bounds:
        bounds = Bounds.of(self._level, self.point, self._gradient)
        if bounds.doubt:
            self.report.doubt(bounds.doubt)
        return bounds

    def _gradient(self) -> Tensors:
        """Return F, and the decay."""
        known = self._known_gradient()
        if known is None:
            known = self._derivatives.gradient(self._row)
            for term in self._decay:
                known = add(known, term.derivatives([self.name])[self.name])
        return known

    def _known_gradient(self) -> Tensors | None:
        """Return the same if products, or the last step of a run, leave it behind; else None."""
        known = self._derivatives.known_gradient(self._row)
        if known is not None:
            for term in self._decay:
                known = add(known, term.derivatives([self.name])[self.name])
        elif (raw := self.point.last_gradient(self.name)) is not None:
            known = self._fixed.gradient(raw, self.name, self.point)
        return known

    def reports(self) -> dict[str, Report]:
        if not self.report.is_measured and (residual := self._known_gradient()) is not None:
            self._measure(self._bounds.on_free(residual))
        return super().reports()

    def _measure(self, residual: Tensors) -> None:
        """Report ||F||, and a distance from the solution if there is a bound on it.

        If <p, F_x p> >= c <p, p> > 0 for all p, the distance is at most ||F|| / c to first order. A smaller c says nothing.
        """
        size, reach = norm(residual), norm([v.detach() for v in self.point.values[self.name]])
        if isinstance(self._solver, AssumedInverse):
            self.report.measured(size, reach, norm(self._solver.image(residual)))
            return
        doubt_unsteady(self.report, self._fixed, residual, self.point.values[self.name], self.name)
        if self.report.curvature is not None and self.report.curvature[0] > 0.0:
            self.report.measured(size, reach)
        else:
            self.report.measured(size, None)


def _without_curvature(solution: LinearSolution) -> LinearSolution:
    """Return a solution without its remark on negative curvature, which means nothing if the matrix is not symmetric."""
    return attrs.evolve(solution, remark="") if solution.remark.startswith(("negative", "no curvature")) else solution
