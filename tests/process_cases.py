"""Problems that several processes share, and what each evaluates of them; every case is a function of a process group."""

from __future__ import annotations

import math
import os
import signal
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mlopt
from mlopt.ranks import Ranks

#: Named tensors that a case evaluates.
Values = dict[str, Tensor]


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs (count, 4) and labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    direction = torch.randn(4, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ direction + noise > 0).double()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def vector(*size: int) -> nn.Module:
    return mlopt.variables(torch.linspace(-0.5, 0.5, torch.Size(size).numel(), dtype=torch.float64).reshape(size))


def decay(module: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in module.parameters()]).sum()


def training_loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
    inputs, labels, index, *_ = batch
    losses = cross_entropy(module(inputs).squeeze(1), labels, reduction="none")
    return {"loss": (torch.sigmoid(weights()[index]) * losses).mean(), "error": losses.detach().mean()}


def validation_loss(module: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(inputs).squeeze(1), labels)


def regularizer(module: nn.Module) -> Tensor:
    return 0.1 * decay(module)


class Supplied:
    """The same regularizer with its second-order product."""

    def __call__(self, module: nn.Module) -> Tensor:
        return regularizer(module)

    def product(self, direction: dict[Any, Any], wanted: Any) -> dict[Any, Any]:
        return {block: tuple(0.2 * v for v in vectors) for block, vectors in direction.items()}


def indexed(count: int) -> tuple[Tensor, ...]:
    return (*rows(count), torch.arange(count))


def two_levels(
    estimator: mlopt.Estimator | None, group: Any, count: int = 37, *, response: Any = None, **options: Any
) -> mlopt.Problem:
    """Return weights of `count` rows outside, a network with a regularizer inside."""
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    options = {"data": [indexed(count)], "steps": 3, "optimizer": optimizer, "regularizer": regularizer} | options
    loss = options.pop("loss", training_loss)
    return mlopt.Problem(
        mlopt.Level(
            "weights",
            vector(count),
            validation_loss,
            data=[rows(11, seed=1)],
            optimizer=partial(Adam, lr=0.1),
            response=response,
        ),
        mlopt.Level("model", network(), loss, estimator=estimator, **options),
        group=group,
    )


def _outer_loss(module: nn.Module, batch: Any, *, middle: nn.Module) -> Tensor:
    inputs, labels = batch
    return cross_entropy(inputs @ middle(), labels) + 0.01 * module().square().sum()


def _middle_loss(module: nn.Module, batch: Any, *, outer: nn.Module, inner: nn.Module) -> Tensor:
    inputs, labels = batch
    return cross_entropy(inputs @ (module() + inner()), labels) + (outer().exp() * module().square()).mean()


def _inner_loss(module: nn.Module, batch: Any, *, middle: nn.Module) -> Tensor:
    inputs, _ = batch
    return (inputs @ (module() - middle())).square().mean() + 0.5 * module().square().sum()


def three_levels(estimator: Callable[[], mlopt.Implicit], group: Any, **options: Any) -> mlopt.Problem:
    """Return a nest: the middle level's gradient includes the response of the inner one; with decay, which terms share."""
    rule = partial(SGD, lr=0.05, weight_decay=0.1)
    return mlopt.Problem(
        mlopt.Level("outer", vector(4), _outer_loss, data=[rows(13, 1)], optimizer=rule),
        mlopt.Level("middle", vector(4), _middle_loss, data=[rows(7, 2)], optimizer=rule, estimator=estimator()),
        mlopt.Level("inner", vector(4), _inner_loss, data=[rows(5, 3)], optimizer=rule, estimator=estimator(), steps=2),
        group=group,
    )


def masked(inputs: Tensor, labels: Tensor, model: nn.Module) -> dict[str, Any]:
    """Return a loss that is a mean over the rows with a positive first input."""
    kept = inputs[:, 0] > 0
    losses = cross_entropy(model(inputs).squeeze(1), labels, reduction="none")
    return {"loss": (losses * kept).sum() / kept.sum().clamp_min(1), "count": kept.sum()}


