"""Tiny encoders of text with random weights, a tokenizer of a few words, and texts of these words; nothing is fetched."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.settings import Settings
from mlopt.recipes.tapweight.text.data import Texts
from mlopt.recipes.tapweight.text.encoder import TextEncoder
from mlopt.recipes.tapweight.text.objectives import OBJECTIVES, make_objective
from mlopt.recipes.tapweight.text.task import TextTask

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
THINGS = [f"thing{k}" for k in range(20)]
GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]
VOCABULARY = [*SPECIAL, *THINGS, *GOOD, *BAD, "is", "not", "the", "and"]

SETTINGS = Settings(batch_size=8, task_batch_size=8, valid_batch_size=8, epochs=2, measurements=2)
_SIZE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
_KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "bert": (BertConfig, {}),
    "roberta": (RobertaConfig, {"type_vocab_size": 1}),
    "deberta-v2": (DebertaV2Config, {
        "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
    }),
    "modernbert": (ModernBertConfig, {
        "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "mlp_dropout": 0.1,
    }),
}  # fmt: skip
KINDS = list(_KINDS)


def tokenizer(vocabulary: Sequence[str] = VOCABULARY, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, with BERT's special tokens."""
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{k: v for k, v in {**names, **options}.items() if v})


def model(kind: str = "bert", *, masked: bool = False, seed: int = 0, **more: Any) -> Any:
    """Return a tiny model with random weights."""
    torch.manual_seed(seed)
    config, options = _KINDS[kind]
    return (AutoModelForMaskedLM if masked else AutoModel).from_config(config(**{**_SIZE, **options, **more}))


def save(folder: Path, own: Any) -> None:
    """Write a model with the tokenizer as a checkpoint."""
    for part in (own, tokenizer()):
        part.save_pretrained(folder)


def encoder(kind: str = "bert", **more: Any) -> TextEncoder:
    """Return a tiny encoder with random weights."""
    return TextEncoder(model(kind, **more), tokenizer(), max_length=16)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return texts, labelled by the kindness of their adjectives."""
    draw = random.Random(seed)
    made = []
    for k in range(count):
        kind = (GOOD, BAD)[k % 2]
        words = [
            x for _ in range(draw.randint(1, 3)) for x in ("the", draw.choice(THINGS), "is", draw.choice(kind), "and")
        ]
        made.append((" ".join(words[:-1]), ("kind", "unkind")[k % 2]))
    return made


def texts(examples: Sequence[dict[str, Any]], source: str = "made") -> Texts:
    return Texts(examples=tuple(examples), rows=tuple(range(len(examples))), source=source)


def corpus(count: int = 24, seed: int = 9) -> Texts:
    """Return texts with places, as if each three of them were the sentences of a document whose first two have headings."""
    headings = ("METHODS ", "RESULTS ", "")
    made = [
        {"text": headings[k % 3] + text, "document": k // 3, "position": k % 3, "count": min(3, count - k // 3 * 3)}
        for k, (text, _) in enumerate(sentences(count, seed))
    ]
    return texts(made)


def splits(count: int = 24) -> dict[str, Texts]:
    return {
        split: texts([{"text": text, "label": label} for text, label in sentences(count, seed)], split)
        for seed, split in enumerate(("train", "valid", "test"))
    }


def task(own: TextEncoder, count: int = 24, **options: Any) -> TextTask:
    return TextTask(splits(count), own.collate, **options)


def tapweight(own: TextEncoder, objectives: Sequence[str] = tuple(OBJECTIVES), **arguments: Any) -> TapWeight:
    made = [make_objective(name, own.tokenizer) for name in objectives]
    return TapWeight(
        own, made, arguments.pop("task", None) or task(own), corpus(), **{"settings": SETTINGS, **arguments}
    )


def write_glue(cache: Path, name: str, columns: dict[str, list[Any]], features: Any) -> None:
    """Write a task of GLUE into the cache of `datasets`."""
    import datasets

    from mlopt.recipes.tapweight.text.glue_tasks import GLUE

    folder = cache / "nyu-mll___glue" / name / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    splits = {}
    for split in ("train", GLUE[name].labelled):
        dataset = datasets.Dataset.from_dict(columns, features=features)
        with datasets.arrow_writer.ArrowWriter(features=features, path=str(folder / f"glue-{split}.arrow")) as writer:
            for row in dataset:
                writer.write(row)
            count, size = writer.finalize()
        splits[split] = datasets.SplitInfo(split, num_bytes=size, num_examples=count, dataset_name="glue")
    datasets.DatasetInfo(
        builder_name="parquet", dataset_name="glue", config_name=name, version="0.0.0",
        splits=datasets.SplitDict(splits, dataset_name="glue"), features=features,
    ).write_to_directory(str(folder))  # fmt: skip
