"""The comparison of products with differences: it finds wrong second derivatives, and accepts right ones of every kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import PRODUCTS, distance, flat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import mlopt
from mlopt.estimators import LinearSolve

INPUTS = torch.randn(32, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MATRIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def two(
    inner: Callable[..., Tensor],
    y: Tensor | nn.Module,
    products: str,
    x: Tensor | None = None,
    outer: Callable[..., Tensor] | None = None,
) -> mlopt.Problem:
    """Return a problem of a level `x` with four variables unless others are given, and a level `y` inside."""

    def squares(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return torch.stack([p.square().sum() for p in y.parameters()]).sum()

    rule = LinearSolve(solver=mlopt.linear.ConjugateGradient(iterations=30, rtol=1e-6), products=products)
    module = mlopt.variables(y) if isinstance(y, Tensor) else y
    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.linspace(0.5, 1.5, 4) if x is None else x), outer or squares),
        mlopt.Level("y", module, inner, estimator=rule),
    )


def doubts(problem: mlopt.Problem) -> list[str]:
    """Return the remarks of doubtful reports that speak of derivatives."""
    with pytest.warns(mlopt.TrustWarning) if problem.workspace.doubts else pytest.MonkeyPatch.context():
        reports = mlopt.hypergradient(problem).reports.values()
    return [r for report in reports if report.doubtful for r in report.remarks if "derivative" in r]


def lopsided(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    """A gradient whose Jacobian I + 0.3 A is not symmetric."""
    return (module() - x()).square().sum() / 2 + 0.3 * (module() * (MATRIX @ module()).detach()).sum()


def halved(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    """A gradient y - x + 0.3 y^2 whose Jacobian is symmetric, but not what torch differentiates."""
    return (module() - x()).square().sum() / 2 + 0.3 * (module() * module().square().detach()).sum()


def normalised(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    """Weights over a sum that takes no part in the derivative by x, but in the gradient by y."""
    weights = x().exp() / x().exp().sum().detach()
    return (weights * (module() - 1).square()).sum() + (module() - x()).square().sum()


def ignored(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    return (x().detach().exp() * (module() - 1).square()).sum()


def half_ignored(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    """The derivative by two of the components of x is zero, not small."""
    weights = torch.cat([x()[:2], x()[2:].detach()]).exp()
    return (weights * (module() - 1).square()).sum()


def scaled_on_the_way(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    """A hook inside the loss makes the Jacobian by y lopsided; that by x is right."""
    y = module()
    moved = 1.0 * y
    if moved.requires_grad:
        moved.register_hook(lambda g: 0.2 * g)
    return (y - x()).square().sum() / 2 + 0.3 * y @ torch.sin(MATRIX @ moved)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("inner", [lopsided, normalised, ignored, half_ignored, scaled_on_the_way])
def test_a_stopped_gradient_is_in_doubt_with_all_products(inner: Callable[..., Tensor], products: str) -> None:
    problem = two(inner, torch.linspace(0.2, 0.8, 4), products)
    mlopt.hypergradient(problem)
    for _ in range(2):  # a doubt stays
        assert any("detach()" in sentence for sentence in doubts(problem))
    kind = products if products != "finite_difference" else "finite_difference products: unsafe"
    diagnosis = mlopt.diagnose(problem)
    assert not diagnosis.safe
    assert diagnosis.levels["y"].products[products].severity == "error", kind


@pytest.mark.parametrize("products", PRODUCTS)
def test_differences_are_right_for_a_stopped_gradient_with_a_symmetric_jacobian(products: str) -> None:
    """Against a fixed point y - x + 0.3 y^2 = 0 that is solved again: dy/dx = 1 / (1 + 0.6 y)."""
    x = torch.linspace(0.5, 1.5, 4)
    y = (-1 + (1 + 1.2 * x).sqrt()) / 0.6
    problem = two(halved, y, products, x)
    result = mlopt.hypergradient(problem)

    def value(at: Tensor) -> Tensor:
        moved = y.clone()
        for _ in range(200):
            moved = moved - 0.5 * (moved - at + 0.3 * moved.square())
        return moved.square().sum()

    steps = 1e-5 * torch.eye(4)
    expected = torch.stack([(value(x + step) - value(x - step)) / 2e-5 for step in steps])
    error = distance(flat(result.gradient), expected)
    if products == "finite_difference":
        assert error < 1e-6
        assert not result.reports["y"].doubtful
    else:
        assert error > 0.1
        assert result.reports["y"].doubtful


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_a_loss_that_raises_beside_the_present_point_is_in_doubt(products: str) -> None:
    """It cannot be compared with differences, and its product may be wrong."""

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        if bool((module().detach().abs() > 1).any()):
            raise ValueError("outside the unit cube")
        return (module() - x()).square().sum()

    problem = two(inner, torch.tensor([1.0, -1.0, 1.0, -1.0]), products)
    result = mlopt.hypergradient(problem)
    assert result.gradient["value"].tolist() == pytest.approx([2.0, -2.0, 2.0, -2.0])
    for _ in range(2):  # a doubt stays
        assert any("outside the unit cube" in sentence for sentence in doubts(problem))


class BadTanh(torch.autograd.Function):
    """tanh, with a backward that forgets that its own result varies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y.detach().square())


