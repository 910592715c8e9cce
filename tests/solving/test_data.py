"""Data of any kind reach their level unchanged, in the level's own order, and resume where a checkpoint says."""

from __future__ import annotations

import random
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from callback_cases import callback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

import mlopt
from mlopt import Level, Problem, variables
from mlopt.problem import Stream
from mlopt.solving import serialization

CPU, META = torch.device("cpu"), torch.device("meta")


class Augmented(Dataset[Any]):
    """Rows with noise from all three kinds of generators, drawn on access."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
        return {"index": index, "noise": noise}


class Pair(NamedTuple):
    inputs: Tensor
    label: str


@attrs.frozen(eq=False)
class Moving:
    """A batch with a method `to`."""

    inputs: Tensor

    def to(self, device: torch.device) -> Moving:
        return Moving(self.inputs.to(device))


class EpochSampler(Sampler[int]):
    """A sampler whose order depends only on the epoch set, like that of DistributedSampler."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.epochs = count, 0, []  # type: int, int, list[int]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def shuffled(batch_size: int, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size, shuffle=True, **arguments)


def own_generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_batches() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra of the text recipes")
    rows = torch.arange(12).reshape(3, 4)
    return [transformers.BatchEncoding({"input_ids": row, "text": f"row {k}"}) for k, row in enumerate(rows)]


def graphs() -> Any:
    data = pytest.importorskip(
        "torch_geometric.data", reason="needs torch-geometric, of the extra of the molecule recipes"
    )
    edges = torch.tensor([[0, 1], [1, 0]])
    return [data.Data(x=torch.full((2, 3), float(k)), edge_index=edges, name=f"graph {k}") for k in range(5)]


def graph_loader() -> Any:
    rows = graphs()
    from torch_geometric.loader import DataLoader as GraphLoader

    return GraphLoader(rows, batch_size=2, shuffle=True)


def hugging_face(streaming: bool) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra of the text recipes")
    rows = datasets.Dataset.from_dict({"x": [[float(k), 1.0] for k in range(6)], "y": list(range(6))})
    if streaming:
        return rows.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4).with_format("torch")
    return rows.with_format("torch")


KINDS: dict[str, Callable[[], Any]] = {
    "list of tensors": lambda: [torch.ones(2), torch.zeros(2)],
    "list of named tuples": lambda: [Pair(torch.ones(2), "a"), Pair(torch.zeros(2), "b")],
    "list of mappings": lambda: [{"x": torch.ones(2), "more": [torch.zeros(1), ("text", 3)]}],
    "list of mappings of other types": lambda: [OrderedDict(x=torch.ones(2)), defaultdict(list, x=torch.zeros(2))],
    "list of batches that move themselves": lambda: [Moving(torch.ones(2)), Moving(torch.zeros(2))],
    "list of token batches": token_batches,
    "list of graphs": graphs,
    "loader": lambda: shuffled(2),
    "loader with a generator": lambda: shuffled(2, generator=own_generator()),
    "loader with a sampler's generator": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(Augmented(), generator=own_generator()), 2, True)
    ),
    "loader with workers": lambda: shuffled(2, num_workers=1),
    "loader with workers that persist": lambda: shuffled(2, num_workers=1, persistent_workers=True),
    "loader with an epoch sampler": lambda: DataLoader(Augmented(), 2, sampler=EpochSampler(7)),
    "loader of graphs": graph_loader,
    "data set": lambda: hugging_face(streaming=False),
    "loader of a data set": lambda: DataLoader(hugging_face(streaming=False), 2, shuffle=True),
    "stream": lambda: hugging_face(streaming=True),
    "loader of a stream": lambda: DataLoader(hugging_face(streaming=True), 2),
}

kinds = pytest.mark.parametrize("kind", KINDS)


def plain(batch: Any) -> Any:
    """Return the content of a batch, for comparison; a device is represented by its type."""
    if isinstance(batch, Tensor):
        return "tensor", batch.device.type, str(batch.dtype), batch.shape, None if batch.is_meta else batch.tolist()
    if isinstance(batch, Moving):
        return "Moving", plain(batch.inputs)
    if hasattr(batch, "to_dict"):  # graphs
        return type(batch).__name__, {name: plain(value) for name, value in sorted(batch.to_dict().items())}
    if isinstance(batch, (dict, list, tuple)) or hasattr(batch, "items"):
        items = batch.items() if hasattr(batch, "items") else enumerate(batch)
        return type(batch).__name__, [(name, plain(value)) for name, value in items]
    return batch


