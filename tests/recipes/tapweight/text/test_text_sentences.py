"""Splitting documents into sentences, and a corpus of sentences with their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlopt.recipes.tapweight.text.data import read_corpus
from mlopt.recipes.tapweight.text.sentences import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["Nets are deep.", "Are they wide?", "They are!", "End"],
        ["We follow Lee et al. Their loss is Eq. A and Fig. B, cf. Smith.", "It works."],
        ["Methods (e.g. Adam) by J. Smith of the U.S. Army, i.e. Adam vs. SGD, win.", "Dr. No lost."],
        ["The value is 3.5 on p. 4 of v2.0 in gpt.Model.", "Still, 0.05 is low."],
        ['He said "no."', '"Yes," she said.', "(We agree.)", "“Good.”", "Ärzte helfen.", "И мы."],
        ["Why?!", "We wait...", "Then we go."],
        ["no capitals. here. at all. none"],
    ],
)
def test_prose_is_split_after_marks_before_capitals(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["Rats were treated .", "All 3.5 of group I .", "Patients died ; p = 0.05 ( n = 4 ) .", "Why ?", "We know ."],
        ["They got 5 mg i.v . Ringer .", "Others ( METH , i.p . ) .", "Results : A vs . B by Lee et al . Smith ."],
        ["( See below . )", "[ NaCl ] rose .", '" Yes , " she said .'],
        ["of them . carbachol ( e.g . normal ) . 37 ( 59 % ) stayed ."],
    ],
)
def test_tokens_joined_by_spaces_are_split(sentences: list[str]) -> None:
    assert split_sentences("  ".join(sentences)) == sentences


def test_a_text_without_ends_is_one_sentence_and_no_text_none() -> None:
    review = "a film without any marks I think it is Good and long"
    assert split_sentences(f" {review}\n") == [review]
    assert split_sentences(" \n") == []


def test_sentences_keep_their_places_and_the_row_of_their_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A rose. It is red. Fine\n\nno capital. here\nOne . Two .\n")
    texts = read_corpus(tmp_path / "a.txt")
    sentences = texts.sentences()
    places = [(e["text"], e["document"], e["position"], e["count"]) for e in sentences]
    assert places == [
        ("A rose.", 0, 0, 3),
        ("It is red.", 0, 1, 3),
        ("Fine", 0, 2, 3),
        ("no capital. here", 1, 0, 1),
        ("One .", 2, 0, 2),
        ("Two .", 2, 1, 2),
    ]
    assert sentences.rows == (1, 1, 1, 3, 4, 4)
    assert sentences.summary() == "6 sentences of a.txt"
    assert sentences[:2].copy().summary() == "2 sentences of a.txt"
    assert texts.summary() == "3 texts of a.txt"
    assert list(texts) == [{"text": text} for text in ("A rose. It is red. Fine", "no capital. here", "One . Two .")]
