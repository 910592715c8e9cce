"""The memory and the work of a pullback: by a linear solver and a kind of products, and through unrolled steps."""

from __future__ import annotations

from ..linear import SolveCost
from ..problem import LevelSize, PullbackCost
from .products import FiniteDifferenceProduct, Product
from .segments import balanced, uniform

__all__ = ["implicit_cost", "unrolled_cost"]

#: Vectors for each pair of a history while the next history is formed, besides the pairs before: the new ones, both as rows of
#: one matrix, and the conjugated directions.
_FORMING = 9


def implicit_cost(
    solve: SolveCost,
    size: LevelSize,
    kind: type[Product],
    *,
    history: int = 0,
    warm_start: bool = False,
    batches: int = 1,
) -> PullbackCost:
    """Return the most that a pullback takes: in a product of the linear solve, the mixed product, or the next history.

    Args:
        solve: what the linear solve takes.
        size: what parts of evaluations take.
        kind: the products.
        history: as in `Implicit`.
        warm_start: as in `Implicit`.
        batches: the number of curvature batches.
    """
    # Half precision is solved in single precision, unless products are differences.
    differences = issubclass(kind, FiniteDifferenceProduct)
    vector = size.variables if differences else max(size.variables, 4 * size.unknowns)
    kept = 2 * history + 3 if history else int(warm_start)
    products = solve.products + int(kept > 0 and solve.products > 0)
    solving = solve.vectors * vector + (size.product if products else 0)
    # The graph of the products is still there.
    forming = (_FORMING * history + solve.vectors) * vector + size.product if history else 0
    each = kind.evaluations if batches == 1 else batches * max(kind.evaluations, 1)
    # An assumed inverse stays, and so does the solution of a solve.
    beside = 1 if products else solve.vectors
    return PullbackCost(
        memory=max(solving, beside * vector + size.mixed, forming),
        kept=kept * vector,
        evaluations=kind.traces + products * each + kind.evaluations,
        products=products,
    )


def unrolled_cost(steps: int, every: int | None, size: LevelSize) -> PullbackCost:
    """Return the most that a pullback through some steps takes, with a checkpoint at an interval or where memory asks for one."""
    checkpoint = size.variables + size.state
    # The transpose of an SGD step needs neither the variables nor the momentum of the step.
    is_linear = size.state <= size.variables
    held = size.graph + size.variables + (0 if is_linear else checkpoint)
    measured = every is None and steps > 1
    lengths = (
        balanced(steps, held / max(checkpoint, 1)) if every is None else uniform(steps, steps if every == 1 else every)
    )
    # A segment starts at the variables of its checkpoint.
    segments = max((k + 1) * checkpoint + length * held for k, length in enumerate(lengths)) - size.variables
    # Beside the adjoint: a product, or the parts of a step and of its transpose.
    transposed = 0 if is_linear else 3 * checkpoint
    return PullbackCost(
        # The value of the gradient is dropped before the product.
        memory=segments + size.variables + max(size.product - size.variables, transposed),
        # The first gradient is taken twice, and steps before the last checkpoint are taken again.
        evaluations=steps + (steps - lengths[-1]) + 1 + measured,
        products=steps,
    )