def mixture_loss(model: nn.Module, batch: Any, *, mixing: nn.Module) -> mlopt.Mixture:
    inputs, labels = batch
    losses = {
        "fit": lambda: cross_entropy(model(inputs).squeeze(1), labels),
        "masked": lambda: masked(inputs, labels, model),
        "size": lambda: model(inputs).square().mean(),
    }
    return mlopt.Mixture(losses, weights="mixing")


def mixture(estimator: mlopt.Estimator, group: Any, **options: Any) -> mlopt.Problem:
    options = {"data": [rows(37)]} | options
    return mlopt.Problem(
        mlopt.Level("mixing", vector(3), validation_loss, data=[rows(11, 1)], optimizer=partial(Adam, lr=0.1)),
        mlopt.Level(
            "model", network(), mixture_loss, optimizer=partial(SGD, lr=0.1), estimator=estimator, steps=2, **options
        ),
        group=group,
    )


def solved(module: nn.Module, batch: Any, *, outer: nn.Module) -> None:
    inputs, labels = batch
    matrix = 2 * inputs.T @ inputs / len(inputs) + torch.diag(outer().detach().exp())
    module.value.data.copy_(torch.linalg.solve(matrix, 2 * inputs.T @ labels / len(inputs)))  # type: ignore[operator, union-attr]


def ridge_loss(module: nn.Module, batch: Any, *, outer: nn.Module) -> Tensor:
    inputs, labels = batch
    return (inputs @ module() - labels).square().mean() + (outer().exp() * module().square()).sum() / 2


def ridge(group: Any) -> mlopt.Problem:
    """Return a level with a solver of its own inside."""

    def loss(module: nn.Module, batch: Any, *, middle: nn.Module) -> Tensor:
        return (batch[0] @ middle() - batch[1]).square().mean()

    return mlopt.Problem(
        mlopt.Level("outer", vector(4), loss, data=[rows(7, 1)], optimizer=partial(SGD, lr=0.1)),
        mlopt.Level("middle", vector(4), ridge_loss, solver=solved, data=[rows(9)], estimator=mlopt.Dense()),
        group=group,
    )


def fixed_point(group: Any) -> mlopt.Problem:
    def residual(module: nn.Module, batch: Any, *, outer: nn.Module) -> Tensor:
        return module() - torch.tanh(batch[0].mean(0) * module() + outer())

    def loss(module: nn.Module, batch: Any, *, state: nn.Module) -> Tensor:
        return (batch[0] @ state() - batch[1]).square().mean()

    return mlopt.Problem(
        mlopt.Level("outer", vector(4), loss, data=[rows(7, 1)], optimizer=partial(SGD, lr=0.1)),
        mlopt.Level(
            "state",
            vector(4),
            residual=residual,
            data=[rows(9)],
            optimizer=partial(SGD, lr=1.0),
            estimator=mlopt.GMRES(iterations=10),
            steps=5,
        ),
        group=group,
    )


def tasks(group: Any) -> mlopt.Problem:
    """Return ridge regression on three tasks at once."""

    @mlopt.over_tasks
    def loss(module: nn.Module, batch: Any, *, start: nn.Module) -> Tensor:
        return (batch @ (module() - start())).square().mean() + module().square().sum()

    @mlopt.over_tasks
    def outer(start: nn.Module, batch: Any, *, own: nn.Module) -> Tensor:
        return (batch @ own()).square().mean() + start().sum()

    inputs = rows(18)[0].reshape(3, 6, 4)

    def total(start: nn.Module, batch: Any, *, own: nn.Module) -> Tensor:
        return outer(start, batch, own=own)

    return mlopt.Problem(
        mlopt.Level("start", vector(4), outer, data=[inputs]),
        mlopt.Level("own", mlopt.stacked(vector(4), copies=3), loss, data=[inputs], estimator=mlopt.Dense()),
        group=group,
    )


