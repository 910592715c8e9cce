"""An optimiser's step as a function: SGD in closed form, others on TorchOpt, which no other file imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..errors import EstimatorError
from ..imports import import_optional
from ..problem import Point, require_all_variables
from ..tensors import Tensors, zeros_like
from .clipping import clipped
from .sgd_step import SGDStep

__all__ = ["OptimizerStep", "Step", "check_transformation"]


def _torchopt() -> Any:
    return import_optional("torchopt", "Unrolled", "'mlopt-torch[unroll]'")


def check_transformation(optimizer: Any) -> None:
    """Raise if TorchOpt is not installed, or if `optimizer` is neither None nor a TorchOpt transformation."""
    kind = _torchopt().base.GradientTransformation
    if optimizer is not None and not isinstance(optimizer, kind):
        raise EstimatorError(
            f"Unrolled: optimizer={optimizer!r} is a {type(optimizer).__name__}; give a TorchOpt transformation, "
            "such as torchopt.adam(1e-3), or None for the level's own"
        )


@attrs.frozen(eq=False)
class Step:
    """The arguments of one step: its number t, x_t, g_t, and the leaves of s_t."""

    number: int
    variables: Tensors
    gradient: Tensors
    memory: Tensors


@attrs.frozen(eq=False)
class _Transformed:
    """A TorchOpt transformation as a step."""

    transformation: Any

    def __call__(self, number: int, variables: Tensors, gradient: Tensors, state: Any) -> tuple[Tensors, Any]:
        along, state = self.transformation.update(list(gradient), state, params=list(variables), inplace=False)
        moved = _torchopt().apply_updates(list(variables), along, inplace=False)
        # The count of Adam's steps is in float64, and takes a variable of shape () with it.
        return tuple(x.to(variable.dtype) for x, variable in zip(moved, variables, strict=True)), state


@attrs.frozen(eq=False)
class _Part:
    """The step of variables that the loss uses in the same steps, and its first state.

    Attributes:
        indices: the variables.
        turns: by step, how many steps they took before; None where the loss does not use them.
        step: their step.
        state: its first state.
    """

    indices: list[int]
    turns: Sequence[int | None]
    step: SGDStep | _Transformed
    state: Any


class OptimizerStep:
    """Phi: the optimiser's step as a function of the variables, the gradient, and the state's leaves; it clips the gradient.

    Args:
        transformation: a TorchOpt transformation, which starts without state; None for the level's own optimiser.
        point: the point.
        name: the level.
        uses: by step, the indices of the variables that the loss uses; a step moves no others.
        fresh: True if the level's own optimiser starts without state, too.
        rates: factors on the steps of all variables, each in a shape that expands to that of the variable; none if empty.
    """

    def __init__(
        self,
        transformation: Any,
        point: Point,
        name: str,
        uses: Sequence[Sequence[int]],
        *,
        fresh: bool,
        rates: Tensors = (),
    ) -> None:
        self._rates = rates
        self._clip = point.problem[name].clip
        self._parts: Sequence[_Part] = _parts(transformation, point, name, _turns(uses), fresh)
        #: True if the step is linear, so that its transpose depends on neither x_t, g_t nor s_t.
        self.is_linear = not rates and self._clip is None and all(isinstance(p.step, SGDStep) for p in self._parts)
        leaves, self._structure = _torchopt().pytree.tree_flatten([part.state for part in self._parts])
        self.initial: Tensors = tuple(leaves)

    def __call__(self, step: Step, rates: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """Return x_{t+1} and the leaves of s_{t+1}, at other rates if they are given."""
        moved = list(step.variables)
        states = _torchopt().pytree.tree_unflatten(self._structure, step.memory)
        gradient = clipped(step.gradient, self._clip)
        for k, part in enumerate(self._parts):
            turn = part.turns[step.number]
            if turn is None:
                continue
            own, along = (tuple(v[i] for i in part.indices) for v in (step.variables, gradient))
            own, states[k] = part.step(turn, own, along, states[k])
            for i, variable in zip(part.indices, own, strict=True):
                moved[i] = variable
        rates = self._rates if rates is None else rates
        if rates:
            triples = zip(step.variables, moved, rates, strict=True)
            moved = [before + rate.to(before) * (after - before) for before, after, rate in triples]
        return tuple(moved), tuple(_torchopt().pytree.tree_leaves(states))

    def pull(self, step: Step, adjoint: Tensors, memory: Tensors) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        """Pull cotangents on x_{t+1} and s_{t+1} (zero if empty) back to x_t, g_t, the leaves of s_t and the rates.

        A linear step needs its number only.
        """
        if self.is_linear:
            return self._pull_linear(step.number, adjoint, memory)
        leaves = (*step.variables, *step.gradient, *step.memory, *self._rates)
        # A step counter is a leaf, too.
        inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in leaves)
        n = len(step.variables)
        last = 2 * n + len(step.memory)
        with torch.enable_grad():
            moved, after = self(Step(step.number, inputs[:n], inputs[n : 2 * n], inputs[2 * n : last]), inputs[last:])
        pairs = zip((*moved, *after), (*adjoint, *(memory or zeros_like(after))), strict=True)
        traced = [(output, vector) for output, vector in pairs if output.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [output for output, _ in traced],
                [x for x in inputs if x.requires_grad],
                grad_outputs=[vector for _, vector in traced],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        pulled = tuple(next(gradients) if x.requires_grad else torch.zeros_like(x) for x in inputs)
        return pulled[:n], pulled[n : 2 * n], pulled[2 * n : last], pulled[last:]

    def _pull_linear(self, number: int, adjoint: Tensors, memory: Tensors) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        pulled, along = dict(enumerate(adjoint)), dict[int, Tensor]()
        states, start = list[Tensor](), 0
        for part in self._parts:
            assert isinstance(part.step, SGDStep)
            stop, turn = start + len(part.state), part.turns[number]
            if turn is None:
                state = memory[start:stop] or zeros_like(part.state)
            else:
                own, slope, state = part.step.pull(turn, tuple(adjoint[i] for i in part.indices), memory[start:stop])
                pulled |= zip(part.indices, own, strict=True)
                along |= zip(part.indices, slope, strict=True)
            states, start = [*states, *state], stop
        slopes = (along[i] if i in along else torch.zeros_like(x) for i, x in enumerate(adjoint))
        return tuple(pulled.values()), tuple(slopes), tuple(states), ()


def _turns(uses: Sequence[Sequence[int]]) -> dict[int, tuple[int | None, ...]]:
    """Return, for each variable that some step uses, how many steps it took before each step, or None if it takes no part."""
    if all(used == uses[0] for used in uses):
        return dict.fromkeys(uses[0], tuple(range(len(uses))))
    turns, taken = {}, [frozenset(used) for used in uses]
    for i in sorted(frozenset().union(*taken)):
        counts = accumulate((i in used for used in taken), initial=0)
        turns[i] = tuple(count if i in used else None for used, count in zip(taken, counts, strict=False))
    return turns


def _parts(
    transformation: Any, point: Point, name: str, turns: dict[int, tuple[int | None, ...]], fresh: bool
) -> list[_Part]:
    """Return the given transformation or, if it is None, the translation of the level's optimiser."""
    level = point.problem[name]
    patterns = list(dict.fromkeys(turns.values()))
    if transformation is not None:
        if len(patterns) > 1:
            raise EstimatorError(
                f"level {name!r}: its loss uses other parameters in some virtual steps than in others, and a TorchOpt "
                "transformation would also step idle ones; leave out Unrolled(optimizer=...) to take the level's own optimiser"
            )
        own = [level.parameters[i].detach() for i in turns]
        step = _Transformed(_settled(transformation, own))
        return [_Part([*turns], pattern, step, transformation.init(own)) for pattern in patterns]
    optimizer: Any = point.optimizer(name) or level.optimizer
    if optimizer is None:
        raise EstimatorError(
            f"level {name!r}: optimizer=None, and Unrolled needs one for its virtual steps; give the level an optimiser, "
            "or pass Unrolled(optimizer=...) a TorchOpt transformation, such as torchopt.sgd(0.1)"
        )
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer(list(level.parameters))
    require_all_variables(level, optimizer)
    if optimizer._optimizer_step_post_hooks or optimizer._optimizer_step_pre_hooks:
        raise EstimatorError(
            f"level {name!r}: its {type(optimizer).__name__} has step hooks, such as a projection, which the virtual steps of "
            "Unrolled would leave out; remove them, or use RealSteps or an implicit estimator"
        )
    translate = _TRANSLATIONS.get(type(optimizer))
    if translate is None or any(group.get("amsgrad") for group in optimizer.param_groups):
        raise EstimatorError(
            f"level {name!r}: Unrolled cannot take virtual steps of {type(optimizer).__name__}"
            f"{' with amsgrad' if translate else ''}, only of torch.optim's SGD, Adam and AdamW (without amsgrad); pass a "
            "TorchOpt transformation, such as Unrolled(optimizer=torchopt.rmsprop(1e-3))"
        )
    position = {id(variable): i for i, variable in enumerate(level.parameters) if i in turns}
    parts = []
    for group, pattern in product(optimizer.param_groups, patterns):
        members = [v for v in group["params"] if id(v) in position and turns[position[id(v)]] == pattern]
        states = [{} if fresh else optimizer.state.get(v, {}) for v in members]
        for live in (False, True):
            # A variable without state takes a first step; one with state resumes from it.
            chosen = [(v, s) for v, s in zip(members, states, strict=True) if any(map(_is_set, s.values())) == live]
            if chosen:
                own, own_states = [v.detach() for v, _ in chosen], [s for _, s in chosen]
                places = [position[id(v)] for v, _ in chosen]
                parts.append(_Part(places, pattern, *translate(group, own, own_states, live)))
    return parts


