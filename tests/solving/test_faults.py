"""Non-finite values raise with their context, or their step is skipped or rolled back, without waiting for a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import callback
from option_cases import F64, around_means, solve, vector
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils._python_dispatch import TorchDispatchMode

import mlopt
from mlopt import Level, Problem, variables
from mlopt.finiteness import DeferredChecks, deferred, require_finite
from mlopt.solving import serialization
from mlopt.solving.loop import Loop


def build(values: list[float], *, outer_values: list[float] | None = None, **options: Any) -> Problem:
    """Return two levels on scalars; their losses are multiplied by the batches, which may be nan."""

    def outer(own, batch, *, x):
        return {"loss": batch * ((x() - 2).square().sum() + own().square().sum()), "own": own()[0]}

    def inner(own, batch, *, weights):
        return batch * (own() - weights()).square().sum()

    def batches(factors: list[float]) -> list[torch.Tensor]:
        return [torch.tensor(factor, dtype=F64) for factor in factors]

    sgd, adam, decay = (
        partial(SGD, lr=0.1, momentum=0.9),
        partial(Adam, lr=0.1),
        partial(StepLR, step_size=1, gamma=0.9),
    )
    options = {"estimator": mlopt.ConjugateGradient(iterations=3, warm_start=True), "scheduler": decay, **options}
    return Problem(
        Level("weights", vector(0.0), outer, data=batches(outer_values or [1.0]), optimizer=sgd),
        Level("x", vector(1.0), inner, data=batches(values), optimizer=adam, **options),
    )


class Recorder(mlopt.Callback):
    """Records the rows that it receives."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.ended = 0

    def on_log(self, run: Any, rows: Any) -> None:
        self.rows += rows

    def on_train_end(self, run: Any) -> None:
        self.ended += 1


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("made", "step", "sentence"),
    [
        (lambda: build([1.0, 1.0, NAN]), 3, "outer step 3: the loss of level 'x' is nan"),
        (lambda: build([1.0], outer_values=[1.0, INF]), 2, "outer step 2: the loss of level 'weights' is inf"),
        (
            lambda: build([1e200, 1e200], estimator=mlopt.Neumann(iterations=9, step_size=1.0)),
            1,
            "outer step 1: .*Neumann",
        ),
    ],
)
def test_a_fault_is_raised_with_level_step_estimator_and_state(
    made: Callable[[], Problem], step: int, sentence: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(mlopt.NonFiniteError, match=sentence) as raised:
        solve(made(), 5, tmp_path, callbacks=[recorder])
    assert raised.value.step == step
    assert f"estimators: x: {made()['x'].estimator}" in str(raised.value)
    fault = tmp_path / f"fault-{step:08d}"
    assert str(fault) in str(raised.value)
    # The rows include that of the failed step, with its values so far.
    assert [row["step"] for row in recorder.rows] == list(range(1, step + 1))
    assert recorder.ended == 1
    saved = serialization.read(fault)
    assert saved["history"][-1]["step"] == step
    assert repr(saved["history"]) == repr(recorder.rows)
    # A resumed run starts from the state before the step and fails on the same data.
    whole = solve(made(), step - 1) if step > 1 else None
    with pytest.raises(mlopt.NonFiniteError):
        solve(made(), 5, tmp_path, resume=True)
    if whole is not None:
        assert repr(saved["history"][:-1]) == repr(list(whole.history))


def test_nan_is_in_the_logged_row() -> None:
    recorder = Recorder()
    with pytest.raises(mlopt.NonFiniteError):
        solve(build([NAN]), 3, callbacks=[recorder])
    assert math.isnan(recorder.rows[-1]["x/loss"])


def test_a_skipped_step_moves_only_the_other_levels() -> None:
    """The inner steps match a plain loop over the finite batches; the logged loss is nan."""
    problem = build([1.0, NAN, 3.0, 0.5], estimator=mlopt.Identity())
    states: list[tuple[float, ...]] = []
    watch = callback(
        on_step_end=lambda run: states.append(tuple(problem[k].module.value.item() for k in ("x", "weights")))
    )
    solution = solve(problem, 4, on_nonfinite="skip", callbacks=[watch])
    x, w = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (1.0, 0.0))
    inner, outer = Adam([x], lr=0.1), SGD([w], lr=0.1, momentum=0.9)
    scheduler = StepLR(inner, step_size=1, gamma=0.9)
    expected = []
    for factor in (1.0, NAN, 3.0, 0.5):
        if not math.isnan(factor):
            x.grad = (2 * factor * (x - w)).detach()
            inner.step()
            scheduler.step()
            # -(d2f/dw dx) v with v = 2 (x - 2), plus the direct derivative
            w.grad = (2 * factor * 2 * (x - 2) + 2 * w).detach()
            outer.step()
        expected.append((x.item(), w.item()))
    torch.testing.assert_close(torch.tensor(states), torch.tensor(expected), rtol=1e-12, atol=0)
    # The pullback of the outer step would use the skipped step: the outer step is skipped too, and is not counted.
    assert solution.history.column("skipped") == [0, 1, 1, 1]
    assert [math.isnan(loss) for loss in solution.history.column("x/loss")] == [False, True, False, False]


