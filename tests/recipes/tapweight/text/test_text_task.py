"""Tasks on text: kinds, labels, losses and metrics."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_cases import encoder, sentences, splits, task, texts
from torch.nn.functional import cross_entropy

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.metrics import METRICS
from mlopt.recipes.tapweight.text.data import Texts
from mlopt.recipes.tapweight.text.task import SplitScore, TextTask


def labelled(*labels: Any, source: str = "made", pairs: bool = False) -> Texts:
    more = {"text_b": "bad"} if pairs else {}
    return texts([{"text": "good", **more, "label": label} for label in labels], source)


def of(train: Texts, valid: Texts | None = None, test: Texts | None = None, **options: Any) -> TextTask:
    return TextTask({"train": train, "valid": valid or train, "test": test or train}, encoder().collate, **options)


def test_classes_are_those_of_the_training_labels_in_order() -> None:
    assert of(labelled("b", "a", "c", "a")).classes == ("a", "b", "c")
    assert of(labelled(10, 9, -1)).classes == ("-1", "9", "10")
    assert of(labelled("1", "0", " 1 "), labelled(0, 1.0)).classes == ("0", "1")
    made = of(labelled("b", "a"), labelled("a", "b", "b"))
    assert [example["label"] for example in made.splits["valid"]] == [0, 1, 1]
    assert made.targets(made.collate(list(made.splits["valid"]))).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (("a", "b"), "classification"),
        (("NA", "EU", "nan"), "classification"),
        (("NA", "EU", "AS", "1"), "classification"),
        ((0, 1, 2), "classification"),
        (("0", "1"), "classification"),
        ((True, False), "classification"),
        ((0.5, 1, 2), "regression"),
        (("0.5", "1"), "regression"),
    ],
)
def test_the_kind_is_inferred_from_the_labels(labels: tuple[Any, ...], kind: str) -> None:
    assert of(labelled(*labels)).kind == kind


def test_examples_of_the_same_texts_have_the_same_key() -> None:
    rows = [("good", "bad"), (" good", "bad "), ("good", "worse"), ("good bad", "")]
    pairs = texts([{"text": a, "text_b": b, "label": k % 2} for k, (a, b) in enumerate(rows)], "made")
    first, second, third, fourth = of(pairs).keys("train")
    assert first == second
    assert len({first, third, fourth}) == 3


def test_classes_can_be_named_if_a_split_lacks_some() -> None:
    made = of(labelled("b", "a"), labelled("c"), classes=("c", "b", "a"))
    assert made.classes == ("c", "b", "a")
    assert [example["label"] for example in made.splits["valid"]] == [0]
    with pytest.raises(DataError, match="'b' is not one of the classes, a, c"):
        of(labelled("b", "a"), classes=("a", "c"))


def test_the_labels_of_the_texts_are_not_changed() -> None:
    train = labelled("b", "a")
    of(train)
    assert [example["label"] for example in train] == ["b", "a"]


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (
            lambda: of(labelled("a", "b"), labelled("a", "c", source="dev.jsonl")),
            "dev.jsonl, row 1, column 'label': 'c' is not one of",
        ),
        (
            lambda: of(labelled("a", "b"), None, labelled(1, source="t.csv")),
            "t.csv, row 0, column 'label': '1' is not one",
        ),
        (lambda: of(labelled(0.5, 1), labelled("x", source="d")), "d, row 0, column 'label': 'x' is not a number"),
        (lambda: of(labelled(0.5, 1), labelled(math.inf, source="d")), "d, row 0, column 'label': inf is not finite"),
        (
            lambda: of(labelled(0.5, 1, 10**400)),
            f"made, row 2, column 'label': 1{'0' * 199}... is not finite; correct it",
        ),
        (
            lambda: of(labelled(0.5, 1, 10**5000)),
            "made, row 2, column 'label': <int too large to be shown> is not finite",
        ),
        (lambda: of(labelled(0.5, 1, "inf")), "made, row 2, column 'label': 'inf' is not finite; correct it"),
        (
            lambda: of(labelled(0.5, "nan", 1)),
            "made, row 1, column 'label': 'nan' is a missing label, which --missing 'nan' leaves out; correct it,",
        ),
        (
            lambda: of(labelled("0.5", "1", " NaN")),
            "made, row 2, column 'label': ' NaN' is a missing label, which --missing ' NaN' leaves out",
        ),
        (
            lambda: of(labelled(0, 1, "NA")),
            "made, row 2, column 'label': 'NA' is a missing label, which --missing 'NA' leaves out",
        ),
        (
            lambda: of(labelled("0", "n/a"), kind="classification"),
            "made, row 1, column 'label': 'n/a' is a missing label, which --missing 'n/a' leaves out",
        ),
        (
            lambda: of(labelled(0.5, 1), labelled("null", source="d")),
            "d, row 0, column 'label': 'null' is a missing label, which --missing 'null' leaves out",
        ),
        (
            lambda: of(labelled(0, 1, pairs=True), None, labelled(0, 1, source="t.csv")),
            "t.csv: 'test' has single texts, 'train' has pairs; give all the same columns",
        ),
        (lambda: of(labelled(0, 1), labelled(0, 1, source="v.csv", pairs=True)), "v.csv: 'valid' has pairs, 'train'"),
        (lambda: of(labelled("a", "a")), "made: all labels are 'a', so nothing can be learned"),
        (lambda: of(labelled(2, 2), kind="regression"), "made: all labels are 2, so nothing can be learned"),
        (lambda: of(labelled("a", "b"), kind="regression"), "made, row 0, column 'label': 'a' is not a number"),
        (
            lambda: of(labelled("a", "b"), kind="ranking"),
            "kind='ranking': give classification or regression with --kind",
        ),
        (
            lambda: of(labelled("a", "b"), metric="pearson"),
            "metric='pearson' does not fit classification; give 'accuracy' or 'macro_f1' or 'micro_f1' or",
        ),
        (
            lambda: of(texts([{"text": "good"}] * 2)),
            "made: there are no labels, but a task needs them; name their column with --labels",
        ),
        (lambda: TextTask({"train": labelled(0, 1)}, encoder().collate), "splits=['train']: give 'train', 'valid' and"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_a_sentence(act, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        act()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pairs", [False, True])
def test_numbers_are_never_broadcast_over_the_batch(pairs: bool) -> None:
    """The shapes are those of STS-B: (B, 1) against (B,) would broadcast to (B, B) and train towards the batch's mean."""
    own = encoder().eval()
    made = of(labelled(0.5, 1.0, 2.0, 4.5, pairs=pairs))
    batch = made.collate(list(made.splits["train"]))
    head = made.head(own)
    outputs = made.outputs(own, head, batch)
    assert outputs.shape == (4,)
    losses = made.losses(outputs, batch)
    mean, std = statistics.fmean([0.5, 1, 2, 4.5]), statistics.pstdev([0.5, 1, 2, 4.5])
    expected = [(float(o) - (y - mean) / std) ** 2 for o, y in zip(outputs.detach(), [0.5, 1, 2, 4.5], strict=True)]
    torch.testing.assert_close(losses.detach(), torch.tensor(expected))
    with pytest.raises(ValueError, match=r"outputs have the shape \(4, 1\) and labels \(4,\)"):
        made.losses(outputs[:, None], batch)
    with pytest.raises(ValueError, match=r"outputs have the shape \(4, 1\)"):
        made.metric().update(outputs[:, None], made.targets(batch))


