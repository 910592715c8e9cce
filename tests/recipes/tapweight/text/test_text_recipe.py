"""The whole recipe on text: every encoder, second derivatives, and the usual changes to models of transformers."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
from tapweight_cases import weights_gradient
from text_cases import KINDS, SETTINGS, corpus, encoder, model, save, splits, tapweight, task, texts, tokenizer
from torch import Tensor, nn
from torch.optim import SGD
from transformers import AutoModel, AutoTokenizer

import mlopt
from mlopt.recipes.tapweight.methods import ThreeLevels
from mlopt.recipes.tapweight.methods.levels import three_levels
from mlopt.recipes.tapweight.models import Pretraining
from mlopt.recipes.tapweight.result import TapWeightResult
from mlopt.recipes.tapweight.text.encoder import TextEncoder
from mlopt.recipes.tapweight.text.objectives import OBJECTIVES, make_objective
from mlopt.recipes.tapweight.text.task import TextTask
from mlopt.rng import GeneratorState, derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

F64 = torch.float64
NAMES = ("masked_tokens", "contrastive", "sentence_order", "replaced_tokens")


@pytest.fixture
def _double() -> Iterator[None]:
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_runs_the_whole_recipe(kind: str, masked: bool, tmp_path: Path) -> None:
    own = encoder(kind, masked=masked)
    before = copy.deepcopy(own.state_dict())
    result = tapweight(own).fit(4, methods=["direct", "tapweight"], progress=False)
    assert list(result.weights) == list(OBJECTIVES)
    assert sum(result.weights.values()) == pytest.approx(1, abs=1e-6)
    assert all(0 <= score["test"] <= 1 for score in result.scores.values())
    assert all(torch.equal(own.state_dict()[name], value) for name, value in before.items())
    result.encoder.save(tmp_path)
    adapted = result.encoder.model.state_dict()
    read = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], value) for name, value in adapted.items())
    name = next(name for name in before if name.endswith("embeddings.weight"))
    assert not torch.equal(before[name], result.encoder.state_dict()[name])
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(own.tokenizer)


def test_the_card_reports_data_weights_scores_and_settings(tmp_path: Path) -> None:
    result = tapweight(encoder()).fit(4, methods=["tapweight"], progress=False)
    result.save(tmp_path)
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\ntags: ["tapweight", "task-adaptive-pretraining"]\n---\n')
    for line in (
        "- task: TextTask(classification: 2 classes; accuracy; train 24, valid 24, test 24)",
        "- corpus: 24 texts of made",
        result.verdict,
        f"| contrastive | {result.weights['contrastive']:.3f} | {result.signals['contrastive'].z:+.1f} | no |",
        f"| TapWeight as published | {result.scores['tapweight']['valid']:.3f} | {result.scores['tapweight']['test']:.3f} |",
        "- gamma: 100.0",
        "- seed: 0",
        "Steps: 4.",
    ):
        assert line.lower() in card.lower()


def test_pairs_and_numbers_run_the_whole_recipe() -> None:
    own = encoder()
    made = {
        split: texts([{**e, "text_b": "the thing1 is good", "label": k / 3} for k, e in enumerate(examples)], split)
        for split, examples in splits(16).items()
    }
    result = tapweight(own, NAMES[:2], task=TextTask(made, own.collate, metric="spearman")).fit(4, progress=False)
    assert result.metric == "spearman"
    assert all(-1 <= score["test"] <= 1 for score in result.scores.values())


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (tapweight(encoder(), NAMES).fit(4, progress=False) for _ in range(2))
    assert first.weights == second.weights
    assert first.scores == second.scores
    assert first.history.column("pretraining/loss") == second.history.column("pretraining/loss")


def chain(
    estimator: mlopt.Estimator | None = None,
    kind: str = "bert",
    gamma: float = 0.5,
    recompute: bool = False,
    **more: Any,
) -> tuple[mlopt.Problem, dict[str, Any], list[Any]]:
    """Return the three levels away from their start, with a batch of each, and the objectives."""
    own = encoder(kind, masked=True, **more)
    objectives = [make_objective(name, own.tokenizer) for name in NAMES]
    for objective in objectives:
        objective.prepare(corpus(), 0)
    made = task(own)
    if recompute:
        own.recompute_activations()
    model = Pretraining(own, objectives)
    batches = {
        "pretraining": own.collate(list(corpus(6))),
        "finetuning": made.collate(list(made.splits["train"])[:6]),
        "reweighting": made.collate(list(made.splits["valid"])[:6]),
    }
    names = ("corpus", "train", "valid")
    problem = three_levels(
        model,
        objectives,
        made,
        scales=dict(zip(NAMES, (1.0, 2.0, 0.5, 1.5), strict=True)),
        gamma=gamma,
        optimizers=dict.fromkeys(("pretraining", "finetuning", "reweighting"), partial(SGD, lr=0.05)),
        every=1,
        estimator=estimator or mlopt.Identity(),
        **{name: [batch] for name, batch in zip(names, batches.values(), strict=True)},
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in problem["finetuning"].module.named_parameters():
            if parameter.requires_grad:  # the head multiplies its parameters by 20
                parameter.add_((0.0025 if name.startswith("head") else 0.05) * torch.randn_like(parameter))
        problem["reweighting"].module.logits.add_(torch.tensor([0.4, -0.3, 0.1, 0.2]))
    return problem, batches, objectives


def validation_gradient(problem: mlopt.Problem, batch: Any) -> tuple[Tensor, ...]:
    """Return v = dL_valid / domega on the encoder."""
    omega = copy.deepcopy(problem["finetuning"].module).eval()
    loss = nn.functional.cross_entropy(omega.head(omega.encoder.pool(batch)), batch["label"])
    trained = [p for p in omega.encoder.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_the_hypergradient_is_the_closed_form(kind: str, products: str) -> None:
    """dL/da = -2 gamma (diag(lambda) - lambda lambda^T) s with s_k = <grad L_k, v>, from plain torch, dropout on."""
    problem, batches, objectives = chain(mlopt.Identity(products=products), kind)
    gradient = mlopt.hypergradient(problem, batches, seed=3).gradient["logits"]
    v = validation_gradient(problem, batches["reweighting"])
    theta, scales = problem["pretraining"].module, (1.0, 2.0, 0.5, 1.5)
    GeneratorState.seeded(derive_seed("hypergradient", "seed", 3, "pretraining")).restore()
    losses = (
        objective.loss(theta.encoder, theta.heads[objective.name], objective.view(batches["pretraining"])) / scale
        for objective, scale in zip(objectives, scales, strict=True)
    )
    weights = problem["reweighting"].module.logits.detach().softmax(0)
    expected = weights_gradient(weights, losses, list(theta.encoder.parameters()), v, gamma=0.5)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_second_order_works_with_fused_attention(kind: str) -> None:
    """Conjugate gradient, by traced graphs and by differences, agrees on sdpa and on eager attention."""
    # Damping is for the uncoupled head; with embeddings as small as usual, the curvature of a LayerNorm is huge.
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    gradients = {}
    for attention in ("sdpa", "eager"):
        for name, estimator in (
            ("cg", mlopt.ConjugateGradient(iterations=200, rtol=1e-10, damping=400.0)),
            (
                "differences",
                mlopt.ConjugateGradient(iterations=200, rtol=1e-8, damping=400.0, products="finite_difference"),
            ),
        ):
            problem, batches, _ = chain(estimator, kind, gamma=20.0, **still)
            for level in ("pretraining", "finetuning"):
                problem[level].module.encoder.model.set_attn_implementation(attention)
            result = mlopt.hypergradient(problem, batches, seed=3)
            assert result.reports["finetuning"].converged
            gradients[attention, name] = result.gradient["logits"]
    reference = gradients["eager", "cg"]
    identity, _, _ = chain(None, kind, gamma=20.0, **still)
    first_order = mlopt.hypergradient(identity, batches, seed=3).gradient["logits"]
    assert (first_order - reference).norm() > 1e-3 * reference.norm()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference, rtol=2e-2 if key[1] == "differences" else 1e-6, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_second_order_in_float32_runs_through_fit(training: bool) -> None:
    """Dtype, mask and dropout choose the kernel without a second derivative: do a whole run with dropout on and off."""
    rate = 0.1 if training else 0.0
    own = encoder(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    assert own.model.config._attn_implementation == "sdpa"
    made = tapweight(own, NAMES[:2], estimator=mlopt.ConjugateGradient(iterations=3))
    result = made.fit(3, methods=["tapweight"], progress=False)
    assert math.isfinite(result.scores["tapweight"]["test"])


@pytest.mark.usefixtures("_double")
def test_common_masks_leave_the_weights_gradient_a_twentieth_of_the_spread() -> None:
    """Compare with the released chain: differences of the losses at theta + e v and theta - e v, each with its own masks."""
    problem, batches, objectives = chain(hidden_size=64, intermediate_size=128)
    v = validation_gradient(problem, batches["reweighting"])
    radius = 0.01 / torch.stack([gradient.square().sum() for gradient in v]).sum().sqrt()
    theta = problem["pretraining"].module
    weights = problem["reweighting"].module.logits.detach().softmax(0)
    jacobian = -2 * 0.5 * (torch.diag(weights) - weights[:, None] * weights)

    def losses(shift: float, seed: int) -> Tensor:
        twin = copy.deepcopy(theta)
        with torch.no_grad():
            for parameter, one in zip(twin.encoder.parameters(), v, strict=True):
                parameter.add_(shift * one)
            torch.manual_seed(seed)
            scaled = zip(objectives, (1.0, 2.0, 0.5, 1.5), strict=True)
            batch = batches["pretraining"]
            return torch.stack([o.loss(twin.encoder, twin.heads[o.name], o.view(batch)) / c for o, c in scaled])

    def difference(first: int, second: int) -> Tensor:
        return jacobian @ ((losses(radius, first) - losses(-radius, second)) / (2 * radius))

    runs = range(8)
    ours = torch.stack([mlopt.hypergradient(problem, batches, seed=seed).gradient["logits"] for seed in runs])
    common = torch.stack([difference(seed, seed) for seed in runs])
    independent = torch.stack([difference(seed, 1000 + seed) for seed in runs])

    def spread(gradients: Tensor) -> Tensor:
        return gradients.var(0).sum().sqrt()

    assert spread(ours) < spread(independent) / 20
    # The rest is the effect of another mask, the same on both sides.
    assert float(spread(ours) / spread(common)) == pytest.approx(1, abs=0.6)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    """The recomputation runs on the live parameters, with the masks of the first computation."""
    plain, batches, _ = chain(kind=kind)
    memory, _, _ = chain(kind=kind, recompute=True)
    layers = [part for part in memory["pretraining"].module.modules() if getattr(part, "gradient_checkpointing", False)]
    assert layers
    expected = mlopt.hypergradient(plain, batches, seed=3).gradient["logits"]
    torch.testing.assert_close(mlopt.hypergradient(memory, batches, seed=3).gradient["logits"], expected)
    solved = [mlopt.solve(problem, 3, seed=0, progress=False) for problem in (plain, memory)]
    for first, second in zip(*(problem["pretraining"].module.parameters() for problem in (plain, memory)), strict=True):
        torch.testing.assert_close(first, second)
    assert solved[0].history.column("reweighting/loss")[0] == pytest.approx(
        solved[1].history.column("reweighting/loss")[0]
    )


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_second_order_with_gradient_checkpointing_is_right(products: str) -> None:
    plain, batches, _ = chain(mlopt.ConjugateGradient(iterations=3))
    memory, _, _ = chain(mlopt.ConjugateGradient(iterations=3, products=products), recompute=True)
    expected = mlopt.hypergradient(plain, batches, seed=3).gradient["logits"]
    gradient = mlopt.hypergradient(memory, batches, seed=3).gradient["logits"]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_forward_products_are_refused_with_gradient_checkpointing() -> None:
    """The recomputation would use the live parameters, not those that stand in for them."""
    problem, batches, _ = chain(mlopt.ConjugateGradient(iterations=3, products="forward"), recompute=True)
    with pytest.raises(mlopt.SecondDerivativeError, match=r"gradient checkpointing.*use products='autograd'"):
        mlopt.hypergradient(problem, batches)


def test_embeddings_stay_tied_through_training() -> None:
    made = tapweight(encoder(masked=True), NAMES)
    experiment = made.experiment(4)
    problem = ThreeLevels().problem(experiment, experiment.model())
    mlopt.solve(problem, 3, seed=0, progress=False)
    theta = problem["pretraining"].module
    head = theta.heads["masked_tokens"].model
    assert head.get_output_embeddings().weight is theta.encoder.embeddings.weight
    names = [name for name, _ in theta.named_parameters() if "word_embeddings" in name]
    assert names == ["encoder.model.embeddings.word_embeddings.weight"]
    # The finetuned copy has embeddings of its own.
    omega = problem["finetuning"].module
    assert omega.encoder.embeddings.weight is not theta.encoder.embeddings.weight


def changed(start: dict[str, Tensor], result: TapWeightResult) -> set[str]:
    """Return the names of the tensors that differ between the start and the adapted encoder."""
    end = result.encoder.state_dict()
    return {name for name in start if not torch.equal(start[name], end[name])}


def test_frozen_layers_stay_and_the_rest_is_trained() -> None:
    own = encoder()
    own.model.embeddings.requires_grad_(False)
    own.model.encoder.layer[0].requires_grad_(False)
    start = copy.deepcopy(own.state_dict())
    result = tapweight(own, NAMES).fit(4, progress=False)
    moved = changed(start, result)
    assert moved
    assert all(name.startswith("model.encoder.layer.1") for name in moved)


class Adapter(nn.Module):
    """A low-rank change to a frozen layer, as of an adapter: y = W x + B A x."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("estimator", [None, mlopt.ConjugateGradient(iterations=3)])
