"""The data of the problems, in float64, from fixed seeds. Only `digits` needs more than torch; only the parent calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["clusters", "digits", "graphs", "quadratic", "sequences"]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _noisy(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return the labels with three in ten replaced by random ones."""
    wrong = torch.rand(len(labels), generator=generator) < 0.3
    return torch.where(wrong, torch.randint(classes, labels.shape, generator=generator), labels)


def _split(inputs: Tensor, labels: Tensor, count: int, classes: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "training": (inputs[:count],),
        "labels": _noisy(labels[:count], classes, generator),
        "validation": (inputs[count:],),
        "validation_labels": labels[count:],
    }


def quadratic(*, condition: float, size: int = 200, outer: int = 20) -> dict[str, Any]:
    """Return A with eigenvalues from 1 / condition to 1, and B and c."""
    generator = _generator()
    basis = torch.linalg.qr(_normal(generator, size, size)).Q
    spectrum = condition ** torch.linspace(-1, 0, size, dtype=torch.float64)
    return {"A": (basis * spectrum) @ basis.T, "B": _normal(generator, size, outer), "c": _normal(generator, size)}


def digits(count: int = 1_000) -> dict[str, Any]:
    """Return scikit-learn's digits: 64 features, 10 classes, `count` samples for training and the rest for validation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _split(torch.from_numpy(images).double() / 16, torch.from_numpy(labels), count, 10, _generator())


def clusters(features: int, count: int = 1_000, classes: int = 10) -> dict[str, Any]:
    """Return overlapping normal clusters, as many for validation as for training."""
    generator = _generator()
    labels = torch.randint(classes, (2 * count,), generator=generator)
    centres = _normal(generator, classes, features)
    inputs = 0.15 * (0.5 * centres[labels] + 4 * _normal(generator, 2 * count, features))
    return _split(inputs, labels, count, classes, generator)


def sequences(count: int = 128, length: int = 12, vocabulary: int = 64, classes: int = 4) -> dict[str, Any]:
    """Return sequences of tokens in which tokens of the sequence's class are three times as frequent as others."""
    generator = _generator()
    labels = torch.randint(classes, (2 * count,), generator=generator)
    odds = torch.ones(2 * count, vocabulary)
    odds[torch.arange(vocabulary) % classes == labels[:, None]] = 3.0
    tokens = torch.multinomial(odds, length, replacement=True, generator=generator)
    return _split(tokens, labels, count, classes, generator)


def graphs(count: int = 128, nodes: int = 16, features: int = 8, classes: int = 4) -> dict[str, Any]:
    """Return random graphs, denser with the class, as (node features, edges, the graph of each node)."""
    generator = _generator()
    labels = torch.randint(classes, (2 * count,), generator=generator)
    parts = []
    for half in (labels[:count], labels[count:]):
        chance = 0.05 + 0.05 * half[:, None, None]
        upper = (torch.rand(count, nodes, nodes, generator=generator) < chance).triu(1)
        graph, source, target = (upper | upper.transpose(1, 2)).nonzero(as_tuple=True)
        edges = torch.stack([graph * nodes + source, graph * nodes + target])
        owner = torch.arange(count).repeat_interleave(nodes)
        parts.append((0.5 + 0.2 * _normal(generator, count * nodes, features), edges, owner))
    return {
        "training": parts[0],
        "labels": _noisy(labels[:count], classes, generator),
        "validation": parts[1],
        "validation_labels": labels[count:],
    }
