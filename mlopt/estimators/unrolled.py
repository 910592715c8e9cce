"""Unrolled differentiation: the solution is where some optimiser steps lead, and its pullback is the adjoint of those steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..errors import EstimatorError, NonFiniteError
from ..problem import Block, Estimator, Linearization, Point, Report, Vectors, level_terms, restored
from ..tensors import Tensors, add, is_finite, norm, zeros_like
from ..validation import at_least, one_of
from .products import PRODUCTS

__all__ = ["Unrolled"]

#: An adjoint that has grown by this factor over the steps says more about rounding than about the solution.
_DIVERGED = 1e4


def _torchopt() -> Any:
    try:
        import torchopt
    except ImportError as error:
        raise EstimatorError(
            f"Unrolled needs TorchOpt's differentiable optimisers ({error}): pip install 'mlopt-torch[unroll]'"
        ) from error
    return torchopt


def _whole_or_none(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"Unrolled: {attribute.name}={value!r}; it must be a whole number >= 1, or None")


@attrs.frozen
class Unrolled(Estimator):
    """Take the solution to be where T steps of the level's optimiser lead, and differentiate through the steps.

    With x_0 the present variables, g_t = grad_x f(x_t, u) and (x_{t+1}, s_{t+1}) = Phi(x_t, g_t, s_t) the optimiser's step,
    the solution map is u -> x_T(u). The steps are virtual: while an outer objective is evaluated the level's variables are
    at x_T, and afterwards they are back, bit for bit. So the hypergradient is the exact derivative of F(u, x_T(u)), with
    everything evaluated on the level's one batch and random state. The adjoint runs through the steps backwards,

        (a_x, a_g, lambda_s) <- Phi'(x_t, g_t, s_t)^T (lambda_x, lambda_s)
        lambda_x <- a_x + (d2f / dx2) a_g,    u_bar <- u_bar + (d2f / du dx) a_g

    with one product a step, and the graph of one step in memory. A parameter that the loss does not use is not stepped.

    Args:
        steps: T.
        checkpoint_every: x_t and s_t are kept for every so many steps, and the steps between are taken again on the way back,
            where they are held with g_t until the adjoint has passed them. With 1 nothing is taken again, and all of it is held
            for every step; None takes the square root of T.
        products: "autograd", "forward" or "finite_difference".
        optimizer: a TorchOpt transformation, such as `torchopt.adam(1e-3)`, which starts afresh each time; when None,
            the level's own optimiser, which must be torch.optim's SGD, Adam or AdamW. Its hyperparameters are those of now,
            and, inside `solve` or where the level holds an optimiser, so are its momenta.
            (Where a gradient component may be exactly zero, TorchOpt's Adam needs an `eps_root`.)
        start: a level whose variables the steps start from, in place of the present ones; its shapes are the same, and the
            level's loss names it. It receives the adjoint at x_0, and the optimiser starts afresh: this is MAML.

    Raises:
        EstimatorError: TorchOpt is not installed.

    Source: Maclaurin et al. 2015 (arXiv 1502.03492); Franceschi et al. 2017 (arXiv 1703.01785); Finn et al. 2017 (arXiv
    1703.03400) for `start`.

    Example:
        >>> mlopt.Level("classifier", network, loss, optimizer=partial(SGD, lr=0.1), estimator=mlopt.Unrolled(20))
    """

    steps: int = attrs.field(default=10, validator=at_least(1))
    checkpoint_every: int | None = attrs.field(default=None, validator=_whole_or_none, kw_only=True)
    products: str = attrs.field(default="autograd", validator=one_of(*PRODUCTS), kw_only=True)
    optimizer: Any = attrs.field(default=None, kw_only=True)
    start: str | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        kind = _torchopt().base.GradientTransformation
        if self.optimizer is not None and not isinstance(self.optimizer, kind):
            raise EstimatorError(
                f"Unrolled: optimizer={self.optimizer!r} is a {type(self.optimizer).__name__}; give a TorchOpt transformation, "
                "such as torchopt.adam(1e-3), or None for the level's own"
            )

    @contextlib.contextmanager
    def lookahead(self, point: Point, level: str) -> Iterator[None]:
        self._refuse_levels_inside(point, level)
        with restored(point.problem[level].parameters) as present:
            with point.untouched():
                point.ahead[level] = _Trajectory(self, point, level, present)
            yield

    def linearize(self, point: Point, level: str) -> Linearization:
        self._refuse_levels_inside(point, level)
        return _Unrolling(self, point, level)

    def __str__(self) -> str:
        start = f" from {self.start}" if self.start else ""
        return f"{self.steps} unrolled step{'s' * (self.steps != 1)}{start} with {self.products} products"


class _Unrolling(Linearization):
    """The derivative of u -> x_T(u)."""

    def __init__(self, rule: Unrolled, point: Point, name: str) -> None:
        self._rule, self._point, self._name = rule, point, name
        self.blocks, self.arguments = (name,), point.problem.graph[name].arguments
        self.report = Report(estimator=str(rule))

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        values = self._point.values
        found: dict[Block, Tensors] = {argument: zeros_like(values[argument]) for argument in wanted}
        adjoint = cotangent.get(self._name, ())
        if not found or not any(bool(v.any()) for v in adjoint):
            return found
        size = float(norm(adjoint))
        with restored(values[self._name]) as present:
            trajectory = self._point.ahead.get(self._name)
            if trajectory is None:
                trajectory = _Trajectory(self._rule, self._point, self._name, present)
            memory: Tensors = ()
            for step in trajectory.backwards():
                adjoint, along, memory = trajectory.update.pull(step, adjoint, memory)
                _put(values[self._name], step.variables)
                product = self._product(along, wanted)
                adjoint = add(adjoint, product.pop(self._name))
                found |= {argument: add(found[argument], vectors) for argument, vectors in product.items()}
        if self._rule.start in found:
            found[self._rule.start] = add(found[self._rule.start], adjoint)
        self._record(float(norm(adjoint)) / size)
        return found

    def _product(self, along: Tensors, wanted: Sequence[str]) -> dict[Block, Tensors]:
        """Return H a_g and the mixed products at the live variables. A trace is of one point: each step has its own."""
        total: dict[Block, Tensors] = {self._name: zeros_like(along)}
        for term in level_terms(self._point, self._point.problem[self._name]):
            product = PRODUCTS[self._rule.products](term)
            asked = [block for block in (self._name, *wanted) if block in term.blocks]
            for block, vectors in product({self._name: along}, asked).items():
                total[block] = add(total[block], vectors) if block in total else vectors
            self.report.step = product.step or self.report.step
        return total

    def _record(self, growth: float) -> None:
        self.report.iterations += self._rule.steps
        self.report.products += self._rule.steps
        if not growth < _DIVERGED:
            self.report.remarks = (
                f"the adjoint grew by a factor of {growth:.3g} over {self._rule.steps} steps: they diverge, or nearly",
            )


@attrs.frozen(eq=False)
class _Step:
    """Where one step was taken: its number t, x_t, g_t, and the leaves of s_t."""

    number: int
    variables: Tensors
    gradient: Tensors
    memory: Tensors


class _Trajectory:
    """x_0, x_1, ..., x_T: walked forwards on construction, which leaves the live variables at x_T, and then backwards.

    Args:
        rule: the estimator.
        point: where.
        name: the level.
        present: a copy of its variables.

    Attributes:
        update: Phi.
    """

    update: _Update

    def __init__(self, rule: Unrolled, point: Point, name: str, present: Tensors) -> None:
        self._rule, self._point, self._level = rule, point, point.problem[name]
        self._terms = level_terms(point, self._level)
        self._live = self._level.parameters
        every = rule.checkpoint_every or math.isqrt(rule.steps - 1) + 1
        # The steps since the last checkpoint are held from the first.
        self._every = rule.steps if every == 1 else every
        variables = present if rule.start is None else self._start(rule.start)
        memory: Tensors = ()
        self._kept: list[tuple[Tensors, Tensors]] = []
        self._segment: list[_Step] = []
        for begin in range(0, rule.steps, self._every):
            self._kept.append((variables, memory))
            last = begin + self._every >= rule.steps
            variables, memory = self._walk(begin, self._segment if last else None)
        if not is_finite(variables):
            raise NonFiniteError(
                f"level {name!r}: {rule.steps} virtual steps led to variables that are not finite; take fewer or shorter steps"
            )
        _put(self._live, variables)

    def _walk(self, begin: int, steps: list[_Step] | None) -> tuple[Tensors, Tensors]:
        """Take the steps from one checkpoint to the next, note them where asked to, and return where they lead."""
        variables, memory = self._kept[begin // self._every]
        for t in range(begin, min(begin + self._every, self._rule.steps)):
            _put(self._live, variables)
            gradient = self._gradient()
            if t == 0:
                used = [i for i, g in enumerate(gradient) if g is not None]
                self.update = _update(self._rule, self._point, self._level.name, used)
                memory = self.update.initial
            filled = tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradient, variables, strict=True))
            step = _Step(t, variables, filled, memory)
            if steps is not None:
                steps.append(step)
            with torch.no_grad():
                variables, memory = self.update(step)
        return variables, memory

    def _gradient(self) -> tuple[Tensor | None, ...]:
        value = sum((term.value() for term in self._terms[1:]), self._terms[0].value())
        if not value.requires_grad:
            return (None,) * len(self._live)
        return torch.autograd.grad(value, self._live, allow_unused=True)

    def backwards(self) -> Iterator[_Step]:
        """Yield the steps from the last to the first, and forget each: once only."""
        while self._kept:
            if not self._segment:
                self._walk((len(self._kept) - 1) * self._every, self._segment)
            self._kept.pop()
            while self._segment:
                yield self._segment.pop()

    def _start(self, start: str) -> Tensors:
        name, own = self._level.name, [tuple(x.shape) for x in self._live]
        if start not in self._point.problem.graph[name].arguments:
            raise EstimatorError(
                f"level {name!r}: Unrolled(start={start!r}), and its loss does not refer to {start!r}; make it one of the loss's "
                "keyword-only parameters"
            )
        variables = self._point.problem[start].parameters
        shapes = [tuple(x.shape) for x in variables]
        if shapes != own:
            raise EstimatorError(
                f"level {name!r}: Unrolled(start={start!r}), whose parameters have shapes {shapes}, not {own}; give both levels "
                "modules of one kind"
            )
        return tuple(x.detach().to(own) for x, own in zip(variables, self._live, strict=True))


def _put(live: Tensors, values: Tensors) -> None:
    torch._foreach_copy_([variable.data for variable in live], list(values))


@attrs.frozen(eq=False)
class _Part:
    """A transformation for some of the variables: what it is in the first step and in later ones, and its first state."""

    indices: list[int]
    first: Any
    later: Any
    state: Any


class _Update:
    """Phi: the optimiser's step as a function of the variables, the gradient, and the state's leaves.

    Args:
        parts: transformations of disjoint sets of variables.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        leaves, self._structure = _torchopt().pytree.tree_flatten([part.state for part in parts])
        self.initial: Tensors = tuple(leaves)

    def __call__(self, step: _Step) -> tuple[Tensors, Tensors]:
        """Return x_{t+1} and the leaves of s_{t+1}."""
        torchopt = _torchopt()
        moved = list(step.variables)
        states = torchopt.pytree.tree_unflatten(self._structure, step.memory)
        for k, part in enumerate(self._parts):
            transformation = part.later if step.number else part.first
            own = [step.variables[i] for i in part.indices]
            along = [step.gradient[i] for i in part.indices]
            along, states[k] = transformation.update(along, states[k], params=own, inplace=False)
            for i, variable in zip(part.indices, torchopt.apply_updates(own, along, inplace=False), strict=True):
                moved[i] = variable
        return tuple(moved), tuple(torchopt.pytree.tree_leaves(states))

    def pull(self, step: _Step, adjoint: Tensors, memory: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Return the cotangents on x_t, g_t and the leaves of s_t, of those on x_{t+1} and s_{t+1} (zero when empty)."""
        leaves = (*step.variables, *step.gradient, *step.memory)
        # A step counter is a leaf, too.
        inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in leaves)
        n = len(step.variables)
        with torch.enable_grad():
            moved, after = self(_Step(step.number, inputs[:n], inputs[n : 2 * n], inputs[2 * n :]))
        pairs = zip((*moved, *after), (*adjoint, *(memory or zeros_like(after))), strict=True)
        traced = [(output, vector) for output, vector in pairs if output.requires_grad]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in traced],
                [x for x in inputs if x.requires_grad],
                grad_outputs=[vector for _, vector in traced],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        pulled = tuple(next(found) if x.requires_grad else torch.zeros_like(x) for x in inputs)
        return pulled[:n], pulled[n : 2 * n], pulled[2 * n :]


def _update(rule: Unrolled, point: Point, name: str, used: list[int]) -> _Update:
    """Return Phi for the variables that are used: the transformation that was given, or the level's optimiser translated."""
    level = point.problem[name]
    if rule.optimizer is not None:
        own = [level.parameters[i].detach() for i in used]
        return _Update([_Part(used, *(_settled(rule.optimizer, own),) * 2, rule.optimizer.init(own))])
    optimizer: Any = point.optimizers.get(name, level.optimizer)
    if optimizer is None:
        raise EstimatorError(
            f"level {name!r}: optimizer=None, and Unrolled takes its virtual steps with it; give the level one, or give "
            "Unrolled(optimizer=...) a TorchOpt transformation, such as torchopt.sgd(0.1)"
        )
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer(list(level.parameters))
    translate = _TRANSLATIONS.get(type(optimizer))
    if translate is None or any(group.get("amsgrad") for group in optimizer.param_groups):
        raise EstimatorError(
            f"level {name!r}: Unrolled cannot take virtual steps of {type(optimizer).__name__}"
            f"{' with amsgrad' if translate else ''}, only of torch.optim's SGD, Adam and AdamW (without amsgrad); give it a "
            "TorchOpt transformation, such as Unrolled(optimizer=torchopt.rmsprop(1e-3))"
        )
    position = {id(variable): i for i, variable in enumerate(level.parameters) if i in used}
    parts = []
    for group in optimizer.param_groups:
        members = [v for v in group["params"] if id(v) in position]
        states = [{} if rule.start is not None else optimizer.state.get(v, {}) for v in members]
        for live in (False, True):
            # What has no state yet takes a first step; what has one goes on from it.
            chosen = [(v, s) for v, s in zip(members, states, strict=True) if any(map(_is_set, s.values())) == live]
            if chosen:
                own, own_states = [v.detach() for v, _ in chosen], [s for _, s in chosen]
                parts.append(_Part([position[id(v)] for v, _ in chosen], *translate(group, own, own_states, live)))
    return _Update(parts)


def _is_set(value: Any) -> bool:
    return value is not None


def _settled(transformation: Any, variables: list[Tensor]) -> Any:
    """Return a transformation after a step on zeros: TorchOpt's momentum treats its first call ever unlike later ones."""
    with torch.no_grad():
        zeros = [torch.zeros_like(v) for v in variables]
        transformation.update(zeros, transformation.init(variables), params=variables, inplace=False)
    return transformation


def _sgd(group: dict[str, Any], own: list[Tensor], states: list[dict[str, Any]], live: bool) -> tuple[Any, Any, Any]:
    settings = {key: float(group[key]) for key in ("lr", "momentum", "weight_decay")}
    settings |= {key: bool(group[key]) for key in ("nesterov", "maximize")}
    sgd = _torchopt().sgd
    later = _settled(sgd(dampening=float(group["dampening"]), **settings), own)
    # The first gradient enters torch's momentum undamped.
    first = later if live else _settled(sgd(dampening=0.0, **settings), own)
    traces = {"trace": [s["momentum_buffer"] for s in states]} if live else {}
    return first, later, _filled(later.init(own), **traces)


def _adam(group: dict[str, Any], own: list[Tensor], states: list[dict[str, Any]], live: bool) -> tuple[Any, Any, Any]:
    settings: dict[str, Any] = {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
    settings |= {"betas": tuple(map(float, group["betas"])), "maximize": bool(group["maximize"])}
    make = _torchopt().adamw if group.get("decoupled_weight_decay") else _torchopt().adam
    # The root has no derivative at zero, where the second moment of an idle unit is. This one's has, and no step is changed.
    adam = make(eps_root=max(torch.finfo(v.dtype).tiny for v in own), **settings)
    # A floating count: TorchOpt raises the betas to it, which in whole numbers would be in the default dtype.
    counts = [
        torch.as_tensor(s["step"] if live else 0, dtype=torch.float64, device=v.device)
        for v, s in zip(own, states, strict=True)
    ]
    moments = {"mu": [s["exp_avg"] for s in states], "nu": [s["exp_avg_sq"] for s in states]} if live else {}
    return adam, adam, _filled(adam.init(own), count=counts, **moments)


def _filled(state: tuple[Any, ...], **fields: list[Tensor]) -> tuple[Any, ...]:
    """Return the state of a chain with the fields of the one transformation that has them."""
    return tuple(s._replace(**fields) if fields.keys() <= set(s._fields) else s for s in state)


_TRANSLATIONS = {SGD: _sgd, Adam: _adam, AdamW: _adam}
