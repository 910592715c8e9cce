"""The derivative of a solution that minimises a loss: the stationarity conditions of a level and of the levels inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import attrs
import torch

from ..errors import NonFiniteError
from ..linear import AssumedInverse, History, LinearSolution, LinearSolver, MatVec
from ..problem import (
    Block,
    Bounds,
    FixedPoint,
    LevelTerm,
    Linearization,
    Objective,
    Point,
    Report,
    Vectors,
    add_into,
    cut,
)
from ..tensors import Tensors, is_zero, norm, scale, zeros_like
from .joint import joined, joint_system
from .multiplier import MultiplierTerm
from .products import PRODUCTS, MeanSecondDerivatives, Product, SecondDerivatives, on_batches
from .products.promotion import Copies, has_half, in_single_precision
from .recording import doubt_unsteady, record, recorded_product

__all__ = ["Stationarity"]


class Stationarity(Linearization):
    """A level's stationarity conditions at a point, and their derivative.

    For a level without levels inside, they are grad_x f = 0. If its objective depends on the solutions X of levels inside, each
    with stationarity conditions grad_X L_c = 0, its total derivative is that of the Lagrangian
    L = f + sum_c <M_c, grad_X L_c> at the multipliers M_c that make L stationary in X. Its conditions are then grad L = 0 in
    x, X and M together, a symmetric system. The solves of the levels inside eliminate X and M from it. This leaves the Hessian
    of the total objective in x, a system for this level's own solver. So nesting of any depth is one recursion.

    Args:
        point: the point.
        name: the level.
        estimator: the estimator, as it prints.
        solver: returns the linear solver, which may depend on the level's optimiser.
        products: the name of the kind of products.
        product: the class that evaluates them.
        compile: True if that compiles them.
        warm_start: as in `Implicit`.
        history: as in `Implicit`.
        joint: as in `Implicit`.
        inside: the conditions of the levels solved inside, whose solutions have arguments.
    """

    def __init__(
        self,
        point: Point,
        name: str,
        *,
        estimator: str,
        solver: Callable[[], LinearSolver],
        products: str,
        product: type[Product],
        compile: bool = False,
        warm_start: bool = False,
        history: int = 0,
        joint: bool = False,
        inside: Sequence[Stationarity] = (),
    ) -> None:
        self.point, self.name, self._make_solver, self._children = point, name, solver, tuple(inside)
        self._products, self._compile = products, compile
        self._warm_start, self._limit, self._joint = warm_start, history, joint
        level = point.problem[name]
        self.arguments = point.problem.graph[name].arguments
        self.report = Report(estimator=estimator)
        self.states: tuple[Block, ...] = (name, *(block for child in self._children for block in child.blocks))
        multipliers = ((name, block) for child in self._children for block in child.blocks)
        self.blocks = (*self.states, *multipliers)
        if products == "finite_difference" and any(child._children for child in self._children):
            self.report.doubt("differences of differences of differences: expect errors of several per cent")
        self._fixed = fixed = FixedPoint.of(level, point)
        own = Objective.minimized(level, point, fixed=fixed)
        if self._children:
            self._find_multipliers(own)
        #: Copies of variables in half precision, or None. Differences need no copies. A nest takes none, since the graphs of the
        #: levels inside refer to the variables themselves.
        single = products != "finite_difference" and not self._children and has_half(point)
        self._copies: Copies | None = {} if single else None
        kind = product if self._copies is None else PRODUCTS[products]
        lagrangian = (
            MultiplierTerm(point, name, child.name, child.objective, child.blocks, kind) for child in self._children
        )
        self.objective: Objective = Objective((*own.terms, *lagrangian))
        self.second_derivatives = SecondDerivatives(self.objective, kind)
        self._curvature: SecondDerivatives | MeanSecondDerivatives = self.second_derivatives
        #: The history of the latest solve; the arguments that the next product includes; such a product, and its direction.
        self._history: History | None = None
        self._asked: tuple[str, ...] = ()
        self._mixed: tuple[Tensors, dict[Block, Tensors]] | None = None
        if batches := point.curvature_batches.get(name):
            _, *others = own.terms
            loss_on = partial(LevelTerm, point, level, "loss", sign=fixed.sign)
            self._curvature = on_batches(level, batches, loss_on, others, kind)
        hooked = [block for block in self.states if any(p._backward_hooks for p in point.values[block])]
        if self._children and hooked:
            self.report.doubt(
                f"parameters of {hooked[0]!r} have hooks (register_hook), which change the gradient of a level and not its "
                "objective, and nested levels use both; freeze parts by requires_grad_(False), or scale the loss"
            )
        if fixed.doubt and not isinstance(self._solver, AssumedInverse):
            self.report.doubt(fixed.doubt)

    def _find_multipliers(self, objective: Objective) -> None:
        """Set M_c = -(solve of level c) of the cotangent on its states; a level comes after the levels that use it."""
        load = objective.derivatives(self.states)
        for child in self._children:
            adjoint = child.solve({block: load[block] for block in child.blocks if block in load})
            for block in child.blocks:
                m = scale(-1.0, adjoint[block]) if block in adjoint else zeros_like(self.point.values[block])
                self.point.values[self.name, block] = tuple(x.detach().requires_grad_() for x in m)
            back = child.product(adjoint, [a for a in child.arguments if a in self.states])
            add_into(load, back, sign=-1.0)

    def product(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the components d/dw <grad_D L, direction> for w in `wanted`; absent ones are zero."""
        for child in self._children:
            self._verify_inside(child, [block for block in wanted if block in child.arguments])
        return recorded_product(self.report, self.second_derivatives, direction, wanted)

    def _verify_inside(self, child: Stationarity, wanted: Sequence[Block]) -> None:
        """Take the products of a level inside with its multiplier once, so that they are verified.

        The multiplier term differentiates them, and a comparison of its own does not see gradients that the level's loss stops.
        """
        verified, key = self.point.workspace.verified, ("multiplier", self.name, child.name, *map(str, wanted))
        if key in verified or not wanted or self.point.workspace.verifying:
            return
        multiplier = {block: tuple(x.detach() for x in self.point.values[self.name, block]) for block in child.blocks}
        if any(bool(x.any()) for vectors in multiplier.values() for x in vectors):
            child.product(multiplier, wanted)
            verified.add(key)

    def solve(self, load: Vectors, initial: Tensors | History | None = None) -> dict[Block, Tensors]:
        """Return Q over the blocks with (d2L / dblocks2) Q = load; blocks that are absent from either are zero."""
        if not load:
            return {}
        if self._children and self._joint:
            return self._solve_jointly(load)
        if self._children:
            _, load_left = self._complete(None, load)
            rhs, matvec = load_left.get(self.name, zeros_like(self.point.values[self.name])), self._total_hessian
        else:
            rhs, matvec = tuple(load[self.name]), self._hessian
        own = self._solved(self._bounds, matvec, rhs, initial)
        record(self.report, own)
        self._history = own.history
        if not self._children:
            return {self.name: own.value}
        solution, _ = self._complete(own.value, load)
        return solution

    def _solve_jointly(self, load: Vectors) -> dict[Block, Tensors]:
        """Return the same by one solve of the whole symmetric system, in which no level inside is eliminated."""
        values, free = self.point.values, self._free()
        bounds = Bounds(free=joined(free, self.blocks, values, 1.0) if free else ())
        matvec, rhs = joint_system(lambda v: self.product(v, self.blocks), load, self.blocks, values)
        solution = self._solved(bounds, matvec, rhs, None)
        # The system is indefinite, whatever the curvature of the level.
        record(self.report, attrs.evolve(solution, curvature=None))
        return cut(solution.value, self.blocks, values)

    def _solved(self, bounds: Bounds, matvec: MatVec, rhs: Tensors, start: Tensors | History | None) -> LinearSolution:
        try:
            return bounds.solve(self._solver, matvec, rhs, start)
        except NonFiniteError as error:
            raise NonFiniteError(f"level {self.name!r}: {error}") from error

    def _free(self) -> dict[Block, Tensors]:
        """Return, by block with variables at a bound, zeros on those and ones on the others; multipliers as the variables."""
        inside = {block: mask for child in self._children for block, mask in child._free().items()}
        own = {self.name: self._bounds.free} if self._bounds.free else {}
        return {**own, **inside, **{(self.name, block): mask for block, mask in inside.items()}}

    @cached_property
    def _bounds(self) -> Bounds:
        bounds = Bounds.of(self.point.problem[self.name], self.point, self._gradient)
        if bounds.doubt:
            self.report.doubt(bounds.doubt)
        return bounds

    def on_free(self, vectors: Tensors | None) -> Tensors | None:
        """Return vectors with zeros on the variables that the optimiser holds at a bound; None for None."""
        return None if vectors is None else self._bounds.on_free(vectors)

    def _gradient(self) -> Tensors:
        """Return the gradient of what the level's optimiser minimises."""
        known = self._known_gradient()
        return self.objective.derivatives([self.name])[self.name] if known is None else known

    def _known_gradient(self) -> Tensors | None:
        """Return the same if products, or the last step of a run, leave it behind; else None."""
        known = self.second_derivatives.known_gradient(self.name)
        if known is None and (raw := self.point.last_gradient(self.name)) is not None:
            return self._fixed.gradient(raw, self.name, self.point)
        return known

    @cached_property
    def _solver(self) -> LinearSolver:
        return self._make_solver()

    def _hessian(self, q: Tensors) -> Tensors:
        """Return H q, on the curvature batch if there is one; once along with the mixed product, if that is asked for."""
        blocks, self._asked = [self.name, *self._asked], ()
        products = recorded_product(self.report, self._curvature, {self.name: q}, blocks)
        own = products.pop(self.name)
        if len(blocks) > 1:
            self._mixed = q, products
        return own

    def outside(self, matvec: MatVec) -> MatVec:
        """Return a product that a linear solver received in a pullback as one for use after it, at the same copies."""

        def product(vector: Tensors) -> Tensors:
            def own(vectors: Vectors) -> dict[Block, Tensors]:
                return {self.name: matvec(tuple(vectors[self.name]))}

            return in_single_precision(self.point, self._copies, own, {self.name: vector})[self.name]

        return product

    def _total_hessian(self, q: Tensors) -> Tensors:
        """Return the product with the Hessian of the total objective, which includes the response of the levels inside."""
        _, residual = self._complete(q, {})
        return scale(-1.0, residual[self.name])

    def _complete(self, q: Tensors | None, load: Vectors) -> tuple[dict[Block, Tensors], dict[Block, Tensors]]:
        """Eliminate the levels inside: from the level's own component q, return all of Q and the residual of its own row."""
        own = self.name
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
        self._free_gradient()
        self._read_optimizer()
        return in_single_precision(self.point, self._copies, partial(self._pullback, wanted=wanted), cotangent)

    def _free_gradient(self) -> None:
        """Free the gradient of the latest step before products need memory, once it is measured, unless a solve may read it."""
        if self.point.frees_gradients and not self._children and isinstance(self._solver, AssumedInverse):
            self._measure()
            self.point.free_gradient(self.name)

    def _pullback(self, cotangent: Vectors, wanted: Sequence[str] | None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        solution = self.solve(cotangent, self._initial(wanted))
        # Reading the solution makes the host wait for the device, which an assumed inverse need not do.
        measured = not isinstance(self._solver, AssumedInverse)
        if self._vanishes or (measured and all(map(is_zero, solution.values()))):
            return {argument: zeros_like(self.point.values[argument]) for argument in wanted}
        if self._warm_start or self._limit:
            self.point.keep_warm(self.name, solution[self.name], self.report.residual, self._history)
        return {block: scale(-1.0, vectors) for block, vectors in self._mixed_product(solution, wanted).items()}

    @property
    def _vanishes(self) -> bool:
        """True if the response is assumed to be zero, which needs no product."""
        return isinstance(self._solver, AssumedInverse) and self._solver.vanishes and not self._children

    def _initial(self, wanted: Sequence[str]) -> Tensors | History | None:
        """Return the start of the linear solve: a history if the estimator keeps one in a run, else a warm start, if any."""
        limit = self._limit
        if not limit or self.point.carryover is None:
            return self.point.warm_start(self.name) if self._warm_start else None
        history = self.point.history(self.name)
        if history is not None and self._takes_both:
            # The start may be the solution; then its product with the Hessian measures the residual and is all that is needed.
            self._asked = tuple(wanted)
        return History(limit=limit) if history is None else attrs.evolve(history, limit=limit)

    @property
    def _takes_both(self) -> bool:
        """True if one product may have components in the level's own variables and in its arguments."""
        same = self._curvature is self.second_derivatives and not self._compile
        return same and not self._children and self._products != "gauss_newton"

    def _mixed_product(self, solution: dict[Block, Tensors], wanted: Sequence[str]) -> dict[Block, Tensors]:
        if self._mixed is not None and all(map(torch.equal, self._mixed[0], solution[self.name])):
            return self._mixed[1]
        return self.product(solution, wanted)

    def pushforward(self, tangent: Vectors) -> dict[Block, Tensors]:
        """Return the tangent of the solution for a tangent on the arguments: the transpose of `pullback`."""
        self._read_optimizer()
        return in_single_precision(self.point, self._copies, self._pushforward, tangent)

    def _read_optimizer(self) -> None:
        """Read what depends on the level's optimiser before copies take the place of its variables, which it does not know."""
        if self._copies is not None:
            _ = self._solver, self._bounds

    def _pushforward(self, tangent: Vectors) -> dict[Block, Tensors]:
        moved = self.product(tangent, self.blocks)
        return self.solve({block: scale(-1.0, vectors) for block, vectors in moved.items()})

    def _measure(self) -> None:
        """Report how far the level is from the point at which its steps end."""
        if (gradient := self._known_gradient()) is None:
            return
        gradient = self._bounds.on_free(gradient)
        variables, size, distance = self.point.values[self.name], norm(gradient), None
        solver = self._solver
        if isinstance(solver, AssumedInverse) and not solver.vanishes:
            image = solver.image(gradient)
            distance = size if image is gradient else norm(image)
        self.report.measured(size, norm([v.detach() for v in variables]), distance)
        if not isinstance(solver, AssumedInverse):
            doubt_unsteady(self.report, self._fixed, gradient, variables, self.name)

    def reports(self) -> dict[str, Report]:
        self._measure()
        merged = {self.name: self.report}
        for child in self._children:
            merged |= child.reports()
        return merged
