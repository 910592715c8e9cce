"""Replays of compiled code, with a stand-in for the graphs of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mlopt.estimators.products import replay as replaying
from mlopt.estimators.products.replay import Replay


class Stream:
    """A stream that records what it waits for."""

    def __init__(self, *_: Any) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)

    def synchronize(self) -> None:
        pass


class Device:
    """A GPU in the manner of torch 2.8, whose failed captures leave the allocator and the generator as they are."""

    def __init__(self) -> None:
        self.current = Stream()
        self.streams: list[Stream] = []
        self.served: list[object] = []
        self.generator_captures = False
        self.fails = False
        self.work: Any = None

    def stream(self, *_: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def end(self, index: int, pool: object) -> None:
        if pool not in self.served:
            raise RuntimeError("not currently recording to mempool_id")
        self.served.remove(pool)

    @contextlib.contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Graph:
    """A graph whose replay calls the code of the device again, and writes over the results of the capture."""

    gpu: Device
    replayed: Replay

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self._pool, self._stream = pool, self.gpu.current
        self.gpu.served.append(pool)
        self.gpu.generator_captures = True

    def capture_end(self) -> None:
        assert self.gpu.current is self._stream
        if self.gpu.fails:
            self.gpu.fails = False
            raise RuntimeError("operation failed due to a previous error during capture")
        self.gpu.served.remove(self._pool)
        self.gpu.generator_captures = False

    def replay(self) -> None:
        own = self.replayed
        for result, value in zip(own._results, own._code(*own._kept, *own._vectors), strict=True):
            result.copy_(value)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(Graph, "gpu", device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end, raising=False)
    stand_ins = {
        "CUDAGraph": Graph,
        "Stream": device.stream,
        "current_stream": lambda *_: device.current,
        "graph_pool_handle": object,
        "is_current_stream_capturing": lambda: False,
        "stream": device.entered,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replaying._side.cache_clear()
    return device


def affine(a: Tensor, b: Tensor, v: Tensor) -> Sequence[Tensor]:
    return a * v + b, (a + v).sum()


def made(kept: Sequence[Tensor], vectors: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch) -> Replay:
    made = Replay(affine, kept, vectors)
    monkeypatch.setattr(Graph, "replayed", made, raising=False)
    return made


def tensors(seed: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).unbind())


def test_points_take_turns_and_results_last(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, vectors = tensors(0, 2), tensors(1, 2), tensors(2, 4)
    own = made([x.requires_grad_() for x in first], vectors[:1], monkeypatch)
    points = [(first, own.at(first)), (second, own.at(second))]
    outcomes = [(kept, v, evaluate([v])) for v in vectors for kept, evaluate in points]
    for kept, v, outcome in outcomes:
        for result, expected in zip(outcome, affine(*kept, v), strict=True):
            assert not result.requires_grad
            assert torch.equal(result, expected)


def test_a_failed_capture_leaves_allocator_and_generator_as_they_were(gpu: Device) -> None:
    before, gpu.fails = gpu.current, True
    with pytest.raises(RuntimeError, match="previous error"):
        Replay(affine, tensors(0, 2), tensors(1, 1))
    assert not gpu.served
    assert not gpu.generator_captures
    assert gpu.current is before


def test_an_error_of_the_code_ends_the_capture(gpu: Device) -> None:
    calls = []

    def runs_out_of_memory(a: Tensor, v: Tensor) -> Sequence[Tensor]:
        calls.append(a)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return (a * v,)

    with pytest.raises(torch.OutOfMemoryError):
        Replay(runs_out_of_memory, tensors(0, 1), tensors(1, 1))
    assert not gpu.served
    assert not gpu.generator_captures


def test_captures_share_one_stream(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Libraries keep a workspace of up to 32 MiB for each stream.
    for seed in range(3):
        made(tensors(seed, 2), tensors(seed, 1), monkeypatch)
    assert len(gpu.streams) == 1


def test_another_stream_waits_for_the_last_replay(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other, kept, vectors = gpu.current, Stream(), tensors(0, 2), tensors(1, 1)
    evaluate = made(kept, vectors, monkeypatch).at(kept)
    evaluate(vectors)
    with gpu.entered(other):
        evaluate(vectors)
        evaluate(vectors)
    evaluate(vectors)
    assert other.waits == [first]
    assert first.waits[-1:] == [other]


def test_an_interrupted_copy_leaves_no_point_in_place(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, vectors = tensors(0, 2), tensors(1, 2), tensors(2, 1)
    own = made(first, vectors, monkeypatch)
    evaluate, interrupted = own.at(first), own.at(second)
    evaluate(vectors)
    copy = replaying._copy

    def interrupt(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        copy(targets, sources)
        raise KeyboardInterrupt

    monkeypatch.setattr(replaying, "_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted(vectors)
    monkeypatch.setattr(replaying, "_copy", copy)
    assert torch.equal(evaluate(vectors)[0], affine(*first, *vectors)[0])
