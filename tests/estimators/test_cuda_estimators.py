"""Hypergradients on a GPU, compared with those on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import ESTIMATORS, distance, gradient_of
from cuda_cases import CPU, DEVICE, moved, needs_cuda
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import mlopt
from mlopt.testing import quadratic, same

pytestmark = needs_cuda

F32, F64 = torch.float32, torch.float64
#: More than the unknowns of any level here, so that the approximation is exact whatever the device draws.
_RANK = 100
SOLVERS: dict[str, Callable[[str], mlopt.Implicit]] = {
    **ESTIMATORS,
    "minres": lambda products: mlopt.MINRES(iterations=3, products=products),
    "gmres": lambda products: mlopt.GMRES(iterations=3, products=products),
    "nystrom": lambda products: mlopt.Nystrom(rank=_RANK, damping=0.1, products=products),
    "preconditioned": lambda products: mlopt.ConjugateGradient(
        iterations=3, preconditioner=mlopt.linear.NystromPreconditioner(rank=_RANK), damping=0.1, products=products
    ),
}
PRODUCTS = ("autograd", "forward", "finite_difference", "gauss_newton")
OTHERS: dict[str, Callable[[], mlopt.Estimator]] = {
    "finite_difference": mlopt.FiniteDifference,
    "sama": mlopt.SAMA,
    "value_function": partial(mlopt.ValueFunction, steps=20, perturbation=1e-2),
    "value_function_with_its_own_step_size": partial(mlopt.ValueFunction, steps=5),
}
#: Largest distance from the CPU's result, by dtype; rounding over the step limits differences.
BOUNDS = {F64: 1e-9, F32: 1e-4}
DIFFERENCES = {F64: 1e-6, F32: 1e-2}


def differs(rule: mlopt.Estimator, shape: str, dtype: torch.dtype, size: int = 2) -> float:
    """Return the distance of the hypergradient on the device from that on the CPU."""
    there, here = (quadratic(shape, rule, seed=3, size=size, dtype=dtype).problem for _ in range(2))
    gradient = gradient_of(moved(there), seed=0)
    assert gradient.device.type == DEVICE.type
    return distance(gradient.cpu(), gradient_of(here, seed=0))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", SOLVERS)
def test_named_estimators(name: str, products: str, dtype: torch.dtype) -> None:
    bounds = DIFFERENCES if products == "finite_difference" else BOUNDS
    for shape in ("two", "chain_of_three", "diamond"):
        assert differs(SOLVERS[name](products), shape, dtype) < bounds[dtype], shape


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_estimators_of_first_derivatives(name: str, dtype: torch.dtype) -> None:
    for shape in ("two", "chain_of_three"):
        assert differs(OTHERS[name](), shape, dtype) < DIFFERENCES[dtype], shape


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_unrolled_steps(optimizer: str) -> None:
    torchopt = pytest.importorskip("torchopt", reason="Unrolled takes TorchOpt's optimisers: the extra `unroll`")
    transformation = {"sgd": torchopt.sgd(0.1), "adam": torchopt.adam(0.01, eps=0.1)}[optimizer]
    # Near a zero gradient the derivative of Adam's step is lr / eps; at the usual eps it amplifies rounding by 1e12.
    for rule in (mlopt.Unrolled(steps=6, optimizer=transformation), mlopt.Unrolled(steps=6)):
        assert differs(rule, "two", F64) < BOUNDS[F64], str(rule)


@pytest.mark.parametrize("shape", ["nested", "nested_twice", "nested_with_two_inside"])
@pytest.mark.parametrize("name", ["dense", "conjugate_gradient", "minres"])
def test_nested_levels(name: str, shape: str) -> None:
    assert differs(SOLVERS[name]("autograd"), shape, F64, size=1) < 1e-8


@pytest.mark.parametrize("products", ["forward", "finite_difference"])
def test_nested_levels_by_other_products(products: str) -> None:
    bound = 1e-4 if products == "finite_difference" else 1e-8
    assert differs(mlopt.ConjugateGradient(iterations=3, products=products), "nested", F64, size=1) < bound


class Attention(nn.Module):
    """A transformer of one block, on torch's own choice of an attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.out = nn.Linear(4, 24), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x[:, None] * x[..., None]).view(len(x), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(len(x), 4, 8)
        hidden: Tensor = self.out(self.norm(mixed).mean(1))
        return hidden


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.layer(x[..., None])[0][:, -1])
        return result