def take(stream: Stream, count: int) -> list[Any]:
    return [plain(stream.next()) for _ in range(count)]


@kinds
def test_batches_reach_the_level_unchanged(kind: str) -> None:
    """The loss receives the batches of the stream, in the order of plain iteration if that draws nothing."""
    data, given_to_loss = KINDS[kind](), []

    def loss(own: Any, batch: Any) -> Tensor:
        given_to_loss.append(plain(batch))
        return own().square().sum()

    level = Level("x", variables(torch.ones(1)), loss, data=data, optimizer=partial(SGD, lr=0.1))
    mlopt.solve(Problem(level), 3, seed=4, progress=False)
    assert given_to_loss == take(Stream("x", KINDS[kind](), 4, CPU), 3)
    if isinstance(data, list):
        assert given_to_loss == [plain(data[k % len(data)]) for k in range(3)]
    if kind == "data set":
        assert given_to_loss == [plain(data[k]) for k in range(3)]


@kinds
def test_batches_move_to_the_device_of_the_level_and_the_data_do_not(kind: str) -> None:
    """The device is `meta`, which every machine has. Some batches move in place: the level moves a copy."""
    data = KINDS[kind]()
    before = [plain(batch) for batch in data] if isinstance(data, list) else []
    moved = Stream("x", data, 0, META).next()
    assert "'meta'" in str(plain(moved))
    assert "'cpu'" not in str(plain(moved))
    assert before == ([plain(batch) for batch in data] if isinstance(data, list) else [])
    here = Stream("x", KINDS[kind](), 0, CPU).next()
    assert type(moved) is type(here)
    assert "'meta'" not in str(plain(here))


@pytest.mark.parametrize("kind", ["stream", "loader of a stream", "loader with an epoch sampler"])
def test_data_that_shuffle_by_epoch_receive_the_epoch(kind: str) -> None:
    length = len(list(KINDS[kind]()))
    epochs = [take(stream, length) for stream in [Stream("x", KINDS[kind](), 0, CPU)] for _ in range(3)]
    held = [sorted(str(epoch)) for epoch in epochs] if kind == "stream" else []
    assert len({str(epoch) for epoch in epochs}) == 3
    assert all(h == held[0] for h in held)  # the same rows, in another order
    again = Stream("x", KINDS[kind](), 0, CPU)
    assert [take(again, length) for _ in range(3)] == epochs


def test_a_sampler_receives_each_epoch_before_it_begins() -> None:
    sampler = EpochSampler(4)
    stream = Stream("x", DataLoader(torch.arange(4), sampler=sampler, batch_size=None), 0, CPU)
    rows = [int(stream.next()) for _ in range(12)]
    assert list(dict.fromkeys(sampler.epochs)) == [0, 1, 2]
    for epoch in range(3):
        sampler.epoch = epoch
        assert rows[4 * epoch : 4 * epoch + 4] == list(sampler)