def of(problem: mlopt.Problem) -> Values:
    """Return the hypergradient and the loss."""
    result = mlopt.hypergradient(problem, seed=0)
    return {"loss": result.loss.reshape(1), **result.gradient}


def run_of(problem: mlopt.Problem, steps: int, **options: Any) -> Values:
    """Return the variables and the logged values after a run."""
    solution = mlopt.solve(problem, steps, seed=0, progress=False, **options)
    values = {f"{level.name}.{name}": p.detach() for level in problem for name, p in level.module.named_parameters()}
    history = {name: torch.tensor(solution.history.column(name)) for name in solution.history.names}
    return {name: value.clone().double() for name, value in (values | history).items()}


def loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=7, shuffle=True)


ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "identity": lambda: mlopt.Identity(),
    "finite differences": lambda: mlopt.FiniteDifference(),
    "neumann": lambda: mlopt.Neumann(iterations=4),
    "conjugate gradient": lambda: mlopt.ConjugateGradient(iterations=5),
    "forward": lambda: mlopt.ConjugateGradient(iterations=5, products="forward"),
    "gauss-newton": lambda: mlopt.ConjugateGradient(iterations=5, products="gauss_newton"),
    "cg on differences": lambda: mlopt.ConjugateGradient(iterations=3, products="finite_difference"),
    "minres": lambda: mlopt.MINRES(iterations=5),
    "nystrom": lambda: mlopt.Nystrom(rank=4, damping=0.1),
    "dense": lambda: mlopt.Dense(),
    "unrolled": lambda: mlopt.Unrolled(steps=4, checkpoint_every=2),
    "unrolled, balanced": lambda: mlopt.Unrolled(steps=9),
    "value function": lambda: mlopt.ValueFunction(steps=8),
    "sama": lambda: mlopt.SAMA(),
}


def _curvature(group: Any) -> Values:
    batches = [indexed(37), tuple(t[:5] for t in indexed(37)), tuple(t[5:16] for t in indexed(37))]
    return of(two_levels(mlopt.ConjugateGradient(iterations=5, curvature_data=batches, curvature_batches=3), group))


def _loaders(group: Any) -> Values:
    warm = mlopt.ConjugateGradient(iterations=3, warm_start=True)
    data = loader(*indexed(37))
    return run_of(two_levels(warm, group, data=data, accumulate=2, clip=0.3), 20)


def _streamed(group: Any) -> Values:
    return run_of(mixture(mlopt.Identity(), group, data=loader(*rows(37))), 20)


def _lookahead(group: Any) -> Values:
    return run_of(two_levels(mlopt.Identity(), group, data=loader(*indexed(37))), 5, lookahead=True)


