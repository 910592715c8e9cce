"""Streams of batches: the order depends only on the seed."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from core_cases import drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mlopt
from mlopt.problem import Stream, to_device

CPU = torch.device("cpu")


def shuffled(count: int = 12, batch: int = 3) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count)), batch, shuffle=True)


class Augmented(Dataset[Tensor]):
    """Rows with noise from all three generators, drawn on access."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


class Growing:
    """Data without a length; each epoch is one batch longer than the last."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from range(self.epochs)


def take(stream: Stream, count: int) -> list[list[Any]]:
    return [
        batch[0].tolist() if isinstance(batch, list) else batch.tolist()
        for batch in (stream.next() for _ in range(count))
    ]


def states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest]


@drawn(15)
@given(seed=seeds, noise=st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_the_order_depends_only_on_the_seed(seed: int, noise: list[int]) -> None:
    quiet = take(Stream("a", shuffled(), seed, CPU), 10)
    stream, loud = Stream("a", shuffled(), seed, CPU), []
    for count in noise:
        torch.manual_seed(count)
        for _ in range(count):
            torch.rand(1)
            random.random()
            np.random.rand()
        loud += take(stream, 1)
    assert loud == quiet


@drawn(10)
@given(seed=seeds)
def test_augmentation_depends_only_on_the_seed(seed: int) -> None:
    runs = []
    for disturbance in range(2):
        stream = Stream("a", DataLoader(Augmented(), 2, shuffle=True), seed, CPU)
        rows = []
        for _ in range(7):
            rows += take(stream, 1)
            torch.rand(disturbance)
            np.random.rand(disturbance)
            random.seed(disturbance)
        runs.append(rows)
    assert runs[0] == runs[1]
    # The noise differs from epoch to epoch.
    numbers = [number for batch in runs[0] for row in batch for number in row[1:]]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("data", [DataLoader(Augmented(), 2, shuffle=True), [torch.ones(2)]], ids=["loader", "list"])
def test_drawing_does_not_change_the_global_generators(data: Any) -> None:
    before = states()
    stream = Stream("a", data, 0, CPU)
    for _ in range(8):
        stream.next()
        assert states() == before


@drawn(15)
@given(seed=seeds)
def test_each_epoch_holds_every_sample_once_in_a_different_order(seed: int) -> None:
    stream = Stream("a", shuffled(24, 4), seed, CPU)
    epochs = [[row for batch in take(stream, 6) for row in batch] for _ in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_differs_between_seeds_and_levels() -> None:
    orders = {(name, seed): str(take(Stream(name, shuffled(), seed, CPU), 4)) for name in "ab" for seed in (0, 1)}
    assert len(set(orders.values())) == 4


def test_epoch_and_position() -> None:
    stream = Stream("a", [torch.zeros(1), torch.ones(1)], 0, CPU)
    places = []
    for _ in range(5):
        batch = stream.next()
        places.append((stream.epoch, stream.position, int(batch)))
    assert places == [(0, 1, 0), (0, 2, 1), (1, 1, 0), (1, 2, 1), (2, 1, 0)]


def test_each_epoch_iterates_the_data_again() -> None:
    stream = Stream("a", Growing(), 0, CPU)
    assert [stream.next() for _ in range(6)] == [0, 0, 1, 0, 1, 2]


def test_batches_without_data_are_none() -> None:
    stream = Stream("a", None, 0, CPU)
    assert [stream.next() for _ in range(3)] == [None, None, None]


@pytest.mark.parametrize(
    "data", [[], DataLoader(TensorDataset(torch.ones(2)), 4, drop_last=True)], ids=["list", "dropped"]
)
def test_data_without_a_batch_are_an_error(data: Any) -> None:
    with pytest.raises(mlopt.ProblemError, match=r"level 'inner': its data hold no batch.*drop_last"):
        Stream("inner", data, 0, CPU).next()


class Pair(NamedTuple):
    inputs: Tensor
    label: str


class Graph:
    """A batch that moves itself, like those of torch-geometric."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> Graph:
        return Graph(device.type)


def test_every_tensor_in_a_batch_is_moved() -> None:
    """The device is `meta`, because every machine has it."""
    x = torch.ones(2)
    batch = {"pair": Pair(x, "name"), "list": [x, (x, 3)], "graph": Graph(), "more": OrderedDict(x=x), "none": None}
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].label == "name"
    assert isinstance(moved["list"][1], tuple)
    assert moved["list"][1][1] == 3
    assert moved["graph"].device == "meta"
    assert moved["none"] is None
    tensors = [moved["pair"].inputs, moved["list"][0], moved["list"][1][0], moved["more"]["x"]]
    assert [t.device.type for t in tensors] == ["meta"] * 4
    assert x.device.type == "cpu"


def test_a_stream_moves_its_batches() -> None:
    batch = Stream("a", [(torch.ones(1), torch.zeros(1))], 0, torch.device("meta")).next()
    assert [t.device.type for t in batch] == ["meta", "meta"]
