"""Each evaluation receives its own containers and the same tensors; a tensor that is changed in place is refused."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from core_cases import gradient_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.optim import SGD

import mlopt
from mlopt.problem.batch import copied, versions

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.2]], dtype=torch.float64)
T = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
U = torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64)
#: With y minimising sum_i u_i (x_i y - t_i)^2 / 2 and F = |y|^2 / 2: dF/du_i = -(x_i y - t_i) <x_i, H^-1 y>.
H = X.T @ (U[:, None] * X)
Y = torch.linalg.solve(H, X.T @ (U * T))
EXACT = -(X @ Y - T) * (X @ torch.linalg.solve(H, Y))


class Pair(NamedTuple):
    inputs: Any
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Plain:
    inputs: Any
    labels: Tensor | None


@attrs.frozen
class Frozen:
    inputs: Any
    labels: Tensor | None


class Movable:
    """A batch that moves itself, as graphs do; its copies share no dictionary."""

    def __init__(self, **entries: Any) -> None:
        self.store = entries

    def __copy__(self) -> Movable:
        return Movable(**self.store)

    def to(self, device: torch.device) -> Movable:
        return self


def popped(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["inputs"], batch.pop("labels")


def assigned(batch: Movable) -> tuple[Tensor, Tensor]:
    batch.store["inputs"] = batch.store["inputs"] * 2
    return batch.store["inputs"] / 2, batch.store.pop("labels")


BATCHES: dict[str, tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "dict": ({"inputs": X, "labels": T}, popped),
    "ordered": (collections.OrderedDict(inputs=X, labels=T), popped),
    "user dict": (collections.UserDict(inputs=X, labels=T), popped),
    "list": ([X, T], lambda batch: (batch.pop(0), batch.pop(0))),
    "in a tuple": (({"inputs": X}, T), lambda batch: (batch[0].pop("inputs"), batch[1])),
    "in a named tuple": (Pair([X], T), lambda batch: (batch.inputs.pop(), batch.labels)),
    "in a data class": (Plain({"inputs": X}, T), lambda batch: (batch.inputs.pop("inputs"), batch.labels)),
    "in an attrs class": (Frozen({"inputs": X}, T), lambda batch: (batch.inputs.pop("inputs"), batch.labels)),
    "in a list in a user dict": (
        collections.UserDict(both=[X, T]),
        lambda batch: tuple(batch["both"].pop(0) for _ in "xy"),
    ),
    "movable": (Movable(inputs=X, labels=T), assigned),
}


def build(
    batch: Any, read: Callable[[Any], tuple[Tensor, Tensor]], rule: mlopt.Estimator, **options: Any
) -> mlopt.Problem:
    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        inputs, labels = read(batch)
        return u() @ (inputs @ y() - labels).square() / 2

    step = partial(SGD, lr=0.01)
    return mlopt.Problem(
        mlopt.Level("u", mlopt.variables(U), lambda u, batch, *, y: y().square().sum() / 2, optimizer=step),
        mlopt.Level("y", mlopt.variables(Y), inner, data=[batch], optimizer=step, estimator=rule, **options),
    )


RULES = {
    "autograd": mlopt.ConjugateGradient(iterations=9),
    "forward": mlopt.ConjugateGradient(iterations=9, products="forward"),
    "finite differences": mlopt.ConjugateGradient(iterations=9, products="finite_difference"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", BATCHES)
def test_a_loss_may_take_entries_out_of_its_batch(kind: str, rule: str) -> None:
    problem = build(*BATCHES[kind], RULES[rule])
    for _ in range(2):
        torch.testing.assert_close(gradient_of(problem), EXACT, rtol=1e-6, atol=1e-9)
    mlopt.solve(problem, steps=2, progress=False)


def test_a_compiled_product_leaves_the_batch(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rule = mlopt.ConjugateGradient(iterations=9, products="forward", compile=True)
    torch.testing.assert_close(gradient_of(build(*BATCHES["dict"], rule)), EXACT)


def test_a_solver_may_take_entries_out_of_its_batch() -> None:
    def solver(y: nn.Module, batch: dict[str, Tensor], *, u: nn.Module) -> None:
        inputs, labels = popped(batch)
        hessian = inputs.T @ (u()[:, None] * inputs)
        y.value.data.copy_(torch.linalg.solve(hessian, inputs.T @ (u() * labels)))

    problem = build(*BATCHES["dict"], mlopt.Dense())
    inner = attrs.evolve(problem["y"], module=mlopt.variables(0 * Y), solver=solver, optimizer=None)
    torch.testing.assert_close(gradient_of(mlopt.Problem(problem["u"], inner)), EXACT)


CHANGES: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "in place": lambda batch: (batch["inputs"].mul_(1.5), batch["labels"]),
    "through a view": lambda batch: (batch["inputs"], batch["labels"][:1].add_(1.0).expand(3)),
    "of what it takes out": lambda batch: (batch.pop("inputs").mul_(1.5), batch["labels"]),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "use", [mlopt.hypergradient, partial(mlopt.solve, steps=1, progress=False)], ids=["call", "solve"]
)
def test_a_batch_changed_in_place_is_refused(use: Callable[..., Any], change: str, rule: str) -> None:
    batch = {"inputs": X.clone(), "labels": T.clone()}
    with pytest.raises(mlopt.ProblemError, match=r"loss of level 'y' changed a tensor .*in place.*change a copy"):
        use(build(batch, CHANGES[change], RULES[rule]))


def test_a_tensor_in_an_object_changed_in_place_is_refused() -> None:
    batch = Movable(inputs=X.clone(), labels=T)

    def read(batch: Movable) -> tuple[Tensor, Tensor]:
        return batch.store["inputs"].mul_(1.5), batch.store["labels"]

    with pytest.raises(mlopt.ProblemError, match="changed a tensor of its batch in place"):
        mlopt.hypergradient(build(batch, read, mlopt.Identity()))


@pytest.mark.parametrize(
    "use", [mlopt.hypergradient, partial(mlopt.solve, steps=1, progress=False)], ids=["call", "solve"]
)
def test_a_function_of_a_mixture_that_changes_the_batch_is_refused(use: Callable[..., Any]) -> None:
    def inner(y: nn.Module, batch: Tensor, *, u: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture([lambda: y().square().sum(), lambda: (y() @ batch.mul_(1.5)).sum()], weights="u")

    problem = build(X.T.clone(), popped, mlopt.Identity())
    levels = attrs.evolve(problem["y"], loss=inner), attrs.evolve(problem["u"], module=mlopt.variables(U[:2]))
    with pytest.raises(mlopt.ProblemError, match="loss of level 'y' changed a tensor of its batch in place"):
        use(mlopt.Problem(levels[1], levels[0]))


def test_a_solver_that_changes_its_batch_is_refused() -> None:
    def solver(y: nn.Module, batch: dict[str, Tensor], *, u: nn.Module) -> None:
        batch["inputs"].mul_(1.5)

    problem = build({"inputs": X.clone(), "labels": T}, popped, mlopt.Dense())
    inner = attrs.evolve(problem["y"], solver=solver, optimizer=None)
    with pytest.raises(mlopt.ProblemError, match="solver of level 'y' changed a tensor of its batch in place"):
        mlopt.hypergradient(mlopt.Problem(problem["u"], inner))


def test_what_needs_no_copy_is_passed_as_it_is() -> None:
    packed = pack_sequence([torch.ones(2)])
    for batch in (None, X, (X, T), Pair(X, T), packed, object(), nn.Linear(1, 1), "text", 3):
        assert copied(batch, []) is batch


def test_the_tensors_of_graphs_and_tokenised_texts_are_seen() -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    transformers = pytest.importorskip("transformers")
    graphs = geometric.Batch.from_data_list([geometric.Data(x=torch.ones(3, 2), y=torch.zeros(1)) for _ in range(2)])
    texts = transformers.BatchEncoding({"x": torch.ones(3), "y": torch.zeros(1)})
    for batch in (graphs, texts):
        tensors: list[Tensor] = []
        own = copied((batch, 1), tensors)[0]
        kept = batch["x"]
        own["x"] = own["x"] * 2
        assert batch["x"] is kept, "the original was changed"
        assert {id(batch["x"]), id(batch["y"])} <= set(map(id, tensors))
        before = versions(tensors)
        batch["y"].add_(1)
        assert versions(tensors) != before


def test_tensors_of_inference_mode_have_no_versions() -> None:
    with torch.inference_mode():
        made = torch.ones(3, dtype=torch.float64)
    plain = torch.ones(3)
    before = versions([made, plain])
    plain.add_(1)
    assert versions([made, plain]) != before
    inputs = copy.copy(BATCHES["dict"][0]) | {"labels": made}
    assert torch.isfinite(gradient_of(build(inputs, popped, mlopt.Identity()))).all()
