"""Heads: to a few outputs, and to the vocabulary, the checkpoint's own or a new one tied to the embeddings."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LinearHead", "OwnHead", "TiedHead"]


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
