"""K-FAC: a Kronecker product for each layer approximates the curvature of a level, to precondition conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias, final

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import EstimatorError, NonFiniteError, SecondDerivativeError
from ..linear import Kronecker, MatVec, Preconditioner
from ..problem import LevelTerm, Objective, Point, to_device
from ..tensors import Tensors, flatten, unflatten
from ..validation import at_least, is_whole, must_be
from .products import (
    AutogradProduct,
    SecondDerivatives,
    cut_at_outputs,
    differentiable_kernels,
    graph_of,
    name_kernels,
    refuse_once_differentiable,
)

__all__ = ["KFACPreconditioner"]

#: A layer whose curvature is approximated by a Kronecker product.
_Layer: TypeAlias = nn.Linear | nn.Embedding
#: Curvatures below this share of the largest are raised to it.
_FLOOR = 1e-4
#: The most columns of an output; each costs a product with the second derivative of the loss by the outputs.
_COLUMNS = 256
_USER, _REMEDY = "KFACPreconditioner", "use mlopt.linear.NystromPreconditioner()"


@final
@attrs.frozen(kw_only=True)
class KFACPreconditioner(Preconditioner):
    """P = A (x) G + c I for the weight and bias of each `nn.Linear` and `nn.Embedding`; a multiple of I for other variables.

    A is the mean of a a^T over the inputs a of the layer, with a one appended for the bias. G is the sum of g g^T, where g is the
    derivative of the outputs of the level's module by those of the layer, times a root of the second derivative of the loss by
    the outputs. c is the damping and the mean curvature of those terms that do not pass through the outputs: a ridge in the loss,
    the regularizer, the decay of the optimiser. So P approximates the Gauss-Newton matrix. Any loss of the outputs is possible,
    with weights of samples for example; rows of the outputs count as independent. Positions of a layer that share one row of the
    outputs are added first ("reduce"); if the outputs have rows for them too, each counts on its own ("expand").

    P changes the number of iterations, not the solution. It ignores the curvature between layers, and the number can rise for it.
    It costs a forward pass, a backward pass for each draw, and an
    eigendecomposition of A and G, O(d^3) for a layer of width d, for each linear solve. They are not counted as products.
    With curvature batches, P is taken on the first of them. The factors of a layer with m outputs and n inputs hold about
    m^2 + n^2 numbers, which the number of unknowns does not determine, so `cost` returns None.

    Layers count as other variables if their outputs do not reach those of the module, if a frozen or computed weight leaves
    nothing to precondition, or if they are convolutions or recurrent.

    Args:
        draws: the number of random vectors that stand in for the columns of the root, a backward pass each; None for all columns.
        seed: of the random vectors.

    Raises:
        EstimatorError: in a pullback, if the loss never calls the level's module or feeds its outputs back into it, the outputs
            have more than 256 columns, or the problem is shared by several processes.
        SecondDerivativeError: in a pullback, if the loss has no second derivative by the outputs.

    Source: Martens & Grosse 2015 (arXiv 1503.05671); Eschenhagen et al. 2023 (arXiv 2311.00636) for shared weights; Liao, Dangel
    & Yu 2026 (arXiv 2603.29108) for hypergradients.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> preconditioner = mlopt.KFACPreconditioner()
        >>> problem = logistic_regression(mlopt.ConjugateGradient(preconditioner=preconditioner)).problem
        >>> mlopt.hypergradient(problem).reports["regression"].converged
        True
    """

    draws: int | None = attrs.field(
        default=1, validator=must_be(lambda value: value is None or is_whole(value, 1), "a whole number >= 1, or None")
    )
    seed: int = attrs.field(default=0, validator=at_least(0))

    def prepare(self, matvec: MatVec, like: Tensors, damping: float) -> tuple[MatVec, int]:
        raise EstimatorError(
            "KFACPreconditioner needs the layers of a level, which a linear solver does not know; pass it to the estimator, "
            "mlopt.ConjugateGradient(preconditioner=mlopt.KFACPreconditioner())"
        )

    def at(self, point: Point, level: str) -> Preconditioner:
        """Return the preconditioner of a level at a point."""
        if point.problem.ranks.several:
            raise EstimatorError(f"level {level!r}: KFACPreconditioner works on one process; {_REMEDY}")
        return _AtPoint(rule=self, point=point, level=level)


@attrs.frozen(kw_only=True, eq=False)
class _AtPoint(Preconditioner):
    """The preconditioner of a level at a point. Its factors are taken when a solve begins, at the variables of that moment."""

    rule: KFACPreconditioner
    point: Point
    level: str

    def prepare(self, matvec: MatVec, like: Tensors, damping: float) -> tuple[MatVec, int]:
        variables = self.point.values[self.level]
        try:
            inverse = self._inverse(damping)
        except SecondDerivativeError as error:
            raise SecondDerivativeError(
                f"level {self.level!r}: KFACPreconditioner takes second derivatives of the loss by the outputs of its module, "
                f"and they do not exist ({error.__cause__}); {_REMEDY}"
            ) from error
        if [x.shape for x in like] == [v.shape for v in variables]:
            return inverse, 0
        return lambda vector: (flatten(inverse(unflatten(vector[0], variables))),), 0

    @name_kernels
    def _inverse(self, damping: float) -> MatVec:
        loss, *others = Objective.minimized(self.point.problem[self.level], self.point).terms
        assert isinstance(loss, LevelTerm)
        curvature = _Curvature(self._on_curvature_batch(loss), self.rule.draws, self.rule.seed)
        direct = [damping + own for own in curvature.direct]
        if others:
            probe = curvature.signs(self.point.values[self.level])
            rest = SecondDerivatives(Objective(others), AutogradProduct)({self.level: probe}, [self.level])
            direct = [d + _mean(p, r) for d, p, r in zip(direct, probe, rest[self.level], strict=True)]
        return curvature.inverse(direct)

    def _on_curvature_batch(self, loss: LevelTerm) -> LevelTerm:
        level = self.point.problem[self.level]
        batches = self.point.curvature_batches.get(self.level)
        if not batches:
            return loss
        return LevelTerm(self.point, level, "loss", {self.level: to_device(batches[0], level.device)}, loss.sign)


@attrs.frozen(eq=False)
class _Call:
    """One call of a layer: its input, and where its output, of this shape, enters the graph."""

    layer: _Layer
    input: Tensor
    edge: GradientEdge
    shape: torch.Size

    def rows(self, rows: torch.Size, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and gradients as matrices; positions that share one of the given rows of the outputs are added."""
        inputs, gradient, k = self.input, _at_least_single(gradient), len(rows)
        if not isinstance(self.layer, nn.Embedding):
            inputs = _at_least_single(inputs)
        if not isinstance(self.layer, nn.Embedding) and self.shape[:k] == rows and len(self.shape) - 1 > k:
            inputs, gradient = inputs.flatten(k, -2).mean(k), gradient.flatten(k, -2).sum(k)
        width = () if isinstance(self.layer, nn.Embedding) else inputs.shape[-1:]
        return inputs.reshape(-1, *width), gradient.reshape(-1, gradient.shape[-1])


