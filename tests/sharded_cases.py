"""Problems with a level that is sharded over processes by `fully_shard`, and what each process evaluates of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import process_cases
import torch
from process_cases import Values, indexed, loader, mixture_loss, network, regularizer, rows, training_loss, vector
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, AdamW

import mlopt
from mlopt.shards import whole

#: Shards a module; returns it as it is in one process, which the others are compared with.
Sharding = Callable[[nn.Module], nn.Module]


def alone(module: nn.Module) -> nn.Module:
    return module


def root(module: nn.Module) -> nn.Module:
    """Shard a module as one unit, which keeps its parameters whole from a forward to the backward pass."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module)


def parts(module: nn.Module) -> nn.Module:
    """Shard each part of a module, and the rest, which gather their parameters one after the other."""
    from torch.distributed.fsdp import fully_shard

    for part in module.children():
        if next(part.parameters(), None) is not None:
            fully_shard(part)
    return fully_shard(module)


def guard_numbers() -> None:
    """Let a number that a process reads off its own shard raise: other processes would read another one."""
    from torch.distributed.tensor import DTensor

    def guarded(name: str) -> Callable[..., Any]:
        def read(tensor: Any, *arguments: Any) -> Any:
            assert all(place.is_replicate() for place in tensor.placements), f"{name} of {tensor.placements}"
            return getattr(Tensor, name)(tensor, *arguments)

        return read

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        setattr(DTensor, name, guarded(name))


def group_of(shard: Sharding) -> Any:
    return None if shard is alone else "default"


def two_levels(
    estimator: mlopt.Estimator, shard: Sharding, count: int = 37, module: nn.Module | None = None, **options: Any
) -> mlopt.Problem:
    """Return weights of `count` rows outside, a sharded network with a regularizer inside."""
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    options = {"data": [indexed(count)], "steps": 2, "optimizer": optimizer, "regularizer": regularizer} | options
    loss = options.pop("loss", training_loss)
    return mlopt.Problem(
        mlopt.Level(
            "weights",
            vector(count),
            process_cases.validation_loss,
            data=[rows(11, seed=1)],
            optimizer=partial(Adam, lr=0.1),
        ),
        mlopt.Level("model", shard(module or network()), loss, estimator=estimator, **options),
        group=group_of(shard),
    )


def mixture(estimator: mlopt.Estimator, shard: Sharding, **options: Any) -> mlopt.Problem:
    options = {"data": [rows(37)]} | options
    validation = process_cases.validation_loss
    return mlopt.Problem(
        mlopt.Level("mixing", vector(3), validation, data=[rows(11, 1)], optimizer=partial(Adam, lr=0.1)),
        mlopt.Level(
            "model",
            shard(network()),
            mixture_loss,
            optimizer=partial(SGD, lr=0.1),
            estimator=estimator,
            steps=2,
            **options,
        ),
        group=group_of(shard),
    )


def _strength_regularizer(model: nn.Module, *, strength: nn.Module) -> Tensor:
    size = torch.stack([whole(p.square().sum()) for p in model.parameters()])
    return (strength().exp() * size).sum()


