"""The memory and the work of a pullback, as an estimator states them before it runs."""

from __future__ import annotations

import attrs

__all__ = ["LevelSize", "PullbackCost"]


@attrs.frozen(kw_only=True)
class LevelSize:
    """The bytes that parts of a level's evaluations take in one process, measured on its rows of a batch.

    Each peak includes the results. Those of products include what they keep for the next one, and their comparison with
    differences at first use.

    Attributes:
        unknowns: the number of its variables.
        variables: the bytes of its variables.
        state: the bytes of the state of its optimiser.
        gradient: the peak of one first derivative of its objective.
        product: the peak of the first product with its Hessian; 0 for an estimator that takes none.
        mixed: the peak of the first mixed product, which follows.
        graph: the bytes of a graph of its gradient, for estimators that hold several; 0 for others.

    Example:
        >>> from mlopt.problem import LevelSize
        >>> LevelSize(unknowns=10, variables=40, gradient=60).product
        0
    """

    unknowns: int
    variables: int
    state: int = 0
    gradient: int = 0
    product: int = 0
    mixed: int = 0
    graph: int = 0


@attrs.frozen(kw_only=True)
class PullbackCost:
    """The most that one pullback through a level takes.

    Attributes:
        memory: the peak in bytes, without the cotangent that it receives.
        kept: the bytes that a run keeps from one pullback to the next.
        evaluations: the number of evaluations of the level's loss, each with a backward pass.
        products: the number of products with second derivatives in linear solves, as in `Report.products`.

    Example:
        >>> from mlopt.problem import PullbackCost
        >>> PullbackCost(memory=400, evaluations=2).products
        0
    """

    memory: int
    kept: int = 0
    evaluations: int = 0
    products: int = 0
