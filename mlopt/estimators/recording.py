"""A linear solve added to the report on a level."""

from __future__ import annotations

from ..linear import LinearSolution
from ..problem import Report

__all__ = ["record"]


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
