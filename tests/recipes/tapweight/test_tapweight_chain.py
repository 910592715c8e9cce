"""The whole chain of TapWeight: streamed, forward mode, backward passes and the closed form agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tapweight_cases import F64, Encoder, Reconstruct, Sum, weights_gradient
from torch import Tensor, nn
from torch.optim import SGD

import mlopt
from mlopt.recipes.tapweight.methods.levels import Chunks, three_levels
from mlopt.recipes.tapweight.methods.proximal import Coupling, Proximal
from mlopt.recipes.tapweight.models import Pretraining
from mlopt.recipes.tapweight.significance import judge, verdict


def chain(gamma: float = 0.5, estimator: mlopt.Estimator | None = None) -> tuple[mlopt.Problem, dict[str, Tensor]]:
    torch.manual_seed(0)
    objectives = [Reconstruct("linear", 1.0), Reconstruct("square", 2.0), Reconstruct("root", 0.5)]
    task = Sum({split: list(torch.randn(6, 3, dtype=F64)) for split in ("train", "valid", "test")})
    model = Pretraining(Encoder(), objectives)
    batches = {name: torch.randn(6, 3, dtype=F64) for name in ("reweighting", "finetuning", "pretraining")}
    problem = three_levels(
        model,
        objectives,
        task,
        scales={"linear": 1.0, "square": 2.0, "root": 0.5},
        gamma=gamma,
        corpus=[batches["pretraining"]],
        train=[batches["finetuning"]],
        valid=[batches["reweighting"]],
        optimizers={
            "pretraining": partial(SGD, lr=0.01),
            "finetuning": partial(SGD, lr=0.01),
            "reweighting": partial(SGD, lr=0.1),
        },
        every=1,
        estimator=estimator or mlopt.Identity(),
    )
    with torch.no_grad():  # omega away from theta, weights away from equal
        for parameter in problem["finetuning"].module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        problem["reweighting"].module.logits.add_(torch.tensor([0.4, -0.3, 0.1]))
    return problem, batches


def objective_losses(problem: mlopt.Problem, batches: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the scaled loss of each objective, from plain torch."""
    theta = problem["pretraining"].module
    for (name, head), power, scale in zip(theta.heads.items(), (1.0, 2.0, 0.5), (1.0, 2.0, 0.5), strict=True):
        objective = Reconstruct(name, power)
        yield objective.loss(theta.encoder, head, objective.view(batches["pretraining"])) / scale


def task_loss(problem: mlopt.Problem, batch: Tensor) -> Tensor:
    omega = problem["finetuning"].module
    return (omega.head(omega.encoder(batch)).squeeze(1) - batch.sum(1)).square().mean()


def validation_gradient(problem: mlopt.Problem, batches: dict[str, Tensor]) -> tuple[Tensor, ...]:
    loss = task_loss(problem, batches["reweighting"])
    return torch.autograd.grad(loss, list(problem["finetuning"].module.encoder.parameters()))


@pytest.mark.parametrize("products", ["autograd", "forward"])
@pytest.mark.parametrize("gamma", [1e-3, 0.5, 100.0])
def test_the_hypergradient_is_the_closed_form(products, gamma):
    problem, batches = chain(gamma, mlopt.Identity(products=products))
    result = mlopt.hypergradient(problem, batches, seed=3)
    v = validation_gradient(problem, batches)
    seed = mlopt.rng.derive_seed("hypergradient", "seed", 3, "pretraining")
    mlopt.rng.GeneratorState.seeded(seed, problem.devices).restore()
    weights = problem["reweighting"].module.logits.detach().softmax(0).double()
    parameters = list(problem["pretraining"].module.encoder.parameters())
    expected = weights_gradient(weights, objective_losses(problem, batches), parameters, v, gamma)
    torch.testing.assert_close(result.gradient["logits"].double(), expected, rtol=1e-6, atol=1e-8 * gamma)


