"""Objectives on text: their views, their losses against plain torch, and the replay of their randomness."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_cases import KINDS, VOCABULARY, corpus, encoder, sentences, texts, tokenizer
from torch import nn
from torch.nn.functional import cosine_similarity

from mlopt.recipes.tapweight.text.data import Texts, from_dataset
from mlopt.recipes.tapweight.text.objectives import (
    OBJECTIVES,
    Contrastive,
    MaskedTokens,
    RandomLabels,
    ReplacedTokens,
    SentenceOrder,
    ShuffledWords,
    make_objective,
)
from mlopt.rng import GeneratorState

NAMES = list(OBJECTIVES)
SPECIAL = 5  # the first tokens of the vocabulary


def made(name: str, own: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return an objective, its head and a batch."""
    objective, texts = make_objective(name, own.tokenizer), corpus()
    objective.prepare(texts, 0)
    return objective, objective.head(own), own.collate([dict(text) for text in texts[:8]])


def copied(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_view_does_not_change_the_batch_and_is_replayed(name: str) -> None:
    objective, head, batch = made(name, own := encoder())
    before, state = copied(batch), GeneratorState.capture()
    views, losses = [], []
    for _ in range(2):
        state.restore()
        views.append(objective.view(batch))
        losses.append(objective.loss(own, head, views[-1]))
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in before)
    assert all(torch.equal(views[0][key], views[1][key]) for key in views[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random_labels"])
def test_views_are_drawn_again_each_time(name: str) -> None:
    """SimCSE's view is the batch twice; its draws are the dropout masks."""
    objective, head, batch = made(name, own := encoder())
    losses = [objective.loss(own, head, objective.view(batch)).item() for _ in range(3)]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_gives_every_encoder_and_its_head_a_gradient(name: str, kind: str) -> None:
    objective, head, batch = made(name, own := encoder(kind))
    loss = objective.loss(own, head, objective.view(batch))
    assert loss.dim() == 0
    loss.backward()
    assert sum(float(p.grad.norm()) for p in own.parameters() if p.grad is not None) > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_hidden_tokens_are_hidden_and_special_ones_are_not(seed: int) -> None:
    objective, own = MaskedTokens(tokenizer()), encoder()
    batch = own.collate([{"text": text} for text, _ in sentences(16, seed % 1000)])
    torch.manual_seed(seed)
    view = objective.view(batch)
    masked = view["masked"]
    assert not (masked & batch["special_tokens_mask"].bool()).any()
    assert torch.equal(view["hidden_tokens"], batch["input_ids"][masked])
    assert torch.equal(view["input_ids"][~masked], batch["input_ids"][~masked])


def test_hidden_tokens_have_the_right_rate_and_three_kinds() -> None:
    objective, own = MaskedTokens(tokenizer(), rate=0.3), encoder()
    batch = own.collate([{"text": text} for text, _ in sentences(400)])
    view = objective.view(batch)
    masked, count = view["masked"], int((batch["special_tokens_mask"] == 0).sum())
    assert int(masked.sum()) / count == pytest.approx(0.3, abs=0.03)
    shown = view["input_ids"][masked]
    hidden = (shown == own.tokenizer.mask_token_id).float().mean()
    kept = (shown == view["hidden_tokens"]).float().mean()
    assert hidden == pytest.approx(0.8, abs=0.05)
    assert kept == pytest.approx(0.1 + 0.1 / len(VOCABULARY), abs=0.04)


def test_the_loss_of_masked_tokens_is_that_of_the_whole_model() -> None:
    """Only hidden tokens pass the head; transformers' own loss, of all tokens, is the same."""
    own = encoder(masked=True).eval()
    objective, head, batch = made("masked_tokens", own)
    view = objective.view(batch)
    labels = torch.where(view["masked"], batch["input_ids"], -100)
    hidden = own(view)
    logits = head(hidden.flatten(0, 1))
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten())
    torch.testing.assert_close(objective.loss(own, head, view), expected)
    assert objective.remarks == []


def test_a_new_head_for_masked_tokens_is_reported() -> None:
    objective, _, _ = made("masked_tokens", encoder())
    assert "a new one, tied to the embeddings, is trained" in objective.remarks[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_second_derivative_of_every_objective_is_that_of_differences(name: str) -> None:
    own = encoder(attn_implementation="eager").eval().double()
    objective, head, batch = made(name, own)
    view, parts = objective.view(batch), nn.ModuleList([own, head.double()])
    parameters = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def gradient(shift: float, *, create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=shift)
        loss = objective.loss(own, head, view)
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "create_graph": create_graph}
        return torch.autograd.grad(loss, parameters, **options)

    exact = torch.autograd.grad(
        gradient(0.0, create_graph=True), parameters, direction, allow_unused=True, materialize_grads=True
    )
    ahead, behind = gradient(1e-5), gradient(-2e-5)
    for one, two, product in zip(ahead, behind, exact, strict=True):
        torch.testing.assert_close((one - two) / 2e-5, product, rtol=1e-4, atol=1e-4)


def telling() -> Texts:
    """Return 60 sentences of documents of three; after a heading, the first word names the place, the second the document."""
    headings = ("METHODS ", "RESULTS ", "")
    return texts(
        [
            {
                "text": f"{headings[k % 3]}thing{k % 3} thing{3 + k // 3 % 17} is {'good good ' * (k % 4)}not the bad and poor",
                "document": k // 3,
                "position": k % 3,
                "count": 3,
            }
            for k in range(60)
        ]
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("contrastive", "random_labels")])
def test_every_objective_can_be_learned(name: str) -> None:
    """The loss falls by 40% at least. It cannot reach 0 for keywords, which have shares, nor for hidden words."""
    torch.manual_seed(0)
    own, some = encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), telling()
    objective = make_objective(name, own.tokenizer)
    objective.prepare(some, 0)
    head, batch = objective.head(own), own.collate(list(some))
    optimizer = torch.optim.Adam({*own.parameters(), *head.parameters()}, lr=3e-3)
    losses = []
    for _ in range(150):
        loss = objective.loss(own, head, objective.view(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("name", ["masked_tokens", "sentence_order", "replaced_tokens", "shuffled_words"])
def test_a_batch_without_anything_to_predict_has_the_loss_zero(name: str) -> None:
    own = encoder()
    objective, head, _ = made(name, own)
    batch = own.collate([{"text": "good"}, {"text": "bad"}])
    batch["special_tokens_mask"] = torch.ones_like(batch["special_tokens_mask"])
    loss = objective.loss(own, head, objective.view(batch))
    assert loss.item() == 0.0
    loss.backward()


def test_contrast_is_simcse() -> None:
    objective, head, batch = made("contrastive", own := encoder())
    view = objective.view(batch)
    assert torch.equal(view["input_ids"], batch["input_ids"].repeat(2, 1))
    state = GeneratorState.capture()
    loss = objective.loss(own, head, view)
    state.restore()
    z = head(own.pool(view))
    count = len(batch["input_ids"])
    first, second = z[:count], z[count:]
    assert (first - second).abs().max() > 1e-3  # dropout of their own
    similar = torch.stack([cosine_similarity(row[None], second) for row in first]) / 0.05
    expected = -torch.stack([similar[i, i] - similar[i].logsumexp(0) for i in range(count)]).mean()
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="the batch holds 1: use at least 2"):
        objective.view({key: value[:1] for key, value in batch.items()})


def test_an_encoder_without_dropout_is_reported() -> None:
    objective, _, _ = made("contrastive", encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    assert "no dropout" in objective.remarks[0]


def numbered(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts of some numbers of tokens, each between two special ones and padded, and the mask of special tokens."""
    ids = torch.zeros(len(counts), max(counts) + 2, dtype=torch.long)
    special = torch.ones_like(ids)
    for row, count in enumerate(counts):
        ids[row, : count + 2] = torch.tensor([2, *range(10, 10 + count), 3])
        special[row, 1 : count + 1] = 0
    return ids, special


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), counts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_halves_are_swapped_according_to_the_label(seed: int, counts: list[int]) -> None:
    """The expected rows are plain lists."""
    ids, special = numbered(counts)
    width = ids.shape[1]
    torch.manual_seed(seed)
    view = SentenceOrder().view({"input_ids": ids, "special_tokens_mask": special})
    for row, count in enumerate(counts):
        words = list(range(10, 10 + count))
        label = int(view["swapped"][row])
        assert label == -100 if count < 2 else label in (0, 1)
        if label == 1:
            words = words[count // 2 :] + words[: count // 2]
        assert view["input_ids"][row].tolist() == [2, *words, 3, *[0] * (width - count - 2)]


def test_both_orders_are_drawn_and_texts_too_short_do_not_count() -> None:
    own = encoder().eval()
    objective, head, _ = made("sentence_order", own)
    batch = own.collate([{"text": text} for text, _ in sentences(400)])
    assert float(objective.view(batch)["swapped"].float().mean()) == pytest.approx(0.5, abs=0.1)
    mixed = objective.view(own.collate([{"text": "good"}, {"text": "the thing1 is bad"}]))
    assert mixed["swapped"][0] == -100
    alone = {key: value[1:] for key, value in mixed.items()}
    torch.testing.assert_close(objective.loss(own, head, mixed), objective.loss(own, head, alone))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), counts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_shuffled_texts_have_the_same_tokens_and_labels_mark_the_changed_ones(seed: int, counts: list[int]) -> None:
    ids, special = numbered(counts)
    width = ids.shape[1]
    torch.manual_seed(seed)
    view = ShuffledWords().view({"input_ids": ids, "special_tokens_mask": special})
    for row, count in enumerate(counts):
        words, moved = list(range(10, 10 + count)), view["input_ids"][row].tolist()
        assert [moved[0], *moved[count + 1 :]] == [2, 3, *[0] * (width - count - 2)]
        assert sorted(moved[1 : count + 1]) == words
        assert int(view["shuffled"][row]) == (-100 if count < 2 else int(moved[1 : count + 1] != words))


def test_half_of_the_texts_are_shuffled_and_every_order_is_as_likely() -> None:
    ids = torch.tensor([[2, 10, 11, 12, 3]]).repeat(6_000, 1)
    special = torch.tensor([[1, 0, 0, 0, 1]]).repeat(6_000, 1)
    view = ShuffledWords().view({"input_ids": ids, "special_tokens_mask": special})
    assert float(view["shuffled"].float().mean()) == pytest.approx(5 / 12, abs=0.03)
    orders = Counter(map(tuple, view["input_ids"][view["shuffled"] == 1].tolist()))
    assert len(orders) == 5
    assert all(count == pytest.approx(500, abs=100) for count in orders.values())


def test_replacements_follow_the_corpus_and_labels_mark_the_differences() -> None:
    own = encoder()
    objective = ReplacedTokens(own.tokenizer, rate=0.5)
    texts = [{"text": "good good good bad"}] * 100
    objective.prepare(texts, 0)
    batch = own.collate(texts)
    view = objective.view(batch)
    real = batch["special_tokens_mask"] == 0
    assert torch.equal(view["replaced"] >= 0, real)
    assert torch.equal(view["replaced"] == 1, (view["input_ids"] != batch["input_ids"]) & real)
    assert torch.equal(view["input_ids"][~real], batch["input_ids"][~real])
    good, bad = own.tokenizer.convert_tokens_to_ids(["good", "bad"])
    assert set(view["input_ids"][real].tolist()) == {good, bad}
    # Half of the tokens are drawn again; three quarters of these draws are "good", one quarter "bad".
    was_bad = batch["input_ids"] == bad
    assert float((view["replaced"][was_bad] == 1).float().mean()) == pytest.approx(3 / 8, abs=0.15)
    assert float((view["replaced"][real & ~was_bad] == 1).float().mean()) == pytest.approx(1 / 8, abs=0.08)


def test_the_loss_of_replaced_tokens_counts_each_real_token_once() -> None:
    own = encoder().eval()
    objective, head, batch = made("replaced_tokens", own)
    view = objective.view(batch)
    logits = head(own(view)).squeeze(2).detach()
    total, count = 0.0, 0
    for row in range(len(logits)):
        for place in range(logits.shape[1]):
            label = int(view["replaced"][row, place])
            if label >= 0:
                total += math.log1p(math.exp(-float(logits[row, place]) * (2 * label - 1)))
                count += 1
    assert objective.loss(own, head, view).item() == pytest.approx(total / count, rel=1e-5)


def test_random_labels_depend_on_the_text_alone() -> None:
    objective, first, second = RandomLabels(classes=4), corpus(24), corpus(24)
    objective.prepare(first, 0)
    objective.prepare(list(reversed(second)), 1)
    labels = [example["random_labels_4"] for example in first]
    assert labels == [example["random_labels_4"] for example in second]
    assert set(labels) == {0, 1, 2, 3}


def test_random_labels_need_a_corpus_that_keeps_them() -> None:
    dataset = datasets.Dataset.from_list(list(corpus(4)))
    objective = RandomLabels()
    with pytest.raises(
        ValueError,
        match=r"this corpus, a Dataset, creates its examples at each access; .* from_dataset\(dataset, label=None\)",
    ):
        objective.prepare(dataset, 0)
    kept = from_dataset(dataset, label=None)
    objective.prepare(kept, 0)
    assert all(objective.key in example for example in kept)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: make_objective("masked_token", tokenizer()), "'masked_token'; available: 'masked_tokens', 'contr"),
        (lambda: make_objective("masked_tokens", tokenizer(mask_token=None)), "none; leave the objective out"),
        (lambda: MaskedTokens(tokenizer(), rate=1.0), "rate must be above 0 and below 1; got 1.0"),
        (lambda: ReplacedTokens(tokenizer(), rate=0.0), "rate must be above 0 and below 1; got 0.0"),
        (lambda: Contrastive(temperature=0.0), "temperature must be above 0; got 0.0"),
        (lambda: RandomLabels(classes=1), "classes must be at least 2; got 1"),
        (lambda: ReplacedTokens(tokenizer()).prepare([{"text": "good"}], 0), "fewer than two different tokens"),
    ],
)
def test_wrong_arguments_are_refused(act, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        act()
    assert sentence in str(error.value)


def test_the_other_objectives_do_not_need_a_mask_token() -> None:
    for name in NAMES[1:]:
        assert make_objective(name, tokenizer(mask_token=None)).name == name
