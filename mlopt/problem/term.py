"""The terms of an objective as functions of blocks of variables, on the live modules or as pure functions."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ProblemError
from ..shards import any_sharded, reshard
from ..tensors import Tensors, dot, scale, zeros_like
from .backward import backward
from .batch import copied
from .estimator import Block, Vectors
from .losses import LossValue, Mixture, evaluate_loss, evaluate_regularizer
from .pure_function import PureFunction, key_of
from .stand_ins import cloned_buffers, restored_modes

if TYPE_CHECKING:
    from .level import Level
    from .point import Point
    from .workspace import Workspace

__all__ = ["LevelTerm", "OwnFunction", "Term", "cut", "derivatives"]

#: A term as a function of its level's variables, of other parameters and buffers by name, and of a batch.
OwnFunction: TypeAlias = Callable[[Tensors, Mapping[str, Tensor], Any], Tensor]


def derivatives(
    value: Tensor, wanted: Sequence[Block], values: Vectors, *, traced: bool = False
) -> dict[Block, Tensors]:
    """Return the derivatives of a scalar by blocks of live variables; zero for variables that it does not depend on.

    Args:
        value: a scalar with a graph.
        wanted: the blocks.
        values: the live variables of each block.
        traced: if True, the derivatives carry a graph of their own.
    """
    if not value.requires_grad or not wanted:
        return {block: zeros_like(values[block]) for block in wanted}
    if any(any_sharded(variables) for variables in values.values()):
        assert not traced
        return {
            block: tuple(torch.zeros_like(v) if g is None else g for g, v in zip(own, values[block], strict=True))
            for block, own in backward(value, wanted, values).items()
        }
    inputs = [variable for block in wanted for variable in values[block]]
    flat = torch.autograd.grad(value, inputs, create_graph=traced, allow_unused=True, materialize_grads=True)
    return cut(flat, wanted, values)


def cut(flat: Sequence[Tensor], blocks: Sequence[Block], values: Vectors) -> dict[Block, Tensors]:
    """Cut a flat sequence of tensors into blocks."""
    pieces, start = {}, 0
    for block in blocks:
        stop = start + len(values[block])
        pieces[block], start = tuple(flat[start:stop]), stop
    return pieces


class Term(ABC):
    """A scalar function of blocks of variables.

    On several processes, `value` and `function` are the piece of this process, whose sum over the processes is the term, and
    `derivatives` are those of the whole term.

    Attributes:
        blocks: the blocks that it depends on.
        values: the live variables, by block.
        point: the point of evaluation.
        label: the name of the level that it belongs to, and of the part of its objective.
    """

    blocks: frozenset[Block]
    values: Mapping[Block, Tensors]
    point: Point
    label: tuple[str, str]
    #: The highest order of the derivatives of a loss that products with the term's second derivatives take.
    order: int = 2
    #: True if the term knows its derivatives without an evaluation; it then has `product`.
    closed: ClassVar[bool] = False
    #: True if the pieces of all processes are equal, so that their sum needs no exchange.
    alike: bool = False
    #: Returns products with the term's second derivatives, by block, where its author supplied them; see `Level.regularizer`.
    second_order: Callable[[Vectors, Sequence[Block]], Mapping[Block, Sequence[Tensor | None]]] | None = None

    @abstractmethod
    def value(self) -> Tensor:
        """Return the term at the live variables, a scalar with a graph."""

    @abstractmethod
    def function(self, values: Vectors) -> Tensor:
        """Return the term at other variables, for the transforms of torch.func; absent blocks are the live ones."""

    def roots(self) -> list[Tensor]:
        """Return the losses that the term is made of, at the live variables, each with a graph."""
        return [self.value()]

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the first derivatives at the live variables, without a graph."""
        return self.together(wanted, lambda: derivatives(self.value(), wanted, self.values))

    def together(self, wanted: Sequence[Block], evaluate: Callable[[], dict[Block, Tensors]]) -> dict[Block, Tensors]:
        """Return the sum over processes of the vectors by wanted block that each evaluates from its piece of the term."""
        ranks = self.point.problem.ranks
        if not ranks.several or not wanted:
            return evaluate()
        if self.alike:
            pieces = evaluate().items()
            return {b: vectors if any_sharded(vectors) else scale(float(ranks.size), vectors) for b, vectors in pieces}

        like = [variable for block in wanted for variable in self.values[block]]
        total = ranks.together(lambda: [x for pieces in [evaluate()] for block in wanted for x in pieces[block]], like)
        return cut(total, wanted, self.values)

    def mixed(self, direction: Vectors, wanted: Sequence[Block], *, forward: bool) -> dict[Block, Tensors] | None:
        """Return d/dw <grad_D, direction> if `is_mixed`; else None."""
        return None

    def is_mixed(self, direction: Collection[Block], wanted: Sequence[Block]) -> bool:
        """Return True if the term's form yields d/dw <grad_D, direction> from first derivatives alone."""
        return False

    def product(self, direction: Vectors) -> dict[Block, Tensors]:
        """Return the product of the second derivatives of a closed term with a direction, without an evaluation; else nothing."""
        return {}


