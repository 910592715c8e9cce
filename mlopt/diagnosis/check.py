"""Comparison of the estimators of a problem with an oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from ..errors import EstimatorError, SecondDerivativeError
from ..estimators import Dense, Implicit
from ..hypergradient import Hypergradient, standalone
from ..problem import Estimator, Problem, Report, Workspace
from ..rng import preserved
from ..tensors import Tensors, dot, flatten, norm, subtract, unflatten
from ..validation import is_positive, is_whole, require
from .evaluation import fixed_batches, put_back, rendered
from .resolve import Resolver

__all__ = ["Check", "DisagreementError", "Row", "check_hypergradient"]

_DENSE_LIMIT = 5_000
#: A parameter is not judged on its own if its error is less than this share of the error allowed for the whole gradient.
_NEGLIGIBLE = 1e-3


@attrs.frozen(kw_only=True, eq=False)
class Row:
    """One comparison: of a parameter's gradient, of a derivative along a direction, or of the whole.

    Attributes:
        name: the parameter, the direction, or "all".
        estimator: the estimator's value: a norm or, along a direction, a derivative.
        oracle: the oracle's value.
        error: ||estimator - oracle|| / ||oracle||.
        cosine: cosine of the angle between the two; None for single numbers.
    """

    name: str
    estimator: float
    oracle: float
    error: float
    cosine: float | None = None


@attrs.frozen(kw_only=True, eq=False)
class Check:
    """An estimator against an oracle; it prints as a table.

    Attributes:
        level: the level whose hypergradient was compared.
        oracle: "dense" or "resolve".
        tolerance: the relative error allowed.
        rows: the comparisons; the last is of the whole.
        accuracy: estimated relative error of the oracle itself.
        reports: reports of the estimators, by level.
        gradient_norms: by level, the norm of the gradient of what its optimiser minimises at the present point. Implicit
            estimators assume that it is zero. Empty for "dense", which assumes the same.
        moved: by level, ||x* - x|| / ||x||, the distance of its variables from the solution x*. Empty for "dense".
        error_at_solution: the error of the whole with the levels inside at their solutions; None for "dense".
        remarks: further remarks, in sentences.
    """

    level: str
    oracle: str
    tolerance: float
    rows: tuple[Row, ...]
    accuracy: float
    reports: dict[str, Report]
    gradient_norms: dict[str, float] = attrs.field(factory=dict)
    moved: dict[str, float] = attrs.field(factory=dict)
    error_at_solution: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The relative error of the whole."""
        return self.rows[-1].error

    def __rich__(self) -> RenderableType:
        table = Table(title=f"hypergradient of {self.level!r} against {self.oracle!r}", title_justify="left")
        for heading in ("", "estimator", "oracle", "relative error", "cosine"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self.rows:
            cosine = "" if row.cosine is None else f"{row.cosine:.6f}"
            table.add_row(row.name, f"{row.estimator:.6g}", f"{row.oracle:.6g}", f"{row.error:.2e}", cosine)
        notes = [f"tolerance {self.tolerance:.2e}; the oracle is accurate to {self.accuracy:.1e}"]
        notes += [_summary(name, report) for name, report in self.reports.items()]
        for name, size in self.gradient_norms.items():
            moved = f", {self.moved[name]:.1e} of its variables' norm from its solution" if name in self.moved else ""
            notes.append(f"{name}: gradient of norm {size:.1e} at this point{moved}")
        if self.error_at_solution is not None:
            notes.append(f"relative error with the levels inside at their solutions: {self.error_at_solution:.2e}")
        return Group(table, "\n".join([*notes, *self.remarks]))

    def __str__(self) -> str:
        return rendered(self)


class DisagreementError(EstimatorError):
    """An estimator and an oracle disagree by more than the tolerance.

    Attributes:
        check: the comparison.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> try:
        ...     check = mlopt.check_hypergradient(logistic_regression(mlopt.Identity()).problem)
        ... except mlopt.DisagreementError as error:
        ...     print(error.check.error > 0.01)
        True
    """

    def __init__(self, sentence: str, check: Check) -> None:
        super().__init__(f"{sentence}\n{check}")
        self.check = check


def check_hypergradient(
    problem: Problem,
    batches: Mapping[str, Any] | None = None,
    *,
    level: str | None = None,
    oracle: str = "dense",
    tolerance: float = 1e-2,
    directions: int = 4,
    seed: int = 0,
) -> Check:
    """Compare the estimators of a problem with an oracle, at the present point; raise if they disagree.

    "dense" replaces every estimator by `Dense`: the exact implicit derivative at this point, with the Hessian on the same
    batches. It measures how well the linear systems are solved. "resolve" does not rely on implicit differentiation: with u the
    variables of the level, x*(u) the levels inside, minimised again by L-BFGS, and unit directions d,

        <gradient, d>   against   (f(u + h d, x*(u + h d)) - f(u - h d, x*(u - h d))) / 2h.

    It measures how far the gradient is from that of the true outer objective, and so also whether the levels inside are
    near enough to their solutions. An estimator that is not implicit, such as one that unrolls a few steps, is compared with
    the same oracles: its truncation counts as its error. Nothing moves: parameters, buffers and generators are bit-identical
    afterwards.

    Args:
        problem: the problem; its modules hold the point.
        batches: the batch of each level by name; a missing one is the first of the level's data, in the order of `seed`.
        level: the level whose hypergradient is checked; the outermost if None.
        oracle: "dense", for levels of up to 5,000 variables, or "resolve".
        tolerance: the relative error allowed, for each parameter and for the whole.
        directions: number of random directions for "resolve".
        seed: seed of the random numbers that the losses draw, of the data's order and of the directions.

    Returns:
        The comparison; printing it shows a table.

    Raises:
        DisagreementError: estimator and oracle differ by more than the tolerance; the error holds the comparison.
        EstimatorError: the oracle does not apply to this problem, or is not accurate to this tolerance.
        ArgumentError: an argument is invalid.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> case = logistic_regression(mlopt.ConjugateGradient(iterations=3))
        >>> mlopt.check_hypergradient(case.problem, oracle="resolve", tolerance=1e-6).error < 1e-6
        True
    """
    own = "check_hypergradient"
    require(own, "oracle", oracle, oracle in ("dense", "resolve"), "'dense' or 'resolve'")
    require(own, "tolerance", tolerance, is_positive(tolerance), "a finite number > 0")
    require(own, "directions", directions, is_whole(directions, 1), "a whole number >= 1")
    require(own, "seed", seed, is_whole(seed), "a whole number")
    problem.ranks.refuse(own)
    name = (problem.outermost if level is None else problem[level]).name
    batches = fixed_batches(problem, batches, seed)
    estimate = standalone(problem, batches, name, seed, Workspace())
    if oracle == "dense":
        check = _against_dense(problem, batches, estimate, tolerance, seed)
    else:
        check = _against_resolved(problem, batches, estimate, tolerance, directions, seed)
    _judge(check, _not_implicit(problem, estimate))
    return check


def _against_dense(
    problem: Problem, batches: Mapping[str, Any], estimate: Hypergradient, tolerance: float, seed: int
) -> Check:
    for pulled in problem:
        size = sum(variable.numel() for variable in pulled.parameters)
        if problem.responds(pulled.name) and size > _DENSE_LIMIT:
            raise EstimatorError(
                f"check_hypergradient: level {pulled.name!r} has {size:,} variables, and the dense oracle writes out the "
                f"Hessian of at most {_DENSE_LIMIT:,}; use oracle='resolve'"
            )
    exact = {level.name: _exact(level.estimator) for level in problem if problem.responds(level.name)}
    try:
        truth = standalone(problem, batches, estimate.level, seed, Workspace(), exact)
    except SecondDerivativeError as error:
        raise EstimatorError(
            f"check_hypergradient: the dense oracle takes second derivatives ({error}); use oracle='resolve', which does not"
        ) from error
    rows = [_compare(name, (gradient,), (truth.gradient[name],)) for name, gradient in estimate.gradient.items()]
    rows.append(_compare("all", tuple(estimate.gradient.values()), tuple(truth.gradient.values())))
    remarks = [f"dense oracle, {name}: {remark}" for name, report in truth.reports.items() for remark in report.remarks]
    return Check(
        level=estimate.level,
        oracle="dense",
        tolerance=tolerance,
        rows=tuple(rows),
        accuracy=max([report.residual or 0.0 for report in truth.reports.values()], default=0.0),
        reports=estimate.reports,
        remarks=tuple(remarks),
    )


def _exact(estimator: Estimator | None) -> Dense:
    """Return the oracle for an estimator: with the Hessian on the same batches."""
    if estimator is None:
        return Dense(limit=_DENSE_LIMIT)
    data, batches = estimator.curvature_data, estimator.curvature_batches
    return Dense(limit=_DENSE_LIMIT, curvature_data=data, curvature_batches=batches)


def _against_resolved(
    problem: Problem, batches: Mapping[str, Any], estimate: Hypergradient, tolerance: float, directions: int, seed: int
) -> Check:
    resolver = Resolver(problem, batches, estimate.level, seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = problem[estimate.level].parameters
    axes = [_direction(shapes, generator) for _ in range(directions)]
    with put_back(problem), preserved(problem.devices):
        resolver.run_solvers()
        norms = resolver.gradient_norms()
        before = {name: flatten(problem[name].parameters).detach().clone() for name in norms}
        resolver.solve_inside(estimate.level)
        resolver.require_bounds()
        after = {name: flatten(problem[name].parameters).detach() for name in norms}
        moved = {name: _relative(float((after[name] - x).norm()), float(x.norm())) for name, x in before.items()}
        settled = standalone(problem, batches, estimate.level, seed, Workspace(), solved=True)
        resolver.unsolved = 0.0
        measured = [resolver.derivative(flatten(axis)) for axis in axes]
    present, at_solution = (_along(axes, result) for result in (estimate, settled))
    truth = torch.tensor([value for value, _ in measured], dtype=torch.float64, device="cpu")
    rows = [
        Row(name=f"direction {k + 1}", estimator=a, oracle=b, error=_relative(abs(a - b), abs(b)))
        for k, (a, b) in enumerate(zip(present.tolist(), truth.tolist(), strict=True))
    ]
    rows.append(_compare("all", (present,), (truth,)))
    uncertainty = math.hypot(*(error for _, error in measured))
    return Check(
        level=estimate.level,
        oracle="resolve",
        tolerance=tolerance,
        rows=tuple(rows),
        accuracy=max(_relative(uncertainty, rows[-1].oracle), resolver.unsolved),
        reports=estimate.reports,
        gradient_norms=norms,
        moved=moved,
        error_at_solution=_compare("", (at_solution,), (truth,)).error,
        remarks=tuple(f"{name} was solved again to a gradient of norm {g:.1e}" for name, g in resolver.reached.items()),
    )


def _judge(check: Check, approximate: list[str]) -> None:
    """Raise if the comparison fails, with the likely cause."""
    if check.accuracy > check.tolerance:
        raise EstimatorError(
            f"check_hypergradient: the {check.oracle!r} oracle is only accurate to {check.accuracy:.1e}, but tolerance="
            f"{check.tolerance:.1e}; use float64, a smooth loss (no ReLU), a larger tolerance, or the other oracle\n{check}"
        )
    whole = check.rows[-1]
    off = [whole] if not whole.error <= check.tolerance else []
    if check.oracle == "dense":
        floor = _NEGLIGIBLE * check.tolerance * whole.oracle
        off += [r for r in check.rows[:-1] if not r.error <= check.tolerance and not r.error * r.oracle <= floor]
    if not off:
        return
    sentence = (
        f"check_hypergradient: the hypergradient of {check.level!r} is off by {off[0].error:.1e} ({off[0].name}), but "
        f"tolerance={check.tolerance:.1e}."
    )
    if check.error_at_solution is not None and check.error_at_solution <= check.tolerance:
        sentence += (
            f" With the levels inside at their solutions it is off by only {check.error_at_solution:.1e}: the point is "
            "the cause, not the estimator. Implicit estimators assume a zero gradient: "
        )
        sentence += "; ".join(_doubts(check)) or f"give {_unfinished(check)} more steps"
        sentence += "."
    else:
        if doubts := _doubts(check):
            sentence += f" Doubtful: {'; '.join(doubts)}."
        short = [repr(name) for name, r in check.reports.items() if r.converged is False and not r.doubtful]
        if names := ", ".join(short):
            sentence += (
                f" The linear solve of {names} did not converge: use more iterations, a preconditioner, or damping."
            )
    if approximate:
        sentence += (
            f" {' '.join(approximate)} The error comes from its own approximation (number of unrolled steps, size of a "
            "penalty), not from a linear solve: improve that, or raise the tolerance. RealSteps takes the steps themselves."
        )
        if check.oracle == "dense":
            sentence += (
                " Or its steps leave this point, which the oracle takes for the solution; oracle='resolve' does not."
            )
    raise DisagreementError(sentence, check)


def _doubts(check: Check) -> list[str]:
    """Return the remarks of the doubtful reports, which name the reason for an error."""
    return [f"level {name!r}: {'; '.join(r.remarks)}" for name, r in check.reports.items() if r.doubtful]


def _unfinished(check: Check) -> str:
    """Return the levels that are not at their solutions, with their distances."""
    far = {name: moved for name, moved in check.moved.items() if moved > check.tolerance} or check.moved
    return " and ".join(
        f"{name!r} (its solution is {moved:.1e} of its variables' norm away)" for name, moved in far.items()
    )


def _not_implicit(problem: Problem, estimate: Hypergradient) -> list[str]:
    return [
        f"{name!r} has {problem[name].response or problem[name].estimator}, which is not implicit."
        for name in estimate.reports
        if not isinstance(problem[name].estimator, Implicit)
    ]


def _compare(name: str, estimate: Tensors, truth: Tensors) -> Row:
    u, v = (tuple(x.to(torch.promote_types(x.dtype, torch.float64)) for x in side) for side in (estimate, truth))
    a, b = float(norm(u)), float(norm(v))
    cosine = 1.0 if a == b == 0.0 else 0.0 if a * b == 0.0 else float(dot(u, v)) / (a * b)
    return Row(name=name, estimator=a, oracle=b, error=_relative(float(norm(subtract(u, v))), b), cosine=cosine)


def _relative(difference: float, size: float) -> float:
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def _along(axes: Sequence[Tensors], result: Hypergradient) -> Tensor:
    """Return <gradient, d> for each direction d."""
    gradient = tuple(result.gradient.values())
    return torch.tensor([float(dot(gradient, axis)) for axis in axes], dtype=torch.float64, device="cpu")


def _direction(like: Tensors, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return a random vector of norm one in the shapes of the variables, the same on every device."""
    flat = torch.randn(sum(x.numel() for x in like), generator=generator, dtype=torch.float64, device="cpu")
    return tuple(part.to(x) for part, x in zip(unflatten(flat / flat.norm(), like), like, strict=True))


def _summary(name: str, report: Report) -> str:
    """Return a report in one line."""
    facts = [f"{report.iterations} iterations"] if report.iterations else []
    if report.residual is not None:
        facts.append(f"residual {report.residual:.1e}")
    if report.converged is not None:
        facts.append("converged" if report.converged else "not converged")
    if report.curvature is not None:
        facts.append(f"curvature {report.curvature[0]:.2g} to {report.curvature[1]:.2g}")
    if report.stationarity is not None:
        facts.append(f"stationarity {report.stationarity:.1e}")
    if report.step is not None:
        facts.append(f"difference step {report.step:.1e}")
    return f"{name}: {report.estimator}: {', '.join([*facts, *report.remarks]) or 'nothing measured'}"