@pytest.mark.parametrize("disturbance", ["level", "dropout", "estimator", "callback", "evaluation", "nothing"])
def test_the_order_of_a_level_ignores_other_draws(disturbance: str) -> None:
    """The order does not depend on draws of another level, the network, an estimator, a callback or an evaluation."""
    seen: dict[str, list[Any]] = {"outer": [], "inner": []}

    def drawing(*_: Any) -> None:
        torch.rand(3)
        random.random()
        np.random.rand()

    def run(disturbed: str) -> list[Any]:
        torch.manual_seed(11)
        seen["inner"].clear()
        module = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5 if disturbed == "dropout" else 0.0))

        def inner(own, batch, *, outer):
            seen["inner"].append(plain(batch))
            return own(torch.ones(1)).square().sum() + (own[0].weight * outer()).sum()

        def outer(own, batch, *, inner):
            if disturbed == "level":
                drawing()
            return inner(torch.ones(1)).sum() + own().square().sum()

        rule = mlopt.Neumann(iterations=2) if disturbed == "estimator" else mlopt.Identity()
        slow = partial(SGD, lr=0.01)
        batches = 5 if disturbed == "level" else 2
        problem = Problem(
            Level("outer", variables(torch.ones(1)), outer, data=shuffled(batches), optimizer=slow),
            Level("inner", module, inner, data=shuffled(2), optimizer=slow, steps=3, estimator=rule),
        )
        callbacks = [callback(on_step_begin=drawing)] if disturbed == "callback" else []
        evaluate = (lambda problem: drawing() or {}) if disturbed == "evaluation" else None
        mlopt.solve(problem, 4, seed=9, callbacks=callbacks, evaluate=evaluate, progress=False)
        # The evaluations of a pullback repeat the previous batch.
        return [batch for k, batch in enumerate(seen["inner"]) if k == 0 or batch != seen["inner"][k - 1]]

    orders = run("nothing"), run(disturbance)
    assert orders[0] == orders[1] == take(Stream("inner", shuffled(2), 9, CPU), 12)


@settings(max_examples=6, deadline=None)
@kinds
@given(taken=st.integers(0, 11), seed=st.integers(0, 100), more=st.integers(1, 8))
def test_a_stream_resumes_at_its_saved_position(kind: str, taken: int, seed: int, more: int) -> None:
    """It resumes bit-equally across epochs, from the files of a checkpoint, and again from that stream."""
    if "workers" in kind:  # they are slow
        taken, more = taken % 5, 3

    def saved(state: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            serialization.write(Path(folder), state)
            return serialization.read(Path(folder))

    stream = Stream("x", KINDS[kind](), seed, CPU)
    take(stream, taken)
    state = saved(stream.state_dict())
    expected = take(stream, more)

    random.seed(taken)
    np.random.seed(more)
    torch.manual_seed(seed + more)
    before = torch.get_rng_state()
    resumed = Stream("x", KINDS[kind](), seed + 1, CPU)  # the state replaces its seed
    resumed.load_state_dict(state)
    split = more // 2
    rows = take(resumed, split)
    last = Stream("x", KINDS[kind](), 0, CPU)
    last.load_state_dict(saved(resumed.state_dict()))
    assert rows + take(last, more - split) == expected
    assert (last.epoch, last.position) == (stream.epoch, stream.position)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("rows", "drop_last"), [(14, True), (14, False), (8, False)])
def test_a_stream_of_whole_epochs_resumes_with_the_next_order(rows: int, drop_last: bool) -> None:
    """At the end of an epoch, the sampler may draw from its generator after the last batch."""

    def stream() -> Stream:
        generator = torch.Generator().manual_seed(3)
        data = DataLoader(torch.arange(rows), batch_size=4, shuffle=True, drop_last=drop_last, generator=generator)
        return Stream("x", data, 1, CPU)

    whole, resumed = stream(), stream()
    whole.take("all")
    resumed.load_state_dict(whole.state_dict())
    for _ in range(3):
        assert [batch.tolist() for batch in resumed.take("all")] == [batch.tolist() for batch in whole.take("all")]


@pytest.mark.parametrize("persistent", [True, False])
def test_levels_may_share_a_loader(persistent: bool) -> None:
    """Each level has its own order and position, and so has any other iterator."""

    def loader() -> DataLoader[Any]:
        return shuffled(2, num_workers=int(persistent), persistent_workers=persistent)

    alone = {name: take(Stream(name, loader(), 3, CPU), 6) for name in "ab"}
    shared = loader()
    streams, rows = {name: Stream(name, shared, 3, CPU) for name in "ab"}, {"a": [], "b": []}  # type: Any, Any
    for _ in range(2):
        for name, stream in streams.items():
            rows[name] += take(stream, 3)
        assert len(list(shared)) == 4
    assert rows == alone


def test_data_too_short_to_resume_are_named() -> None:
    stream = Stream("x", [torch.ones(1)] * 4, 0, CPU)
    take(stream, 3)
    with pytest.raises(mlopt.ProblemError, match=r"level 'x': its data end after 2 batches.*had taken 3"):
        Stream("x", [torch.ones(1)] * 2, 0, CPU).load_state_dict(stream.state_dict())
