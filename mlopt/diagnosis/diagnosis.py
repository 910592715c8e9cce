"""Diagnosis of a problem before a long run: which estimators and products are safe for it, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import attrs
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from .. import linear
from ..errors import MloptError
from ..estimators import Implicit, LinearSolve
from ..hypergradient import at_solutions, run_solvers, seeded_generators
from ..problem import Level, Point, Problem, Workspace
from ..rng import preserved
from ..tensors import Tensors
from ..validation import is_whole, require
from .evaluation import evaluate, fixed_batches, put_back, rendered
from .finding import Finding
from .findings import (
    DOUBTFUL,
    curvature_findings,
    draw_findings,
    module_findings,
    point_findings,
    precision_findings,
    role_findings,
)
from .measurements import Measurements, Tap, Trial, measure
from .requirements import Requirements, estimate_requirements
from .sharding import shardings
from .solver_rules import SOLVERS, rate_solver
from .spectrum import Spectrum

__all__ = ["Diagnosis", "LevelDiagnosis", "diagnose"]

#: Relative difference between two kinds of products above which the worse kind is unsafe; a warning is issued above `DOUBTFUL`.
_WRONG = 0.1


@attrs.frozen(kw_only=True, eq=False)
class LevelDiagnosis:
    """The diagnosis of one level.

    Attributes:
        level: its name.
        findings: the findings; errors concern the level with its present estimator.
        products: by kind of products, a finding on their safety.
        solvers: by linear solver with default settings, a finding on its safety.
        differences: by kind of products, the relative differences of H v, and of the mixed product with v, from those of
            `autograd`; v is a cotangent that is pulled back here.
        costs: by kind of products, the time of one product with H over that of one gradient.
        spectrum: the ends of the Hessian's spectrum; None if every kind of products failed.
    """

    level: str
    findings: tuple[Finding, ...]
    products: dict[str, Finding]
    solvers: dict[str, Finding]
    differences: dict[str, tuple[float, float]]
    costs: dict[str, float]
    spectrum: Spectrum | None

    def __rich__(self) -> RenderableType:
        table = Table(show_header=False, title=f"level {self.level!r}", title_justify="left")
        for finding in self.findings:
            table.add_row(finding.severity, str(finding))
        table.add_section()
        for kind, finding in self.products.items():
            cost = f" (x {self.costs[kind]:.1f} a gradient)" if kind in self.costs else ""
            table.add_row(f"{kind} products", f"{finding}{cost}")
        table.add_section()
        for solver, finding in self.solvers.items():
            table.add_row(solver, str(finding))
        return table


@attrs.frozen(kw_only=True, eq=False)
class Diagnosis:
    """The diagnosis of a problem; it prints as tables.

    Attributes:
        levels: by name, the levels that cotangents are pulled back through.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> diagnosis = mlopt.diagnose(logistic_regression(mlopt.Dense()).problem)
        >>> str(diagnosis).splitlines()[-1]
        'safe to run'
    """

    levels: dict[str, LevelDiagnosis]
    _estimate: Callable[[], Requirements] = attrs.field(repr=False)

    @cached_property
    def requirements(self) -> Requirements:
        """An estimate of the memory and the passes of an outer step, made when it is first read or printed."""
        return self._estimate()

    @property
    def safe(self) -> bool:
        """True if no finding is an error."""
        return not any(f.severity == "error" for level in self.levels.values() for f in level.findings)

    def __rich__(self) -> RenderableType:
        conclusion = "safe to run" if self.safe else "not safe to run: see the errors"
        return Group(
            *self.levels.values(),
            self.requirements,
            conclusion if self.levels else "no level is pulled back: nothing to diagnose",
        )

    def __str__(self) -> str:
        return rendered(self)


def diagnose(
    problem: Problem,
    batches: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    processes: int = 1,
    sharded: Mapping[str, Iterable[nn.Module]] | None = None,
) -> Diagnosis:
    """Diagnose every level that cotangents are pulled back through, at the present point, before a long run.

    Each kind of products is tried on a cotangent v that is pulled back here, and compared with autograd's. Some twenty
    Lanczos steps estimate the ends of the Hessian's spectrum, which determine the solvers that converge and their speed:
    conjugate gradients need about sqrt(kappa) / 2 ln(2 / 0.01) iterations for an error of 1%, a Neumann series a step size
    below 2 / lambda_max. The memory and the passes of an outer step are estimated when `requirements` is first read, as by
    `mlopt.diagnosis.estimate_requirements`. Nothing moves: parameters, buffers, optimisers, `.grad` and generators are
    bit-identical afterwards.

    Args:
        problem: the problem; its modules hold the point.
        batches: the batch of each level by name; a missing one is the first of the level's data, in the order of `seed`.
        seed: seed of the random numbers that the losses draw, of the data's order and of the random vectors.
        processes: the number of processes for which memory is estimated.
        sharded: by level that `fully_shard` will shard over them, the parts of its module that are given to it, as in
            `mlopt.diagnosis.estimate_requirements`.

    Returns:
        Findings for each level, also on each kind of products and each solver; printing it shows tables.

    Raises:
        MloptError: a loss cannot be evaluated, or has no first derivative.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> diagnosis = mlopt.diagnose(logistic_regression(mlopt.ConjugateGradient(iterations=3)).problem)
        >>> diagnosis.safe, diagnosis.levels["regression"].products["forward"].severity
        (True, 'ok')
    """
    require("diagnose", "seed", seed, is_whole(seed), "a whole number")
    require("diagnose", "processes", processes, is_whole(processes, 1), "a whole number >= 1")
    shardings(problem, sharded, processes)  # it checks its arguments
    problem.ranks.refuse("diagnose")
    workspace, levels = Workspace(), {}
    batches = fixed_batches(problem, batches, seed)
    estimate = partial(estimate_requirements, problem, batches, processes=processes, sharded=sharded, seed=seed)
    with put_back(problem), preserved(problem.devices):
        start = Point(problem, batches, seeded_generators(problem, "seed", seed), workspace=workspace)
        run_solvers(start, problem.outermost)
        cotangents = _cotangents(problem, workspace, batches, seed)
        for level in reversed(problem.levels):
            if problem.needs_estimator(name := level.name):
                measures = measure(problem, workspace, batches, name, seed, cotangents.get(name))
                more = [*_unused(name, workspace), *_refused(problem, workspace, batches, name, seed)]
                levels[name] = _diagnose(problem, name, measures, name in cotangents, more)
    return Diagnosis(levels=levels, estimate=estimate)


def _cotangents(problem: Problem, workspace: Workspace, batches: Mapping[str, Any], seed: int) -> dict[str, Tensors]:
    """Return a cotangent for each level that a nonzero one reaches, from any level that it is solved inside."""
    taps = {level.name: Tap() for level in problem if problem.needs_estimator(level.name)}
    tapped = {name: LinearSolve(solver=tap, products="finite_difference") for name, tap in taps.items()}
    generators = seeded_generators(problem, "seed", seed)
    for level in problem:
        if problem.graph[level.name].parts and level.response is None:
            evaluate(Point(problem, batches, generators, workspace=workspace, estimators=tapped), level)
    return {name: tap.cotangents[0] for name, tap in taps.items() if tap.cotangents}


def _unused(name: str, workspace: Workspace) -> list[Finding]:
    """Return a finding on each level that the losses of a level name, and have no derivative with respect to."""
    return [
        Finding("error", sentence)
        for (check, owner, reference, *_), sentence in workspace.doubts.items()
        if check == "loss" and owner == name != reference
    ]


def _refused(problem: Problem, workspace: Workspace, batches: Mapping[str, Any], name: str, seed: int) -> list[Finding]:
    """Return a finding if an estimator that is not implicit, and is not measured further, refuses its level."""
    host = problem.graph[name].host
    if host is None or isinstance(problem[name].estimator, Implicit) or problem[host].response is not None:
        return []
    point = Point(problem, batches, seeded_generators(problem, "seed", seed), workspace=workspace)
    try:
        with at_solutions(point, problem[host]):
            evaluate(point, problem[host])
    except MloptError as error:
        return [Finding("error", str(error))]
    return []


def _diagnose(
    problem: Problem, name: str, measures: Measurements, influential: bool, more: list[Finding]
) -> LevelDiagnosis:
    level = problem[name]
    reference = measures.trials[measures.reference] if measures.reference else None
    differences = {
        kind: _difference(trial, reference)
        for kind, trial in measures.trials.items()
        if reference is not None and not trial.error
    }
    precision = torch.finfo(level.parameters[0].dtype).eps
    products = {
        kind: _judge_products(kind, measures, differences.get(kind, (0.0, 0.0)), precision) for kind in measures.trials
    }
    judged = {
        solver: rate_solver(rule, measures.spectrum)
        for solver, rule in SOLVERS.items()
        if measures.spectrum is not None
    }
    findings = [
        *_estimator_findings(level, measures, differences),
        *role_findings(problem, level),
        *module_findings(level, measures),
        *draw_findings(measures, precision),
        *precision_findings(level, differences),
        *curvature_findings(measures, precision),
        *point_findings(level, measures),
        *more,
    ]
    if not influential:
        findings.append(
            Finding("warning", "no cotangent reaches it: at this point it does not influence any outer loss",
                    "look at how the outer losses depend on it")
        )  # fmt: skip
    # At a cotangent that is not multiplied with an inverse, the product of a residual may be zero.
    still = reference is not None and reference.mixed is not None and not reference.mixed.any()
    if still and level.residual is None:
        findings.append(
            Finding("warning", f"its solution does not move with {', '.join(problem.graph[name].arguments)}: the mixed "
                    "product is zero", "look at how its loss depends on them")
        )  # fmt: skip
    return LevelDiagnosis(
        level=name,
        findings=tuple(findings),
        products=products,
        solvers={solver: finding for solver, finding in judged.items() if finding is not None},
        differences=differences,
        costs={
            kind: trial.seconds / measures.gradient_seconds
            for kind, trial in measures.trials.items()
            if not trial.error
        },
        spectrum=measures.spectrum,
    )


def _difference(trial: Trial, reference: Trial) -> tuple[float, float]:
    """Return the relative differences, of H v and of the mixed product."""
    differences = []
    for a, b in ((trial.own, reference.own), (trial.mixed, reference.mixed)):
        assert a is not None
        assert b is not None
        differences.append(float((a - b).norm() / b.norm()) if b.any() else float(a.norm()))
    return differences[0], differences[1]


def _judge_products(
    kind: str, measures: Measurements, differences: tuple[float, float], precision: float, *, mixed_only: bool = False
) -> Finding:
    trial = measures.trials[kind]
    if trial.error:
        return Finding("error", f"unsafe: {trial.error}")
    if kind == "finite_difference" and measures.replay > 100 * precision:
        return Finding("error", "unsafe: the two gradients that are subtracted see different random numbers")
    if kind == measures.reference:
        return Finding("ok", "safe")
    own, mixed = differences
    errors = f"H v is off by {own:.1e} from {measures.reference}'s, the mixed product by {mixed:.1e}"
    if trial.step is not None:
        errors += f", at step {trial.step:.1e}"
    worst = mixed if mixed_only else max(own, mixed)
    if worst > max(_WRONG, precision):
        remedy = f"products={measures.reference!r}"
        if kind == "finite_difference" and mixed <= max(_WRONG, precision):
            remedy += ", or Identity(), which takes no product with H (a kink, such as ReLU's, spoils these first)"
        return Finding("error", f"unsafe: {errors}", remedy)
    if worst > max(DOUBTFUL, precision):
        return Finding("warning", f"coarse: {errors}", f"products={measures.reference!r}, if that matters")
    return Finding("ok", f"safe: {errors}")


def _estimator_findings(
    level: Level, measures: Measurements, differences: dict[str, tuple[float, float]]
) -> list[Finding]:
    """Return the findings on the estimator of the level."""
    rule = level.estimator
    if not isinstance(rule, Implicit):
        return [Finding("ok", f"{rule} is not implicit: its accuracy is not measured here", "use check_hypergradient")]
    judged: dict[str, Finding | None] = {}
    if rule.products in measures.trials:
        judged[f"{rule.products} products"] = _judge_products(
            rule.products,
            measures,
            differences.get(rule.products, (0.0, 0.0)),
            torch.finfo(level.parameters[0].dtype).eps,
            mixed_only=isinstance(rule.solver, linear.AssumedInverse | None),
        )
    if rule.solver is not None:
        judged[str(rule.solver)] = rate_solver(rule.solver, measures.spectrum)
    if measures.pulled is not None and measures.pulled.converged is False:
        sentence = "; ".join(measures.pulled.remarks) or f"it left a residual of {measures.pulled.residual:.1e}"
        judged[str(rule.solver)] = Finding("warning", sentence, "more iterations, damping, or Dense for few variables")
    bad = [
        attrs.evolve(finding, sentence=f"its estimator, {part}: {finding.sentence}")
        for part, finding in judged.items()
        if finding is not None and finding.severity != "ok"
    ]
    return bad or [Finding("ok", f"its estimator, {rule}, is safe here")]