@pytest.mark.parametrize("name", ["rmse", "mae", "r2"])
def test_the_score_of_numbers_is_in_the_unit_of_the_labels(name: str) -> None:
    own, numbers = encoder().eval(), [110.0, 140.0, 125.0, 185.0]
    some = texts([{"text": f"thing{k} is good", "label": number} for k, number in enumerate(numbers)])
    made = of(some, metric=name, kind="regression")
    head, batch = made.head(own).eval(), made.collate(list(made.splits["test"]))
    outputs = made.outputs(own, head, batch).tolist()
    mean, std = statistics.fmean(numbers), statistics.pstdev(numbers)
    errors = [mean + std * output - number for output, number in zip(outputs, numbers, strict=True)]
    square = statistics.fmean(error**2 for error in errors)
    expected = {
        "rmse": math.sqrt(square),
        "mae": statistics.fmean(map(abs, errors)),
        "r2": 1 - square / std**2,
    }
    # The outputs are float32, and the score of a batch of another size may round differently.
    assert made.score(own, head, "test") == pytest.approx(expected[name], rel=1e-4)
    assert made.score(own, head, "test") == pytest.approx(made.evaluate(own, head, "test")["label"][name], rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "constant", "metric", "word"),
    [
        (("a", "b"), ("b", "b"), "roc_auc", "'b'"),
        (("a", "b", "c"), ("b", "b"), "pr_auc", "'b'"),
        ((0.5, 1.5), (1.5, 1.5), "r2", "1.5"),
        ((["a"], ["b"]), (["b"], ["b"]), "roc_auc", r"\[0.0, 1.0\]"),
    ],
)
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_metric_that_is_undefined_on_a_split_is_refused(
    split: str, labels: tuple[Any, ...], constant: tuple[Any, ...], metric: str, word: str
) -> None:
    """A score of 0 or NaN in every epoch would choose the first."""
    with pytest.raises(
        DataError, match=f"made: all labels of the {split} split are {word}, so its {metric} is undefin"
    ):
        of(labelled(*labels), metric=metric, **{split: labelled(*constant)})
    of(labelled(*labels), **{split: labelled(*constant)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_do_not_round_the_labels_to_the_type_of_the_outputs(dtype: torch.dtype) -> None:
    made = of(labelled(2001.5, 2003.0, 200_000.0, 200_002.5))
    batch = made.collate(list(made.splits["train"]))
    outputs = torch.zeros(4)
    torch.testing.assert_close(made.losses(outputs.to(dtype), batch), made.losses(outputs, batch))


def test_the_loss_of_classes_is_the_cross_entropy() -> None:
    own = encoder().eval()
    made = task(own)
    batch = made.collate(list(made.splits["train"])[:5])
    outputs = made.outputs(own, made.head(own).eval(), batch)
    assert outputs.shape == (5, 2)
    torch.testing.assert_close(made.losses(outputs, batch).mean(), cross_entropy(outputs, batch["label"]))
    with pytest.raises(ValueError, match=r"they must be \(B, C\) and \(B,\)"):
        made.losses(outputs[:, :1], batch)


def by_hand(name: str, predicted: list[int], labels: list[int]) -> float:
    pairs = list(zip(predicted, labels, strict=True))
    right = sum(p == y for p, y in pairs) / len(pairs)
    if name in ("accuracy", "micro_f1"):
        return right
    classes = sorted({*predicted, *labels})
    hits = [sum(p == y == c for p, y in pairs) for c in classes]
    said = [predicted.count(c) for c in classes]
    true = [labels.count(c) for c in classes]
    if name == "macro_f1":
        return statistics.fmean(2 * h / (s + t) for h, s, t in zip(hits, said, true, strict=True))
    n = len(pairs)
    covariance = sum(hits) * n - sum(s * t for s, t in zip(said, true, strict=True))
    spread = math.sqrt((n**2 - sum(s * s for s in said)) * (n**2 - sum(t * t for t in true)))
    return covariance / spread if spread else 0.0


@settings(max_examples=30, deadline=None)
@given(data=st.data(), classes=st.sampled_from([2, 3]), cut=st.integers(1, 29))
@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "micro_f1", "matthews"])
def test_metrics_of_classes_are_those_of_the_whole_split(name: str, data: Any, classes: int, cut: int) -> None:
    some = st.integers(0, classes - 1)
    pairs = data.draw(st.lists(st.tuples(some, some), min_size=2, max_size=30))
    predicted, labels = map(list, zip(*pairs, strict=True))
    metric = SplitScore(METRICS["classes"][name].function, classes)
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes) * 2.0
    for part in (slice(None, cut), slice(cut, None)):
        if len(labels[part]):
            metric.update(logits[part], torch.tensor(labels[part]))
    assert float(metric.compute()) == pytest.approx(by_hand(name, predicted, labels), abs=1e-6)


