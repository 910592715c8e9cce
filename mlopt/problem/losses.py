"""Losses and regularizers: their only place of evaluation, and the values that they may return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from ..errors import ProblemError
from ..ranks import ALONE, Ranks
from ..shards import any_sharded, is_sharded, reshard, whole
from ..tensors import Tensors, zeros_like
from .backward import backward
from .batch import copied
from .inspection import Inspection, drawing_refused
from .rows import WHOLE, Portion, portion
from .shard_arithmetic import ShardArithmetic

if TYPE_CHECKING:
    from .level import Level
    from .workspace import Workspace

__all__ = ["LossValue", "Mixture", "evaluate_loss", "evaluate_regularizer"]

#: A loss of a mixture, which may state the number of things that it is a mean over.
Loss = Tensor | Mapping[str, Any] | Callable[[], Tensor | Mapping[str, Any]]


class Mixture:
    """A loss of the form sum_k w_k L_k; the module of a level returns the weights w when it is called without arguments.

    The library uses this form: the product with the mixed derivative with respect to the weights is the vector of
    directional derivatives of the L_k, which needs no second derivative.

    The losses themselves must not depend on the level that weighs them.

    Args:
        losses: the L_k: scalar tensors or functions without arguments that return them, in a sequence, or by name. Functions
            are called one after the other, so that memory holds one network pass at a time. On several processes, a loss that
            is a mean over something else than rows, such as masked tokens, is a mapping {"loss": loss, "count": their number}.
        weights: the name of the level that weighs them. The loss must name it among its keyword-only parameters.

    Example:
        >>> def loss(model, batch, *, weights):
        ...     return mlopt.Mixture({"fit": lambda: (model(batch) - 1).square().mean(), "size": lambda: model(batch).norm()},
        ...                          weights="weights")
        >>> len(loss(torch.nn.Linear(3, 1), torch.ones(2, 3), weights=mlopt.variables(torch.zeros(2))))
        2
    """

    def __init__(self, losses: Sequence[Loss] | Mapping[str, Loss], weights: str) -> None:
        if isinstance(losses, Mapping):
            self.names, self._losses = tuple(losses), tuple(losses.values())
        else:
            self.names, self._losses = tuple(f"loss_{k}" for k in range(len(losses))), tuple(losses)
        if not self._losses:
            raise ProblemError("Mixture: it has no loss; give at least one")
        if "loss" in self.names:
            raise ProblemError(
                "Mixture: a loss is named 'loss', but the weighted sum is logged under that name; rename it"
            )
        self.weights = weights
        #: Inspects the weights and each loss when they are evaluated.
        self.inspection: Inspection | None = None
        #: The part of the batch that the losses are evaluated on.
        self.portion: Portion = WHOLE
        #: If one of the modules that the losses use is sharded, the parameters of all of them.
        self.leaves: Tensors = ()

    def __len__(self) -> int:
        return len(self._losses)

    def loss(self, k: int) -> Tensor:
        """Return L_k, or the piece of it that belongs to this process; if it was given as a function, evaluate it now."""
        loss: Any = self._losses[k]
        label, count = f"loss {self.names[k]!r} of a Mixture", None
        with self.portion.evaluating(label) if self.portion.ranks.several else nullcontext():
            if callable(loss):
                loss = loss()
            if isinstance(loss, Mapping):
                loss, count = loss.get("loss"), loss.get("count")
            value = _scalar(loss, label)
            _refuse_shards(value, label)
            if self.inspection is not None:
                self.inspection(value)
        share = self.portion.weigh(count, label)
        return value if share == 1.0 else share * value

    def gradient(
        self, k: int, variables: Sequence[Tensor], apart: Sequence[Tensor], loss: Tensor | None = None
    ) -> Tensors:
        """Return the gradient of L_k with respect to the variables; zero for variables that it does not depend on.

        Args:
            k: index of the loss.
            variables: variables of the level whose loss is this mixture.
            apart: variables of the level that weighs the losses.
            loss: L_k if it has been evaluated already, or a multiple of it: then return the gradient of that.

        Raises:
            ProblemError: the loss depends on a variable in `apart`, or uses a compiled module.
        """
        loss = self.loss(k) if loss is None else loss
        if not loss.requires_grad:
            return zeros_like(variables)
        if any_sharded(variables) or any_sharded(apart):
            values = {"own": tuple(variables), "apart": tuple(apart), "others": tuple(self.leaves)}
            pieces = backward(loss, ["own", "apart"], values, retain_graph=True)
            gradients: Sequence[Tensor | None] = (*pieces["own"], *pieces["apart"])
        else:
            gradients = self._gradients(k, loss, [*variables, *apart])
        if any(gradient is not None for gradient in gradients[len(variables) :]):
            raise ProblemError(
                f"loss {self.names[k]!r} of a Mixture depends on the level {self.weights!r} that weighs it; return the plain "
                "sum of weighted losses instead"
            )
        own = zip(gradients, variables, strict=False)
        return tuple(torch.zeros_like(v) if g is None else g for g, v in own)

    def _gradients(self, k: int, loss: Tensor, variables: Sequence[Tensor]) -> Sequence[Tensor | None]:
        # The losses may share a part of the graph. It is kept for the next one, and freed with the last of them.
        try:
            return torch.autograd.grad(loss, variables, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "donated buffers" not in str(error):
                raise
            raise ProblemError(
                f"loss {self.names[k]!r} of a Mixture uses a module that torch.compile compiled, whose graph cannot be kept for "
                "the other losses; give the module as it was before torch.compile, or return the plain sum of weighted losses"
            ) from error

    def weigh(self, module: nn.Module) -> Tensor:
        """Return the weights (K,) from the module of the level `weights`.

        Raises:
            ProblemError: it does not return one weight for each loss.
        """
        weights = module()
        if not isinstance(weights, Tensor) or weights.shape != (len(self),):
            returned = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
            raise ProblemError(
                f"Mixture: the module of level {self.weights!r} returned {returned}; called without arguments it must return one "
                f"weight for each of the {len(self)} losses, a tensor of shape ({len(self)},)"
            )
        if self.inspection is not None:
            self.inspection(weights)
        return weights


@attrs.define(eq=False)  # not frozen: torch.compile does not support how attrs fills frozen classes
class LossValue:
    """The value of a loss: a scalar or a mixture, and scalars to log.

    On several processes, the scalar, and each loss of the mixture, is the piece of this process: their sum is the loss.

    Attributes:
        loss: the value.
        logs: what it logs, not weighed.
        share: the share of this process, which weighs what it logs.
    """

    loss: Tensor | Mixture
    logs: Mapping[str, Any]
    share: float = 1.0

    def total(self, modules: Mapping[str, nn.Module]) -> Tensor:
        """Return the scalar loss; a mixture is weighed by the module of its level."""
        if isinstance(self.loss, Tensor):
            return self.loss
        weights = self.loss.weigh(modules[self.loss.weights])
        total = weights[0] * self.loss.loss(0)
        for k in range(1, len(self.loss)):
            total = total + weights[k] * self.loss.loss(k)
        return total


def evaluate_loss(
    level: Level,
    modules: Mapping[str, nn.Module],
    batch: Any,
    workspace: Workspace | None = None,
    *,
    inspected: Iterable[Level] = (),
    ranks: Ranks = ALONE,
) -> LossValue:
    """Return the value of a level's loss. Every evaluation in the library is made by this function.

    Args:
        level: the level.
        modules: by name, the level's module and those of the levels that its loss refers to.
        batch: the batch. The loss receives a copy of its containers, so that it may take entries out.
        workspace: records whether the loss is a mixture.
        inspected: all levels of the problem, for an evaluation on the live modules, which is then inspected.
        ranks: the processes that share the batch: the value is the piece of this one, on its rows.

    Raises:
        ProblemError: the loss returned neither a scalar tensor, a Mixture, nor a mapping with `loss`, changed a tensor of the
            batch or a variable in place, or depends on a level that it does not declare; or the batch holds an iterator.
    """
    reshard(modules.values())
    others = {name: modules[name] for name in level.loss_references}
    tensors: list[Tensor] = []
    try:
        batch = batch if torch.compiler.is_compiling() else copied(batch, tensors)
    except ProblemError as error:
        raise ProblemError(f"level {level.name!r}: {error}") from None
    inspection = None
    if inspected and workspace is not None:
        inspection = Inspection(level, "loss", inspected, workspace, tensors)
    if ranks.several:
        value = _piece(level, modules[level.name], batch, others, workspace, ranks)
    else:
        value = _read(level.definition(modules[level.name], batch, **others), level)
    if workspace is not None:
        workspace.mixtures[level.name] = value.loss.weights if isinstance(value.loss, Mixture) else None
    if inspection is not None:
        if isinstance(value.loss, Mixture):
            inspection.whole = False
            value.loss.inspection = inspection
        else:
            inspection(value.loss)
    return value


def _piece(
    level: Level,
    module: nn.Module,
    batch: Any,
    others: Mapping[str, nn.Module],
    workspace: Workspace | None,
    ranks: Ranks,
) -> LossValue:
    """Return the piece of a loss that belongs to this process."""
    label = "the loss"
    drawing, counted = (None, None) if workspace is None else (workspace.drawing.get(level.name), workspace.counted)
    part = portion(level, batch, ranks, drawing=drawing, counted=counted)
    leaves = tuple(p for used in (module, *others.values()) for p in used.parameters()) if ranks.sharded else ()
    with part.evaluating(label):
        value = _read(level.definition(module, part.batch, **others), level)
    if isinstance(value.loss, Mixture):
        part.agreed(label, "a Mixture")
        value.loss.portion, value.loss.leaves, value.share = part, leaves, part.share
    else:
        _refuse_shards(value.loss, f"{label} of level {level.name!r}")
        value.share = part.weigh(value.logs.get("count"), label)
        value.loss = value.share * value.loss
    if "count" in value.logs and part.counts != 1.0:
        value.logs = {**value.logs, "count": part.counts * value.logs["count"]}
    return value


def evaluate_regularizer(
    level: Level,
    modules: Mapping[str, nn.Module],
    workspace: Workspace | None = None,
    *,
    inspected: Iterable[Level] = (),
) -> Tensor:
    """Return the value of a level's regularizer, a scalar. Every evaluation in the library is made by this function.

    Args:
        level: a level with a regularizer.
        modules: by name, the level's module and those of the levels that its regularizer refers to.
        workspace: counts the evaluations that are inspected.
        inspected: all levels of the problem, for an evaluation on the live modules, which is then inspected.

    Raises:
        ProblemError: the regularizer did not return a scalar tensor, draws random numbers, or depends on a level that it does
            not declare, or computes with sharded parameters in a way that depends on the sharding.
    """
    assert level.regularizer is not None
    others = {name: modules[name] for name in level.regularizer_references}
    inspection = Inspection(level, "regularizer", inspected, workspace) if inspected and workspace is not None else None
    split = any(any_sharded(module.parameters()) for module in modules.values())
    with (
        drawing_refused(level, inspected) if inspection is not None and inspection.searches else nullcontext(),
        ShardArithmetic(level.name) if split else nullcontext(),
    ):
        value = level.regularizer(modules[level.name], **others)
    value = whole(_scalar(value, f"the regularizer of level {level.name!r}"))
    if inspection is not None:
        inspection(value)
    return value


def _scalar(value: Any, label: str) -> Tensor:
    """Return the value as a tensor of shape (), or raise a ProblemError."""
    if not isinstance(value, Tensor):
        raise ProblemError(f"{label} is a {type(value).__name__}; it must be a scalar tensor")
    if value.numel() != 1:
        raise ProblemError(f"{label} has shape {tuple(value.shape)}; it must be a scalar: take its mean")
    return value if value.dim() == 0 else value.reshape(())


def _refuse_shards(value: Tensor, label: str) -> None:
    """Raise if a loss is a number that the processes share: each would weigh it by its own share of the rows."""
    if is_sharded(value):
        raise ProblemError(
            f"{label} computes with sharded parameters outside of the forward pass of their module, in which each process has "
            "its own rows; compute with the outputs of the module, or move that term to the regularizer of the level"
        )


#: Columns of a level's row that a run writes.
_COLUMNS = {"gradient_norm", "loss_scale"}


def _read(value: Any, level: Level) -> LossValue:
    """Return the value that the loss of a level returned, checked."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return LossValue(value, {})  # the usual kind, before the slower tests for the others
    logs: Mapping[str, Any] = {}
    if isinstance(value, Mapping):
        if "loss" not in value:
            keys = ", ".join(map(repr, value)) or "nothing"
            raise ProblemError(f"the loss of level {level.name!r} returned a mapping with {keys}; it must hold 'loss'")
        logs = {key: entry for key, entry in value.items() if key != "loss"}
        if taken := _COLUMNS & logs.keys():
            raise ProblemError(
                f"the loss of level {level.name!r} returned {min(taken)!r}, a column that a run writes; give it another name"
            )
        value = value["loss"]
    if isinstance(value, Mixture):
        if value.weights not in level.loss_references:
            raise ProblemError(
                f"the loss of level {level.name!r} returned a Mixture weighed by {value.weights!r}, which it does not refer "
                f"to; make {value.weights!r} one of its keyword-only parameters"
            )
        return LossValue(value, logs)
    return LossValue(_scalar(value, f"the loss of level {level.name!r}"), logs)
