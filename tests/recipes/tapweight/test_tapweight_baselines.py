"""The methods that weigh objectives in other ways than TapWeight, against loops in plain torch and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from tapweight_cases import F64, SETTINGS, Encoder, Reconstruct, Sum, recipe, weights_gradient
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import mlopt
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Equal, Frozen, Given, Surgery, ThreeLevels, Uncertainty, make_method
from mlopt.recipes.tapweight.methods.levels import three_levels
from mlopt.recipes.tapweight.methods.proximal import Proximal
from mlopt.recipes.tapweight.methods.surgery import surgery
from mlopt.recipes.tapweight.models import Finetuning, Pretraining
from mlopt.rng import derive_seed, seed_everything

WEIGHING = ["uncertainty", "pcgrad", "alignment", "bilevel", "frozen"]


class Whole(Reconstruct):
    """An objective without masks: its loss on all of the corpus draws no random number. All heads start alike."""

    def head(self, encoder: nn.Module) -> nn.Module:
        made = nn.Linear(encoder.width, 3, dtype=F64)
        with torch.no_grad():
            made.weight.copy_(torch.linspace(-0.1, 0.1, 12).reshape(3, 4))
            made.bias.zero_()
        return made

    def view(self, batch: Tensor) -> Tensor:
        return batch


class Opposite(Whole):
    """Predict the negative of what `Whole("linear", 1.0)` predicts: their gradients conflict."""

    def loss(self, encoder: nn.Module, head: nn.Module, view: Tensor) -> Tensor:
        return (head(encoder(view)) + 2 * view.abs()).square().mean()


#: Each level sees all of its examples at each step, so that a loop by hand needs no order of batches.
FULL = attrs.evolve(
    SETTINGS, batch_size=40, task_batch_size=24, valid_batch_size=24, warmup=0.0, weights_lr=0.05, scale="none"
)
OBJECTIVES = (Whole("linear", 1.0), Opposite("opposite", 1.0), Whole("square", 2.0))


def full_experiment(**settings: Any) -> Experiment:
    made = recipe(objectives=OBJECTIVES, settings=attrs.evolve(FULL, **settings))
    return made.experiment(6, progress=False)


def losses(model: Pretraining, experiment: Experiment) -> list[Tensor]:
    corpus = torch.stack(list(experiment.corpus))
    return [each.loss(model.encoder, model.heads[each.name], corpus) for each in experiment.objectives]


def assert_equal_modules(actual: nn.Module, expected: nn.Module, rtol: float = 1e-9) -> None:
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", WEIGHING)
def test_the_weights_sum_to_one_and_are_not_equal(name: str) -> None:
    result = recipe().fit(8, methods=[name], progress=False)
    assert list(result.weights) == ["linear", "square"]
    assert sum(result.weights.values()) == pytest.approx(1.0, abs=1e-6)
    assert result.weights["linear"] != pytest.approx(0.5, abs=1e-4)


class Stop(mlopt.Callback):
    def on_step_end(self, run: Any) -> None:
        if run.step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", WEIGHING)
def test_a_run_that_was_stopped_is_resumed_bit_equal(name: str, tmp_path: Path) -> None:
    def experiment(**arguments: Any) -> Experiment:
        three = [Reconstruct("linear", 1.0), Reconstruct("square", 2.0), Reconstruct("root", 0.5)]
        return recipe(objectives=three).experiment(8, progress=False, **arguments)

    whole = make_method(name).adapt(experiment())
    saved = mlopt.Checkpoints(tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        make_method(name).adapt(experiment(checkpoint=saved), [Stop()])
    resumed = make_method(name).adapt(experiment(checkpoint=saved, resume=True))
    assert resumed.weights == whole.weights
    assert list(resumed.history) == list(whole.history)
    for a, b in zip(resumed.encoder.parameters(), whole.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_uncertainty_weights_are_those_of_a_loop_in_plain_torch() -> None:
    experiment = full_experiment(weight_decay=0.1)
    adapted = Uncertainty().adapt(experiment)
    model, s = experiment.model(), torch.zeros(3, requires_grad=True)
    groups = [{"params": model.parameters()}, {"params": [s], "lr": FULL.weights_lr, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=FULL.pretraining_lr, weight_decay=0.1)
    for _ in range(6):
        total = sum(torch.exp(-s[k]) * loss + s[k] for k, loss in enumerate(losses(model, experiment)))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert_equal_modules(adapted.encoder, model.encoder, rtol=1e-7)
    precisions = torch.exp(-s.detach())
    assert list(adapted.weights.values()) == pytest.approx((precisions / precisions.sum()).tolist(), rel=1e-6)


def test_uncertainty_weights_are_inverse_to_the_losses_of_an_encoder_that_stays() -> None:
    made = recipe(objectives=OBJECTIVES, settings=attrs.evolve(FULL, pretraining_lr=0.0))
    experiment = made.experiment(600, progress=False)
    adapted = Uncertainty().adapt(experiment)
    inverse = 1 / torch.stack(losses(experiment.model(), experiment)).detach()
    assert list(adapted.weights.values()) == pytest.approx((inverse / inverse.sum()).tolist(), rel=1e-4)


@pytest.mark.parametrize("cosine", [-0.9, -0.1, 0.0, 0.7])
def test_surgery_on_two_gradients_is_the_closed_form(cosine: float) -> None:
    a, b = 2.0, 0.5  # norms
    inner = a * b * cosine
    weights = surgery(torch.tensor([[a * a, inner], [inner, b * b]], dtype=F64))
    conflict = max(0.0, -cosine)
    expected = [(1 + conflict * b / a) / 2, (1 + conflict * a / b) / 2]
    assert weights.tolist() == pytest.approx(expected, rel=1e-14)


def projected(gradients: Tensor) -> Tensor:
    """Return the mean of the projected gradients, by the definition."""
    ends = []
    for i, gradient in enumerate(gradients):
        own = gradient.clone()
        for j in torch.randperm(len(gradients)).tolist():
            inner = torch.dot(own, gradients[j])
            if j != i and inner < 0:
                own -= inner / gradients[j].norm() ** 2 * gradients[j]
        ends.append(own)
    return torch.stack(ends).mean(0)


def test_surgery_is_its_definition_on_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        gradients = torch.randn(5, 4, dtype=F64, generator=generator)
        torch.manual_seed(seed)
        weights = surgery(gradients @ gradients.T)
        torch.manual_seed(seed)
        torch.testing.assert_close(weights @ gradients, projected(gradients), rtol=1e-12, atol=1e-14)


def test_a_gradient_of_zero_conflicts_with_none() -> None:
    assert surgery(torch.diag(torch.tensor([1.0, 0.0, 4.0]))).tolist() == pytest.approx([1 / 3] * 3)


def test_pretraining_with_surgery_is_a_loop_in_plain_torch() -> None:
    """With two objectives the result does not depend on the order of the projections."""
    made = recipe(objectives=OBJECTIVES[:2], settings=FULL)
    experiment = made.experiment(6, progress=False)
    adapted = Surgery().adapt(experiment)
    model = experiment.model()
    encoder, heads = list(model.encoder.parameters()), list(model.heads.parameters())
    optimizer, conflicts = AdamW(model.parameters(), lr=FULL.pretraining_lr, weight_decay=0.0), 0
    for _ in range(6):
        rows = []
        for loss in losses(model, experiment):
            parts = torch.autograd.grad(loss, [*encoder, *heads], allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        size = sum(p.numel() for p in encoder)
        of_encoder = torch.stack(rows)[:, :size]
        conflicts += int(torch.dot(*of_encoder) < 0)
        total = torch.cat([projected(of_encoder), torch.stack(rows)[:, size:].mean(0)])
        for p, g in zip([*encoder, *heads], total.split([p.numel() for p in [*encoder, *heads]]), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()
    assert conflicts > 0
    assert_equal_modules(adapted.encoder, model.encoder)


def test_without_conflicts_the_gradient_is_that_of_equal_weights() -> None:
    """An objective and twice itself never conflict; the heads take their gradients at equal weights in any case."""

    class Twice(Whole):
        def loss(self, encoder: nn.Module, head: nn.Module, view: Tensor) -> Tensor:
            return 2 * super().loss(encoder, head, view)

    made = recipe(objectives=[Whole("once", 1.0), Twice("twice", 1.0)], settings=FULL)
    experiment = made.experiment(6, progress=False)
    gradients = []
    for method in (Surgery(), Equal()):
        model = experiment.model()
        problem = method.problem(experiment, model)
        problem["pretraining"].loss(model, torch.stack(list(experiment.corpus)))["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, equal in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, equal, rtol=1e-12, atol=1e-15)


def test_surgery_under_autocast_does_not_round_the_gradients() -> None:
    experiment = full_experiment()
    model, batch = experiment.model().float(), torch.stack(list(experiment.corpus)).float()
    encoder = list(model.encoder.parameters())
    loss = Surgery().problem(experiment, model)["pretraining"].loss
    with torch.autocast("cpu", torch.bfloat16):
        rows = []
        for objective in OBJECTIVES:
            own = objective.loss(model.encoder, model.heads[objective.name], batch)
            rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(own, encoder)]))
        torch.manual_seed(0)
        value = loss(model, batch)["loss"]
    value.backward()
    torch.manual_seed(0)
    ours = torch.cat([p.grad.flatten() for p in encoder])
    torch.testing.assert_close(ours, projected(torch.stack(rows)))


def test_surgery_refuses_fp16() -> None:
    with pytest.raises(ValueError, match="pcgrad: precision='fp16'"):
        recipe(settings=attrs.evolve(SETTINGS, precision="fp16")).fit(4, methods=["pcgrad"], progress=False)


def weights_by_hand(experiment: Experiment, *, joint: bool) -> tuple[Pretraining, Tensor]:
    """Return theta and lambda after alternating steps on theta, with the head of the task, and on the logits."""
    settings, task, model = experiment.settings, experiment.task, experiment.model()
    seed_everything(derive_seed(experiment.seed, "finetuning"))
    head, logits = task.head(model.encoder), torch.zeros(3, requires_grad=True)
    encoder = list(model.encoder.parameters())
    inner = AdamW([*model.parameters(), *head.parameters()], lr=settings.pretraining_lr, weight_decay=0.0)
    outer = torch.optim.Adam([logits], lr=settings.weights_lr)

    def task_loss(split: str, *, detached: bool = False) -> Tensor:
        batch = torch.stack(list(task.splits[split]))
        features = model.encoder(batch)
        return task.losses(head(features.detach() if detached else features).squeeze(1), batch).mean()

    v = None
    for _ in range(6 // settings.every):
        weights = logits.detach().softmax(0).double()
        for _ in range(settings.every):
            signals = None if v is None else weights_gradient(weights, losses(model, experiment), encoder, v, 0.5)
            total = sum(weight * loss for weight, loss in zip(weights, losses(model, experiment), strict=True))
            inner.zero_grad()
            (total + task_loss("train", detached=not joint)).backward()
            inner.step()
        v = torch.autograd.grad(task_loss("valid"), encoder)
        if signals is None:  # the first step has no gradient of an earlier one
            signals = weights_gradient(weights, losses(model, experiment), encoder, v, 0.5)
        logits.grad = signals.float()
        outer.step()
    return model, logits.detach().softmax(0)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["alignment", "bilevel"])
def test_two_levels_are_a_loop_in_plain_torch(name: str, every: int) -> None:
    experiment = full_experiment(every=every)
    adapted = make_method(name).adapt(experiment)
    model, weights = weights_by_hand(experiment, joint=name == "bilevel")
    assert max(weights) - min(weights) > 0.02
    assert list(adapted.weights.values()) == pytest.approx(weights.tolist(), rel=1e-6)
    assert_equal_modules(adapted.encoder, model.encoder, rtol=1e-7)


def test_alignment_at_weights_that_stay_equal_is_equal_weights() -> None:
    """It sees the batches, masks and dropout of equal weights, and the labels do not train the encoder; bilevel's do."""

    class Dropping(Encoder):
        def forward(self, batch: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(batch), 0.2, self.training)

    made = recipe(Dropping, settings=attrs.evolve(SETTINGS, weights_lr=0.0))
    equal, alignment, bilevel = (
        make_method(name).adapt(made.experiment(12, progress=False)).encoder
        for name in ("equal", "alignment", "bilevel")
    )
    assert_equal_modules(alignment, equal, rtol=1e-12)
    assert (bilevel.layer.weight - equal.layer.weight).abs().max() > 1e-4


