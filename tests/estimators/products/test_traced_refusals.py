"""Refusals of losses and batches whose numbers a recording would freeze."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from compiled_cases import INPUTS, LABELS, loss_of, pair
from core_cases import gradient_of
from torch import Tensor, nn

import mlopt
from mlopt.testing import same, snapshot


def branching(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    loss = loss_of(module, batch, weights=weights)
    return loss if loss > 1 else 2 * loss


def listing(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * batch[0].tolist()[0][0]


def equal(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * (2.0 if torch.equal(batch[0], INPUTS) else 1.0)


def a_number_of_the_batch(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * batch[0][0, 0].item()


def a_length_of_the_batch(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    inputs, labels = batch
    return loss_of(module, (inputs[: labels.max() + 1], labels[: labels.max() + 1]), weights=weights)


def a_power_of_the_batch(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * math.exp(batch[0].mean())


def a_fill_of_the_batch(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * torch.full((), batch[0][0, 0])


def a_tensor_of_tensors(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * torch.tensor([batch[0].sum(), batch[0].norm()]).sum()


def a_row_of_tensors(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * batch[0].new_tensor((batch[0].sum(), batch[0].norm())).sum()


def an_index_of_tensors(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * batch[0][list(batch[1]), 0].sum()


def a_split_at_tensors(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    parts = module(batch[0]).tensor_split(torch.arange(1, 3) + batch[1].max())
    return weights().sum() * torch.stack([(1 + k) * part.square().sum() for k, part in enumerate(parts)]).sum()


def a_generator_of_its_own(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * torch.rand((), generator=torch.Generator().manual_seed(0))


def from_numpy(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    return loss_of(module, batch, weights=weights) * float(np.random.rand())


def counting(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    COUNT.add_(1.0)
    return loss_of(module, batch, weights=weights)


COUNT = torch.zeros(())


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (branching, "reads numbers of a tensor"),
        (listing, "reads numbers of a tensor"),
        (equal, "reads numbers of a tensor"),
        (a_number_of_the_batch, "reads numbers of a tensor"),
        (a_length_of_the_batch, "reads numbers of a tensor"),
        (a_power_of_the_batch, "reads numbers of a tensor"),
        (a_fill_of_the_batch, "reads numbers of a tensor"),
        (a_tensor_of_tensors, "reads numbers of a tensor"),
        (a_row_of_tensors, "reads numbers of a tensor"),
        (an_index_of_tensors, "reads numbers of a tensor"),
        (a_split_at_tensors, "reads numbers of a tensor"),
        (a_generator_of_its_own, "uses a Generator of its own"),
        (from_numpy, "draws from the generator of Python or numpy"),
        (counting, "changes a tensor in place that it did not make"),
    ],
)
def test_a_loss_that_a_recording_would_freeze_is_refused(loss: Any, reason: str, replayed: list[Any]) -> None:
    compiled, live = pair(nn.Linear(3, 2), loss)
    before = snapshot(compiled)
    with pytest.raises(
        mlopt.EstimatorError, match=rf"level 'network': its loss cannot be traced \(.*{reason}.*compile=False"
    ):
        mlopt.hypergradient(compiled)
    assert same(before, snapshot(compiled))
    assert bool(gradient_of(live).any())


def test_a_batch_whose_content_is_out_of_reach_is_refused(replayed: list[Any]) -> None:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return loss_of(module, (torch.from_numpy(batch[0]), batch[1]), weights=weights)

    compiled, _ = pair(nn.Linear(3, 2), loss, data=[(INPUTS.numpy(), LABELS)])
    with pytest.raises(mlopt.EstimatorError, match=r"level 'network': its batch holds a ndarray.*compile=False"):
        mlopt.hypergradient(compiled)