def test_chunks_of_a_batch_count_as_the_whole_and_pass_the_encoder_one_by_one():
    problem, batches = chain(100.0)
    module = problem["finetuning"].module
    rows = []

    def note(encoder, inputs, _):
        if not encoder.training:  # the validation examples
            rows.append(len(inputs[0]))

    module.encoder.register_forward_hook(note)
    whole = mlopt.hypergradient(problem, batches, seed=3)
    assert set(rows) == {6}
    rows.clear()
    # The sizes differ: a mean of means would be another number.
    parts = Chunks(batches["reweighting"].split([2, 4]))
    cut = mlopt.hypergradient(problem, {**batches, "reweighting": parts}, seed=3)
    assert set(rows) == {2, 4}
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.gradient["logits"], whole.gradient["logits"], rtol=1e-6, atol=0)
    assert all(part.training for part in module.modules())


def test_the_streamed_gradient_is_the_closed_form_with_the_cotangent_of_the_step_before():
    problem, batches = chain()
    reference = copy.deepcopy(problem)
    gradients, states = [], []

    class Watch(mlopt.Callback):
        def on_step_end(self, run):
            gradients.append(problem["reweighting"].module.logits.grad.clone())
            states.append(run.engine.gradients.generators["pretraining"])

    mlopt.solve(problem, 2, callbacks=[Watch()], seed=1)
    theta, omega = reference["pretraining"].module, reference["finetuning"].module
    own, parameters = reference["reweighting"].module, list(theta.encoder.parameters())
    # Two outer steps of the same levels by hand; the second gradient uses g_k at the second step and v of the first.
    v = None
    for step in range(2):
        weights = own.logits.detach().softmax(0)
        states[step].restore()
        if v is not None:
            expected = weights_gradient(weights.double(), objective_losses(reference, batches), parameters, v, 0.5)
            states[step].restore()
        mixture = sum(weight * loss for weight, loss in zip(weights, objective_losses(reference, batches), strict=True))
        gradient_step(mixture, theta)
        loss = task_loss(reference, batches["finetuning"])
        gradient_step(loss + Proximal(theta.encoder, 0.5)(omega.encoder, theta.encoder), omega)
        last, v = v, validation_gradient(reference, batches)
        if last is None:
            # The first step has no cotangent of an earlier one: it evaluates the objectives at the new theta.
            states[step].restore()
            expected = weights_gradient(weights.double(), objective_losses(reference, batches), parameters, v, 0.5)
        torch.testing.assert_close(gradients[step].double(), expected, rtol=1e-5, atol=1e-9)
        with torch.no_grad():
            own.logits -= 0.1 * gradients[step]


def gradient_step(loss: Tensor, module: nn.Module) -> None:
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.01 * gradient


def test_the_pullback_through_finetuning_needs_no_network_pass():
    problem, batches = chain()
    mlopt.hypergradient(problem, batches)  # the first one also inspects the loss of finetuning
    passes = []
    problem["finetuning"].module.encoder.layer.register_forward_hook(lambda *_: passes.append(1))
    mlopt.hypergradient(problem, batches)
    assert len(passes) == 1  # the validation loss


def test_the_products_of_the_coupling_are_exact():
    """The products are 2 gamma I and -2 gamma I for any encoders."""
    a, b = Encoder(), Encoder()
    value = Proximal(a, 0.7)(a, b)
    v = [torch.randn_like(p) for p in a.parameters()]
    g = torch.autograd.grad(value, list(a.parameters()), create_graph=True)
    inner = sum((x * y).sum() for x, y in zip(g, v, strict=True))
    own = torch.autograd.grad(inner, list(a.parameters()), retain_graph=True)
    mixed = torch.autograd.grad(inner, list(b.parameters()))
    for x, h, m in zip(v, own, mixed, strict=True):
        torch.testing.assert_close(h, 1.4 * x, rtol=1e-14, atol=0)
        torch.testing.assert_close(m, -1.4 * x, rtol=1e-14, atol=0)


