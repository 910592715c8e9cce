"""The response of inner levels by real steps: levels inside are stepped again for each displaced outer variable."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import EstimatorError, NonFiniteError
from ..estimators.products import SMALL, search
from ..finiteness import immediate
from ..problem import Level, Objective, Point, Problem, Report, Response, Stream
from ..tensors import Tensors
from ..validation import at_least, is_whole, must_be, one_of, positive_or_none
from .engine import Engine

__all__ = ["RealSteps"]

#: Relative disagreement of differences at two displacements that needs no search.
_AGREEMENT = {torch.float64: 1e-4, torch.float32: 0.05}

_whole_or_none = must_be(lambda value: value is None or is_whole(value, 1), "a whole number >= 1, or None")


@attrs.frozen(kw_only=True)
class RealSteps(Response):
    """Differentiate the outer objective by taking real steps of the levels inside, for a few outer variables.

    Let x_n(u) be the variables of the levels inside after n steps of their own optimisers, from their present state, with the
    outer variables at u. The derivative of Phi(u) = F(u, x_n(u)) by each u_k is a difference of two evaluations,

        dPhi / du_k ~ (Phi(u + h_k e_k) - Phi(u - h_k e_k)) / 2 h_k,    h_k = h max(1, |u_k|),

    both on the same batches and random numbers. For variables below 0.1, the first hypergradient of a problem compares
    differences at ever smaller h_k, down to h |u_k|; the size on which two of them agree takes the place of 1 in h_k. No
    derivative of the levels inside by u is needed, nor one of F, and no linearisation limits the horizon n. Afterwards
    everything is rolled back bit for bit: variables, buffers, `.grad`, optimisers, schedulers, random generators. The cost is
    2 K runs of n steps for K outer variables; see `cost`.

    The batches come from streams of their own, which training does not draw from, and are kept in memory for one hypergradient.
    If one side of a difference is not finite, the derivative along that variable is taken to be zero, and the report is doubtful.

    Args:
        steps: n, for each level directly inside, in place of its own `steps`; those if None. A level with a solver of its own is
            solved once. Levels further inside take their own `steps` before each of these steps.
        displacement: h; if None, the fourth root of the machine epsilon: 1.2e-4 in float64, 0.019 in float32. Rounding is
            amplified by training, so this is more than the usual cube root.
        differences: "central", or "forward" for K + 1 runs and an error of order h in place of h^2.
        limit: the largest K.

    Raises:
        EstimatorError: in a hypergradient, if the level has more variables than `limit`.

    Example:
        >>> from functools import partial
        >>> def loss(module, batch, *, outer):
        ...     return (module() - outer()).square().sum() / 2
        >>> problem = mlopt.Problem(
        ...     mlopt.Level(
        ...         "outer",
        ...         mlopt.variables(torch.ones(1, dtype=torch.float64)),
        ...         lambda module, batch, *, inner: inner().sum(),
        ...         response=mlopt.RealSteps(steps=2),
        ...     ),
        ...     mlopt.Level(
        ...         "inner",
        ...         mlopt.variables(torch.zeros(1, dtype=torch.float64)),
        ...         loss,
        ...         optimizer=partial(torch.optim.SGD, lr=0.5),
        ...     ),
        ... )
        >>> problem.outermost.response.cost(problem)
        {'inner': 4}
        >>> mlopt.hypergradient(problem).gradient["value"]  # of x_2 = (1 - 0.5^2) u
        tensor([0.7500], dtype=torch.float64)
    """

    steps: int | None = attrs.field(default=None, validator=_whole_or_none)
    displacement: float | None = attrs.field(default=None, validator=positive_or_none)
    differences: str = attrs.field(default="central", validator=one_of("central", "forward"))
    limit: int = attrs.field(default=64, validator=at_least(1))

    def total_derivative(self, point: Point, level: str, streams: Mapping[str, Stream]) -> Tensors:
        begin = time.perf_counter()
        outer = point.problem[level]
        count = sum(variable.numel() for variable in outer.parameters)
        if count > self.limit:
            raise EstimatorError(
                f"level {level!r}: it has {count:,} variables, and {self} are taken for each of at most {self.limit:,}; use "
                "the estimators of the levels inside, or a larger limit"
            )
        taken = self.cost(point.problem)
        runs = _Runs(self, point, outer, streams)
        gradient = runs.gradient()
        point.reports[level] = Report(
            estimator=str(self),
            iterations=sum(taken.values()),
            solves=self._runs(count),
            step=runs.displacement,
            converged=False if runs.lost else None,
            seconds=time.perf_counter() - begin,
            remarks=runs.remarks(),
        )
        return gradient

    def cost(self, problem: Problem) -> dict[str, int]:
        """Return, for each level inside the outermost, the steps, or calls of its solver, that one hypergradient takes.

        Args:
            problem: a problem; its outermost level counts as the one with this response.
        """
        taken: dict[str, int] = {}

        def add(host: str, times: int, steps: int | None) -> None:
            for name in problem.graph[host].guests:
                guest = problem[name]
                taken[name] = times * (1 if guest.solver is not None else steps or guest.steps)
                add(name, taken[name], None)

        outermost = problem.outermost
        add(outermost.name, self._runs(sum(variable.numel() for variable in outermost.parameters)), self.steps)
        return taken

    def _runs(self, count: int) -> int:
        return 2 * count if self.differences == "central" else count + 1

    def __str__(self) -> str:
        count = "" if self.steps is None else f"{self.steps:,} "
        return f"{count}real step{'s' * (self.steps != 1)}, {self.differences} differences"


class _Runs:
    """The runs of one hypergradient: all start from the same state, on the same batches and random numbers.

    Args:
        rule: the response.
        point: the point.
        level: the outer level.
        streams: batches of the levels inside.

    Attributes:
        lost: variables with a side that is not finite.
        displacement: h.
    """

    def __init__(self, rule: RealSteps, point: Point, level: Level, streams: Mapping[str, Stream]) -> None:
        self._rule, self._point, self._level, self._streams = rule, point, level, streams
        run = None if point.carryover is None else point.carryover.engine
        self._engine = Engine(point.problem, 0, aside=True) if run is None else run
        self._batches: dict[str, list[Any]] = {name: [] for name in streams}
        self.lost: list[str] = []
        precision = max(torch.finfo(variable.dtype).eps for variable in level.parameters)
        self.displacement = rule.displacement or precision**0.25

    def gradient(self) -> Tensors:
        """Return the derivative in the shapes of the variables."""
        center = self._end() if self._rule.differences == "forward" else None
        gradient = []
        for name, variable in zip(self._level.parameter_names, self._level.parameters, strict=True):
            least = self._least(name, variable, center)
            slopes = [self._slope(f"{name}[{k}]", variable, k, center, least) for k in range(variable.numel())]
            gradient.append(variable.new_tensor(slopes).reshape(variable.shape))
        if len(self.lost) == sum(variable.numel() for variable in self._level.parameters):
            raise NonFiniteError(
                f"level {self._level.name!r}: {self._rule} of the levels inside led to an objective that is not finite along "
                "every variable; check their learning rates"
            )
        return tuple(gradient)

    def remarks(self) -> tuple[str, ...]:
        """Return what went wrong, in a sentence."""
        if not self.lost:
            return ()
        some = ", ".join(self.lost[:8]) + ", ..." * (len(self.lost) > 8)
        return (
            f"the objective after the steps is not finite on a side of {some}: no derivative along these variables",
        )

    def _least(self, name: str, variable: Tensor, center: float | None) -> float:
        """Return the least size of a component that a displacement is scaled by; measured once for small variables."""
        sizes = variable.detach().abs().reshape(-1)
        lengths, key = self._point.workspace.lengths, f"{self._level.name}/response/{name}"
        if self._rule.displacement is None and key not in lengths and float(sizes.max()) < SMALL:
            k = int(sizes.argmax())

            def at(size: float) -> tuple[Tensor]:
                slope = self._slope(f"{name}[{k}]", variable, k, center, size)
                lost = bool(self.lost) and self.lost.pop() is not None
                return (torch.tensor(math.nan if lost else slope, dtype=torch.float64, device="cpu"),)

            before, self.lost = self.lost, []
            lengths[key] = search(at, float(sizes[k]), _AGREEMENT.get(variable.dtype, 0.05))[:2]
            self.lost = before
        return float(lengths[key][0]) if key in lengths else 1.0

    def _slope(self, name: str, variable: Tensor, k: int, center: float | None, least: float) -> float:
        """Return the derivative along component k of a variable; zero if a side is not finite."""
        kept = variable.detach().clone(memory_format=torch.contiguous_format)
        present = float(kept.view(-1)[k])
        size = self.displacement * max(least, abs(present))
        ends = []
        try:
            for sign in (1.0, -1.0) if center is None else (1.0,):
                displaced = kept.clone()
                displaced.view(-1)[k] += sign * size
                variable.data.copy_(displaced)
                # The difference of the rounded positions, not of the intended ones.
                ends.append((float(displaced.view(-1)[k]), self._end()))
        finally:
            variable.data.copy_(kept)
        if center is not None:
            ends.append((present, center))
        (above, high), (below, low) = ends
        if not (math.isfinite(high) and math.isfinite(low)):
            self.lost.append(name)
            return 0.0
        return (high - low) / (above - below)

    def _end(self) -> float:
        """Take the steps from the start with the outer variables as they are; return the objective at their end, or NaN."""
        with self._engine.rolled_back(), self._same_batches(), immediate():
            self._point.generators[self._level.name].restore()
            try:
                self._engine.rehearsal(self._streams).rehearse(self._level, self._rule.steps)
                return Objective.of(self._level, self._point).number()
            except NonFiniteError:
                return math.nan

    @contextlib.contextmanager
    def _same_batches(self) -> Iterator[None]:
        """Serve the batches of the earlier runs, then the next ones of the data."""
        with contextlib.ExitStack() as stack:
            for name, stream in self._streams.items():
                stack.enter_context(stream.replaying(self._batches[name]))
            more = {name: stack.enter_context(stream.recording()) for name, stream in self._streams.items()}
            yield
            for name, batches in more.items():
                self._batches[name] += batches
