"""An encoder of text: any encoder of transformers with its tokenizer, and its own head for masked tokens."""

from __future__ import annotations

import contextlib
import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from mlopt.files import saving

from ..encoder import Encoder
from .batches import Collate
from .heads import ModelError, OwnHead, TiedHead

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from .batches import Batch

__all__ = ["ModelError", "TextEncoder", "quiet"]

Pooling = Literal["mean", "cls"]


class TextEncoder(Encoder):
    """An encoder of transformers, whose outputs are at least float32 whatever the dtype of its weights.

    Args:
        model: a model of `AutoModel`, or one with a head, whose encoder is used. A head for masked tokens is kept for the
            objective that needs one. The model is not copied: frozen parameters stay frozen, and gradient checkpointing stays
            on.
        tokenizer: the tokenizer of the model.
        pooling: the representation of a text: "mean" over its tokens (special ones counted, padding not), or "cls", its first.
        max_length: the most tokens of a text, special ones counted; by default as many as the model and its tokenizer take.

    Attributes:
        width: the number of features of a token, and of a text.

    Raises:
        ModelError: the model has no encoder of this kind, or it and the tokenizer do not fit.

    Example:
        >>> from transformers import BertConfig, BertModel, BertTokenizer
        >>> from mlopt.recipes.tapweight.text import TextEncoder
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "words"]
        >>> tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
        >>> model = BertModel(BertConfig(vocab_size=8, hidden_size=6, num_attention_heads=2, num_hidden_layers=1))
        >>> encoder = TextEncoder(model, tokenizer, max_length=128)  # or TextEncoder.load("roberta-base", max_length=128)
        >>> batch = encoder.collate([{"text": "one"}, {"text": "two words"}])
        >>> encoder.pool(batch).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: Pooling = "mean",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ModelError(f"pooling={pooling!r}; give 'mean' or 'cls'")
        if pooling == "cls" and tokenizer.padding_side == "left":
            raise ModelError(
                "pooling='cls' takes the first token, which is padding if the tokenizer pads on the left; give "
                "pooling='mean', or set tokenizer.padding_side = 'right'"
            )
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} has a decoder; give an encoder, such as BERT, RoBERTa or DeBERTa")
        self.pooling = pooling
        self.model, head = _encoder_and_head(model)
        # The tuple keeps the head out of the encoder's parameters: the coupling and the finetuned copy do not need it.
        self._own_head = (head,)
        self.tokenizer = tokenizer
        self.width = int(config.hidden_size)
        self.card["library_name"] = "transformers"
        self.max_length = _max_length(self.model, tokenizer, max_length)
        self._inputs = _inputs(self.model)
        _check_vocabulary(self.embeddings, tokenizer)

    @classmethod
    def load(
        cls, name: str | os.PathLike[str], *, pooling: Pooling = "mean", max_length: int | None = None, **options: Any
    ) -> TextEncoder:
        """Load a model and its tokenizer; a checkpoint's own code is never run.

        Args:
            name: a folder, or a name on the Hugging Face hub.
            pooling, max_length: as in the constructor.
            options: for `from_pretrained`, such as `dtype` or `attn_implementation`.

        Raises:
            ModelError: there is no such model, or it cannot be loaded, or as in the constructor.
        """
        name = str(name)
        if Path(name).exists() and not Path(name).is_dir():
            raise ModelError(f"model={name!r} is a file; give the folder that holds it, or a name on the hub")
        # transformers would log the weights that do not fit, or raise without naming them; these options return their names.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                model, report = AutoModel.from_pretrained(name, trust_remote_code=False, **options)
                masked = _masked_model(name, model.config, options)
        except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError) as error:
            raise ModelError(
                f"model={name!r} cannot be loaded ({_first_sentence(error)}); give a folder, or a name on the hub"
            ) from error
        _check_weights(name, report)
        encoder = cls(model, tokenizer, pooling=pooling, max_length=max_length)
        if not Path(name).exists():
            encoder.card["base_model"] = name
        if masked is not None:
            encoder._own_head = (OwnHead(masked, encoder.model),)
        return encoder

    @property
    def embeddings(self) -> nn.Embedding:
        """The embeddings of the vocabulary."""
        embeddings: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    @property
    def collate(self) -> Collate:
        """The function that joins texts into batches for this encoder."""
        return Collate(self.tokenizer, self.max_length)

    def forward(self, batch: Batch) -> Tensor:
        """Return the features of all tokens, (B, S, width)."""
        hidden: Tensor = self.model(**self.inputs(batch)).last_hidden_state
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the entries of a batch that the model takes."""
        return {name: batch[name] for name in self._inputs if name in batch}

    def pool(self, batch: Batch) -> Tensor:
        """Return the representations of all texts, (B, width)."""
        hidden: Tensor = self(batch)
        if self.pooling == "cls":
            return hidden[:, 0]
        mask: Tensor = batch["attention_mask"].to(hidden)[..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def masked_token_head(self) -> nn.Module:
        """Return a head from features (M, width) to logits (M, V) of the vocabulary; its output layer is tied to the embeddings.

        The head is a copy of the checkpoint's own, or a new one if the checkpoint has none.
        """
        own = self._own_head[0]
        if own is None:
            return TiedHead(self.width, self.embeddings)
        # Parameters that it shares with the encoder stay shared; the rest is copied.
        return copy.deepcopy(own, {id(parameter): parameter for parameter in self.parameters()})

    @property
    def has_masked_token_head(self) -> bool:
        """True if the checkpoint has a head for masked tokens."""
        return self._own_head[0] is not None

    @property
    def has_dropout(self) -> bool:
        """True if two passes over one text differ in training."""
        return any("Dropout" in type(part).__name__ and getattr(part, "p", 0.0) > 0 for part in self.modules())

    def recompute_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them (gradient checkpointing)."""
        config: Any = self.model.config
        config.use_cache = False  # an encoder has no cache, and transformers would warn of it
        # The name from 5.24 on, and the older one.
        enable: Any = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)()  # type: ignore[operator]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model and its tokenizer into `folder`, from which `AutoModel` and `AutoTokenizer` read them."""
        with quiet(), saving(Path(folder)):
            self.model.save_pretrained(folder)  # type: ignore[operator]
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer into `folder`."""
        with quiet():
            _without_lengths(self.tokenizer).save_pretrained(folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        # The tokenizer is shared: it has no state that a run changes.
        memo[id(self.tokenizer)] = self.tokenizer
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin


def _encoder_and_head(model: nn.Module) -> tuple[nn.Module, OwnHead | None]:
    """Return the encoder of a model, and its head for masked tokens, if it has one."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return model, None
    base = model.base_model
    masked = "ForMaskedLM" in type(model).__name__ and model.get_output_embeddings() is not None
    return base, OwnHead(model, base) if masked else None


def _masked_model(name: str, config: Any, options: dict[str, Any]) -> PreTrainedModel | None:
    """Return the checkpoint with its head for masked tokens, or None if it has none of its own."""
    architectures = getattr(config, "architectures", None) or ()
    claimed = any(architecture.endswith(("ForMaskedLM", "ForPreTraining")) for architecture in architectures)
    if not claimed or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return None
    model, report = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=False, **options)
    return None if report["missing_keys"] or report["mismatched_keys"] else model


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint without all weights of the encoder; a pooler, which many lack, is not used."""
    for key, shape, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"model={name!r} has the shape {tuple(shape)} for {key!r}, where its configuration says {tuple(expected)}; give a "
            "checkpoint and options that fit each other"
        )
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise ModelError(
            f"model={name!r} lacks {len(missing)} weights of the encoder, the first {missing[0]!r}; give a whole checkpoint, and "
            "options that fit it"
        )


def _max_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase, requested: int | None) -> int:
    """Return the most tokens of a text: the requested number, or as many as there are positions.

    XLNet's -1 positions are not a limit, and neither is the placeholder of a tokenizer without one.
    """
    limits = [tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions > 0:
        # Encoders such as RoBERTa count positions from after that of the padding.
        offsets = [
            part.padding_idx + 1
            for name, part in model.named_modules()
            if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None
        ]
        limits.append(positions - max(offsets, default=0))
    most = min(limits)
    limited = most < VERY_LARGE_INTEGER
    if requested is None and not limited:
        raise ModelError("max_length=None, but neither the model nor its tokenizer has a limit; give one, such as 512")
    if requested is None:
        return most
    if not 3 <= requested <= most:
        raise ModelError(
            f"max_length={requested}; the model takes {f'from 3 to {most}' if limited else '3 or more'} tokens"
        )
    return requested


def _without_lengths(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer without the lengths that its last call set."""
    twin = copy.deepcopy(tokenizer)
    if twin.is_fast:
        twin.backend_tokenizer.no_truncation()
        twin.backend_tokenizer.no_padding()
    return twin


def _inputs(model: nn.Module) -> tuple[str, ...]:
    """Return the entries of a batch that the model takes; token types only if it distinguishes at least two."""
    known = inspect.signature(model.forward).parameters.values()
    taken = any(parameter.name == "token_type_ids" or parameter.kind is parameter.VAR_KEYWORD for parameter in known)
    types = taken and getattr(model.config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def _check_vocabulary(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > embeddings.num_embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model embeds {embeddings.num_embeddings}; give the tokenizer "
            "of this model, or call model.resize_token_embeddings(len(tokenizer))"
        )
    # Where the files of a tokenizer are missing, transformers makes one without words.
    if {*tokenizer.get_vocab().values()} <= {*tokenizer.all_special_ids}:
        raise ModelError(
            "the tokenizer has special tokens only, so all texts would be alike; save the tokenizer of this model in its folder"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token, which batches need; set tokenizer.pad_token")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' reports on weights and its progress bars; faults are reported elsewhere."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
