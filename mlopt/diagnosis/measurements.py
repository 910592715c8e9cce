"""What is measured of one level before a long run: products of each kind, the spectrum, draws, stationarity, cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MloptError
from ..estimators import LinearSolve
from ..hypergradient import seeded_generators
from ..linear import LinearSolution, LinearSolver, MatVec
from ..problem import Level, Objective, Point, Problem, Workspace, restored
from ..tensors import Tensors, axpy, flatten, unflatten
from .evaluation import evaluate
from .spectrum import Spectrum, lanczos

__all__ = ["KINDS", "Measurements", "Tap", "Trial", "measure"]

#: The kinds of products that are to agree with one another.
KINDS = ("autograd", "forward", "finite_difference")
_LANCZOS_STEPS = 20
#: How many numbers the vectors of a Lanczos process may hold together: large levels take fewer steps, five at least.
_LANCZOS_NUMBERS = 200_000_000
#: Two steps of differences, relative to the variables: where both give the same, both are right.
_STEPS = {torch.float64: (1e-4, 1e-5), torch.float32: (1e-2, 3e-3)}
_REPEATS = 3


@attrs.frozen(kw_only=True, eq=False)
class Tap(LinearSolver):
    """The identity, which keeps what it is given: the product with the Hessian, and the cotangent."""

    damping: float = 0.0
    _in_one: ClassVar[bool] = False  # the vectors that it keeps are used as they are
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
        own: H v, (n,), in float64; None where it failed.
        mixed: (d2f / du dx) v over all arguments, (m,), in float64.
        matvec: the product with H.
        step: the finite-difference step; None where none was taken.
        seconds: of one product with H, once what is kept between products is there.
        error: why it failed; empty where it did not.
    """

    own: Tensor | None = None
    mixed: Tensor | None = None
    matvec: MatVec | None = None
    step: float | None = None
    seconds: float = 0.0
    error: str = ""


@attrs.define(kw_only=True, eq=False)
class Measurements:
    """What was measured of one level.

    Attributes:
        trials: by kind of products.
        reference: the kind that products were taken with for the spectrum; None where every kind failed.
        spectrum: of the Hessian of the level's total objective; None where no product could be had.
        asymmetry: |<p, H q> - <q, H p>| / (|p| |H q|).
        gradient_norm: of the level's total objective.
        newton: about ||H^-1 gradient|| / ||x||: how far the solution is, relative to the variables.
        spread: ||g - g'|| / ||g||, g and g' the gradients at two states of the generators.
        replay: the same at one and the same state, twice; not zero where a loss draws from what cannot be replayed.
        gradient_seconds: of one gradient of the total objective.
        unused: parameters that the level's objective does not depend on.
        kernels: names of fused attention kernels that the loss ran.
    """

    trials: dict[str, Trial] = attrs.field(factory=dict)
    reference: str | None = None
    spectrum: Spectrum | None = None
    asymmetry: float = 0.0
    gradient_norm: float = 0.0
    newton: float = 0.0
    spread: float = 0.0
    replay: float = 0.0
    gradient_seconds: float = 0.0
    unused: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


def measure(
    problem: Problem,
    workspace: Workspace,
    batches: Mapping[str, Any],
    name: str,
    seed: int,
    cotangent: Tensors | None,
) -> Measurements:
    """Measure one level that cotangents are pulled back through. The generators move; the caller puts them back.

    Args:
        problem: the problem; levels inside the one examined keep their own estimators.
        workspace: of the examination.
        batches: of every level.
        name: the level.
        seed: of the draws, and of the random vectors.
        cotangent: what products are tried on, a random vector when None. Differences cross the kinks of a network along
            a random vector, and few along a gradient: what is pulled back is what they are to be right on.
    """
    level = problem[name]
    point, other = (
        Point(problem, batches, seeded_generators(problem, "seed", draws), workspace=workspace)
        for draws in (seed, seed + 1)
    )
    measures = Measurements()
    _, gradient = evaluate(point, level)
    start = flatten(gradient).double()
    measures.gradient_norm = float(start.norm())
    measures.gradient_seconds = _timed(lambda: evaluate(point, level))
    measures.replay = _distance(flatten(evaluate(point, level)[1]).double(), start)
    measures.spread = _distance(flatten(evaluate(other, level)[1]).double(), start)
    measures.unused, measures.kernels = _used(point, level)
    generator = torch.Generator().manual_seed(seed)
    p, q = (_random(level, generator) for _ in range(2))
    vector = p if cotangent is None else cotangent
    measures.trials = {kind: _try(point, level, kind, vector) for kind in KINDS}
    if not problem.graph[name].parts:
        _suspect(measures, point, level, vector)
    measures.reference = next((kind for kind in KINDS if not measures.trials[kind].error), None)
    if measures.reference is not None:
        _measure_spectrum(measures, level, start, (p, q))
    return measures


