"""Runs on a GPU: histories equal to the CPU's, bit-equal resumption, precision, diagnosis, and a host that does not wait."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import callback
from cuda_cases import CPU, DEVICE, deterministic, needs_cuda
from states import assert_same_state
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader

import mlopt
from mlopt import Level, Problem

pytestmark = needs_cuda

F64 = torch.float64
STEPS = 6


class Weights(nn.Module):
    """Weights of two losses, which sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


class Net(nn.Module):
    """A network with batch normalisation and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 8, dtype=F64), nn.BatchNorm1d(8, dtype=F64)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(8, 1, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.last(self.dropout(self.norm(self.first(x)).tanh())).squeeze(1)
        return hidden


def losses(net: nn.Module, batch: Tensor) -> list[Callable[[], Tensor]]:
    return [lambda: (net(batch) - batch.sum(1)).square().mean(), lambda: (net(batch) + 1).square().mean()]


def mixture(net: nn.Module, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
    return mlopt.Mixture(losses(net, batch), weights="weights")


def plain(net: nn.Module, batch: Tensor, *, weights: nn.Module) -> dict[str, Tensor]:
    fit, size = (loss() for loss in losses(net, batch))
    return {"loss": (weights().to(fit) * torch.stack([fit, size])).sum() + 0.1 * decay(net), "fit": fit.detach()}


def decay(net: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in net.parameters()]).sum()


def validation(weights: nn.Module, batch: Tensor, *, net: nn.Module) -> Tensor:
    return (net(batch.to(DEVICE)).to(batch) - batch.sum(1)).square().mean() + 0.01 * weights().square().sum()


def build(
    rule: mlopt.Estimator | None,
    device: torch.device,
    *,
    dropout: float = 0.0,
    loss: Callable[..., Any] = plain,
    outer: Callable[..., Any] | None = None,
    outside: torch.device | None = None,
    response: mlopt.Response | None = None,
    **options: Any,
) -> Problem:
    """Return weights of two losses of a network, whose batches come from loaders on the CPU."""
    torch.manual_seed(5)
    rows, held_out = torch.randn(22, 3, dtype=F64), torch.randn(9, 3, dtype=F64)

    def on_one_device(weights: nn.Module, batch: Tensor, *, net: nn.Module) -> Tensor:
        return (net(batch) - batch.sum(1)).square().mean() + 0.01 * weights().square().sum()

    return Problem(
        Level(
            "weights",
            Weights(),
            outer or on_one_device,
            data=DataLoader(held_out, batch_size=4, shuffle=True, drop_last=True),
            optimizer=partial(Adam, lr=0.05),
            device=outside or device,
            response=response,
        ),
        Level(
            "net",
            Net(dropout),
            loss,
            data=DataLoader(rows, batch_size=7, shuffle=True, drop_last=True),
            device=device,
            estimator=rule,
            **{"optimizer": partial(Adam, lr=0.02), "steps": 2, "warmup": 1, **options},
        ),
    )


def rows_of(problem: Problem, steps: int = STEPS, **options: Any) -> list[dict[str, float]]:
    return list(mlopt.solve(problem, steps, seed=3, progress=False, **options).history)


def assert_close(rows: list[dict[str, float]], others: list[dict[str, float]], bound: float = 1e-9) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=bound, abs=bound)


RULES: dict[str, tuple[mlopt.Estimator, dict[str, Any]]] = {
    "identity": (mlopt.Identity(), {}),
    "streamed": (mlopt.Identity(streamed=True), {"loss": mixture, "accumulate": 2}),
    "forward": (mlopt.Identity(products="forward"), {"loss": mixture, "clip": 0.5}),
    "differences": (mlopt.FiniteDifference(), {}),
    "warm": (mlopt.ConjugateGradient(iterations=2, warm_start=True, damping=1.0), {}),
    "neumann": (mlopt.Neumann(iterations=3, step_size=0.05), {"optimizer": partial(SGD, lr=0.02, momentum=0.9)}),
    "nystrom": (mlopt.Nystrom(rank=100, damping=1.0), {}),
    "sama": (mlopt.SAMA(), {}),
    "sama, fused": (mlopt.SAMA(), {"optimizer": partial(AdamW, lr=0.02, fused=True)}),
    "value function": (mlopt.ValueFunction(steps=4, step_size=0.02), {}),
    "value function, warm": (mlopt.ValueFunction(steps=4, step_size=0.02, warm_start=True), {}),
}


@pytest.mark.parametrize("name", RULES)
def test_a_run_has_the_history_of_the_cpu(name: str) -> None:
    rule, options = RULES[name]
    there, here = (rows_of(build(rule, device, **options)) for device in (DEVICE, CPU))
    # Differences of gradients amplify rounding.
    assert_close(there, here, 1e-5 if "difference" in str(rule) or "value function" in str(rule) else 1e-9)


def test_unrolled_steps_have_the_history_of_the_cpu() -> None:
    pytest.importorskip("torchopt", reason="Unrolled takes TorchOpt's optimisers: the extra `unroll`")
    there, here = (rows_of(build(mlopt.Unrolled(steps=3), device)) for device in (DEVICE, CPU))
    assert_close(there, here)


@pytest.mark.parametrize("lookahead", [False, True])
def test_levels_on_two_devices_have_the_history_of_the_cpu(lookahead: bool) -> None:
    rule = mlopt.ConjugateGradient(iterations=2, damping=1.0)
    there = build(rule, DEVICE, outer=validation, outside=CPU)
    assert (there["weights"].device.type, there["net"].device.type) == ("cpu", DEVICE.type)
    assert_close(rows_of(there, lookahead=lookahead), rows_of(build(rule, CPU), lookahead=lookahead))


def test_real_steps_have_the_history_of_the_cpu() -> None:
    response = mlopt.RealSteps(steps=4)
    there, here = (rows_of(build(None, device, response=response)) for device in (DEVICE, CPU))
    assert_close(there, here, 1e-6)


def test_real_steps_are_rolled_back_with_their_masks() -> None:
    problem = build(None, DEVICE, response=mlopt.RealSteps(steps=4), dropout=0.5)
    before = [t.clone() for level in problem for t in (*level.module.parameters(), *level.module.buffers())]
    state = generator()
    with deterministic():
        first, second = (mlopt.hypergradient(problem, seed=1).gradient["logits"] for _ in range(2))
    # The streams of batches go on.
    assert not torch.equal(first, second)
    after = [t for level in problem for t in (*level.module.parameters(), *level.module.buffers())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, generator())


def generator() -> Tensor:
    return torch.cuda.get_rng_state(DEVICE) if DEVICE.type == "cuda" else torch.get_rng_state()


def test_a_level_with_a_solver_of_its_own() -> None:
    def solver(model: Any, batch: Any, *, penalty: Any) -> None:
        inputs, targets = batch
        matrix = inputs.T @ inputs / len(inputs) + penalty().detach().exp() * torch.eye(
            3, dtype=F64, device=inputs.device
        )
        model.value.data.copy_(torch.linalg.solve(matrix, inputs.T @ targets / len(inputs)))

    def training(model: Any, batch: Any, *, penalty: Any) -> Tensor:
        return (batch[0] @ model() - batch[1]).square().mean() + penalty().exp().sum() * model().square().sum()

    def held_out(penalty: Any, batch: Any, *, model: Any) -> Tensor:
        return (batch[0] @ model() - batch[1]).square().mean()

    histories = []
    for device in (DEVICE, CPU):
        draws = torch.Generator().manual_seed(0)
        data = [(torch.randn(8, 3, generator=draws, dtype=F64), torch.randn(8, generator=draws, dtype=F64))] * 2
        problem = Problem(
            Level(
                "penalty",
                mlopt.variables(torch.full((1,), -1.0, dtype=F64)),
                held_out,
                data=data,
                optimizer=partial(SGD, lr=0.5),
                device=device,
            ),
            Level(
                "model",
                mlopt.variables(torch.zeros(3, dtype=F64)),
                training,
                data=data,
                solver=solver,
                estimator=mlopt.Dense(),
                device=device,
            ),
        )
        solution = mlopt.solve(problem, STEPS, seed=0, progress=False)
        assert solution.reports["model"].stationarity == pytest.approx(0, abs=1e-12)
        histories.append(list(solution.history))
    for there, here in zip(*histories, strict=True):
        assert there["penalty/loss"] == pytest.approx(here["penalty/loss"], rel=1e-9)


KINDS: dict[str, tuple[mlopt.Estimator, dict[str, Any]]] = {
    "streamed": (mlopt.Identity(streamed=True), {"loss": mixture}),
    "warm": (mlopt.ConjugateGradient(iterations=2, warm_start=True, damping=1.0), {"accumulate": 2, "clip": 1.0}),
    "fused": (mlopt.Identity(), {"optimizer": partial(AdamW, lr=0.02, fused=True)}),
    "fp16": (mlopt.Identity(), {"precision": "fp16"}),
}


def play(kind: str, folder: Path, steps: int, *, resume: bool = False) -> dict[str, Any]:
    """Solve a problem with dropout on the device; return its results."""
    rule, options = KINDS[kind]
    problem = build(rule, DEVICE, dropout=0.4, **options)
    with deterministic():
        rows = rows_of(problem, steps, checkpoint=mlopt.Checkpoints(folder, every=1), resume=resume)
    return {
        "rows": rows,
        "modules": [t.cpu() for level in problem for t in (*level.module.parameters(), *level.module.buffers())],
        "generator": generator(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal(kind: str, tmp_path: Path) -> None:
    """The masks of dropout come from the generator of the device."""
    whole = play(kind, tmp_path / "whole", STEPS)
    play(kind, tmp_path / "cut", 3)
    assert_same_state(play(kind, tmp_path / "cut", STEPS, resume=True), whole)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("first", "second"), [(DEVICE, CPU), (CPU, DEVICE)])
def test_a_run_is_continued_on_another_device(
    first: torch.device, second: torch.device, fused: bool, tmp_path: Path
) -> None:
    rule = mlopt.ConjugateGradient(iterations=2, warm_start=True, damping=1.0)
    made = partial(build, rule, optimizer=partial(AdamW, lr=0.02, fused=fused))
    saved = made(first)
    rows_of(saved, 3, checkpoint=tmp_path)
    problem = made(second)
    read: list[Tensor] = []
    start = callback(on_train_begin=lambda run: read.extend(p.detach().cpu().clone() for p in parameters(run.problem)))
    rows = rows_of(problem, STEPS, checkpoint=tmp_path, resume=True, callbacks=[start])
    assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(read, parameters(saved), strict=True))
    assert {p.device.type for p in parameters(problem)} == {second.type}
    assert_close(rows, rows_of(made(CPU)))


def parameters(problem: Problem) -> list[nn.Parameter]:
    return [p for level in problem for p in level.module.parameters()]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_level_in_low_precision_matches_the_loop_of_torch(precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    batches = [row.clone() for row in torch.randn(4, 16, 3, generator=torch.Generator().manual_seed(0))]
    adam = partial(Adam, lr=0.02)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        # The scale begins at 65536, so in half precision the first gradients overflow.
        return 300.0 * (net(batch)[:, 0] - batch.sum(1)).square().mean()

    net = network()
    level = Level("net", net, loss, data=batches, optimizer=adam, precision=precision, device=DEVICE)
    history = mlopt.solve(Problem(level), 12, seed=0, progress=False).history

    hand = network().to(DEVICE)
    optimizer, scaler = adam(hand.parameters()), GradScaler(DEVICE.type, enabled=precision == "fp16")
    scales = []
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            value = loss(hand, batches[step % 4].to(DEVICE))
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    for own, other in zip(net.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
    if precision == "fp16":
        assert history.column("net/loss_scale") == scales
        assert scales[0] == 2.0**15, "the first gradient should overflow"


def test_batches_of_the_cpu_are_moved_and_pinned_ones_too() -> None:
    seen: list[tuple[str, float]] = []
    rows = torch.arange(12.0, dtype=F64).reshape(6, 2)
    loader = DataLoader(rows, batch_size=2, pin_memory=DEVICE.type == "cuda")

    def loss(own: nn.Module, batch: Tensor) -> Tensor:
        seen.append((batch.device.type, float(batch.sum())))
        return own().square().sum() * batch.mean()

    level = Level(
        "own",
        mlopt.variables(torch.ones(2, dtype=F64)),
        loss,
        data=loader,
        optimizer=partial(SGD, lr=1e-3),
        device=DEVICE,
    )
    mlopt.solve(Problem(level), 3, seed=0, progress=False)
    assert seen == [(DEVICE.type, float(rows[k : k + 2].sum())) for k in (0, 2, 4)]


def test_a_batch_that_comes_from_the_device_is_complete_on_the_cpu() -> None:
    """A copy that does not wait may be read too early."""
    large = torch.ones(4_000_000, device=DEVICE).cumsum(0, dtype=F64)
    read = mlopt.problem.to_device([large], CPU)[0]
    assert float(read[-1]) == 4_000_000.0


def test_diagnosis_and_checks_are_those_of_the_cpu() -> None:
    rule = mlopt.MINRES(iterations=200, rtol=1e-13)
    there, here = (build(rule, device) for device in (DEVICE, CPU))
    batches = {"weights": torch.randn(4, 3, dtype=F64), "net": torch.randn(7, 3, dtype=F64)}
    diagnoses = [mlopt.diagnose(problem, batches).levels["net"] for problem in (there, here)]
    for kind in ("autograd", "forward"):
        assert diagnoses[0].products[kind].severity == diagnoses[1].products[kind].severity == "ok"
    assert diagnoses[0].costs.keys() == diagnoses[1].costs.keys()
    a, b = (diagnosis.spectrum for diagnosis in diagnoses)
    assert a is not None
    assert b is not None
    assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=1e-6)
    exact, other = (mlopt.check_hypergradient(problem, batches, tolerance=1e-6) for problem in (there, here))
    assert exact.error < 1e-6
    assert exact.rows[-1].oracle == pytest.approx(other.rows[-1].oracle, rel=1e-8)


def test_the_resolving_oracle_works_on_the_device() -> None:
    def inner(own: Any, batch: Any, *, x: Any) -> Tensor:
        return (own() - x()).square().sum() + own().pow(4).sum()

    def outer(own: Any, batch: Any, *, y: Any) -> Tensor:
        return (y() - 1).square().sum()

    problem = Problem(
        Level("x", mlopt.variables(torch.tensor([0.5, -1.0], dtype=F64)), outer, device=DEVICE),
        Level(
            "y",
            mlopt.variables(torch.zeros(2, dtype=F64)),
            inner,
            estimator=mlopt.Dense(),
            optimizer=partial(SGD, lr=0.1),
            device=DEVICE,
        ),
    )
    with pytest.raises(mlopt.DisagreementError) as caught:
        mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-5)
    assert caught.value.check.error_at_solution is not None
    assert caught.value.check.error_at_solution < 1e-5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the host never waits for a CPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["identity", "streamed", "forward", "differences", "sama"])
def test_the_host_waits_in_no_step(name: str) -> None:
    """Losses, norms and checks stay on the device until rows are logged; PyTorch raises where the host would wait."""
    rule, options = RULES[name]
    problem = build(rule, DEVICE, **options)

    def watch(mode: str) -> Callable[[Any], None]:
        # The first step warms up: it verifies the loss once.
        return lambda run: torch.cuda.set_sync_debug_mode(mode if run.step >= 1 else "default")

    stop = callback(on_step_begin=watch("error"), on_step_end=lambda run: torch.cuda.set_sync_debug_mode("default"))
    try:
        rows_of(problem, STEPS, callbacks=[stop], log_every=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
