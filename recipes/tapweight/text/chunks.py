"""Divide documents that are longer than an encoder takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from .sentences import split_sentences

if TYPE_CHECKING:
    from .batches import Collate, Example
    from .data import Texts

__all__ = ["chunked"]


def chunked(texts: Texts, collate: Collate) -> Texts:
    """Return a corpus in which each document that is longer than the encoder takes is divided into chunks.

    A chunk has as many sentences as fit. A sentence that does not fit by itself is halved between words until its parts do. No
    word is lost. Texts that fit stay as they are.

    Args:
        texts: single texts without labels.
        collate: of the encoder.
    """
    lengths = collate.lengths(texts)
    long = sum(length > collate.max_length for length in lengths)
    if not long:
        return texts
    examples: list[Example] = []
    rows: list[int] = []
    for example, row, length in zip(texts.examples, texts.rows, lengths, strict=True):
        parts = [example["text"]] if length <= collate.max_length else _chunks(example["text"], collate)
        examples += [{**example, "text": part} for part in parts]
        rows += [row] * len(parts)
    note = f"{long} documents are longer than {collate.max_length} tokens and are divided"
    return attrs.evolve(texts, examples=tuple(examples), rows=tuple(rows), records=(), notes=(*texts.notes, note))


def _chunks(text: str, collate: Collate) -> list[str]:
    """Return the chunks of a document."""
    parts = [part for sentence in split_sentences(text) for part in _pieces(sentence, collate)]
    chunks = parts[:1]
    for part in parts[1:]:
        joined = f"{chunks[-1]} {part}"
        if _fits(joined, collate):
            chunks[-1] = joined
        else:
            chunks.append(part)
    return chunks


def _pieces(sentence: str, collate: Collate) -> list[str]:
    """Return a sentence, halved between words until its parts fit; a word that is too long is cut by the encoder."""
    words = sentence.split()
    if len(words) < 2 or _fits(sentence, collate):
        return [sentence]
    half = len(words) // 2
    return [piece for part in (words[:half], words[half:]) for piece in _pieces(" ".join(part), collate)]


def _fits(text: str, collate: Collate) -> bool:
    return collate.lengths([{"text": text}])[0] <= collate.max_length