def test_frozen_is_pretraining_at_the_weights_of_the_three_levels() -> None:
    made = recipe()
    frozen, learned = (method.adapt(made.experiment(8, progress=False)) for method in (Frozen(), ThreeLevels()))
    again = Given(learned.weights).adapt(made.experiment(8, progress=False))
    assert frozen.weights == learned.weights
    assert frozen.signals == learned.signals
    assert torch.equal(frozen.encoder.layer.weight, again.encoder.layer.weight)
    assert not torch.equal(frozen.encoder.layer.weight, learned.encoder.layer.weight)


def test_frozen_and_the_three_levels_are_compared_in_one_saved_run(tmp_path: Path) -> None:
    result = recipe().fit(8, methods=["tapweight", "frozen"], checkpoint=tmp_path, progress=False)
    assert result.outcomes["frozen"].weights == result.outcomes["tapweight"].weights
    assert {"tapweight", "frozen", "frozen-learning"} < {path.name for path in tmp_path.iterdir()}
    result.plot(tmp_path / "weights.png")


def absolute_coupling(displacement: float) -> tuple[mlopt.Problem, dict[str, Tensor]]:
    """Return three levels with gamma ||omega - theta||_1, at omega - theta = displacement."""
    torch.manual_seed(0)
    task = Sum({split: list(torch.randn(6, 3, dtype=F64)) for split in ("train", "valid", "test")})
    batches = {name: torch.randn(6, 3, dtype=F64) for name in ("reweighting", "finetuning", "pretraining")}
    problem = three_levels(
        Pretraining(Encoder(), OBJECTIVES),
        OBJECTIVES,
        task,
        scales=dict.fromkeys(("linear", "opposite", "square"), 1.0),
        gamma=0.5,
        proximal="l1",
        corpus=[batches["pretraining"]],
        train=[batches["finetuning"]],
        valid=[batches["reweighting"]],
        optimizers=dict.fromkeys(("pretraining", "finetuning", "reweighting"), SGD),
        every=1,
        estimator=mlopt.FiniteDifference(),
    )
    with torch.no_grad():
        for parameter in problem["finetuning"].module.encoder.parameters():
            parameter.add_(displacement)
    return problem, batches


