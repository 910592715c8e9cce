"""The order of steps and their batches: random schedules, compared with a short interpreter of the rules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import SGD

import mlopt
from mlopt import Level, Problem, variables

#: A step: the level, and the (epoch, position) of each of its batches.
Step = tuple[str, tuple[tuple[int, int], ...]]


@attrs.frozen
class Drawn:
    """A random level: the levels that its loss names, and its counts; `length` is the number of batches in an epoch."""

    references: tuple[str, ...]
    steps: int
    warmup: int
    accumulate: int
    length: int


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Drawn]:
    """Return 2 to 5 levels by name, outermost first; an earlier level names each inner one, which names any others."""
    names = [f"level_{k}" for k in range(draw(st.integers(2, 5)))]
    named_by = {name: draw(st.sampled_from(names[:k])) for k, name in enumerate(names) if k}
    most = 3 if len(names) < 4 else 2
    drawn = {}
    for name in names:
        others = [other for other in names if other != name]
        free = draw(st.lists(st.sampled_from(others), unique=True, max_size=2))
        references = tuple(other for other in others if other in free or named_by.get(other) == name)
        inner = name != names[0]
        drawn[name] = Drawn(
            references=references,
            steps=draw(st.integers(1, most)) if inner else 1,
            warmup=draw(st.integers(0, 2)) if inner else 0,
            accumulate=draw(st.sampled_from((1, 1, 2))),
            length=draw(st.integers(1, 4)),
        )
    return drawn


def interpreted(levels: dict[str, Drawn], outer_steps: int, lookahead: bool) -> list[Step]:
    """Return the steps in order, as the rules define them."""
    names = list(levels)
    outermost, taken, done = names[0], dict.fromkeys(names, 0), []

    def host(name: str) -> str:
        """Return the innermost outer level that the loss depends on, directly or through inner levels; else the outermost."""
        outer, seen, pending = {outermost}, set(), list(levels[name].references)
        while pending:
            other = pending.pop()
            if names.index(other) < names.index(name):
                outer.add(other)
            elif other not in seen:
                seen.add(other)
                pending.extend(levels[other].references)
        return max(outer, key=names.index)

    hosts = {name: host(name) for name in names[1:]}

    def solve_inside(name: str) -> None:
        for guest in reversed(names[1:]):  # innermost listed first
            for _ in range(levels[guest].steps if hosts[guest] == name else 0):
                step(guest)

    def step(name: str) -> None:
        solve_inside(name)
        own(name)

    def own(name: str) -> None:
        batches = range(taken[name], taken[name] + levels[name].accumulate)
        taken[name] = batches.stop
        done.append((name, tuple(divmod(batch, levels[name].length) for batch in batches)))

    for name in reversed(names):
        for _ in range(levels[name].warmup if outer_steps else 0):
            step(name)
    for _ in range(outer_steps):
        if not lookahead:
            step(outermost)
            continue
        before = dict(taken)
        solve_inside(outermost)
        own(outermost)
        taken |= {name: before[name] for name in names[1:]}  # they are solved again, on the same batches
        solve_inside(outermost)
    return done


class Numbered:
    """Batches that consist of their epoch and position."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, -1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.epoch += 1
        return iter([(self.epoch, position) for position in range(self.length)])


class Recorder:
    """Records the steps of a problem; asserts that pullbacks use the last batch of the latest step of each level."""

    def __init__(self, levels: dict[str, Drawn]) -> None:
        self.steps: list[Step] = []
        self._evaluations: list[tuple[str, tuple[int, int]]] = []
        self._latest: dict[str, tuple[int, int]] = {}
        self.problem = Problem(*(self._level(name, drawn) for name, drawn in levels.items()))

    def _level(self, name: str, drawn: Drawn) -> Level:
        def loss(own: Any, batch: Any, **others: Any) -> torch.Tensor:
            self._evaluations.append((name, batch))
            coupled = sum(((own() * other()).sum() for other in others.values()), torch.zeros((), dtype=torch.float64))
            return own().square().sum() + 0.1 * coupled

        kinds = inspect.Parameter
        parameters = [kinds(p, kinds.POSITIONAL_ONLY) for p in ("own", "batch")]
        parameters += [kinds(p, kinds.KEYWORD_ONLY) for p in drawn.references]
        loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return Level(
            name,
            variables(torch.ones(1, dtype=torch.float64)),
            loss,
            data=Numbered(drawn.length),
            optimizer=lambda own: self._optimizer(name, own),
            steps=drawn.steps,
            warmup=drawn.warmup,
            accumulate=drawn.accumulate,
            estimator=mlopt.Identity(),
        )

    def _optimizer(self, name: str, own: Any) -> SGD:
        made = SGD(own, lr=0.01)
        made.register_step_post_hook(lambda *_: self._note(name))
        return made

    def _note(self, name: str) -> None:
        """Record a step from the evaluations since the last one; those of other levels are replayed by pullbacks."""
        self.steps.append((name, tuple(batch for level, batch in self._evaluations if level == name)))
        assert all(self._latest[level] == batch for level, batch in self._evaluations if level != name)
        self._latest[name] = self.steps[-1][1][-1]
        self._evaluations.clear()


@settings(max_examples=25, deadline=None)
@given(levels=schedules(), outer_steps=st.integers(0, 2), lookahead=st.booleans())
def test_steps_and_batches_follow_the_rules(levels: dict[str, Drawn], outer_steps: int, lookahead: bool) -> None:
    try:
        recorder = Recorder(levels)
    except mlopt.ProblemError as error:
        assume("in a circle" not in str(error))
        raise
    mlopt.solve(recorder.problem, outer_steps, lookahead=lookahead, progress=False)
    assert recorder.steps == interpreted(levels, outer_steps, lookahead)
