"""Recorded and compiled `autograd` products, against the live ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_cases import BATCHES, INPUTS, LABELS, compare, decay, loss_of, pair, problem_of
from core_cases import distance, gradient_of
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import mlopt
from mlopt.estimators.products import traced
from mlopt.testing import EstimatorContract, same, snapshot


class Cubed(torch.autograd.Function):
    """x^3, with a backward of its own that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Act(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    network[2].weight = network[0].weight
    network[4].bias.requires_grad_(False)
    return network


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network[1].register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return network


def attention(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x[None], x[None], x[None])[0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm and dropout": lambda: nn.Sequential(
        nn.Linear(3, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(5, 4),
        nn.Dropout(0.2),
        nn.Linear(4, 2),
    ),
    "dropout of a transposed tensor": lambda: nn.Sequential(
        nn.Linear(3, 4), Act(lambda x: dropout(x.T, 0.5).T), nn.Tanh(), nn.Linear(4, 2)
    ),
    "draws of other kinds": lambda: nn.Sequential(
        nn.Linear(3, 4),
        Act(lambda x: x + torch.randn_like(x) * torch.rand(4)),
        Act(lambda x: x * torch.bernoulli(x.detach().T, 0.5).T),
        nn.Softplus(),
        nn.Linear(4, 2),
    ),
    "a draw without use": lambda: nn.Sequential(
        Act(lambda x: x + 0 * torch.rand(3).sum()), nn.Dropout(0.5), nn.Linear(3, 2)
    ),
    "tied and frozen": tied,
    "forward hooks": hooked,
    "a custom function": lambda: nn.Sequential(nn.Linear(3, 4), Act(Cubed.apply), nn.Linear(4, 2)),
    "layer norm and attention": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), Act(attention), nn.Linear(4, 2)
    ),
    "checkpointing": lambda: nn.Sequential(
        nn.Linear(3, 4), Act(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)), nn.Linear(4, 2)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recorded_products_are_the_live_ones(name: str, replayed: list[Any]) -> None:
    """On batches of other values and sizes, at other variables and buffers, with the masks of each seed."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    compiled, live = pair(network, regularizer=decay)
    compare(compiled, live, seeds=2)
    before = snapshot(compiled)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor += 1 if tensor.dtype == torch.long else 0.1
    count = len(replayed)
    compare(compiled, live)
    assert len(replayed) > count
    assert all(value is not None for value in compiled.workspace.compiled.values())
    assert not same(before, snapshot(compiled))  # else the second comparison proves nothing


def test_hooks_of_parameters_are_recorded(replayed: list[Any]) -> None:
    """The mixed product, which differences do not judge where a hook scales the gradient."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network[0].weight.register_hook(lambda gradient: 2.0 * gradient)
    gradients = []
    for compile in (True, False):
        problem = problem_of(network, compile=compile)
        rule = mlopt.Identity(compile=compile)
        problem = mlopt.Problem(
            problem["weights"], mlopt.Level("network", network, loss_of, data=BATCHES, estimator=rule)
        )
        gradients += [gradient_of(problem, batches={"network": BATCHES[k]}, seed=0) for k in (0, 1)]
    assert replayed
    assert distance(gradients[1], gradients[3]) < 1e-12


def test_plain_values_in_a_batch_are_part_of_the_setting(replayed: list[Any]) -> None:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        inputs, labels, options = batch
        return options["factor"] * loss_of(module, (inputs, labels), weights=weights)

    batches = [(INPUTS, LABELS, {"factor": factor}) for factor in (1, 2.0, 3.0)]
    compare(*pair(nn.Linear(3, 2), loss, data=batches), batches)
    assert replayed


def test_tensors_of_a_batch_that_are_one_are_told_from_two(replayed: list[Any]) -> None:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return (module(batch[0]) * batch[1]).square().sum() * weights().sum()

    batches = [(INPUTS, INPUTS), (INPUTS, 2 * INPUTS)]
    compare(*pair(nn.Linear(3, 3), loss, data=batches), batches)


def test_shapes_that_depend_on_numbers(replayed: list[Any]) -> None:
    """The recording holds for as many selected samples as it was made with; otherwise products are live."""

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        inputs, _ = batch
        chosen = inputs[inputs[:, 0] > 0]
        return (module(chosen).square().sum(0) / len(chosen)).sum() * weights().sum() + module(inputs).square().mean()

    flipped = torch.cat([INPUTS[:, :1].abs(), INPUTS[:, 1:]], 1)
    batches = [(INPUTS, LABELS), (-INPUTS, LABELS), (2 * INPUTS, LABELS), (flipped, LABELS)]
    assert len({int((x[:, 0] > 0).sum()) for x, _ in batches}) == 3
    compiled, live = pair(nn.Linear(3, 2), loss, data=batches)
    compare(compiled, live, batches)
    count = len(replayed)
    compare(compiled, live, batches[1:2])  # of another number
    assert len(replayed) == count
    compare(compiled, live, batches[2:3])
    assert len(replayed) > count