def _counted(count: int, group: Any, **options: Any) -> Values:
    """Return a run whose loss logs a count."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        return masked(batch[0].abs(), batch[1] * weights()[batch[2]].sigmoid(), module)

    return run_of(two_levels(mlopt.Identity(), group, count, loss=loss, **options), 2)


def _with_history(group: Any) -> Values:
    kept = mlopt.ConjugateGradient(iterations=4, rtol=1e-3, warm_start=True, history=6)
    return run_of(two_levels(kept, group, data=loader(*indexed(37))), 8)


def _nested_run(group: Any) -> Values:
    return run_of(three_levels(lambda: mlopt.ConjugateGradient(iterations=3, warm_start=True), group), 20)


def _evaluated(group: Any) -> Values:
    problem = two_levels(mlopt.Identity(), group)
    stop = mlopt.EarlyStopping("evaluation/size", patience=2)
    size = {"evaluate": lambda p: {"size": decay(p["model"].module)}, "callbacks": [stop]}
    return run_of(problem, 20, **size)


#: Cases whose values are those of one process on the whole batch.
EQUAL: dict[str, Callable[[Any], Values]] = {
    **{f"flat {name}": lambda group, e=e: of(two_levels(e(), group)) for name, e in ESTIMATORS.items()},
    **{
        f"three rows {name}": lambda group, e=ESTIMATORS[name]: of(two_levels(e(), group, 3))
        for name in ("finite differences", "conjugate gradient", "unrolled")
    },
    **{
        f"nested {name}": lambda group, e=ESTIMATORS[name]: of(three_levels(e, group))
        for name in ("conjugate gradient", "neumann", "forward", "dense", "finite differences")
    },
    **{
        f"mixture {name}": lambda group, e=ESTIMATORS[name]: of(mixture(e(), group))
        for name in ("identity", "forward", "value function", "finite differences")
    },
    "nested joint": lambda group: of(three_levels(lambda: mlopt.MINRES(iterations=30, joint=True), group)),
    "supplied product": lambda group: of(
        two_levels(mlopt.ConjugateGradient(iterations=5), group, regularizer=Supplied())
    ),
    "curvature batches": _curvature,
    "own solver": lambda group: of(ridge(group)),
    "game": lambda group: of(game(group)),
    "doubtful": lambda group: doubtful(group),
    "unrolled over batches": lambda group: of(
        two_levels(mlopt.Unrolled(steps=3, data=[tuple(t[k : k + 10] for t in indexed(37)) for k in (0, 9, 20)]), group)
    ),
    "residual": lambda group: of(fixed_point(group)),
    "tasks": lambda group: of(tasks(group)),
    "whole batch": lambda group: of(two_levels(mlopt.Dense(), group, split=False)),
    "real steps": lambda group: of(mixture_by_real_steps(group)),
    "run: loaders, accumulation, clipping, warm start": _loaders,
    "run: streamed mixture": _streamed,
    "run: history": _with_history,
    "run: look-ahead": _lookahead,
    "run: nested": _nested_run,
    "run: own solver": lambda group: run_of(ridge(group), 5),
    "run: residual": lambda group: run_of(fixed_point(group), 5),
    "run: real steps": lambda group: run_of(mixture_by_real_steps(group), 3),
    "run: stopped early": _evaluated,
    "run: counts of one row": partial(_counted, 1),
    "run: counts of a whole batch": partial(_counted, 9, split=False),
}


def game(group: Any) -> mlopt.Problem:
    """Return two players on the rows of a batch."""

    def first(a: nn.Module, batch: Any, *, b: nn.Module, outer: nn.Module) -> Tensor:
        return (batch[0] @ a() - batch[1]).square().mean() + a() @ b() + outer() @ a()

    def second(b: nn.Module, batch: Any, *, a: nn.Module) -> Tensor:
        return (batch[0] @ b()).square().mean() - a() @ b() + b().sum()

    def loss(module: nn.Module, batch: Any, *, market: nn.Module) -> Tensor:
        return (batch[0] @ market["b"]() - batch[1]).square().mean()  # type: ignore[index]

    players = (mlopt.Level("a", vector(4), first), mlopt.Level("b", vector(4), second))
    options = {"data": [rows(9)], "estimator": mlopt.Dense(), "optimizer": partial(SGD, lr=0.1)}
    return mlopt.Problem(
        mlopt.Level("outer", vector(4), loss, data=[rows(7, 1)]), mlopt.game("market", *players, **options), group=group
    )


def doubtful(group: Any) -> Values:
    """Return the hypergradient and the number of remarks for a loss that stops a gradient."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        inputs, labels, index = batch
        losses = cross_entropy(module(inputs).squeeze(1), labels, reduction="none")
        return (torch.sigmoid(weights()[index]) * losses * losses.detach()).mean()

    result = mlopt.hypergradient(_with_loss(loss, group), seed=0)
    remarks = [remark for remark in result.reports["model"].remarks if "differ from differences" in remark]
    return {**result.gradient, "remarks": torch.tensor([float(len(remarks))])}


