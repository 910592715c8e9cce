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
from ..modality import Configuration, Device, LabelledData, Modality, objectives_field, objectives_option
from ..recipe import TapWeight
from ..splits import random_split
from .data import Texts, read_corpus, read_table
from .encoder import TextEncoder
from .objectives import DEFAULT, OBJECTIVES, make_objective
from .task import TextTask

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..task import Split

__all__ = ["Data", "EncoderSettings", "Settings", "TextConfiguration", "TextModality", "main"]


@attrs.frozen(kw_only=True)
class Data(LabelledData):
    """The texts: an unlabelled corpus to pretrain on, and labelled ones, the task.

    Args:
        corpus: unlabelled texts to pretrain on: .txt with a document a line, or .csv or .jsonl with a column "text"; also gzipped
            (.gz).
        corpus_limit: the number of texts of the corpus to read, from its start.
        sentences: split each text of the corpus into sentences, an example each; sentence_position and same_document require it.
        train: labelled texts: .csv or .jsonl, also gzipped, with a column "text" (or "text_a" and "text_b") and a column
            "label". They are split 8:1:1 into training, validation and test at random unless --valid and --test are given.
        valid: labelled texts for validation; requires --test.
        test: labelled texts for the final score; requires --valid.
        dataset: a task of GLUE in place of --train, such as cola, mrpc or stsb; fetched if it is missing.
        text: the column of the text, or the two columns of a pair.
        label: the column of the label.
        kind: classification if the labels are classes, regression if they are numbers.
        metric: the score: accuracy, macro_f1, micro_f1 or matthews for classification, pearson or spearman for regression.
        class_weights: balanced weighs each class in the loss of the task by the inverse of its frequency.
        strict: stop at an empty text in --corpus or the labelled files, instead of leaving its row out.
    """

    file_options: ClassVar[tuple[str, ...]] = ("valid", "test", "text")

    corpus: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the texts of --train)")] = None
    sentences: bool = False
    text: Annotated[
        tuple[str, ...] | None,
        arg(metavar="COLUMN [COLUMN]", help_behavior_hint='(default: "text", or a pair\'s columns)'),
    ] = None
    label: Annotated[str, arg(metavar="COLUMN")] = "label"
    metric: Annotated[
        Literal["accuracy", "macro_f1", "micro_f1", "matthews", "pearson", "spearman"] | None,
        arg(metavar="NAME", help_behavior_hint="(default: accuracy or pearson)"),
    ] = None


@attrs.frozen(kw_only=True)
class EncoderSettings:
    """The encoder that is pretrained further, and its tokenizer.

    Args:
        model: an encoder of transformers, such as BERT, RoBERTa or DeBERTa: a folder, or a name on the Hugging Face hub. Its own
            code is never run.
        pooling: the representation of a text: the mean over its tokens, or its first token.
        head: the head of the task: a linear layer on the representation, or the classifier that transformers has for the encoder.
            AutoModelForSequenceClassification loads the latter with the encoder from the folder model of the result.
        max_length: tokens of a text, special ones counted; the rest is cut off.
        layers: the number of the encoder's layers to keep, from the first.
        dtype: the dtype of the weights. Adam's steps on bfloat16 weights are rounded.
        attention: how attention is computed: sdpa if the encoder has it, or eager.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    model: Annotated[str | None, arg(metavar="FOLDER|NAME", help_behavior_hint="(required)")] = None
    pooling: Literal["mean", "cls"] = "mean"
    head: Literal["linear", "classifier"] = "linear"
    max_length: int = attrs.field(default=128, validator=at_least(3))
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


class TextModality(Modality[TextConfiguration]):
    """Texts and pairs of texts: an encoder of transformers, and classes or numbers to predict."""

    name, extra = "text", "text"
    summary = "Pretrain an encoder of text further for a task, learning how much each objective should weigh."
    configuration_class = TextConfiguration

    def read(self, say: Callable[[str], None]) -> None:
        """Read the labelled texts and the corpus, and check that the encoder and the tasks can be built."""
        data, seeds = self.configuration.data, self.configuration.seeds
        self._splits = {seed: self._split(seed) for seed in seeds}
        self._corpus = None
        if data.corpus is not None:
            self._corpus = read_corpus(data.corpus, strict=data.strict, limit=data.corpus_limit)
        encoder = self._encoder(seeds[0])
        for seed in seeds:
            self._task(seed, encoder)
        corpus = self._corpus_of(seeds[0])
        say(f"Corpus: {'; '.join([corpus.summary(), *encoder.collate.remark(corpus, corpus.name)])}.")

    def build(self, seed: int, device: str) -> TapWeight:
        """Return the recipe of a seed."""
        encoder = self._encoder(seed).to(device)
        return TapWeight(
            encoder,
            [make_objective(name, encoder.tokenizer) for name in self.configuration.objectives],
            self._task(seed, encoder),
            self._corpus_of(seed),
            settings=self.configuration.settings,
            seed=seed,
        )

    def _split(self, seed: int) -> tuple[dict[Split, Texts], str | None]:
        """Return the labelled texts, and the metric."""
        data = self.configuration.data
        if data.dataset is not None:
            from .glue_tasks import glue

            splits, metric = glue(data.dataset, seed=seed)
            return splits, data.metric or metric
        options: dict[str, Any] = {"text": data.text, "label": data.label, "strict": data.strict}
        files = {"train": data.train, "valid": data.valid, "test": data.test}
        texts = {split: read_table(file, **options) for split, file in files.items() if file is not None}
        if "valid" not in texts:
            parts = random_split(len(texts["train"]), seed=seed)
            texts = {split: texts["train"].subset(rows) for split, rows in parts.items()}
        return texts, data.metric  # type: ignore[return-value]

    def _task(self, seed: int, encoder: TextEncoder) -> TextTask:
        splits, metric = self._splits[seed]
        data, head = self.configuration.data, self.configuration.encoder.head
        return TextTask(
            splits, encoder.collate, kind=data.kind, metric=metric, head=head, class_weights=data.class_weights
        )

    def _corpus_of(self, seed: int) -> Texts:
        """Return the corpus, by default the task's own training texts, in examples that objectives may attach targets to."""
        data = self.configuration.data
        corpus = self._corpus
        if corpus is None:
            own = self._splits[seed][0]["train"].unlabelled()
            corpus = own.subset(range(len(own))[: data.corpus_limit])
        return corpus.sentences() if data.sentences else corpus.copy()

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
        encoder = TextEncoder.load(section.model, pooling=section.pooling, max_length=section.max_length, **options)
        if section.gradient_checkpointing:
            encoder.recompute_activations()
        return encoder


main = partial(command, TextModality)