def test_the_supplied_products_are_those_of_autograd():
    """In all directions, with heads and frozen parameters on both sides."""
    problem, _ = chain(0.7)
    own, anchor = problem["finetuning"].module, problem["pretraining"].module
    own.head.bias.requires_grad_(False)
    coupling = Coupling(Proximal(own.encoder, 0.7), own, anchor)
    levels = {"finetuning": problem["finetuning"].parameters, "pretraining": problem["pretraining"].parameters}
    along = {name: [torch.randn_like(p) for p in parameters] for name, parameters in levels.items()}
    everything = [p for parameters in levels.values() for p in parameters]
    gradient = torch.autograd.grad(
        coupling(own, pretraining=anchor), everything, create_graph=True, allow_unused=True, materialize_grads=True
    )
    traced = dict(zip(map(id, everything), gradient, strict=True))
    for blocks in (["finetuning"], ["pretraining"], ["finetuning", "pretraining"]):
        direction = {name: along[name] for name in blocks}
        pairs = [
            (traced[id(p)], v)
            for name in blocks
            for p, v in zip(levels[name], along[name], strict=True)
            if traced[id(p)].requires_grad
        ]
        inner = sum((g * v).sum() for g, v in pairs)
        for wanted, parameters in levels.items():
            expected = torch.autograd.grad(
                inner, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            product = coupling.product(direction, [wanted])[wanted]
            for actual, reference in zip(product, expected, strict=True):
                actual = torch.zeros_like(reference) if actual is None else actual
                torch.testing.assert_close(actual, reference, rtol=1e-14, atol=1e-14)


def test_the_coupling_is_not_evaluated_for_a_pullback(monkeypatch):
    problem, batches = chain()
    mlopt.hypergradient(problem, batches)  # the first one verifies the product
    calls = []
    original = Proximal.__call__
    monkeypatch.setattr(Proximal, "__call__", lambda *arguments: calls.append(1) or original(*arguments))
    mlopt.hypergradient(problem, batches)
    assert not calls


def test_the_other_distance_has_no_constant_products():
    problem, _ = chain()
    own, anchor = problem["finetuning"].module, problem["pretraining"].module
    assert Coupling(Proximal(own.encoder, 0.7, "l1"), own, anchor).product is None


def test_a_frozen_encoder_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        Proximal(Encoder().requires_grad_(False), 1.0)


def test_halves_that_disagree_are_not_significant_however_many_batches():
    """Label noise is the same at every measurement: more of them must not make it significant."""
    generator = torch.Generator().manual_seed(0)
    label_noise = 1.0
    halves = []
    for _ in range(200):
        # The signals of both halves scatter about a mean that is within the labels' error of zero.
        draw = torch.randn(2, 1, generator=generator, dtype=F64) * label_noise * 2**0.5
        halves.append((0.8 + draw[0] - draw.mean(0), 0.8 + draw[1] - draw.mean(0)))
    signal = judge(["one"], [(a + b) / 2 for a, b in halves], halves)["one"]
    assert signal.mean == pytest.approx(0.8)
    assert not signal.significant
    assert signal.error == pytest.approx(1.0, rel=0.2)


def test_a_clear_signal_is_significant_and_reported():
    generator = torch.Generator().manual_seed(0)
    halves = [
        (torch.tensor([1.0, -1.0, 0.0]) + 0.1 * torch.randn(3, generator=generator), torch.tensor([1.0, -1.0, 0.0]))
        for _ in range(10)
    ]
    signals = judge(["good", "bad", "neither"], [(a + b) / 2 for a, b in halves], halves)
    assert signals["good"].significant
    assert signals["bad"].significant
    assert not signals["neither"].significant
    sentence = verdict(signals)
    assert "good helped significantly" in sentence
    assert "bad helped significantly less" in sentence
    assert "neither cannot be distinguished" in sentence
    assert "no significant preference" in verdict({"neither": signals["neither"]})


def test_false_alarms_are_as_rare_as_they_should_be():
    """With signals of label noise alone, some objective is significant in about 5% of runs, not in most."""
    generator = torch.Generator().manual_seed(1)
    alarms = 0
    for _ in range(300):
        per_label = torch.randn(40, 5, generator=generator, dtype=F64)
        halves = []
        for _ in range(20):
            order = torch.randperm(40, generator=generator)
            halves.append((per_label[order[:20]].mean(0), per_label[order[20:]].mean(0)))
        means = [(a + b) / 2 for a, b in halves]
        alarms += any(signal.significant for signal in judge(list("abcde"), means, halves).values())
    assert 0.01 < alarms / 300 < 0.12