class _Curvature:
    """The factors of a loss at the variables of its level.

    Attributes:
        direct: for each variable, the mean of the diagonal of the second derivative at fixed outputs.
    """

    def __init__(self, term: LevelTerm, draws: int | None, seed: int) -> None:
        self._term, self._variables = term, term.values[term.name]
        self._generator = torch.Generator().manual_seed(seed)
        places = {id(variable): k for k, variable in enumerate(self._variables)}
        self._places: dict[_Layer, list[int]] = {}
        for layer in term.module.modules():
            if isinstance(layer, _Layer) and id(layer.weight) in places:
                bias = getattr(layer, "bias", None)
                self._places[layer] = [places.pop(id(p)) for p in (layer.weight, bias) if id(p) in places]
        # The layers' hooks come first: one may be the module itself, whose output is then replaced.
        with (
            differentiable_kernels(term),
            _recorded(self._places) as calls,
            cut_at_outputs(term.module, _USER, _REMEDY) as (outputs, leaves),
        ):
            value = term.value()
        if not outputs:
            raise EstimatorError(
                f"level {term.name!r}: KFACPreconditioner needs the outputs of its {type(term.module).__name__}, but its loss "
                f"never calls it with gradients; call the module in the loss, or {_REMEDY}"
            )
        reached = graph_of(outputs)
        self._calls = [call for call in calls if call.edge.node in reached]
        called = {call.layer for call in self._calls}
        self._places = {layer: own for layer, own in self._places.items() if layer in called}
        covered = {k for own in self._places.values() for k in own}
        self._rest = [k for k in range(len(self._variables)) if k not in covered]
        self._outputs, self._rows = outputs, _cut_rows(outputs[0])
        slopes = _grad(value, [*leaves, *self._variables], traced=True)
        refuse_once_differentiable(graph_of(slopes[: len(leaves)]))
        self.direct = self._direct(slopes[len(leaves) :])
        self._factorise([self._root(s, leaf) for s, leaf in zip(slopes, leaves, strict=False)], draws)

    def signs(self, like: Sequence[Tensor]) -> Tensors:
        """Return random signs in the shapes of some tensors."""
        return tuple(
            (2.0 * torch.randint(2, x.shape, generator=self._generator, device="cpu") - 1.0).to(x) for x in like
        )

    def _direct(self, slopes: Tensors) -> list[Tensor]:
        probe = self.signs(self._variables)
        pairs = [(s, p) for s, p in zip(slopes, probe, strict=True) if s.requires_grad]
        if not pairs:
            return [v.new_zeros(()) for v in self._variables]
        bent = _grad([s for s, _ in pairs], self._variables, [p for _, p in pairs])
        return [_mean(p, b) for p, b in zip(probe, bent, strict=True)]

    def _root(self, slope: Tensor, leaf: Tensor) -> Tensor:
        """Return roots R, with R R^T the second derivative of the loss by each row of an output: (rows, columns, columns)."""
        wide = slope.reshape(_cut_rows(slope).numel(), -1)
        columns = wide.shape[1]
        if columns > _COLUMNS:
            raise EstimatorError(
                f"level {self._term.name!r}: the outputs of its {type(self._term.module).__name__} have {columns} columns, and "
                f"KFACPreconditioner takes at most {_COLUMNS}; {_REMEDY}"
            )
        if not wide.requires_grad:
            return wide.new_zeros(len(wide), columns, columns)
        bent = [_grad(wide[:, c].sum(), [leaf])[0].reshape(wide.shape) for c in range(columns)]
        matrix = _at_least_single(torch.stack(bent, dim=-1))
        self._require_finite(matrix, "second derivative of the loss by the outputs")
        return _roots((matrix + matrix.mT) / 2)

    def _require_finite(self, matrix: Tensor, name: str) -> None:
        # An eigendecomposition fails at NaN without saying where it comes from.
        if not bool(matrix.isfinite().all()):
            raise NonFiniteError(f"level {self._term.name!r}: KFACPreconditioner: the {name} is not finite")

    def _factorise(self, roots: Sequence[Tensor], draws: int | None) -> None:
        """Accumulate A and G of each layer, and the mean curvature of the other variables."""
        columns = max(root.shape[-1] for root in roots) if draws is None else draws
        variables = [self._variables[k] for k in self._rest]
        edges = [call.edge for call in self._calls]
        targets: list[Any] = [*edges, *variables]
        self._means = [v.new_zeros(()) for v in variables]
        inputs: dict[_Layer, list[Tensor]] = {layer: [] for layer in self._places}
        gradients: dict[_Layer, list[Tensor]] = {layer: [] for layer in self._places}
        for column in range(columns):
            along = [self._along(r, x, None if draws else column) for r, x in zip(roots, self._outputs, strict=True)]
            bent: Sequence[Any] = torch.autograd.grad(
                self._outputs, targets, along, retain_graph=True, allow_unused=True
            )
            for call, gradient in zip(self._calls, bent, strict=False):
                if gradient is None:  # of a function that returns none
                    gradient = call.layer.weight.new_zeros(call.shape)
                own, rows = call.rows(self._rows, gradient)
                gradients[call.layer].append(rows.mT @ rows / (draws or 1))
                if column == 0:
                    inputs[call.layer].append(own)
            self._means = [
                mean if g is None else mean + g.square().mean() / (draws or 1)
                for mean, g in zip(self._means, bent[len(edges) :], strict=True)
            ]
        self._factors: dict[_Layer, Kronecker] = {}
        for layer, places in self._places.items():
            right = _moment(layer, torch.cat(inputs[layer]), len(places))
            left = torch.stack(gradients[layer]).sum(0)
            for factor in (right, left):
                self._require_finite(factor, f"curvature of a {type(layer).__name__}")
            self._factors[layer] = Kronecker.of(right, left)

    def _along(self, root: Tensor, output: Tensor, column: int | None) -> Tensor:
        """Return a random combination of the columns of the roots, or one column, with a random sign for each row."""
        if column is None:
            (signs,) = self.signs([root[..., :1]])
            return (root @ signs).reshape(output.shape).to(output)
        (signs,) = self.signs([root[:, :1, 0]])
        own = root[..., column] if column < root.shape[-1] else torch.zeros_like(root[..., 0])
        return (signs * own).reshape(output.shape).to(output)

    def inverse(self, direct: Sequence[Tensor]) -> MatVec:
        """Return v -> P^-1 v, given the curvature to be added for each variable."""
        curvatures = [f.largest for f in self._factors.values()]
        curvatures += [mean + direct[k] for mean, k in zip(self._means, self._rest, strict=True)]
        largest = torch.stack(curvatures).amax()
        floor = torch.where(largest > 0, _FLOOR * largest, torch.ones_like(largest))
        added = {layer: torch.maximum(direct[own[0]], floor) for layer, own in self._places.items()}
        scales = [torch.maximum(m + direct[k], floor) for m, k in zip(self._means, self._rest, strict=True)]

        def apply(vector: Tensors) -> Tensors:
            out = list(vector)
            for layer, own in self._places.items():
                matrix = _joined(layer, [vector[k] for k in own])
                solved = self._factors[layer].solve(matrix, added[layer])
                for k, part in zip(own, _parted(layer, solved), strict=False):
                    out[k] = part
            for k, curvature in zip(self._rest, scales, strict=True):
                out[k] = vector[k] / curvature
            return tuple(out)

        return apply