def test_a_rollback_restores_variables_and_optimizers_and_the_next_step_has_new_data() -> None:
    rolled = build([1.0, 3.0, NAN, 1.0, 0.5, 2.0], steps=2)
    solution = solve(rolled, 3, on_nonfinite="rollback")
    # The first of two inner steps failed: the batch of the second one was not drawn.
    plain = build([1.0, 3.0, 1.0, 0.5], steps=2)
    solve(plain, 2)
    for name in ("weights", "x"):
        assert torch.equal(rolled[name].module.value, plain[name].module.value)
    assert solution.history.column("rollbacks") == [0, 1, 1]
    assert math.isnan(solution.history[1]["x/loss"])


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [("skip", "3 such steps were already skipped"), ("rollback", "3 outer steps were already rolled back")],
)
def test_skips_and_rollbacks_are_limited(policy: str, sentence: str) -> None:
    with pytest.raises(mlopt.NonFiniteError, match=sentence):
        solve(build([NAN]), 20, on_nonfinite=policy, nonfinite_limit=3)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_counts_of_skips_and_rollbacks_survive_a_resume(policy: str, tmp_path: Path) -> None:
    values = [1.0, NAN, 2.0, 3.0, NAN, 0.5]
    whole, cut = build(values), build(values)
    expected = solve(whole, 6, on_nonfinite=policy)
    solve(build(values), 3, tmp_path, on_nonfinite=policy)
    solution = solve(cut, 6, tmp_path, on_nonfinite=policy, resume=True)
    assert repr(list(solution.history)) == repr(list(expected.history))
    assert torch.equal(cut["x"].module.value, whole["x"].module.value)
    with pytest.raises(mlopt.NonFiniteError, match="already"):
        solve(build(values), 12, tmp_path, on_nonfinite=policy, resume=True, nonfinite_limit=3)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device: reads of a number or of a count of entries."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(function) for name in self.NAMES)
        return function(*args, **(kwargs or {}))