class LevelTerm(Term):
    """The loss of a level, or its regularizer; the base of the term of a residual.

    Args:
        point: the point of evaluation.
        level: the level.
        part: "loss", "residual" or "regularizer".
        batches: the batch of each level; the point's if None.
        sign: a factor, -1.0 for a level whose optimiser maximises.
    """

    def __init__(
        self,
        point: Point,
        level: Level,
        part: Literal["loss", "residual", "regularizer"],
        batches: Mapping[str, Any] | None = None,
        sign: float = 1.0,
    ) -> None:
        self._point = self.point = point
        ranks = point.problem.ranks
        self.alike = ranks.several and part != "loss"
        self._level, self.part, self.label, self.sign = level, part, (level.name, part), sign
        self._factor = sign / ranks.size if self.alike else sign
        self._batches = point.batches if batches is None else batches
        self._references = level.regularizer_references if part == "regularizer" else level.loss_references
        self._modules = {name: point.problem[name].module for name in (level.name, *self._references)}
        self.blocks = frozenset(self._modules)
        self.values = point.values
        if part == "regularizer" and getattr(level.regularizer, "product", None) is not None:
            self.second_order = self._second_order

    @property
    def name(self) -> str:
        """The level's name."""
        return self._level.name

    @property
    def batch(self) -> Any:
        """The batch of the loss; None for a regularizer."""
        return None if self.part == "regularizer" else self._batches[self.name]

    @property
    def module(self) -> nn.Module:
        """The level's module."""
        return self._level.module

    def value(self) -> Tensor:
        with cloned_buffers(self._modules.values()):
            return self._total(self._modules)

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        reshard(self._modules.values())  # a regularizer does not do so, because it may follow the loss in one graph
        return super().derivatives(wanted)

    def plain_value(self) -> Tensor:
        """Return `value` for a tracer, without the inspection, which reads numbers of tensors."""
        with cloned_buffers(self._modules.values()):
            return self._total(dict(self._modules))

    def function(self, values: Vectors) -> Tensor:
        return self._pure(values, self._total)

    def _second_order(self, direction: Vectors, wanted: Sequence[Block]) -> Mapping[Block, Sequence[Tensor | None]]:
        # The product is linear in the direction, which so can take the sign.
        signed = direction if self.sign == 1.0 else {b: scale(self.sign, v) for b, v in direction.items()}
        product: Mapping[Block, Sequence[Tensor | None]] = self._level.regularizer.product(signed, wanted)  # type: ignore[union-attr]
        return product

    @property
    def workspace(self) -> Workspace:
        """The workspace of the point."""
        return self._point.workspace

    def own_function(self) -> OwnFunction:
        """Return the term as a function of the level's variables, of everything else, and of the batch.

        It uses only its arguments, so it can be compiled and kept; random numbers come from the present generators.
        """
        bare = copy.copy(self)  # without references to the point and its batches
        del bare._point, bare.point, bare._batches, bare.values
        function = PureFunction(self._modules)
        names = [f"levels.{key_of(self.name)}.{name}" for name in self._level.parameter_names]

        def term(own: Tensors, rest: Mapping[str, Tensor], batch: Any) -> Tensor:
            return function.at(bare._evaluate, {**rest, **dict(zip(names, own, strict=True))}, batch)

        return term

    def own_arguments(self) -> tuple[Tensors, dict[str, Tensor], Any]:
        """Return the arguments of `own_function` at the point, and restore the point's generators."""
        self._point.generators[self.name].restore()
        function = self._pure_function
        rest = {name: tensor.detach() for name, tensor in (*function.named_parameters(), *function.named_buffers())}
        for name in self._level.parameter_names:
            del rest[f"levels.{key_of(self.name)}.{name}"]
        batch = copied(self._batches[self.name], [])  # here, since a compiled function would change the original
        return tuple(v.detach() for v in self.values[self.name]), rest, batch

    def mixed(self, direction: Vectors, wanted: Sequence[Block], *, forward: bool) -> dict[Block, Tensors] | None:
        """Return d/da <grad_x f, q> = sum_k (dw_k/da) <grad L_k, q> for a mixture f = sum_k w_k(a) L_k(x); else None."""
        if not self.is_mixed(direction, wanted):
            return None
        along, ranks = direction[self.name], self._point.problem.ranks
        weights: list[Tensor] = []

        def evaluate() -> list[Tensor]:
            mixture = self._mixture(self._modules)
            weights.append(mixture.weigh(self._modules[mixture.weights]))
            return [self._forward_shares(along) if forward else self._backward_shares(mixture, along)]

        with cloned_buffers(self._modules.values()):
            if ranks.several:
                like = [along[0].new_zeros(self._modules[wanted[0]]().shape)]
                (shares,) = ranks.together(evaluate, like)
            else:
                (shares,) = evaluate()
        return {wanted[0]: self._weights_cotangent(wanted[0], weights[0], shares)}

    def is_mixed(self, direction: Collection[Block], wanted: Sequence[Block]) -> bool:
        if self.part == "regularizer" or set(direction) != {self.name}:
            return False
        return len(wanted) == 1 and wanted[0] in self._references and self._is_mixture(wanted[0])

    def streamed(self, weights: str, shares: Tensor) -> Tensors:
        """Return the derivative of <w(a), shares> by the variables a of the level `weights`, for known shares (K,)."""
        with cloned_buffers(self._modules.values()):
            weighed = self._modules[weights]()
        return self._weights_cotangent(weights, weighed, shares)

    def _weights_cotangent(self, name: str, weights: Tensor, shares: Tensor) -> Tensors:
        inner = self._signed(torch.dot(weights, shares.to(weights)))
        return derivatives(inner, [name], self.values)[name]

    def _mixture(self, modules: Mapping[str, nn.Module]) -> Mixture:
        mixture = self._loss(modules).loss
        assert isinstance(mixture, Mixture)
        return mixture

    def _is_mixture(self, weights: str) -> bool:
        mixtures = self._point.workspace.mixtures
        if self.name not in mixtures:
            with cloned_buffers(self._modules.values()):
                self._loss(self._modules)
        return mixtures[self.name] == weights

    def _backward_shares(self, mixture: Mixture, along: Tensors) -> Tensor:
        """Return <grad L_k, along> for each k, by K backward passes."""
        own, apart = self.values[self.name], self.values[mixture.weights]
        shares = torch.stack([dot(mixture.gradient(k, own, apart), along) for k in range(len(mixture))])
        # Gradients by sharded variables are of the whole losses, in every process.
        return shares / self._point.problem.ranks.size if any_sharded(own) else shares

    def _forward_shares(self, along: Tensors) -> Tensor:
        """Return <grad L_k, along> for all k, in one forward-mode pass."""
        name = self.name

        def losses(variables: Tensors) -> Tensor:
            def read(modules: Mapping[str, nn.Module]) -> Tensor:
                mixture = self._mixture(modules)
                # Weights before losses, as in an evaluation of the loss: a module of weights may draw random numbers.
                mixture.weigh(modules[mixture.weights])
                return torch.stack([mixture.loss(k) for k in range(len(mixture))])

            return self._pure({name: variables}, read)

        start = tuple(v.detach() for v in self.values[name])
        shares: Tensor = torch.func.jvp(losses, (start,), (tuple(along),))[1]
        return shares

    @cached_property
    def _pure_function(self) -> PureFunction:
        return PureFunction(self._modules)

    def _pure(self, values: Vectors, function: Callable[[Mapping[str, nn.Module]], Tensor]) -> Tensor:
        named = {
            f"levels.{key_of(name)}.{parameter}": tensor
            for name in self._modules
            if name in values
            for parameter, tensor in zip(self._point.problem[name].parameter_names, values[name], strict=True)
        }
        with restored_modes(self._modules.values()):
            try:
                return self._pure_function.at(function, named)
            except RuntimeError as error:
                if "mutate a captured Tensor" not in str(error):
                    raise
                raise ProblemError(
                    f"the {self.part} of level {self.name!r} changed a tensor that it did not make in place, such as one of its "
                    "batch, and every further evaluation would see another; change a copy (batch.clone(), or x = x * 2 for "
                    "x *= 2)"
                ) from error

    def _loss(self, modules: Mapping[str, nn.Module]) -> LossValue:
        """Return the loss on given modules, at the point's batch and random numbers."""
        self._point.generators[self.name].restore()
        inspected, ranks = self._inspected(modules), self._point.problem.ranks
        return evaluate_loss(self._level, modules, self.batch, self.workspace, inspected=inspected, ranks=ranks)

    def _total(self, modules: Mapping[str, nn.Module]) -> Tensor:
        if self.part == "loss":
            return self._signed(self._loss(modules).total(modules))
        self._point.generators[self.name].restore()
        value = evaluate_regularizer(self._level, modules, self._point.workspace, inspected=self._inspected(modules))
        return self._signed(value)

    def _signed(self, value: Tensor) -> Tensor:
        return value if self._factor == 1.0 else self._factor * value

    def _inspected(self, modules: Mapping[str, nn.Module]) -> Iterable[Level]:
        """Return the levels of the problem for an evaluation on the live modules, none for one of a pure function."""
        return self._point.problem if modules is self._modules else ()

    def _evaluate(self, modules: Mapping[str, nn.Module], batch: Any) -> Tensor:
        """Return the term on given modules and a given batch, with the generators as they are."""
        if self.part == "regularizer":
            return self._signed(evaluate_regularizer(self._level, modules))
        return self._signed(evaluate_loss(self._level, modules, batch).total(modules))