def _measure_spectrum(measures: Measurements, level: Level, gradient: Tensor, vectors: tuple[Tensors, Tensors]) -> None:
    assert measures.reference is not None
    trial = measures.trials[measures.reference]
    known = trial.matvec
    assert known is not None

    def matvec(vector: Tensor) -> Tensor:
        given = tuple(part.to(x) for part, x in zip(unflatten(vector, level.parameters), level.parameters, strict=True))
        return flatten(known(given)).to(vector)

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
    """Take H p and the mixed product by one kind; what torch or the library says against it is kept, to be reported."""
    tap, trial = Tap(), Trial()
    try:
        rule = LinearSolve(solver=tap, products=kind).linearize(point, level.name)
        mixed = rule.pullback({level.name: vector})
        trial.matvec = tap.matvecs[-1]
        trial.own = flatten(trial.matvec(vector)).double()
        known = trial.matvec
        trial.seconds = _timed(lambda: known(vector))
    except (MloptError, RuntimeError, NotImplementedError) as error:
        trial.error = str(error).splitlines()[0]
        return trial
    trial.mixed = flatten([t for argument in rule.arguments for t in mixed.get(argument, ())]).double()
    trial.step = rule.report.step
    return trial


def _suspect(measures: Measurements, point: Point, level: Level, vector: Tensors) -> None:
    """Note against products that they are far from differences of the gradient which, at two steps, agree with one another.

    A custom backward marked once_differentiable, or a detach, may drop a second derivative without a word.
    """
    direction, size = flatten(vector).double(), float(flatten(level.parameters).detach().norm())
    live = [variable.data for variable in level.parameters]
    found = []
    with restored(level.parameters) as kept:
        for relative in _STEPS[torch.promote_types(live[0].dtype, torch.float32)]:
            step = relative * max(1.0, size) / float(direction.norm())
            sides = []
            for sign in (1.0, -1.0):
                torch._foreach_copy_(live, list(axpy(sign * step, vector, kept)))
                sides.append(flatten(evaluate(point, level)[1]).double())
            found.append((sides[0] - sides[1]) / (2 * step))
    if _distance(found[0], found[1]) > 0.01:
        return
    for kind, trial in measures.trials.items():
        if trial.own is not None and kind != "finite_difference" and _distance(trial.own, found[1]) > 0.1:
            trial.error = (
                f"H v is off by {_distance(trial.own, found[1]):.1e} from differences of the gradient, which agree at two steps: "
                "a part of the loss drops its second derivative (once_differentiable, detach)"
            )


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the fused attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if "scaled_dot_product" in name and "math" not in name:
            self.names.append(name.partition(".")[0])
        return func(*args, **(kwargs or {}))


def _used(point: Point, level: Level) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which parameters the objective does not depend on, and the fused attention kernels that it runs."""
    with _Kernels() as kernels:
        value = Objective.of(level, point).value()
    gradient = torch.autograd.grad(value, level.parameters, allow_unused=True)
    unused = tuple(name for name, g in zip(level.parameter_names, gradient, strict=True) if g is None)
    return unused, tuple(dict.fromkeys(kernels.names))


def _random(level: Level, generator: torch.Generator) -> Tensors:
    return tuple(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in level.parameters)


def _distance(found: Tensor, known: Tensor) -> float:
    size = float(known.norm())
    return float((found - known).norm()) / size if size else float((found - known).norm())


def _timed(function: Callable[[], Any]) -> float:
    """Return the median of a few runs, in seconds."""
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def normalises(module: nn.Module) -> bool:
    """Return whether a module holds a BatchNorm in train mode."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