def two_levels(estimator: mlopt.Estimator, *, mixture: bool) -> Problem:
    """Return a problem whose losses do not make the host wait."""

    def outer(own, batch, *, net):
        return {"loss": net(batch).square().mean() + own().square().sum(), "first": own()[0]}

    def inner(own, batch, *, weights):
        losses = [(own(batch) - 1).square().mean(), own(batch).abs().mean()]
        if mixture:
            return mlopt.Mixture(losses, weights="weights")
        w = weights()
        return w[0] * losses[0] + w[1] * losses[1]

    torch.manual_seed(0)
    batch = torch.randn(8, 3)
    sgd = partial(SGD, lr=0.05, momentum=0.9)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return Problem(
        Level("weights", variables(torch.full((2,), 0.5)), outer, data=[batch], optimizer=sgd, clip=1.0),
        Level(
            "net", net, inner, data=[batch], optimizer=sgd, steps=3, accumulate=2, clip=1.0, estimator=estimator,
            scheduler=partial(StepLR, step_size=5), warmup=1, precision="bf16",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize(
    "estimator",
    [
        mlopt.Identity(),
        mlopt.Identity(streamed=True),
        mlopt.Identity(products="forward"),
        mlopt.FiniteDifference(),
    ],
    ids=str,
)
def test_an_outer_step_does_not_make_the_host_wait(
    estimator: mlopt.Estimator, mixture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, non-finite values are recorded, and checked when rows are logged."""
    counts = count_waits(two_levels(estimator, mixture=mixture), monkeypatch)
    # The first step compares each pure function with its live module.
    assert counts[1:] == [0, 0, 0]


def test_a_solver_that_stops_by_residual_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(count_waits(two_levels(mlopt.ConjugateGradient(iterations=2), mixture=False), monkeypatch)) > 0


def count_waits(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how often each outer step waits if checks for non-finite values are deferred."""
    counts, waits = [], Waits()
    monkeypatch.setattr(Loop, "_deferring_checks", lambda loop: deferred(loop._checks))

    def begin(run: Any) -> None:
        waits.count = 0
        waits.__enter__()

    def end(run: Any) -> None:
        waits.__exit__(None, None, None)
        counts.append(waits.count)

    solve(problem, 4, callbacks=[callback(on_step_begin=begin, on_step_end=end)], log_every=4)
    return counts


def test_a_deferred_fault_raises_at_the_next_log_and_names_its_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Loop, "_deferring_checks", lambda loop: deferred(loop._checks))
    recorder = Recorder()
    values = [1.0, 1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(mlopt.NonFiniteError, match="outer step 4: the loss of level 'x' is nan") as raised:
        solve(
            build(values, estimator=mlopt.Identity()), 20, log_every=5, callbacks=[recorder],
            checkpoint=mlopt.Checkpoints(tmp_path, every=3),
        )  # fmt: skip
    assert raised.value.step == 4
    assert len(recorder.rows) == 5
    # The newest checkpoint is from before the fault.
    step, _, state = mlopt.Checkpoints(tmp_path).newest()
    assert step == 3
    assert math.isfinite(state["engine"]["levels"]["x"]["module"]["state"]["value"].item())


def test_deferred_checks_run_once_and_start_again() -> None:
    checks = DeferredChecks()
    with deferred(checks):
        require_finite((torch.ones(3), torch.ones(2)), lambda _: "fine")
        checks.step = 2
        require_finite((torch.tensor([1.0, INF]),), lambda value: f"it is {value}")
        checks.step = 3
        require_finite((torch.tensor([NAN]),), lambda value: f"it is {value}")
    with pytest.raises(mlopt.NonFiniteError, match="it is inf") as raised:
        checks.run()
    assert raised.value.step == 2
    checks.run()
    with pytest.raises(mlopt.NonFiniteError, match="it is nan"):
        require_finite((torch.tensor([NAN]),), lambda value: f"it is {value}")


def test_a_skipped_step_keeps_the_buffers_and_removes_the_gradient() -> None:
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    seen: list[bool] = []

    def loss(own, batch):
        return own(batch).square().mean()

    batches = [torch.randn(4, 2), torch.full((4, 2), NAN), torch.randn(4, 2)]
    problem = Problem(Level("x", norm, loss, data=batches, optimizer=partial(SGD, lr=0.1)))
    watch = callback(on_step_end=lambda run: seen.append(norm[1].weight.grad is None))
    solution = solve(problem, 3, on_nonfinite="skip", callbacks=[watch])
    assert norm[0].running_mean.isfinite().all()
    assert norm[0].num_batches_tracked.item() == 2
    assert solution.history.column("skipped") == [0, 1, 1]
    assert seen == [False, True, False]


def test_warm_up_is_rolled_back_and_named_too() -> None:
    values = [NAN, 1.0, 2.0, 0.5]
    rolled, plain = build(values, warmup=2), build(values[1:], warmup=1)
    solve(rolled, 1, on_nonfinite="rollback")
    solve(plain, 1)
    assert rolled["x"].module.value.isfinite().all()
    with pytest.raises(mlopt.NonFiniteError, match="warm-up: the loss of level 'x' is nan") as raised:
        solve(build(values, warmup=2), 1)
    assert raised.value.step == 0


def test_an_overflow_in_half_precision_is_not_a_fault_of_sama() -> None:
    """The scaled gradients of every second step overflow; the last gradient of the optimizer then has no step."""

    def inner(own, batch, *, weights):
        # Under autocast the product is in half precision, where its gradient of 4 times batch and scale may overflow.
        return (batch * (own() - weights())[None] @ torch.ones(2, 1)).float().square().sum()

    def outer(own, batch, *, x):
        return (x() - 2).square().sum() + own().square().sum()

    options = {"data": [torch.tensor(0.1), torch.tensor(1.0)], "precision": "fp16", "estimator": mlopt.SAMA()}
    problem = Problem(
        Level("weights", variables(torch.zeros(2)), outer, optimizer=partial(SGD, lr=0.1)),
        Level("x", variables(torch.ones(2)), inner, optimizer=partial(Adam, lr=0.1), **options),
    )
    scales = solve(problem, 4).history.column("x/loss_scale")
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**14]
    assert all(level.module.value.isfinite().all() for level in problem)


def test_callbacks_and_evaluations_check_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "_deferring_checks", lambda loop: deferred(loop._checks))
    caught = []

    def evaluate(problem: Problem) -> dict[str, float]:
        try:
            mlopt.hypergradient(problem, {"x": torch.tensor(NAN, dtype=F64)})
        except mlopt.NonFiniteError:
            caught.append(1)
        return {}

    watch = callback(on_step_end=lambda run: evaluate(run.problem))
    solve(build([1.0], estimator=mlopt.Identity()), 3, callbacks=[watch], evaluate=evaluate)
    assert len(caught) == 6


def test_deferred_checks_keep_the_range_of_double_precision() -> None:
    checks = DeferredChecks()
    with deferred(checks):
        require_finite((), lambda value: f"it is {value}", size=torch.tensor(1e200, dtype=F64))
    checks.run()


def streamed_with_bad_cotangent() -> Problem:
    """Return a streamed pullback whose cotangent is NaN at the third outer step, although the loss is finite."""

    def outer(own: Any, batch: Any, *, x: Any) -> torch.Tensor:
        # The square root has no derivative at zero.
        return (x() - 2).square().sum() + (batch * x()).abs().sqrt().sum() + own().square().sum()

    def inner(own: Any, batch: Any, *, weights: Any) -> mlopt.Mixture:
        return mlopt.Mixture([(own() - 1).square().sum(), (own() + 1).square().sum()], weights="weights")

    sgd, factors = partial(SGD, lr=0.01), [torch.tensor(x, dtype=F64) for x in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0)]
    return Problem(
        Level("weights", vector(0.5, 0.5), outer, data=factors, optimizer=sgd),
        Level("x", vector(1.0, 1.5), inner, optimizer=sgd, estimator=mlopt.Identity(streamed=True)),
    )


