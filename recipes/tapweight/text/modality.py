"""Text as a modality: `mlopt tapweight text`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import attrs
import torch
from tyro.conf import arg

from mlopt.rng import seed_everything
from mlopt.validation import at_least

from .. import settings
from ..command import command
from ..idle import Idle
from ..metrics import MetricName
from ..modality import Configuration, Device, LabelledData, Modality, objectives_field, objectives_option
from ..recipe import TapWeight
from ..splits import listed_split, named_split
from ..tables import table_of
from .chunks import chunked
from .data import Texts, read_corpus, read_table
from .encoder import TextEncoder
from .multi import MultiTextTask
from .objectives import DEFAULT, OBJECTIVES, make_objective
from .splitting import Method, divided, meanings, remarks_of
from .task import TextTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..examples import Skipped
    from ..labels import Kind, Labels
    from ..task import Split
    from .on_texts import OnTexts

__all__ = ["Data", "EncoderSettings", "Settings", "TextConfiguration", "TextModality", "main"]


#: The fewest tokens of a text if no length is named: corpora are longer than the texts of some tasks.
_SHORTEST = 128


@attrs.frozen(kw_only=True)
class Data(LabelledData):
    """The texts: an unlabelled corpus to pretrain on, and the labelled ones of the task.

    Args:
        corpus: unlabelled texts to pretrain on: .txt with a document a line, or a table (.csv, .tsv, .jsonl, .json, .parquet)
            with a column "text"; also compressed (.gz, .xz, .bz2, .zip). Documents that are too long for the encoder are divided.
        corpus_limit: the number of texts of the corpus to read, from its start.
        sentences: split each text of the corpus into sentences, an example each; sentence_position, same_document and
            sections require it.
        train: labelled texts: a table as for --corpus, or a folder of a data set (`datasets`), with a column "text" (or "text_a"
            and "text_b") and a column "label". They are split into training, validation and test, unless --valid and --test are
            given, or the folder has a data set for each.
        valid: labelled texts for validation; requires --test.
        test: labelled texts for the final score; requires --valid.
        dataset: a task of GLUE in place of --train, such as cola, mrpc or stsb; fetched if it is missing.
        text: the column of the text, or the two columns of a pair.
        labels: the column of the label, or of lists of labels; or several columns, all of two classes or all of numbers.
        missing: cells that mean a missing label, in addition to empty ones, such as -1; a row without any label is left out.
        kind: classification if the labels are classes, regression if they are numbers.
        metric: the score: accuracy, f1, macro_f1, micro_f1, matthews, roc_auc or pr_auc for classification, pearson, spearman,
            rmse, mae or r2 for regression. Of several columns, their mean.
        class_weights: balanced weighs each class in the loss of the task by the inverse of its frequency.
        split: how --train is split: at random with equal shares of each class (stratified), or at random.
        split_fractions: the fractions of training, validation and test.
        split_column: the column that names the split of each text: train, valid or test.
        splits: a splits.json of an earlier run on the same --train.
        strict: stop at an empty text or a missing label in --corpus or the labelled files, instead of leaving its row out.
    """

    beside_dataset: ClassVar[tuple[str, ...]] = (
        *LabelledData.beside_dataset, "text", "split", "split_fractions", "splits"
    )  # fmt: skip

    corpus: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the texts of --train)")] = None
    sentences: bool = False
    text: Annotated[
        tuple[str, ...] | None,
        arg(metavar="COLUMN [COLUMN]", help_behavior_hint='(default: "text", or a pair\'s columns)'),
    ] = None
    labels: Annotated[
        tuple[str, ...] | None,
        arg(metavar="COLUMN [COLUMN ...]", aliases=["--label"], help_behavior_hint='(default: "label" or "labels")'),
    ] = None
    metric: Annotated[
        MetricName | None,
        arg(
            metavar="NAME",
            help_behavior_hint="(default: accuracy, micro_f1 or pearson; of several columns roc_auc or rmse)",
        ),
    ] = None
    split: Method = "stratified"

    @classmethod
    def idle(cls) -> Iterator[Idle]:
        """Yield the options of the data that have no effect in some runs."""
        yield from super().idle()
        yield Idle(
            ("strict",),
            lambda run: run.data.dataset is not None and run.data.corpus is None,
            "on the data set of --dataset",
            "give --corpus",
        )


@attrs.frozen(kw_only=True)
class EncoderSettings:
    """The encoder that is pretrained further, and its tokenizer.

    Args:
        model: an encoder of transformers, such as BERT, RoBERTa or DeBERTa: a folder, or a name on the Hugging Face hub. Its own
            code is never run.
        pooling: the representation of a text: the mean over its tokens, or its first token.
        head: the head of the task: a linear layer on the representation, or the classifier that transformers has for the encoder.
            AutoModelForSequenceClassification loads the latter with the encoder from the folder model of the result.
        max_length: tokens of a text, special ones counted; the rest is cut off. By default the length of the longest labelled
            text, at least 128, at most what the model takes.
        layers: the number of the encoder's layers to keep, from the first.
        dtype: the dtype of the weights. Adam's steps on bfloat16 weights are rounded.
        attention: how attention is computed: sdpa if the encoder has it, or eager.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    model: Annotated[str | None, arg(metavar="FOLDER|NAME", help_behavior_hint="(required)")] = None
    pooling: Literal["mean", "cls"] = "mean"
    head: Literal["linear", "classifier"] = "linear"
    max_length: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: that of the labelled texts)")] = (
        attrs.field(default=None, validator=attrs.validators.optional(at_least(3)))
    )
    layers: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = attrs.field(
        default=None, validator=attrs.validators.optional(at_least(1))
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Annotated[
        Literal["sdpa", "eager"] | None, arg(metavar="{sdpa,eager}", help_behavior_hint="(default: the encoder's)")
    ] = None
    gradient_checkpointing: bool = False


@attrs.frozen(kw_only=True)
class Settings(settings.Settings):
    """The numbers of a run on text: those of the recipe, with defaults for transformers."""

    batch_size: int = attrs.field(default=16, validator=at_least(2))
    task_batch_size: int = attrs.field(default=16, validator=at_least(1))
    valid_batch_size: int = attrs.field(default=32, validator=at_least(1))
    pretraining_lr: float = attrs.field(default=5e-5, validator=at_least(0.0))
    finetuning_lr: float = attrs.field(default=5e-5, validator=at_least(0.0))
    epochs: int = attrs.field(default=5, validator=at_least(1))
    finetune_lr: float = attrs.field(default=5e-5, validator=at_least(0.0))


@attrs.frozen(kw_only=True)
class TextConfiguration(Configuration[Data, EncoderSettings]):
    """A whole run on text."""

    required: ClassVar[tuple[str, ...]] = ("output", "encoder.model")

    objectives: Annotated[tuple[str, ...], objectives_option(tuple(OBJECTIVES))] = objectives_field(
        tuple(OBJECTIVES), DEFAULT
    )
    data: Data = attrs.field(factory=Data)
    settings: Settings = attrs.field(factory=Settings)
    encoder: EncoderSettings = attrs.field(factory=EncoderSettings)

    def resolved(self, *, output: Path, seeds: tuple[int, ...], device: Device) -> Self:
        """Return the configuration with absolute paths, also that of a model that is a folder."""
        whole = super().resolved(output=output, seeds=seeds, device=device)
        folder = Path(self.encoder.model or "")
        if not folder.is_dir():
            return whole
        return attrs.evolve(whole, encoder=attrs.evolve(self.encoder, model=str(folder.absolute())))


@attrs.frozen(kw_only=True)
class _Labelled:
    """The labelled texts of a task, and its options; of a file that was divided, the labels and the rows left out."""

    splits: dict[Split, Texts]
    metric: str | None
    kind: Kind | None
    labels: tuple[Labels, ...] = ()
    remarks: tuple[str, ...] = ()
    divided: tuple[tuple[str, tuple[Skipped, ...]], ...] = ()

    @property
    def skipped(self) -> list[tuple[str, tuple[Skipped, ...]]]:
        """The rows left out of each file."""
        return [*self.divided, *((texts.source, texts.skipped) for texts in self.splits.values())]


class TextModality(Modality[TextConfiguration]):
    """Texts and pairs of texts: an encoder of transformers, and classes or numbers to predict."""

    name, extra = "text", "text"
    summary = "Pretrain a text encoder further for a task, and learn the weight of each objective."
    configuration_class = TextConfiguration

    def read(self, say: Callable[[str], None]) -> None:
        """Read the labelled texts and the corpus, and check that the encoder and the tasks can be built."""
        data, seeds = self.configuration.data, self.configuration.seeds
        files = data.files(say)
        self._read = {seed: self._labelled(seed, files) for seed in seeds}
        self._corpus = None
        if data.corpus is not None:
            self._corpus = read_corpus(data.corpus, strict=data.strict, limit=data.corpus_limit)
        self._max_length = self.configuration.encoder.max_length
        encoder = self._encoder(seeds[0])
        if self._max_length is None:
            self._max_length = encoder.max_length = self._chosen_length(encoder, say)
        for seed in seeds:
            self._task(seed, encoder)
        self.skipped = [*self._read[seeds[0]].skipped]
        if self._corpus is not None:
            self.skipped.append((self._corpus.source, self._corpus.skipped))
        corpus = self._corpus_of(seeds[0], encoder)
        say(f"Corpus: {'; '.join([corpus.summary(), *encoder.collate.remark(corpus, corpus.name)])}.")

    def build(self, seed: int, device: str) -> TapWeight:
        """Return the recipe of a seed."""
        encoder = self._encoder(seed).to(device)
        return TapWeight(
            encoder,
            [make_objective(name, encoder.tokenizer) for name in self.configuration.objectives],
            self._task(seed, encoder),
            self._corpus_of(seed, encoder),
            settings=self.configuration.settings,
            seed=seed,
        )

    def _labelled(self, seed: int, files: dict[Split, Path]) -> _Labelled:
        """Read the labelled texts, and divide those of one file."""
        data = self.configuration.data
        if data.dataset is not None:
            from .glue_tasks import glue

            splits, metric = glue(data.dataset, seed=seed)
            return _Labelled(splits=splits, metric=data.metric or metric, kind=data.kind)
        options: dict[str, Any] = {
            "text": data.text,
            "label": data.labels,
            "missing": data.missing,
            "strict": data.strict,
        }
        texts = {split: read_table(file, **options) for split, file in files.items()}
        if "valid" in texts:
            return _Labelled(splits=texts, metric=data.metric, kind=data.kind)
        whole = texts["train"]
        labels = meanings(whole, data.kind)
        if data.splits is not None:
            parts = listed_split(data.splits, whole.source, whole.record_numbers())
        elif data.split_column is not None:
            parts = named_split(table_of(data.train), data.split_column, whole.record_numbers())
        else:
            parts = divided(whole, labels, data.split, data.split_fractions, seed=seed)
        return _Labelled(
            splits={split: whole.subset(rows) for split, rows in parts.items()},
            metric=data.metric,
            # Those of the whole file: a split may lack a rare class, or all numbers that are not whole.
            kind="regression" if labels[0].form == "numbers" else data.kind,
            labels=labels,
            remarks=tuple(remarks_of(whole, labels)),
            divided=((whole.source, whole.skipped),),
        )

    def _task(self, seed: int, encoder: TextEncoder) -> OnTexts:
        read, data = self._read[seed], self.configuration.data
        options: dict[str, Any] = {
            "kind": read.kind,
            "metric": read.metric,
            "remarks": read.remarks,
            "head": self.configuration.encoder.head,
            "class_weights": data.class_weights,
        }
        if len(read.splits["train"].label_names) > 1:
            return MultiTextTask(read.splits, encoder.collate, labels=read.labels, **options)
        classes = read.labels[0].classes if read.labels else ()
        return TextTask(read.splits, encoder.collate, classes=classes, **options)

    def _chosen_length(self, encoder: TextEncoder, say: Callable[[str], None]) -> int:
        """Return the tokens of the longest labelled text, at least 128, at most what the encoder takes; say so if it is more."""
        splits = self._read[self.configuration.seeds[0]].splits.values()
        longest = max(max(encoder.collate.lengths(texts)) for texts in splits)
        chosen = min(encoder.max_length, max(_SHORTEST, longest))
        if chosen > _SHORTEST:
            say(
                f"Length: {chosen} tokens, as the longest labelled text needs and the encoder allows; --max-length sets another."
            )
        return chosen

    def _corpus_of(self, seed: int, encoder: TextEncoder) -> Texts:
        """Return the corpus, by default the task's own training texts, in examples that objectives may attach targets to."""
        data = self.configuration.data
        corpus = self._corpus
        if corpus is None:
            own = self._read[seed].splits["train"].unlabelled()
            corpus = own.subset(range(len(own))[: data.corpus_limit])
        return corpus.sentences() if data.sentences else chunked(corpus.copy(), encoder.collate)

    def _encoder(self, seed: int) -> TextEncoder:
        """Return the encoder; weights that its checkpoint lacks, such as a pooler's, are drawn by the seed."""
        section = self.configuration.encoder
        assert section.model is not None  # checked
        options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
        if section.layers is not None:
            options["num_hidden_layers"] = section.layers
        if section.attention is not None:
            options["attn_implementation"] = section.attention
        seed_everything(seed)
        encoder = TextEncoder.load(section.model, pooling=section.pooling, max_length=self._max_length, **options)
        if section.gradient_checkpointing:
            encoder.recompute_activations()
        return encoder


main = partial(command, TextModality)
