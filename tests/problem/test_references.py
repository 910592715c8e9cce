"""A loss, a regularizer or a solver that uses a level without declaring it is refused; declared, the value is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import gradient_of
from torch import Tensor, nn
from torch.optim import SGD

import mlopt

A = torch.tensor([[2.0, -1.0], [0.5, 1.0], [0.0, 3.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.3], [-0.7, 0.2], [0.4, -2.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
U = torch.tensor([0.8, -0.6], dtype=torch.float64)
#: With y = A u, z = B u + y and F = |z|^2 / 2 + <w, y>.
EXACT = (A + B).T @ (A + B) @ U + A.T @ WEIGHTS


class Hiding(nn.Module):
    """Variables next to a module that torch does not see, since a list holds it."""

    def __init__(self, value: Tensor, hidden: nn.Module) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())
        self.hidden = [hidden]

    def forward(self) -> Tensor:
        return self.value


def chain(
    outer: Callable[[nn.Module], Callable[..., Any]],
    *,
    products: str = "autograd",
    middle: Callable[..., Any] | None = None,
    inner: Callable[..., Any] | None = None,
    **options: Any,
) -> mlopt.Problem:
    """Return levels u, z and y at their solutions; `outer` takes the module of y and returns the loss of u."""
    y = mlopt.variables(A @ U)

    def z_loss(z: nn.Module, batch: None, *, u: nn.Module, y: nn.Module) -> Tensor:
        return (z() - B @ u() - y()).square().sum() / 2

    def y_loss(y: nn.Module, batch: None, *, u: nn.Module) -> Tensor:
        return (y() - A @ u()).square().sum() / 2

    step, rule = partial(SGD, lr=0.1), partial(mlopt.ConjugateGradient, iterations=9, products=products)
    u = Hiding(U, y)
    return mlopt.Problem(
        mlopt.Level("u", u, outer(y), optimizer=step, **options),
        mlopt.Level("z", mlopt.variables(B @ U + A @ U), middle or z_loss, optimizer=step, estimator=rule()),
        mlopt.Level("y", y, inner or y_loss, optimizer=step, estimator=rule()),
    )


def declared(_: nn.Module) -> Callable[..., Tensor]:
    return lambda u, batch, *, z, y: z().square().sum() / 2 + WEIGHTS @ y()


def by_closure(hidden: nn.Module) -> Callable[..., Tensor]:
    return lambda u, batch, *, z: z().square().sum() / 2 + WEIGHTS @ hidden()


def by_list(_: nn.Module) -> Callable[..., Tensor]:
    return lambda u, batch, *, z: z().square().sum() / 2 + WEIGHTS @ u.hidden[0]()


def by_parameter(hidden: nn.Module) -> Callable[..., Any]:
    return lambda u, batch, *, z: {"loss": z().square().sum() / 2 + WEIGHTS @ hidden.value}


USES: dict[str, Callable[[mlopt.Problem], Any]] = {
    "hypergradient": mlopt.hypergradient,
    "solve": partial(mlopt.solve, steps=1, progress=False),
    "check": partial(mlopt.check_hypergradient, tolerance=1e9),
    "resolve": partial(mlopt.check_hypergradient, oracle="resolve", tolerance=1e9, directions=1),
    "diagnose": mlopt.diagnose,
}
PRODUCTS = ("autograd", "forward", "finite_difference")


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("hidden", [by_closure, by_list, by_parameter])
@pytest.mark.parametrize("use", USES)
def test_an_undeclared_level_is_refused(use: str, hidden: Any, products: str) -> None:
    with pytest.raises(
        mlopt.ProblemError, match=r"loss of level 'u' depends on 'value' of level 'y'.*make 'y' a keyword"
    ):
        USES[use](chain(hidden, products=products))


@pytest.mark.parametrize("products", PRODUCTS)
def test_the_declared_level_gives_the_closed_form(products: str) -> None:
    tolerance = 1e-7 if products == "finite_difference" else 1e-12
    torch.testing.assert_close(gradient_of(chain(declared, products=products)), EXACT, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("use", ["hypergradient", "solve"])
def test_an_inner_loss_that_finds_a_level_in_another_is_refused(use: str, products: str) -> None:
    def middle(z: nn.Module, batch: None, *, u: nn.Module) -> Tensor:
        return (z() - B @ u() - u.hidden[0]()).square().sum() / 2

    with pytest.raises(mlopt.ProblemError, match="loss of level 'z' depends on 'value' of level 'y'"):
        USES[use](chain(declared, products=products, middle=middle))


@pytest.mark.parametrize("use", ["hypergradient", "solve"])
def test_a_level_that_declares_nothing_is_inspected(use: str) -> None:
    """No cotangent is pulled back through it, so that no pullback evaluates its loss."""
    u, step = mlopt.variables(U), partial(SGD, lr=0.1)
    problem = mlopt.Problem(
        mlopt.Level("u", u, lambda u, batch, *, y: WEIGHTS @ y() + u().sum(), optimizer=step),
        mlopt.Level("y", mlopt.variables(A @ U), lambda y, batch: (y() - A @ u()).square().sum(), optimizer=step),
    )
    with pytest.raises(mlopt.ProblemError, match="loss of level 'y' depends on 'value' of level 'u'"):
        USES[use](problem)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("use", ["hypergradient", "solve"])
def test_a_regularizer_is_inspected(use: str, products: str) -> None:
    def regularizer(u: nn.Module) -> Tensor:
        return WEIGHTS @ u.hidden[0]()

    with pytest.raises(mlopt.ProblemError, match="regularizer of level 'u' depends on 'value' of level 'y'"):
        USES[use](chain(declared_apart, products=products, regularizer=regularizer))


def declared_apart(_: nn.Module) -> Callable[..., Tensor]:
    return lambda u, batch, *, z: z().square().sum() / 2


def mixed(hidden: Callable[[], Tensor], *, as_functions: bool, in_weights: bool = False) -> mlopt.Problem:
    """Return a mixture of which a loss, or the module of weights, uses a third level; its loss declares only the weights."""
    third = mlopt.variables(torch.tensor(0.7, dtype=torch.float64))

    class Weighing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor([0.4, 0.6], dtype=torch.float64))
            self.other = [third]

        def forward(self) -> Tensor:
            return self.value * self.other[0]() if in_weights else self.value

    def loss(net: nn.Module, batch: None, *, weights: nn.Module) -> mlopt.Mixture:
        extra = (lambda: net().sum()) if in_weights else (lambda: net().sum() * third())
        losses = [lambda: net().square().sum(), extra]
        return mlopt.Mixture(losses if as_functions else [f() for f in losses], weights="weights")

    step = partial(SGD, lr=0.1)
    return mlopt.Problem(
        mlopt.Level(
            "weights", Weighing(), lambda weights, batch, *, net, third: net().sum() * third().detach(), optimizer=step
        ),
        mlopt.Level(
            "third",
            third,
            lambda third, batch, *, net: net().sum() + third(),
            optimizer=step,
            estimator=mlopt.Identity(),
        ),
        mlopt.Level(
            "net",
            mlopt.variables(torch.ones(2, dtype=torch.float64)),
            loss,
            optimizer=step,
            estimator=mlopt.Identity(),
        ),
    )


@pytest.mark.parametrize("in_weights", [False, True], ids=["loss", "weights"])
@pytest.mark.parametrize("as_functions", [False, True], ids=["tensors", "functions"])
@pytest.mark.parametrize("use", ["hypergradient", "solve"])
def test_each_loss_of_a_mixture_is_inspected(use: str, as_functions: bool, in_weights: bool) -> None:
    problem = mixed(torch.ones, as_functions=as_functions, in_weights=in_weights)
    with pytest.raises(mlopt.ProblemError, match="loss of level 'net' depends on 'value' of level 'third'"):
        USES[use](problem)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_level_may_see_another_without_a_graph(products: str) -> None:
    def outer(hidden: nn.Module) -> Callable[..., Tensor]:
        def loss(u: nn.Module, batch: None, *, z: nn.Module) -> Tensor:
            with torch.no_grad():
                kept = hidden() * 2
            return z().square().sum() / 2 + WEIGHTS @ (hidden().detach() + kept)

        return loss

    expected = (A + B).T @ (A + B) @ U
    torch.testing.assert_close(gradient_of(chain(outer, products=products)), expected, rtol=1e-6, atol=0.0)


def test_a_function_that_passes_no_derivative_on_is_no_reference() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> None:
            return None

    problem = chain(lambda hidden: lambda u, batch, *, z: z().square().sum() / 2 + Stop.apply(hidden()).sum())
    torch.testing.assert_close(gradient_of(problem), (A + B).T @ (A + B) @ U)


def test_a_reference_in_some_batches_only_is_refused_later() -> None:
    """The graph is searched at the first, second, fourth, eighth evaluation, and so on."""
    batches = iter(range(100))

    def outer(hidden: nn.Module) -> Callable[..., Tensor]:
        def loss(u: nn.Module, batch: None, *, z: nn.Module) -> Tensor:
            value = z().square().sum() / 2
            return value if next(batches) < 5 else value + WEIGHTS @ hidden()

        return loss

    problem = chain(outer)
    for _ in range(7):
        mlopt.hypergradient(problem)
    with pytest.raises(mlopt.ProblemError, match="depends on 'value' of level 'y'"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize("bound", [False, True], ids=["default", "partial"])
def test_a_default_for_a_level_is_refused(bound: bool) -> None:
    module = mlopt.variables(A @ U)

    def loss(u: nn.Module, batch: None, *, z: nn.Module, y: nn.Module = module) -> Tensor:
        return z().square().sum() / 2 + WEIGHTS @ y()

    taken = partial(declared(module), y=module) if bound else loss
    with pytest.raises(mlopt.ProblemError, match="loss of level 'u' has a parameter 'y' with a default value"):
        chain(lambda _: taken)


def test_a_positional_default_for_a_level_is_refused() -> None:
    def loss(u: nn.Module, batch: None, y: Any = None, *, z: nn.Module) -> Tensor:
        return z().square().sum() / 2

    with pytest.raises(mlopt.ProblemError, match="parameter 'y' with a default value"):
        chain(lambda _: loss)


def solved(solver: Callable[..., None]) -> mlopt.Problem:
    """Return levels of which `y` has a solver, which a loss of its own makes depend on `u` alone."""
    return mlopt.Problem(
        mlopt.Level(
            "u", mlopt.variables(U), lambda u, batch, *, y, w: WEIGHTS @ y() + w().sum(), optimizer=partial(SGD, lr=0.1)
        ),
        mlopt.Level(
            "y",
            mlopt.variables(torch.zeros(3, dtype=torch.float64)),
            lambda y, batch, *, u: (y() - A @ u()).square().sum() / 2,
            solver=solver,
            estimator=mlopt.Dense(),
        ),
        mlopt.Level(
            "w",
            WIDTH,
            lambda w, batch, *, u: (w() - u()).square().sum(),
            optimizer=partial(SGD, lr=0.1),
            estimator=mlopt.Dense(),
        ),
    )


WIDTH = mlopt.variables(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "read",
    [
        lambda: WIDTH().sum(),
        lambda: WIDTH.value.detach().sum(),
        lambda: WIDTH.value.data.sum(),
        lambda: torch.stack([WIDTH.value]).sum(),
    ],
    ids=["call", "detach", "data", "list"],
)
@pytest.mark.parametrize("use", ["hypergradient", "solve"])
def test_a_solver_that_reads_an_undeclared_level_is_refused(use: str, read: Callable[[], Tensor]) -> None:
    def solver(y: nn.Module, batch: None, *, u: nn.Module) -> None:
        y.value.data.copy_((A @ u()).detach() * float(read()))

    with pytest.raises(mlopt.ProblemError, match="solver of level 'y' uses variables of level 'w'"):
        USES[use](solved(solver))


def test_a_solver_that_declares_what_it_reads_gives_the_closed_form() -> None:
    def solver(y: nn.Module, batch: None, *, u: nn.Module) -> None:
        y.value.data.copy_((A @ u()).detach())

    torch.testing.assert_close(gradient_of(solved(solver)), A.T @ WEIGHTS + 1)