@pytest.mark.parametrize(("policy", "column"), [("skip", "skipped"), ("rollback", "rollbacks")])
def test_a_cotangent_that_is_not_finite_is_not_held_for_later_steps(policy: str, column: str) -> None:
    problem = streamed_with_bad_cotangent()
    solution = solve(problem, 6, on_nonfinite=policy)
    assert solution.history.column(column) == [0, 0, 1, 1, 1, 1]
    assert problem["weights"].module.value.isfinite().all()
    with pytest.raises(mlopt.NonFiniteError, match="outer step 3: the cotangent on level 'x' is not finite"):
        solve(streamed_with_bad_cotangent(), 6)


@pytest.mark.parametrize(
    ("policy", "column", "count", "mean"),
    [("skip", "skipped", 3, ((1.5 + 2) / 2 + 1.5) / 2), ("rollback", "rollbacks", 2, (1.5 + 2) / 2)],
)
def test_a_buffer_that_a_failed_step_has_bound_anew_is_restored(
    policy: str, column: str, count: int, mean: float
) -> None:
    """Two steps to an outer step; a rollback of these two forgets both batches."""
    problem = around_means([[NAN, 1.0], [1.0, 2.0], [5.0, -1.0], [NAN, 0.0], [0.0, 3.0]])
    solution = solve(problem, 3, on_nonfinite=policy)
    assert problem["net"].module.mean.item() == mean
    assert solution.history.column(column)[-1] == count


class Counted(torch.nn.Linear):
    """A layer with a mean of its inputs as extra state."""

    mean = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = (self.mean + float(x.mean())) / 2
        return super().forward(x) + self.mean

    def get_extra_state(self) -> float:
        return self.mean

    def set_extra_state(self, state: float) -> None:
        self.mean = state


def test_a_skipped_step_keeps_the_extra_state() -> None:
    module = Counted(2, 1)

    def loss(own: Any, batch: Any) -> torch.Tensor:
        return own(batch).square().mean()

    data = [torch.full((4, 2), x) for x in (1.0, NAN, 3.0)]
    solve(Problem(Level("x", module, loss, data=data, optimizer=partial(SGD, lr=0.01))), 3, on_nonfinite="skip")
    assert module.mean == 1.75