def test_a_mask_of_fixed_shape_is_compiled(replayed: list[Any]) -> None:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return module(batch[0])[batch[1]].square().sum() * weights().sum()  # an index of whole numbers selects as many

    compiled, live = pair(nn.Linear(3, 2), loss)
    compare(compiled, live)
    assert not any(code.recording.shared for known in compiled.workspace.compiled.values() for code in known.values())


def test_a_flag_that_changes_is_found_out(replayed: list[Any]) -> None:
    """Products are compared at the 1st, 10th, 100th use; from then on they are live, and the report says so."""
    factor = 1.0

    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return factor * loss_of(module, batch, weights=weights) + decay(module)

    compiled, live = pair(nn.Linear(3, 2), loss)
    compare(compiled, live, BATCHES[:1], seeds=1)
    factor, remarks = 3.0, []
    for _ in range(40):
        result = mlopt.hypergradient(compiled, {"network": BATCHES[0]}, seed=0)
        remarks += [r for r in result.reports["network"].remarks if "its loss differed from the live one" in r]
    expected = gradient_of(live, batches={"network": BATCHES[0]}, seed=0)
    assert distance(result.gradient["value"], expected) < 1e-12
    assert len(remarks) == 1
    assert compiled.workspace.compiled["network", "loss", "autograd"] is None


def test_settings_beyond_the_first_eight_are_live(replayed: list[Any]) -> None:
    many = [(INPUTS[:k], LABELS[:k]) for k in range(1, 8)]
    many += [(INPUTS[:k].T.contiguous().T, LABELS[:k]) for k in range(2, 5)]
    compiled, live = pair(nn.Linear(3, 2), data=many)
    compare(compiled, live, many, seeds=1)
    compare(compiled, live, many, seeds=1)
    known = compiled.workspace.compiled["network", "loss", "autograd"]
    assert len({key[-1] for key in known}) <= traced._MOST


def test_curvature_data(replayed: list[Any]) -> None:
    options = {"curvature_data": BATCHES[:2], "curvature_batches": 2}
    compare(*pair(nn.Linear(3, 2), **options), BATCHES[:1], seeds=2)
    assert replayed


def test_modes_of_modules_are_part_of_the_setting(replayed: list[Any]) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    compiled, live = pair(network)
    for training in (True, False, True):
        network.train(training)
        compare(compiled, live, BATCHES[:1], seeds=2)


@pytest.mark.usefixtures("replayed")
class TestRecorded(EstimatorContract):
    """Losses of the contract that hand numbers to Python, or draw from its generator, are refused."""

    nested = True
    tolerance = 1e-8
    # A recording takes a third of a second.
    seeds = (1,)
    shapes = ("two", "chain_with_shortcuts")
    nested_shapes = ("nested",)

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Dense(compile=True)

    def test_nothing_moves(self) -> None:
        with pytest.raises(mlopt.EstimatorError, match="generator of Python or numpy"):
            super().test_nothing_moves()

    def test_nothing_moves_when_a_loss_raises(self) -> None:
        with pytest.raises(mlopt.EstimatorError, match="generator of Python or numpy"):
            super().test_nothing_moves_when_a_loss_raises()

    def test_common_random_numbers(self) -> None:
        with pytest.raises(mlopt.EstimatorError, match="reads numbers of a tensor"):
            super().test_common_random_numbers()

    def test_dropout_is_that_of_one_mask(self) -> None:
        with pytest.raises(mlopt.EstimatorError, match="reads numbers of a tensor"):
            super().test_dropout_is_that_of_one_mask()


def test_a_comment_of_the_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors here; on a GPU, Inductor warns of reductions that it splits."""
    import torch._inductor.lowering

    def compile(graph: Any, arguments: Any, **_: Any) -> Any:
        exec("import warnings; warnings.warn('a choice of the compiler')", vars(torch._inductor.lowering))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    compare(*pair(nn.Linear(3, 2)))


def test_the_compiler_makes_no_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their next replay would overwrite the results of a product."""
    import torch._inductor.config as config

    graphs = []

    def compile(graph: Any, arguments: Any, options: Any = None) -> Any:
        with config.patch(options or {}):
            graphs.append(config.triton.cudagraphs)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    with config.patch({"triton.cudagraphs": True}):
        compare(*pair(nn.Linear(3, 2)))
    assert set(graphs) == {False}


@pytest.mark.parametrize(
    ("flag", "values"),
    [("are_deterministic_algorithms_enabled", (False, True)), ("get_float32_matmul_precision", ("high", "highest"))],
)
def test_flags_that_choose_kernels_have_code_of_their_own(
    flag: str, values: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compiled(graph: Any, arguments: Any) -> Any:
        seen.append(getattr(torch, flag)())
        return graph

    monkeypatch.setattr(traced, "compiled", compiled)
    problem = problem_of(nn.Linear(3, 2), compile=True)
    first, second = values
    for value in (first, second, first):
        monkeypatch.setattr(torch, flag, lambda value=value: value)
        gradient_of(problem, batches={"network": BATCHES[0]})
        gradient_of(problem, batches={"network": BATCHES[0]})
    assert seen == sorted(seen)
    assert set(seen) == set(values)
