"""Sections: predict from which section of its document a sentence comes, in documents with headings in capital letters."""

from __future__ import annotations

from itertools import groupby, takewhile
from typing import TYPE_CHECKING, cast

from torch.nn.functional import cross_entropy

from ...files import DataError
from ...objective import Objective, prepared
from ..heads import LinearHead
from .targets import attach, require_places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch, Collate, Example
    from ..encoder import TextEncoder

#: The sections of a structured abstract, with the words of their headings.
SECTIONS = {
    "background": "BACKGROUND INTRODUCTION CONTEXT RATIONALE",
    "aim": "OBJECTIVE OBJECTIVES PURPOSE AIM AIMS",
    "methods": "METHOD METHODS METHODOLOGY DESIGN SETTING PATIENTS SUBJECTS PARTICIPANTS INTERVENTION INTERVENTIONS MEASURES",
    "results": "RESULT RESULTS FINDINGS",
    "conclusions": "CONCLUSION CONCLUSIONS DISCUSSION INTERPRETATION",
}
_SECTION_OF = {word: section for section, words in enumerate(SECTIONS.values()) for word in words.split()}
#: The target of a sentence that does not count.
_NONE = -100


class Sections(Objective):
    """Cross entropy of the section that a sentence comes from: background, aim, methods, results or conclusions.

    A heading is the words in capital letters that begin a sentence, up to the last that names a section; the first names it, as
    in "MAIN RESULTS" or "PATIENTS AND METHODS:". A section goes on until the next heading, and the headings are not shown to the
    encoder. A sentence before the first heading does not count, and neither does one of a document with fewer than two sections.
    The corpus is one of sentences: `read_corpus(path).sentences()`.
    """

    name = "sections"

    def __init__(self) -> None:
        self._texts: list[str] | None = None
        self._collate: Collate | None = None

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach its section, and its index in the corpus, to each sentence.

        Raises:
            ArgumentError: the examples are not sentences with their places in documents.
            DataError: no document has two sections.
        """
        require_places(corpus, self.name)
        self._texts, targets = sections_of(corpus)
        if all(target == _NONE for target in targets):
            raise DataError(
                f"{self.name}: no document of the corpus has two headings in capital letters, such as METHODS and RESULTS; leave "
                "the objective out"
            )
        attach(corpus, "section", targets, self.name)
        attach(corpus, "section_index", range(len(corpus)), self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to sections."""
        self._collate = cast("TextEncoder", encoder).collate
        return LinearHead(encoder.width, len(SECTIONS))

    def view(self, batch: Batch) -> Batch:
        """Return the tokens of the sentences without headings (B, S), and their sections (B,), -100 if one does not count."""
        texts, collate = prepared(self._texts, self), prepared(self._collate, self)
        tokens = collate([{"text": texts[row]} for row in batch["section_index"].tolist()])
        device = batch["input_ids"].device
        return {**{key: value.to(device) for key, value in tokens.items()}, "section": batch["section"]}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the sentences that count; 0 if none does."""
        loss = cross_entropy(head(encoder.pool(view)), view["section"], reduction="sum", ignore_index=_NONE)
        count: Tensor = (view["section"] != _NONE).sum().clamp(min=1)
        return loss / count


def sections_of(corpus: Sequence[Example]) -> tuple[list[str], list[int]]:
    """Return each sentence without its heading, and its section: an index of `SECTIONS`, or -100 if it does not count."""
    texts, targets = [example["text"] for example in corpus], [_NONE] * len(corpus)
    order = sorted(range(len(corpus)), key=lambda row: (corpus[row]["document"], corpus[row]["position"]))
    for _, rows in groupby(order, key=lambda row: corpus[row]["document"]):
        section, sentences = _NONE, list(rows)
        for row in sentences:
            heading, rest = _heading(texts[row])
            section = section if heading is None else heading
            # A heading by itself has nothing to read.
            if rest:
                texts[row], targets[row] = rest, section
        if len({targets[row] for row in sentences} - {_NONE}) < 2:
            for row in sentences:
                texts[row], targets[row] = corpus[row]["text"], _NONE
    return texts, targets


def _heading(sentence: str) -> tuple[int | None, str]:
    """Return the section that the heading of a sentence names, None without a heading, and the rest of the sentence."""
    words = sentence.split()
    capitals = [word.strip(":,.") for word in takewhile(lambda word: not any(map(str.islower, word)), words)]
    places = [place for place, word in enumerate(capitals) if word in _SECTION_OF]
    if not places:
        return None, sentence
    return _SECTION_OF[capitals[places[0]]], " ".join(words[places[-1] + 1 :]).lstrip(":. ")
