"""The predictor of a run on text: a class or a number for new texts, or pairs of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .. import predictor
from ..examples import UnusableError
from .data import check_texts, read_texts
from .encoder import TextEncoder, quiet
from .heads import ClassifierHead, linear_head

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ..encoder import Encoder
    from ..predictions import Target
    from .batches import Batch, Example

__all__ = ["Predictor", "outputs_of"]

_HEAD = "head.safetensors"


def outputs_of(encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
    """Return the outputs (B, C) of a head: a linear layer on the features of the texts, or the head of a transformers class."""
    outputs: Tensor = head(encoder, batch) if isinstance(head, ClassifierHead) else head(encoder.pool(batch))
    return outputs


class Predictor(predictor.Predictor):
    """Finetuned encoders that predict a class or a number for texts, or for pairs of texts.

    With the head of a transformers class (`head="classifier"` of `TextTask`), `AutoModelForSequenceClassification` loads the
    folder that `save` writes. For a regression its logits are standardised: multiply them by `std`, and add `mean`, of
    `predictor.json`.

    Args:
        members, target: as in the base class.
        columns: ("text",), or ("text", "text_b") for pairs.
        file_columns: as in the base class.
    """

    modality = "text"

    def __init__(
        self,
        members: Sequence[predictor.Member],
        target: Target,
        columns: Sequence[str] = ("text",),
        file_columns: Sequence[str] = (),
    ) -> None:
        super().__init__(members, target, columns, file_columns)

    @property
    def _encoder(self) -> TextEncoder:
        encoder = self.members[0][0]
        assert isinstance(encoder, TextEncoder)
        return encoder

    def example(self, content: Any) -> Example:
        """Return the example of a text, or of a pair of texts."""
        texts = [content] if len(self.columns) == 1 else content
        if not isinstance(texts, list | tuple) or len(texts) != len(self.columns):
            raise UnusableError(f"{content!r} is not a pair of texts")
        for text in texts:
            if not isinstance(text, str | None):
                raise UnusableError(f"{text!r} is not text")
        check_texts(texts)
        return dict(zip(self.columns, texts, strict=True))

    def collate(self, examples: list[Example]) -> Batch:
        """Join texts into a batch."""
        return self._encoder.collate(examples)

    def outputs(self, encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, C), or standardised predictions (B, 1)."""
        return outputs_of(encoder, head, batch)

    def scored(self, values: Tensor) -> Tensor:
        """Return the outputs that metrics take: (N, C) for classes, (N,) for numbers."""
        outputs = self.target.scored(values)
        return outputs.squeeze(1) if self.target.form == "numbers" else outputs

    def contents(self, example: Example) -> tuple[str, ...]:
        """Return the text, or the two texts, of an example."""
        return tuple(example[name] for name in self.columns)

    def read(self, file: str | os.PathLike[str], columns: Sequence[str] | None = None) -> list[Any]:
        """Return the texts, or the pairs of texts, of all rows of a file; see `read_corpus` for the kinds of files."""
        rows = read_texts(Path(file), columns, len(self.columns), preferred=self.file_columns)
        texts = [list(row) for row in rows]
        return texts if len(self.columns) > 1 else [text for (text,) in texts]

    def options(self) -> dict[str, Any]:
        """Return the options that the configuration of the model lacks."""
        own, head = self._encoder, self.members[0][1]
        return {
            "head": "classifier" if isinstance(head, ClassifierHead) else "linear",
            "pooling": own.pooling,
            "max_length": own.max_length,
            "attention": own.model.config._attn_implementation,  # type: ignore[union-attr]
        }

    def save_member(self, encoder: Encoder, head: nn.Module, folder: Path) -> None:
        """Write the encoder, its tokenizer and the head."""
        assert isinstance(encoder, TextEncoder)
        if isinstance(head, ClassifierHead):
            with quiet():
                head.whole(encoder.model, self.target.names).save_pretrained(folder)
            encoder.save_tokenizer(folder)
        else:
            encoder.save(folder)
            save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, folder / _HEAD)

    @classmethod
    def load_member(cls, folder: Path, target: Target, options: dict[str, Any]) -> predictor.Member:
        """Return the encoder and the head."""
        arguments = {"pooling": options["pooling"], "max_length": options["max_length"]}
        loading = {"attn_implementation": options["attention"], "dtype": "auto"}
        if options["head"] == "linear":
            encoder = TextEncoder.load(folder, **arguments, **loading)
            head = linear_head(encoder.width, len(target.names))
            head.load_state_dict(load_file(folder / _HEAD), assign=True)
            return encoder, head
        with quiet():
            whole = AutoModelForSequenceClassification.from_pretrained(folder, **loading)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        return TextEncoder(whole, tokenizer, **arguments), ClassifierHead(whole)
