"""Heads: to a few outputs, linear or of a transformers class; and to the vocabulary, the checkpoint's own or a new tied one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput

from mlopt.errors import MloptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = ["ClassifierHead", "LinearHead", "ModelError", "OwnHead", "Problem", "TiedHead", "linear_head"]

#: The kinds of labels of a model of `AutoModelForSequenceClassification`.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class ModelError(MloptError, ValueError):
    """A model or a tokenizer that cannot be used; the message names the fault and the remedy."""


class LinearHead(nn.Module):
    """y = f (W x + b), with W and b initialised f times smaller than usual: a linear map that Adam trains f times as fast.

    Adam's steps have the size of its learning rate, whatever the size of the gradient. A rate that preserves a pretrained
    encoder (5e-5) would need thousands of steps to move a new head. With the factor, one rate serves both.

    Args:
        width: the number of features.
        outputs: the number of outputs.
        factor: f.
    """

    def __init__(self, width: int, outputs: int, factor: float = 20.0) -> None:
        super().__init__()
        self.factor, self.linear = factor, nn.Linear(width, outputs)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.div_(factor)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs (..., outputs) of features (..., width)."""
        outputs: Tensor = self.linear(features)
        return self.factor * outputs


def linear_head(width: int, outputs: int, dropout: float = 0.0) -> nn.Module:
    """Return a linear layer from the representation of a text (B, width) to outputs (B, outputs)."""
    return nn.Sequential(nn.Dropout(dropout), LinearHead(width, outputs))


class ClassifierHead(nn.Module):
    """The head of a model of `AutoModelForSequenceClassification`; it is called with the encoder, which it does not hold.

    Args:
        model: the model; its encoder is taken off it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        setattr(model, model.base_model_prefix, None)
        self.model = model

    @classmethod
    def new(cls, encoder: nn.Module, outputs: int, problem: Problem) -> ClassifierHead:
        """Return a new head for an encoder of transformers.

        Args:
            encoder: the encoder.
            outputs: the number of outputs.
            problem: the name that transformers has for the kind of the labels.

        Raises:
            ModelError: transformers has no such head for the encoder, or the encoder lacks a part that the head needs.
        """
        config: Any = copy.deepcopy(encoder.config)
        config.num_labels, config.problem_type = outputs, problem
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=next(encoder.parameters()).dtype)
        except ValueError as error:
            raise ModelError(
                f"transformers has no classifier on {type(encoder).__name__}; give head='linear'"
            ) from error
        if missing := sorted(model.base_model.state_dict().keys() - encoder.state_dict().keys()):
            raise ModelError(
                f"the encoder, a {type(encoder).__name__}, lacks {missing[0]!r}, which {type(model).__name__} needs; load the "
                "encoder with TextEncoder.load, or give head='linear'"
            )
        return cls(model)

    def forward(self, encoder: Any, batch: dict[str, Any]) -> Tensor:
        """Return the outputs (B, C) of a batch for a `TextEncoder`, at least in float32."""
        logits: Tensor = self._on(encoder.model)(**encoder.inputs(batch)).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def whole(self, encoder: nn.Module, names: Sequence[str]) -> PreTrainedModel:
        """Return a model of transformers with the tensors of the encoder and of the head.

        Args:
            encoder: the encoder of transformers.
            names: the names of the outputs.
        """
        config = copy.deepcopy(self.model.config)
        config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
        model: PreTrainedModel = type(self.model)(config).to(next(encoder.parameters()).dtype)  # type: ignore[arg-type]
        # The encoder may have a part that this class leaves out, such as a pooler.
        own = self._on(encoder).state_dict()
        model.load_state_dict({name: own[name] for name in model.state_dict()})
        return model

    def _on(self, encoder: nn.Module) -> Any:
        """Return the model on an encoder; the parts are the same objects."""
        whole: Any = copy.copy(self.model)
        whole._modules = {**self.model._modules, self.model.base_model_prefix: encoder}
        return whole


class TiedHead(nn.Module):
    """logits = E LayerNorm(GELU(W h + c)) + b, with E the embeddings of the vocabulary, shared with the encoder.

    Args:
        width: the number of features of a token.
        embeddings: (V, D).
    """

    def __init__(self, width: int, embeddings: nn.Embedding) -> None:
        super().__init__()
        size = embeddings.embedding_dim
        self.transform = nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.LayerNorm(size))
        self.weight = embeddings.weight
        self.bias = nn.Parameter(torch.zeros(embeddings.num_embeddings))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (M, V) of features (M, width)."""
        features = self.transform(features)
        return linear(features, self.weight.to(features.dtype), self.bias)


class OwnHead(nn.Module):
    """The head for masked tokens of a model of transformers: the whole model, called with the encoder's output.

    Classes name the parts of their heads differently, but each passes its encoder's output on to them.

    Args:
        model: a model with a head for masked tokens.
        encoder: the encoder whose embeddings the head shares: the model's own, or another of its kind.
    """

    def __init__(self, model: PreTrainedModel, encoder: Any) -> None:
        super().__init__()
        shell: Any = copy.copy(model)
        shell._modules = dict(model._modules)
        setattr(shell, model.base_model_prefix, _PassThrough(encoder))
        output, embeddings = shell.get_output_embeddings(), encoder.get_input_embeddings()
        # A head that looks the embeddings up names another layer its output layer; that one is not tied.
        if model.config.tie_word_embeddings and output.weight.shape == embeddings.weight.shape:
            output.weight = embeddings.weight
        self.model = shell

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (M, V) of features (M, width), at least in float32."""
        dtype = next(self.parameters()).dtype
        logits: Tensor = self.model(inputs_embeds=features[None].to(dtype)).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _PassThrough(nn.Module):
    """An encoder that returns its input, already encoded. It holds the embeddings, which some heads look up."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"word_embeddings": encoder.get_input_embeddings()})

    def forward(self, input_ids: None = None, inputs_embeds: Tensor | None = None, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)
