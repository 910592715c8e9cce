"""The steps of levels, in the order in which they depend on one another."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import CheckpointError, NonFiniteError, ProblemError
from ..finiteness import require_finite
from ..linear import History
from ..problem import Level, Problem, Stream, StreamedCotangent, has_hooks, to_device, unmoved
from ..shards import sharded_as
from ..tensors import Tensors, norm
from .gradients import Gradients
from .optimizers import make_optimizer, make_scheduler
from .precision import Precision
from .state import Snapshot, load_module_state, load_state, module_state
from .stillness import Stillness
from .trained import Trained

__all__ = ["Engine"]


class Engine:
    """Takes the steps of a run; it owns the optimisers, schedulers and data streams, and the state of the pullbacks.

    Args:
        problem: the problem.
        seed: seed of the order of the data.
        lookahead: whether to undo the inner steps once the hypergradient is computed, and to repeat them on the same batches
            after the outer step.
        skip_limit: number of non-finite steps that may be skipped; 0 to skip none.
        aside: whether the steps are taken outside a run: the outermost level takes none, and an optimiser that a level provides
            is copied.
        keep_gradients: True if `.grad` of every level stays until its next step, because a callback may read it.

    Attributes:
        skipped: number of skipped steps of each level.
        warmed: number of warm-up steps that each level has taken.
        stillness: warns of an outermost level that does not move.

    Raises:
        ProblemError: a level has no optimiser, or one that does not train exactly the level's variables.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        lookahead: bool = False,
        skip_limit: int = 0,
        aside: bool = False,
        keep_gradients: bool = True,
    ) -> None:
        self.problem, self._lookahead, self._skip_limit = problem, lookahead, skip_limit
        stepped = [level for level in problem.levels[1 if aside else 0 :] if level.solver is None]
        self.optimizers = {level.name: make_optimizer(level, copied=aside) for level in stepped}
        self.schedulers = {name: make_scheduler(problem[name], own) for name, own in self.optimizers.items()}
        self.precisions = {level.name: Precision(level) for level in problem}
        self.streams = {level.name: Stream(level.name, level.data, seed, level.device) for level in problem}
        self.gradients = Gradients(problem, self.optimizers, self.precisions, seed, keep=keep_gradients)
        self.gradients.carryover.engine = self
        outermost = problem.outermost.name
        self.stillness = Stillness(outermost, scheduled=self.schedulers.get(outermost) is not None)
        self.skipped: dict[str, int] = {}
        self.warmed: dict[str, int] = {}
        self._trained = Trained(problem)
        #: Levels whose latest step was skipped. Steps that need a pullback through them are skipped as well.
        self._just_skipped: set[str] = set()

    @property
    def logs(self) -> dict[str, Any]:
        """The values that the levels logged in the current outer step."""
        return self.gradients.row.values

    def warm_up(self) -> bool:
        """Take one warm-up step of the last listed level that still needs one; return False if there is none."""
        for level in reversed(self.problem.levels):
            if self.warmed.get(level.name, 0) < level.warmup:
                self._begin_step()
                self._step(level, last=True)
                self.warmed[level.name] = self.warmed.get(level.name, 0) + 1
                return True
        return False

    def step(self) -> None:
        """Take one outer step: solve the levels inside the outermost, and step it with its hypergradient."""
        self._begin_step()
        outermost = self.problem.outermost
        if self._lookahead:
            self._lookahead_step(outermost)
        else:
            self._step(outermost, last=True)

    def _begin_step(self) -> None:
        self.gradients.row.clear()
        self._trained.begin_step(self.gradients.carryover)

    def _step(self, level: Level, *, last: bool) -> None:
        """Solve the levels inside, innermost listed first, then take one step of the level.

        Args:
            level: the level.
            last: whether this is the last step in the current solve of the level.
        """
        self._solve_inside(level)
        if self._just_skipped and self._just_skipped.intersection(self.problem.graph[level.name].interior):
            self._just_skipped.add(level.name)
            return
        kept = self._kept(level) if self._skip_limit else None
        try:
            if level.solver is None:
                self._apply_gradient(level, self._differentiate(level, last))
            else:
                self._solve_alone(level)
            self._just_skipped.discard(level.name)
        except NonFiniteError as error:
            self._skip(level, error, kept)

    def _solve_inside(self, level: Level, steps: int | None = None) -> None:
        """Solve the levels directly inside, innermost listed first, each for its own number of steps, or for another."""
        for name in self.problem.graph[level.name].guests:
            guest = self.problem[name]
            count = guest.steps if steps is None or guest.solver is not None else steps
            for k in range(count):
                self._step(guest, last=k == count - 1)

    def rehearsal(self, streams: Mapping[str, Stream]) -> Engine:
        """Return an engine for steps that will be rolled back.

        It steps the same variables with the same optimisers; it has its own logs and counts, and skips no step.

        Args:
            streams: batches of the levels that it steps.
        """
        other = copy.copy(self)
        other.gradients, other.streams = self.gradients.rehearsal(), dict(streams)
        other.skipped, other.warmed, other._just_skipped, other._skip_limit = {}, {}, set(), 0
        return other

    def rehearse(self, level: Level, steps: int | None) -> None:
        """Solve the levels inside a level, those directly inside for a number of steps; their own if None."""
        self._begin_step()
        self._solve_inside(level, steps)

    def solve_level(self, level: Level, steps: int) -> None:
        """Take some steps of a level inside the outermost, each after those inside it."""
        self._begin_step()
        for k in range(steps):
            self._step(level, last=k == steps - 1)

    @contextlib.contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Restore on exit everything that steps change, `.grad` included, except streams and generators."""
        parameters = [parameter for own in self._trained.parameters.values() for parameter in own]
        gradients = [parameter.grad for parameter in parameters]
        before = self.snapshot()
        try:
            yield
        finally:
            before.restore()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    def _lookahead_step(self, level: Level) -> None:
        """Solve the levels inside, compute the hypergradient, undo the inner steps, step the level, and solve inside again."""
        inside = self.problem.graph[level.name].interior
        streams = [*(self.streams[name] for name in inside), *self.gradients.curvature_streams.values()]
        before = Snapshot((self.problem[name].module for name in inside), map(self._stateful, inside))
        with contextlib.ExitStack() as stack:
            recorded = [stack.enter_context(stream.recording()) for stream in streams]
            self._solve_inside(level)
        loss: Tensor | None = None
        if not self._just_skipped.intersection(inside):
            kept = self._kept(level) if self._skip_limit else None
            try:
                loss = self._differentiate(level, last=True)
            except NonFiniteError as error:
                self._skip(level, error, kept)
        before.restore()
        if loss is not None:
            try:
                self._apply_gradient(level, loss)
            except NonFiniteError as error:
                self._skip(level, error, kept)
        with contextlib.ExitStack() as stack:
            for stream, batches in zip(streams, recorded, strict=True):
                stack.enter_context(stream.replaying(batches))
            self._solve_inside(level)

    def _stateful(self, name: str) -> dict[str, Any]:
        """Return the optimiser, the scheduler and the loss scaler of a level; those that it has."""
        parts = {
            "optimizer": self.optimizers.get(name),
            "scheduler": self.schedulers.get(name),
            "scaler": self.precisions[name].scaler,
        }
        return {kind: part for kind, part in parts.items() if part is not None}

    def _solve_alone(self, level: Level) -> None:
        """Let the solver of a level move its variables; measure the gradient there."""
        self._clear_gradient(level)
        self.gradients.solve_alone(level, self.streams[level.name].next())
        size = norm(self._gradient(level))
        require_finite((), _not_finite(level), size=size)
        self.logs[f"{level.name}/gradient_norm"] = size

    def _differentiate(self, level: Level, last: bool) -> Tensor:
        """Set `.grad` of the variables of a level, from `accumulate` batches; return the loss."""
        for parameter in self._trained.parameters[level.name]:
            # Also for frozen parameters, because an optimiser steps every parameter that has a gradient.
            parameter.grad = None
        stream = self.streams[level.name]
        batches = [stream.next() for _ in range(level.accumulate)]
        return self.gradients.differentiate(level, batches, last=last)

    def _apply_gradient(self, level: Level, loss: Tensor) -> None:
        """Clip the gradients in `.grad`, and step the optimiser and the scheduler."""
        precision, optimizer = self.precisions[level.name], self.optimizers[level.name]
        precision.unscale(optimizer)
        self._check_and_clip(level, overflow_expected=precision.scaler is not None)
        stepped = self._step_and_watch(level) if has_hooks(optimizer) else precision.step(optimizer)
        if precision.loss_scale is not None:
            self.logs[f"{level.name}/loss_scale"] = precision.loss_scale
        if not stepped:
            self._clear_gradient(level)
            self.gradients.carryover.gradient_norms.pop(level.name, None)
            return
        scheduler = self.schedulers[level.name]
        if scheduler is None:
            return
        self.gradients.carryover.groups[level.name] = [_settings(group) for group in optimizer.param_groups]
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(loss))
        else:
            scheduler.step()

    def _step_and_watch(self, level: Level) -> bool:
        """Take a step of an optimiser with hooks, which may project; keep where it left the variables unchanged."""
        carryover = self.gradients.carryover
        variables = carryover.variables[level.name]
        before = tuple(variable.detach().clone() for variable in variables)
        stepped = self.precisions[level.name].step(self.optimizers[level.name])
        carryover.held.pop(level.name, None)
        held = unmoved(before, variables, self.optimizers[level.name]) if stepped else ()
        if any(bool(mask.any()) for mask in held):
            carryover.held[level.name] = held
        return stepped

    def _check_and_clip(self, level: Level, *, overflow_expected: bool) -> None:
        """Clip the gradient of a level; raise if it is missing or not finite."""
        gradient = self._gradient(level)
        if level is self.problem.outermost:
            self.stillness.note(gradient, self.optimizers[level.name])
        if overflow_expected and level.clip is None:
            return
        size = norm(gradient)
        if level.clip is not None:
            self.logs[f"{level.name}/gradient_norm"] = self.gradients.carryover.gradient_norms[level.name] = size
            variables = self.gradients.carryover.variables[level.name]
            torch.nn.utils.clip_grads_with_norm_(variables, level.clip, size)
        if not overflow_expected:
            require_finite((), _not_finite(level), size=size)

    def _gradient(self, level: Level) -> list[Tensor]:
        """Return `.grad` of the variables of a level that have one; raise if none has."""
        variables = self.gradients.carryover.variables[level.name]
        gradient = [variable.grad for variable in variables if variable.grad is not None]
        if not gradient:
            raise ProblemError(
                f"the loss of level {level.name!r} does not depend on its own variables; does it use its first argument?"
            )
        return gradient

    def _clear_gradient(self, level: Level) -> None:
        """Clear the gradient of a skipped step, so that callbacks do not read it."""
        for parameter in self._trained.parameters[level.name]:
            parameter.grad = None

    def _kept(self, level: Level) -> Snapshot:
        """Return what a skipped step of a level has changed: its buffers and extra state; after a solver, its variables."""
        return Snapshot((level.module,), variables=level.solver is not None)

    def _skip(self, level: Level, error: NonFiniteError, kept: Snapshot | None) -> None:
        """Count a skipped step, and restore what the level had before it.

        Raises:
            NonFiniteError: no step may be skipped, or too many were.
        """
        if kept is None:
            raise error
        self.skipped[level.name] = self.skipped.get(level.name, 0) + 1
        if sum(self.skipped.values()) > self._skip_limit:
            raise NonFiniteError(f"{error}; {self._skip_limit} such steps were already skipped") from error
        self._just_skipped.add(level.name)
        self._clear_gradient(level)
        kept.restore()

    def snapshot(self) -> Snapshot:
        """Return a copy of everything that steps change, except positions of data and generators."""
        names = [level.name for level in self.problem]
        modules = (level.module for level in self.problem)
        carryover = self.gradients.carryover
        return Snapshot(
            modules,
            map(self._stateful, names),
            (carryover.warm, carryover.histories, carryover.cotangents, carryover.groups, self._trained.masks),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later steps depend on, except the generators."""
        gradients, carryover, problem = self.gradients, self.gradients.carryover, self.problem
        levels = {}
        for level in problem:
            parts = {kind: part.state_dict() for kind, part in self._stateful(level.name).items()}
            stream = self.streams[level.name].state_dict()
            levels[level.name] = {"module": module_state(level.module), "stream": stream, **parts}
        return {
            "levels": levels,
            "curvature": {name: stream.state_dict() for name, stream in gradients.curvature_streams.items()},
            "response": {name: stream.state_dict() for name, stream in gradients.response_streams.items()},
            "trainable": dict(self._trained.masks),
            "groups": dict(carryover.groups),
            "warm": dict(carryover.warm),
            "histories": {name: attrs.asdict(history, recurse=False) for name, history in carryover.histories.items()},
            "cotangents": {
                name: attrs.asdict(cotangent, recurse=False) for name, cotangent in carryover.cotangents.items()
            },
            "doubts": dict(gradients.doubts),
            "skipped": dict(self.skipped),
            "warmed": dict(self.warmed),
            "standalone": problem.workspace.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned.

        Raises:
            CheckpointError: a module, an optimiser or a scheduler cannot load its state.
            ProblemError: a level has fewer batches than in the run of the checkpoint.
        """
        gradients, carryover, problem = self.gradients, self.gradients.carryover, self.problem
        for level in problem:
            saved = state["levels"][level.name]
            try:
                load_module_state(level.module, saved["module"])
                for kind, part in self._stateful(level.name).items():
                    if kind in saved:
                        load_state(part, saved[kind])
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"level {level.name!r} cannot load its state ({' '.join(str(error).split())}); give the problem of the "
                    "checkpoint, or another folder"
                ) from error
            self.streams[level.name].load_state_dict(saved["stream"])
        for kind, streams in {"curvature": gradients.curvature_streams, "response": gradients.response_streams}.items():
            for name, stream in streams.items():
                if name in state[kind]:
                    stream.load_state_dict(state[kind][name])
        # A callback may have frozen or unfrozen parameters after the step that the vectors are of.
        masks = state.get("trainable", self._trained.present())
        self._trained.masks.update({name: tuple(mask) for name, mask in masks.items()})
        variables = self._trained.variables(self._trained.masks)
        carryover.groups.update(state.get("groups", {}))
        for name, vectors in state["warm"].items():
            carryover.warm[name] = _spread(vectors, variables[name])
        for name, fields in state.get("histories", {}).items():
            carryover.histories[name] = History(**to_device(fields, problem[name].device))
        for name, fields in state["cotangents"].items():
            held = StreamedCotangent(**to_device(fields, problem[name].device))
            held.cotangent = _spread(held.cotangent, variables[name])
            carryover.cotangents[name] = held
        gradients.doubts |= state["doubts"]
        self.skipped |= state["skipped"]
        self.warmed |= state["warmed"]
        problem.workspace.load_state_dict(state["standalone"])


def _spread(vectors: Tensors, variables: Tensors) -> Tensors:
    """Return vectors on the devices of variables, and sharded as these are, in their own dtypes: those of linear solves."""
    return tuple(sharded_as(x, v, dtype=x.dtype) for x, v in zip(vectors, variables, strict=True))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the settings of a group; a scheduler may change a tensor in place."""
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in group.items() if key != "params"}


def _not_finite(level: Level) -> Callable[[float], str]:
    return lambda _: f"the gradient of level {level.name!r} is not finite"