def mixture_by_real_steps(group: Any) -> mlopt.Problem:
    problem = mixture(mlopt.Identity(), None)
    outer, inner = problem.levels
    options = {"data": outer.data, "optimizer": outer.optimizer, "response": mlopt.RealSteps(steps=3)}
    return mlopt.Problem(mlopt.Level("mixing", outer.module, validation_loss, **options), inner, group=group)  # type: ignore[arg-type]


class Different:
    """A batch that knows its own parts."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def portion(self, rank: int, size: int) -> tuple[Any, float]:
        count = len(self.tensors[0])
        return tuple(t[rank::size] for t in self.tensors), len(range(rank, count, size)) / count

    def __iter__(self) -> Any:
        return iter(self.tensors)


def _summed(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return len(batch[0]) * training_loss(module, batch, weights=weights)["loss"]


def _contrastive(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    features = module[0](batch[0])
    scores = features @ features.T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores))) + 0 * weights().sum()


def _with_loss(loss: Callable[..., Any], group: Any, module: nn.Module | None = None, **options: Any) -> mlopt.Problem:
    problem = two_levels(mlopt.Identity(), None)
    outer, _ = problem.levels
    options = {"data": [indexed(37)], "estimator": mlopt.Identity(), "optimizer": partial(SGD, lr=0.1)} | options
    return mlopt.Problem(outer, mlopt.Level("model", module or network(), loss, **options), group=group)


def _other_batches(group: Any) -> Any:
    rank = int(os.environ["RANK"])
    return of(two_levels(mlopt.Identity(), group, data=[tuple(t[3 * rank :] for t in indexed(37))]))


def _other_modules(group: Any) -> Any:
    return mlopt.Problem(mlopt.Level("x", network(int(os.environ["RANK"])), lambda x, batch: decay(x)), group=group)


def _failing(group: Any) -> Any:
    return _failing_third(group, lambda net, batch, weights: training_loss(net, batch, weights=weights), rows=37)


def _failing_beside_a_count(group: Any) -> Any:
    return _failing_third(group, lambda net, batch, weights: masked(*batch[:2], net))


def _failing_first(group: Any) -> Any:
    """Let a counted loss fail in one process at its first evaluation on its rows, after that on the whole batch."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        if int(os.environ["RANK"]) == 1 and len(batch[0]) < 37:
            raise KeyError("no such row")
        return masked(*batch[:2], module)

    return of(_with_loss(loss, group))


def _failing_mixture(place: str, calls: int, group: Any) -> Any:
    """Let a mixture, or one of its losses, fail in one process on its rows, in the hypergradient of this number."""

    def loss(model: nn.Module, batch: Any, *, mixing: nn.Module) -> mlopt.Mixture:
        def fail(where: str) -> None:
            if int(os.environ["RANK"]) == 1 and len(batch[0]) < 37 and made["calls"] == calls and where == place:
                raise KeyError("no such row")

        def counted() -> dict[str, Any]:
            fail("counted")
            return masked(*batch, model)

        def plain() -> Tensor:
            fail("plain")
            return model(batch[0]).square().mean()

        fail("mixture")
        return mlopt.Mixture([plain, counted, plain], weights="mixing")

    made = {"calls": 0}
    outer, inner = mixture(mlopt.Identity(), None).levels
    problem = mlopt.Problem(
        outer, mlopt.Level("model", inner.module, loss, data=inner.data, estimator=mlopt.Identity()), group=group
    )
    for _ in range(calls):
        made["calls"] += 1
        of(problem)


