"""Findings on one level, from its measurements."""

from __future__ import annotations

import torch

from .. import linear
from ..estimators import Implicit, Unrolled
from ..problem import Level, Problem
from .finding import Finding
from .measurements import Measurements, normalises
from .solver_rules import iterations_for

__all__ = [
    "DOUBTFUL",
    "curvature_findings",
    "draw_findings",
    "module_findings",
    "point_findings",
    "precision_findings",
    "role_findings",
]

#: The relative error, or distance from the solution, above which a warning is issued.
DOUBTFUL = 0.01
_HALVES = (torch.bfloat16, torch.float16)


def module_findings(level: Level, measures: Measurements) -> list[Finding]:
    """Return the findings on the module and on the kernels that its loss runs."""
    findings = []
    if measures.kernels:
        findings.append(
            Finding("warning", f"the loss runs fused attention ({', '.join(measures.kernels)}), which has no second derivative: "
                    "autograd and forward products run the plain kernel, which takes more memory",
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


def role_findings(problem: Problem, level: Level) -> list[Finding]:
    """Return the finding on a level and its host that refer to each other: leader and follower, or a game by mistake."""
    host = problem.graph[level.name].host
    if host is None or host == problem.outermost.name:
        return []
    if host not in level.references or level.name not in problem[host].references:
        return []
    return [
        Finding("ok", f"{host!r} and it refer to each other: {host!r} is the leader, which knows how this follower responds",
                "mlopt.game, if they decide at the same time")
    ]  # fmt: skip


def draw_findings(measures: Measurements, precision: float) -> list[Finding]:
    """Return the findings on the random numbers that the loss draws."""
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


def precision_findings(level: Level, differences: dict[str, tuple[float, float]]) -> list[Finding]:
    """Return the finding on variables in half precision."""
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


def curvature_findings(measures: Measurements, precision: float) -> list[Finding]:
    """Return the findings on the Hessian, or on the derivative of a residual."""
    spectrum = measures.spectrum
    if measures.solved is not None:
        return [_system_finding(measures.solved)]
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


def _system_finding(residual: float) -> Finding:
    """Return the finding on the linear system of a residual."""
    sentence = f"the derivative of its residual: GMRES solves a system with it to a residual of {residual:.1e}"
    if residual > DOUBTFUL:
        return Finding("warning", sentence, "damping, or a residual whose derivative is nearer to the identity")
    return Finding("ok", sentence)


def point_findings(level: Level, measures: Measurements) -> list[Finding]:
    """Return the findings on the present point: decay, bounds, the distance from the solution."""
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
    state = f"{'gradient' if level.residual is None else 'residual'} of norm {measures.gradient_norm:.1e}; {away}"
    if measures.newton > DOUBTFUL:
        remedy = "more steps" if level.solver is None else "a solver that reaches the solution"
        return Finding("warning", f"not stationary: {state}. Implicit estimators assume zero", remedy)
    return Finding("ok", f"stationary: {state}")
