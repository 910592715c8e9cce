"""Measurements of one level before a long run: products of each kind, spectrum, draws, stationarity, cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MloptError
from ..estimators import GMRES, Condition, LinearSolve
from ..estimators.stationarity import Stationarity
from ..hypergradient import seeded_generators
from ..linear import LinearSolution, LinearSolver, MatVec
from ..problem import Bounds, FixedPoint, Level, Objective, Point, Problem, Report, Workspace
from ..tensors import Tensors, flatten, norm, unflatten
from .evaluation import evaluate
from .spectrum import Spectrum, lanczos

__all__ = ["KINDS", "Measurements", "Tap", "Trial", "measure", "random_vector"]

#: The kinds of products that must agree with one another.
KINDS = ("autograd", "forward", "finite_difference")
_LANCZOS_STEPS = 20
_GMRES_STEPS = 50
#: Numbers that the vectors of a Lanczos process may hold in total: large levels take fewer steps, but at least five.
_LANCZOS_NUMBERS = 200_000_000
_REPEATS = 3


@attrs.frozen(kw_only=True, eq=False)
class Tap(LinearSolver):
    """The identity; it keeps its inputs: the product with the Hessian, and the cotangent."""

    damping: float = 0.0
    _in_one: ClassVar[bool] = False  # the vectors that it keeps are used in their shapes
    matvecs: list[MatVec] = attrs.field(factory=list)
    cotangents: list[Tensors] = attrs.field(factory=list)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        self.matvecs.append(matvec)
        self.cotangents.append(rhs)
        return LinearSolution(value=rhs)


@attrs.define(kw_only=True, eq=False)
class Trial:
    """One kind of products, tried on one vector v.

    Attributes:
        own: H v, (n,), in float64; None if it failed.
        mixed: (d2f / du dx) v over all arguments, (m,), in float64.
        matvec: the product with H.
        step: the finite-difference step; None if none was taken.
        seconds: time of one product with H, excluding work that is reused between products.
        error: the reason for a failure; empty if there was none.
    """

    own: Tensor | None = None
    mixed: Tensor | None = None
    matvec: MatVec | None = None
    step: float | None = None
    seconds: float = 0.0
    error: str = ""


@attrs.define(kw_only=True, eq=False)
class Measurements:
    """The measurements of one level.

    Attributes:
        trials: the trials, by kind of products.
        reference: the kind of products used for the spectrum; None if every kind failed.
        spectrum: spectrum of the Hessian of the level's total objective; None if every kind of products failed.
        asymmetry: |<p, H q> - <q, H p>| / (|p| |H q|).
        gradient_norm: norm of the gradient of what the level's optimiser minimises; variables held at a bound are left out.
        newton: about ||H^-1 gradient|| / ||x||: the distance to the solution, relative to the variables. For a level with a
            residual, its derivative takes the place of H.
        solved: the relative residual of the linear system for it; None for a level with a loss.
        pulled: the report on a pullback by the level's own estimator; None for a level with a loss.
        spread: ||g - g'|| / ||g||, g and g' the gradients at two states of the generators.
        replay: the same for two evaluations at one state; nonzero if the loss draws numbers that cannot be replayed.
        gradient_seconds: time of one gradient of the total objective.
        unused: parameters that the level's objective does not depend on.
        kernels: names of fused attention kernels that the loss ran.
        decay: a sentence, if the decay of the level's optimiser is not known.
        bounds: the variables that the optimiser holds at a bound.
    """

    trials: dict[str, Trial] = attrs.field(factory=dict)
    reference: str | None = None
    spectrum: Spectrum | None = None
    asymmetry: float = 0.0
    gradient_norm: float = 0.0
    newton: float = 0.0
    solved: float | None = None
    pulled: Report | None = None
    spread: float = 0.0
    replay: float = 0.0
    gradient_seconds: float = 0.0
    unused: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    decay: str = ""
    bounds: Bounds = attrs.field(factory=Bounds)


def measure(
    problem: Problem,
    workspace: Workspace,
    batches: Mapping[str, Any],
    name: str,
    seed: int,
    cotangent: Tensors | None,
) -> Measurements:
    """Measure one level that cotangents are pulled back through. The generators move; the caller restores them.

    Args:
        problem: the problem; levels inside the measured one keep their own estimators.
        workspace: the workspace of the diagnosis.
        batches: the batch of every level.
        name: the level.
        seed: seed of the draws and of the random vectors.
        cotangent: the vector to try products on; random if None. Differences cross many kinks of a network along a
            random vector, but few along a gradient, and products must be right on the vectors that are pulled back.
    """
    level = problem[name]
    point, other = (
        Point(problem, batches, seeded_generators(problem, "seed", draws), workspace=workspace)
        for draws in (seed, seed + 1)
    )
    measures = Measurements()
    _, gradient = evaluate(point, level)
    measures.decay = FixedPoint.of(level, point).doubt
    measures.bounds = bounds = Bounds.of(level, point, lambda: gradient)
    start = flatten(bounds.on_free(gradient)).double()
    measures.gradient_norm = float(start.norm())
    measures.gradient_seconds = _timed(lambda: evaluate(point, level), level.device)
    measures.replay = _distance(flatten(bounds.on_free(evaluate(point, level)[1])).double(), start)
    measures.spread = _distance(flatten(bounds.on_free(evaluate(other, level)[1])).double(), start)
    measures.unused, measures.kernels = _used(point, level)
    generator = torch.Generator().manual_seed(seed)
    p, q = (bounds.on_free(random_vector(level, generator)) for _ in range(2))
    vector = p if cotangent is None else bounds.on_free(cotangent)
    measures.trials = {kind: _try(point, level, kind, vector) for kind in KINDS}
    # Doubtful products are better than none: they show the asymmetry.
    usable = sorted(
        (kind for kind in KINDS if measures.trials[kind].own is not None), key=lambda k: bool(measures.trials[k].error)
    )
    measures.reference = usable[0] if usable else None
    if level.residual is not None:
        _measure_condition(measures, point, level, gradient, vector)
    elif measures.reference is not None:
        _measure_spectrum(measures, level, start, (p, q))
    return measures


def _measure_condition(
    measures: Measurements, point: Point, level: Level, residual: Tensors, cotangent: Tensors
) -> None:
    """Measure the distance of a level with a residual from its solution, and pull a cotangent back by its own estimator."""
    if measures.reference is not None:
        rule = GMRES(iterations=_GMRES_STEPS, products=measures.reference).linearize(point, level.name)
        assert isinstance(rule, Condition)
        step, size = rule.respond(residual), float(norm([v.detach() for v in level.parameters]))
        measures.newton = float(norm(step)) / (size or 1.0)
        measures.solved = rule.report.residual
    if level.estimator is not None:
        own = level.estimator.linearize(point, level.name)
        own.pullback({level.name: cotangent})
        measures.pulled = own.report


def _measure_spectrum(measures: Measurements, level: Level, gradient: Tensor, vectors: tuple[Tensors, Tensors]) -> None:
    assert measures.reference is not None
    trial = measures.trials[measures.reference]
    product = trial.matvec
    assert product is not None

    def matvec(vector: Tensor) -> Tensor:
        parts = tuple(part.to(x) for part, x in zip(unflatten(vector, level.parameters), level.parameters, strict=True))
        return flatten(product(parts)).to(vector)

    p, q = (flatten(vector).double() for vector in vectors)
    hp, hq = matvec(p), matvec(q)
    measures.asymmetry = float((p @ hq - q @ hp).abs() / (p.norm() * hq.norm()).clamp_min(1e-300))
    steps = max(5, min(_LANCZOS_STEPS, _LANCZOS_NUMBERS // len(p)))
    working = torch.promote_types(level.parameters[0].dtype, torch.float32)
    values, _ = lanczos(matvec, p.to(working), steps=steps)
    if measures.gradient_norm > 0.0:
        more, newton = lanczos(matvec, gradient.to(working), steps=steps)
        size = float(flatten(level.parameters).detach().norm())
        measures.newton = newton / size if size else newton
        values = torch.cat([values, more])
    high = float(values.max())
    rounding = {"finite_difference": 1e-2}.get(measures.reference, 100 * torch.finfo(level.parameters[0].dtype).eps)
    largest = max(abs(high), abs(float(values.min())))
    measures.spectrum = Spectrum(low=float(values.min()), high=high, rounding=rounding * largest, size=len(gradient))


def _try(point: Point, level: Level, kind: str, vector: Tensors) -> Trial:
    """Return H v and the mixed product by one kind of products, or the error of torch or the library."""
    tap, trial = Tap(), Trial()
    try:
        rule = LinearSolve(solver=tap, products=kind).linearize(point, level.name)
        before = rule.report.remarks
        mixed = rule.pullback({level.name: vector})
        trial.matvec = rule.outside(tap.matvecs[-1]) if isinstance(rule, Stationarity) else tap.matvecs[-1]
        trial.own = flatten(trial.matvec(vector)).double()
        matvec = trial.matvec
        trial.seconds = _timed(lambda: matvec(vector), level.device)
    except (MloptError, RuntimeError, NotImplementedError) as error:
        trial.error = str(error).splitlines()[0]
        return trial
    trial.error = "; ".join(remark for remark in rule.report.remarks if remark not in before)
    trial.mixed = flatten([t for argument in rule.arguments for t in mixed.get(argument, ())]).double()
    trial.step = rule.report.step
    return trial


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A recorder of the fused attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if "scaled_dot_product" in name and "math" not in name:
            self.names.append(name.partition(".")[0])
        return func(*args, **(kwargs or {}))


def _used(point: Point, level: Level) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the parameters that the objective does not depend on, and the fused attention kernels that it runs."""
    with _Kernels() as kernels:
        value = Objective.of(level, point).value()
    gradient = torch.autograd.grad(value, level.parameters, allow_unused=True)
    unused = tuple(name for name, g in zip(level.parameter_names, gradient, strict=True) if g is None)
    return unused, tuple(dict.fromkeys(kernels.names))


def random_vector(level: Level, generator: torch.Generator) -> Tensors:
    """Return a random vector in the shapes of the variables, the same on every device."""
    drawn = (torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu") for p in level.parameters)
    return tuple(vector.to(p) for vector, p in zip(drawn, level.parameters, strict=True))


def _distance(vector: Tensor, reference: Tensor) -> float:
    size = float(reference.norm())
    return float((vector - reference).norm()) / size if size else float((vector - reference).norm())


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median of a few runs, in seconds, each until the device has finished it."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
    seconds = []
    for _ in range(_REPEATS):
        wait()
        begin = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _nothing() -> None: ...


def normalises(module: nn.Module) -> bool:
    """Return True if a module holds a BatchNorm in train mode."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