class Scattered(nn.Module):
    """A network on a graph: sums over neighbours, by indices that repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer(
            "ends", torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0], [1, 1, 1, 2, 2, 3, 0, 0, 5, 6, 6]])
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        result: Tensor = self.last(hidden.index_add(0, self.ends[1], hidden[self.ends[0]]))
        return result


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 1)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 1),
    ),
    "attention": Attention,
    "scattered": Scattered,
}  # fmt: skip


def scales(network: nn.Module, rule: mlopt.Estimator, dtype: torch.dtype, *, device: torch.device) -> mlopt.Problem:
    """Return scales of the inputs' features over a network; the batches are on the CPU."""
    draws = torch.Generator().manual_seed(1)
    inputs, targets, start = (torch.randn(shape, generator=draws, dtype=F64).to(dtype) for shape in ((9, 4), 9, 4))

    def inner(module: nn.Module, batch: Any, *, scales: nn.Module) -> Tensor:
        decay = torch.stack([p.square().sum() for p in module.parameters()]).sum()
        return (module(batch[0] * scales().to(batch[0]))[:, 0] - batch[1]).square().mean() + 0.1 * decay

    def outer(scales: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        at = next(network.parameters())
        return (network(batch[0].to(at))[:, 0] - batch[1].to(at)).square().mean()

    batches = [(inputs, targets)]
    return mlopt.Problem(
        mlopt.Level("scales", mlopt.variables(0.2 * start + 1), outer, data=batches, device=device),
        mlopt.Level(
            "network", copy.deepcopy(network).to(dtype), inner, data=batches, estimator=rule, device=DEVICE
        ),
    )  # fmt: skip


def on_cpu(network: nn.Module, rule: mlopt.Estimator) -> Tensor:
    """Return the hypergradient on the CPU, in double precision."""
    problem = scales(network, rule, F64, device=CPU)
    for level in problem:
        level.module.to(CPU)
    return gradient_of(problem, seed=0)


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("outside", ["here", "there"])
@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference", "gauss_newton"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_the_outer_level_on_either_device(name: str, products: str, outside: str) -> None:
    network, rule = drawn(NETWORKS[name]), mlopt.ConjugateGradient(iterations=3, damping=1.0, products=products)
    device = CPU if outside == "here" else DEVICE
    problem = scales(network, rule, F64, device=device)
    gradient = gradient_of(problem, seed=0)
    assert gradient.device.type == device.type
    bound = 1e-5 if products == "finite_difference" else 1e-9
    assert distance(gradient.cpu(), on_cpu(network, rule)) < bound


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_attention_has_second_derivatives_in_single_precision(products: str) -> None:
    """The fused kernels of a GPU have none."""
    rule = mlopt.ConjugateGradient(iterations=3, damping=1.0, products=products)
    network = drawn(Attention)
    gradient = gradient_of(scales(network, rule, F32, device=DEVICE), seed=0)
    assert distance(gradient.cpu().double(), on_cpu(network, rule)) < 1e-4


@pytest.mark.parametrize("matmul", ["highest", "high"])
@pytest.mark.parametrize("name", ["mlp", "convolution"])
@pytest.mark.parametrize("rule", [mlopt.FiniteDifference(), mlopt.ValueFunction(steps=5, step_size=0.01)], ids=str)
def test_differences_are_taken_without_tf32(rule: mlopt.Estimator, name: str, matmul: str) -> None:
    """Its rounding, of the size of the step, would leave nothing of the difference; in the cotangent it is small."""
    network, before = drawn(NETWORKS[name]), torch.get_float32_matmul_precision()
    if matmul != before:
        torch.set_float32_matmul_precision(matmul)
    try:
        gradient = gradient_of(scales(network, rule, F32, device=DEVICE), seed=0)
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32
    finally:
        if matmul != before:
            torch.set_float32_matmul_precision(before)
    assert distance(gradient.cpu().double(), on_cpu(network, rule)) < 2e-2


def test_a_recurrent_network_needs_another_kernel_or_differences() -> None:
    network, rule = drawn(Recurrent), mlopt.Identity()
    exact = on_cpu(network, rule)
    differences = gradient_of(scales(network, mlopt.FiniteDifference(), F64, device=DEVICE), seed=0)
    assert distance(differences.cpu(), exact) < 1e-5
    with torch.backends.cudnn.flags(enabled=False):
        gradient = gradient_of(scales(network, rule, F64, device=DEVICE), seed=0)
    assert distance(gradient.cpu(), exact) < 1e-9
    if DEVICE.type == "cuda":
        with pytest.raises(mlopt.SecondDerivativeError, match=r"on a GPU, the loss within .*cudnn\.flags"):
            mlopt.hypergradient(scales(network, rule, F64, device=DEVICE), seed=0)


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_dropout_draws_the_same_masks_again_and_moves_no_generator(products: str) -> None:
    network = drawn(lambda: nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 1)))
    rule = mlopt.ConjugateGradient(iterations=3, damping=1.0, products=products)
    forward = mlopt.ConjugateGradient(iterations=3, damping=1.0, products="forward")
    before = generators()
    problem = scales(network, rule, F64, device=DEVICE)
    gradient = gradient_of(problem, seed=5)
    assert same(generators(), before)
    assert distance(gradient, gradient_of(scales(network, forward, F64, device=DEVICE), seed=5)) < 1e-5
    assert distance(gradient, gradient_of(problem, seed=6)) > 1e-3


