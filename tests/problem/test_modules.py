"""Modules that cannot be differentiated as they are get a sentence, not an error of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_cases import gradient_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import mlopt

INDEX = torch.tensor([0, 2, 1])


def build(
    module: nn.Module, rule: mlopt.Estimator, loss: Callable[..., Any] | None = None, **options: Any
) -> mlopt.Problem:
    def inner(net: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
        return weights().exp() @ net(batch).square().mean(-1)

    step = partial(SGD, lr=0.1)
    start = mlopt.variables(torch.zeros(3))
    return mlopt.Problem(
        mlopt.Level("weights", start, lambda w, batch, *, net: net(batch).sum(), data=options["data"], optimizer=step),
        mlopt.Level("net", module, loss or inner, optimizer=step, estimator=rule, **options),
    )


USES = {"hypergradient": mlopt.hypergradient, "solve": partial(mlopt.solve, steps=1, progress=False)}


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, index: Tensor) -> Tensor:
        return functional.embedding(index, self.weight, sparse=True)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(3, 2, sparse=True)

    def forward(self, index: Tensor) -> Tensor:
        return self.bag(index[:, None])


@pytest.mark.parametrize(
    "make", [lambda: nn.Embedding(3, 2, sparse=True), Direct, Bag], ids=["module", "function", "bag"]
)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_sparse_gradients(products: str, use: str, make: Callable[[], nn.Module]) -> None:
    rule = mlopt.ConjugateGradient(iterations=2, products=products)
    with pytest.raises(mlopt.ProblemError, match=r"uses an embedding with sparse=True.*use sparse=False"):
        USES[use](build(make(), rule, data=[INDEX]))


def test_a_lazy_module() -> None:
    for module in (nn.LazyLinear(2), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())):
        with pytest.raises(mlopt.ProblemError, match=r"level 'net': its module.* is lazy.*call it on a batch"):
            build(module, mlopt.Identity(), data=[torch.ones(3, 2)])


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_module_replicated_over_processes() -> None:
    for module in (DistributedDataParallel(nn.Linear(2, 1)), nn.Sequential(DistributedDataParallel(nn.Linear(2, 1)))):
        with pytest.raises(mlopt.ProblemError, match=r"is a DistributedDataParallel.*give the module that it wraps"):
            build(module, mlopt.Identity(), data=[torch.ones(3, 2)])


@pytest.mark.usefixtures("process_group")
def test_a_module_sharded_over_processes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    fully_shard(module[1], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        mlopt.ProblemError, match=r"module '1' has 'weight' sharded over processes.*before it is sharded"
    ):
        build(module, mlopt.Identity(), data=[torch.ones(3, 2)])


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module, backend="aot_eager")
    return wrapped


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


DATA = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
ROW = {"data": [DATA]}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("products", ["autograd", "gauss_newton"])
def test_a_compiled_module_has_no_second_derivative(products: str, use: str) -> None:
    torch._dynamo.reset()
    rule = mlopt.ConjugateGradient(iterations=2, damping=1.0, products=products)
    with pytest.raises(mlopt.MloptError, match=r"a module that torch.compile compiled has no second derivative"):
        USES[use](build(compiled(network()), rule, **ROW))


@pytest.mark.parametrize("products", ["forward", "finite_difference"])
def test_other_products_differentiate_a_compiled_module(products: str) -> None:
    torch._dynamo.reset()
    rule = mlopt.ConjugateGradient(iterations=2, damping=1.0, products=products)
    expected = gradient_of(build(network(), rule, **ROW))
    torch.testing.assert_close(gradient_of(build(compiled(network()), rule, **ROW)), expected, rtol=1e-5, atol=1e-8)


def test_a_mixture_cannot_keep_the_graph_of_a_compiled_module() -> None:
    torch._dynamo.reset()

    def loss(net: nn.Module, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture([(net(batch) - k).square().mean() for k in range(3)], weights="weights")

    problem = build(compiled(network()), mlopt.Identity(), loss, **ROW)
    with pytest.raises(mlopt.ProblemError, match=r"uses a module that torch.compile compiled"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize("draw", [torch.rand, lambda n: torch.tensor(__import__("numpy").random.rand(n))])
@pytest.mark.parametrize("use", USES)
def test_a_regularizer_that_draws_random_numbers(use: str, draw: Callable[[int], Tensor]) -> None:
    def regularizer(net: nn.Module) -> Tensor:
        return (draw(3) @ net[2].weight.to(torch.float64)[0]).square()

    problem = build(network(), mlopt.Identity(), regularizer=regularizer, **ROW)
    with pytest.raises(
        mlopt.ProblemError, match=r"regularizer of level 'net' draws random numbers.*draw them in the loss"
    ):
        USES[use](problem)


def test_two_parameters_on_one_memory_are_refused() -> None:
    first, second = mlopt.variables(torch.ones(3)), mlopt.variables(torch.ones(3))
    second.value = nn.Parameter(first.value.data)

    def outer(x: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (x() * y()).sum()

    def inner(y: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return (y() - x()).square().sum()

    with pytest.raises(mlopt.ProblemError, match=r"x\.value and y\.value are two parameters on the same memory"):
        mlopt.Problem(mlopt.Level("x", first, outer), mlopt.Level("y", second, inner, estimator=mlopt.Dense()))


def test_an_expanded_parameter_is_refused() -> None:
    module = mlopt.variables(torch.ones(1))
    module.value = nn.Parameter(torch.ones(1).expand(3))
    with pytest.raises(mlopt.ProblemError, match=r"y\.value is an expanded tensor"):
        mlopt.Problem(mlopt.Level("y", module, lambda y, batch: y().square().sum()))
