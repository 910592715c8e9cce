"""Variables that a projecting optimiser holds at a bound, seen from its steps."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from ..linear import History, LinearSolution, LinearSolver, Matrix, MatVec
from ..rng import GeneratorState
from ..tensors import Tensors, norm
from .fixed_point import level_optimizer

if TYPE_CHECKING:
    from .level import Level
    from .point import Point

__all__ = ["Bounds", "has_hooks", "unmoved"]

#: The first step of SGD on a probe moves a variable by at least this share of one plus its size, which no dtype rounds away.
_REACH = 1e-2
#: A step along the gradient that is shorter than this share of a step along a random vector is undone by a projection.
_UNDONE = 0.05
#: Rounding of half precision can stop a step on one side only, as a bound does.
_WIDE = (torch.float32, torch.float64)


@attrs.frozen(kw_only=True, eq=False)
class Bounds:
    """The variables of a level that its optimiser moves, and those that it holds at a bound.

    A variable is held if its gradient is not zero, and a step of the optimiser along it leaves the variable unchanged, or if its
    learning rate is zero, and others' are not. The solution of the level moves in the free variables only, so its linear system
    is that of the free variables.

    Attributes:
        free: for each variable, ones where it is free and zeros where it is held; empty if all are free.
        doubt: a sentence, if the optimiser holds the level by a constraint that is no bound on each variable; else "".
    """

    free: Tensors = ()
    doubt: str = ""

    @classmethod
    def of(cls, level: Level, point: Point, gradient: Callable[[], Tensors]) -> Bounds:
        """Return the bounds of a level at a point. Nothing moves.

        An optimiser of the user's own is asked to take steps, which are undone. Step hooks of the user are not called for this,
        except those of an optimiser that the level's factory made to be read. In a run, the latest step shows their bounds.

        Args:
            level: the level.
            point: the point.
            gradient: returns the gradient of what the optimiser minimises.
        """
        optimizer = level_optimizer(level, point)
        if optimizer is None:
            return cls()
        bounds = cls._of_steps(level, point, gradient, optimizer)
        resting = _resting(optimizer)
        if not resting:
            return bounds
        moving = tuple(torch.full_like(v, id(v) not in resting) for v in point.values[level.name])
        return attrs.evolve(bounds, free=bounds.on_free(moving))

    @classmethod
    def _of_steps(cls, level: Level, point: Point, gradient: Callable[[], Tensors], optimizer: Optimizer) -> Bounds:
        """Return the bounds that steps show; a variable whose learning rate is zero may count as free."""
        variables = point.values[level.name]
        if any(v.dtype not in _WIDE for v in variables):
            return cls()
        if point.carryover is not None and level.name in point.carryover.held:
            # Where decay balances the gradient, a variable rests without a bound.
            rates = _rates(variables, optimizer, point.groups(level.name))
            visible = _visible(gradient(), variables, rates)
            held = [h & v for h, v in zip(point.carryover.held[level.name], visible, strict=True)]
            free = tuple((~h).to(v) for h, v in zip(held, variables, strict=True))
            return cls(free=free if any(bool(h.any()) for h in held) else ())
        if not _may_project(level, point, optimizer):
            return cls()
        try:
            with _probed(level, point, optimizer):
                return _bounds(level, optimizer, variables, gradient)
        except _StepError:
            return cls()

    @staticmethod
    def passed(level: Level, point: Point) -> int:
        """Return the number of variables beyond their bounds: steps of the optimiser to either side bring them back."""
        optimizer, variables = level_optimizer(level, point), point.values[level.name]
        if (
            optimizer is None
            or not _may_project(level, point, optimizer)
            or any(v.dtype not in _WIDE for v in variables)
        ):
            return 0
        try:
            with _probed(level, point, optimizer):
                moves = zip(*_to_both_sides(optimizer, variables), strict=True)
                return sum(int((down * up > 0).sum()) for down, up in moves)
        except _StepError:
            return 0

    def on_free(self, vectors: Tensors) -> Tensors:
        """Return vectors with zeros on the held variables."""
        return tuple(torch._foreach_mul(list(vectors), list(self.free))) if self.free and vectors else tuple(vectors)

    def solve(
        self, solver: LinearSolver, matvec: MatVec, rhs: Tensors, initial: Tensors | History | None
    ) -> LinearSolution:
        """Solve the linear system of the free variables.

        Args:
            solver: the linear solver.
            matvec: the product with the matrix of all variables; a `Matrix` has the transposed one as well.
            rhs: the right-hand side.
            initial: the start, or the history of the system before; None for the solver's own start.
        """
        if not self.free:
            return solver.solve(matvec, rhs, initial=initial)
        start: Tensors | History | None
        if isinstance(initial, History):
            start = initial.restricted(self.free)
        else:
            start = None if initial is None else self.on_free(initial)
        restricted: MatVec = self._restricted(matvec)
        if isinstance(matvec, Matrix):
            restricted = Matrix(restricted, self._restricted(matvec.transposed))
        return solver.solve(restricted, self.on_free(rhs), initial=start)

    def _restricted(self, matvec: MatVec) -> MatVec:
        """Return the product with the matrix of the free variables, and with the identity on the held ones."""

        def product(vector: Tensors) -> Tensors:
            kept = self.on_free(vector)
            rows = self.on_free(matvec(kept))
            return tuple(r + (v - k) for r, v, k in zip(rows, vector, kept, strict=True))

        return product

    @property
    def held(self) -> int:
        """The number of held variables."""
        return sum(int((mask == 0).sum()) for mask in self.free)


class _StepError(Exception):
    """The optimiser cannot step on probes."""


def _resting(optimizer: Optimizer) -> set[int]:
    """Return the variables in groups whose learning rate is zero, by id; none if every rate is zero: a run may begin so."""
    still = [group for group in optimizer.param_groups if float(group.get("lr", 1.0)) == 0.0]
    if len(still) == len(optimizer.param_groups):
        return set()
    return {id(variable) for group in still for variable in group["params"]}


def has_hooks(optimizer: Optimizer) -> bool:
    """Return True if hooks run after the steps of an optimiser, which may project."""
    return bool(getattr(optimizer, "_optimizer_step_post_hooks", None))


def unmoved(before: Tensors, variables: Tensors, optimizer: Optimizer) -> Tensors:
    """Return, for each variable, where its latest step left it unchanged although its gradient is not zero.

    A step that rounding may have swallowed does not count.

    Args:
        before: the values before the step.
        variables: the variables after the step, with the gradients of the step in `.grad`.
        optimizer: the optimiser that took it.
    """
    gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in variables]
    visible = _visible(gradients, before, _rates(variables, optimizer))
    return tuple((v.detach() == old) & seen for v, old, seen in zip(variables, before, visible, strict=True))


def _rates(variables: Tensors, optimizer: Optimizer, settings: Sequence[dict[str, Any]] | None = None) -> list[float]:
    """Return the learning rate of each variable, by given settings of the groups or the present ones."""
    groups = zip(optimizer.param_groups, settings or optimizer.param_groups, strict=True)
    rates = {id(p): float(own.get("lr") or 0.0) for group, own in groups for p in group["params"]}
    return [rates.get(id(variable), 0.0) for variable in variables]


def _visible(gradients: Sequence[Tensor], values: Sequence[Tensor], rates: Sequence[float]) -> Tensors:
    """Return where a step along the gradient changes the values in spite of rounding."""
    # Steps of SGD are proportional to the gradient, and those of adaptive methods to the learning rate.
    return tuple(
        0.1 * rate * g.abs().clamp_max(1.0) > torch.finfo(x.dtype).eps * x.detach().abs()
        for g, x, rate in zip(gradients, values, rates, strict=True)
    )


def _may_project(level: Level, point: Point, optimizer: Optimizer) -> bool:
    """Return True if steps of the optimiser may project: its class is the user's own, or its hooks were made to be read."""
    aside = point.workspace.optimizers.get(level.name) is optimizer
    return not type(optimizer).__module__.startswith("torch.optim.") or (aside and has_hooks(optimizer))


