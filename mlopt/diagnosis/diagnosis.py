"""Diagnosis of a problem before a long run: which estimators and products are safe for it, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from rich.console import Group, RenderableType
from rich.table import Table

from .. import linear
from ..errors import MloptError
from ..estimators import Implicit, LinearSolve, Unrolled
from ..hypergradient import at_solutions, run_solvers, seeded_generators
from ..problem import Level, Point, Problem, Workspace
from ..rng import preserved
from ..tensors import Tensors
from ..validation import is_whole, require
from .evaluation import evaluate, fixed_batches, put_back, rendered
from .finding import Finding
from .measurements import Measurements, Tap, Trial, measure, normalises
from .solver_rules import SOLVERS, iterations_for, rate_solver
from .spectrum import Spectrum

__all__ = ["Diagnosis", "LevelDiagnosis", "diagnose"]

#: Relative differences between two kinds of products above which a warning is issued, and the worse kind is unsafe.
_DOUBTFUL, _WRONG = 0.01, 0.1
_HALVES = (torch.bfloat16, torch.float16)


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

    @property
    def safe(self) -> bool:
        """True if no finding is an error."""
        return not any(f.severity == "error" for level in self.levels.values() for f in level.findings)

    def __rich__(self) -> RenderableType:
        conclusion = "safe to run" if self.safe else "not safe to run: see the errors"
        return Group(
            *self.levels.values(), conclusion if self.levels else "no level is pulled back: nothing to diagnose"
        )

    def __str__(self) -> str:
        return rendered(self)


def diagnose(problem: Problem, batches: Mapping[str, Any] | None = None, *, seed: int = 0) -> Diagnosis:
    """Diagnose every level that cotangents are pulled back through, at the present point, before a long run.

    Each kind of products is tried on a cotangent v that is pulled back here, and compared with autograd's. Some twenty
    Lanczos steps estimate the ends of the Hessian's spectrum, which determine the solvers that converge and their speed:
    conjugate gradients need about sqrt(kappa) / 2 ln(2 / 0.01) iterations for an error of 1%, a Neumann series a step size
    below 2 / lambda_max. Nothing moves: parameters, buffers, optimisers, `.grad` and generators are bit-identical
    afterwards.

    Args:
        problem: the problem; its modules hold the point.
        batches: the batch of each level by name; a missing one is the first of the level's data, in the order of `seed`.
        seed: seed of the random numbers that the losses draw, of the data's order and of the random vectors.

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
    workspace, levels = Workspace(), {}
    batches = fixed_batches(problem, batches, seed)
    with put_back(problem), preserved(problem.devices):
        start = Point(problem, batches, seeded_generators(problem, "seed", seed), workspace=workspace)
        run_solvers(start, problem.outermost)
        cotangents = _cotangents(problem, workspace, batches, seed)
        for level in reversed(problem.levels):
            if problem.needs_estimator(name := level.name):
                measures = measure(problem, workspace, batches, name, seed, cotangents.get(name))
                more = [*_unused(name, workspace), *_refused(problem, workspace, batches, name, seed)]
                levels[name] = _diagnose(problem, name, measures, name in cotangents, more)
    return Diagnosis(levels=levels)


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
        *_module_findings(level, measures),
        *_draw_findings(measures, precision),
        *_precision_findings(level, differences),
        *_curvature_findings(measures, precision),
        *_point_findings(level, measures),
        *more,
    ]
    if not influential:
        findings.append(
            Finding("warning", "no cotangent reaches it: at this point it does not influence any outer loss",
                    "look at how the outer losses depend on it")
        )  # fmt: skip
    if reference is not None and reference.mixed is not None and not reference.mixed.any():
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
    if worst > max(_DOUBTFUL, precision):
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
    if measures.spectrum is not None and rule.solver is not None:
        judged[str(rule.solver)] = rate_solver(rule.solver, measures.spectrum)
    bad = [
        attrs.evolve(finding, sentence=f"its estimator, {part}: {finding.sentence}")
        for part, finding in judged.items()
        if finding is not None and finding.severity != "ok"
    ]
    return bad or [Finding("ok", f"its estimator, {rule}, is safe here")]


