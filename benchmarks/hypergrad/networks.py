"""The modules of the problems, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["GIN", "Dropout", "SampleWeights", "Transformer", "Vector", "mlp"]


class Vector(nn.Module):
    """A bare vector of variables; calling it returns them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        return self.value


class SampleWeights(nn.Module):
    """A weight in (0, 1) for each sample."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        return self.logits.sigmoid()


class Dropout(nn.Module):
    """Dropout at one half, always on; masks are drawn in float32, so that they are the same for every dtype of activations."""

    def forward(self, hidden: Tensor) -> Tensor:
        kept = torch.rand(hidden.shape, dtype=torch.float32, device=hidden.device) < 0.5
        return hidden * (2.0 * kept).to(hidden.dtype)


def mlp(*widths: int, dropout: bool = False) -> nn.Sequential:
    """Return linear layers of these widths with tanh between them, and optionally dropout after each tanh."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()] + [Dropout()] * dropout
    return nn.Sequential(*layers[: -1 - dropout])


class Transformer(nn.Module):
    """A classifier of sequences: two pre-norm blocks, attention written out, as fused kernels have no second derivative."""

    def __init__(self, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width, heads=4) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.mix(self.before(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        hidden = hidden + self.out((scores @ value).transpose(1, 2).reshape(batch, length, width))
        return hidden + self.narrow(torch.tanh(self.wide(self.between(hidden))))


class GIN(nn.Module):
    """A graph isomorphism network (Xu et al. 2019, arXiv 1810.00826): sums over neighbours by `index_add`."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mlp(features, width, width), mlp(width, width, width)])
        self.head = nn.Linear(width, classes)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = torch.tanh(layer(nodes.index_add(0, edges[1], nodes[edges[0]])))
        count = torch.bincount(graph)
        pooled = nodes.new_zeros(len(count), nodes.shape[1]).index_add(0, graph, nodes)
        return self.head(pooled / count[:, None])
