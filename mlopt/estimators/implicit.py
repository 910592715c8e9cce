"""Implicit differentiation: a linear solver for the level's Hessian, and a way to multiply with second derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import EstimatorError, NonFiniteError
from ..linear import Identity, LinearSolution, LinearSolver
from ..problem import (
    Block,
    Estimator,
    LevelTerm,
    Linearization,
    Objective,
    Point,
    Report,
    StreamedCotangent,
    Term,
    Vectors,
    add_into,
    derivatives,
)
from ..tensors import Tensors, dot, scale, zeros_like
from ..validation import one_of
from .products import PRODUCTS, Compiled, Product, SecondDerivatives
from .step_derivative import step_derivative

__all__ = ["Implicit", "Stationarity"]


@attrs.frozen(kw_only=True)
class Implicit(Estimator):
    """The implicit-function theorem, with a linear solver and a kind of products.

    With x*(u) = argmin_x f(x, u), a cotangent v on x* gives -(d2f / du dx) q on u, where (d2f / dx2) q = v.

    Args:
        solver: how q is found.
        products: how products with second derivatives are evaluated: "autograd", "forward", "finite_difference" or, for a level
            without levels inside, "gauss_newton".
        compile: whether the product with a level's own Hessian is compiled by torch.compile; for "forward" products.
        warm_start: whether `solve` starts each linear solve from the q of the outer step before.
        curvature_data: batches on which the Hessian is taken, of a size of their own; the batch of the level when None. The
            mixed product stays with the level's batch. For a level without levels inside.
        adapted: whether the inverse Hessian is taken to be what the level's optimiser makes of a gradient, in place of the
            identity; needs the identity as solver. See `SAMA`.
        streamed: whether a level whose loss is a `Mixture` may form the gradient of its weights from the gradients that its
            own training step computes, with the cotangent of the outer step before. Needs the identity as solver.
    """

    solver: LinearSolver
    products: str = attrs.field(default="autograd", validator=one_of(*PRODUCTS))
    compile: bool = False
    warm_start: bool = False
    curvature_data: Iterable[Any] | None = attrs.field(default=None, repr=False)
    adapted: bool = False
    streamed: bool = False

    def __attrs_post_init__(self) -> None:
        if self.streamed and not isinstance(self.solver, Identity):
            raise EstimatorError(
                f"streamed=True with {self.solver}: only the identity's pullback needs no solve; use Identity(streamed=True)"
            )
        if self.compile and self.products != "forward":
            raise EstimatorError(
                f"compile=True with products={self.products!r}: a gradient that was compiled has no derivative; use "
                "products='forward'"
            )
        if self.adapted and (self.streamed or not isinstance(self.solver, Identity)):
            raise EstimatorError(
                "adapted=True takes the optimiser's step for the inverse Hessian: it needs linear.Identity() as solver, and "
                "streamed=False"
            )
        if self.curvature_data is not None and isinstance(self.solver, Identity):
            raise EstimatorError(
                "curvature_data with the identity as solver: no product with the Hessian is taken; leave it out"
            )

    @property
    def product(self) -> type[Product]:
        """How products are evaluated."""
        return Compiled if self.compile else PRODUCTS[self.products]

    def linearize(self, point: Point, level: str) -> Stationarity:
        return Stationarity(point, level, self)

    def __str__(self) -> str:
        kinds = {
            "compiled": self.compile,
            "warm start": self.warm_start,
            "curvature data": self.curvature_data is not None,
            "adapted": self.adapted,
            "streamed": self.streamed,
        }
        marks = [mark for mark, given in kinds.items() if given]
        return ", ".join([f"{self.solver} with {self.products} products", *marks])


class Stationarity(Linearization):
    """A level's stationarity conditions at a point, and their derivative.

    For a level without levels inside, they are grad_x f = 0. Where its objective depends on the solutions X of levels
    inside, with stationarity conditions grad_X L_c = 0 of their own, its total derivative is that of the Lagrangian
    L = f + sum_c <M_c, grad_X L_c> at the multipliers M_c that make L stationary in X. Its conditions are then grad L = 0 in
    x, X and M together, a symmetric system; eliminating X and M from it, with the solves of the levels inside, leaves the
    Hessian of the total objective in x, which this level's own solver deals with. So nesting of any depth is one recursion.

    Args:
        point: where.
        name: the level.
        estimator: its linear solver and products.
    """

    def __init__(self, point: Point, name: str, estimator: Implicit) -> None:
        self._point, self._name, self._estimator = point, name, estimator
        level, node = point.problem[name], point.problem.graph[name]
        self.arguments = node.arguments
        self.report = Report(estimator=str(estimator))
        self._children = tuple(self._inside(part) for part in node.parts if point.problem.graph[part].arguments)
        self.states: tuple[Block, ...] = (name, *(block for child in self._children for block in child.blocks))
        multipliers = ((name, block) for child in self._children for block in child.blocks)
        self.blocks = (*self.states, *multipliers)
        if estimator.products == "finite_difference" and any(child._children for child in self._children):
            self.report.remarks = ("differences of differences of differences: expect errors of several per cent",)
            self.report.converged = False
        own = Objective.of(level, point)
        if self._children:
            self._refuse_what_leaves_have()
            self._find_multipliers(own)
        lagrangian = (_MultiplierTerm(point, name, child, estimator.product) for child in self._children)
        self.objective = Objective((*own.terms, *lagrangian))
        self._products = self._curvature = SecondDerivatives(self.objective, estimator.product)
        if name in point.curvature_batches:
            self._curvature = SecondDerivatives(Objective.of(level, point, point.curvature_batches), estimator.product)

    def _refuse_what_leaves_have(self) -> None:
        estimator = self._estimator
        for argument, given in {
            "products='gauss_newton'": estimator.products == "gauss_newton",
            "curvature_data": estimator.curvature_data is not None,
            "adapted=True": estimator.adapted,
        }.items():
            if given:
                raise EstimatorError(
                    f"level {self._name!r}: {argument} is for levels without levels inside, and "
                    f"{', '.join(repr(child._name) for child in self._children)} lies inside it; leave it out"
                )

    def _inside(self, part: str) -> Stationarity:
        estimator = self._point.estimator(part)
        if not isinstance(estimator, Implicit):
            raise EstimatorError(
                f"level {part!r} is solved inside {self._name!r}, through which cotangents are pulled back; {estimator} "
                "cannot be nested: use Identity, FiniteDifference, Neumann, ConjugateGradient, MINRES, Nystrom or Dense"
            )
        return estimator.linearize(self._point, part)

    def _find_multipliers(self, objective: Objective) -> None:
        """Set M_c = -(solve of level c) of the cotangent on its states, users of a level before the level."""
        load = objective.derivatives(self.states)
        for child in self._children:
            adjoint = child.solve({block: load[block] for block in child.blocks if block in load})
            for block in child.blocks:
                found = scale(-1.0, adjoint[block]) if block in adjoint else zeros_like(self._point.values[block])
                self._point.values[self._name, block] = tuple(m.detach().requires_grad_() for m in found)
            back = child.product(adjoint, [a for a in child.arguments if a in self.states])
            add_into(load, back, sign=-1.0)

    def product(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the components d/dw <grad_D L, direction> for w in `wanted`; absent ones are zero."""
        return self._apply(self._products, direction, wanted)

    def _apply(self, products: SecondDerivatives, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        total = products(direction, wanted)
        if products.step is not None:
            self.report.step = products.step
        return total

    def solve(self, load: Vectors, initial: Tensors | None = None) -> dict[Block, Tensors]:
        """Return Q over the blocks with (d2L / dblocks2) Q = load; absent blocks are zero, in and out."""
        if not load:
            return {}
        if self._children:
            _, load_left = self._complete(None, load)
            rhs, matvec = load_left.get(self._name, zeros_like(self._point.values[self._name])), self._total_hessian
        else:
            rhs, matvec = tuple(load[self._name]), self._hessian
        try:
            found = self._estimator.solver.solve(matvec, rhs, initial=initial)
        except NonFiniteError as error:
            raise NonFiniteError(f"level {self._name!r}: {error}") from error
        self._record(found)
        if self._estimator.adapted:
            return {self._name: tuple(torch._foreach_mul(list(found.value), list(self._adaptation())))}
        if not self._children:
            return {self._name: found.value}
        solution, _ = self._complete(found.value, load)
        return solution

    def _hessian(self, q: Tensors) -> Tensors:
        """Return H q, on the curvature batch where there is one."""
        return self._apply(self._curvature, {self._name: q}, [self._name])[self._name]

    def _total_hessian(self, q: Tensors) -> Tensors:
        """Return the product with the Hessian of the total objective, the response of the levels inside included."""
        _, residual = self._complete(q, {})
        return scale(-1.0, residual[self._name])

    def _adaptation(self) -> Tensors:
        """Return how the level's optimiser scales a change of the latest gradient, by component."""
        level, live = self._point.problem[self._name], self._point.optimizer(self._name)
        if live is None:
            gradient = self.objective.derivatives([self._name])[self._name]
        else:
            # The latest step leaves its gradient behind; a variable that it did not move has none.
            gradient = tuple(torch.zeros_like(v) if v.grad is None else v.grad for v in level.parameters)
        return step_derivative(level, live, gradient)

    def _complete(self, q: Tensors | None, load: Vectors) -> tuple[dict[Block, Tensors], dict[Block, Tensors]]:
        """Eliminate the levels inside: given the own component q, return the whole of Q, and what its own row leaves over."""
        own = self._name
        solution: dict[Block, Tensors] = {} if q is None else {own: q}
        for child in reversed(self._children):
            row = {block: load[own, block] for block in child.blocks if (own, block) in load}
            tangent = {a: solution[a] for a in child.arguments if a in solution}
            add_into(row, child.product(tangent, child.blocks), sign=-1.0)
            solution |= child.solve(row)
        rest = {block: load[block] for block in self.states if block in load}
        add_into(rest, self.product(solution, self.states), sign=-1.0)
        for child in self._children:
            adjoint = child.solve({block: rest.pop(block) for block in child.blocks if block in rest})
            solution |= {(own, block): vectors for block, vectors in adjoint.items()}
            back = child.product(adjoint, [a for a in child.arguments if a in self.states])
            add_into(rest, back, sign=-1.0)
        return solution, rest

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        weights = self._point.workspace.mixtures.get(self._name)
        if self._point.carryover is not None and self._estimator.streamed and weights is not None and weights in wanted:
            streamed = self._pull_streamed(cotangent, weights, wanted)
            if streamed is not None:
                return streamed
        warm = self._estimator.warm_start
        solution = self.solve(cotangent, self._point.warm_start(self._name) if warm else None)
        # Where nothing is solved nothing is looked at either: the host would wait for the device.
        looked = not isinstance(self._estimator.solver, Identity)
        if looked and not any(bool(v.any()) for vectors in solution.values() for v in vectors):
            return {argument: zeros_like(self._point.values[argument]) for argument in wanted}
        if warm:
            self._point.keep_warm(self._name, solution[self._name], self.report.residual)
        return {block: scale(-1.0, vectors) for block, vectors in self.product(solution, wanted).items()}

    def _pull_streamed(self, cotangent: Vectors, weights: str, wanted: Sequence[str]) -> dict[Block, Tensors] | None:
        """Swap the held cotangent for the present one; return what the training step formed with the held one, if it did."""
        assert self._point.carryover is not None
        cotangents = self._point.carryover.cotangents
        held = cotangents.get(self._name)
        present = cotangent.get(self._name)
        cotangents[self._name] = StreamedCotangent(
            zeros_like(self._point.values[self._name]) if present is None else present
        )
        if held is None or held.signals is None:
            return None
        self.report.age = 1
        mixture = self.objective.terms[0]
        assert isinstance(mixture, LevelTerm)
        found: dict[Block, Tensors] = {weights: mixture.streamed(weights, held.signals)}
        # What the training step did not form: other arguments of the mixture, and the regularizer.
        for product in self._products.products:
            asked = [a for a in wanted if a in product.term.blocks and (product.term is not mixture or a != weights)]
            if asked:
                add_into(found, product({self._name: held.cotangent}, asked))
        return {block: scale(-1.0, vectors) for block, vectors in found.items()}

    def pushforward(self, tangent: Vectors) -> dict[Block, Tensors]:
        """Return how the solution moves when the arguments move along `tangent`; the transpose of `pullback`."""
        moved = self.product(tangent, self.blocks)
        return self.solve({block: scale(-1.0, vectors) for block, vectors in moved.items()})

    def reports(self) -> dict[str, Report]:
        merged = {self._name: self.report}
        for child in self._children:
            merged |= child.reports()
        return merged

    def _record(self, found: LinearSolution) -> None:
        report = self.report
        report.solves += 1
        report.iterations += found.iterations
        report.products += found.products
        if found.residual is not None:
            report.residual = max(found.residual, report.residual or 0.0)
        if found.converged is not None:
            report.converged = found.converged and report.converged is not False
        if found.curvature is not None:
            low, high = report.curvature or found.curvature
            report.curvature = (min(low, found.curvature[0]), max(high, found.curvature[1]))
        if found.remark and found.remark not in report.remarks:
            report.remarks = (*report.remarks, found.remark)


class _MultiplierTerm(Term):
    """<M, grad L_c>, over the states of a level c inside: the part of a nested level's Lagrangian that belongs to c."""

    def __init__(self, point: Point, owner: str, child: Stationarity, kind: type[Product]) -> None:
        self._child, self._kind = child, kind
        self._owned = {(owner, block): block for block in child.blocks}
        self.values = point.values
        self.blocks = frozenset(self._owned).union(*(term.blocks for term in child.objective.terms))

    def value(self) -> Tensor:
        total = torch.zeros(())
        for term in self._child.objective.terms:
            blocks = [block for block in self._child.blocks if block in term.blocks]
            gradient = derivatives(term.value(), blocks, self.values, traced=True)
            for key, block in self._owned.items():
                if block in gradient:
                    total = total + dot(self.values[key], gradient[block])
        return total

    def function(self, values: Vectors) -> Tensor:
        values = {**self.values, **values}

        def lagrangian(states: dict[Block, Tensors]) -> Tensor:
            terms = [term.function({**values, **states}) for term in self._child.objective.terms]
            return torch.stack(terms).sum()

        gradient = torch.func.grad(lagrangian)({block: values[block] for block in self._child.blocks})
        return torch.stack([dot(values[key], gradient[block]) for key, block in self._owned.items()]).sum()

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """By the states and arguments of c a product with its second derivatives, by the multipliers its first ones."""
        direction = {block: tuple(m.detach() for m in self.values[key]) for key, block in self._owned.items()}
        found = {block: zeros_like(self.values[block]) for block in wanted}
        add_into(found, SecondDerivatives(self._child.objective, self._kind)(direction, wanted))
        owned = {key: self._owned[key] for key in wanted if key in self._owned}
        gradient = self._child.objective.derivatives(list(owned.values()))
        add_into(found, {key: gradient[block] for key, block in owned.items()})
        return found