def test_adapters_alone_are_trained(estimator: mlopt.Estimator | None) -> None:
    torch.manual_seed(0)
    plain = model().requires_grad_(False)
    for layer in plain.encoder.layer:
        layer.attention.self.query = Adapter(layer.attention.self.query)
    own = TextEncoder(plain, tokenizer(), max_length=16)
    start = copy.deepcopy(own.state_dict())
    result = tapweight(own, NAMES, estimator=estimator, settings=attrs.evolve(SETTINGS, pretraining_lr=1e-2)).fit(
        4, progress=False
    )
    moved = changed(start, result)
    assert moved
    assert all(".up." in name or ".down." in name for name in moved)


# PEFT asks transformers by an older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, which no extra installs")
    save(tmp_path / "base", model())
    base = AutoModel.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"]))
    own = TextEncoder(adapted, tokenizer(), max_length=16)
    start = copy.deepcopy(own.state_dict())
    result = tapweight(own, NAMES, settings=attrs.evolve(SETTINGS, pretraining_lr=1e-2)).fit(4, progress=False)
    assert changed(start, result) == {name for name in start if ".lora_" in name}
    result.save(tmp_path / "result")
    loaded = TextEncoder.load(tmp_path / "result" / "encoder", max_length=16).eval()
    batch = loaded.collate(list(corpus(3)))
    torch.testing.assert_close(loaded.pool(batch), result.encoder.eval().pool(batch))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_weights_of_half_precision_run_the_recipe(kind: str) -> None:
    own = TextEncoder(model(kind, masked=True).bfloat16(), tokenizer(), max_length=16)
    result = tapweight(own, NAMES).fit(4, progress=False)
    assert all(p.dtype == torch.bfloat16 for p in result.encoder.parameters())
    assert sum(result.weights.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_under_autocast_are_nearly_those_of_full_precision(precision: str) -> None:
    """The first losses differ by no more than the rounding of half precision."""
    full, half = (
        tapweight(encoder(), NAMES, settings=attrs.evolve(SETTINGS, precision=kind))
        .fit(4, progress=False, methods=["tapweight"])
        .history
        for kind in ("none", precision)
    )
    names = [name for name in full.names if name.endswith("/loss")]
    assert len(names) == 3
    # In half precision the first gradient overflows at the initial loss scale, and the step is skipped.
    for name in names if precision == "bf16" else ["pretraining/loss"]:
        assert half[0][name] == pytest.approx(full[0][name], rel=0.05)
    assert any(half[0][name] != full[0][name] for name in names)
    assert ("pretraining/loss_scale" in half.names) == (precision == "fp16")


def test_autocast_inside_the_losses_gives_nearly_the_same_weights_gradient() -> None:
    plain, batches, _ = chain()
    cast, _, _ = chain()
    for name in ("pretraining", "finetuning"):
        forward = type(cast[name].module.encoder).forward

        def autocast(own: Any, batch: Any, forward: Any = forward) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(own, batch).float()

        twin = type("Cast", (TextEncoder,), {"forward": autocast})
        cast[name].module.encoder.__class__ = twin
    expected = mlopt.hypergradient(plain, batches, seed=3).gradient["logits"]
    gradient = mlopt.hypergradient(cast, batches, seed=3).gradient["logits"]
    assert not torch.equal(gradient, expected)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.95
