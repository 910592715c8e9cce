"""The condition at which the steps of a level's optimiser end: the objective with its sign, and the decay of the variables."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Adam, NAdam, Optimizer

from ..tensors import Tensors, norm, subtract
from .estimator import Block, Vectors
from .term import Term

if TYPE_CHECKING:
    from .level import Level
    from .point import Point

__all__ = ["DecayTerm", "FixedPoint", "level_optimizer"]

#: Variables and gradients at which a step of an unknown optimiser is read; a linear step is known from the first two.
_PROBES = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (2.0, 1.0), (1.0, -2.0))


class DecayTerm(Term):
    """The decay of an optimiser as a term of a level's objective, sum_i <x_i, s_i x_i> / 2.

    Args:
        name: the level.
        values: the live variables, by block.
        strengths: s_i for each variable: a number, or a tensor in the shape of the variable.
    """

    closed: ClassVar[bool] = True

    def __init__(self, name: str, values: Mapping[Block, Tensors], strengths: Sequence[float | Tensor]) -> None:
        self._name, self._strengths = name, strengths
        self.blocks, self.values = frozenset({name}), values

    def value(self) -> Tensor:
        return self.function(self.values)

    def function(self, values: Vectors) -> Tensor:
        variables = values.get(self._name, self.values[self._name])
        pairs = zip(self._strengths, variables, strict=True)
        return torch.stack([(s * x.square()).sum() / 2 for s, x in pairs]).sum()

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        return {block: self._times(self.values[block]) for block in wanted}

    def product(self, direction: Vectors) -> dict[Block, Tensors]:
        return {self._name: self._times(direction[self._name])}

    def _times(self, vectors: Tensors) -> Tensors:
        return tuple(s * v.detach() for s, v in zip(self._strengths, vectors, strict=True))


@attrs.frozen(kw_only=True, eq=False)
class FixedPoint:
    """The condition sign grad f + s x = 0 at which the steps of a level's optimiser end, s a diagonal matrix.

    Coupled decay (SGD, Adam) has s = weight_decay. Decoupled decay (AdamW) has s = weight_decay (sqrt(v) + eps), v the second
    moments in the optimiser's state, which are taken to be constants. `maximize` has the sign -1.

    Attributes:
        sign: the sign of the level's own objective f: -1.0 if its optimiser maximises f.
        strengths: the diagonal of s, for each variable a number or a tensor; empty without decay.
        metrics: sqrt(v) + eps for each variable, zero where the decay is coupled; empty without decoupled decay.
        doubt: a sentence, if the decay of the optimiser is not known; else "".

    Source: for decoupled decay, Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2.
    """

    sign: float = 1.0
    strengths: tuple[float | Tensor, ...] = ()
    metrics: tuple[float | Tensor, ...] = ()
    doubt: str = ""

    @classmethod
    def of(cls, level: Level, point: Point) -> FixedPoint:
        """Return the condition for a level at a point; a level without an optimiser has neither sign nor decay."""
        optimizer, doubt = _optimizer(level, point)
        if optimizer is None:
            return cls(doubt=doubt)
        variables = point.values[level.name]
        if _is_of_torch(optimizer):
            rules = [_rule(optimizer, group) for group in optimizer.param_groups]
        else:
            rules = _probed(level, point, optimizer)
        if rules == [_PLAIN] * len(rules):
            return cls()
        by_variable = {
            id(p): rule for rule, group in zip(rules, optimizer.param_groups, strict=True) for p in group["params"]
        }
        own = [by_variable.get(id(variable), _PLAIN) for variable in variables]
        sign = -1.0 if all(rule.sign < 0 for rule in own) else 1.0
        strengths: list[float | Tensor] = []
        metrics: list[float | Tensor] = []
        for variable, rule in zip(variables, own, strict=True):
            metric = 1.0 if not rule.decoupled else _metric(optimizer, rule.group, variable)
            if rule.unknown or metric is None:
                doubt, metric = _unknown(level, optimizer, rule), 0.0
            strengths.append(sign * rule.sign * rule.decay * metric)
            metrics.append(metric if rule.decoupled else 0.0)
        decays = any(isinstance(s, Tensor) or s for s in strengths)
        decoupled = any(isinstance(m, Tensor) for m in metrics)
        return cls(
            sign=sign,
            strengths=tuple(strengths) if decays else (),
            metrics=tuple(metrics) if decoupled else (),
            doubt=doubt,
        )

    def gradient(self, raw: Tensors, variables: Tensors) -> Tensors:
        """Return sign g + s x for the gradient g of the level's own objective."""
        signed = raw if self.sign > 0 else tuple(-g for g in raw)
        if not self.strengths:
            return signed
        return tuple(g + s * x.detach() for g, s, x in zip(signed, self.strengths, variables, strict=True))

    def is_unsteady(self, gradient: Tensors, variables: Tensors, curvature: float) -> bool:
        """Return True if decoupled decay matters, and its second moments are those of the gradient itself.

        The moments then change with the solution, and are no constants.

        Args:
            gradient: sign g + s x.
            variables: x.
            curvature: the smallest curvature that a solve met.
        """
        if not self.metrics:
            return False
        decay = [s * x.detach() for s, x in zip(self.strengths, variables, strict=True)]
        own = norm(subtract(gradient, decay))
        moments = norm(
            [m if isinstance(m, Tensor) else torch.zeros_like(x) for m, x in zip(self.metrics, variables, strict=True)]
        )
        strongest = max(float(s.abs().max()) if isinstance(s, Tensor) and s.numel() else 0.0 for s in self.strengths)
        return bool(norm(decay) > 0.1 * own) and bool(own > 0.5 * moments) and strongest > 0.01 * curvature