@contextmanager
def _recorded(layers: Iterable[_Layer]) -> Iterator[list[_Call]]:
    """Record the calls of layers inside the context."""
    calls: list[_Call] = []

    def record(layer: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            (given,) = (*inputs, *named.values())
            # The edge stays that of the layer if the output is changed in place later.
            calls.append(_Call(layer, given.detach(), get_gradient_edge(output), output.shape))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record, with_kwargs=True).remove)
        yield calls


def _cut_rows(output: Tensor) -> torch.Size:
    """Return the shape of the rows of an output: all dimensions but the last, which holds columns if there are two or more."""
    return output.shape[:-1] if output.dim() > 1 else output.shape


def _roots(matrices: Tensor) -> Tensor:
    """Return R with R R^T = M for each positive semi-definite M; negative eigenvalues count as zero."""
    values, vectors = torch.linalg.eigh(matrices)
    roots: Tensor = vectors * values.clamp_min(0.0).sqrt()[..., None, :]
    return roots


def _moment(layer: _Layer, inputs: Tensor, parameters: int) -> Tensor:
    """Return the mean of a a^T, or its diagonal for an embedding, whose inputs a are unit vectors."""
    if isinstance(layer, nn.Embedding):
        counts = torch.bincount(inputs, minlength=layer.num_embeddings)
        shares: Tensor = counts.to(torch.promote_types(layer.weight.dtype, torch.float32)) / len(inputs)
        return shares
    if parameters > 1:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    return inputs.mT @ inputs / len(inputs)


def _joined(layer: _Layer, vectors: Sequence[Tensor]) -> Tensor:
    """Return the parts of a vector for the parameters of a layer as one matrix (outputs, inputs)."""
    if isinstance(layer, nn.Embedding):
        return vectors[0].mT
    weight, *bias = vectors
    return torch.cat([weight, *(b[:, None] for b in bias)], dim=1)


def _parted(layer: _Layer, matrix: Tensor) -> Tensors:
    """Return the parts of `_joined` again."""
    if isinstance(layer, nn.Embedding):
        return (matrix.mT.contiguous(),)
    width = layer.weight.shape[1]
    return matrix[:, :width].contiguous(), *(column.contiguous() for column in matrix[:, width:].unbind(1))


def _at_least_single(x: Tensor) -> Tensor:
    """Return a tensor in single precision if its precision is lower: there are no eigendecompositions in half precision."""
    wide: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide


def _mean(probe: Tensor, image: Tensor) -> Tensor:
    return (probe * image).mean()


def _grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    traced: bool = False,
) -> Tensors:
    return torch.autograd.grad(
        outputs, inputs, along, retain_graph=True, create_graph=traced, allow_unused=True, materialize_grads=True
    )
