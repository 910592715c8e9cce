"""A level: one problem in its variables, with its loss or condition, data, optimiser or solver, and estimator."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import ProblemError
from ..shards import units
from ..tensors import Tensors
from ..validation import is_positive, is_whole
from .estimator import Estimator
from .response import Response
from .signature import references

__all__ = ["Level", "Variables", "variables"]

OptimizerFactory = Callable[[Iterator[Parameter]], Optimizer]


class Variables(nn.Module):
    """A bare tensor as a module: calling it returns the tensor, a trainable parameter named `value`.

    Example:
        >>> mlopt.Variables(torch.ones(2)).value.requires_grad
        True
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = Parameter(value.detach().clone())

    def forward(self) -> Tensor:
        return self.value


def variables(tensor: Tensor) -> Variables:
    """Wrap a tensor as a module, so that it can be the variables of a level.

    Args:
        tensor: starting values, of a floating dtype and any shape; copied.

    Returns:
        A module with one parameter, `value`; calling it returns that parameter.

    Example:
        >>> decay = mlopt.variables(torch.zeros(3))
        >>> decay().exp()
        tensor([1., 1., 1.], grad_fn=<ExpBackward0>)
    """
    return Variables(tensor)


def _check_name(level: Level, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value.isidentifier() or keyword.iskeyword(value):
        raise ProblemError(
            f"Level: name={value!r}; it must be a valid Python name, since losses refer to it by a keyword-only parameter"
        )
    if value == "evaluation":
        raise ProblemError(
            "Level: name='evaluation', which names the columns of `evaluate` in a history; give another name"
        )


def _check_type(kind: type, remedy: str) -> Callable[[Level, attrs.Attribute[Any], object], None]:
    def check(level: Level, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind):
            raise ProblemError(
                f"level {level.name!r}: {attribute.name}={value!r} is a {type(value).__name__}; {remedy}"
            )

    return check


def _check_count(least: int) -> Callable[[Level, attrs.Attribute[int], object], None]:
    def check(level: Level, attribute: attrs.Attribute[int], value: object) -> None:
        if not is_whole(value, least):
            raise ProblemError(
                f"level {level.name!r}: {attribute.name}={value!r}; it must be a whole number >= {least}"
            )

    return check


def _check_clip(level: Level, attribute: attrs.Attribute[float | None], value: object) -> None:
    if value is not None and not is_positive(value):
        raise ProblemError(f"level {level.name!r}: clip={value!r}; it must be a finite number > 0, or None")


def _check_factory(example: str) -> Callable[[Level, attrs.Attribute[Any], object], None]:
    def check(level: Level, attribute: attrs.Attribute[Any], value: object) -> None:
        made = attribute.name == "optimizer" and isinstance(value, Optimizer)
        if value is not None and not made and not callable(value):
            raise ProblemError(
                f"level {level.name!r}: {attribute.name}={value!r}, which is not callable; give a callable, such as {example}"
            )

    return check


def _read_device(value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ProblemError(
            f"Level: device={value!r} is not a device ({error}); give one such as 'cuda:0' or 'cpu'"
        ) from error


def _check_precision(level: Level, attribute: attrs.Attribute[str | None], value: object) -> None:
    if value not in (None, "bf16", "fp16"):
        raise ProblemError(f"level {level.name!r}: precision={value!r}; it must be 'bf16', 'fp16' or None")


def _check_data(level: Level, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Iterable):
        raise ProblemError(
            f"level {level.name!r}: data={value!r} is a {type(value).__name__} that cannot be iterated; give batches: a "
            "DataLoader, or a list that holds one batch, [batch]"
        )
    if isinstance(value, Iterator):
        raise ProblemError(
            f"level {level.name!r}: data is a {type(value).__name__} that can be iterated only once; give an iterable that "
            "starts again each epoch, such as a DataLoader or a list of batches"
        )
    if isinstance(value, Tensor):
        raise ProblemError(
            f"level {level.name!r}: data is a tensor, whose rows would be batches; give [tensor] for one batch"
        )
    if isinstance(value, tuple) and value and all(isinstance(entry, Tensor) for entry in value):
        raise ProblemError(
            f"level {level.name!r}: data is a tuple of {len(value)} tensors, each of which would be a batch; give [(X, Y)] for "
            "one batch of these tensors, or a list of batches"
        )
    if isinstance(value, Mapping):
        raise ProblemError(
            f"level {level.name!r}: data is a {type(value).__name__}, whose keys would be batches; give [batch] for one batch"
        )


@attrs.frozen(eq=False)
class Level:
    """One problem in the variables x: an optimisation, x*(u) = argmin_x f(x, u), or a condition, F(x*(u), u) = 0.

    x are the trainable parameters of `module`, u those of the levels that the loss names, and f is
    `loss(module, batch, *, other_level, ...)` plus `regularizer(module, *, other_level, ...)` if there is one. A level has
    either a loss or a residual F, which need not be the gradient of anything: a fixed point, a game, a layer in equilibrium.

    Args:
        name: its name in the losses of other levels; a valid Python name.
        module: any `nn.Module`; its parameters with `requires_grad` are the level's variables. For a bare tensor, see
            `mlopt.variables`.
        loss: takes the level's module, a batch, and the modules of the levels that it refers to as keyword-only
            parameters; returns a scalar tensor, a mapping with `loss` and named scalars to log, or a `Mixture`.
        residual: in place of a loss, a function F with the same arguments, which returns a tensor in the shape of each variable:
            one tensor, a sequence in the order of `parameter_names`, or a mapping from those names. The solution of the level is
            where F is zero. In its steps, F takes the place of the gradient: `partial(SGD, lr=1.0)` with F = x - T(x) iterates
            x <- T(x). Not for the outermost level, and not for one with levels inside.
        data: batches: an iterable that can be iterated repeatedly, such as a DataLoader or a list; None for a loss
            that ignores its batch, which is then None.
        optimizer: an optimiser, or a function that takes parameters and returns one, such as
            `partial(torch.optim.SGD, lr=0.1)`. `solve` needs it; `hypergradient` only reads its decay, its sign and its bounds.
        solver: in place of an optimizer, a function `solver(module, batch, *, other_level, ...)` that moves the variables, in
            place, to the solution: a closed form, L-BFGS, scikit-learn. It has the signature of a loss, refers to levels that
            the objective refers to, and returns nothing. It is called once each time the level is solved, with gradients
            enabled; it may draw random numbers, and the loss then draws the same. Not for a level with levels inside.
        scheduler: takes the optimiser and returns a learning-rate scheduler, stepped after each step of the level.
        steps: steps taken each time the level is solved.
        warmup: steps that `solve` takes once, before the first outer step.
        accumulate: number of batches per step; their gradients are averaged. A pullback uses the last of them.
        clip: largest norm of a step's gradient; a longer gradient is scaled down. The norm is logged as `gradient_norm`.
        precision: "bf16" or "fp16" evaluates the level's own steps in an autocast region, "fp16" with an adaptive loss
            scale. Products with second derivatives are taken outside it.
        device: the device to move the module to, in place; None leaves it where it is. The level's batches follow; a loss
            must move the values it takes from levels on other devices.
        estimator: the rule that pulls cotangents back through the level's solution. Every level but the outermost needs one.
        response: for the outermost level, a rule for its whole hypergradient in place of pullbacks by the estimators of the
            levels inside, such as `mlopt.RealSteps(steps=300)`. Those levels then need no estimator.
        split: on several processes, whether each evaluates the loss on its own rows of a batch; False for a loss that is not a
            mean over rows, which every process then evaluates on the whole batch.
        regularizer: a term of the objective that uses no batch: weight decay, a proximal coupling. Products
            that concern only levels named here need no pass over the data. It must not draw random numbers. A regularizer r
            with a method `product(direction, wanted)` supplies its second-order products, d/dw <grad_D r, direction> for each
            level w in `wanted`. Its arguments are the names of levels: `direction` maps those of D to a tuple of tensors, one
            for each variable, and so does the result, with None for zero. It is compared with differences at first use.

    Raises:
        ProblemError: an argument is invalid.

    Example:
        >>> def loss(module, batch, *, weights):
        ...     return (weights().sigmoid() * module(batch).square().mean(1)).mean()
        >>> level = mlopt.Level("classifier", torch.nn.Linear(3, 1), loss, data=[torch.ones(2, 3)], steps=10,
        ...                     estimator=mlopt.ConjugateGradient(iterations=10))
        >>> level.references, level.parameter_names
        (('weights',), ('weight', 'bias'))

        A level with a solver of its own, here in closed form:

        >>> def solver(module, batch, *, target):
        ...     module.value.data.copy_(target().detach() / 2)
        >>> def loss(module, batch, *, target):
        ...     return (module() - target()).square().sum() + module().square().sum()
        >>> problem = mlopt.Problem(
        ...     mlopt.Level("target", mlopt.variables(torch.ones(1)), lambda target, batch, *, inner: inner().square().sum()),
        ...     mlopt.Level("inner", mlopt.variables(torch.zeros(1)), loss, solver=solver, estimator=mlopt.Dense()),
        ... )
        >>> mlopt.hypergradient(problem).gradient["value"]  # of (u / 2)^2
        tensor([0.5000])

        A level with a residual, here the fixed point x = x / 2 + u:

        >>> problem = mlopt.Problem(
        ...     mlopt.Level("u", mlopt.variables(torch.ones(1)), lambda u, batch, *, x: x().sum()),
        ...     mlopt.Level("x", mlopt.variables(torch.ones(1)), residual=lambda x, batch, *, u: x() - (x() / 2 + u()),
        ...                 estimator=mlopt.GMRES(iterations=10)),
        ... )
        >>> mlopt.hypergradient(problem).gradient["value"]  # of 2 u
        tensor([2.])
    """

    name: str = attrs.field(validator=_check_name)
    module: nn.Module = attrs.field(
        validator=_check_type(nn.Module, "give an nn.Module; wrap a bare tensor in mlopt.variables(tensor)")
    )
    loss: Callable[..., Any] | None = attrs.field(default=None)
    residual: Callable[..., Any] | None = attrs.field(default=None, kw_only=True)
    data: Iterable[Any] | None = attrs.field(default=None, validator=_check_data, kw_only=True)
    optimizer: OptimizerFactory | Optimizer | None = attrs.field(
        default=None, validator=_check_factory("partial(torch.optim.SGD, lr=0.1)"), kw_only=True
    )
    scheduler: Callable[[Optimizer], Any] | None = attrs.field(
        default=None,
        validator=_check_factory("partial(torch.optim.lr_scheduler.StepLR, step_size=100)"),
        kw_only=True,
    )
    steps: int = attrs.field(default=1, validator=_check_count(1), kw_only=True)
    warmup: int = attrs.field(default=0, validator=_check_count(0), kw_only=True)
    accumulate: int = attrs.field(default=1, validator=_check_count(1), kw_only=True)
    clip: float | None = attrs.field(default=None, validator=_check_clip, kw_only=True)
    precision: str | None = attrs.field(default=None, validator=_check_precision, kw_only=True)
    estimator: Estimator | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(
            _check_type(Estimator, "give an estimator, such as mlopt.ConjugateGradient(iterations=10)")
        ),
        kw_only=True,
    )
    split: bool = attrs.field(default=True, validator=_check_type(bool, "give True or False"), kw_only=True)
    regularizer: Callable[..., Any] | None = attrs.field(default=None, kw_only=True)
    solver: Callable[..., Any] | None = attrs.field(default=None, kw_only=True)
    response: Response | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(_check_type(Response, "give one, such as mlopt.RealSteps(steps=300)")),
        kw_only=True,
    )
    _device: torch.device | None = attrs.field(
        default=None, converter=attrs.converters.optional(_read_device), kw_only=True, repr=False
    )
    #: Names of the levels that the loss or the residual, the regularizer and the solver refer to.
    loss_references: tuple[str, ...] = attrs.field(init=False, repr=False)
    regularizer_references: tuple[str, ...] = attrs.field(init=False, repr=False)
    solver_references: tuple[str, ...] = attrs.field(init=False, repr=False)

    #: The parameters of a sharded module: it has others while it holds those that it gathered for a forward pass.
    _shards: tuple[tuple[str, Tensor], ...] = attrs.field(init=False, repr=False)

    @_shards.default
    def _read_shards(self) -> tuple[tuple[str, Tensor], ...]:
        return tuple(self.module.named_parameters()) if units(self.module) else ()

    @loss_references.default
    def _read_loss(self) -> tuple[str, ...]:
        if (self.loss is None) == (self.residual is None):
            state = "it has neither" if self.loss is None else "it has both"
            raise ProblemError(f"level {self.name!r}: give it either a loss or a residual; {state}")
        return references(self.definition, f"the {self.part} of level {self.name!r}", positional=2)

    @regularizer_references.default
    def _read_regularizer(self) -> tuple[str, ...]:
        if self.regularizer is None:
            return ()
        return references(self.regularizer, f"the regularizer of level {self.name!r}", positional=1)

    @solver_references.default
    def _read_solver(self) -> tuple[str, ...]:
        if self.solver is None:
            return ()
        return references(self.solver, f"the solver of level {self.name!r}", positional=2)

    def __attrs_post_init__(self) -> None:
        if self.residual is not None:
            self._check_residual()
        if self.solver is not None:
            self._check_solver()
        if self.response is not None and (self.accumulate != 1 or self.precision is not None):
            option = "accumulate" if self.accumulate != 1 else "precision"
            raise ProblemError(
                f"level {self.name!r}: {option}={getattr(self, option)!r} cannot be combined with response, which evaluates the "
                f"loss once for each displacement, in its own precision; leave {option} out, and give larger batches if needed"
            )
        if self._device is None:
            return
        try:
            self.module.to(self._device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ProblemError(
                f"level {self.name!r}: device={str(self._device)!r}; its module cannot be moved there ({error})"
            ) from error

    def _check_residual(self) -> None:
        for option in ("regularizer", "response"):
            if getattr(self, option) is not None:
                raise ProblemError(
                    f"level {self.name!r}: {option}={getattr(self, option)!r} cannot be combined with residual, because "
                    f"it belongs to a loss; leave {option} out"
                )
        if self.estimator is not None and (reason := self.estimator.needs_loss):
            raise ProblemError(
                f"level {self.name!r}: estimator={self.estimator} cannot be combined with residual: {reason}, and the derivative "
                "of a residual is not symmetric; give mlopt.GMRES(iterations=30), Neumann, Identity or Dense"
            )

    def _check_solver(self) -> None:
        for option in ("optimizer", "scheduler", "steps", "warmup", "accumulate", "clip", "precision"):
            given, default = getattr(self, option), getattr(attrs.fields(Level), option).default
            if given != default:
                raise ProblemError(
                    f"level {self.name!r}: {option}={given!r} cannot be combined with solver, which solves the level in one "
                    f"call, without optimiser steps; leave {option} out"
                )
        if self.estimator is not None and self.estimator.needs_optimizer:
            raise ProblemError(
                f"level {self.name!r}: estimator={self.estimator} uses the steps of an optimiser, and cannot be combined with "
                "solver, which takes none; give an implicit estimator, such as mlopt.ConjugateGradient(iterations=10)"
            )
        for name in self.solver_references:
            if name not in self.references:
                raise ProblemError(
                    f"the solver of level {self.name!r} refers to {name!r}, and its {self.part} does not, so that the estimator "
                    f"could not know of this dependence; let the {self.part} refer to {name!r}, or leave it out of the solver"
                )

    @property
    def sharded(self) -> bool:
        """True if the module was given to `fully_shard`."""
        return bool(self._shards)

    @property
    def part(self) -> str:
        """The part that defines the level: "loss" or "residual"."""
        return "loss" if self.residual is None else "residual"

    @property
    def definition(self) -> Callable[..., Any]:
        """The loss or the residual."""
        function = self.loss if self.residual is None else self.residual
        assert function is not None
        return function

    @property
    def splits(self) -> bool:
        """True if several processes evaluate the loss on rows of their own; not for a residual, or a sum over tasks."""
        return self.split and self.residual is None and not getattr(self.loss, "over_tasks", False)

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the levels that the objective refers to, in the order in which they are written."""
        return tuple(dict.fromkeys(self.loss_references + self.regularizer_references))

    @property
    def parameters(self) -> Tensors:
        """The level's variables: its module's trainable parameters, tied parameters once."""
        return tuple(p for _, p in self._shards or self.module.named_parameters() if p.requires_grad)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of `parameters`, in the same order."""
        return tuple(name for name, p in self._shards or self.module.named_parameters() if p.requires_grad)

    @property
    def device(self) -> torch.device:
        """The device of the level's variables."""
        return self.parameters[0].device