def _counting(count: Any, calls: int, group: Any) -> Any:
    """Let one process state another count of its rows, or none, in the hypergradient of this number."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        value = training_loss(module, batch, weights=weights)["loss"]
        other = int(os.environ["RANK"]) == 1 and len(batch[0]) < 37 and made["calls"] == calls
        stated = count if other else len(batch[0])
        return {"loss": value} if stated is None else {"loss": value, "count": stated}

    made = {"calls": 0}
    problem = _with_loss(loss, group)
    for _ in range(calls):
        made["calls"] += 1
        of(problem)


def _failing_third(group: Any, plain: Callable[..., Any], rows: float = math.inf) -> Any:
    """Let a loss fail in one process, on batches of fewer rows, the third time: it is then not compared with the whole."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        if int(os.environ["RANK"]) == 1 and len(batch[0]) < rows and mode["fails"]:
            raise KeyError("no such row")
        return plain(module, batch, weights)

    mode = {"fails": False}
    problem = _with_loss(loss, group)
    for _ in range(2):
        of(problem)
    mode["fails"] = True
    return of(problem)


def _failing_in_a_run(group: Any) -> Any:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        if int(os.environ["RANK"]) == 1 and mode["fails"]:
            raise KeyError("no such row")
        return training_loss(module, batch, weights=weights)

    class Break(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            mode["fails"] = run.step == 2

    mode = {"fails": False}
    return run_of(_with_loss(loss, group), 4, callbacks=[Break()])


def _logging_apart(group: Any) -> Any:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        value = training_loss(module, batch, weights=weights)
        return value if os.environ["RANK"] == "0" else {"loss": value["loss"]}

    return run_of(_with_loss(loss, group), 2)


def _summed_with_dropout(group: Any) -> Any:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    return of(_with_loss(_summed, group, module))


class Tracking(nn.Linear):
    """A layer that keeps the mean of its inputs."""

    def __init__(self) -> None:
        super().__init__(4, 1, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean.copy_(inputs.mean(0))  # type: ignore[operator]
        return super().forward(inputs)


def _missing_later(group: Any) -> Any:
    """Take steps on a mean over labels that are there, some of which are missing in the third batch only."""
    inputs, labels, index = indexed(37)
    missing = labels.clone()
    missing[:20:2] = torch.nan

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        kept = ~batch[1].isnan()
        return training_loss(module, tuple(t[kept] for t in batch), weights=weights)["loss"]

    data = [(inputs, labels, index)] * 3 + [(inputs, missing, index)]
    return run_of(_with_loss(loss, group, data=data), 5)


def _tracking(group: Any) -> Any:
    return run_of(_with_loss(training_loss, group, Tracking()), 2)


def _normalised(group: Any) -> Any:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    return _with_loss(training_loss, group, module)


def _sampled(group: Any) -> Any:
    data = TensorDataset(*indexed(37))
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=int(os.environ["RANK"]))
    return two_levels(mlopt.Identity(), group, data=DataLoader(data, batch_size=7, sampler=sampler))


def _nan(on_nonfinite: str, group: Any) -> Values:
    """Return a run in which the last row is not a number once."""
    inputs, labels, index = indexed(37)
    bad = inputs.clone()
    bad[-1] = torch.nan
    data = [(inputs, labels, index), (inputs, labels, index), (bad, labels, index)]
    return run_of(
        two_levels(mlopt.Identity(), group, data=data, steps=1),
        5,
        on_nonfinite=on_nonfinite,
    )


#: Cases that raise in every process, with a part of the message by rank, or of all.
RAISING: dict[str, tuple[Callable[[Any], Any], tuple[str, str]]] = {
    "a sum": (lambda group: of(_with_loss(_summed, group)), ("ProblemError", "it is not a mean over rows")),
    "labels that miss later": (_missing_later, ("ProblemError", "it is not a mean over rows")),
    "a sum with dropout": (_summed_with_dropout, ("ProblemError", "it is not a mean over rows")),
    "contrastive": (lambda group: of(_with_loss(_contrastive, group)), ("ProblemError", "Level(split=False)")),
    "other batches": (_other_batches, ("ProblemError", "their batches differ")),
    "other modules": (_other_modules, ("ProblemError", "level 'x' differs between process 0 and process 1")),
    "batch norm": (_normalised, ("ProblemError", "BatchNorm1d takes the statistics of the rows")),
    "buffers of its rows": (
        _tracking,
        ("ProblemError", "level 'model' differs between process 0 and process 1 after step 2"),
    ),
    "a sampler that splits": (
        _sampled,
        ("ProblemError", "DistributedSampler, which gives each process different rows"),
    ),
    "compiled": (
        lambda group: two_levels(mlopt.ConjugateGradient(compile=True, products="forward"), group),
        ("ProblemError", "use compile=False"),
    ),
    "no rows": (
        lambda group: of(
            _with_loss(training_loss, group, data=[(rows(3)[0], rows(3)[1], torch.arange(3), torch.ones(2))])
        ),
        ("ProblemError", "tensors of 2 and 3 rows"),
    ),
    "unknown rows": (
        lambda group: of(_with_loss(training_loss, group, data=[(*indexed(3), object())])),
        ("ProblemError", "holds a object, whose rows are not known"),
    ),
    "solution": (lambda group: mlopt.solution(two_levels(mlopt.Dense(), group), "model"), ("ProblemError", "solution")),
    "check": (
        lambda group: mlopt.check_hypergradient(two_levels(mlopt.Dense(), group)),
        ("ProblemError", "group=None"),
    ),
    "diagnose": (lambda group: mlopt.diagnose(two_levels(mlopt.Dense(), group)), ("ProblemError", "diagnose")),
    "a loss that fails": (_failing, ("ProcessError", "process 1 of 2 raised KeyError: 'no such row'")),
    "a step that fails": (_failing_in_a_run, ("ProcessError", "process 1 of 2 raised KeyError: 'no such row'")),
    "a counted loss that fails": (
        _failing_beside_a_count,
        ("ProcessError", "another process failed to evaluate the loss of level 'model'"),
    ),
    "a counted loss that fails at first": (
        _failing_first,
        ("ProcessError", "process 1 of 2 raised KeyError: 'no such row'"),
    ),
    "a count in one process": (
        partial(_counting, None, 1),
        ("ProblemError", "returns a count in process 0, and no count in process 1"),
    ),
    "logging apart": (_logging_apart, ("ProblemError", "process 1 logs 'model/loss'")),
    "not a number": (partial(_nan, "raise"), ("NonFiniteError", "the loss of level 'model' is nan")),
}

for _place in ("mixture", "plain", "counted"):
    RAISING[f"a mixture of which a part fails at first: {_place}"] = (
        partial(_failing_mixture, _place, 1),
        ("ProcessError", "process 1 of 2 raised KeyError: 'no such row'"),
    )
    RAISING[f"a mixture of which a part fails later: {_place}"] = (
        partial(_failing_mixture, _place, 3),
        ("ProcessError", "another process failed to evaluate loss 'loss_1' of a Mixture of level 'model'"),
    )

#: Cases in which the second process states another count than before, with a part of its error.
COUNTING: dict[str, tuple[Callable[[Any], Any], str]] = {
    f"another count: {count}": (partial(_counting, count, 3), part)
    for count, part in {
        None: "states no count, and at its first evaluation it did state one",
        -1.0: "is -1.0; it must be the number, >= 0",
        "many": "is many; it must be the number, >= 0",
    }.items()
}

EQUAL |= {
    "run: skips what is not a number": partial(_nan, "skip"),
    "run: rolls back what is not a number": partial(_nan, "rollback"),
    "a batch that knows its parts": lambda group: of(_with_loss(training_loss, group, data=[Different(*indexed(37))])),
}


def interrupted(group: Any, folder: Path) -> dict[str, int]:
    """Return a marker of a run that a signal to the last process ends after three steps."""

    class Kill(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            if run.step == 3 and int(os.environ["RANK"]) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        run_of(resumable(group), 8, checkpoint=folder, callbacks=[Kill(), mlopt.CSVLogger(folder / "history.csv")])
    except mlopt.Interrupted:
        return {"interrupted": 3}
    return {}


def resumable(group: Any) -> mlopt.Problem:
    warm = mlopt.ConjugateGradient(iterations=3, warm_start=True)
    return two_levels(warm, group, data=loader(*indexed(37)))


def resumed(group: Any, folder: Path) -> Values:
    """Return the end of that run, of which all or some steps are in the folder."""
    return run_of(resumable(group), 8, checkpoint=folder, resume=folder.exists())


def stopped(group: Any) -> Values:
    """Return a run that a callback stops in one process only, after two steps."""

    class Stop(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            if run.step == 2 and int(os.environ["RANK"]) == 1:
                run.stop("enough")

    return run_of(two_levels(mlopt.Identity(), group), 50, callbacks=[Stop()])


def timed(group: Any) -> dict[str, int]:
    """Return the steps of a run whose time is over in one process only."""
    limit = 1e-9 if os.environ["RANK"] == "1" else 1e9
    return {"steps": len(mlopt.solve(two_levels(mlopt.Identity(), group), 5, progress=False, max_time=limit).history)}


def exchanged(group: Any) -> dict[str, list[int]]:
    """Return how many numbers each exchange of vectors holds, in a hypergradient and in a step of the level inside."""
    problem = two_levels(mlopt.ConjugateGradient(iterations=5, rtol=1e-300), group)
    mlopt.hypergradient(problem, seed=0)  # products are verified at first
    sizes: list[int] = []
    original = torch.distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *arguments, **options)

    torch.distributed.all_reduce = counting
    try:
        mlopt.hypergradient(problem, seed=0)
        whole, sizes[:] = list(sizes), []
        mlopt.solve(problem, 2, seed=0, progress=False)
    finally:
        torch.distributed.all_reduce = original
    return {"hypergradient": whole, "run": list(sizes)}


def drawing(group: Any) -> Values:
    """Return hypergradients of a loss with dropout, twice at one seed and once at another."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Any:
        return training_loss(lambda x: module(nn.functional.dropout(x, 0.5)), batch, weights=weights)

    problem = _with_loss(loss, group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients = [mlopt.hypergradient(problem, seed=seed).gradient["value"] for seed in (0, 0, 1)]
    assert any("its loss was not compared with the sum over the rows of 2 processes" in str(w.message) for w in caught)
    state = torch.get_rng_state()
    run = run_of(problem, 3)["model.0.weight"]
    return {"first": gradients[0], "again": gradients[1], "other": gradients[2], "state": state, "run": run}


def destroyed(_: Any) -> dict[str, Any]:
    """Return the groups that outlive `destroy_process_group` beside a problem that used them, and what its next use raises."""
    problem = resumable(dist.new_group())
    mlopt.solve(problem, steps=2, progress=False)
    patient = problem.ranks.patient()
    patient.all_of(0)
    groups = {group_name: weakref.ref(group) for group_name, group in _groups_of(patient, problem.ranks).items()}
    dist.destroy_process_group()
    alive = [group_name for group_name, group in groups.items() if group() is not None]
    try:
        mlopt.hypergradient(problem)
    except mlopt.ProcessError as error:
        return {"alive": alive, "error": str(error)}
    return {"alive": alive}


def kept(_: Any) -> bool:
    """Return True if a group that was made beside a group of the user ends although the user keeps that one."""
    group = dist.new_group()
    ranks = Ranks.of(group).patient()
    patient = weakref.ref(ranks._control)
    assert patient() not in (None, group)
    ranks.all_of(0)  # both have met in it before it ends
    dist.destroy_process_group()
    return patient() is None


def _groups_of(patient: Any, ranks: Any) -> dict[str, Any]:
    return {"default": dist.group.WORLD, "own": ranks._group, "patient": patient._control}


def outcome(case: Callable[[Any], Any]) -> Any:
    """Return what a case evaluates on the default group, or the error that it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mlopt.TrustWarning)
            return case("default")
    except Exception as error:
        return type(error).__name__, str(error)