def generators() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(DEVICE)] if DEVICE.type == "cuda" else [])]


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_a_mixture(products: str) -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(12, 4, generator=draws, dtype=F64), torch.arange(12) % 3
    gradients = []
    for device in (CPU, DEVICE):
        network = drawn(lambda: nn.Linear(4, 3, dtype=F64))

        def inner(module: nn.Module, batch: Any, *, weights: nn.Module) -> mlopt.Mixture:
            logits = module(batch[0])
            return mlopt.Mixture([cross_entropy(logits, batch[1]), logits.square().mean()], weights="weights")

        def outer(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
            return cross_entropy(network(batch[0]), batch[1].flip(0))

        rule = mlopt.ConjugateGradient(iterations=4, damping=0.1, products=products)
        data = [(inputs, labels)]
        weights = mlopt.variables(torch.tensor([0.7, 0.3], dtype=F64))
        problem = mlopt.Problem(
            mlopt.Level("weights", weights, outer, data=data, device=device),
            mlopt.Level("network", network, inner, data=data, estimator=rule, device=device),
        )
        gradients.append(gradient_of(problem, seed=0).cpu())
    assert distance(gradients[1], gradients[0]) < 1e-9


def test_a_compiled_product() -> None:
    """With dropout: compiled code draws the masks of eager code."""
    if DEVICE.type == "cuda":
        pytest.importorskip("triton", reason="torch.compile needs Triton on a GPU")
    network = drawn(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)))
    rules = [mlopt.ConjugateGradient(iterations=3, damping=1.0, products="forward", compile=c) for c in (True, False)]
    compiled, eager = (gradient_of(scales(network, rule, F64, device=DEVICE), seed=2) for rule in rules)
    assert distance(compiled, eager) < 1e-9


@pytest.mark.parametrize("products", PRODUCTS[:3])
def test_levels_with_a_residual(products: str) -> None:
    def problem() -> mlopt.Problem:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(6, 6, generator=generator, dtype=F64) / 6
        return mlopt.Problem(
            mlopt.Level("u", mlopt.variables(torch.ones(6, dtype=F64)), lambda u, batch, *, x: (x() ** 2).sum()),
            mlopt.Level(
                "x",
                mlopt.variables(torch.full((6,), 0.3, dtype=F64)),
                residual=lambda x, batch, *, u: x() - torch.tanh(batch @ x() + u()),
                data=[weight],
                estimator=mlopt.GMRES(products=products),
            ),
        )

    gradient = gradient_of(moved(problem()), seed=0)
    assert gradient.device.type == DEVICE.type
    bound = DIFFERENCES if products == "finite_difference" else BOUNDS
    assert distance(gradient.cpu(), gradient_of(problem(), seed=0)) < bound[F64]
