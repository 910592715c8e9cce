"""Callbacks that freeze and unfreeze parameters: what belongs to the former variables of a level is not used for its new ones."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import callback
from option_cases import F64, solve, vector
from states import assert_same_state
from torch import nn
from torch.optim import SGD

import mlopt
from mlopt import Level, Problem
from mlopt.solving import serialization

SCALES = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
RULES = [
    mlopt.ConjugateGradient(iterations=1, warm_start=True),
    mlopt.Neumann(iterations=1, step_size=0.1, warm_start=True),
    mlopt.ConjugateGradient(iterations=1, history=5),
    mlopt.Identity(streamed=True),
]


class Pair(nn.Module):
    """Two vectors, of which the first is trained."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((2,), 0.01, dtype=F64))
        self.b = nn.Parameter(torch.ones(size, dtype=F64), requires_grad=False)

    def swap(self) -> None:
        self.a.requires_grad_(not self.a.requires_grad)
        self.b.requires_grad_(not self.b.requires_grad)


def build(rule: mlopt.Estimator, pair: Pair | None = None, start: Any = (1.0, 2.0, 3.0), **options: Any) -> Problem:
    """Return a level on three weights of a level on a pair of vectors, whose optimiser holds both."""
    pair = Pair() if pair is None else pair

    def outer(own: Any, batch: Any, *, y: Any) -> torch.Tensor:
        return y.a.sum() + 3 * y.b.square().sum() + 0.1 * own().square().sum()

    def inner(own: Any, batch: Any, *, weights: Any) -> Any:
        factor = 1.0 if batch is None else batch
        first = sum((own.a - SCALES[:2]).square() * SCALES[:2] * factor)
        second = sum((own.b - 1).square() * SCALES[: len(own.b)])
        third = 0.1 * (own.a.prod().sin() + own.b.prod().sin())
        if getattr(rule, "streamed", False):
            return mlopt.Mixture([first, second, third], weights="weights")
        return (weights() * torch.stack([first, second, third])).sum()

    return Problem(
        Level("weights", vector(*start), outer, optimizer=partial(SGD, lr=0.01)),
        Level("y", pair, inner, optimizer=lambda _: SGD(pair.parameters(), lr=0.01), estimator=rule, **options),
    )


def swapping(hook: str = "on_step_begin") -> mlopt.Callback:
    return callback(**{hook: lambda run: run.problem["y"].module.swap() if run.step == 2 else None})


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rule", [*RULES, mlopt.FiniteDifference()], ids=str)
def test_after_other_variables_are_trained_a_run_is_as_one_that_starts_there(rule: mlopt.Estimator, size: int) -> None:
    problem, begin = build(rule, Pair(size)), []
    note = callback(on_step_begin=lambda run: begin.append(copy.deepcopy([level.module for level in run.problem])))
    solve(problem, 4, callbacks=[swapping(), note])
    weights, pair = begin[2]
    fresh = build(rule, pair, weights.value.tolist())
    solve(fresh, 2)
    assert torch.equal(problem["weights"].module.value, fresh["weights"].module.value)
    assert torch.equal(problem["y"].module.b, fresh["y"].module.b)
    assert problem.workspace.lengths == fresh.workspace.lengths


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("hook", ["on_step_begin", "on_step_end"])
def test_a_checkpoint_next_to_a_change_of_variables_can_be_resumed(
    rule: mlopt.Estimator, hook: str, tmp_path: Path
) -> None:
    """The change follows the last step before the checkpoint, or precedes the first step after it."""
    for folder, runs in (("whole", [4]), ("cut", [2, 4])):
        for steps in runs:
            solve(build(rule, Pair(3)), steps, tmp_path / folder, callbacks=[swapping(hook)], resume=steps != runs[0])
    whole, cut = (serialization.read(tmp_path / name / "step-00000004") for name in ("whole", "cut"))
    assert_same_state(cut, whole)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rollback_does_not_bring_back_the_state_of_former_variables(rule: mlopt.Estimator) -> None:
    batches = [torch.tensor(x, dtype=F64) for x in (1.0, 1.0, torch.nan, 1.0, 1.0)]
    rolled, plain = (build(rule, Pair(3), data=data) for data in (batches, [batches[0]]))
    solve(rolled, 5, on_nonfinite="rollback", callbacks=[swapping()])
    solve(plain, 4, callbacks=[swapping()])
    assert torch.equal(rolled["weights"].module.value, plain["weights"].module.value)


def test_compiled_products_of_former_variables_are_dropped() -> None:
    problem = build(mlopt.Identity())
    problem.workspace.compiled = {("weights", "loss"): None, ("y", "loss"): None, ("y", "loss", "autograd"): None}
    solve(problem, 3, callbacks=[swapping()])
    assert list(problem.workspace.compiled) == [("weights", "loss")]


@pytest.mark.parametrize("hook", ["on_train_begin", "on_step_begin"])
def test_an_unfrozen_parameter_that_no_optimizer_holds_is_refused(hook: str) -> None:
    problem = build(mlopt.Identity())
    factory = partial(SGD, lr=0.01)
    narrow = Problem(
        problem["weights"], Level("y", Pair(), problem["y"].loss, optimizer=factory, estimator=mlopt.Identity())
    )
    unfreeze = callback(**{hook: lambda run: run.problem["y"].module.b.requires_grad_(True)})
    with pytest.raises(
        mlopt.ProblemError, match=r"level 'y': its optimizer leaves out 1 of .* \('b'\); .*SGD\(module.parameters\(\)"
    ):
        solve(narrow, 2, callbacks=[unfreeze])


def test_a_level_without_a_trainable_parameter_is_refused_in_a_run() -> None:
    freeze = callback(on_step_end=lambda run: run.problem["y"].module.a.requires_grad_(False))
    with pytest.raises(mlopt.ProblemError, match="level 'y': all its parameters were frozen during the run; leave one"):
        solve(build(mlopt.Identity()), 2, callbacks=[freeze])
