"""Join texts into batches: tokenise them, cut them to the length that the encoder takes, and pad them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "Collate", "Example"]

#: A text: "text", for a pair also "text_b", for a labelled one "label", and the entries that objectives attach.
Example = dict[str, Any]
#: The tokens of B texts of at most S tokens, all (B, S): "input_ids", "attention_mask", "special_tokens_mask" (padding counts
#: as special), for some encoders "token_type_ids"; and (B, ...) tensors of the other entries of the examples.
Batch = dict[str, Any]

_CHUNK = 1_000


@attrs.frozen
class Collate:
    """Joins texts, or pairs of texts, into a batch; numbers and tensors in the examples become tensors under the same keys.

    Args:
        tokenizer: turns text into tokens.
        max_length: tokens of a text, special ones counted; the rest is cut off. Of a pair, the longer text is cut first.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return the batch of some examples."""
        tokens = self._tokenise(
            examples, self.max_length, padding=True, return_special_tokens_mask=True, return_tensors="pt"
        )
        batch: Batch = dict(tokens)
        for key, value in examples[0].items():
            if not isinstance(value, str):
                batch[key] = _join([example[key] for example in examples])
        return batch

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each example, special ones counted; at most one more than `max_length`."""
        lengths: list[int] = []
        for start in range(0, len(examples), _CHUNK):
            chunk = [examples[i] for i in range(start, min(start + _CHUNK, len(examples)))]
            lengths += map(len, self._tokenise(chunk, self.max_length + 1)["input_ids"])
        return lengths

    def cut(self, examples: Sequence[Example]) -> int:
        """Return how many of the examples are longer than `max_length`."""
        return sum(length > self.max_length for length in self.lengths(examples))

    def remark(self, examples: Sequence[Example], source: str) -> list[str]:
        """Return a sentence with the number of examples that are cut off, or none if all are whole."""
        count = self.cut(examples)
        return [
            f"{count} of {len(examples)} texts of {source} are longer than {self.max_length} tokens and are cut off"
        ] * (count > 0)

    def _tokenise(self, examples: Sequence[Example], length: int, **options: Any) -> Any:
        second = [example["text_b"] for example in examples] if "text_b" in examples[0] else None
        first = [example["text"] for example in examples]
        return self.tokenizer(first, second, truncation=True, max_length=length, **options)


def _join(values: list[Any]) -> Tensor:
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else None)