@attrs.frozen(kw_only=True)
class _Rule:
    """The decay and the sign of one parameter group."""

    sign: float = 1.0
    decay: float = 0.0
    decoupled: bool = False
    unknown: bool = False
    group: Any = attrs.field(default=None, eq=False)


_PLAIN = _Rule()


def _is_of_torch(optimizer: Optimizer) -> bool:
    """Return True if an optimiser is one of torch.optim, or derives from one."""
    return any(base.__module__.startswith("torch.optim.") for base in type(optimizer).__mro__ if base is not Optimizer)


def _rule(optimizer: Optimizer, group: dict[str, Any]) -> _Rule:
    """Return the rule of a group of an optimiser of torch.optim, from its options."""
    sign = -1.0 if group.get("maximize") else 1.0
    # ASGD shrinks the variables by `lambd` as well, in proportion to its step.
    decay = float(group.get("weight_decay") or 0.0) + float(group.get("lambd") or 0.0)
    if decay == 0.0:
        return _Rule(sign=sign)
    decoupled = bool(group.get("decoupled_weight_decay")) or _kind(optimizer) in ("Adafactor", "Muon")
    return _Rule(sign=sign, decay=decay, decoupled=decoupled, group=group)


def _kind(optimizer: Optimizer) -> str:
    """Return the name of the class of torch.optim that an optimiser is, or derives from."""
    return next(base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim."))


@torch.no_grad()
def _metric(optimizer: Optimizer, group: dict[str, Any], variable: Tensor) -> Tensor | float | None:
    """Return sqrt(v) + eps of Adam, corrected for its bias; zero for a variable that takes no step; None if unknown."""
    if not isinstance(optimizer, Adam | NAdam):
        return None
    state = optimizer.state.get(variable)
    if not state:
        return None if not optimizer.state else 0.0
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    _, second = group["betas"]
    step = state["step"]
    step = step.to(square.device) if isinstance(step, Tensor) else step
    metric: Tensor = ((square / (1.0 - second**step)).sqrt() + group["eps"]).to(variable)
    return metric


def _unknown(level: Level, optimizer: Optimizer, rule: _Rule) -> str:
    kind = type(optimizer).__name__
    if rule.decoupled and isinstance(optimizer, Adam | NAdam):
        return (
            f"the decoupled weight_decay={rule.decay:g} of {kind} is left out of the Hessian of level {level.name!r}: it is "
            "scaled by second moments, which a new optimiser does not have; give the level an optimiser instance that has "
            "taken its steps, use solve, or use Adam with decoupled_weight_decay=False"
        )
    return (
        f"the decay of {kind} is left out of the Hessian of level {level.name!r}: the point at which its steps end is not known; "
        "set it to zero and decay by a regularizer of the level, or use SGD, Adam or AdamW"
    )


def level_optimizer(level: Level, point: Point) -> Optimizer | None:
    """Return the optimiser of a level at a point, or None."""
    return _optimizer(level, point)[0]


def _optimizer(level: Level, point: Point) -> tuple[Optimizer | None, str]:
    """Return the optimiser of a level: of the run, the instance of the level, or one from its factory, made once."""
    live = point.optimizer(level.name)
    if live is not None or level.optimizer is None:
        return live, ""
    if isinstance(level.optimizer, Optimizer):
        return level.optimizer, ""
    made: Any = point.workspace.optimizers.get(level.name)
    held = () if made is None else {id(p) for group in made.param_groups for p in group["params"]}
    if made is None or any(id(variable) not in held for variable in level.parameters):
        made = level.optimizer(list(level.parameters))  # type: ignore[arg-type]
        if not isinstance(made, Optimizer):
            return None, (
                f"the optimizer of level {level.name!r} is a {type(made).__name__}, whose decay is not known; give one of "
                "torch.optim"
            )
        point.workspace.optimizers[level.name] = made
    return made, ""


def _probed(level: Level, point: Point, optimizer: Optimizer) -> list[_Rule]:
    """Return the rule of each group of an optimiser of unknown kind, from its steps on single numbers; read once."""
    rules = point.workspace.rules
    if level.name not in rules:
        rules[level.name] = _probe(optimizer)
    return list(rules[level.name])


def _probe(optimizer: Optimizer) -> list[_Rule]:
    """Read the steps of a copy without state on numbers: they are -a g - b x, or do not decay, or are unknown.

    A step that is linear ends where sign(a) g + (b / |a|) x = 0, whether the decay is coupled or not.
    """
    try:
        steps = [_step(optimizer, variable, gradient) for variable, gradient in _PROBES]
    except Exception:  # an optimiser may refuse numbers
        return [_Rule(unknown=True)] * len(optimizer.param_groups)
    rules = []
    for moved in zip(*steps, strict=True):
        along, decay = -moved[0], -moved[1]
        linear = all(
            abs(-along * g - decay * x - m) <= 1e-6 * (abs(along) + abs(decay))
            for (x, g), m in zip(_PROBES, moved, strict=True)
        )
        sign = -1.0 if along < 0 else 1.0
        if decay == 0.0 or (linear and along != 0.0):
            rules.append(_Rule(sign=sign, decay=decay / abs(along) if decay else 0.0))
        else:
            rules.append(_Rule(sign=sign, decay=0.0, unknown=True))
    return rules


def _step(optimizer: Optimizer, variable: float, gradient: float) -> list[float]:
    """Return the first step, for each group, of a copy of an optimiser on a single number."""
    numbers = {
        id(p): nn.Parameter(torch.full((1,), variable, dtype=torch.float64))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    fresh: Any = defaultdict(dict)
    other = copy.deepcopy(optimizer, {**numbers, id(optimizer.state): fresh})
    for number in numbers.values():
        number.grad = torch.full_like(number, gradient)
    with torch.no_grad():
        other.step()
    return [float(numbers[id(group["params"][0])].detach()) - variable for group in optimizer.param_groups]