def regularized(estimator: mlopt.Estimator, shard: Sharding) -> mlopt.Problem:
    """Return a decay of each tensor, which the outer level learns, of a sharded network."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return process_cases.cross_entropy(model(inputs).squeeze(1), labels)

    def validation(strength: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
        return loss(model, batch)

    return mlopt.Problem(
        mlopt.Level("strength", vector(4), validation, data=[rows(11, 1)]),
        mlopt.Level(
            "model",
            shard(network()),
            loss,
            data=[rows(37)],
            regularizer=_strength_regularizer,
            estimator=estimator,
            optimizer=partial(SGD, lr=0.1, weight_decay=0.1),
        ),
        group=group_of(shard),
    )


def chain(estimator: Callable[[], mlopt.Estimator], shard: Sharding) -> mlopt.Problem:
    """Return weights, a sharded network that they train, and a whole head on it: its cotangent reaches the network."""

    def head_loss(head: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
        inputs, labels = batch
        scores = model(inputs) * head()[0] + inputs @ head()[1:, None]
        return process_cases.cross_entropy(scores.squeeze(1), labels) + 0.1 * head().square().sum()

    def validation(weights: nn.Module, batch: Any, *, model: nn.Module, head: nn.Module) -> Tensor:
        return head_loss(head, batch, model=model)

    optimizer = partial(SGD, lr=0.1)
    return mlopt.Problem(
        mlopt.Level("weights", vector(37), validation, data=[rows(11, 1)], optimizer=optimizer),
        mlopt.Level(
            "model",
            shard(network()),
            training_loss,
            data=[indexed(37)],
            estimator=estimator(),
            regularizer=regularizer,
            optimizer=optimizer,
        ),
        mlopt.Level("head", vector(5), head_loss, data=[rows(19, 2)], estimator=estimator(), optimizer=optimizer),
        group=group_of(shard),
    )


def of(problem: mlopt.Problem, **options: Any) -> Values:
    """Return the hypergradient and the loss, whole."""
    result = mlopt.hypergradient(problem, seed=0, **options)
    return {"loss": result.loss.reshape(1), **{name: whole(g) for name, g in result.gradient.items()}}


def run_of(problem: mlopt.Problem, steps: int, **options: Any) -> Values:
    """Return the variables, whole, and the logged values after a run."""
    solution = mlopt.solve(problem, steps, seed=0, progress=False, **options)
    values = {
        f"{o.name}.{n}": whole(p.detach())
        for o in problem
        for n, p in zip(o.parameter_names, o.parameters, strict=True)
    }
    history = {name: torch.tensor(solution.history.column(name)) for name in solution.history.names}
    return {name: value.clone().double() for name, value in (values | history).items()}


def differences(iterations: int = 3, **options: Any) -> mlopt.Estimator:
    return mlopt.ConjugateGradient(iterations=iterations, products="finite_difference", **options)


def _loaders(shard: Sharding) -> Values:
    data = loader(*indexed(37))
    return run_of(two_levels(differences(2, warm_start=True), shard, data=data, accumulate=2, clip=0.3), 4)


def _streamed(shard: Sharding) -> Values:
    rule = mlopt.Identity(products="finite_difference", streamed=True)
    return run_of(mixture(rule, shard, data=loader(*rows(37))), 4)


def _nan(on_nonfinite: str, shard: Sharding) -> Values:
    """Return a run in which the last row is not a number once."""
    inputs, labels, index = indexed(37)
    bad = inputs.clone()
    bad[-1] = torch.nan
    data = [(inputs, labels, index), (bad, labels, index)]
    return run_of(two_levels(mlopt.FiniteDifference(), shard, data=data, steps=1), 3, on_nonfinite=on_nonfinite)


def _adaptive(shard: Sharding) -> Values:
    adam = partial(AdamW, lr=0.05, weight_decay=0.1)
    return run_of(two_levels(mlopt.SAMA(), shard, optimizer=adam, clip=0.5), 3, lookahead=True)


def _forward_only(shard: Sharding) -> Values:
    """Return a run whose evaluation gathers the parameters of the network, and calls nothing that drops them."""

    def evaluate(problem: mlopt.Problem) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"mean": problem["model"].module(rows(5)[0]).mean()}

    return run_of(two_levels(mlopt.FiniteDifference(), shard), 3, evaluate=evaluate)


def _inner(shard: Sharding) -> Values:
    """Return the gradient of a sharded level itself."""
    return of(two_levels(mlopt.FiniteDifference(), shard), level="model")


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False, dtype=torch.float64)


def _norms(model: nn.Module) -> Tensor:
    return 0.1 * torch.stack([parameter.norm() for parameter in model.parameters()]).sum()


def _distance(model: nn.Module) -> Tensor:
    """Return a distance of whole parameters from ones, by a function whose mean over shards torch does not take."""
    return 0.1 * torch.stack([mse_loss(p, torch.ones_like(p)) for p in map(whole, model.parameters())]).sum()


def _mean_of_shards(model: nn.Module) -> Tensor:
    return torch.stack([mse_loss(p, torch.zeros_like(p)) for p in model.parameters()]).sum()


def _largest(model: nn.Module) -> Tensor:
    return torch.stack([parameter.abs().max() for parameter in model.parameters()]).sum()


def _with_optimizer(kind: Any, shard: Sharding, **options: Any) -> Values:
    return of(two_levels(differences(), shard, optimizer=partial(kind, lr=0.1, **options)))


#: Cases whose values are those of a module that is not sharded, in one process on the whole batch.
EQUAL: dict[str, Callable[[Sharding], Values]] = {
    "finite differences": lambda shard: of(two_levels(mlopt.FiniteDifference(), shard)),
    "conjugate gradient": lambda shard: of(two_levels(differences(), shard)),
    "neumann": lambda shard: of(two_levels(mlopt.Neumann(iterations=4, products="finite_difference"), shard)),
    "minres": lambda shard: of(two_levels(mlopt.MINRES(iterations=4, products="finite_difference"), shard)),
    "gmres": lambda shard: of(two_levels(mlopt.GMRES(iterations=4, products="finite_difference"), shard)),
    "sama": lambda shard: of(two_levels(mlopt.SAMA(), shard)),
    "value function": lambda shard: of(two_levels(mlopt.ValueFunction(steps=8), shard)),
    "two rows": lambda shard: of(two_levels(differences(), shard, 2)),
    "single tensor": lambda shard: of(two_levels(differences(), shard, module=linear())),
    "supplied product": lambda shard: of(two_levels(differences(), shard, regularizer=process_cases.Supplied())),
    "whole batch": lambda shard: of(two_levels(differences(), shard, split=False)),
    "norms in a regularizer": lambda shard: of(
        two_levels(mlopt.FiniteDifference(), shard, regularizer=_norms), level="model"
    ),
    "whole parameters in a regularizer": lambda shard: of(
        two_levels(mlopt.FiniteDifference(), shard, regularizer=_distance)
    ),
    "learned decay": lambda shard: of(regularized(differences(), shard)),
    "chain": lambda shard: of(chain(differences, shard)),
    "mixture": lambda shard: of(mixture(differences(), shard)),
    "gradient of the sharded level": _inner,
    "run: loaders, accumulation, clipping, warm start": _loaders,
    "run: streamed mixture": _streamed,
    "run: adaptive steps, look-ahead": _adaptive,
    "run: an evaluation without a backward pass": _forward_only,
    "run: skips what is not a number": partial(_nan, "skip"),
    "run: rolls back what is not a number": partial(_nan, "rollback"),
}


def resumed(shard: Sharding, folder: Path, steps: int) -> Values:
    """Return a run with checkpoints in a folder, from which it resumes if there are any."""
    problem = two_levels(mlopt.FiniteDifference(), shard, optimizer=partial(Adam, lr=0.05))
    return run_of(problem, steps, checkpoint=folder, resume=True)


def _direct_loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    loss: Tensor = training_loss(module, batch, weights=weights)["loss"]
    return loss + 0.1 * whole(next(module.parameters()).square().sum())


#: Cases that raise when the problem is built or first evaluated, with a part of the message.
REFUSED: dict[str, tuple[Callable[[Sharding], Any], str]] = {
    "autograd": (lambda shard: two_levels(mlopt.ConjugateGradient(), shard), "products='finite_difference'"),
    "unrolled": (lambda shard: two_levels(mlopt.Unrolled(steps=2), shard), "use FiniteDifference()"),
    "dense": (lambda shard: two_levels(mlopt.Dense(products="finite_difference"), shard), "Dense computes"),
    "nystrom": (
        lambda shard: two_levels(mlopt.Nystrom(rank=2, damping=0.1, products="finite_difference"), shard),
        "Nystrom computes",
    ),
    "history": (lambda shard: two_levels(differences(history=3, warm_start=True), shard), "a history"),
    "half precision": (lambda shard: two_levels(differences(), shard, precision="fp16"), "use precision='bf16'"),
    "optimizer": (
        partial(_with_optimizer, torch.optim.Adafactor),
        "Adafactor may compute with norms",
    ),
    "optimizer whose steps torch has not": (partial(_with_optimizer, torch.optim.Rprop), "its Rprop may compute"),
    "fused steps": (partial(_with_optimizer, SGD, fused=True), "its SGD has fused=True"),
    "means over shards in a regularizer": (
        lambda shard: of(two_levels(mlopt.FiniteDifference(), shard, regularizer=_mean_of_shards)),
        "applies mse_loss to parameters",
    ),
    "maxima in a regularizer": (
        lambda shard: of(two_levels(mlopt.FiniteDifference(), shard, regularizer=_largest)),
        "mlopt.shards.whole(parameter)",
    ),
    "parameters in a loss": (
        lambda shard: of(two_levels(differences(), shard, loss=_direct_loss)),
        "move that term to the regularizer",
    ),
}
