"""Data of any kind reach their level as they are, in an order of the level's own, and go on where a checkpoint says."""

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
    """Rows with noise of all three kinds, drawn on access."""

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
    """A batch that knows how to move."""

    inputs: Tensor

    def to(self, device: torch.device) -> Moving:
        return Moving(self.inputs.to(device))


class Told(Sampler[int]):
    """An order that depends on the epoch that it is told of alone, as that of DistributedSampler."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.told = count, 0, []  # type: int, int, list[int]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


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
    "list of what moves itself": lambda: [Moving(torch.ones(2)), Moving(torch.zeros(2))],
    "list of token batches": token_batches,
    "list of graphs": graphs,
    "loader": lambda: DataLoader(Augmented(), 2, shuffle=True),
    "loader with a generator": lambda: DataLoader(Augmented(), 2, shuffle=True, generator=own_generator()),
    "loader with a sampler's generator": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(Augmented(), generator=own_generator()), 2, True)
    ),
    "loader with workers": lambda: DataLoader(Augmented(), 2, shuffle=True, num_workers=1),
    "loader with workers that persist": lambda: DataLoader(
        Augmented(), 2, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "loader with a told sampler": lambda: DataLoader(Augmented(), 2, sampler=Told(7)),
    "loader of graphs": graph_loader,
    "data set": lambda: hugging_face(streaming=False),
    "loader of a data set": lambda: DataLoader(hugging_face(streaming=False), 2, shuffle=True),
    "stream": lambda: hugging_face(streaming=True),
    "loader of a stream": lambda: DataLoader(hugging_face(streaming=True), 2),
}

kinds = pytest.mark.parametrize("kind", KINDS)


def plain(batch: Any) -> Any:
    """Return what a batch holds, to be compared; of the device, the kind."""
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
def test_batches_reach_the_level_as_they_are(kind: str) -> None:
    """In the order of plain iteration, where that draws nothing; what the stream holds is what the loss is given."""
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
def test_batches_move_to_the_levels_device_and_the_data_stay(kind: str) -> None:
    """To `meta`, which every machine has. Some batches move in place: the level moves a copy."""
    data = KINDS[kind]()
    before = [plain(batch) for batch in data] if isinstance(data, list) else []
    moved = Stream("x", data, 0, META).next()
    assert "'meta'" in str(plain(moved))
    assert "'cpu'" not in str(plain(moved))
    assert before == ([plain(batch) for batch in data] if isinstance(data, list) else [])
    here = Stream("x", KINDS[kind](), 0, CPU).next()
    assert type(moved) is type(here)
    assert "'meta'" not in str(plain(here))


@pytest.mark.parametrize("kind", ["stream", "loader of a stream", "loader with a told sampler"])
def test_data_that_shuffle_by_epoch_are_told_of_it(kind: str) -> None:
    length = len(list(KINDS[kind]()))
    epochs = [take(stream, length) for stream in [Stream("x", KINDS[kind](), 0, CPU)] for _ in range(3)]
    held = [sorted(str(epoch)) for epoch in epochs] if kind == "stream" else []
    assert len({str(epoch) for epoch in epochs}) == 3
    assert all(h == held[0] for h in held)  # the same rows, in another order
    again = Stream("x", KINDS[kind](), 0, CPU)
    assert [take(again, length) for _ in range(3)] == epochs


def test_a_sampler_is_told_of_each_epoch_before_it_begins() -> None:
    sampler = Told(4)
    stream = Stream("x", DataLoader(torch.arange(4), sampler=sampler, batch_size=None), 0, CPU)
    rows = [int(stream.next()) for _ in range(12)]
    assert list(dict.fromkeys(sampler.told)) == [0, 1, 2]
    for epoch in range(3):
        sampler.epoch = epoch
        assert rows[4 * epoch : 4 * epoch + 4] == list(sampler)


@pytest.mark.parametrize("disturbance", ["level", "dropout", "estimator", "callback", "evaluation", "nothing"])
def test_an_order_is_its_levels_own(disturbance: str) -> None:
    """Whatever else draws: another level, the network, an estimator, a callback, an evaluation."""
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

        class Restless(mlopt.Callback):
            def on_step_begin(self, run):
                if disturbed == "callback":
                    drawing()

        rule = mlopt.Neumann(terms=2) if disturbed == "estimator" else mlopt.Identity()
        slow = partial(SGD, lr=0.01)
        batches = 5 if disturbed == "level" else 2
        problem = Problem(
            Level(
                "outer",
                variables(torch.ones(1)),
                outer,
                data=DataLoader(Augmented(), batches, shuffle=True),
                optimizer=slow,
            ),
            Level(
                "inner",
                module,
                inner,
                data=DataLoader(Augmented(), 2, shuffle=True),
                optimizer=slow,
                steps=3,
                estimator=rule,
            ),
        )
        evaluate = (lambda problem: drawing() or {}) if disturbed == "evaluation" else None
        mlopt.solve(problem, 4, seed=9, callbacks=[Restless()], evaluate=evaluate, progress=False)
        # A pullback's evaluations repeat the batch before.
        return [batch for k, batch in enumerate(seen["inner"]) if k == 0 or batch != seen["inner"][k - 1]]

    orders = run("nothing"), run(disturbance)
    assert orders[0] == orders[1] == take(Stream("inner", DataLoader(Augmented(), 2, shuffle=True), 9, CPU), 12)


@settings(max_examples=6, deadline=None)
@kinds
@given(taken=st.integers(0, 11), seed=st.integers(0, 100), more=st.integers(1, 8))
def test_a_stream_goes_on_where_its_state_says(kind: str, taken: int, seed: int, more: int) -> None:
    """Bit-equally, across ends of epochs, through the files of a checkpoint, and again from there."""
    if "workers" in kind:  # which take their time
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
    resumed = Stream("x", KINDS[kind](), seed + 1, CPU)  # whose seed is that of the state
    resumed.load_state_dict(state)
    split = more // 2
    found = take(resumed, split)
    last = Stream("x", KINDS[kind](), 0, CPU)
    last.load_state_dict(saved(resumed.state_dict()))
    assert found + take(last, more - split) == expected
    assert (last.epoch, last.position) == (stream.epoch, stream.position)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("persistent", [True, False])
def test_levels_may_share_a_loader(persistent: bool) -> None:
    """Each has an order and a place of its own, and so has whoever else iterates."""

    def loader() -> DataLoader[Any]:
        return DataLoader(Augmented(), 2, shuffle=True, num_workers=int(persistent), persistent_workers=persistent)

    alone = {name: take(Stream(name, loader(), 3, CPU), 6) for name in "ab"}
    shared = loader()
    streams, found = {name: Stream(name, shared, 3, CPU) for name in "ab"}, {"a": [], "b": []}  # type: Any, Any
    for _ in range(2):
        for name, stream in streams.items():
            found[name] += take(stream, 3)
        assert len(list(shared)) == 4
    assert found == alone


def test_data_that_are_too_short_to_go_on_with_are_named() -> None:
    stream = Stream("x", [torch.ones(1)] * 4, 0, CPU)
    take(stream, 3)
    with pytest.raises(mlopt.ProblemError, match=r"level 'x': its data end after 2 batches.*had taken 3"):
        Stream("x", [torch.ones(1)] * 2, 0, CPU).load_state_dict(stream.state_dict())