def _module_findings(level: Level, measures: Measurements) -> list[Finding]:
    findings = []
    if measures.kernels:
        findings.append(
            Finding("warning", f"the loss runs fused attention ({', '.join(measures.kernels)}), which has no second derivative: "
                    "autograd and forward products run the plain kernel, at more memory",
                    "finite differences keep the fused kernel")
        )  # fmt: skip
    if "hooks" in measures.trials["forward"].error:
        findings.append(
            Finding(
                "warning", "activation checkpointing, which forward products refuse", "autograd or finite differences"
            )
        )
    if normalises(level.module):
        findings.append(
            Finding("warning", "BatchNorm in train mode: a sample's loss depends on its batch, and so does the Hessian "
                    "(running statistics stay as they are)", "eval(), if that is not intended")
        )  # fmt: skip
    if measures.unused:
        findings.append(
            Finding("warning", f"its objective does not depend on {', '.join(measures.unused)}: no curvature there",
                    "freeze them by requires_grad_(False)")
        )  # fmt: skip
    frozen = [name for name, p in level.module.named_parameters() if not p.requires_grad]
    if frozen:
        findings.append(Finding("ok", f"frozen, so not variables: {', '.join(frozen)}"))
    return findings


def _draw_findings(measures: Measurements, precision: float) -> list[Finding]:
    if measures.replay > 100 * precision:
        return [
            Finding("error", f"two evaluations at the same random numbers differ by {measures.replay:.1e}: the loss draws from "
                    "a generator of its own, or keeps state", "draw from torch, numpy or Python's own generators")
        ]  # fmt: skip
    if measures.spread > 100 * precision:
        return [
            Finding("warning", f"the loss draws random numbers (dropout, augmentation): two draws' gradients differ by "
                    f"{measures.spread:.1e}. A pullback sees one draw throughout; it is one sample of the hypergradient",
                    "eval(), if that is not intended")
        ]  # fmt: skip
    return []


def _precision_findings(level: Level, differences: dict[str, tuple[float, float]]) -> list[Finding]:
    halves = [str(p.dtype) for p in level.parameters if p.dtype in _HALVES]
    if not halves:
        return []
    error = (
        f" Finite differences are off by {max(differences['finite_difference']):.0%} here"
        if len(differences) > 1
        else ""
    )
    return [
        Finding("warning", f"variables of {halves[0]}.{error}", "keep the variables in float32, and autocast the loss")
    ]


def _curvature_findings(measures: Measurements, precision: float) -> list[Finding]:
    spectrum = measures.spectrum
    if spectrum is None:
        return [Finding("error", "every kind of products failed", "see the error of each")]
    findings = []
    if measures.asymmetry > max(1e-3, 10 * precision):
        findings.append(
            Finding("error", f"the Hessian is not symmetric: <p, H q> and <q, H p> differ by {measures.asymmetry:.1e}",
                    "look for a custom backward or a detach in the loss")
        )  # fmt: skip
    ends = f"curvature from at most {spectrum.low:.3g} to at least {spectrum.high:.3g}"
    if spectrum.negative:
        findings.append(
            Finding("warning", f"{ends}: not at a minimum of the level, and conjugate gradients and Neumann series are unsafe",
                    f"more steps, MINRES, Nystrom or damping above {-spectrum.low:.2g}")
        )  # fmt: skip
    elif spectrum.singular:
        findings.append(Finding("warning", f"{ends}: flat directions", "a regularizer, or damping"))
    else:
        kappa = spectrum.condition
        findings.append(
            Finding("ok", f"{ends}: condition number {kappa:.2g}, so 1% takes about {iterations_for(kappa)} conjugate-gradient "
                    f"iterations; Neumann step sizes below {2 / spectrum.high:.3g}")
        )  # fmt: skip
    return findings


def _point_findings(level: Level, measures: Measurements) -> list[Finding]:
    findings = []
    if measures.decay:
        rule = level.estimator
        # The decay enters linear systems only.
        solves = not (isinstance(rule, Implicit) and isinstance(rule.solver, linear.AssumedInverse | None))
        findings.append(Finding("error" if solves and not isinstance(rule, Unrolled) else "ok", measures.decay))
    if measures.bounds.doubt:
        findings.append(Finding("error", measures.bounds.doubt))
    if held := measures.bounds.held:
        sentence = f"variables held at a bound by the optimiser: {held:,}; the solution is taken to move in the others"
        findings.append(Finding("ok", sentence))
    return [*findings, _stationarity_finding(level, measures)]


def _stationarity_finding(level: Level, measures: Measurements) -> Finding:
    away = f"its solution is about {measures.newton:.1e} of its variables' norm away"
    state = f"gradient of norm {measures.gradient_norm:.1e}; {away}"
    if measures.newton > _DOUBTFUL:
        remedy = "more steps" if level.solver is None else "a solver that reaches the minimum of the objective"
        return Finding("warning", f"not stationary: {state}. Implicit estimators assume a zero gradient", remedy)
    return Finding("ok", f"stationary: {state}")
