"""Additions to the report on a level: a linear solve, a product, and a doubt about the decay of its optimiser."""

from __future__ import annotations

from collections.abc import Sequence

from ..linear import LinearSolution
from ..problem import Block, FixedPoint, Report, Vectors
from ..tensors import Tensors
from .products import MeanSecondDerivatives, SecondDerivatives

__all__ = ["doubt_unsteady", "record", "recorded_product"]


def record(report: Report, solution: LinearSolution) -> None:
    """Add a linear solve to a report: counts are summed, and the worst residual and the widest curvature are kept."""
    report.solves += 1
    report.iterations += solution.iterations
    report.products += solution.products
    if solution.residual is not None:
        report.residual = max(solution.residual, report.residual or 0.0)
    if solution.converged is not None:
        report.converged = solution.converged and report.converged is not False
    if solution.curvature is not None:
        low, high = report.curvature or solution.curvature
        report.curvature = (min(low, solution.curvature[0]), max(high, solution.curvature[1]))
    if solution.remark and solution.remark not in report.remarks:
        report.remarks = (*report.remarks, solution.remark)


def recorded_product(
    report: Report,
    derivatives: SecondDerivatives | MeanSecondDerivatives,
    direction: Vectors,
    wanted: Sequence[Block],
) -> dict[Block, Tensors]:
    """Return a product with second derivatives; add its difference step and its doubts to a report."""
    total = derivatives(direction, wanted)
    if derivatives.step is not None:
        report.step = derivatives.step
    for remark in derivatives.remarks:
        report.doubt(remark)
    return total


def doubt_unsteady(report: Report, fixed: FixedPoint, gradient: Tensors, variables: Tensors, name: str) -> None:
    """Add a remark if the decay of a level's optimiser moves with the solution: linear systems take it for constant."""
    low = (report.curvature or (0.0, 0.0))[0]
    if fixed.is_unsteady(gradient, variables, low):
        report.doubt(
            f"the second moments of the optimiser of level {name!r} follow its gradient, so its decoupled decay moves with the "
            "solution, which the Hessian leaves out; use coupled decay (Adam's), or a regularizer"
        )
