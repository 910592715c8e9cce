"""Segments of virtual steps: the least memory at a time, and the bytes of a graph."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from core_cases import drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mlopt.estimators.products.kernels import graph_of
from mlopt.estimators.segments import balanced, saved, uniform


def peak(lengths: list[int], weight: float) -> float:
    """Return the most checkpoints' worth of memory that the backward pass holds."""
    return max(k + weight * length for k, length in enumerate(lengths))


@drawn(60)
@given(steps=st.integers(1, 12), weight=st.floats(1.0, 8.0))
def test_no_other_segments_need_less_memory(steps: int, weight: float) -> None:
    """Against all ways to cut the steps; a budget is found to within one checkpoint."""
    lengths = balanced(steps, weight)
    assert sum(lengths) == steps
    assert min(lengths) > 0
    cuts = itertools.product([False, True], repeat=steps - 1)
    least = min(
        peak([len(list(run)) for _, run in itertools.groupby(itertools.accumulate((0, *cut)))], weight) for cut in cuts
    )
    assert least <= peak(lengths, weight) < least + 1 + 1e-9


@pytest.mark.parametrize("weight", [1.0, 2.5, 30.0])
@pytest.mark.parametrize("steps", [100, 10_000])
def test_the_memory_grows_with_the_root_of_the_steps(steps: int, weight: float) -> None:
    lengths = balanced(steps, weight)
    assert sum(lengths) == steps
    assert peak(lengths, weight) < math.sqrt(2 * weight * steps) + weight + 1


def test_uniform_segments_leave_the_rest_to_the_last() -> None:
    assert uniform(7, 3) == [3, 3, 1]
    assert uniform(2, 5) == [2]


def test_the_bytes_of_a_graph_are_those_that_its_nodes_save() -> None:
    """tanh saves its result; a product of matrices saves its factors, here the weight and the result of tanh."""
    weight, inputs = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4, requires_grad=True)
    hidden = inputs.tanh()
    output = hidden @ weight
    storages = saved(graph_of([output]))
    assert storages == {x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in (hidden, weight)}
