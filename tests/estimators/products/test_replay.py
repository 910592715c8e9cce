"""Replays of compiled code, with a stand-in for the graphs of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlopt
from mlopt.estimators.products import replay as replaying
from mlopt.estimators.products.replay import Replay, replay


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
    """A graph whose replay runs the captured work again, and writes over the results of the capture."""

    gpu: Device
    work: Callable[[], Sequence[Tensor]]
    results: Sequence[Tensor]

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
        for result, value in zip(self.results, self.work(), strict=True):
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
        "device": lambda _: contextlib.nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    captured = replaying._captured

    def recorded(graph: Any, work: Callable[[], Sequence[Tensor]], device: torch.device) -> Sequence[Tensor]:
        graph.work, graph.results = work, captured(graph, work, device)
        return graph.results

    monkeypatch.setattr(replaying, "_captured", recorded)
    monkeypatch.setattr(replaying, "_gpu", lambda _: torch.device("cpu"))
    replaying._side.cache_clear()
    return device


def affine(a: Tensor, b: Tensor, v: Tensor) -> Sequence[Tensor]:
    return a * v + b, (a + v).sum()


def tensors(seed: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).unbind())


def test_points_take_turns_and_results_last(gpu: Device) -> None:
    first, second, vectors = tensors(0, 2), tensors(1, 2), tensors(2, 4)
    own = Replay(affine, [x.requires_grad_() for x in first], vectors[:1])
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


def test_captures_share_one_stream(gpu: Device) -> None:
    # Libraries keep a workspace of up to 32 MiB for each stream.
    for seed in range(3):
        Replay(affine, tensors(seed, 2), tensors(seed, 1))
    assert len(gpu.streams) == 1


def test_another_stream_waits_for_the_last_replay(gpu: Device) -> None:
    first, other, kept, vectors = gpu.current, Stream(), tensors(0, 2), tensors(1, 1)
    evaluate = Replay(affine, kept, vectors).at(kept)
    evaluate(vectors)
    with gpu.entered(other):
        evaluate(vectors)
        evaluate(vectors)
    evaluate(vectors)
    assert other.waits == [first]
    assert first.waits[-1:] == [other]


def test_an_interrupted_copy_leaves_no_point_in_place(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, vectors = tensors(0, 2), tensors(1, 2), tensors(2, 1)
    own = Replay(affine, first, vectors)
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


def test_expanded_arguments_keep_their_strides(gpu: Device) -> None:
    def affine_in_all(a: Tensor, b: Tensor, v: Tensor) -> Sequence[Tensor]:
        assert (a.stride(), b.stride()) == ((0, 0), (1, 0))
        return (a * v + b,)

    def kept(seed: int) -> list[Tensor]:
        (own,) = tensors(seed, 1)
        return [own[0].expand(5, 5), own[:, None].expand(5, 5)]

    first, second, vector = kept(0), kept(1), torch.eye(5)
    made = replay(affine_in_all, first, [vector])
    assert made is not None
    for point in (first, second):
        assert torch.equal(made.at(point)([vector])[0], affine_in_all(*point, vector)[0])


def test_both_products_of_a_level_with_weight_decay_are_replayed(
    gpu: Device, replayed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[Replay] = set()
    at = Replay.at
    monkeypatch.setattr(Replay, "at", lambda own, kept: used.add(own) or at(own, kept))
    inputs, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 2
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def inner(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        losses = cross_entropy(module(inputs), labels, reduction="none")
        return (weights() * losses).mean() + 0.1 * torch.stack([p.square().sum() for p in module.parameters()]).sum()

    def outer(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return cross_entropy(network(inputs), 1 - labels)

    def problem(**options: Any) -> mlopt.Problem:
        rule = mlopt.ConjugateGradient(iterations=3, damping=1.0, **options)
        weights = mlopt.variables(torch.ones(6, dtype=torch.float64))
        return mlopt.Problem(
            mlopt.Level("weights", weights, outer), mlopt.Level("network", network, inner, estimator=rule)
        )

    # The first is of the Hessian, which holds the constant of the decay as an expanded tensor; the other of the mixed product.
    assert distance(gradient_of(problem(compile=True)), gradient_of(problem())) < 1e-12
    assert len(used) == 2
