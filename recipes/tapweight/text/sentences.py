"""Split a document into its sentences."""

from __future__ import annotations

import re

__all__ = ["split_sentences"]

_OPENING = "([\"'\u2018\u201c"
#: The end of a sentence, with closing quotes and brackets, before a letter, possibly in quotes or brackets. Files of tokens have
#: a space before each mark as well.
_END = re.compile(rf"""[.!?]+(?:["'\u2019\u201d]|\s?[)\]])*\s+(?=(?:[{re.escape(_OPENING)}]\s?)*([^\W\d_]))""")
#: A period after one of these words, or after single letters such as "e.g", does not end a sentence.
_ABBREVIATIONS = frozenset(("al", "approx", "ca", "cf", "Dr", "Mr", "Mrs", "Ms", "Prof", "resp", "St", "viz", "vs")) | {
    word + plural for name in ("eq", "fig", "ref", "sec") for word in (name, name.title()) for plural in ("", "s")
}
_LETTERS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_LONGEST_ABBREVIATION = 16


def split_sentences(document: str) -> list[str]:
    """Return the sentences of a document, in their order.

    A sentence ends with ".", "!" or "?" where the next word starts with a capital letter. A period after a usual abbreviation
    ("et al.", "Fig."), after letters with periods ("e.g.") or after an initial ("J.") does not end it. Tokens joined by spaces
    are split as well. A document without such ends, such as one without punctuation, is one sentence.

    Args:
        document: the text.

    Returns:
        The sentences, without white space around them; none if the document is empty.

    Example:
        >>> from mlopt.recipes.tapweight.text.sentences import split_sentences
        >>> split_sentences("We follow Lee et al. (2019). It works! See Fig. 2.")
        ['We follow Lee et al. (2019).', 'It works!', 'See Fig. 2.']
        >>> split_sentences("Rats were treated ( 5 mg i.v . ) . All recovered .")
        ['Rats were treated ( 5 mg i.v . ) .', 'All recovered .']
    """
    starts = [0]
    for match in _END.finditer(document):
        before = document[max(starts[-1], match.start() - _LONGEST_ABBREVIATION) : match.start()]
        if match[1].isupper() and not (match[0].startswith(".") and _is_abbreviated(before)):
            starts.append(match.end())
    parts = (document[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True))
    return [part for part in parts if part]


def _is_abbreviated(before: str) -> bool:
    """Return True if a period after this text belongs to an abbreviation."""
    word = (before.split() or [""])[-1].lstrip(_OPENING)
    # A letter by itself, apart from the period, is a token: "group B ."
    initial = len(word) == 1 and word.isupper() and before.endswith(word)
    return initial or word in _ABBREVIATIONS or _LETTERS.fullmatch(word) is not None