def _is_set(value: Any) -> bool:
    return value is not None


def _settled(transformation: Any, variables: list[Tensor]) -> Any:
    """Return a transformation after a step on zeros, since TorchOpt's momentum treats its very first call differently."""
    with torch.no_grad():
        zeros = [torch.zeros_like(v) for v in variables]
        transformation.update(zeros, transformation.init(variables), params=variables, inplace=False)
    return transformation


def _sgd(group: dict[str, Any], own: list[Tensor], states: list[dict[str, Any]], live: bool) -> tuple[SGDStep, Tensors]:
    step = SGDStep.of(group, live=live)
    return step, step.initial(tuple(own), states)


def _adam(
    group: dict[str, Any], own: list[Tensor], states: list[dict[str, Any]], live: bool
) -> tuple[_Transformed, Any]:
    settings: dict[str, Any] = {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
    settings |= {"betas": tuple(map(float, group["betas"])), "maximize": bool(group["maximize"])}
    make = _torchopt().adamw if group.get("decoupled_weight_decay") else _torchopt().adam
    # The root has no derivative at zero, the second moment of an idle unit. With this eps_root it has one; no step changes.
    adam = make(eps_root=max(torch.finfo(v.dtype).tiny for v in own), **settings)
    # The count is a float64 since TorchOpt raises the betas to it; a whole number would yield the default dtype.
    counts = [
        torch.as_tensor(s["step"] if live else 0, dtype=torch.float64, device=v.device)
        for v, s in zip(own, states, strict=True)
    ]
    moments = {"mu": [s["exp_avg"] for s in states], "nu": [s["exp_avg_sq"] for s in states]} if live else {}
    return _Transformed(adam), _filled(adam.init(own), count=counts, **moments)


def _filled(state: tuple[Any, ...], **fields: list[Tensor]) -> tuple[Any, ...]:
    """Return the state of a chain, with these fields set in the one transformation that has them."""
    return tuple(s._replace(**fields) if fields.keys() <= set(s._fields) else s for s in state)


_TRANSLATIONS: dict[type[Optimizer], Callable[..., tuple[SGDStep | _Transformed, Any]]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
}
