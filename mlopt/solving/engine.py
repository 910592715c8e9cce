"""The steps of levels: what one step of a level does, and which levels are solved before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import CheckpointError, NonFiniteError, ProblemError
from ..finiteness import require_finite
from ..problem import Level, Problem, Stream, StreamedCotangent, to_device
from ..tensors import norm
from .gradients import Gradients
from .optimizers import make_optimizer, make_scheduler
from .precision import Precision
from .state import Snapshot, load_module_state, load_state, module_state

__all__ = ["Engine"]


class Engine:
    """The moving parts of a run: optimisers, schedulers, data streams, and what pullbacks keep from step to step.

    Args:
        problem: the problem.
        seed: of the order of every level's data.
        lookahead: whether the inner steps before an outer step are taken back once its hypergradient is formed, and taken
            again, on the same batches, after it.
        skip_limit: how many steps of levels whose loss or gradient is not finite may be left out; none when zero.

    Raises:
        ProblemError: a level has no optimiser, or one that does not train the level's variables.
    """

    def __init__(self, problem: Problem, seed: int, *, lookahead: bool = False, skip_limit: int = 0) -> None:
        self.problem, self._lookahead, self._skip_limit = problem, lookahead, skip_limit
        self.optimizers = {level.name: make_optimizer(level) for level in problem}
        self.schedulers = {level.name: make_scheduler(level, self.optimizers[level.name]) for level in problem}
        self.precisions = {level.name: Precision(level) for level in problem}
        self.streams = {level.name: Stream(level.name, level.data, seed, level.device) for level in problem}
        self.gradients = Gradients(problem, self.optimizers, self.precisions, seed)
        #: Steps of each level that were left out.
        self.skipped: dict[str, int] = {}
        #: Warm-up steps that each level has taken.
        self.warmed: dict[str, int] = {}
        #: Parameters of each level, some of which callbacks may freeze as the run goes on.
        self._parameters = {level.name: tuple(level.module.parameters()) for level in problem}
        #: Levels whose latest step was left out: what would be pulled back through them is left out, too.
        self._left_out: set[str] = set()

    @property
    def logs(self) -> dict[str, Any]:
        """What the levels logged in the present outer step."""
        return self.gradients.logs

    def warm_up(self) -> bool:
        """Take one warm-up step of the level listed last among those that lack some; say whether there was one."""
        for level in reversed(self.problem.levels):
            if self.warmed.get(level.name, 0) < level.warmup:
                self._begin()
                self._step(level, last=True)
                self.warmed[level.name] = self.warmed.get(level.name, 0) + 1
                return True
        return False

    def step(self) -> None:
        """Take one outer step: all that is solved inside the outermost level, its hypergradient, and its step."""
        self._begin()
        outermost = self.problem.outermost
        if self._lookahead:
            self._look_ahead(outermost)
        else:
            self._step(outermost, last=True)

    def _begin(self) -> None:
        self.gradients.logs = {}
        carryover, before = self.gradients.carryover, self.gradients.carryover.variables
        carryover.variables = {
            name: tuple(p for p in parameters if p.requires_grad) for name, parameters in self._parameters.items()
        }
        for name, variables in before.items():
            if len(variables) != len(carryover.variables[name]):
                # A callback froze or unfroze some: what is held has the shapes of before.
                carryover.warm.pop(name, None)
                carryover.cotangents.pop(name, None)

    def _step(self, level: Level, *, last: bool) -> None:
        """Solve the levels inside, innermost listed first, then take one step of the level.

        Args:
            level: the level.
            last: whether this is the last step of the present solve of the level.
        """
        self._solve_inside(level)
        if self._left_out and self._left_out.intersection(self.problem.graph[level.name].interior):
            self._left_out.add(level.name)
            return
        buffers = self._buffers(level) if self._skip_limit else ()
        try:
            self._descend(level, self._differentiate(level, last))
            self._left_out.discard(level.name)
        except NonFiniteError as error:
            self._leave_out(level, error, buffers)

    def _solve_inside(self, level: Level) -> None:
        for name in self.problem.graph[level.name].guests:
            guest = self.problem[name]
            for k in range(guest.steps):
                self._step(guest, last=k == guest.steps - 1)

    def _look_ahead(self, level: Level) -> None:
        """Step the level on the hypergradient at where its inner levels go, and let them go there anew afterwards."""
        inside = self.problem.graph[level.name].interior
        streams = [*(self.streams[name] for name in inside), *self.gradients.curvature_streams.values()]
        before = Snapshot((self.problem[name].module for name in inside), map(self._stateful, inside))
        with contextlib.ExitStack() as noting:
            noted = [noting.enter_context(stream.recording()) for stream in streams]
            self._solve_inside(level)
        loss: Tensor | None = None
        if not self._left_out.intersection(inside):
            buffers = self._buffers(level)
            try:
                loss = self._differentiate(level, last=True)
            except NonFiniteError as error:
                self._leave_out(level, error, buffers)
        before.restore()
        if loss is not None:
            try:
                self._descend(level, loss)
            except NonFiniteError as error:
                self._leave_out(level, error, buffers)
        with contextlib.ExitStack() as again:
            for stream, batches in zip(streams, noted, strict=True):
                again.enter_context(stream.replaying(batches))
            self._solve_inside(level)

    def _stateful(self, name: str) -> dict[str, Any]:
        """Return what a level has that carries state: optimiser, scheduler, loss scaler."""
        parts = {
            "optimizer": self.optimizers[name],
            "scheduler": self.schedulers[name],
            "scaler": self.precisions[name].scaler,
        }
        return {kind: part for kind, part in parts.items() if part is not None}

    def _differentiate(self, level: Level, last: bool) -> Tensor:
        """Set `.grad` of the level's variables, on as many batches as it accumulates."""
        for parameter in self._parameters[level.name]:
            # Also of what a callback has frozen: an optimiser steps whatever has a gradient.
            parameter.grad = None
        stream = self.streams[level.name]
        batches = [stream.next() for _ in range(level.accumulate)]
        return self.gradients.differentiate(level, batches, last=last)

    def _descend(self, level: Level, loss: Tensor) -> None:
        """Step on the gradient in `.grad`, clipped; step the scheduler."""
        precision, optimizer = self.precisions[level.name], self.optimizers[level.name]
        precision.unscale(optimizer)
        self._examine(level, overflow_expected=precision.scaler is not None)
        stepped = precision.step(optimizer)
        if precision.loss_scale is not None:
            self.logs[f"{level.name}/loss_scale"] = precision.loss_scale
        if not stepped:
            self._forget_gradient(level)
            return
        scheduler = self.schedulers[level.name]
        if scheduler is None:
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(loss))
        else:
            scheduler.step()

    def _examine(self, level: Level, *, overflow_expected: bool) -> None:
        """Refuse a gradient that is missing or not finite, and clip it."""
        variables = self.gradients.carryover.variables[level.name]
        gradient = [variable.grad for variable in variables if variable.grad is not None]
        if not gradient:
            raise ProblemError(
                f"the loss of level {level.name!r} does not depend on its own variables; does it use its first argument?"
            )
        if overflow_expected and level.clip is None:
            return
        size = norm(gradient)
        if level.clip is not None:
            self.logs[f"{level.name}/gradient_norm"] = size
            torch.nn.utils.clip_grads_with_norm_(variables, level.clip, size)
        if not overflow_expected:
            require_finite((), lambda _: f"the gradient of level {level.name!r} is not finite", size=size)

    def _forget_gradient(self, level: Level) -> None:
        """Leave no gradient of a step that was not taken for those who look at the latest one."""
        for parameter in self._parameters[level.name]:
            parameter.grad = None

    def _buffers(self, level: Level) -> list[tuple[Tensor, Tensor]]:
        """Return the level's buffers, each with a copy."""
        return [(buffer, buffer.clone()) for buffer in level.module.buffers()]

    def _leave_out(self, level: Level, error: NonFiniteError, buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Count a step that is not finite, where it may be left out, and undo what it did to the level's buffers.

        Raises:
            NonFiniteError: it may not, or there were too many.
        """
        if not self._skip_limit:
            raise error
        self.skipped[level.name] = self.skipped.get(level.name, 0) + 1
        if sum(self.skipped.values()) > self._skip_limit:
            raise NonFiniteError(f"{error}; {self._skip_limit} such steps were left out already") from error
        self._left_out.add(level.name)
        self._forget_gradient(level)
        for buffer, kept in buffers:
            buffer.copy_(kept)

    def snapshot(self) -> Snapshot:
        """Return a copy of all that steps change, data and generators left out."""
        names = [level.name for level in self.problem]
        modules = (level.module for level in self.problem)
        carryover = self.gradients.carryover
        return Snapshot(modules, map(self._stateful, names), (carryover.warm, carryover.cotangents))

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on, but for the generators."""
        gradients, carryover, problem = self.gradients, self.gradients.carryover, self.problem
        levels = {}
        for level in problem:
            parts = {kind: part.state_dict() for kind, part in self._stateful(level.name).items()}
            stream = self.streams[level.name].state_dict()
            levels[level.name] = {"module": module_state(level.module), "stream": stream, **parts}
        return {
            "levels": levels,
            "curvature": {name: stream.state_dict() for name, stream in gradients.curvature_streams.items()},
            "warm": dict(carryover.warm),
            "cotangents": {name: attrs.asdict(held, recurse=False) for name, held in carryover.cotangents.items()},
            "doubts": dict(gradients.doubts),
            "skipped": dict(self.skipped),
            "warmed": dict(self.warmed),
            "standalone": problem.workspace.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where `state_dict` said.

        Raises:
            CheckpointError: a module or what steps it does not take its state.
            ProblemError: a level's data are fewer than those that the state is of.
        """
        gradients, carryover, problem = self.gradients, self.gradients.carryover, self.problem
        for level in problem:
            held = state["levels"][level.name]
            try:
                load_module_state(level.module, held["module"])
                for kind, part in self._stateful(level.name).items():
                    if kind in held:
                        load_state(part, held[kind])
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"level {level.name!r} does not take its state ({' '.join(str(error).split())}); give the problem that it "
                    "was begun with, or another folder"
                ) from error
            self.streams[level.name].load_state_dict(held["stream"])
        for name, stream in gradients.curvature_streams.items():
            if name in state["curvature"]:
                stream.load_state_dict(state["curvature"][name])
        for name, vectors in state["warm"].items():
            carryover.warm[name] = to_device(vectors, problem[name].device)
        for name, held in state["cotangents"].items():
            carryover.cotangents[name] = StreamedCotangent(**to_device(held, problem[name].device))
        gradients.doubts |= state["doubts"]
        self.skipped |= state["skipped"]
        self.warmed |= state["warmed"]
        problem.workspace.load_state_dict(state["standalone"])