def test_a_constant_guess_has_zero_correlation_with_two_classes() -> None:
    labels = torch.tensor([1] * 7 + [0] * 3)
    for guess in (0, 1):
        metric = SplitScore(METRICS["classes"]["matthews"].function, 2)
        metric.update(torch.nn.functional.one_hot(torch.full((10,), guess), 2) * 1.0, labels)
        assert float(metric.compute()) == 0.0


def test_correlations() -> None:
    outputs, labels = torch.tensor([0.1, 0.4, 0.2, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for name, expected in (("pearson", statistics.correlation(outputs.tolist(), labels.tolist())), ("spearman", 0.8)):
        metric = SplitScore(METRICS["numbers"][name].function, 0)
        for part in (slice(None, 1), slice(1, None)):
            metric.update(outputs[part], labels[part])
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
        constant = SplitScore(METRICS["numbers"][name].function, 0)
        constant.update(torch.ones(4), labels)
        assert float(constant.compute()) == 0.0


def test_outputs_that_are_not_finite_have_no_score() -> None:
    with pytest.raises(ValueError, match="not finite, so they have no score"):
        task(encoder()).metric().update(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


def test_a_task_is_read_from_three_files(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("dev", 4), ("test", 2)):
        lines = [json.dumps({"text": text, "label": label}) for text, label in sentences(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join([*lines, '{"text": " ", "label": "kind"}']))
    files = [tmp_path / f"{split}.jsonl" for split in ("train", "dev", "test")]
    made = TextTask.from_files(*files, encoder().collate, metric="matthews")
    assert repr(made) == "TextTask(classification: 2 classes; matthews; train 6, valid 4, test 2)"
    assert made.remarks[:2] == [
        "label: two classes, kind, unkind; unkind is the positive one",
        "6 texts of train.jsonl; 1 skipped: row 7 (the text is empty)",
    ]


def test_truncated_texts_are_reported() -> None:
    long = texts([{"text": "good " * 30, "label": "a"}, {"text": "bad", "label": "b"}], "long.csv")
    made = of(long, labelled("a"), labelled("b"))
    assert made.remarks[-1:] == ["1 of 2 texts of long.csv are longer than 16 tokens and are cut off"]
    made = of(long, texts([{"text": "bad " * 30, "label": "a"}], "long.csv"), labelled("b"))
    assert made.remarks[-1:] == ["2 of 3 texts of long.csv are longer than 16 tokens and are cut off"]


def test_texts_that_are_also_in_the_training_split_are_reported() -> None:
    def split(*pairs: tuple[str, str]) -> Texts:
        return texts([{"text": a, "text_b": b, "label": k % 2} for k, (a, b) in enumerate(pairs)])

    train = split(("good", "bad"), ("fine", "bad"))
    made = of(train, split(("bad", "good"), ("good", "fine")), split(("good", "bad"), ("bad", "bad"), ("good", "bad")))
    assert made.remarks == ["2 of 3 test texts are also among the training texts"]
    assert of(train).remarks == [
        "2 of 2 valid texts are also among the training texts",
        "2 of 2 test texts are also among the training texts",
        "2 of 2 test texts are also among the validation texts",
    ]


def test_a_split_is_scored_as_a_whole_and_modes_are_restored() -> None:
    own = encoder()
    made = TextTask(splits(20), own.collate)
    head = made.head(own)
    scores = {made.score(own, head, "test", batch_size=size) for size in (3, 20)}
    assert len(scores) == 1
    assert own.training
    assert own.model.training