def network(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return layers, initialised by torch at a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            for part in layer.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_double_backward_is_found_and_differences_are_accepted(dtype: torch.dtype) -> None:
    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        hidden = BadTanh.apply(2 * module[0](INPUTS.to(dtype)))
        losses = (module[1](hidden).squeeze(1) - TARGETS.to(dtype)).square()
        return (x() * losses.reshape(4, 8).mean(1)).sum() + 0.1 * sum(p.square().sum() for p in module.parameters())

    for products, wrong in (("autograd", True), ("finite_difference", False)):
        problem = two(
            inner, network(nn.Linear(20, 8), nn.Linear(8, 1), dtype=dtype), products, torch.ones(4, dtype=dtype)
        )
        mlopt.hypergradient(problem)
        assert bool(doubts(problem)) is wrong


def test_hooks_of_parameters() -> None:
    """Forward products refuse them; a mask is accepted; a hook that makes the gradient's Jacobian asymmetric is not."""

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return (MATRIX @ module()).square().sum() + 2 * module().square().sum() - (module() * x()).sum()

    def hooked(factors: list[float], products: str) -> mlopt.Problem:
        module = mlopt.variables(torch.ones(4))
        module.value.register_hook(lambda gradient: gradient * torch.tensor(factors))
        return two(inner, module, products)

    with pytest.raises(mlopt.EstimatorError, match=r"level 'y': variable 0 .* has a hook .* use products='autograd'"):
        mlopt.hypergradient(hooked([1.0, 0.0, 1.0, 1.0], "forward"))
    for products in ("autograd", "finite_difference"):
        masked = hooked([1.0, 0.0, 1.0, 1.0], products)
        gradient = flat(mlopt.hypergradient(masked).gradient)
        assert not doubts(masked)
        # The masked variable stays: the system is that of the other three.
        free = torch.tensor([0, 2, 3])
        hessian = 2 * MATRIX.T @ MATRIX + 4 * torch.eye(4)
        expected = torch.zeros(4)
        expected[free] = torch.linalg.solve(hessian[free][:, free], 2 * torch.ones(3))
        assert distance(gradient, expected) < 1e-5
        uneven = hooked([1.0, 0.3, 1.0, 2.0], products)
        mlopt.hypergradient(uneven)
        assert doubts(uneven)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("products", ["autograd", "forward"])
@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_third_derivatives_of_nested_levels(bend: float, products: str, dtype: torch.dtype) -> None:
    """A function whose second derivative is right and whose third is not."""

    def base(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        z = module()
        # z^4 is differentiated twice; with `bend`, the second derivative is taken as a constant.
        curved = z.pow(4) if not bend else _OnceMore.apply(z)
        return (curved + 2 * (z - y()).square()).sum()

    def middle(module: nn.Module, batch: Any, *, z: nn.Module, x: nn.Module) -> Tensor:
        return ((z() - 1).square() + module().square() + (module() - x()).square()).sum()

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (y() * torch.arange(1, 4)).sum()

    rule = LinearSolve(solver=mlopt.linear.ConjugateGradient(iterations=10, rtol=1e-5), products=products)
    start = torch.tensor([0.3, 0.5, 0.7], dtype=dtype)
    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(start.clone()), outer),
        mlopt.Level("y", mlopt.variables(start.clone()), middle, estimator=rule),
        mlopt.Level("z", mlopt.variables(start.clone()), base, estimator=rule),
    )
    mlopt.hypergradient(problem)
    found = doubts(problem)
    assert bool(found) is bool(bend)
    assert all("response of 'z'" in sentence for sentence in found)


class _OnceMore(torch.autograd.Function):
    """z^4 by a first derivative whose own derivative, 12 z^2, is a constant."""

    generate_vmap_rule = False

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.pow(4)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * (4 * z.detach().pow(3) + 12 * z.detach().square() * (z - z.detach()))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return tangent * 4 * z.pow(3)


