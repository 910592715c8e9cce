"""The predictor of a run on text: plain transformers loads it, pairs and numbers, ensembles, weights of classes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from text_cases import KINDS, SETTINGS, encoder, model, sentences, splits, tapweight, task, texts, tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.text import Predictor, TextEncoder, TextTask
from mlopt.recipes.tapweight.text.encoder import ModelError

OBJECTIVES = ("masked_tokens", "contrastive")
TEXTS = ["the thing1 is good", "not the thing2", "awful and poor and bad"]
DIRECT = {"methods": ["direct"], "progress": False}


def logits_of_transformers(folder: Path, inputs: list[str]) -> torch.Tensor:
    """Return the logits of a plain script of transformers."""
    own, words = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return own(**words(inputs, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_the_predictor_with_its_labels(kind: str, tmp_path: Path) -> None:
    own = encoder(kind)
    result = tapweight(own, OBJECTIVES, task=task(own, head="classifier")).fit(1, **DIRECT)
    result.save(tmp_path)
    logits = logits_of_transformers(tmp_path / "model", TEXTS).double().softmax(1).numpy()
    predicted = result.predict(TEXTS).values
    assert np.array_equal(Predictor.load(tmp_path).predict(TEXTS).values, predicted)
    # Tensors that transformers loads may be aligned otherwise in memory, and then round otherwise.
    assert logits == pytest.approx(predicted, rel=1e-6)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "kind", "1": "unkind"}
    assert config["label2id"] == {"kind": 0, "unkind": 1}
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    assert type(loaded).__name__ in config["architectures"]


def test_the_classifier_is_finetuned_with_its_encoder() -> None:
    own = encoder()
    recipe = tapweight(own, OBJECTIVES, task=task(own, head="classifier"))
    result = recipe.fit(1, **DIRECT)
    (first,) = result.finetuned
    start = own.model.state_dict()
    trained = first.model.encoder.model.state_dict()
    # The head of BERT needs the pooler, which a linear head leaves at its start.
    assert not torch.equal(trained["pooler.dense.weight"], start["pooler.dense.weight"])
    assert sum("embeddings" in name for name in first.model.head.state_dict()) == 0


def test_three_levels_learn_through_the_classifier() -> None:
    own = encoder()
    recipe = tapweight(own, OBJECTIVES, task=task(own, head="classifier"))
    weights = recipe.fit(6, methods=["tapweight"], progress=False).weights
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["contrastive"] != weights["masked_tokens"]


def test_an_encoder_without_the_part_that_the_head_needs_is_refused() -> None:
    own = TextEncoder(model("bert", masked=True), tokenizer(), max_length=16)
    with pytest.raises(ModelError, match=r"lacks 'pooler\.dense\.bias', which BertForSequenceClassification needs"):
        task(own, head="classifier").head(own)


@pytest.mark.parametrize("head", ["linear", "classifier"])
def test_a_loaded_ensemble_predicts_the_same_numbers_for_pairs(head: str, tmp_path: Path) -> None:
    pairs = {
        split: texts([{"text": a, "text_b": b, "label": k / 7} for k, ((a, _), (b, _)) in enumerate(drawn)])
        for split, drawn in (
            (name, list(zip(sentences(16, seed), sentences(16, seed + 9), strict=True)))
            for seed, name in enumerate(("train", "valid", "test"))
        )
    }
    own = encoder()
    regression = TextTask(pairs, own.collate, head=head)
    settings = attrs.evolve(SETTINGS, ensemble=3, epochs=1)
    result = tapweight(own, OBJECTIVES, task=regression, settings=settings).fit(1, **DIRECT)
    result.save(tmp_path)
    inputs = [("the thing1", "is good"), ("", "empty"), None, ("not bad", "and fine"), "single"]
    predicted, loaded = result.predict(inputs), Predictor.load(tmp_path).predict(inputs)
    assert predicted.header == loaded.header == ["label_predicted", "label_spread"]
    assert np.array_equal(predicted.values, loaded.values, equal_nan=True)
    assert np.array_equal(predicted.spread, loaded.spread, equal_nan=True)
    assert predicted.reasons == (
        "", "the text is empty", "None is not a pair of texts", "", "'single' is not a pair of texts"
    )  # fmt: skip
    # By hand: each member's standardised output in the unit of the labels.
    batch = own.collate([{"text": a, "text_b": b} for a, b in (inputs[0], inputs[3])])
    mean, std = np.mean([k / 7 for k in range(16)]), np.std([k / 7 for k in range(16)])
    with torch.no_grad():
        numbers = [
            regression.outputs(run.model.encoder.eval(), run.model.head.eval(), batch).double().numpy() * std + mean
            for run in result.finetuned
        ]
    assert len({run.tobytes() for run in numbers}) == 3
    assert predicted.values[[0, 3], 0] == pytest.approx(np.mean(numbers, axis=0), rel=1e-9)
    assert predicted.spread[[0, 3], 0] == pytest.approx(np.std(numbers, axis=0, ddof=1), rel=1e-6)
    assert math.isnan(predicted.values[1, 0])


def test_the_score_of_the_predictor_is_that_of_the_written_classes(tmp_path: Path) -> None:
    own = encoder()
    settings = attrs.evolve(SETTINGS, ensemble=2)
    result = tapweight(own, OBJECTIVES, task=task(own, metric="macro_f1"), settings=settings).fit(1, **DIRECT)
    result.save(tmp_path)
    lines = [line.split(",") for line in (tmp_path / "predictions.csv").read_text().splitlines()]
    columns = dict(zip(lines[0], zip(*lines[1:], strict=True), strict=True))
    assert list(columns["text"]) == [text for text, _ in sentences(24, 2)]
    assert list(columns["label"]) == [label for _, label in sentences(24, 2)]
    score = json.loads((tmp_path / "scores.json").read_text())["predictor"]
    assert score["models"] == 2
    assert score["test"]["label"]["macro_f1"] == pytest.approx(
        f1_score(columns["label"], columns["label_predicted"], average="macro"), abs=1e-6
    )


def test_balanced_classes_weigh_as_in_scikit_learn() -> None:
    own, some = encoder(), splits()
    rare = attrs.evolve(some["train"], examples=some["train"].examples[:9], rows=some["train"].rows[:9])
    plain, balanced = (
        TextTask({**some, "train": rare}, own.collate, class_weights=way) for way in ("none", "balanced")
    )
    labels = [example["label"] for example in plain.splits["train"]]
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert len(set(expected)) == 2
    outputs, batch = torch.randn(9, 2, dtype=torch.float64), {"label": torch.tensor(labels)}
    losses = cross_entropy(outputs, batch["label"], reduction="none")
    assert torch.equal(plain.losses(outputs, batch), losses)
    torch.testing.assert_close(balanced.losses(outputs, batch), losses * torch.from_numpy(expected)[batch["label"]])


@pytest.mark.parametrize("head", ["linear", "classifier"])
def test_a_full_disk_is_an_oserror_that_names_the_folder(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    own = encoder()
    (first,) = tapweight(own, OBJECTIVES, task=task(own, head=head)).fit(1, **DIRECT).predictor.members
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device.*adapted"):
        own.save(tmp_path / "adapted")
    with pytest.raises(OSError, match=r"No space left on device.*model"):
        Predictor([first], task(own, head=head).target()).save(tmp_path / "model")


@pytest.mark.parametrize("head", ["linear", "classifier"])
def test_whoever_may_read_the_folder_may_read_its_tensors(head: str, tmp_path: Path) -> None:
    own = encoder()
    tapweight(own, OBJECTIVES, task=task(own, head=head)).fit(1, **DIRECT).save(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == {"encoder", "model"}
    assert len({path.stat().st_mode for path in files}) == 1


def test_numbers_have_no_weights_of_classes() -> None:
    numbers = {split: texts([{"text": "a", "label": k / 3} for k in range(4)]) for split in ("train", "valid", "test")}
    with pytest.raises(DataError, match="class_weights='balanced' needs classes, but the labels are numbers"):
        TextTask(numbers, encoder().collate, class_weights="balanced")


def test_several_classes_at_once_have_a_probability_each(tmp_path: Path) -> None:
    labelled = {
        split: texts(
            [{"text": text, "label": [k % 2, int("bad" in text)]} for k, (text, _) in enumerate(sentences(24, seed))]
        )
        for seed, split in enumerate(("train", "valid", "test"))
    }
    own = encoder()
    result = tapweight(own, OBJECTIVES, task=TextTask(labelled, own.collate)).fit(1, **DIRECT)
    result.save(tmp_path)
    predictions = Predictor.load(tmp_path).predict(TEXTS)
    assert predictions.header[2:] == ["0_probability", "1_probability"]
    batch = own.collate([{"text": text} for text in TEXTS])
    (run,) = result.finetuned
    with torch.no_grad():
        logits = run.model.head(run.model.encoder.pool(batch)).double()
    assert np.array_equal(predictions.values, logits.sigmoid().numpy())
    assert predictions.decisions == [tuple(str(int(p >= 0.5)) for p in row) for row in predictions.values]


def test_plain_transformers_loads_a_predictor_of_several_classes_at_once(tmp_path: Path) -> None:
    labelled = {
        split: texts(
            [{"text": text, "label": ["cs", "bio"][: k % 3]} for k, (text, _) in enumerate(sentences(24, seed))]
        )
        for seed, split in enumerate(("train", "valid", "test"))
    }
    own = encoder()
    several = TextTask(labelled, own.collate, head="classifier")
    result = tapweight(own, OBJECTIVES, task=several).fit(1, **DIRECT)
    result.save(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("multi_label_classification", {"0": "bio", "1": "cs"})
    probabilities = logits_of_transformers(tmp_path / "model", TEXTS).double().sigmoid().numpy()
    predicted = result.predict(TEXTS)
    assert probabilities == pytest.approx(predicted.values, rel=1e-6)
    assert predicted.header == ["bio_predicted", "cs_predicted", "bio_probability", "cs_probability"]