def test_finite_differences_of_the_absolute_coupling_see_the_kink_alone() -> None:
    problem, batches = absolute_coupling(0.0)
    result = mlopt.hypergradient(problem, batches, seed=0)
    theta, omega = problem["pretraining"].module, problem["finetuning"].module
    assert isinstance(omega, Finetuning)
    outputs = omega.head(omega.encoder(batches["reweighting"])).squeeze(1)
    loss = (outputs - batches["reweighting"].sum(1)).square().mean()
    signs = [v.sign() for v in torch.autograd.grad(loss, list(omega.encoder.parameters()))]
    own = [each.loss(theta.encoder, theta.heads[each.name], batches["pretraining"]) for each in OBJECTIVES]
    parameters = list(theta.encoder.parameters())
    # Across the kink the slope changes by 2 gamma, over a distance of 2 e: the pullback is gamma sign(v) / e.
    half = 0.5 / (2 * result.reports["finetuning"].step)
    expected = weights_gradient(torch.full((3,), 1 / 3, dtype=F64), own, parameters, signs, half)
    torch.testing.assert_close(result.gradient["logits"].double(), expected, rtol=1e-5, atol=0)
    problem, batches = absolute_coupling(0.1)
    assert mlopt.hypergradient(problem, batches, seed=0).gradient["logits"].tolist() == [0.0] * 3


def test_the_absolute_coupling_is_the_sum_of_absolute_differences() -> None:
    a, b = Encoder(), Encoder()
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    expected = 0.7 * sum((x - y).abs().sum().item() for x, y in pairs)
    assert float(Proximal(a, 0.7, "l1")(a, b).detach()) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"proximal": "none"}, "without a coupling the finetuned encoder does not depend on the pretrained one"),
        ({"proximal": "l3"}, "proximal='l3'; it must be one of 'l2', 'l1'"),
        ({"proximal": "l1", "estimator": mlopt.Identity()}, "mixed derivative is zero almost everywhere"),
    ],
)
def test_a_coupling_without_a_derivative_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ThreeLevels(**arguments)


def test_variants_of_the_three_levels_are_compared_under_names_of_their_own() -> None:
    variants = [ThreeLevels(), ThreeLevels(proximal="l1", name="absolute")]
    result = recipe().fit(8, methods=variants, progress=False)
    assert list(result.scores) == ["tapweight", "absolute"]
    assert result.outcomes["absolute"].title == "TapWeight as published (absolute)"
    assert result.outcomes["tapweight"].weights != result.outcomes["absolute"].weights