@contextlib.contextmanager
def _probed(level: Level, point: Point, optimizer: Optimizer) -> Iterator[None]:
    """Restore the generators on exit, and leave out the hooks of an optimiser that was not made to be read."""
    before = GeneratorState.capture(point.problem.devices)
    aside = point.workspace.optimizers.get(level.name) is optimizer
    try:
        with contextlib.nullcontext() if aside else _without_hooks(optimizer):
            yield
    finally:
        before.restore()


def _noise(variables: Tensors) -> list[Tensor]:
    """Return numbers from 0 to 1 for each variable, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(v.shape, generator=generator, dtype=torch.float64, device="cpu").to(v) for v in variables]


def _to_both_sides(optimizer: Optimizer, variables: Tensors) -> tuple[Tensors, Tensors]:
    """Return the displacements by a step down and by a step up, of a different size for each variable."""
    # A projection may undo a step that all variables share.
    down, up = (_moves(optimizer, variables, [sign * (0.5 + n) for n in _noise(variables)]) for sign in (1.0, -1.0))
    return down, up


def _bounds(level: Level, optimizer: Optimizer, variables: Tensors, gradient: Callable[[], Tensors]) -> Bounds:
    noise = _noise(variables)
    down, up = (tuple(m == 0 for m in moves) for moves in _to_both_sides(optimizer, variables))
    if all(bool((a & b).all()) for a, b in zip(down, up, strict=True)):
        return Bounds()  # a learning rate of zero
    slope = gradient()
    if not bool(norm(slope)):
        return Bounds()
    held = tuple((d & (g > 0)) | (u & (g < 0)) for d, u, g in zip(down, up, slope, strict=True))
    free = tuple((~h).to(v) for h, v in zip(held, variables, strict=True))
    left = max(float((g * f).abs().max()) for g, f in zip(slope, free, strict=True) if g.numel())
    # Along the gradient; then along others on the free variables, and of other sizes on the held ones.
    along, across = (
        _moves(
            optimizer,
            variables,
            [torch.where(h, g.sign() * (0.5 + n), v) for h, g, n, v in zip(held, slope, noise, vs, strict=True)],
        )
        for vs in ([g / (left or 1.0) for g in slope], [2 * n - 1 for n in noise])
    )
    moved = any(bool((m[h] != 0).any()) for m, h in zip(across, held, strict=True))
    lengths = [float(norm([m * f for m, f in zip(moves, free, strict=True)])) for moves in (along, across)]
    doubt = ""
    if moved or (left and lengths[0] < _UNDONE * lengths[1]):
        doubt = (
            f"the optimiser of level {level.name!r} holds its variables by a constraint that is not a bound on each of them: its "
            "steps along the gradient are undone. The implicit derivative ignores it; let the module map free parameters to "
            "variables that satisfy the constraint (softmax, normalisation), or use Unrolled or RealSteps"
        )
    return Bounds(free=free if any(bool(h.any()) for h in held) else (), doubt=doubt)


def _moves(optimizer: Optimizer, variables: Tensors, directions: Sequence[Tensor]) -> Tensors:
    """Return the displacement of each variable by a first step of the optimiser on given gradients, and undo it.

    The gradients are of what the optimiser minimises, relative to the variables and to the learning rate.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    largest = 1.0 + max(float(v.detach().abs().max()) for v in variables if v.numel())
    with _undone(optimizer, variables) as before, torch.no_grad():
        for variable, direction in zip(variables, directions, strict=True):
            group: dict[str, Any] = groups.get(id(variable), {})
            rate = float(group.get("lr") or 1.0)
            size = largest * max(1.0, _REACH / rate) * (1.0 + float(group.get("weight_decay") or 0.0))
            variable.grad = (-1.0 if group.get("maximize") else 1.0) * direction.detach() * size
        try:
            optimizer.step()
        except Exception as error:  # of the user's code
            raise _StepError from error
        return tuple(v.detach() - b for v, b in zip(variables, before, strict=True))


@contextlib.contextmanager
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    kept = dict(vars(optimizer))
    try:
        vars(optimizer).update({name: OrderedDict() for name in kept if name.startswith("_optimizer_step_")})
        yield
    finally:
        vars(optimizer).update(kept)


@contextlib.contextmanager
def _undone(optimizer: Optimizer, variables: Tensors) -> Iterator[Tensors]:
    """Let an optimiser step without state; restore the variables, their `.grad` and the optimiser on exit."""
    values = tuple(v.detach().clone() for v in variables)
    gradients = [v.grad for v in variables]
    attributes, groups = dict(vars(optimizer)), [dict(group) for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    try:
        # Every value is restored, so a graph that was traced at the variables remains valid.
        with _unsafe_preserve_version_counter(variables):
            yield values
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)
        with torch.no_grad():
            for variable, value, gradient in zip(variables, values, gradients, strict=True):
                variable.data.copy_(value)
                variable.grad = gradient
