"""Objectives with targets from the corpus: hand counts, scikit-learn, and refusals."""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from text_cases import corpus, encoder, texts, tokenizer
from torch.nn.functional import cosine_similarity

from mlopt.recipes.tapweight.objective import NotPreparedError
from mlopt.recipes.tapweight.text.data import Texts
from mlopt.recipes.tapweight.text.objectives import (
    OBJECTIVES,
    Keywords,
    SameDocument,
    Sections,
    SentenceLength,
    SentencePosition,
    TopicClusters,
    make_objective,
)

OF_DOCUMENTS = ("sentence_position", "same_document", "sections")
WITH_TARGETS = (*OF_DOCUMENTS, "keywords", "topic_clusters", "sentence_length", "random_labels")


def documents(*counts: int) -> Texts:
    """Return sentences "thing<document> is thing<place>", of documents of so many sentences."""
    made = [
        {"text": f"thing{d} is thing{19 - p}", "document": d, "position": p, "count": count}
        for d, count in enumerate(counts)
        for p in range(count)
    ]
    return texts(made)


def prepared(objective: Any, some: Texts, own: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the head of an objective and the batch of the whole corpus."""
    objective.prepare(some, 0)
    return objective.head(own), own.collate(list(some))


@pytest.mark.parametrize(
    ("count", "fifths"),
    [
        (1, [0]),
        (2, [0, 2]),
        (3, [0, 1, 3]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 4]),
        (7, [0, 0, 1, 2, 2, 3, 4]),
        (10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ],
)
def test_the_parts_of_a_document_are_its_fifths(count: int, fifths: list[int]) -> None:
    objective, some = SentencePosition(), documents(count, 2)
    objective.prepare(some, 0)
    assert [example["sentence_position_5"] for example in some] == [*fifths, 0, 2]


def test_the_loss_of_positions_is_the_mean_surprise_of_the_right_part() -> None:
    objective, own = SentencePosition(parts=2), encoder().eval()
    head, batch = prepared(objective, documents(2, 3), own)
    chances = head(own.pool(batch)).softmax(1).tolist()
    right = [0, 1, 0, 0, 1]
    expected = -sum(math.log(chances[row][part]) for row, part in enumerate(right)) / 5
    assert objective.loss(own, head, objective.view(batch)).item() == pytest.approx(expected, rel=1e-5)


def test_a_neighbour_is_the_next_sentence_of_the_document() -> None:
    """The last sentence has the one before, one alone itself; sentences that a subset leaves out are passed over."""
    objective, own, whole = SameDocument(), encoder(), documents(3, 1, 4)
    shown = whole.subset([6, 2, 0, 3, 5, 1, 4])  # without the last sentence of the last document
    head, batch = prepared(objective, shown, own)
    assert head is not None
    chosen = {key: value[[5, 0, 4, 3, 1]] for key, value in batch.items()}
    view = objective.view(chosen)
    expected = own.collate(
        [{"text": whole[k]["text"]} for k in (1, 6, 5, 3, 2)] + [{"text": whole[k]["text"]} for k in (2, 5, 6, 3, 1)]
    )
    assert torch.equal(view["input_ids"], expected["input_ids"])
    assert torch.equal(view["attention_mask"], expected["attention_mask"])
    assert view["document"].tolist() == [0, 2, 2, 1, 0]


def test_every_partner_is_from_the_same_document() -> None:
    objective, own, some = SameDocument(), encoder(), documents(2, 5, 3, 2)
    _, batch = prepared(objective, some, own)
    first, second = objective.view(batch)["input_ids"][:, 1].chunk(2)  # "thing<document>"
    assert torch.equal(first, second)
    places = objective.view(batch)["input_ids"][:, 3].chunk(2)
    assert not (places[0] == places[1]).any()


def test_the_loss_of_neighbours_leaves_out_other_sentences_of_the_document() -> None:
    objective, own = SameDocument(temperature=0.5), encoder().eval()
    head, batch = prepared(objective, documents(2, 3, 1), own)
    view = objective.view(batch)
    first, second = head(own.pool(view)).detach().chunk(2)
    document, terms = [0, 0, 1, 1, 1, 2], []
    for i in range(6):
        similar = {j: math.exp(cosine_similarity(first[i], second[j], dim=0) / 0.5) for j in range(6)}
        others = [similar[j] for j in range(6) if document[j] != document[i]]
        terms.append(-math.log(similar[i] / (similar[i] + sum(others))))
    assert objective.loss(own, head, view).item() == pytest.approx(sum(terms) / 6, rel=1e-5)


def abstract(*parts: str) -> Texts:
    """Return the sentences of one document, and of a second one without headings."""
    of_document = [(0, parts), (1, ("thing0 is good", "METHODS thing1 is bad", "thing2 is poor"))]
    return texts(
        [
            {"text": text, "document": document, "position": place, "count": len(own)}
            for document, own in of_document
            for place, text in enumerate(own)
        ]
    )


@pytest.mark.parametrize(
    ("sentence", "section", "rest"),
    [
        ("RESULTS thing1 is good", 3, "thing1 is good"),
        ("CONCLUSION : thing1 is good", 4, "thing1 is good"),
        ("PURPOSE: thing1 is good", 1, "thing1 is good"),
        ("PATIENTS AND METHODS thing1 is good", 2, "thing1 is good"),
        ("MAIN RESULTS thing1 is good", 3, "thing1 is good"),
        ("RESULTS. 12 thing1 is good", 3, "12 thing1 is good"),
        # Only the words up to the last that names a section are the heading.
        ("RESULTS HIV thing1 is good", 3, "HIV thing1 is good"),
        # These are no headings: the section goes on.
        ("HIV thing1 is good", 0, "HIV thing1 is good"),
        ("Results is good", 0, "Results is good"),
        ("thing1 is good RESULTS", 0, "thing1 is good RESULTS"),
    ],
)
def test_a_heading_names_the_section_and_is_not_shown(sentence: str, section: int, rest: str) -> None:
    objective, own = Sections(), encoder()
    some = abstract(
        "thing9 is fine", "BACKGROUND thing8 is great", sentence, "the thing7 is bad", "METHODS", "DESIGN thing6"
    )
    head, batch = prepared(objective, some, own)
    # No heading stands before the first sentence, one by itself is nothing to read, and the second document has one section.
    assert batch["section"].tolist() == [-100, 0, section, section, -100, 2, -100, -100, -100]
    shown = ["thing9 is fine", "thing8 is great", rest, "the thing7 is bad", "METHODS", "thing6"]
    expected = own.collate([{"text": text} for text in [*shown, *(some[k]["text"] for k in (6, 7, 8))]])
    view = objective.view(batch)
    assert torch.equal(view["input_ids"], expected["input_ids"])
    assert torch.equal(view["attention_mask"], expected["attention_mask"])
    assert head(own.pool(view)).shape == (9, 5)


def test_a_heading_with_a_period_is_a_sentence_by_itself_and_begins_a_section() -> None:
    document = "BACKGROUND: Rats are small. METHODS: Ten rats were fed. RESULTS. All recovered. Some grew."
    some = texts([{"text": document}]).sentences()
    Sections().prepare(some, 0)
    assert [(example["text"], example["section"]) for example in some] == [
        ("BACKGROUND: Rats are small.", 0),
        ("METHODS: Ten rats were fed.", 2),
        ("RESULTS.", -100),
        ("All recovered.", 3),
        ("Some grew.", 3),
    ]


def test_sections_follow_the_places_in_the_document_not_the_order_of_the_corpus() -> None:
    some = abstract("AIM thing1", "thing2", "METHODS thing3", "thing4").subset([3, 5, 1, 0, 4, 2])
    Sections().prepare(some, 0)
    assert [example["section"] for example in some] == [2, -100, 1, 1, -100, 2]


def test_the_loss_of_sections_is_the_mean_surprise_of_the_sentences_that_count() -> None:
    objective, own = Sections(), encoder().eval()
    head, batch = prepared(objective, abstract("thing1", "AIM thing2 is good", "RESULTS thing3 is bad", "thing4"), own)
    view = objective.view(batch)
    chances = head(own.pool(view)).softmax(1).tolist()
    expected = -sum(math.log(chances[row][section]) for row, section in ((1, 1), (2, 3), (3, 3))) / 3
    assert objective.loss(own, head, view).item() == pytest.approx(expected, rel=1e-5)
    none = objective.view({key: value[:1] for key, value in batch.items()})
    assert objective.loss(own, head, none).item() == 0.0


def test_keywords_are_the_words_that_scikit_learn_weighs_most() -> None:
    some = corpus()
    objective = Keywords(words=12, most=3)
    objective.prepare(some, 0)
    table = TfidfVectorizer(max_features=12, min_df=2, stop_words="english").fit_transform(e["text"] for e in some)
    for example, row in zip(some, torch.from_numpy(table.toarray()), strict=True):
        weights, words = row.sort(descending=True, stable=True)
        kept = int((weights[:3] > 0).sum())
        assert example["keywords_12_3"].tolist() == [*words[:kept].tolist(), *[0] * (3 - kept)]
        torch.testing.assert_close(example["keywords_12_3_shares"].double(), weights[:3] / weights[:3].sum())


def test_the_weights_of_words_are_those_of_the_formula() -> None:
    """Length-one rows of tf (1 + ln((1 + M) / (1 + df))). "is" is a stop word, and "bad" is in one text only."""
    some = texts([{"text": text} for text in ("good good thing1", "thing1 is good", "thing1", "bad")])
    Keywords(words=9, most=2).prepare(some, 0)
    good, thing = 1 + math.log(5 / 3), 1 + math.log(5 / 4)
    expected = [
        ([0, 1], [2 * good / (2 * good + thing), thing / (2 * good + thing)]),
        ([0, 1], [good / (good + thing), thing / (good + thing)]),
        ([1, 0], [1.0, 0.0]),
        ([0, 0], [0.0, 0.0]),
    ]
    for example, (words, shares) in zip(some, expected, strict=True):
        assert example["keywords_9_2"].tolist() == words
        assert example["keywords_9_2_shares"].tolist() == pytest.approx(shares, rel=1e-6)


def test_the_loss_of_keywords_counts_the_texts_that_have_some() -> None:
    own, objective = encoder().eval(), Keywords(words=9, most=2)
    some = texts([{"text": text} for text in ("good good thing1", "thing1 is good", "thing1", "bad")])
    head, batch = prepared(objective, some, own)
    logs = head(own.pool(batch)).log_softmax(1).detach()
    assert logs.shape[1] == 2
    shares = torch.stack([example["keywords_9_2_shares"] for example in some])
    total = sum(float(shares[k, 0] * logs[k, w] + shares[k, 1] * logs[k, 1 - w]) for k, w in ((0, 0), (1, 0), (2, 1)))
    assert objective.loss(own, head, batch).item() == pytest.approx(-total / 3, rel=1e-5)
    none = {key: value[3:] for key, value in batch.items()}
    assert objective.loss(own, head, none).item() == 0.0


def test_topics_separate_texts_without_common_words() -> None:
    words = ("good fine great", "bad poor awful", "thing1 thing2 thing3")
    some = texts([{"text": " ".join(words[k % 3].split()[: 2 + k % 2])} for k in range(30)])
    objective = TopicClusters(clusters=9)
    objective.prepare(some, 0)
    clusters = [example["topic_clusters_9"] for example in some]
    assert objective.remarks == ["9 clusters reduced to 3: the corpus has 30 texts"]
    assert len({clusters[0], clusters[1], clusters[2]}) == 3
    assert clusters == clusters[:3] * 10
    objective.prepare(some, 2**40)
    assert len({example["topic_clusters_9"] for example in some}) == 3


def test_lengths_are_standardised_logarithms() -> None:
    some = texts([{"text": text} for text in ("good", "good bad", "good  bad good bad", "a b c d e f g h")])
    objective, own = SentenceLength(), encoder().eval()
    head, batch = prepared(objective, some, own)
    step = 2 / math.sqrt(5)  # the deviation of 0, 1, 2, 3 is sqrt(5) / 2
    lengths = [(k - 1.5) * step for k in range(4)]
    assert [example["sentence_length"] for example in some] == pytest.approx(lengths)
    guesses = head(own.pool(batch)).squeeze(1).tolist()
    expected = sum((guess - length) ** 2 for guess, length in zip(guesses, lengths, strict=True)) / 4
    assert objective.loss(own, head, batch).item() == pytest.approx(expected, rel=1e-5)


def test_autocast_does_not_round_lengths() -> None:
    objective, own = SentenceLength(), encoder().eval()
    head, batch = prepared(objective, corpus(), own)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    expected = batch["sentence_length"].square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(objective.loss(own, head, batch).detach(), expected)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_targets_are_the_same_each_time(name: str) -> None:
    first, second = corpus(), corpus()
    for some in (first, second):
        make_objective(name, tokenizer()).prepare(some, 3)
    assert first[0].keys() > corpus()[0].keys()
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one if key != "text")


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_targets_need_a_corpus_that_keeps_them(name: str) -> None:
    dataset = datasets.Dataset.from_list(list(corpus()))
    with pytest.raises(
        ValueError, match=rf"{name} attaches .* a Dataset, creates .* from_dataset\(dataset, label=None\)"
    ):
        make_objective(name, tokenizer()).prepare(dataset, 0)


@pytest.mark.parametrize("name", OF_DOCUMENTS)
def test_objectives_on_documents_name_the_remedy(name: str) -> None:
    objective = OBJECTIVES[name](tokenizer())
    with pytest.raises(
        ValueError, match=rf"{name} needs sentences .* read_corpus\(path\)\.sentences\(\), or --sentences"
    ):
        objective.prepare(texts([{"text": "good"}, {"text": "bad"}]), 0)
    with pytest.raises(ValueError, match=rf"{name}: every document of the corpus is a single sentence; give documents"):
        objective.prepare(documents(1, 1, 1), 0)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: SentencePosition(parts=1), "parts must be at least 2; got 1"),
        (lambda: SameDocument(temperature=0.0), "temperature must be above 0; got 0.0"),
        (lambda: Keywords(words=1), "words must be at least 2; got 1"),
        (lambda: Keywords(most=0), "most must be at least 1; got 0"),
        (lambda: TopicClusters(clusters=1), "clusters must be at least 2; got 1"),
        (
            lambda: TopicClusters().prepare(corpus(19), 0),
            "needs at least 20 texts, but the corpus has 19; give a larger corpus",
        ),
        (lambda: Keywords().prepare(texts([{"text": "the"}] * 3), 0), "keywords: fewer than two words"),
        (lambda: Keywords().prepare(texts([{"text": "good"}] * 3), 0), "keywords: fewer than two words"),
        (lambda: Sections().prepare(documents(3, 3), 0), "sections: no document of the corpus has two headings"),
        (lambda: SentenceLength().prepare(texts([{"text": "so good"}] * 3), 0), "have the same number of words"),
    ],
)
def test_wrong_arguments_and_corpora_are_refused(act: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        act()
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["keywords", "topic_clusters"])
def test_a_head_needs_the_corpus_first(name: str) -> None:
    with pytest.raises(NotPreparedError, match=r"prepare\(corpus, seed\) must run first"):
        make_objective(name, tokenizer()).head(encoder())
