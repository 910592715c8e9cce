"""The condition at which the steps of a level's optimiser end: the objective with its sign, and the decay of the variables."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Adam, NAdam, Optimizer

from ..errors import ProblemError
from ..shards import any_sharded, largest
from ..tensors import Tensors, add, norm, scale
from .estimator import Block, Vectors
from .term import Term

if TYPE_CHECKING:
    from .level import Level
    from .point import Point

__all__ = ["DecayTerm", "FixedPoint", "level_optimizer"]

#: Variables and gradients at which a step of an unknown optimiser is read; a linear step is known from the first two.
_PROBES = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (2.0, 1.0), (1.0, -2.0))


#: The optimisers of torch.optim that move each entry of a variable by itself.
_ELEMENTWISE = {"SGD", "ASGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop"}
#: Those of them whose fused steps torch has for sharded variables.
_FUSED = {"Adam", "AdamW"}
#: Share of `clip` from which the decay counts as too strong: clipped steps approach the limit from below.
_CLIPPED = 0.99


class DecayTerm(Term):
    """The decay of an optimiser as a term of a level's objective, sum_i c_i <x_i, P_i x_i> / 2.

    Args:
        name: the level.
        point: the point.
        decays: c_i for each variable.
        metrics: P_i for each variable: a number, or a tensor in the shape of the variable.
    """

    closed: ClassVar[bool] = True

    def __init__(self, name: str, point: Point, decays: Sequence[float], metrics: Sequence[float | Tensor]) -> None:
        self._name, self._decays, self._metrics = name, decays, metrics
        self.point, self.label, self.values = point, (name, "decay"), point.values
        self.blocks = frozenset({name})

    def value(self) -> Tensor:
        return self.function(self.values)

    def function(self, values: Vectors) -> Tensor:
        variables = values.get(self._name, self.values[self._name])
        parts = zip(self._decays, self._metrics, variables, strict=True)
        total = torch.stack([c / 2 * (p * x.square()).sum() for c, p, x in parts]).sum()
        ranks = self.point.problem.ranks
        return total / ranks.size if ranks.several else total

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        return {block: self._times(self.values[block]) for block in wanted}

    def product(self, direction: Vectors) -> dict[Block, Tensors]:
        return {self._name: self._times(direction[self._name])}

    def _times(self, vectors: Tensors) -> Tensors:
        parts = zip(self._decays, self._metrics, vectors, strict=True)
        return tuple(c * (p * v.detach()) for c, p, v in parts)


@attrs.frozen(kw_only=True, eq=False)
class FixedPoint:
    """The condition sign grad f + c P x = 0 at which the steps of a level's optimiser end, with P diagonal.

    Coupled decay (SGD, Adam) has c = weight_decay and P = 1. Decoupled decay (AdamW) has P = sqrt(v) + eps, v the second
    moments in the optimiser's state, which are taken to be constants. `maximize` has the sign -1.

    Attributes:
        sign: the sign of the level's own objective f: -1.0 if its optimiser maximises f.
        decays: c for each variable; empty without decay.
        metrics: the diagonal of P for each variable, a number or a tensor.
        doubt: a sentence, if the decay of the optimiser is not known, or if clipping moves the fixed point; else "".

    Source: for decoupled decay, Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2.
    """

    sign: float = 1.0
    decays: tuple[float, ...] = ()
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
        metrics: list[float | Tensor] = []
        for variable, rule in zip(variables, own, strict=True):
            metric = _metric(optimizer, rule.group, variable) if rule.decoupled else 1.0
            if rule.unknown or metric is None:
                doubt, metric = _unknown(level, optimizer, rule), 0.0
            metrics.append(metric)
        if not any(rule.decay for rule in own):
            return cls(sign=sign, doubt=doubt)
        decays = tuple(sign * rule.sign * rule.decay for rule in own)
        doubt = doubt or _stronger_than_clip(level, decays, metrics, variables)
        return cls(sign=sign, decays=decays, metrics=tuple(metrics), doubt=doubt)

    def terms(self, name: str, point: Point) -> tuple[DecayTerm, ...]:
        """Return the decay as a term of the objective of a level, if there is one."""
        return (DecayTerm(name, point, self.decays, self.metrics),) if self.decays else ()

    def gradient(self, raw: Tensors, name: str, point: Point) -> Tensors:
        """Return sign g + c P x for the gradient g of the level's own objective."""
        total = raw if self.sign > 0 else scale(-1.0, raw)
        for term in self.terms(name, point):
            total = add(total, term.derivatives([name])[name])
        return total

    def is_unsteady(self, gradient: Tensors, variables: Tensors, curvature: float) -> bool:
        """Return True if decoupled decay matters, and its second moments are those of the gradient itself.

        The moments then change with the solution, and are no constants.

        Args:
            gradient: sign g + c P x.
            variables: x.
            curvature: the smallest curvature that a solve met.
        """
        parts = zip(self.decays, self.metrics, gradient, variables, strict=False)
        decoupled = [(c, p, g, x.detach()) for c, p, g, x in parts if isinstance(p, Tensor) and p.numel()]
        if not decoupled:
            return False
        decay = norm([c * p * x for c, p, _, x in decoupled])
        own = norm([g - c * p * x for c, p, g, x in decoupled])
        moments = norm([p for _, p, _, _ in decoupled if isinstance(p, Tensor)])
        strongest = max(abs(c) * largest(p) for c, p, _, _ in decoupled if isinstance(p, Tensor))
        return bool(decay > 0.1 * own) and bool(own > 0.5 * moments) and strongest > 0.01 * curvature


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