ORDINARY: dict[str, Callable[[], list[nn.Module]]] = {
    "relu": lambda: [nn.Linear(20, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3)],
    "max-pooling": lambda: [
        nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
        nn.Linear(72, 3),
    ],
    "norms": lambda: [nn.Linear(20, 32), nn.BatchNorm1d(32), nn.LeakyReLU(), nn.LayerNorm(32), nn.Hardswish(), nn.Linear(32, 3)],
    "attention": lambda: [
        nn.Unflatten(1, (5, 4)), nn.TransformerEncoderLayer(4, 2, 16, 0.0, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("products", [*PRODUCTS, "gauss_newton"])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_networks_are_not_in_doubt(name: str, products: str, dtype: torch.dtype) -> None:
    """Differences across kinks are off by up to 80% in float32, at every step; the doubt is dispelled in double precision."""
    module = network(*ORDINARY[name](), dtype=dtype)
    inputs = torch.randn(256, 20, generator=torch.Generator().manual_seed(3), dtype=dtype)
    labels = torch.arange(256) % 3

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        losses = cross_entropy(module(inputs), labels, reduction="none")
        return (x().sigmoid() * losses.reshape(4, 64).mean(1)).mean() + 1e-4 * sum(
            p.square().sum() for p in module.parameters()
        )

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return cross_entropy(y(inputs), labels.flip(0))

    problem = two(inner, module, products, torch.zeros(4, dtype=dtype), outer)
    mlopt.hypergradient(problem)
    assert not problem.workspace.doubts
    assert not doubts(problem)


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_autocast_is_not_in_doubt(products: str) -> None:
    module = network(nn.Linear(20, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 1), dtype=torch.float32)

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = module(INPUTS.float()).squeeze(1)
        losses = (outputs.float() - TARGETS.float()).square()
        return (x() * losses.reshape(4, 8).mean(1)).sum() + 1e-2 * sum(p.square().sum() for p in module.parameters())

    problem = two(inner, module, products, torch.ones(4, dtype=torch.float32))
    mlopt.hypergradient(problem)
    assert not problem.workspace.doubts


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variables_and_gradients_of_any_size_are_not_in_doubt(products: str, size: float, dtype: torch.dtype) -> None:
    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        y = module() / size
        return 1e-6 * (y.cosh() * (1 + x().square()) + (y - x()).square()).sum()

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (y() / size).sum()

    problem = two(inner, size * torch.linspace(0.2, 0.9, 4, dtype=dtype), products, torch.ones(4, dtype=dtype), outer)
    mlopt.hypergradient(problem)
    assert not problem.workspace.doubts


def test_points_that_are_not_smooth_are_not_in_doubt() -> None:
    """At a kink of the gradient, torch takes one side, and central differences the mean of both."""

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return (module().relu().square() + (module() - 1e-3 * x()).square() + module().abs()).sum()

    problem = two(inner, torch.zeros(4), "autograd")
    mlopt.hypergradient(problem)
    assert not problem.workspace.doubts


def test_products_are_compared_once() -> None:
    seen: list[int] = []

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        seen.append(1)
        return (module() - x()).square().sum()

    problem = two(inner, torch.ones(4), "autograd")
    counts = []
    for _ in range(3):
        seen.clear()
        mlopt.hypergradient(problem)
        counts.append(len(seen))
    # Two gradients along each of two directions, of H v, the mixed product and its transpose; two evaluations that are compared.
    assert counts[0] - counts[1] <= 2 * 2 * 3 + 2
    assert counts[1] == counts[2] == 1


def test_what_is_kept_is_restored_after_a_check() -> None:
    """The variables in double precision stand in for those of the module only during a check."""
    module = network(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 1), dtype=torch.float32)
    before = {name: (id(p), p.dtype, p.detach().clone()) for name, p in module.named_parameters()}

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        losses = (module(INPUTS.float()).squeeze(1) - TARGETS.float()).square()
        return (x() * losses.reshape(4, 8).mean(1)).sum()

    problem = two(inner, module, "autograd", torch.ones(4, dtype=torch.float32))
    mlopt.hypergradient(problem)
    for name, p in module.named_parameters():
        assert (id(p), p.dtype) == before[name][:2]
        assert torch.equal(p, before[name][2])


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_block_is_not_lost_beside_that_of_small_variables(products: str) -> None:
    """Unrolled steps ask for H v, of the size 1e14 here, together with the product for x, a part of which is detached."""
    pytest.importorskip("torchopt")
    size = 1e-7

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        weights = torch.cat([x()[:2], x()[2:].detach()]).exp()
        return (weights * (module() / size - 1).square()).sum()

    def outer(x: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (y() / size).square().sum()

    start = torch.linspace(0.2, 0.8, 4)
    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(start), outer),
        mlopt.Level(
            "y",
            mlopt.variables(size * start),
            inner,
            optimizer=partial(SGD, lr=0.1 * size**2),
            estimator=mlopt.Unrolled(steps=3, products=products),
        ),
    )
    assert mlopt.hypergradient(problem).reports["y"].doubtful


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_a_stop_in_other_columns_than_the_first_is_in_doubt(products: str) -> None:
    """Dense takes the columns of the Hessian one by one, and the first is right here."""

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        y = module()
        return (y - x()).square().sum() / 2 + 0.3 * y[2] * y[3].square().detach()

    def outer(x: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return y().square().sum()

    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.linspace(0.5, 1.5, 4)), outer),
        mlopt.Level("y", mlopt.variables(torch.linspace(0.2, 0.8, 4)), inner, estimator=mlopt.Dense(products=products)),
    )
    assert mlopt.hypergradient(problem).reports["y"].doubtful


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_a_stop_that_the_first_direction_hardly_meets_is_in_doubt(products: str) -> None:
    """The cotangent is nearly along x_1, and the gradient by u_2 is stopped, which only x_2 sees. Later cotangents differ."""

    def inner(x: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return x().square().sum() / 2 - x()[0] * u()[0].sin() - x()[1] * u()[1].sin().detach()

    def outer(u: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return x()[0] + 1e-4 * x()[1]

    start = torch.tensor([0.5, 0.7], dtype=torch.float64)
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(start), outer),
        mlopt.Level("x", mlopt.variables(start.sin()), inner, estimator=mlopt.ConjugateGradient(products=products)),
    )
    (report,) = mlopt.hypergradient(problem).reports.values()
    assert report.doubtful


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("size", [1e-12, 1e-8, 1.0, 1e8])
def test_a_stop_is_in_doubt_at_variables_of_any_size(products: str, size: float) -> None:
    """Products by x, and their errors, are large if x is small. The gradient by one component of x is stopped."""

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        u = x() / size
        weights = torch.cat([u[:3], u[3:].detach()]).exp()
        return (weights * (module().cosh() - 1).square()).sum() + (module() - u[:1]).square().sum()

    problem = two(inner, torch.linspace(0.2, 0.8, 4), products, size * torch.linspace(0.5, 1.5, 4))
    with pytest.warns(mlopt.TrustWarning, match="detach"):
        (report,) = mlopt.hypergradient(problem).reports.values()
    assert report.doubtful


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("estimator", [mlopt.Dense(), mlopt.Identity(), mlopt.Unrolled(steps=2)], ids=str)
def test_hooks_after_the_gradient_was_accumulated_are_in_doubt(estimator: mlopt.Estimator) -> None:
    """Steps obey them, and pullbacks, which do not accumulate, cannot."""

    def inner(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return (MATRIX @ module()).square().sum() + 2 * module().square().sum() - (module() * x()).sum()

    def mask(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad[0] = 0.0

    problem = two(inner, module := mlopt.variables(torch.ones(4)), "autograd")
    level = mlopt.Level("y", module, problem["y"].loss, optimizer=partial(SGD, lr=0.05), estimator=estimator)
    problem = mlopt.Problem(problem["x"], level)
    assert "register_post_accumulate_grad_hook" not in str(mlopt.hypergradient(problem).reports["y"].remarks)
    handle = module.value.register_post_accumulate_grad_hook(mask)
    report = mlopt.hypergradient(problem).reports["y"]
    assert report.doubtful
    assert any("register_post_accumulate_grad_hook" in remark for remark in report.remarks)
    handle.remove()
    assert "register_post_accumulate_grad_hook" not in str(mlopt.hypergradient(problem).reports["y"].remarks)


@pytest.mark.parametrize(("products", "named"), [("forward", True), ("autograd", False)])
@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
def test_a_ridge_on_trainable_parameters_alone_is_found_in_forward_mode(products: str, named: bool) -> None:
    """Such a loss is right by autograd. In forward mode, tensors without `requires_grad` take the place of parameters."""

    def inner(y: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        fit = (INPUTS[:, :4] @ y() - TARGETS).square().mean()
        own = [p for p in y.parameters() if p.requires_grad]
        return fit + sum((x().exp() * p.square()).sum() for p in own)  # type: ignore[return-value]

    problem = two(inner, torch.ones(4, dtype=torch.float64), products, torch.zeros(4, dtype=torch.float64))
    remarks = " ".join(mlopt.hypergradient(problem).reports["y"].remarks)
    assert ("requires_grad of a parameter, which is False in forward mode" in remarks) is named
