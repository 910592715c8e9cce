"""A comparison of each kind of products with differences of first derivatives, once for each problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import MloptError, ProblemError
from ...problem import Block, LevelTerm, Vectors, cut
from ...shards import any_sharded, sharded_as
from ...tensors import Tensors, add, axpy, dot, is_zero, norm, scale, subtract
from .difference import Difference
from .finite_difference import FiniteDifferenceProduct
from .forward import ForwardProduct
from .product import Product
from .promotion import promoted
from .supplied import SuppliedProduct

__all__ = ["verified"]

T = TypeVar("T")

#: Relative discrepancy that the first, cheap comparison accepts.
_CLOSE = {torch.float64: 1e-4, torch.float32: 1e-2}
#: Relative discrepancies in double precision from which products are in doubt: of vectors, and of inner products, which see only
#: a part of the error; and the least multiple of the difference's own error.
_WRONG, _UNEQUAL, _MULTIPLE = 0.01, 0.002, 10.0
#: Relative error of a difference in double precision at which no shorter step is tried.
_SETTLED = 1e-4
#: Displacements in double precision, relative to the variables: few kinks of a network lie within the shortest.
_STEPS = (1e-5, 1e-6, 1e-7, 1e-8)
#: Rounding of a first derivative in double precision, relative to its norm.
_ROUNDING = 1e-15


def verified(product: Product, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
    """Return a product, compared with differences the first time that this kind is used for a term and its blocks.

    With g_D the first derivatives of the term by the blocks D of the direction v, the product must be the transpose of their
    derivative by the wanted blocks W. Two comparisons show if it is:

        product = d/ds g_W(D + s v),        <product, p> = <v, d/ds g_D(W + s p)>    for one p.

    Both are made for the direction that is asked for, and for a random one.

    The first fails if torch differentiates a kernel or a custom function wrongly, or if a loss stops gradients. The second
    fails if g is not the derivative of a function, which stopped gradients and hooks can cause; then the first can hold for
    products that are differences themselves. If one fails, both are repeated in double precision at shorter and shorter steps.
    Rounding and kinks (ReLU, max-pooling) do not matter there. A product is in doubt only if the discrepancy exceeds the
    difference's own error by far. A loss that cannot be evaluated in double precision is not judged. If it also raises an
    error at displaced variables in its own precision, a remark says that the product was not verified.

    Args:
        product: the product.
        direction: v, by block.
        wanted: the blocks W.
    """
    blocks = (tuple(direction), tuple(wanted))
    if blocks in product.settled:
        return product(direction, wanted)
    workspace = product.term.point.workspace
    kind = (type(product), product.term.label, blocks)
    if kind in workspace.settled:
        product.settled.add(blocks)
        return product(direction, wanted)
    key = ("products", type(product).__name__, *product.term.label, _names(direction), _names(wanted))
    if key in workspace.doubts:
        product.remark(workspace.doubts[key])
    if workspace.verifying:
        return product(direction, wanted)
    if key in workspace.verified or not product.needs_verification(direction, wanted):
        product.settled.add(blocks)
        if key in workspace.verified and key not in workspace.doubts:
            workspace.settled.add(kind)
        return product(direction, wanted)
    size = float(norm(_flat(direction)))
    if size == 0.0 or not math.isfinite(size):
        return product(direction, wanted)
    probe = _full(direction, product.term.values)
    # The first direction of differences decides their steps.
    decisive = isinstance(product, FiniteDifferenceProduct) and probe is not direction
    workspace.verifying = True
    try:
        first = product(direction, wanted) if decisive else None
        # Block by block: beside the product for variables of the size 1e-5, that for others would be lost.
        groups = [[block] for block in wanted] if len(wanted) > 1 else [wanted]
        checks = [_Check(product, probe, group) for group in groups if product.needs_verification(direction, group)]
        results = [check.result() for check in checks]
        workspace.verified.add(key)
        gaps = [check.discrepancy(result) for check, result in zip(checks, results, strict=True)]
        failure = next((check.failure for check in checks if check.failure is not None), None)
        if known := [gap for gap in gaps if gap is not None]:
            workspace.doubts[key] = _sentence(product, max(known))
        elif failure is not None:
            workspace.doubts[key] = _unverified(product, failure)
        if key in workspace.doubts:
            product.remark(workspace.doubts[key])
    finally:
        workspace.verifying = False
    if first is None and len(wanted) == 1 and probe is direction:
        return results[0]
    return product(direction, wanted) if first is None else first


def _full(direction: Vectors, values: Vectors) -> Vectors:
    """Return a direction, or a random one in place of a unit vector, as `Dense` takes: that would show one column only."""
    entries = [x for vectors in direction.values() for x in vectors]
    # One count for all tensors: the host waits for the device at each that it reads.
    if (
        any_sharded(entries)
        or sum(x.numel() for x in entries) == 1
        or int(sum(x.count_nonzero() for x in entries)) != 1
    ):
        return direction
    generator = torch.Generator().manual_seed(1)

    def drawn(x: Tensor, variable: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
        size = variable.detach().norm()
        return noise * torch.where(size > 0, size, 1.0)

    full = {
        block: tuple(drawn(x, variable) for x, variable in zip(vectors, values[block], strict=True))
        for block, vectors in direction.items()
    }
    largest = norm(_flat(full))
    return {block: tuple((x / largest).to(x.dtype) for x in vectors) for block, vectors in full.items()}


def _sentence(product: Product, gap: float) -> str:
    level, part = product.term.label
    if isinstance(product, SuppliedProduct):
        return (
            f"the product that the regularizer of level {level!r} supplies differs from differences of its gradient by "
            f"{gap:.1%}; correct it, or leave it out"
        )
    if part == "residual":
        return (
            f"derivatives of the residual differ from differences of it by {gap:.1%}: look for detach() or no_grad() in it, "
            "hooks of parameters, custom functions, and kernels with a wrong derivative"
        )
    if isinstance(product, FiniteDifferenceProduct):
        return (
            f"the gradient of the {part} is not the derivative of a function: second derivatives that must be equal differ by "
            f"{gap:.1%}; look for detach() or no_grad() in the loss, hooks of parameters, and custom functions"
        )
    return (
        f"second derivatives of the {part} differ from differences of its gradient by {gap:.1%}: look for detach() or no_grad() "
        f"in the loss, {_READS * isinstance(product, ForwardProduct)}hooks of parameters, custom functions, and kernels with a "
        "wrong second derivative; in the last two cases, use products='finite_difference'"
    )


#: Forward mode evaluates a loss with tensors in place of its parameters.
_READS = "requires_grad of a parameter, which is False in forward mode (use products='autograd'), "


def _unverified(product: Product, failure: Exception) -> str:
    _, part = product.term.label
    first = str(failure).strip().partition("\n")[0]
    return (
        f"second derivatives of the {part} could not be verified: at variables moved by a small part of their size, it raised "
        f"{type(failure).__name__} ({first}); let it accept such variables, or compare with check_hypergradient"
    )


class _Check:
    """The comparisons of one product."""

    def __init__(self, product: Product, direction: Vectors, wanted: Sequence[Block]) -> None:
        self._product, self._direction, self._wanted = product, direction, wanted
        self._differences = isinstance(product, FiniteDifferenceProduct)
        #: Terms of responses are differences of products themselves, and transposed products of theirs mean nothing new.
        one_sided = isinstance(product, FiniteDifferenceProduct | ForwardProduct) or set(direction) != set(wanted)
        self._transposed = isinstance(product.term, LevelTerm) and one_sided
        #: A hook that masks the gradient of a variable keeps some of its components where they are.
        self._hooked = [bool(x._backward_hooks) for block in wanted for x in product.term.values[block]]
        self._expected: Tensors | None = None
        #: By comparison that could not be made, the error of the loss beside the present point.
        self._failures: dict[str, Exception] = {}
        dtypes = [x.dtype for vectors in direction.values() for x in vectors]
        self._close = max(_CLOSE.get(dtype, 0.02) for dtype in dtypes)

    def result(self) -> dict[Block, Tensors]:
        """Return the product; the difference comes first, so that its graph is not held beside that of the product."""
        if not self._differences:
            self._expected = self._tried("straight", lambda: self._difference(self._direction, self._wanted))
        return self._product(self._direction, self._wanted)

    def discrepancy(self, result: Vectors) -> float | None:
        """Return the relative discrepancy if the product is wrong beyond doubt, else None."""
        value = self._flattened(result)
        if not math.isfinite(float(norm(value))):
            return None
        gap = self._compared(self._direction, value, self._expected)
        self._expected = None  # memory: two products and their differences are not held at once
        return self._compared(*self._another()) if gap is None else gap

    def _compared(self, direction: Vectors, value: Tensors, expected: Tensors | None) -> float | None:
        """Return the discrepancy of the product with one direction, in either comparison, if it is certain."""
        straight = self._differences or (expected is not None and _gap(value, expected) <= self._close)
        if not straight:
            gap = self._tried("straight", partial(self._straight, direction), last=True)
            if gap is not None:
                return gap
        if self._transposed and not self._tried("transposed", partial(self._transposes, direction, value)):
            return self._tried("transposed", partial(self._transposed_gap, direction), last=True)
        return None

    def _another(self) -> tuple[Vectors, Tensors, Tensors | None]:
        """Return a random direction, its product and its difference: the first direction may hardly meet what is wrong."""
        generator = torch.Generator().manual_seed(2)

        def drawn(x: Tensor, variable: Tensor) -> Tensor:
            noise = sharded_as(torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu"), x)
            masked = bool(variable._backward_hooks) and not is_zero((x,))
            return noise * (x != 0) if masked else noise

        values, size = self._product.term.values, norm(_flat(self._direction))
        other = {
            block: tuple(drawn(x, variable) for x, variable in zip(vectors, values[block], strict=True))
            for block, vectors in self._direction.items()
        }
        share = size / norm(_flat(other))
        other = {block: tuple((share * x).to(x.dtype) for x in vectors) for block, vectors in other.items()}
        # The difference comes first, as for the first direction.
        difference = None
        if not self._differences:
            difference = self._tried("straight", lambda: self._difference(other, self._wanted))
        return other, self._flattened(self._product(other, self._wanted)), difference

    @property
    def failure(self) -> Exception | None:
        """The error of the loss for which a comparison could not be made; None if all were made."""
        return next(iter(self._failures.values()), None)

    def _tried(self, comparison: str, evaluate: Callable[[], T], *, last: bool = False) -> T | None:
        """Return the value, or None if an evaluation that only a check needs is not possible.

        Args:
            comparison: "straight" or "transposed".
            evaluate: returns the value.
            last: True for the evaluation in double precision. It replaces one that failed. Its own failure says nothing about
                the loss, since some kernels refuse double precision.
        """
        try:
            value = evaluate()
        except ProblemError:
            raise  # the problem is at fault, not the check
        except (MloptError, RuntimeError, ArithmeticError, TypeError, ValueError) as error:
            if not last:
                self._failures[comparison] = error
            return None
        if last:
            self._failures.pop(comparison, None)
        return value

    def _flattened(self, vectors: Vectors) -> Tensors:
        return tuple(x.detach() for block in self._wanted for x in vectors[block])

    def _difference(self, direction: Vectors, wanted: Sequence[Block]) -> Tensors:
        difference = Difference(self._product.term, direction, wanted)
        reach = difference.reach()
        step = difference.step(torch.where(reach > 0, reach, 1.0))
        return _flat(difference(step))

    def _transposes(self, direction: Vectors, value: Tensors) -> bool:
        """Return whether <product, p> = <v, d/ds g_D(W + s p)>, roughly."""
        along = cut(self._probe(value), self._wanted, self._product.term.values)
        moved = self._difference(along, list(direction))
        left, right = float(dot(value, _flat(along))), float(dot(_flat(direction), moved))
        return abs(left - right) <= self._close * max(abs(left), abs(right))

    def _probe(self, value: Tensors) -> Tensors:
        """Return a direction that an error is not orthogonal to: the product, plus a fixed random vector of its size.

        Of a variable with a hook, components that are zero beside others are left out: its gradient may be masked.
        """
        generator = torch.Generator().manual_seed(0)
        whole = (torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu") for x in value)
        drawn = [sharded_as(noise, x) for noise, x in zip(whole, value, strict=True)]
        drawn = [
            noise * (x != 0) if hooked and not is_zero((x,)) else noise
            for noise, x, hooked in zip(drawn, value, self._hooked, strict=True)
        ]
        size = norm(value)
        return axpy(size / norm(drawn), drawn, value) if float(size) else tuple(drawn)

    def _straight(self, direction: Vectors) -> float | None:
        """Return the discrepancy between the product and differences in double precision, if it is certain."""
        term = self._product.term
        with promoted(term.point):
            direction = {block: _double(vectors) for block, vectors in direction.items()}
            value = _double(self._flattened(self._product.renewed()(direction, self._wanted)))
            expected, error = _settled(Difference(term, direction, self._wanted))
        return _certain(norm(subtract(value, expected)), max(norm(value), norm(expected)), error, _WRONG)

    def _transposed_gap(self, direction: Vectors) -> float | None:
        """Return the discrepancy between both sides of the transposed product in double precision, if it is certain."""
        term = self._product.term
        with promoted(term.point):
            direction = {block: _double(vectors) for block, vectors in direction.items()}
            error = 0.0
            if self._differences:  # at shorter steps than those of the product, which kinks spoil
                value, error = _settled(Difference(term, direction, self._wanted))
            else:
                value = _double(self._flattened(self._product.renewed()(direction, self._wanted)))
            along = self._probe(value)
            paired = _flat(direction)
            moved, other = _settled(Difference(term, cut(along, self._wanted, term.values), list(direction)), paired)
            left, right = dot(value, along), dot(paired, moved)
            error = error * float(norm(along)) + other
        return _certain((left - right).abs(), max(left.abs(), right.abs()), error, _UNEQUAL)


def _settled(difference: Difference, paired: Tensors | None = None) -> tuple[Tensors, float]:
    """Return the difference at the step of least error, and that error.

    The error is the distance from the difference at the next step, or between both one-sided differences, or the rounding of the
    derivatives over the step: derivatives that rounding leaves equal agree at every step.

    Args:
        difference: the difference.
        paired: a vector; if given, the error is that of its inner product with the difference.
    """

    def distance(a: Tensors, b: Tensors) -> float:
        change = subtract(a, b)
        return float(norm(change) if paired is None else dot(change, paired).abs())

    rounding = _ROUNDING * float(norm(_flat(difference.middle))) * (1.0 if paired is None else float(norm(paired)))
    reach = difference.reach()
    scaled = difference.step(torch.where(reach > 0, reach, 1.0)) / difference.relative_step
    previous: Tensors | None = None
    best: tuple[Tensors, float] | None = None
    for relative in _STEPS:
        ahead, behind = map(_flat, difference.one_sided(relative * scaled))
        middle = scale(0.5, add(ahead, behind))
        if previous is not None:
            error = max(distance(previous, middle), distance(ahead, behind), rounding / float(relative * scaled))
            if best is None or error < best[1]:
                best = middle, error
            if error <= _SETTLED * float(norm(middle) if paired is None else dot(middle, paired).abs()):
                break
        previous = middle
    assert best is not None
    return best


def _certain(discrepancy: Tensor, size: Tensor, error: float, least: float) -> float | None:
    """Return the relative discrepancy if it is at least `least` and exceeds the error by far."""
    gap = float(discrepancy)
    if not gap > _MULTIPLE * error or not gap > least * float(size):
        return None
    return gap / float(size)


def _gap(value: Tensors, expected: Tensors) -> float:
    size = max(float(norm(value)), float(norm(expected)))
    return float(norm(subtract(value, expected))) / size if size else 0.0


def _names(blocks: Vectors | Sequence[Block]) -> str:
    return ", ".join(sorted(map(str, blocks)))


def _flat(vectors: Vectors) -> Tensors:
    return tuple(x.detach() for block in vectors for x in vectors[block])


def _double(vectors: Sequence[Tensor]) -> Tensors:
    return tuple(x.detach().double() for x in vectors)