def _stronger_than_clip(
    level: Level, decays: Sequence[float], metrics: Sequence[float | Tensor], variables: Tensors
) -> str:
    """Return a sentence if a clipped gradient cannot balance the decay at the present variables, else an empty one.

    Where steps end, the gradient after clipping is the negative of the decay, which is therefore at most `clip`.
    """
    if level.clip is None:
        return ""
    size = float(norm([c * p * x.detach() for c, p, x in zip(decays, metrics, variables, strict=True)]))
    if not size > _CLIPPED * level.clip:
        return ""
    return (
        f"the decay of the optimizer of level {level.name!r} has norm {size:.3g}, which a gradient shortened to "
        f"clip={level.clip:g} cannot balance: the steps end elsewhere than a Hessian without clipping assumes; raise clip, or "
        "decay by a regularizer of the level"
    )


def require_all_variables(level: Level, optimizer: Optimizer) -> None:
    """Raise if an optimiser does not train exactly the variables of a level.

    Raises:
        ProblemError: it holds other tensors, or leaves out variables, which would never move.
    """
    if any_sharded(level.parameters):
        _require_elementwise(level, optimizer)
    own = {id(variable): name for name, variable in zip(level.parameter_names, level.parameters, strict=True)}
    held = {id(variable) for group in optimizer.param_groups for variable in group["params"] if variable.requires_grad}
    if foreign := held - own.keys():
        raise ProblemError(
            f"level {level.name!r}: its optimizer also holds {len(foreign)} tensors that are not the level's variables; "
            "give each level an optimizer of its own"
        )
    if left := [name for key, name in own.items() if key not in held]:
        raise ProblemError(
            f"level {level.name!r}: its optimizer leaves out {len(left)} of the level's {len(own)} trainable tensors "
            f"({', '.join(map(repr, left[:3]))}{', ...' * (len(left) > 3)}); give it all that are ever trained, such as by "
            "optimizer=lambda _: torch.optim.SGD(module.parameters(), lr=0.1), or freeze them with requires_grad_(False)"
        )


def _require_elementwise(level: Level, optimizer: Optimizer) -> None:
    """Raise unless an optimiser moves each entry of a sharded variable by itself, as is known of some."""
    kind = type(optimizer).__name__
    if not type(optimizer).__module__.startswith("torch.optim.") or kind not in _ELEMENTWISE:
        state = f"its {kind} may compute with norms or shapes of variables"
    elif getattr(optimizer, "_optimizer_step_post_hooks", None):
        state = f"its {kind} has step hooks, which may project"
    elif kind not in _FUSED and any(group.get("fused") for group in optimizer.param_groups):
        state = f"its {kind} has fused=True, which is not supported"
    else:
        return
    raise ProblemError(
        f"level {level.name!r}: {state}, and each process has a part of its variables, which are sharded; use one of "
        f"torch.optim without hooks: {', '.join(sorted(_ELEMENTWISE))}; only {' and '.join(sorted(_FUSED))} may be fused"
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
        key = ("optimizer", level.name)
        if key not in point.workspace.verified:
            require_all_variables(level, level.optimizer)
            point.workspace.verified.add(key)
        return level.optimizer, ""
    made: Any = point.workspace.optimizers.get(level.name)
    held = () if made is None else {id(p) for group in made.param_groups for p in group["params"]}
    if made is None or any(id(variable) not in held for variable in point.values[level.name]):
        made = level.optimizer(list(level.parameters))  # type: ignore[arg-type]
        if not isinstance(made, Optimizer):
            return None, (
                f"the optimizer of level {level.name!r} is a {type(made).__name__}, whose decay is not known; give one of "
                "torch.optim"
            )
        require_all_variables(level, made)
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
        id(p): nn.Parameter(torch.full((1,), variable, dtype=torch.float64, device="cpu"))
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
